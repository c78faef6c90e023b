"""Every way of running a layer that the suite compares. `snntorch` is what all are set against."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.providers import with_snnlstm as ours
from benchmarks.providers import with_snntorch as theirs
from benchmarks.providers.base import Captured, Provider, Setting, Unavailable


class SnnTorchGraph(Captured, theirs.SnnTorchEager):
    name = "snntorch-cudagraph"
    title = "snnTorch's loop captured in a CUDA graph"


class SnnTorchCompiledGraph(Captured, theirs.SnnTorchCompiledLast):
    name = "snntorch-compile-graph"
    title = "the same captured in a CUDA graph"


class SnnlstmGraph(Captured, ours.Snnlstm):
    name = "snnlstm-cudagraph"
    title = "snnlstm by sequence, captured in a CUDA graph"


PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        theirs.SnnTorchEager,
        theirs.SnnTorchCompiled,
        theirs.SnnTorchCompiledLast,
        SnnTorchGraph,
        SnnTorchCompiledGraph,
        theirs.Hoisted,
        ours.SnnlstmStep,
        ours.Snnlstm,
        *ours.ALGORITHMS,
        SnnlstmGraph,
        ours.SnnlstmCheckpoint,
        ours.SnnlstmGates,
    )
}
BASELINE = theirs.SnnTorchEager.name
DETAILS = ("direct", "winograd", "pointwise", "hybrid", "checkpoint", "gates")
DETAILS = tuple(f"snnlstm-{name}" for name in DETAILS)
"""Those that the long table lists, and the short one and the plots of speed leave out."""
QUICK_PROVIDERS = (BASELINE, "hoisted", "snnlstm-step", "snnlstm")


def find_providers(names: Iterable[str]) -> list[type[Provider]]:
    """Providers by name, the baseline always among them and first.

    Raises ValueError naming the provider that is not known.
    """
    for name in names:
        if name not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"--providers: no provider is called {name!r}; known: {known}")
    return [PROVIDERS[name] for name in PROVIDERS if name in names or name == BASELINE]


__all__ = ["BASELINE", "PROVIDERS", "Provider", "Setting", "Unavailable", "find_providers"]
