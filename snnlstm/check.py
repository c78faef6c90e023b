"""The checks of the functional form, all together: they make a Call."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .call import Call, CellOptions, are_ours, make_call

__all__ = ["check_call"]

# The cache is typed, because stride=True, an error, must not find what stride=1 left.
_cached_options = lru_cache(maxsize=256, typed=True)(arguments.make_options)


def _options(*, surrogate: Any, quant: Any, **others: Any) -> CellOptions:
    """Check what describes the cell, once for equal arguments.

    Foreign callables stay out of the cache, which would keep them alive.
    """
    if are_ours(surrogate, quant) and not torch.compiler.is_compiling():
        try:
            return _cached_options(surrogate=surrogate, quant=quant, **others)
        except TypeError:  # a wrong type, or one without a hash: the checks below name it
            pass
    return arguments.make_options(surrogate=surrogate, quant=quant, **others)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_call(
    x: Any, syn: Any = None, mem: Any = None, weight: Any = None, bias: Any = None, *,
    threshold: Any = 1.0, spike_grad: Any = None, surrogate_disable: Any = False,
    reset_mechanism: Any = "none", max_pool: Any = 0, avg_pool: Any = 0, state_quant: Any = None,
    graded_spikes_factor: Any = 1.0, inhibition: Any = False, stride: Any = 1, dilation: Any = 1,
    record: Any = False, checkpoint: Any = False, batch_first: Any = False,
) -> Call:  # fmt: skip
    """Check every argument of :func:`snnlstm.functional.sconv2dlstm`, which documents them."""
    in_channels, channels = arguments.weight_tensors(weight, bias)
    if arguments.flag("batch_first", batch_first) and isinstance(x, Tensor) and x.dim() == 5:
        x = x.transpose(0, 1)
    x = arguments.input_tensor(x, weight, in_channels, bool(batch_first))
    sequence, disable = x.dim() == 5, arguments.flag("surrogate_disable", surrogate_disable)
    options = _options(
        kernel_size=tuple(weight.shape[2:]),
        stride=_hashable(stride),
        dilation=_hashable(dilation),
        reset=reset_mechanism,
        max_pool=_hashable(max_pool),
        avg_pool=_hashable(avg_pool),
        surrogate=arguments.surrogate(spike_grad, disable),
        quant=arguments.quantiser(state_quant),
        inhibition=inhibition,
        checkpoint=checkpoint,
        sequence=sequence,
        record=arguments.check_record(record, sequence),
    )
    shape = arguments.state_shape(x, channels, options)
    syn = arguments.state_tensor("syn", syn, shape, x, weight)
    mem = arguments.state_tensor("mem", mem, shape, x, weight)
    threshold = arguments.scalar_like("threshold", threshold, x, shape, options)
    graded = arguments.scalar_like("graded_spikes_factor", graded_spikes_factor, x, shape, options)
    return make_call((x, syn, mem, weight, bias, threshold, graded, options))
