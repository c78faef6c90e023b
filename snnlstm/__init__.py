"""Faster drop-in replacements for snnTorch's SConv2dLSTM cell and Leaky neuron."""

import sys
from typing import NoReturn

from .version import __version__

try:
    from . import functional, quant, reference, surrogate
    from .calls.algorithms import algorithm, get_algorithm, set_algorithm
    from .compat.registry import reset
    from .compat.snntorch import TheirLeaky
    from .dispatch.path import Path
    from .native.lender import empty_cache
    from .networks.layers import LayerReport
    from .networks.sequential import Sequential, unroll
    from .networks.spikes import SpikeCount, spike_rates
    from .networks.swap import SwapReport, accelerate, patch, unpatch
    from .neurons.convlstm import ConvLSTM, ConvLSTMCell
    from .neurons.leaky import Leaky
    from .neurons.sconv2dlstm import SConv1dLSTM, SConv2dLSTM
except Exception:
    # `python -m snnlstm` must report what is missing or broken, even torch itself. During the
    # import sys.argv[0] is "-m", and the module's name precedes the arguments.
    if sys.argv[:1] != ["-m"] or sys.orig_argv[-len(sys.argv)].removeprefix("-m") != __name__:
        raise

__all__ = [
    "ConvLSTM",
    "ConvLSTMCell",
    "LayerReport",
    "Leaky",
    "Path",
    "SConv1dLSTM",
    "SConv2dLSTM",
    "Sequential",
    "SpikeCount",
    "SwapReport",
    "__version__",
    "accelerate",
    "algorithm",
    "empty_cache",
    "functional",
    "get_algorithm",
    "patch",
    "quant",
    "reference",
    "reset",
    "set_algorithm",
    "spike_rates",
    "surrogate",
    "unpatch",
    "unroll",
]


if "TheirLeaky" in globals():
    if not TheirLeaky.__module__.startswith("snntorch."):
        __all__.remove("Leaky")
        del Leaky
    del TheirLeaky


def __getattr__(name: str) -> NoReturn:
    if name == "Leaky":
        raise ImportError(
            "snnlstm.Leaky is a subclass of snntorch.Leaky, and snntorch is not installed, or has "
            "no Leaky: pip install snntorch"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, without the modules that define them."""
    return sorted(__all__)
