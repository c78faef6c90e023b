"""Providers captured in a CUDA graph: no launch overhead, all T steps in one replay."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import Case
from benchmarks.providers.base import Provider, Setting
from benchmarks.providers.with_snnlstm import Snnlstm
from benchmarks.providers.with_snntorch import SnnTorchCompiledLast, SnnTorchEager


class Captured(Provider):
    """Goes before the provider that it captures."""

    @classmethod
    def why_not(cls, case: Case, setting: Setting) -> str | None:
        if setting.device != "cuda":
            return "CUDA graphs need --device cuda"
        return super().why_not(case, setting)

    def prepare(self, mode: str) -> tuple[Callable[[], object], Callable[[], object]]:
        setup, run = super().prepare(mode)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuDNN picks and allocates outside the capture
            for _ in range(3):
                setup()
                run()
        torch.cuda.current_stream().wait_stream(side)
        if mode == "backward":
            first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(first):
                setup()
            with torch.cuda.graph(second, pool=first.pool()):
                run()
            return first.replay, second.replay
        setup()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        # Each replay overwrites the gradients, which the graph allocated: nothing to clear.
        return (lambda: None), graph.replay


class SnnTorchGraph(Captured, SnnTorchEager):
    """snnTorch's loop."""

    name = "snntorch-cudagraph"
    title = "snnTorch's loop captured in a CUDA graph"


class SnnTorchCompiledGraph(Captured, SnnTorchCompiledLast):
    """snnTorch's loop, compiled and channels-last."""

    name = "snntorch-compile-graph"
    title = "the same captured in a CUDA graph"


class SnnlstmGraph(Captured, Snnlstm):
    """Our whole sequence."""

    name = "snnlstm-cudagraph"
    title = "snnlstm by sequence, captured in a CUDA graph"
