"""snnTorch's leaky integrate-and-fire neuron, fused: ``snntorch.Leaky`` with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .lengths import hold_last, last_state, mask_padding
from .path import LastPath, Path, against_device, log_fallback, native_path, reason_now
from .snntorch import Neuron, TheirLeaky, recognise_surrogate
from .spec import DTYPES
from .state import ResetSource
from .surrogate import NONE, Surrogate

try:
    from .native import leaky as kernels
except ImportError:  # path.against_device says why
    kernels = None  # type: ignore[assignment]

PRIVATE = ("_path", "_layer_name", "_recognised", "_reset_source", "_reset")
"""The attributes of an instance that only our class has."""

_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
_CALLED = ("fire", "mem_reset", "_base_state_function", *_RESETS)  # snnTorch's forward calls these
_RELEASED = {name: getattr(TheirLeaky, name, None) for name in (*_CALLED, "forward")}
_MECHANISMS = {_RELEASED[name]: reset for name, reset in _RESETS.items()}
_TRACED = Path("reference", "torch.compile traces plain operators")
_PARAMETERS = ("beta", "threshold", "graded_spikes_factor")
_TENSORS = {Tensor, nn.Parameter}
_BYPASS = getattr(Neuron, "_surrogate_bypass", None)  # what surrogate_disable makes of spike_grad


def replaced(layer: Any) -> str | None:
    """What makes a layer compute something else than snnTorch's class; None if nothing does."""
    attributes, kind = layer.__dict__, type(layer)
    if TheirLeaky.forward is not _RELEASED["forward"] or "forward" in attributes:
        return "its forward was replaced"
    for name in _CALLED:
        if name in attributes or getattr(kind, name) is not _RELEASED[name]:
            return f"its {name} was replaced"
    if getattr(layer.state_function, "__func__", None) not in _MECHANISMS:
        return "its state_function was replaced"
    return None


class Leaky(TheirLeaky):  # type: ignore[misc]
    """Leaky integrate-and-fire neuron: snnTorch's, in one pass over memory.

    A subclass of ``snntorch.Leaky`` 1.0.0, with the same constructor, attributes, state_dict and
    results. One step computes, with ``spike(u) = 1 where u > 0``::

        reset = spike(mem - threshold)
        mem = clamp(beta, 0, 1) * mem + x - reset * threshold    # "subtract", the default
        mem = clamp(beta, 0, 1) * (1 - reset) * mem + x          # "zero"
        mem = clamp(beta, 0, 1) * mem + x                        # "none"
        spk = spike(mem - threshold) * graded_spikes_factor

    **The layer is stateful**: a mem that is not passed is the one that the last call left. A new
    layer starts from zeros; so do ``reset_mem()``, and an x of another shape than mem's.

    The kernels cover x of float32, float64, float16 and bfloat16 on the CPU and on CUDA, with a
    beta and a threshold that are numbers or vary along one dimension of x. snnTorch's own forward
    runs all other calls, such as those with ``reset_delay=False``, ``inhibition``, ``state_quant``
    or a surrogate of your own, and :attr:`path` says why. Three things differ from snnTorch: spk is
    float64 where x is (snnTorch's is float32), mem is float32 where x is of a half type, also with
    ``reset_mechanism="none"``, and an infinite threshold makes no NaN where nothing is reset.

    Attributes
    ----------
    path : snnlstm.path.Path or None
        The implementation that ran the last call, and the reason.
    mem : Tensor
        The stored state, of x's shape, or (0,) before the first call.
    reset : Tensor or None
        The reset signal of the last step call, computed when it is read; None after a sequence.

    References
    ----------
    Eshraghian et al., "Training spiking neural networks using lessons from deep learning",
    Proc. IEEE 111, 2023.
    """

    path = LastPath()
    _reset: Tensor | None = None

    @property
    def reset(self) -> Tensor | None:
        """1 where the mem before the last step exceeded the threshold, else 0; detached."""
        source = self.__dict__.get("_reset_source")
        return self._reset if source is None else source.signal()

    @reset.setter
    def reset(self, value: Tensor | None) -> None:
        self._reset_source, self._reset = None, value

    # ---- the call -------------------------------------------------------------------------

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """Run one step.

        Parameters
        ----------
        input_ : Tensor
            x, of any shape.
        mem : Tensor, optional
            Of x's shape; another shape means zeros. None goes on from the stored state.

        Returns
        -------
        spk, mem : Tensor
            Of x's shape; spk alone with ``init_hidden=True`` and ``output=False``.

        Raises
        ------
        TypeError
            If an argument is no tensor, or mem is passed although ``init_hidden=True``. After an
            error the stored state is as before.
        """
        if mem is not None and self.init_hidden:
            raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
        if torch.compiler.is_compiling():
            self._path = _TRACED
            return super().forward(input_, mem)
        before: Any = self._buffers.get("mem") if mem is None else mem
        neurons = self._described(input_, before, False)
        if type(neurons) is Path:
            return self._as_theirs(neurons, input_, mem)
        if before.shape != input_.shape:
            before = torch.zeros_like(input_, dtype=kernels.real(input_.dtype))
        spk, after = kernels.run(neurons, input_, before)
        source = self.__dict__.get("_reset_source") or ResetSource()
        source.follow(before, neurons.threshold, neurons.surrogate)
        self._keep(input_, after, source)
        return spk if self.init_hidden and not self.output else (spk, after)

    def sequence(self, x: Tensor, record: bool, lengths: Tensor | None = None) -> Any:
        """Run all steps of x (T, ...) in one call, where :meth:`takes` says that this can be.

        The result is spk of every step, (T, ...), and with `record` also mem. `lengths` (N,) are
        the steps of each sample of x (T, N, ...): after its last one a sample does not spike, and
        its mem stays. The layer's forward hooks get spk and mem of all steps.
        """
        hooks = tuple(self._forward_hooks.values())
        every, before = record or bool(hooks) or lengths is not None, self._buffers["mem"]
        if lengths is not None:  # a NaN in the padding must not reach a gradient
            x = mask_padding(x, lengths)
        if before.shape != x.shape[1:]:
            before = torch.zeros_like(x[0], dtype=kernels.real(x.dtype))
        spk, mem = kernels.run(self._described(x, before, True), x, before, every)
        after = mem[-1].clone() if mem.shape == x.shape else mem
        if lengths is not None:
            spk, after = mask_padding(spk, lengths), last_state(mem, before, lengths)
            mem = hold_last(mem, torch.zeros_like(before), lengths)
        self._keep(x, after, None)
        for hook in hooks:
            hook(self, (x,), (spk, mem))
        return (spk, mem) if record else spk

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels cover a sequence x (T, ...), so that :meth:`sequence` serves."""
        return type(self._described(x, self._buffers.get("mem"), True)) is not Path

    def _as_theirs(self, path: Path, x: Tensor, mem: Tensor | None) -> Any:
        """Run snnTorch's own forward, which stores mem and reset before it is done."""
        before = self._buffers.get("mem"), self.__dict__.get("_reset_source"), self._reset
        try:
            out = super().forward(x, mem)
        except BaseException:
            self._buffers["mem"], self._reset_source, self._reset = before
            raise
        self.__dict__["_path"] = path
        if path.slow:
            log_fallback(path, self)
        return out

    def _keep(self, x: Tensor, mem: Tensor, source: ResetSource | None) -> None:
        """Keep the results of a call that succeeded."""
        self._buffers["mem"] = mem
        path = native_path(kernels.BACKENDS[x.device.type].name())
        self.__dict__.update(_path=path, _reset_source=source, _reset=None)

    # ---- what the kernels can take ----------------------------------------------------------

    def _surrogate(self) -> Surrogate | None:
        """Return our surrogate for ``spike_grad``, None if there is none; found once a function."""
        theirs, cached = self.spike_grad, self.__dict__.get("_recognised")
        if cached is None or cached[0] is not theirs:
            ours = NONE if theirs is _BYPASS else recognise_surrogate(theirs)
            cached = theirs, ours if type(ours) is Surrogate else None
            self.__dict__["_recognised"] = cached
        return cached[1]

    def _parameter(self, name: str) -> Any:
        """Return a parameter or buffer; nn.Module's search takes a microsecond."""
        found = self._buffers.get(name)
        if found is None:
            found = self._parameters.get(name)
        return getattr(self, name) if found is None else found

    def _described(self, x: Any, mem: Any, sequence: bool) -> Any:
        """Describe the layer to the kernels; a Path, which says why, where they cannot run.

        `sequence` says that x is one, (T, ...).
        """
        if type(x) not in _TENSORS or type(mem) not in _TENSORS:
            for name, value in (("input_", x), ("mem", mem)):
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            return Path("reference", "x or mem is of a subclass of Tensor")
        path = reason_now() or against_device(x.device)
        if path is not None:
            return path
        surrogate: Any = self._surrogate()
        reason = replaced(self) or self._option_against(surrogate)
        if reason is None and (x.dtype not in DTYPES or mem.dtype not in DTYPES):
            reason = f"x is of {x.dtype} and mem of {mem.dtype}"
        if reason is None and mem.device != x.device and mem.shape == x.shape[sequence:]:
            reason = "mem is on another device"
        beta, threshold, graded = map(self._parameter, _PARAMETERS)
        if reason is None and (graded.requires_grad or graded.numel() != 1):
            reason = "graded_spikes_factor is learned, or is not a single number"
        device = x.device
        for tensor in (beta, threshold, graded):
            # A number on x's device needs no closer look, which would take half a microsecond.
            if tensor.dim() or tensor.device != device or type(tensor) not in _TENSORS:
                reason = reason or _parameter_against(self, tensor, x, x.shape[sequence:])
        if reason is not None:
            return Path("reference", reason, slow=True)
        reset = _MECHANISMS[self.state_function.__func__]
        return kernels.Neurons(reset, surrogate, beta, threshold, graded, sequence)

    def _option_against(self, surrogate: Surrogate | None) -> str | None:
        if not self.reset_delay:
            return "reset_delay is False"
        if self.inhibition:
            return "inhibition"
        if self.state_quant:
            return "state_quant"
        return "the surrogate is not a known one" if surrogate is None else None


def _parameter_against(layer: Any, tensor: Any, x: Tensor, step: torch.Size) -> str | None:
    """Why the kernels cannot read a parameter in a call with x; `step` is the shape of a step."""
    name = next(name for name in _PARAMETERS if getattr(layer, name) is tensor)
    if type(tensor) not in _TENSORS or tensor.device != x.device:
        return f"{name} is on another device, or of a subclass of Tensor"
    if tensor.dim():
        if kernels.place(tensor, step, step) is None:
            return f"{name} varies along more than one dimension, or does not broadcast to x"
        if torch.promote_types(tensor.dtype, kernels.real(x.dtype)) is not kernels.real(x.dtype):
            return f"{name} is of {tensor.dtype}, which makes results of it"
    return None
