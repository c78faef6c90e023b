"""The cell as a function, which keeps no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls.call import batch_before_time, checked_call, state_tensor, weight_tensor
from .calls.entries import find_entry
from .calls.spec import Size, flag, make_spec
from .dispatch.reasons import recorded_now
from .dispatch.run import run_call, run_traced

__all__ = ["sconv2dlstm"]

_last: dict[str, Any] = {}  # the entry of the last call


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
    stride: Size = 1,
    dilation: Size = 1,
    record: bool = False,
    lengths: Any = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one step or a sequence of steps of a spiking convolutional LSTM.

    ``C`` is ``weight.shape[0] // 4``, and ``Ho, Wo`` are ``ceil(H / stride[0])`` and
    ``ceil(W / stride[1])``. :mod:`snnlstm.reference` has the formulas.

    Parameters
    ----------
    x : Tensor
        (N, Cin, H, W) is one step, (T, N, Cin, H, W) a sequence. x has the dtype of weight, or one
        that converts to it without loss, such as bool.
    syn, mem : Tensor, optional
        (N, C, Ho, Wo), synaptic current and membrane potential before the first step, in the dtype
        of weight. None and a tensor of shape (0,) mean zeros.
    weight : Tensor
        (4C, Cin + C, kh, kw), with odd kh and kw and the gates in the order i, f, o, g. Required.
    bias : Tensor, optional
        (4C,).
    threshold, graded_spikes_factor : float or Tensor, default 1.0
        They broadcast to (N, C, Ho, Wo) and to the pooled size; the factor multiplies spk.
    record, lengths
        As in :meth:`snnlstm.SConv2dLSTM.forward`.
    **options
        All others are arguments of :class:`snnlstm.SConv2dLSTM`, with the same defaults.

    Returns
    -------
    spk : Tensor
        (N, C, Ho // pool, Wo // pool), with a leading T for a sequence.
    syn, mem : Tensor
        (N, C, Ho, Wo) after the last step, or (T, N, C, Ho, Wo) with `record`.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If a shape, size, device or name does not fit.

    References
    ----------
    Shi et al., "Convolutional LSTM network", NeurIPS 2015; Eshraghian et al., "Training
    spiking neural networks using lessons from deep learning", Proc. IEEE 111, 2023;
    ``snntorch.SConv2dLSTM`` 1.0.0.
    """
    traced = torch.compiler.is_compiling()
    channels, states = weight_tensor(weight), {"syn": syn, "mem": mem}
    assert weight is not None
    spec = make_spec(
        tuple(weight.shape[2:]), traced=traced, spike_grad=spike_grad,
        surrogate_disable=surrogate_disable, reset_mechanism=reset_mechanism, max_pool=max_pool,
        avg_pool=avg_pool, state_quant=state_quant, inhibition=inhibition, stride=stride,
        dilation=dilation,
    )  # fmt: skip
    call = checked_call(
        x, weight, bias, threshold, graded_spikes_factor, channels, spec,
        lambda name, shape, x: state_tensor(name, states[name], shape, x, weight),
        record=record, lengths=lengths, batch_first=flag("batch_first", batch_first),
        traced=traced,
    )  # fmt: skip
    if traced:
        results = run_traced(call, spec, recorded_now(True))
    else:
        entry = _last["entry"] = find_entry((_last.get("entry"),), call, spec)
        results = run_call(entry, call, recorded_now())
    return batch_before_time(call, batch_first, *results[:3])
