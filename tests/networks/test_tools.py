"""Tools that print summaries or count operations say of our cell what they say of snnTorch's.

Such tools put hooks on every module, ``conv`` too. While the hooks live, the cell runs in plain
torch, and the log says so at most once for all cells.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import snnlstm
from benchmarks.networks import NETWORKS, Spectrogram, twins


def torchinfo_(net: nn.Module, x: Tensor) -> Any:
    torchinfo = pytest.importorskip("torchinfo")
    summary = torchinfo.summary(net, input_data=x, verbose=0)
    layers = [(i.class_name, i.output_size, i.num_params) for i in summary.summary_list]
    return layers, summary.total_params, summary.total_mult_adds


def torchsummary_(net: nn.Module, x: Tensor) -> Any:
    torchsummary = pytest.importorskip("torchsummary")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        torchsummary.summary(net, tuple(x.shape[1:]), device="cpu")
    return printed.getvalue()


def fvcore_(net: nn.Module, x: Tensor) -> Any:
    fvcore = pytest.importorskip("fvcore.nn")
    count = fvcore.FlopCountAnalysis(net, x).unsupported_ops_warnings(False)
    return count.by_module_and_operator(), fvcore.parameter_count(net)


def ptflops_(net: nn.Module, x: Tensor) -> Any:
    ptflops = pytest.importorskip("ptflops")
    printed = io.StringIO()
    shape = tuple(x.shape[1:])
    total = ptflops.get_model_complexity_info(net, shape, as_strings=False, ost=printed)
    # The extra_repr behind " MACs" is cut off, because our cell's says more.
    return total, [line.split(" MACs")[0] for line in printed.getvalue().splitlines()]


def torchs_(net: nn.Module, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    return {layer: dict(counts) for layer, counts in counter.get_flop_counts().items()}


@pytest.mark.parametrize("tool", [torchinfo_, torchsummary_, fvcore_, ptflops_, torchs_])
def test_tools_see_what_they_see_in_snntorchs_cell(
    tool: Callable[..., Any], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snnlstm.path, "_logged", set())
    (x, _), *_ = NETWORKS["spectrogram"].batches()
    theirs, ours = twins(Spectrogram)
    found = tool(ours, x)
    assert "lstm1.conv" in str(found) or "Conv2d" in str(found)
    assert found == tool(theirs, x)
    assert len([r for r in caplog.records if r.name == "snnlstm"]) <= 1
    # The tool runs again when the cells have states with a history; then a call has no hooks.
    ours(x)
    assert ours.lstm1.path.native
    assert ours.lstm2.path.native
    assert tool(ours, x) == found
    ours(x)
    assert ours.lstm1.path.native
    assert len([r for r in caplog.records if r.name == "snnlstm"]) <= 1


@pytest.mark.filterwarnings("ignore")  # the trace's, about sizes that become constants
def test_a_network_with_a_history_is_traced_again() -> None:
    """torch.jit.trace must not keep a state with a history; its own check traces twice."""
    (x, _), *_ = NETWORKS["spectrogram"].batches()
    net = twins(Spectrogram)[1].eval()
    out = net(x)
    for _ in range(2):
        traced = torch.jit.trace(net, x)
        torch.testing.assert_close(traced(x), out)
        torch.testing.assert_close(net(x), out)
        assert net.lstm1.path.native
