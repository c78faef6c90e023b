"""The module SConv2dLSTM: its arguments, states and return values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..calls import spec
from ..calls.call import (
    Call,
    as_image,
    batch_before_time,
    channel_broadcast,
    check_threshold,
    checked_call,
    dtype_source,
    real_tensor,
    values,
)
from ..calls.entries import Entry, find_entry, kept_entries
from ..calls.lengths import checked_lengths
from ..calls.spec import CellSpec, Size
from ..compat.registry import register
from ..compat.torch_private import NO_LEVEL, backward_pass, level_of
from ..dispatch.path import Path, log_fallback
from ..dispatch.reasons import EXPORT, is_usual_step, misfit, recording_and_overrides
from ..dispatch.run import Results, run_call, run_traced, run_usual
from ..reference import Overrides
from .attributes import CellAttributes
from .state import State


class SConv2dLSTM(CellAttributes):
    """Spiking convolutional LSTM cell: snnTorch's, faster.

    A drop-in replacement for ``snntorch.SConv2dLSTM`` 1.0.0, with the same constructor,
    attributes, results and state_dict. It is a subclass of that class if snnTorch is installed.
    One step computes, with ``spike(u) = 1 where u > 0``::

        reset = spike(mem - threshold)
        i, f, o, g = conv(cat[x, mem]).chunk(4)
        syn = sigmoid(f) * syn + sigmoid(i) * tanh(g)
        mem = sigmoid(o) * tanh(syn), then the reset
        spk = spike(pool(mem) - threshold)

    **The cell is stateful, also with init_hidden=False.** A call without states continues from
    those of the last call, not from zeros. It starts from zeros in a new cell, after
    :meth:`reset_mem` or :meth:`reset_hidden`, with states of shape (0,), and for an input whose
    batch or image size differs from the last one's.

    Parameters
    ----------
    in_channels, out_channels : int
        Cin of the input and C of the states.
    kernel_size : int or (int, int)
        Odd. The padding keeps the image size. Here and below, a pair may be a list.
    bias : bool, default True
        Whether ``conv`` has a bias.
    max_pool, avg_pool : int or (int, int), default 0
        Pool mem before the threshold; 0 is off. At most one may be set. The returned mem is not
        pooled.
    threshold : float or Tensor, default 1.0
        Broadcasts to mem's shape, for example (C, 1, 1). It is copied. mem never exceeds 1, so
        the default never spikes. Use 0.05, and look at :func:`snnlstm.spike_rates`.
    spike_grad : callable, optional
        Surrogate gradient, ``snnlstm.surrogate.atan()`` by default. snnTorch's are recognised;
        the attribute ``spike_grad`` then is our equivalent. Any other callable works on the
        reference path.
    surrogate_disable : bool, default False
        spk carries no gradient.
    init_hidden : bool, default False
        The states live in the cell only: a call takes the input alone and returns spk.
    inhibition : bool, default False
        Only the neuron with the highest (pooled) mem of each sample may spike. The cell takes the
        reference path.
    learn_threshold : bool, default False
        The threshold is a parameter.
    reset_mechanism : {"none", "subtract", "zero"}, default "none"
        Changes the new mem of a neuron whose mem exceeded the threshold before the step.
    state_quant : callable, default False
        Quantises syn and mem: ``snnlstm.quant.state_quant(...)``, snnTorch's, or any callable.
    output : bool, default False
        Return spk, syn and mem, also with `init_hidden`.
    stride : int or (int, int), default 1
        Stride of the input's convolution; the states are (N, C, ceil(H / sh), ceil(W / sw)).
    dilation : int or (int, int), default 1
        Dilation of the whole convolution.
    device : torch.device or str, optional
        Device of the parameters and buffers.
    dtype : torch.dtype, optional
        float32, float64, float16 or bfloat16.
    batch_first : bool, default False
        A sequence x, spk and recorded states are (N, T, ...), not (T, N, ...).

    Attributes
    ----------
    conv : nn.Conv2d
        weight (4C, Cin + C, kh, kw), gates in the order i, f, o, g, and bias (4C,).
    threshold : Tensor or nn.Parameter
        May be set to a number.
    syn, mem : Tensor
        Stored states, (N, C, Ho, Wo), or (0,) before the first call. They may be set by hand.
        They are no buffers and are not in the state_dict, but move with the cell.
    spk : Tensor or None
        The last spikes.
    path : snnlstm.Path or None
        The implementation that ran the last call, and why. A `path` that the user sets stays.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type, or does not fit.

    References
    ----------
    Shi et al., "Convolutional LSTM network", NeurIPS 2015; Eshraghian et al., "Training
    spiking neural networks using lessons from deep learning", Proc. IEEE 111, 2023.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        bias: bool = True,
        max_pool: Size = 0,
        avg_pool: Size = 0,
        threshold: float | Tensor = 1.0,
        spike_grad: Callable[[Tensor], Tensor] | None = None,
        surrogate_disable: bool = False,
        init_hidden: bool = False,
        inhibition: bool = False,
        learn_threshold: bool = False,
        reset_mechanism: str = "none",
        state_quant: Any = False,
        output: bool = False,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_first: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        spec.integer("in_channels", in_channels)
        spec.integer("out_channels", out_channels)
        kernel = spec.kernel("kernel_size", kernel_size, self._dims)
        spec.pooling(max_pool, avg_pool, self._dims)
        bias = spec.flag("bias", bias)
        learn_threshold = spec.flag("learn_threshold", learn_threshold)
        device = spec.device_or_none("device", device)
        dtype = spec.dtype_or_none("dtype", dtype) or torch.get_default_dtype()
        shape = real_tensor("threshold", threshold).shape
        check_threshold(threshold)
        channel_broadcast("threshold", shape, out_channels, self._dims)

        self._spec = None
        self._initial_threshold = (
            threshold.detach().cpu().clone() if isinstance(threshold, Tensor) else threshold
        )
        # snnTorch's cell assigns these before conv: a surrogate or a quantiser that is an nn.Module
        # becomes a submodule, and comes before conv in the state_dict.
        self.spike_grad = spec.surrogate(spike_grad, surrogate_disable)
        self.init_hidden, self.inhibition, self.output = init_hidden, inhibition, output
        self.surrogate_disable, self.state_quant = surrogate_disable, state_quant
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.bias = kernel_size, bias
        self.max_pool, self.avg_pool = max_pool, avg_pool
        self.stride, self.dilation = stride, dilation
        self.batch_first = batch_first
        self._reset_mechanism = spec.reset_name(reset_mechanism)
        self.padding = self._make_spec().padding[-self._dims :]

        conv = self._conv_kind(
            in_channels + out_channels, 4 * out_channels, kernel[-self._dims :],
            padding=self.padding, dilation=self.dilation, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        initial = values(threshold).to(conv.weight.device, dtype, copy=True)
        if learn_threshold:
            self.threshold = nn.Parameter(initial)
        else:
            self.register_buffer("threshold", initial)
            if not state_quant:
                spec.warn_of_threshold(threshold)
        self.register_buffer("graded_spikes_factor", conv.weight.new_ones(()))
        self.register_buffer("reset_mechanism_val", self._reset_index(conv.weight.device))
        self.conv = conv
        self._state = State(conv.weight)
        self._remake_spec()
        register(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        unused = [name for name in _NEVER_CALLED if name in cls.__dict__]
        if unused:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(unused)}, which snntorch's cell calls "
                "and this one does not: override forward, fire or mem_reset instead"
            )

    # ---- the call -------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor | None = None,
        syn: Tensor | None = None,
        mem: Tensor | None = None,
        *extra: Any,
        record: bool = False,
        lengths: Any = None,
        input_: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Run one step, or a whole sequence.

        Parameters
        ----------
        x : Tensor
            (N, Cin, H, W), one step, or (T, N, Cin, H, W), a sequence, which equals T calls in
            one. x has the cell's dtype, or one that converts to it without loss, such as bool.
            **Time comes first.** An x of (N, T, Cin, H, W) has the same number of dimensions and
            would be read as N steps of T samples: for it, make the cell with ``batch_first=True``.
        syn, mem : Tensor, optional
            (N, C, Ho, Wo), or (0,), which means zeros, as do zeros of another batch or image size,
            such as from :meth:`reset_mem`. None continues from the stored state.
        record : bool, default False
            For a sequence: return syn and mem of every step.
        lengths : Tensor or list of int, optional
            For a sequence: (N,) ints, the steps of each sample, between 0 and T. After its last
            step a sample is padded: its spikes are 0, and its states, recorded ones too, stay as
            they are. Lengths on a GPU are clamped without a check.
        input_ : Tensor, optional
            snnTorch's name of x, accepted instead.

        Returns
        -------
        spk : Tensor
            (N, C, Ho // pool, Wo // pool), with a leading T for a sequence.
        syn, mem : Tensor
            (N, C, Ho, Wo) after the last step, or (T, N, C, Ho, Wo) with `record`; N comes before T
            with ``batch_first``. Not returned with ``init_hidden=True`` and ``output=False``.

        Raises
        ------
        TypeError
            If an argument is of the wrong type or dtype, or if a state is passed although
            ``init_hidden=True``.
        ValueError
            If a shape or device does not fit. After an error the stored state is as before.
        RuntimeError
            If torch.utils.checkpoint calls the cell again, and the stored state has changed since.

        Notes
        -----
        torch.export and the ONNX exporters record no stored states: an exported loop over steps
        starts from zeros. For one step pass syn and mem, and feed the returned ones to the next.
        """
        # The ONNX exporter of torch.jit passes keywords' defaults as positional arguments.
        if extra and not torch.onnx.is_in_onnx_export():
            raise TypeError(f"forward takes x, syn and mem, and others by name; got also {extra}")
        if self.init_hidden and not (syn is None and mem is None):
            raise TypeError(
                "`mem` or `syn` should not be passed as an argument while `init_hidden=True`"
            )
        name = "x"
        if input_ is not None:
            if x is not None:
                raise TypeError("forward takes x or input_, which mean the same, got both")
            x, name = input_, "input_"
        spec = self._spec or self._make_spec()
        if torch.compiler.is_compiling():
            return self._traced(x, syn, mem, record, lengths, spec, name)
        recording, overrides = self._recording_and_overrides(spec, False)
        known = None
        if overrides is None and recording is not EXPORT:
            known = self._known_call(x, syn, mem, record, lengths, spec)
        if known is not None:
            call, entry = known
        else:
            call = self._checked(x, syn, mem, record, lengths, spec, False, name)
            overrides = self._with_misfit(overrides, spec)
            entry = find_entry(self._entries, call, spec, shared=overrides is None)
        if entry is not self._entries[0]:  # else nothing changes
            self.__dict__["_entries"] = kept_entries(self._entries, entry)
        return self._return(call, run_call(entry, call, recording, overrides), recording, False)

    def _traced(
        self, x: Any, syn: Any, mem: Any, record: Any, lengths: Any, spec: CellSpec, name: str
    ) -> Any:
        """Run a call that torch.compile traces."""
        recording, overrides = self._recording_and_overrides(spec, True)
        if overrides is None and recording is None and record is False and lengths is None:
            given = self._as_it_came(x, syn, mem, False, None, True)
            if given is not None and is_usual_step(given, spec):
                out, path = run_usual(given, spec)
                if self._dims == 1:
                    out = tuple(map(_as_signal, out))
                object.__setattr__(self, "_path", path)  # nn.Module's takes long to trace
                object.__setattr__(self, "spk", out[0])
                self._state.store(out[1], out[2], True)
                return out[0] if self.init_hidden and not self.output else out
        call = self._checked(x, syn, mem, record, lengths, spec, True, name)
        overrides = self._with_misfit(overrides, spec)
        return self._return(call, run_traced(call, spec, recording, overrides), recording, True)

    def _known_call(
        self, x: Any, syn: Any, mem: Any, record: Any, lengths: Any, spec: CellSpec
    ) -> tuple[Call, Entry] | None:
        """Return the call, unchecked, and its entry; None if no similar call was checked before."""
        given = self._as_it_came(x, syn, mem, record, lengths, False)
        if given is None:
            return None
        call = Call._make(given)
        entry = find_entry(self._entries, call, spec, checked=False)
        return None if entry is None else (call, entry)

    def _as_it_came(
        self, x: Any, syn: Any, mem: Any, record: Any, lengths: Any, traced: bool
    ) -> tuple[Any, ...] | None:
        """Return a :class:`Call`'s items without a check; None if one needs a conversion."""
        if record is not False and record is not True:  # 1.0 and NumPy's True equal True
            return None
        attributes, conv = self.__dict__, self._modules.get("conv")
        inside: Any = getattr(conv, "__dict__", attributes)
        # An attribute in __dict__ hides the parameter or buffer of its name.
        if (
            "conv" in attributes or "threshold" in attributes
            or "graded_spikes_factor" in attributes or "weight" in inside or "bias" in inside
        ):  # fmt: skip
            return None
        threshold: Any = self._buffers.get("threshold")
        if threshold is None:
            threshold = self._parameters.get("threshold")
        if syn is None or mem is None:
            state = self._state
            if traced:
                is_usable = not state.restarted
            else:
                is_plain = level_of(state.syn) == level_of(state.mem) == NO_LEVEL
                is_usable = is_plain and backward_pass() in (-1, state.stored_in)
            if not is_usable:
                return None
            syn = state.syn if syn is None else syn
            mem = state.mem if mem is None else mem
        try:
            sequence = x.dim() == self._dims + 3
            if sequence and self.batch_first:
                x = x.transpose(0, 1)
            if lengths is not None and sequence:
                lengths = checked_lengths(lengths, x.shape[0], x.shape[1], x.device, False)
            parameters: Any = conv._parameters
            weight, bias = parameters["weight"], parameters["bias"]
            graded = self._buffers["graded_spikes_factor"]
            if self._dims == 1:
                x, syn, mem, weight = map(as_image, (x, syn, mem, weight))
                threshold, graded = as_image(threshold), as_image(graded)
            return x, syn, mem, weight, bias, threshold, graded, lengths, record
        except (AttributeError, KeyError, RuntimeError):
            return None  # an argument is no tensor or a sparse one, or conv lacks a parameter

    def _checked(
        self, x: Any, syn: Any, mem: Any, record: Any, lengths: Any, spec: CellSpec, traced: bool,
        name: str,
    ) -> Call:  # fmt: skip
        """Return the call, after a check of every argument; errors call x `name`."""
        if type(self.conv) is self._conv_kind:
            weight, bias = self.conv.weight, self.conv.bias
            weight = weight if self._dims == 2 else as_image(weight)
        else:
            weight, bias = dtype_source(self.conv, x, self.graded_spikes_factor), None
        passed = {"syn": syn, "mem": mem}

        def state_of(name: str, shape: tuple[int, ...], x: Tensor) -> Tensor:
            return self._states().before(name, passed[name], shape, x, weight, traced)

        return checked_call(
            x, weight, bias, self.threshold, self.graded_spikes_factor,
            (self.in_channels, self.out_channels), spec, state_of,
            record=record, lengths=lengths, batch_first=self.batch_first, traced=traced,
            dims=self._dims, name=name,
        )  # fmt: skip

    def _recording_and_overrides(
        self, spec: CellSpec, traced: bool
    ) -> tuple[Path | None, Overrides | None]:
        """Return what no key holds; see :func:`reasons.recording_and_overrides`."""
        kind, attributes = type(self), self.__dict__
        fire = mem_reset = None
        if kind.fire is not _FIRE or "fire" in attributes:
            fire = self._on_images(self.fire)
        if kind.mem_reset is not _MEM_RESET or "mem_reset" in attributes:
            mem_reset = self._on_images(self.mem_reset)
        # The conv may be a plain function, and may lie in __dict__.
        conv: Any = attributes.get("conv") or attributes["_modules"].get("conv") or self.conv
        recording, overrides = recording_and_overrides(
            conv, self._conv_kind, spec, fire, mem_reset, traced
        )
        if overrides is not None and overrides.conv is not None:
            overrides = overrides._replace(conv=self._on_images(conv))
        return recording, overrides

    def _with_misfit(self, overrides: Overrides | None, spec: CellSpec) -> Overrides | None:
        """Add conv to the overrides of a call if its weight has not the shape of the cell's."""
        if overrides is not None and overrides.conv is not None:
            return overrides
        channels = self.in_channels, self.out_channels
        reason = misfit(self.conv, self._conv_kind, spec, channels)
        if reason is None:
            return overrides
        return (overrides or Overrides())._replace(conv=self._on_images(self.conv), reason=reason)

    def _return(
        self, call: Call, results: Results, recording: Path | None, traced: bool
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Keep the results of a call that succeeded, and return what the user gets of them."""
        spk, syn, mem, path = results
        if self._dims == 1:
            fresh = not traced and path.native
            spk, syn, mem = (_as_signal(result, fresh) for result in (spk, syn, mem))
        out = spk, syn, mem
        if self.batch_first:
            out = batch_before_time(call, True, spk, syn, mem)
        state = self._state
        if recording is EXPORT:  # its tensors must not outlive it in the cell
            state = state.exported()
            state.spk = out[0]
        else:
            if traced:  # dynamo follows attributes, not dictionaries
                object.__setattr__(self, "_path", path)  # nn.Module's takes long to trace
                object.__setattr__(self, "spk", out[0])
            else:  # nn.Module.__setattr__ is slow
                attributes = self.__dict__
                attributes["_path"], attributes["spk"] = path, out[0]
                if path.slow:
                    log_fallback(path, self)
                else:
                    attributes.pop("reset", None)
        if not call.record:
            state.store(syn, mem, traced)
        elif syn.shape[0] > 0:  # a sequence without a step leaves the states as they were
            # The states are copies: snnTorch detaches states in place, which views refuse.
            state.store(syn[-1].clone(), mem[-1].clone(), traced)
        return out[0] if self.init_hidden and not self.output else out

    def _on_images(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Wrap the user's code, which takes signals if the cell does, so that it takes images."""
        if self._dims == 2:
            return function
        return lambda image: as_image(function(image.squeeze(-2)))

    def fire(self, mem: Tensor) -> Tensor:
        """Spikes (N, C, H, W) of an already pooled membrane potential of that shape.

        mem is quantised, thresholded and multiplied with the graded factor.
        """
        threshold, graded = self.threshold, self.graded_spikes_factor
        spec = self._spec or self._make_spec()
        return reference.fire(mem, threshold, graded, spec.surrogate, spec.quant, spec.inhibition)

    def mem_reset(self, mem: Tensor) -> Tensor:
        """Reset signal of a membrane potential: 1 where it exceeds the threshold, detached."""
        spec = self._spec or self._make_spec()
        return reference.reset_signal(mem, self.threshold, spec.surrogate)


def _as_signal(image: Tensor, fresh: bool = False) -> Tensor:
    """(..., 1, L) as (..., L), not a view: snnTorch detaches states in place, which views refuse.

    `fresh` says that autograd has saved nothing in the tensor's memory.
    """
    return image.squeeze_(-2) if fresh else image.squeeze(-2).clone()


_NEVER_CALLED = (
    "_base_state_function", "_base_state_reset_zero", "_base_sub", "_base_zero", "_base_int",
)  # fmt: skip
_FIRE, _MEM_RESET = SConv2dLSTM.fire, SConv2dLSTM.mem_reset


class SConv1dLSTM(SConv2dLSTM):
    """:class:`SConv2dLSTM` on signals, (N, Cin, L), instead of images.

    x is (N, Cin, L) for one step or (T, N, Cin, L) for a sequence, and syn and mem are
    (N, C, ceil(L / stride)). ``conv`` is an nn.Conv1d, whose weight is (4C, Cin + C, k).
    `kernel_size`, `max_pool`, `avg_pool`, `stride` and `dilation` are an int, or a tuple of one.
    All other arguments, the attributes, results and errors are those of that class.
    """

    _dims, _conv_kind = 1, nn.Conv1d
