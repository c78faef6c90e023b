"""Every way of running a layer that the suite compares. `snntorch` is what all are set against."""

from __future__ import annotations

from benchmarks.providers.base import Provider, Setting, Unavailable
from benchmarks.providers.captured import SnnlstmGraph, SnnTorchCompiledGraph, SnnTorchGraph
from benchmarks.providers.hoisted import Hoisted
from benchmarks.providers.with_snnlstm import (
    Snnlstm,
    SnnlstmCheckpoint,
    SnnlstmDirect,
    SnnlstmHybrid,
    SnnlstmMeasured,
    SnnlstmPointwise,
    SnnlstmStep,
    SnnlstmWinograd,
)
from benchmarks.providers.with_snntorch import (
    SnnTorchCompiled,
    SnnTorchCompiledLast,
    SnnTorchEager,
)

BASELINE = SnnTorchEager.name

PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider
    for provider in (
        SnnTorchEager,
        SnnTorchCompiled,
        SnnTorchCompiledLast,
        SnnTorchGraph,
        SnnTorchCompiledGraph,
        Hoisted,
        SnnlstmStep,
        Snnlstm,
        SnnlstmDirect,
        SnnlstmWinograd,
        SnnlstmPointwise,
        SnnlstmHybrid,
        SnnlstmMeasured,
        SnnlstmGraph,
        SnnlstmCheckpoint,
    )
}

DETAILS = tuple(
    p.name
    for p in (SnnlstmDirect, SnnlstmWinograd, SnnlstmPointwise, SnnlstmHybrid, SnnlstmCheckpoint)
)
"""Those that the long table lists, and the short one and the plots of speed leave out."""

QUICK_PROVIDERS = (SnnTorchEager.name, Hoisted.name, SnnlstmStep.name, Snnlstm.name)


def find_providers(names: list[str]) -> list[type[Provider]]:
    """Providers by name, the baseline always among them and first.

    Raises ValueError naming the provider that is not known.
    """
    for name in names:
        if name not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise ValueError(f"--providers: no provider is called {name!r}; known: {known}")
    return [PROVIDERS[name] for name in PROVIDERS if name in names or name == BASELINE]


__all__ = ["BASELINE", "PROVIDERS", "Provider", "Setting", "Unavailable", "find_providers"]
