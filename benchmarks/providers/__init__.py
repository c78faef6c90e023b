"""Lists all providers, which are the ways of running a layer that the suite compares."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.providers import with_snnlstm as ours
from benchmarks.providers import with_snntorch as theirs
from benchmarks.providers.base import Provider, Setting, Unavailable, captured

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        theirs.SnnTorchEager,
        theirs.SnnTorchCompiled,
        theirs.SnnTorchCompiledLast,
        captured(theirs.SnnTorchEager, "snntorch-cudagraph"),
        captured(theirs.SnnTorchCompiledLast, "snntorch-compile-graph"),
        theirs.Hoisted,
        ours.SnnlstmStep,
        ours.Snnlstm,
        *ours.ALGORITHMS,
        captured(ours.Snnlstm, "snnlstm-cudagraph"),
        *ours.SAVING,
    )
}
BASELINE = theirs.SnnTorchEager.name
DETAILS = ("direct", "winograd", "cudnn", "hybrid", "checkpoint")
DETAILS = tuple(f"snnlstm-{name}" for name in DETAILS)
"""The long table shows these providers; the short table and the plots of speed do not."""
QUICK_PROVIDERS = (BASELINE, "hoisted", "snnlstm-step", "snnlstm")


def find_providers(names: Iterable[str]) -> list[type[Provider]]:
    """Returns the named providers and the baseline, which comes first.

    Raises ValueError that names an unknown provider.
    """
    for name in names:
        if name not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"--providers: no provider is called {name!r}; known: {known}")
    return [PROVIDERS[name] for name in PROVIDERS if name in names or name == BASELINE]


__all__ = ["BASELINE", "PROVIDERS", "Provider", "Setting", "Unavailable", "find_providers"]
