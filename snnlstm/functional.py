"""The stateless form of the cell, and the one place that starts an implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, reference
from .options import CellOptions
from .path import Path, choose, get_algorithm, native_path
from .quant import StateQuant
from .surrogate import Surrogate

try:
    from . import autograd as _autograd
except ImportError:  # the core is missing; path.py says so and never chooses it
    _autograd = None  # type: ignore[assignment]

__all__ = ["sconv2dlstm"]


class Call(NamedTuple):
    """Checked arguments of :func:`snnlstm.reference.run`, in its order."""

    x: Tensor
    syn: Tensor
    mem: Tensor
    weight: Tensor
    bias: Tensor | None
    threshold: Tensor
    graded: Tensor
    options: CellOptions


def compute(
    x: Tensor,
    syn: Tensor,
    mem: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    graded: Tensor,
    options: CellOptions,
    conv: Callable[[Tensor], Tensor] | None = None,
    conv_reason: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Path]:
    """Choose an implementation for arguments that have been checked, and run it.

    Parameters
    ----------
    x, syn, mem, weight, bias, threshold, graded, options
        As :func:`snnlstm.reference.run` takes them.
    conv : callable, optional
        Called in place of the convolution if `conv_reason` says that it must be.
    conv_reason : str, optional
        What :func:`snnlstm.path.conv_reason` said.

    Returns
    -------
    spk, syn, mem : Tensor
    path : Path
    """
    path = choose(x, syn, mem, weight, bias, threshold, graded, options, conv_reason)
    if path.native:
        assert _autograd is not None
        out = _autograd.run(x, syn, mem, weight, bias, threshold, graded, options, get_algorithm())
        if not torch.compiler.is_compiling():  # which algorithm it was is known afterwards
            path = native_path(_autograd.last_name())
    else:
        call = conv if conv_reason is not None else None
        out = reference.run(x, syn, mem, weight, bias, threshold, graded, options, call)
    return (*out, path)


def sconv2dlstm(
    x: Tensor,
    syn: Tensor | None = None,
    mem: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    threshold: float | Tensor = 1.0,
    spike_grad: Callable[[Tensor], Tensor] | None = None,
    surrogate_disable: bool = False,
    reset_mechanism: str = "none",
    max_pool: Any = 0,
    avg_pool: Any = 0,
    state_quant: Any = None,
    graded_spikes_factor: float | Tensor = 1.0,
    inhibition: bool = False,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    record: bool = False,
    checkpoint: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step, or a sequence of them, of a spiking convolutional LSTM.

    ``C`` is ``weight.shape[0] // 4`` and ``Ho, Wo`` are ``ceil(H / stride[0])`` and
    ``ceil(W / stride[1])``. The formulas stand in :mod:`snnlstm.reference`.

    Parameters
    ----------
    x : Tensor
        (N, Cin, H, W) is one step, (T, N, Cin, H, W) a sequence. Of weight's dtype, or one
        that converts to it without loss, such as bool.
    syn, mem : Tensor, optional
        (N, C, Ho, Wo), synaptic current and membrane potential before the first step, of
        weight's dtype. None and a tensor of shape (0,) mean zeros.
    weight : Tensor
        (4C, Cin + C, kh, kw), kh and kw odd; gates in the order i, f, o, g. Required.
    bias : Tensor, optional
        (4C,).
    threshold : float or Tensor, default 1.0
        Broadcasts to (N, C, Ho, Wo) and to the pooled size. mem never exceeds 1, so the
        default never spikes: 0.1 and below are usual.
    spike_grad : callable, optional
        A surrogate of :mod:`snnlstm.surrogate` or :mod:`snntorch.surrogate`, or any callable;
        ``atan()`` by default.
    surrogate_disable : bool, default False
        spk carries no gradient.
    reset_mechanism : {"none", "subtract", "zero"}
        What a neuron whose mem exceeded the threshold before the step does to its mem.
    max_pool, avg_pool : int or (int, int), default 0
        Pools mem before the threshold; 0 is off. At most one of them.
    state_quant : callable, optional
        A :class:`snnlstm.quant.StateQuant`, a quantiser of snnTorch, or any callable.
    graded_spikes_factor : float or Tensor, default 1.0
        Multiplies spk.
    inhibition : bool, default False
        Of each sample only the neuron with the highest (pooled) mem may spike.
    stride, dilation : int or (int, int), default 1
        Of the convolution; the stride applies to x alone.
    record : bool, default False
        With a sequence: return syn and mem of every step.
    checkpoint : bool, default False
        Recompute the gates in the backward pass instead of keeping them.

    Returns
    -------
    spk : Tensor
        (N, C, Ho // pool, Wo // pool), with a leading T for a sequence.
    syn, mem : Tensor
        (N, C, Ho, Wo) after the last step, or (T, N, C, Ho, Wo) with `record`.

    Raises
    ------
    TypeError
        If an argument is of the wrong type or dtype.
    ValueError
        If a shape, size, device or name does not fit.

    References
    ----------
    Shi et al., "Convolutional LSTM network", NeurIPS 2015; Eshraghian et al., "Training
    spiking neural networks using lessons from deep learning", Proc. IEEE 111, 2023;
    ``snntorch.SConv2dLSTM`` 1.0.0.
    """
    call = check_call(
        x,
        syn,
        mem,
        weight,
        bias,
        threshold=threshold,
        spike_grad=spike_grad,
        surrogate_disable=surrogate_disable,
        reset_mechanism=reset_mechanism,
        max_pool=max_pool,
        avg_pool=avg_pool,
        state_quant=state_quant,
        graded_spikes_factor=graded_spikes_factor,
        inhibition=inhibition,
        stride=stride,
        dilation=dilation,
        record=record,
        checkpoint=checkpoint,
    )
    return compute(*call)[:3]


# typed: stride=True must not find what stride=1 left.
_cached_options = lru_cache(maxsize=256, typed=True)(arguments.make_options)


def _options(*, surrogate: Any, quant: Any, **others: Any) -> CellOptions:
    """Check what describes the cell, once for equal arguments.

    Foreign callables stay out of the cache, which would keep them alive.
    """
    ours = isinstance(surrogate, Surrogate) and (quant is None or isinstance(quant, StateQuant))
    if ours and not torch.compiler.is_compiling():
        try:
            return _cached_options(surrogate=surrogate, quant=quant, **others)
        except TypeError:  # a wrong type, perhaps one that cannot be hashed: say which below
            pass
    return arguments.make_options(surrogate=surrogate, quant=quant, **others)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_call(
    x: Any,
    syn: Any = None,
    mem: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    threshold: Any = 1.0,
    spike_grad: Any = None,
    surrogate_disable: Any = False,
    reset_mechanism: Any = "none",
    max_pool: Any = 0,
    avg_pool: Any = 0,
    state_quant: Any = None,
    graded_spikes_factor: Any = 1.0,
    inhibition: Any = False,
    stride: Any = 1,
    dilation: Any = 1,
    record: Any = False,
    checkpoint: Any = False,
) -> Call:
    """Check every argument of the functional form and put it into its normal form.

    Raises
    ------
    TypeError, ValueError
        As :func:`snnlstm.functional.sconv2dlstm` documents.
    """
    in_channels, channels = arguments.weight_tensors(weight, bias)
    x = arguments.input_tensor(x, weight, in_channels)
    sequence = x.dim() == 5
    options = _options(
        kernel_size=tuple(weight.shape[2:]),
        stride=_hashable(stride),
        dilation=_hashable(dilation),
        reset=reset_mechanism,
        max_pool=_hashable(max_pool),
        avg_pool=_hashable(avg_pool),
        surrogate=arguments.surrogate(
            spike_grad, arguments.flag("surrogate_disable", surrogate_disable)
        ),
        quant=arguments.quantiser(state_quant),
        inhibition=inhibition,
        checkpoint=checkpoint,
        sequence=sequence,
        record=arguments.check_record(record, sequence),
    )
    shape = (x.shape[-4], channels, *options.state_size(x.shape[-2], x.shape[-1]))
    arguments.pool_fits(shape, options)
    states = []
    for name, state in (("syn", syn), ("mem", mem)):
        if state is None:
            states.append(x.new_zeros(shape))
        else:
            states.append(arguments.state_tensor(name, state, shape, x, weight))
    return Call(
        x,
        states[0],
        states[1],
        weight,
        bias,
        arguments.scalar_like("threshold", threshold, x, shape, options),
        arguments.scalar_like("graded_spikes_factor", graded_spikes_factor, x, shape, options),
        options,
    )
