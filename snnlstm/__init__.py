"""A faster drop-in replacement for snnTorch's SConv2dLSTM."""

from . import functional, quant, reference, surrogate
from .path import algorithm, set_algorithm

__version__ = "0.1.0"

__all__ = [
    "algorithm",
    "functional",
    "quant",
    "reference",
    "set_algorithm",
    "surrogate",
]
