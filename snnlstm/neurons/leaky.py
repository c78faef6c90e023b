"""snnTorch's leaky integrate-and-fire neuron, fused: ``snntorch.Leaky`` with another forward."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import wraps
from itertools import product
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calls import algorithms
from ..calls.call import LEAKY_PARAMETERS, LeakyCall, check_transforms
from ..calls.lengths import hold_last, last_state, mask_padding
from ..calls.spec import RESETS, LeakySpec, Reset, leaky_spec
from ..compat import snntorch
from ..compat.registry import instances, register
from ..compat.snntorch import (
    Neuron,
    TheirLeaky,
    kind_of,
    reader_of,
    recognise_quant,
    recognise_surrogate,
    recognise_traced,
)
from ..compat.torch_private import NO_LEVEL, has_ended, level_of
from ..dispatch.entry import last_entry, run_leaky
from ..dispatch.path import LastPath, Path, log_fallback
from ..dispatch.reasons import RANDOM, recorded_now, unrecorded_while_tracing
from ..reference import leaky_step, real_dtype
from ..surrogate import NONE, Surrogate
from .state import NO_RESET

try:
    from ..native import leaky as kernels
    from ..native import leaky_operators as operators
except ImportError:  # path.against_device says why
    kernels = operators = None  # type: ignore[assignment]

PRIVATE = ("_base", "_path", "_layer_name", "_specs", "_entry", "_text")
"""The attributes of an instance that only our class has."""

_TRACED = Path("reference", "torch.compile traces plain operators")
_COMPILED = Path("compiled", "torch.compile's backend chooses between kernels and plain operators")
_parameters_of = operator.itemgetter(*LEAKY_PARAMETERS)
_TENSORS = {Tensor, nn.Parameter}
_CLOSURES: dict[str, Any] = {"spike_grad": recognise_surrogate, "state_quant": recognise_quant}
_DECIDING = {"spike_grad", "_base", "reset_delay", "inhibition", "state_quant"}
"""The attributes that decide what a layer computes."""
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
    torch runs other calls, such as those with ``reset_delay=False``, ``inhibition``,
    ``state_quant`` or a surrogate of your own. snnTorch's own forward runs if a method of the layer
    was replaced, or if the installed snnTorch computes Leaky differently from 1.0.0. :attr:`path`
    says why. Except in snnTorch's own forward, four things differ from snnTorch: spk is float64 if
    x is (snnTorch's is float32); mem is float32 if x is of a half type, even with
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
    registers_itself = True  # snnTorch's constructor does not enter it in the list
    _base: str
    """Name of the method that is ``state_function``."""
    _text: str = ""
    """Reset and surrogate for an operator; empty if plain torch must run the layer."""

    @wraps(TheirLeaky.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        instances()  # snnTorch's own list would take a layer that is not whole
        super().__init__(*args, **kwargs)
        register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _DECIDING:
            self._remake_text()

    def _remake_text(self) -> None:
        """Make the text again, at once, because torch.compile must find it ready."""
        attributes = self.__dict__
        attributes["_specs"], attributes["_text"] = None, ""
        whole = _DECIDING.issubset(attributes)  # snnTorch's constructor sets one after another
        if whole and type(self.spike_grad) in (Surrogate, FunctionType):
            self._described()

    def __getattr__(self, name: str) -> Any:
        if name == "reset":
            raise AttributeError(NO_RESET)
        value = super().__getattr__(name)
        if name == "mem" and has_ended(value) and level_of(value) > NO_LEVEL:
            # A reset makes zeros like this attribute, but no operator reads what outlived a vmap.
            return torch.zeros(0, dtype=value.dtype, device=value.device)
        return value

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

        torch.compile would compile anew for each shape of the stored mem; an empty one means zeros.
        """
        if not torch.compiler.is_compiling():
            return super().reset_mem()
        mem = self._parameter("threshold").detach().new_zeros(0)
        self._buffers["mem"] = mem  # nn.Module.__setattr__ would look at the old one
        return mem

    # ---- copies ---------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without what cannot be copied: mem's graph, snnTorch's closures."""
        state = self.__dict__.copy()
        for name in ("_specs", "_entry"):
            state.pop(name, None)
        for name, recognise in _CLOSURES.items():
            if isinstance(state.get(name), FunctionType):
                state[name] = recognise(state[name])
        if "mem" in self._buffers:
            state["_buffers"] = {**self._buffers, "mem": self.mem.detach()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remake_text()
        register(self)

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
                path = Path("reference", replaced, slow=True)
                return self._without_kernels(path, call, mem, True)
            spk, after, path = run_leaky(self.__dict__, call, self._described(), recorded_now())
            if spk is None:
                return self._without_kernels(path, call, mem, False)
        except RuntimeError:
            check_transforms(input_, mem=call.mem)
            raise
        self._keep(after, path)
        return spk if self.init_hidden and not self.output else (spk, after)

    def sequence(self, x: Tensor, record: bool, lengths: Tensor | None = None) -> Any:
        """Run all steps of x (T, ...) in one call, if :meth:`takes` allows it.

        The result is spk of every step, (T, ...), and with `record` also mem. `lengths` (N,) are
        the steps of each sample of x (T, N, ...): after its last one a sample does not spike, and
        its mem stays. The layer's forward hooks get spk and mem of all steps.
        """
        hooks = tuple(self._forward_hooks.values())
        call = self._called(x, None, record or bool(hooks) or lengths is not None)
        try:
            if lengths is not None:  # a NaN in the padding must not reach a gradient
                x = mask_padding(x, lengths)
                call = call._replace(x=x, mem=kernels.fitting(call.mem, x, True))
            spk, mem, path = run_leaky(self.__dict__, call, self._described(True), None)
        except RuntimeError:
            check_transforms(x, mem=call.mem)
            raise
        after = mem[-1].clone() if mem.shape == x.shape else mem
        if lengths is not None:
            spk, after = mask_padding(spk, lengths), last_state(mem, call.mem, lengths)
            mem = hold_last(mem, call.mem, lengths)
        self._keep(after, path)
        for hook in hooks:
            hook(self, (x,), (spk, mem))
        return (spk, mem) if record else spk

    def takes(self, x: Tensor, sequence: bool = True) -> bool:
        """Whether the kernels cover a sequence x (T, ...), so that :meth:`sequence` can run it.

        If `sequence` is False, x is one of its steps, (...).
        """
        if snntorch.replaced(self, TheirLeaky) is not None or recorded_now() is not None:
            return False
        entry = last_entry(self.__dict__, self._called(x, None), self._described(sequence))
        return entry.fallback is None

    def _traced(self, x: Tensor, mem: Tensor | None, replaced: str | None) -> Any:
        """Run a step that torch.compile traces: as one operator, or in plain torch."""
        before: Any = self._buffers.get("mem") if mem is None else mem
        call = LeakyCall(x, before, *map(self._parameter, LEAKY_PARAMETERS))
        if (
            replaced is not None or operators is None or not self._text
            or not unrecorded_while_tracing() or algorithms.current == "reference"
            or kernels.reason_against(call, False) is not None
        ):  # fmt: skip
            return self._without_kernels(_TRACED, call, mem, replaced is not None)
        spk, after = operators.leaky(*call[:5], self._text, False, False)
        self._buffers["mem"] = after
        object.__setattr__(self, "_path", _COMPILED)  # nn.Module's takes long to trace
        return spk if self.init_hidden and not self.output else (spk, after)

    def _without_kernels(
        self, path: Path, call: LeakyCall, mem: Tensor | None, replaced: bool
    ) -> Any:
        """Run a step in plain torch; if a method was `replaced`, snnTorch's forward.

        `mem` is None if the call continues from the stored state.
        """
        before: Any = self._buffers.get("mem")
        traced, attributes = path is _TRACED, self.__dict__
        if replaced:
            try:
                out = super().forward(call.x, mem)
            except BaseException:  # snnTorch stores mem before it is done
                self._buffers["mem"] = before
                raise
        else:
            spk, after = self._plain(call, traced)
            out = spk if self.init_hidden and not self.output else (spk, after)
            if traced:
                self.mem = after
            else:  # nn.Module.__setattr__ is slow
                self._buffers["mem"] = after
                attributes.pop("reset", None)
        if traced:
            self._path = path
        elif attributes.get("_path") is not path:
            attributes["_path"] = path
            if path.slow:
                log_fallback(path, self)
        return out

    def _plain(self, call: LeakyCall, traced: bool) -> tuple[Tensor, Tensor]:
        """One step in plain torch."""
        x, mem, beta, threshold, graded = call[:5]
        dtype = real_dtype(x, beta)
        reset, delay = snntorch.STATE_FUNCTIONS[self._base], self.reset_delay
        guard = traced
        if not traced and (reset == "subtract" or not delay):
            guard = _may_be_infinite(threshold)
        at_once: Any = None
        if not delay:  # the compiler cannot read the number
            number = self._parameter("reset_mechanism_val")
            at_once = number if traced else int(number)
        return leaky_step(
            x, mem, beta, threshold, graded, self._spikes(dtype, traced), reset, dtype, guard,
            at_once, self.state_quant or None, self.inhibition,
        )  # fmt: skip

    def _keep(self, mem: Tensor, path: Path) -> None:
        """Keep the results of a call that succeeded."""
        attributes = self.__dict__
        self._buffers["mem"] = mem
        attributes["_path"] = path
        attributes.pop("reset", None)

    # ---- what the layer computes --------------------------------------------------------------

    def _described(self, sequence: bool = False) -> LeakySpec:
        """The spec of a call, made once for each state of the attributes that decide it.

        snnTorch's layer lets users set them at any time. A closure of snnTorch's may also change
        the numbers that it holds.
        """
        asked = self.spike_grad, self._base, self.reset_delay, self.inhibition, self.state_quant
        kept = self.__dict__.get("_specs")
        if kept is not None and kept[0] == asked:
            _, read, numbers, specs = kept
            if all(map(operator.is_, numbers, read())):
                return specs[sequence]
        theirs, attributes = asked[0], self.__dict__
        kind, ours = kind_of(theirs), NONE if theirs is _BYPASS else recognise_surrogate(theirs)
        known, read = type(ours) is Surrogate, reader_of(theirs, kind.parameters if kind else ())
        against = self._option_against(ours)
        reset = cast(Reset, snntorch.STATE_FUNCTIONS[self._base])
        specs = [leaky_spec(reset, ours if known else None, one, against) for one in (False, True)]
        if known or kind is None:  # else the attempt may have failed
            attributes["_specs"] = asked, read, [*read()], specs
        written = type(theirs) in (Surrogate, FunctionType)
        attributes["_text"] = specs[0].serialized if written else ""
        return specs[sequence]

    def _spikes(self, dtype: torch.dtype, traced: bool) -> Any:
        """Return what computes spikes in plain torch: our surrogate, or ``spike_grad`` itself."""
        theirs = self.spike_grad
        if not traced:
            return self._described().surrogate or theirs
        # The compiler traces snnTorch's closures as they are, but their gradients are of float32.
        return recognise_traced(theirs) if dtype is torch.float64 else theirs

    def _parameter(self, name: str) -> Any:
        """Return a parameter or buffer; nn.Module's search takes a microsecond."""
        tensor = self._buffers.get(name)
        if tensor is None:
            tensor = self._parameters.get(name)
        return getattr(self, name) if tensor is None else tensor

    def _called(self, x: Any, mem: Any, every: bool = True) -> LeakyCall:
        """The call of x, from the stored state if mem is None."""
        tensors = {**self._parameters, **self._buffers}
        mem = tensors.get("mem") if mem is None else mem
        if type(x) not in _TENSORS or type(mem) not in _TENSORS:
            for name, value in (("input_", x), ("mem", mem)):
                if not isinstance(value, Tensor):
                    raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        try:
            beta, threshold, graded = _parameters_of(tensors)
        except KeyError:  # one is parametrized, or a property
            beta, threshold, graded = map(self._parameter, LEAKY_PARAMETERS)
        return LeakyCall(x, mem, beta, threshold, graded, every)

    def _option_against(self, surrogate: Any) -> str | None:
        if not self.reset_delay:
            return "reset_delay is False"
        if self.inhibition:
            return "inhibition"
        if self.state_quant:
            return "state_quant"
        if type(surrogate) is not Surrogate:
            return "the surrogate is not a known one"
        return RANDOM if surrogate.is_random else None


def _may_be_infinite(threshold: Tensor) -> bool:
    """Whether a threshold has an infinity; True if reading its numbers is impossible or slow."""
    if threshold.device.type != "cpu" or type(threshold) not in _TENSORS or recorded_now():
        return True
    if threshold.numel() == 1:
        return math.isinf(threshold.item())
    return bool(threshold.isinf().any())


_PROBED: tuple[dict[str, Any], ...] = (
    {}, {"graded_spikes_factor": torch.tensor(0.5, device="cpu")}, {"reset_delay": False},
    {"inhibition": True}, {"state_quant": torch.round},
)  # fmt: skip
"""Attributes that decide what a layer computes."""


def _results() -> Iterator[Any]:
    """What a step of snnTorch's layer and of ours returns, and what it depends on."""
    x = torch.tensor([[-1, 0.25, 0.5, 1], [0.25, 0.75, 1.5, -0.5]], device="cpu")
    mem = torch.tensor([[0.5, 0.25, 1, 0], [2, 0.75, -1, 0.5]], device="cpu")
    leaves = x.requires_grad_(), mem.requires_grad_()
    for reset, beta, attributes in product(RESETS, (-0.5, 0.5, 1.5), _PROBED):
        options = {"learn_beta": True, "learn_threshold": True, "reset_mechanism": reset}
        layer = Leaky(beta, 0.375, **options).to("cpu")
        for name, value in attributes.items():
            setattr(layer, name, value)
        theirs, ours = (
            TheirLeaky.forward(layer, *leaves),
            layer._plain(layer._called(*leaves), False),
        )
        yield theirs, ours, (*leaves, layer.beta, layer.threshold)


snntorch.COMPARED[TheirLeaky] = _results
