"""A faster drop-in replacement for snnTorch's SConv2dLSTM."""

from . import functional, quant, reference, surrogate
from .path import algorithm, set_algorithm
from .sconv2dlstm import SConv2dLSTM
from .snntorch import accelerate
from .version import __version__

__all__ = [
    "SConv2dLSTM",
    "__version__",
    "accelerate",
    "algorithm",
    "functional",
    "quant",
    "reference",
    "set_algorithm",
    "surrogate",
]
