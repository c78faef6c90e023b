"""The ConvLSTMs of others: cells and stacks that are recognised by what they compute.

A module is tried on a deep copy, in float64 and with random weights. If results, gradients and
their forms are those of a ConvLSTM, the module's class becomes a subclass of its own class, which
overrides forward alone. A call of another kind than those that were tried goes to the own forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .convlstm import Convolution
from .options import pooling
from .path import LastPath, carries_hooks

__all__ = ["Taken", "difference", "give_back", "take"]


_KNOWN = ("torch", "snnlstm", "snntorch")  # packages whose modules are no ConvLSTMs of others


class _Other(Exception):
    """What a module computes is another thing; the text says what is against it."""


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Tuples and lists of what `function` makes of the leaves."""
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(branch, function) for branch in tree)
    return function(tree)


def _leaves(tree: Any) -> list[Any]:
    """What lies in a tree of tuples and lists, in order."""
    found: list[Any] = []
    _mapped(tree, found.append)
    return found


def _on_copy(module: nn.Module, trial: Callable[[Any], Any]) -> Any:
    """What a trial finds on a copy of a module, on the CPU and in float64, or why it fails.

    The trial draws its random numbers from a generator of its own.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        try:
            made = copy.deepcopy(module).to("cpu", torch.float64).requires_grad_()
            with torch.device("cpu"):
                return trial(made)
        except _Other as other:
            return str(other)
        except Exception as error:  # whatever a foreign module raises
            return f"a call raises {type(error).__name__}: {error}"


def difference(cell: Any, ours_of: Callable[[Any], Any]) -> str | None:
    """What three steps of a spiking cell of others have against ours, which `ours_of` makes of it.

    A copy of the cell and ours in its place are called on equal random numbers.
    """

    def trial(theirs: Any) -> str | None:
        found = []
        length = 8 * pooling(cell.max_pool, cell.avg_pool, dims=1)[1][1]
        x = torch.rand(3, 2, cell.in_channels, length, dtype=torch.float64)
        for tried in (theirs, ours_of(theirs)):
            torch.manual_seed(0)  # for random surrogates
            zeros = x.new_zeros(2, cell.out_channels, length)
            tried.syn, tried.mem = zeros, zeros
            outs = [tried(step) for step in x]
            sums = [out.double().square().sum() for out in _leaves(outs)]
            grads = torch.autograd.grad(sum(sums), list(tried.parameters()), allow_unused=True)
            given = [grad.flatten() for grad in grads if grad is not None]
            found.append(torch.cat([torch.stack(sums), *given]))
        same = torch.allclose(found[0], found[1], rtol=1e-5)  # snnTorch's spikes are float32
        return None if same else "it computes other things than our cell"

    return _on_copy(cell, trial)


def _tried(module: nn.Module, trial: Callable[[Any], Any]) -> Any:
    """What a trial finds on a copy of a module with random weights, or why it fails."""
    if any(_is_changed(part) for part in module.modules()):
        return "it carries hooks, or its forward was replaced"

    def with_random_weights(made: nn.Module) -> Any:
        # Initial values may hide what a module computes: peepholes often begin as zeros.
        with torch.no_grad():
            for parameter in made.parameters():
                fan_in = max(parameter.numel(), 1) / max(parameter.shape[:1].numel(), 1)
                parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
        return trial(made)

    return _on_copy(module, with_random_weights)


def _is_changed(module: Any) -> bool:
    return "forward" in module.__dict__ or carries_hooks(module)


def _key_of(found: dict[str, Tensor], leaf: Tensor) -> str | None:
    return next((key for key in found if _agree(found[key], leaf)), None)


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def _compare(made: nn.Module, theirs: Callable, ours: Callable, shapes: Iterable[Any]) -> None:
    """Compare results and gradients in both modes, of small numbers and of large ones."""
    for training, factor in ((True, 1), (True, 30), (False, 1), (False, 30)):
        made.train(training)
        given = [factor * torch.randn(shape, dtype=torch.float64) for shape in shapes]
        kept, found = _kept(made), []
        for run in (theirs, ours):
            inputs = [t.clone().requires_grad_() for t in given]
            outs = _leaves(run(*inputs))
            sources = [*inputs, *made.parameters()]
            ends = [(out * torch.linspace(1, 2, out.numel()).view_as(out)).sum() for out in outs]
            grads = torch.autograd.grad(ends, sources, allow_unused=True, materialize_grads=True)
            found.append([*outs, *grads])
        if len(found[0]) != len(found[1]) or not all(map(_agree, *found)):
            raise _Other(f"in {'training' if training else 'evaluation'} it computes other things")
        if kept != _kept(made):
            raise _Other("it keeps something from call to call")


def _kept(made: nn.Module) -> dict[str, Any]:
    """What a module and its parts hold, to be compared; buffers by their values."""
    found: dict[str, Any] = {}
    for name, part in made.named_modules():
        found |= {f"{name}.{k}": id(v) for k, v in part.__dict__.items() if k != "_path"}
    return found | {name: value.tolist() for name, value in made.named_buffers()}


@dataclass
class _Cell:
    """How a cell is called, and the convolution that it runs."""

    conv: str
    names: tuple[str, ...]  # of the arguments x and (h, c)
    result: Any  # 0 in the place of h, 1 in that of c
    convolution: Convolution

    def over_time(self, cell: Any, x: Tensor, h: Any, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        names = self.names[0], f"h of {self.names[1]}", f"c of {self.names[1]}"
        return self.convolution.run(cell, getattr(cell, self.conv), x, h, c, names)

    def __call__(self, cell: Any, x: Any, state: Any = None) -> Any:
        pair = isinstance(state, (tuple, list)) and len(state) == 2
        if not pair or not all(isinstance(t, Tensor) for t in (x, *state)) or x.dim() != 4:
            return NotImplemented
        after = self.over_time(cell, x, *state)[1:]
        return _mapped(self.result, lambda k: after[k])


def _names(module: nn.Module) -> list[str]:
    """Names of the positional arguments of forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _convolution_of(module: nn.Module) -> str | None:
    """Name of the child that may be the convolution of [x, h], where a state is an argument."""
    for name, conv in module.named_children():
        if isinstance(conv, nn.Conv2d) and conv.stride == (1, 1) and conv.groups == 1:
            pads = zip(conv.dilation, conv.kernel_size, strict=True)
            same = conv.padding in ("same", tuple(d * (k - 1) // 2 for d, k in pads))
            fits = conv.out_channels % 4 == 0 and conv.in_channels > conv.out_channels // 4
            if same and fits and all(k % 2 for k in conv.kernel_size):
                return name if len(_names(module)) > 1 else None
    return None


def _try_cell(made: nn.Module) -> _Cell:
    name: Any = _convolution_of(made)
    conv = getattr(made, name)
    c = conv.out_channels // 4
    channels = conv.in_channels - c, c

    def theirs(x: Tensor, h: Tensor, c: Tensor) -> Any:
        return made(x, (h, c))

    def ours(x: Tensor, h: Tensor, c: Tensor) -> Any:
        i, f, o, g = conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return _mapped(result, lambda k: (o.sigmoid() * c.tanh(), c)[k])

    shapes = [(2, count, 5, 7) for count in (channels[0], c, c)]
    found = theirs(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    places = iter({2: (0, 1), 3: (0, 0, 1)}.get(len(_leaves(found)), ()))
    result = _mapped(found, lambda _: next(places, 0))
    try:
        _compare(made, theirs, ours, shapes)
    except _Other as other:
        beside = [n for n, _ in (*made.named_children(), *made.named_parameters(recurse=False))]
        beside.remove(name)
        more = f"; beside {name} it has {', '.join(beside)}" if beside else ""
        raise _Other(f"{other} than gates i, f, o, g{more}") from None
    convolution = Convolution(channels, kernel_size=conv.kernel_size, dilation=conv.dilation)
    return _Cell(name, tuple(_names(made)[:2]), result, convolution)


@dataclass
class _Stack:
    """How a stack of such cells is called, and what it returns of their results."""

    cells: tuple[str, ...]
    names: tuple[str, ...]  # of x and of the initial states
    batch_first: bool
    result: Any = None  # keys of results()

    def results(self, stack: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """All that a stack may return; nothing where a cell is not what it was."""
        cells: list[Any] = [stack.get_submodule(name) for name in self.cells]
        if any(not isinstance(cell, Taken) or _is_changed(cell) for cell in cells):
            return {}
        found: dict[str, Tensor] = {}
        x = x.transpose(0, 1) if self.batch_first else x
        for name, cell in zip(self.cells, cells, strict=True):
            zeros = x.new_zeros(x.shape[1], cell._taken.convolution.channels[1], *x.shape[-2:])
            x, h, c = cell._taken.over_time(cell, x, zeros, zeros)
            keys = (f"{name} {what}" for what in ("batch first", "time first", "h", "c"))
            found |= zip(keys, (x.transpose(0, 1), x, h, c), strict=True)
        return found

    def __call__(self, stack: nn.Module, x: Any, states: Any = None) -> Any:
        whole = isinstance(x, Tensor) and x.dim() == 5 and 0 not in x.shape[:2]
        found = self.results(stack, x) if whole and states is None else {}
        if not found:
            return NotImplemented
        return _mapped(self.result, lambda key: found[key].contiguous())


def _try_stack(made: nn.Module) -> _Stack:
    cells = [(name, part) for name, part in made.named_modules() if isinstance(part, Taken)]
    shape = 2, 3, cells[0][1]._taken.convolution.channels[0], 5, 7
    x = torch.randn(shape, dtype=torch.float64)
    theirs = made(x)
    for batch_first in (True, False):
        form = _Stack(tuple(name for name, _ in cells), tuple(_names(made)[:2]), batch_first)
        found = form.results(made, x)
        form.result = _mapped(theirs, partial(_key_of, found))
        if None not in _leaves(form.result):
            _compare(made, made, lambda x, form=form: form(made, x), [shape])
            return form
    raise _Other("it does not return h and c of its cells over time")


class Taken:
    """What the class of a module that was taken adds to the module's own class."""

    _taken: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the own class's forward does."""
        names, result = self._taken.names, NotImplemented
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(given) == len(args) + len(kwargs) and given.keys() <= set(names):
            result = self._taken(self, *map(given.get, names))
        return super().forward(*args, **kwargs) if result is NotImplemented else result  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no place where pickle could find it.
        return _made_again, (_theirs(self),), self.__dict__


class _WithPath:
    """The last base of a class of a module that was taken: the own class may have a `path`, too."""

    path = LastPath()


def _theirs(module: Any) -> Any:
    return type(module).__mro__[2]


@lru_cache
def _class_of(theirs: Any) -> Any:
    names = "__module__", "__qualname__", "__doc__"
    return type(
        theirs.__name__, (Taken, theirs, _WithPath), {name: getattr(theirs, name) for name in names}
    )


def _made_again(theirs: Any) -> Any:
    kind = _class_of(theirs)
    return kind.__new__(kind)


def take(model: nn.Module) -> tuple[dict[int, str], dict[int, str]]:
    """Give the ConvLSTMs of a model our forward.

    Returns what was taken for what, and why others were left that are named after the LSTM and have
    a convolution or taken cells, both by the modules' ids.
    """
    taken: dict[int, str] = {}
    left: dict[int, str] = {}

    def attempt(module: Any, found: Any) -> None:
        if isinstance(found, _Cell):
            taken[id(module)] = f"a ConvLSTM cell by its {found.conv}"
        elif isinstance(found, _Stack):
            taken[id(module)] = f"a stack of {len(found.cells)}, with a sequence in one call"
        elif "lstm" in type(module).__name__.lower():
            left[id(module)] = found
        if not isinstance(found, str):
            kind: Any = type(module)
            module._taken, module.__class__ = found, _class_of(kind)

    modules = [m for m in model.modules() if type(m).__module__.partition(".")[0] not in _KNOWN]
    for module in modules:
        if isinstance(module, Taken):
            left[id(module)] = "is snnlstm's already"
        elif (name := _convolution_of(module)) is not None:
            # A copy of what holds far more than a convolution could be a large one.
            small = _size(module) <= 2 * _size(module.get_submodule(name))
            more = f"it has more layers than its {name}"
            attempt(module, _tried(module, _try_cell) if small else more)
        elif any(isinstance(child, nn.Conv2d) for child in module.children()):
            attempt(module, "it has no convolution of [x, h] to the four gates")
    for module in reversed(modules):  # a stack comes before what holds it
        inside = [part for part in module.modules() if isinstance(part, Taken)]
        known = {id(parameter) for part in inside for parameter in part.parameters()}
        if (
            any(id(part) in taken for part in inside)
            and all(isinstance(part._taken, _Cell) and part is not module for part in inside)
            and known.issuperset(map(id, module.parameters()))
        ):
            attempt(module, _tried(module, _try_stack))
    return taken, left


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def give_back(model: nn.Module) -> dict[int, str]:
    """Give the modules that :func:`take` took their own class again; the ids say which."""
    found = {id(m): "its own class's" for m in model.modules() if isinstance(m, Taken)}
    for module in [m for m in model.modules() if id(m) in found]:
        for name in ("_taken", "_path", "_layer_name"):
            module.__dict__.pop(name, None)
        object.__setattr__(module, "__class__", _theirs(module))
    return found
