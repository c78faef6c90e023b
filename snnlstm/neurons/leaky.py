"""snnTorch's leaky integrate-and-fire neuron, fused: ``snntorch.Leaky`` with another forward."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calls import algorithms
from ..calls.call import LEAKY_PARAMETERS, LeakyCall, check_transforms, real_tensor
from ..calls.entries import NO_ENTRIES
from ..calls.lengths import hold_last, last_state, mask_padding
from ..calls.spec import FINITE, RESETS, LeakySpec, Reset, check_dense, leaky_spec
from ..compat import snntorch
from ..compat.registry import register, skip_ours
from ..compat.snntorch import (
    Neuron,
    TheirLeaky,
    kind_of,
    reader_of,
    recognise_quant,
    recognise_surrogate,
)
from ..compat.torch_private import NO_LEVEL, backward_pass, exporting, has_ended, level_of
from ..dispatch.path import LastPath, Path, log_fallback
from ..dispatch.reasons import RANDOM, operator_path, recorded_now
from ..dispatch.run import run_leaky
from ..reference import leaky_step, real_dtype
from ..surrogate import NONE, Surrogate
from .state import NO_RESET, BufferedState, empty_like, note_pass, zeros_like

try:
    from ..native import leaky as kernels
    from ..native import leaky_operators as operators
except ImportError:  # reasons.against_device says why
    kernels = operators = None  # type: ignore[assignment]

_TRACED = Path("reference", "torch.compile traces plain operators")
_parameters_of = operator.itemgetter(*LEAKY_PARAMETERS)
_TENSORS = {Tensor, nn.Parameter}
_CLOSURES: dict[str, Any] = {"spike_grad": recognise_surrogate, "state_quant": recognise_quant}
_DECIDING = {"spike_grad", "_base", "reset_delay", "inhibition", "state_quant"}
"""The attributes that decide what a layer computes."""
_READ = {"threshold", "reset_mechanism_val"}
"""The tensors whose numbers decide what traced code must compute."""
_BYPASS = getattr(Neuron, "_surrogate_bypass", None)  # what surrogate_disable makes of spike_grad


class Leaky(TheirLeaky):  # type: ignore[misc]
    """Leaky integrate-and-fire neuron: snnTorch's, in one pass over memory.

    A subclass of ``snntorch.Leaky`` 1.0.0, with the same constructor, attributes, state_dict and
    results. One step computes, with ``spike(u) = 1 where u > 0``::

        reset = spike(mem - threshold)
        mem = clamp(beta, 0, 1) * mem + x - reset * threshold    # "subtract", the default
        mem = clamp(beta, 0, 1) * (1 - reset) * mem + x          # "zero"
        mem = clamp(beta, 0, 1) * mem + x                        # "none"
        spk = spike(mem - threshold) * graded_spikes_factor

    **The layer is stateful**: a call without mem continues from the last call's. It starts from
    zeros in a new layer, after ``reset_mem()``, and for an x of another shape than mem's.

    The kernels cover x of float32, float64, float16 and bfloat16 on the CPU and on CUDA. Plain
    torch runs other calls, such as those with a surrogate of your own. snnTorch's own forward runs
    a layer with ``reset_delay=False``, ``inhibition`` or ``state_quant``, a layer of which a method
    was replaced, and every layer if the installed snnTorch computes Leaky differently from 1.0.0.
    :attr:`path` says why. Except in snnTorch's own forward, four things differ from snnTorch: spk
    is float64 if x is (snnTorch's is float32); mem is float32 if x is of a half type, even with
    ``reset_mechanism="none"``; an infinite threshold makes no NaN where nothing is reset; and the
    layer stores no ``reset``, which ``mem_reset(mem)`` computes from the mem before the step.

    Attributes
    ----------
    path : snnlstm.Path or None
        The implementation that ran the last call, and the reason.
    mem : Tensor
        The stored state, of x's shape, or (0,) before the first call.

    References
    ----------
    Eshraghian et al., "Training spiking neural networks using lessons from deep learning",
    Proc. IEEE 111, 2023.
    """

    path = LastPath()
    _entries: Any = NO_ENTRIES
    registers_itself = True  # snnTorch's list has no place for it
    mem: Tensor
    _base: str
    """Name of the method that is ``state_function``."""
    _says: Any = None
    """The :class:`_Description` of the layer, once it has all attributes."""
    _stored_in: int = -1
    """The last backward pass in which mem was stored."""
    _stored: Any = None
    """mem as traced code reads it; made when the layer has one."""

    @wraps(TheirLeaky.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        skip_ours()
        given = dict(zip(("beta", "threshold"), args, strict=False)) | kwargs
        for name in {"beta", "threshold"} & given.keys():
            real_tensor(name, given[name])
        # snnTorch's constructor reads numbers, which tensors of the device meta do not have.
        on_meta = torch.get_default_device().type == "meta"
        with torch.device("cpu") if on_meta else nullcontext():
            super().__init__(*args, **kwargs)
        if on_meta:
            self.to("meta")
        register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mem":
            if isinstance(value, nn.Parameter):  # nn.Module would register it
                value = value.clone()
            if exporting():
                self._stored.exported().store(value)
                return
            if not torch.compiler.is_compiling():  # which would guard on the number
                self._note_pass()
            self._stored.restarted = False
        super().__setattr__(name, value)
        if name in _DECIDING:
            self._describe()
        elif name in _READ and self._says is not None:
            self._says.read(self)

    def _describe(self) -> _Description | None:
        """Describe the layer anew, because an attribute that decides was set."""
        attributes = self.__dict__
        if self._stored is None or self._stored.buffers is not self._buffers:
            attributes["_stored"] = BufferedState(self._buffers, False)
        # snnTorch's constructor sets one attribute after another.
        ready = _DECIDING.issubset(attributes.keys() | self._modules)
        attributes["_says"] = _Description(self, self._says) if ready else None
        return attributes["_says"]

    def _note_pass(self) -> None:
        stored = self._stored.__dict__
        self.__dict__["_stored_in"] = note_pass(self._stored_in, self._buffers, stored)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._says.read(self)

    def __getattr__(self, name: str) -> Any:
        if name == "reset":
            raise AttributeError(NO_RESET)
        if name == "reset_mechanism_val" and torch.compiler.is_compiling():
            return self._says.reset  # snnTorch branches on it; no trace can read a tensor's number
        if name == "mem" and exporting():
            return self._stored.exported().buffers["mem"]
        value = super().__getattr__(name)
        # What outlived a transform of torch.func counts as no state.
        return empty_like(value) if name == "mem" and has_ended(value) else value

    @property
    def state_function(self) -> Any:
        """The method that computes the next mem; snnTorch's constructor chooses it by the reset.

        It is made when it is read: a layer that held its own method would be part of a cycle, and
        only the garbage collector would free it.
        """
        other = self.__dict__.get("state_function") or self._modules.get("state_function")
        return other or getattr(type(self), self._base).__get__(self)

    @state_function.setter
    def state_function(self, value: Any) -> None:
        name = getattr(value, "__name__", "")
        self.__dict__.pop("state_function", None)
        if getattr(value, "__func__", self) is getattr(type(self), name, None):
            self._base = name
        else:
            self.__dict__["state_function"] = value

    def reset_mem(self) -> Tensor:
        """Set mem to zero, and return it.

        Under torch.compile it is empty, (0,), which means zeros, because the compiler would compile
        anew for each shape of the stored one. There an in-place change of the returned tensor, or
        of ``mem`` after a reset, takes effect only if the tensor is passed.
        """
        if torch.compiler.is_compiling():
            mem = self._parameter("threshold").detach().new_zeros(0)
            states = self._stored.exported() if exporting() else self._stored
            states.store(mem, True)  # nn.Module.__setattr__ would look at the old one
            return mem
        self.mem = zeros_like(self.mem)
        self._stored.restarted = True
        return self.mem

    def _detach(self) -> None:
        self.mem.detach_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaky:
        if has_ended(self._buffers["mem"]):
            self.reset_mem()
        return super()._apply(fn, recurse)

    # ---- copies ---------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without what cannot be copied: mem's graph, snnTorch's closures."""
        state = self.__dict__.copy()
        for name in ("_says", "_entries", "_stored_in", "_stored", "_path"):
            state.pop(name, None)
        for name, recognise in _CLOSURES.items():
            if isinstance(state.get(name), FunctionType):
                state[name] = recognise(state[name])
        if "mem" in self._buffers:
            state["_buffers"] = {**self._buffers, "mem": self.mem.detach()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._describe()
        register(self)

    def _replicate_for_data_parallel(self) -> Any:
        """Return a replica for DataParallel, which has a mem of its own."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_stored"] = BufferedState(replica._buffers, self._stored.restarted)
        return replica

    # ---- the call -------------------------------------------------------------------------

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """Run one step.

        Parameters
        ----------
        input_ : Tensor
            x, of any shape.
        mem : Tensor, optional
            Of x's shape; another shape means zeros. None continues from the stored state.

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
        replaced = snntorch.replaced(self, TheirLeaky)
        if torch.compiler.is_compiling():
            return self._traced(input_, mem, replaced)
        call = self._called(input_, mem)
        try:
            if replaced is not None:
                return self._theirs(input_, mem, Path("reference", replaced, slow=True))
            spk, after, path, self.__dict__["_entries"] = run_leaky(
                self._entries, call, self._described(), recorded_now()
            )
            if spk is None:
                if self._says.is_theirs:
                    return self._theirs(input_, mem, path)
                spk, after = self._plain(call, False)
        except RuntimeError:
            _explain(input_, call.mem)
            raise
        self._keep(after, path)
        return spk if self.init_hidden and not self.output else (spk, after)

    def sequence(self, x: Tensor, record: bool, lengths: Tensor | None = None) -> Any:
        """Run all steps of x (T, ...) in one call; returns None if the kernels do not cover it.

        The result is spk of every step, (T, ...), and with `record` also mem. `lengths` (N,) are
        the steps of each sample of x (T, N, ...): after its last one a sample does not spike, and
        its mem stays. The layer's forward hooks get spk and mem of all steps.
        """
        if kernels is None or recorded_now() or snntorch.replaced(self, TheirLeaky):
            return None
        hooks = tuple(self._forward_hooks.values())
        call = self._called(x, None, record or bool(hooks) or lengths is not None)
        try:
            if lengths is not None:  # a NaN in the padding must not reach a gradient
                x = mask_padding(x, lengths)
                call = call._replace(x=x, mem=kernels.fitting(call.mem, x, True))
            spk, mem, path, self.__dict__["_entries"] = run_leaky(
                self._entries, call, self._described(True), None
            )
        except RuntimeError:
            _explain(x, call.mem)
            raise
        if spk is None:
            return None
        after = mem[-1].clone() if mem.shape == x.shape else mem
        if lengths is not None:
            spk, after = mask_padding(spk, lengths), last_state(mem, call.mem, lengths)
            mem = hold_last(mem, call.mem, lengths)
        self._keep(after, path)
        for hook in hooks:
            hook(self, (x,), (spk, mem))
        return (spk, mem) if record else spk

    def _traced(self, x: Tensor, mem: Tensor | None, replaced: str | None) -> Any:
        """Run a step that torch.compile traces: as one operator, in plain torch, or by snnTorch."""
        if replaced is not None or self._says.is_theirs:
            object.__setattr__(self, "_path", _TRACED)  # nn.Module's takes long to trace
            return super().forward(x, mem)
        # The compiler takes some 0.04 ms for each bytecode, and more for each function.
        states, before = self._stored.exported() if exporting() else self._stored, mem
        if before is None:
            empty = states.restarted
            before = states.empty(self._parameter("threshold")) if empty else states.buffers["mem"]
        call, path = LeakyCall(x, before, *map(self._parameter, LEAKY_PARAMETERS)), None
        says = self._says
        if (
            operators is not None and says.text and algorithms.current != "reference"
            and kernels.reason_against(call, False) is None
        ):  # fmt: skip
            path = operator_path()
        if path is not None:
            text = says.text if says.may_be_infinite else says.text + FINITE
            spk, after = operators.leaky(*call[:5], text, False, False)
        else:
            spk, after = self._plain(call, True)
        states.buffers["mem"], states.restarted = after, False
        object.__setattr__(self, "_path", path or _TRACED)
        return spk if self.init_hidden and not self.output else (spk, after)

    def _theirs(self, x: Tensor, mem: Tensor | None, path: Path) -> Any:
        """Run snnTorch's forward, because a method was replaced, or for an option."""
        before: Any = self._buffers.get("mem")
        try:
            out = super().forward(x, mem)
        except BaseException:  # snnTorch stores mem before it is done
            self._buffers["mem"] = before
            raise
        self._tell(path)
        return out

    def _plain(self, call: LeakyCall, traced: bool) -> tuple[Tensor, Tensor]:
        """Run a step in plain torch."""
        reset, says = snntorch.STATE_FUNCTIONS[self._base], self._says
        if traced:
            infinite = says.may_be_infinite
        else:
            if call.x.layout is torch.strided:  # a mem of another shape would not be read
                check_dense("mem", call.mem)
            infinite = reset == "subtract" and _may_be_infinite(call.threshold)
        surrogate, dtype = says.surrogate or self.spike_grad, real_dtype(call.x, call.beta)
        return leaky_step(*call[:5], surrogate, reset, dtype, infinite)

    def _keep(self, mem: Tensor, path: Path) -> None:
        """Keep the results of a call that succeeded."""
        attributes = self.__dict__
        if backward_pass() != -1:
            self._note_pass()
        self._buffers["mem"], self._stored.restarted = mem, False
        attributes.pop("reset", None)
        if attributes.get("_path") is not path:
            self._tell(path)

    def _tell(self, path: Path) -> None:
        """Keep the path of a call that is not the last call's, and log a slow one."""
        self.__dict__["_path"] = path
        if path.slow:
            log_fallback(path, self)

    # ---- what the layer computes --------------------------------------------------------------

    def _described(self, sequence: bool = False) -> LeakySpec:
        """The spec of a call. The owner of a closure may have set its numbers unseen."""
        says = self._says
        if not (says and says.is_final and all(map(operator.is_, says.held, says.holds()))):
            says = self._describe()
        return says.specs[sequence]

    def _parameter(self, name: str) -> Any:
        """Return a parameter or buffer; nn.Module's search takes a microsecond."""
        # torch.compile takes all buffers for constants if traced code reads self._buffers.
        tensor = self._stored.buffers.get(name)
        if tensor is None:
            tensor = self._parameters.get(name)
        return getattr(self, name) if tensor is None else tensor

    def _called(self, x: Any, mem: Any, every: bool = True) -> LeakyCall:
        """The call of x, from the stored state if mem is None."""
        tensors = {**self._parameters, **self._buffers}
        if mem is None:
            mem = tensors.get("mem")
            if type(mem) is Tensor and level_of(mem) != NO_LEVEL:
                mem = self.mem  # empty if the transform has ended
        if type(x) not in _TENSORS or type(mem) not in _TENSORS:
            for name, value in (("input_", x), ("mem", mem)):
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        try:
            beta, threshold, graded = _parameters_of(tensors)
        except KeyError:  # one is parametrized, or a property
            beta, threshold, graded = map(self._parameter, LEAKY_PARAMETERS)
        return LeakyCall(x, mem, beta, threshold, graded, every)


class _Description:
    """What the attributes of a layer say; code that torch.compile traces must find it ready.

    Parameters
    ----------
    layer : Leaky
    before : _Description or None
        The last one, whose numbers of tensors hold while torch.compile traces.

    Attributes
    ----------
    specs : list of LeakySpec
        Of a step and of a sequence.
    text : str
        Reset and surrogate for an operator; empty if plain torch must run the layer.
    is_theirs : bool
        Whether snnTorch's forward must run the layer, for an option.
    surrogate : Surrogate or None
        If traced code may know it.
    may_be_infinite : bool
        Whether the threshold may have infinities or NaN.
    reset : int
        The number of the reset mechanism.
    is_final : bool
        Whether the surrogate was tried; an attempt that may have failed is made again.
    holds : callable
        Reads the numbers that a surrogate of snnTorch's holds, which may change; `held` has them as
        they were.
    """

    may_be_infinite, reset = True, 0

    def __init__(self, layer: Leaky, before: _Description | None) -> None:
        theirs, kind = layer.spike_grad, kind_of(layer.spike_grad)
        ours: Any = NONE if theirs is _BYPASS else recognise_surrogate(theirs)
        option = _option_against(layer)
        is_known, against = type(ours) is Surrogate, option or _surrogate_against(ours)
        self.is_theirs = option is not None
        reset = cast(Reset, snntorch.STATE_FUNCTIONS[layer._base])
        surrogate = ours if is_known else None
        self.specs = [leaky_spec(reset, surrogate, one, against) for one in (False, True)]
        is_written = type(theirs) in (Surrogate, FunctionType)
        self.text = self.specs[0].serialized if is_written else ""
        self.surrogate = self.specs[0].surrogate if is_written else None
        self.holds = reader_of(theirs, kind.parameters if kind else ())
        self.held = [*self.holds()]
        self.is_final = is_known or kind is None
        if before is not None:
            self.may_be_infinite, self.reset = before.may_be_infinite, before.reset
        self.read(layer)

    def read(self, layer: Leaky) -> None:
        """Read the numbers of tensors that code cannot read while torch.compile traces it."""
        if not torch.compiler.is_compiling():
            number = layer._parameter("reset_mechanism_val")
            unreadable = number.is_meta or recorded_now() is not None
            self.reset = RESETS.index(layer.reset_mechanism) if unreadable else int(number)
            self.may_be_infinite = _may_be_infinite(layer._parameter("threshold"))


def _option_against(layer: Leaky) -> str | None:
    """The option that snnTorch's forward alone computes; None if there is none."""
    if not layer.reset_delay:
        return "reset_delay is False"
    if layer.inhibition:
        return "inhibition"
    return "state_quant" if layer.state_quant else None


def _surrogate_against(surrogate: Any) -> str | None:
    """Why the kernels cannot run a layer with this surrogate; None if they can."""
    if type(surrogate) is not Surrogate:
        return "the surrogate is not a known one"
    return RANDOM if surrogate.is_random else None


def _explain(x: Tensor, mem: Tensor) -> None:
    """Raise a clearer error than torch's operators do for tensors that these cannot take."""
    check_transforms(x, mem=mem)
    check_dense("input_", x)
    check_dense("mem", mem)


def _may_be_infinite(threshold: Tensor) -> bool:
    """Whether a threshold may have infinities or NaN; True if to read it is impossible or slow."""
    if threshold.device.type != "cpu" or type(threshold) not in _TENSORS or recorded_now():
        return True
    if threshold.numel() == 1:
        return not math.isfinite(threshold.item())
    return not bool(threshold.isfinite().all())
