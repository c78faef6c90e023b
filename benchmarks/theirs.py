"""snnTorch's modules, or None in the place of each: the suite's help needs no library."""

from typing import Any

snntorch: Any
surrogate: Any
quant: Any
try:
    import snntorch
    from snntorch import surrogate
    from snntorch.functional import quant
except ModuleNotFoundError:
    snntorch = surrogate = quant = None
