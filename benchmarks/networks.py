"""Defines the networks that the suite times and that tests train.

They are written for snnTorch's cell and Leaky, as users write them: a network class takes the
cell's class as its first argument, and Leaky from the cell's library. Its `forward` is a loop over
time, and its `sequence` does the same as docs/sequences.md teaches it. ``USERS`` has the example of
snnTorch's documentation, and networks with the structures, sizes and batches of public ones.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate, utils
from torch import Tensor, nn

import snnlstm
from benchmarks.providers import FORMS, Form
from snnlstm import unroll


def averaged(run: Callable[..., Tensor], net: nn.Module, optimizer: Any, x: Tensor, y: Tensor):
    """Trains on the average of the logits of all steps, (T, N, classes), as tutorials do."""
    optimizer.zero_grad()
    loss = F.cross_entropy(run(net, x).mean(0), y)
    loss.backward()
    optimizer.step()
    return loss


# Tracing the reset would take time that is no part of the loop.
reset = torch.compiler.disable(utils.reset)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Network:
    """Holds a network with its data and its training step.

    make: makes the network of a cell's class. shapes: of batches, which training takes in turn.
    train, infer: a step of (run, net, optimizer, x, y) and inference by (run, net, x), where `run`
    is `loop` or `sequences`. autocast: whether the network runs under autocast, where our cell and
    snnTorch's round differently. forms: providers of its own, the first of which is what the others
    are compared with. own_input: returns x, which events take the place of by default.
    """

    title: str
    make: Callable[[Any], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    train: Callable[..., Tensor] = averaged
    infer: Callable[..., Any] = lambda run, net, x: run(net, x)
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM
    loop: Callable[..., Any] = lambda net, *args: net(*args)
    sequences: Callable[..., Any] = lambda net, *args: net.sequence(*args)
    autocast: bool = False
    forms: dict[str, Form] = field(default_factory=dict)
    own_input: Callable[[], Any] | None = None
    dtypes = ()  # besides float32

    def batches(self, *_: Any) -> list[tuple[Any, Any]]:
        """Returns equal batches at every call: events of density 0.3, and labels."""
        if self.own_input:
            return [(self.own_input(), None)]
        generator = torch.Generator("cpu").manual_seed(7)
        batches, like = [], torch.zeros(())
        for shape in self.shapes:
            x = torch.rand(shape, generator=generator, device="cpu").lt(0.3)
            y = torch.randint(3, shape[:1], generator=generator, device="cpu")
            batches.append((x.to(like), y.to(like.device)))
        return batches

    def results(self, *step: Any) -> dict[str, Tensor]:
        """Returns the loss of a first training step."""
        return {"loss": self.train(*step)}


def _leaky_class(cell: Any) -> Any:
    """Returns the Leaky of the cell's library."""
    return (snnlstm if issubclass(cell, snnlstm.SConv2dLSTM) else snn).Leaky


def _leaky(cell: Any, **options: Any) -> nn.Module:
    return _leaky_class(cell)(**options)


# ---- networks as people have them ----------------------------------------------------------------


class Classifier(nn.Module):
    """Has the structure of the example in snnTorch's documentation of the cell; x (N, T, C, H, W).

    Cells carry states of reset_mem, then come a linear layer and Leaky. layers: arguments of each
    cell. pixels: the pixels of an image that reach the linear layer.
    """

    def __init__(self, cell: Any, layers: list[dict], pixels: int, classes: int = 10) -> None:
        super().__init__()
        grad = surrogate.straight_through_estimator()
        self.cells = nn.ModuleList(cell(spike_grad=grad, **layer) for layer in layers)
        self.fc = nn.Linear(layers[-1]["out_channels"] * pixels, classes)
        self.lif = _leaky(cell, beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=5))

    def forward(self, x: Tensor) -> Tensor:
        states = [cell.reset_mem() for cell in self.cells]
        mem = self.lif.reset_mem()
        out = []
        for t in range(x.size(1)):
            spk = x[:, t]
            for k, cell in enumerate(self.cells):
                spk, *states[k] = cell(spk, *states[k])
            _, mem = self.lif(self.fc(spk.flatten(1)), mem)
            out.append(mem)
        return torch.stack(out)

    def sequence(self, x: Tensor) -> Tensor:
        for layer in (*self.cells, self.lif):
            layer.reset_mem()
        return unroll(x.transpose(0, 1), *self.cells, nn.Flatten(), self.fc, self.lif)[1]


def layers(*channels: int, threshold: float, kernel: Any = 3, **options: Any) -> list[dict]:
    """Returns the arguments of cells with these channels and the same options."""
    names = ("in_channels", "out_channels", "kernel_size", "threshold")
    pairs = itertools.pairwise(channels)
    return [dict(zip(names, (*pair, kernel, threshold), strict=True)) | options for pair in pairs]


def _classifier(title: str, layers: list[dict], shape: tuple[int, ...]) -> Network:
    """Returns a Classifier on (N, T, C, H, W)."""
    batch, steps, _, *image = shape
    for layer in layers:
        pool = layer.get("max_pool") or layer["avg_pool"]
        sides = pool if isinstance(pool, tuple) else (pool, pool)
        image = [size // side for size, side in zip(image, sides, strict=True)]
    make = functools.partial(Classifier, layers=layers, pixels=math.prod(image))
    return Network(f"{title}; T={steps} N={batch}", make, (shape,), optimizer=torch.optim.Adam)


class Camera(nn.Module):
    """Sees events (T, N, 2, H, W) by a convolution, Leaky and a cell with a learned threshold."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=5)
        self.conv = nn.Conv2d(2, 32, 3, padding=1)
        self.lif = _leaky(cell, beta=0.9, threshold=0.2, spike_grad=grad)
        self.lstm = cell(32, 1, 3, threshold=0.02, learn_threshold=True, spike_grad=grad)

    def start(self) -> tuple[Tensor, ...]:
        return (self.lif.reset_mem(), *self.lstm.reset_mem())

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = []
        for x_t in x:
            spk, mem = self.lif(self.conv(x_t), state[0])
            spk, *cell_state = self.lstm(spk, *state[1:])
            state = (mem, *cell_state)
            out.append(spk)
        return torch.stack(out), state

    def sequence(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.lif.mem, self.lstm.syn, self.lstm.mem = state
        spk, _, _ = unroll(x, self.conv, self.lif, self.lstm)
        return spk, (self.lif.mem, self.lstm.syn, self.lstm.mem)


def truncated(run: Callable[..., Any], net: Any, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """Trains by truncated BPTT of nine steps, and calls backward under autocast, too."""
    state, losses = net.start(), []
    for chunk in x.split(9):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            spk, state = run(net, chunk, state)
            loss = (spk - chunk.amax(2, keepdim=True)).square().mean()
            loss.backward()
        optimizer.step()
        state = [s.detach() for s in state]
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def seen(run: Callable[..., Any], net: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return run(net, x, net.start())[0]


def pyramid(
    cell: Any, channels: Sequence[int], side: int, pool: bool = True, norm: bool = False
) -> nn.Module:
    """Makes convolutions with Leaky, one for each pair of channels, then a cell, Linear and Leaky.

    With `pool` each Leaky has a MaxPool2d behind it, with `norm` a BatchNorm2d before it. `side` is
    that of the input's images. All layers keep their states.
    """
    grad, layers = surrogate.fast_sigmoid(slope=25), list[nn.Module]()
    *fronts, last = itertools.pairwise(channels)
    for one, other in fronts:
        layers += [nn.Conv2d(one, other, 3, padding=1)]
        layers += [nn.BatchNorm2d(other)] if norm else []
        layers += [_leaky(cell, beta=0.9, threshold=0.3, init_hidden=True, spike_grad=grad)]
        layers += [nn.MaxPool2d(2)] if pool else []
        side //= 1 + pool
    return nn.Sequential(
        *layers,
        cell(*last, 3, threshold=0.05, init_hidden=True, max_pool=2, spike_grad=grad),
        nn.Flatten(),
        nn.Linear(last[1] * (side // 2) ** 2, 10),
        _leaky(cell, beta=0.9, init_hidden=True, output=True, spike_grad=grad),
    )


def _pyramid(title: str, shape: tuple[int, ...], *channels: int, **options: Any) -> Network:
    """Returns a pyramid on (N, T, C, H, W), with the channels behind C."""
    make = functools.partial(pyramid, channels=(shape[2], *channels), side=shape[3], **options)
    return _stepwise(f"{title} {shape[3]}x{shape[4]}", make, shape)


def convolutions(cell: Any, side: int) -> nn.Module:
    """Makes the network of snnTorch's tutorial 6, for images of this side; layers keep states."""
    grad, layers = surrogate.fast_sigmoid(slope=25), list[nn.Module]()
    options = {"beta": 0.5, "threshold": 0.3, "init_hidden": True, "spike_grad": grad}
    for one, other in ((1, 12), (12, 64)):
        layers += [nn.Conv2d(one, other, 5), nn.MaxPool2d(2), _leaky(cell, **options)]
        side = (side - 4) // 2
    last = _leaky(cell, **options, output=True)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side**2, 10), last)


def _convolutions(shape: tuple[int, ...], image: bool = False, swap: bool = False) -> Network:
    """Returns the network of `convolutions` on (N, T, 1, H, W); with `swap` accelerate makes it."""
    title = f"Leaky alone: Conv 1->12->64 5x5 {shape[3]}x{shape[4]}, each with max_pool 2; Linear"
    make: Any = functools.partial(convolutions, side=shape[3])
    if swap:
        title, make = f"swapped: {title}", _swapped(make)
    return _stepwise(title, make, shape, image)


def _swapped(make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """Returns a function of a cell's class; ours gets snnTorch's network, swapped by accelerate."""

    def swapped(cell: Any) -> nn.Module:
        net = make(snn.SConv2dLSTM)
        return snnlstm.accelerate(net).model if cell is snnlstm.SConv2dLSTM else net

    return swapped


def deep(cell: Any, channels: Sequence[int]) -> nn.Module:
    """Makes two convolutions for each number of channels, each with batch norm and Leaky.

    Behind two comes a 3x3 pool with padding, and behind the last two the average of all pixels.
    Images have two channels. All layers keep their states.
    """
    grad, layers = surrogate.fast_sigmoid(slope=25), list[nn.Module]()
    options = {"beta": 0.9, "threshold": 0.3, "init_hidden": True, "spike_grad": grad}
    for before, count in itertools.pairwise((2, *channels)):
        for one in (before, count):
            layers += [nn.Conv2d(one, count, 3, padding=1, bias=False), nn.BatchNorm2d(count)]
            layers += [_leaky(cell, **options)]
        layers += [nn.MaxPool2d(3, 2, padding=1)]
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    last = _leaky(cell, **options, output=True)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1], 10), last)


def _deep(shape: tuple[int, ...], *channels: int) -> Network:
    """Returns the network of `deep` on (N, T, 2, H, W), swapped by accelerate."""
    title = f"swapped: 2 x Conv 2->{'->2 x '.join(map(str, channels))} 3x3 {shape[3]}x{shape[4]}"
    make = _swapped(functools.partial(deep, channels=channels))
    return _stepwise(f"{title}, each with BatchNorm, Leaky; max_pool 3, average", make, shape)


class Residual(nn.Module):
    """Has two blocks of two convolutions with batch norm and Leaky; x (N, 2, H, W), one step.

    Each block adds its input before its last Leaky. The second one has twice as many channels at
    half the size, and a 1x1 convolution for what it adds. All layers keep their states.
    """

    def __init__(self, cell: Any, channels: int) -> None:
        super().__init__()
        grad, wide = surrogate.fast_sigmoid(slope=25), 2 * channels
        options = {"beta": 0.9, "threshold": 0.3, "init_hidden": True, "spike_grad": grad}
        shapes = (
            (2, channels, 3, 1), (channels, channels, 3, 1), (channels, channels, 3, 1),
            (channels, wide, 3, 2), (wide, wide, 3, 1), (channels, wide, 1, 2),
        )  # fmt: skip
        self.norms = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(one, other, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(other),
            )
            for one, other, kernel, stride in shapes
        )
        self.lifs = nn.ModuleList(_leaky(cell, **options) for _ in range(5))
        self.fc, self.last = nn.Linear(wide, 10), _leaky(cell, **options, output=True)

    def forward(self, x: Tensor) -> Any:
        stem, *norms, shortcut = self.norms
        spk = self.lifs[0](stem(x))
        for block in range(2):
            first, second = norms[2 * block : 2 * block + 2]
            one, other = self.lifs[2 * block + 1 : 2 * block + 3]
            spk = other(second(one(first(spk))) + (shortcut(spk) if block else spk))
        return self.last(self.fc(F.adaptive_avg_pool2d(spk, 1).flatten(1)))


def _residual(shape: tuple[int, ...], channels: int) -> Network:
    """Returns a Residual on (N, T, 2, H, W), swapped by accelerate; it has a loop alone."""
    title = f"swapped: two residual blocks 2->{channels}->{2 * channels} {shape[3]}x{shape[4]}"
    make = _swapped(functools.partial(Residual, channels=channels))
    network = _stepwise(f"{title}, BatchNorm, Leaky", make, shape)
    forms = {name: form for name, form in FORMS.items() if not form.sequences}
    return dataclasses.replace(network, forms=forms)


def _evaluated(network: Network) -> Network:
    """Returns a network in evaluation, where batch norm has the running statistics."""
    title = f"eval(): {network.title}"
    return dataclasses.replace(network, title=title, make=lambda cell: network.make(cell).eval())


def dense(cell: Any, sizes: Sequence[int]) -> nn.Module:
    """Makes linear layers between these sizes, each with Leaky; all keep their states."""
    layers: list[nn.Module] = [nn.Flatten()]
    for one, other in itertools.pairwise(sizes):
        lif = _leaky(cell, beta=0.9, threshold=0.3, init_hidden=True)
        layers += [nn.Linear(one, other), lif]
    lif.output = True
    return nn.Sequential(*layers)


def _dense(shape: tuple[int, ...], *sizes: int, image: bool = False) -> Network:
    """Returns a network of Leaky alone on (N, T, C, H, W), with the sizes behind the input's."""
    sizes = (math.prod(shape[2:]), *sizes)
    make = functools.partial(dense, sizes=sizes)
    return _stepwise(f"Leaky alone: Linear {'->'.join(map(str, sizes))}", make, shape, image)


def _stepwise(title: str, make: Any, shape: tuple[int, ...], image: bool = False) -> Network:
    """Returns a network that is called step by step on (N, T, C, H, W).

    With `image` each step gets the same image of (N, C, H, W), as in snnTorch's tutorials.
    """
    batch, steps, *one = shape
    title = f"{title}; T={steps} N={batch}"
    if not image:
        return Network(title, make, (shape,), loop=_outside, sequences=_unrolled)
    loop = functools.partial(_outside, steps=steps)
    sequences = functools.partial(_unrolled, steps=steps)
    shapes = ((batch, *one),)
    return Network(f"{title}, one image", make, shapes, loop=loop, sequences=sequences)


def _neurons(*shape: int) -> Network:
    """Returns a Leaky alone on (N, T, C, H, W), whose kernel takes a whole sequence."""

    def train(run: Callable[..., Any], net: nn.Module, _optimizer: Any, x: Tensor, _y: Any):
        loss = run(net, x).square().mean()
        loss.backward()  # without an optimizer's step, which no graph could capture
        return loss

    def stepped(net: Any, x: Tensor) -> Tensor:
        mem, out = net.reset_mem(), []
        for x_t in x.unbind(1):
            spk, mem = net(x_t, mem)
            out.append(spk)
        return torch.stack(out)

    def sequence(net: Any, x: Tensor) -> Tensor:
        net.reset_mem()
        return net.sequence(x.transpose(0, 1), False)

    return Network(
        f"Leaky alone, {shape[2]}x{shape[3]}x{shape[4]}; T={shape[1]} N={shape[0]}",
        functools.partial(_leaky, beta=0.9, threshold=0.3, learn_beta=True), (shape,), train,
        loop=stepped, sequences=sequence,
    )  # fmt: skip


def _outside(net: nn.Module, x: Tensor, steps: int = 0) -> Tensor:
    """Loops over time outside of the network: over (N, T, C, H, W), or on one image for `steps`."""
    reset(net)
    return torch.stack([net(x_t)[1] for x_t in ([x] * steps if steps else x.unbind(1))])


def _unrolled(net: nn.Sequential, x: Tensor, steps: int = 0) -> Tensor:
    reset(net)
    return unroll(x.expand(steps, *x.shape) if steps else x.transpose(0, 1), *net)[1]


# ---- the ConvLSTM without spikes, and one's own network ------------------------------------------


def _init_of(theirs: Any, ours: Any) -> Callable[..., None]:
    """Returns an ``__init__`` of our class that makes an instance of snnTorch's."""
    original = ours.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        is_ours = type(self) is ours
        if is_ours:
            self.__class__ = theirs
        (theirs.__init__ if is_ours else original)(self, *args, **options)

    return init


@contextmanager
def made_for(cell: Any) -> Iterator[None]:
    """Lets our classes make snnTorch's layers within the context, if the cell is snnTorch's."""
    pairs = (snn.SConv2dLSTM, snnlstm.SConv2dLSTM), (snn.Leaky, snnlstm.Leaky)
    with ExitStack() as undo:
        for theirs, ours in pairs if cell is snn.SConv2dLSTM else ():
            undo.enter_context(mock.patch.object(ours, "__init__", _init_of(theirs, ours)))
        yield


def squared(run: Callable[..., Any], net: nn.Module, optimizer: Any, x: Tensor, y: Tensor):
    """Trains on the mean square of all that the network returns."""
    optimizer.zero_grad()
    found = torch.utils._pytree.tree_leaves(run(net, x))
    outputs = [out for out in found if torch.is_tensor(out) and out.requires_grad]
    loss = torch.stack([out.float().square().mean() for out in outputs]).sum()
    loss.backward()
    optimizer.step()
    return loss


def _convlstm(hidden: list[int], kernel: int, *shape: int) -> Network:
    """Returns a stack of ConvLSTMs on (N, T, C, H, W), beside the plain loop of the tests."""

    def make(plain: bool) -> nn.Module:
        from tests.shared.plain_convlstm import Stack

        kind: Any = Stack if plain else snnlstm.ConvLSTM
        return kind(shape[2], hidden, (kernel, kernel), len(hidden), batch_first=True)

    def first(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x)
        return out[0][0] if isinstance(out, tuple) else out

    layers = "->".join(map(str, (shape[2], *hidden)))
    title = f"ConvLSTM {layers} {kernel}x{kernel} {shape[3]}x{shape[4]}; T={shape[1]} N={shape[0]}"
    forms = {"plain loop": Form("a loop", cell=True), "sequence": Form("ours", cell=False)}
    return Network(title, make, (shape,), squared, loop=first, forms=forms)


def _called(net: nn.Module, x: Any) -> Any:
    return net(*x) if isinstance(x, tuple) else net(x)


def from_file(place: str) -> Network:
    """Returns the network of "file.py:function"; the function is "make" where no name is given.

    The function takes nothing and returns a network and its input x, a tensor or a tuple of
    arguments. It may return a function run(network, x) as a third item, such as a loop over time,
    which is called in the place of network(x). The network has snnTorch's cells or ours: either
    take the place of the other. Its states are reset before each run, and its loss is the mean
    square of what it returns. Raises ValueError that names what is missing.
    """
    file, _, name = place.partition(":")
    name = name or "make"
    module = types.ModuleType(f"network_{len(sys.modules)}")
    sys.modules[module.__name__] = module  # where torch.compile finds what functions read
    sys.path.insert(0, str(Path(file).resolve().parent))  # where the file finds what it imports
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
        function = vars(module)[name]
    except OSError as error:
        raise ValueError(f"--network: expected FILE.py:FUNCTION, got {place!r}: {error}") from None
    except KeyError:
        raise ValueError(f"--network: {file} has no function {name!r}, as {place!r} asks") from None
    made = function()
    if not isinstance(made, (tuple, list)) or len(made) < 2:
        raise ValueError(
            f"--network: {name}() must return a network and its input x, got {type(made).__name__}"
        )
    run = _called

    def make(cell: Any) -> nn.Module:
        nonlocal run
        with made_for(cell):
            net, _, *own = function()
        run = own[0] if own else _called
        if cell is snnlstm.SConv2dLSTM:
            snnlstm.accelerate(net)
        kinds = cell, _leaky_class(cell)
        if not any(type(module) in kinds for module in net.modules()):
            raise ValueError(f"--network: {name}() returns no network with SConv2dLSTM or Leaky")
        return net

    def fresh(net: nn.Module, x: Any) -> Any:
        reset(net)
        return run(net, x)

    forms = {name: form for name, form in FORMS.items() if not form.sequences}
    return Network(
        "your own network", make, (), squared, loop=fresh, own_input=lambda: function()[1],
        optimizer=functools.partial(torch.optim.SGD, lr=0.0), forms=forms,
    )  # fmt: skip


# ---- all networks --------------------------------------------------------------------------------


def _users(small: bool = False) -> dict[str, Network]:
    """Returns networks as people have them; small ones have short batches of small images."""

    def size(*shape: int) -> tuple[int, ...]:
        """Returns the shape (N, T, C, H, W) of batches."""
        return tuple(map(min, shape, (2, 3, shape[2], 14, 14))) if small else shape

    deep, residual = _deep(size(8, 10, 2, 32, 32), 32, 64), _residual(size(8, 4, 2, 32, 32), 32)
    images = (2, 3, 1, 16, 16) if small else (32, 25, 1, 28, 28)
    larger = (2, 3, 1, 20, 20) if small else (32, 25, 1, 32, 32)
    return {
        "documentation": _classifier(
            "1->8 28x28, max_pool 2, 8->8, avg_pool 2",
            layers(1, 8, threshold=0.1, max_pool=2) + layers(8, 8, threshold=0.03, avg_pool=2),
            size(32, 10, 1, 28, 28),
        ),
        "column": _classifier(
            "22->16->32->64 129x1, max_pool (2, 1)",
            layers(22, 16, 32, threshold=0.05, max_pool=(2, 1))
            + layers(32, 64, threshold=0.02, max_pool=(2, 1)), size(128, 65, 22, 129, 1),
        ),
        "spectrum": _classifier(
            "1->16 9x9 129x33, max_pool 2",
            layers(1, 16, threshold=0.03, kernel=9, max_pool=2), size(128, 10, 1, 129, 33),
        ),
        "eeg": _classifier(
            "1->16->32->64 22x128, max_pool 2",
            layers(1, 16, 32, 64, threshold=0.05, max_pool=2), size(32, 10, 1, 22, 128),
        ),
        "speech": _classifier(
            "1->16 5x5 33x49, max_pool 2, 16->32->64, avg_pool 2",
            layers(1, 16, threshold=0.03, kernel=5, max_pool=2)
            + layers(16, 32, 64, threshold=0.03, avg_pool=2), size(12, 10, 1, 33, 49),
        ),
        "electrodes": _classifier(
            "1->16 19x3 19x125, 16->64 3x3, max_pool 2",
            layers(1, 16, threshold=0.03, kernel=(19, 3), max_pool=2)
            + layers(16, 64, threshold=0.05, max_pool=2), size(16, 23, 1, 19, 125),
        ),
        "events": _pyramid("Conv 2->16, Leaky, pool, cell 16->32", size(16, 20, 2, 32, 32), 16, 32),
        "events64": _pyramid(
            "2 x (Conv ->32, Leaky, pool), cell 32->32", size(8, 10, 2, 64, 64), 32, 32, 32
        ),
        "tactile": _pyramid(
            "3 x (Conv ->16, BatchNorm, Leaky), cell 16->16", size(8, 60, 2, 32, 32),
            16, 16, 16, 16, pool=False, norm=True,
        ),
        "camera": Network(
            "convolution, Leaky, 32->1 128x128, learned threshold, autocast; T=18 N=2", Camera,
            ((10, 2, 2, 12, 12) if small else (18, 2, 2, 128, 128),), truncated, seen, SGD,
            autocast=True,
        ),
        "dense": _dense(size(128, 25, 1, 28, 28), 1000, 10),
        "dense-image": _dense(size(128, 25, 1, 28, 28), 1000, 10, image=True),
        "dense-small": _dense(size(128, 25, 1, 28, 28), 128, 10),  # as mlx-snn's authors time
        "dense-audio": _dense(size(64, 100, 700, 1, 1), 256, 256, 20),
        "conv": _convolutions(images),
        "conv-image": _convolutions(images, image=True),
        "conv-swapped": _convolutions(larger, swap=True),
        "deep": deep,
        "deep-eval": _evaluated(deep),
        "residual": residual,
        "residual-eval": _evaluated(residual),
    }  # fmt: skip


USERS = _users()
NETWORKS = _users(small=True)
"""These have small images and batches, and tests train them."""
ONE_SAMPLE = {
    f"{name}-n1": dataclasses.replace(
        USERS[name],
        title=f"{USERS[name].title.partition(' N=')[0]} N=1",
        shapes=tuple((1, *shape[1:]) for shape in USERS[name].shapes),
    )
    for name in ("documentation", "electrodes", "eeg")
}
"""A robot or a hearing aid has one sample at a time: `--mode inference --providers loop`."""
CONVLSTMS = {
    "nowcasting": _convlstm([16, 16], 3, 8, 10, 1, 48, 48),
    "video": _convlstm([32], 3, 8, 10, 16, 32, 32),
    "convlstm5x5": _convlstm([16], 5, 8, 10, 8, 40, 40),
}
LEAKY = {"leaky": _neurons(32, 16, 32, 32, 32)}
TABLES = {
    "networks": USERS,
    "leaky": LEAKY,
    "one-sample": ONE_SAMPLE,
    "convlstm": CONVLSTMS,
}
