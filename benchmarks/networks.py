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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from benchmarks.providers import FORMS, Form
from benchmarks.theirs import snntorch as snn
from benchmarks.theirs import surrogate
from snnlstm import unroll


def averaged(run: Callable[..., Tensor], net: nn.Module, optimizer: Any, x: Tensor, y: Tensor):
    """Trains on the average of the logits of all steps, (T, N, classes), as tutorials do."""
    optimizer.zero_grad()
    loss = F.cross_entropy(run(net, x).mean(0), y)
    loss.backward()
    optimizer.step()
    return loss


# Tracing the reset would take time that is no part of the loop.
reset = torch.compiler.disable(snnlstm.reset)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
LOOPS = {name: form for name, form in FORMS.items() if not form.sequences}


@dataclass(frozen=True)
class Network:
    """Holds a network with its data and its training step.

    make: makes the network of a cell's class. shapes: of batches, which training takes in turn.
    train, infer: a step of (run, net, optimizer, x, y) and inference by (run, net, x), where `run`
    is `loop` or `sequences`. autocast: whether the network runs under autocast, where our cell and
    snnTorch's round differently. forms: providers of its own, the first of which is what the others
    are compared with. own_input: returns x, which events take the place of by default. density: of
    the events.
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
    density: float = 0.3
    dtypes = ()  # besides float32
    captures = False  # no CUDA graph has an optimizer's step

    def batches(self, *_: Any) -> list[tuple[Any, Any]]:
        """Returns equal batches at every call: events, and labels."""
        if self.own_input:
            return [(self.own_input(), None)]
        generator = torch.Generator("cpu").manual_seed(7)
        batches, like = [], torch.zeros(())
        for shape in self.shapes:
            x = torch.rand(shape, generator=generator, device="cpu").lt(self.density)
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
    """Returns a Classifier on (N, T, C, H, W), of cells that each have a pool of 2x2."""
    batch, steps, _, *image = shape
    pixels = math.prod(side >> len(layers) for side in image)
    make = functools.partial(Classifier, layers=layers, pixels=pixels)
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


# ---- networks that are called step by step, whose layers keep their states -----------------------
#
# Their functions take the shape (N, T, C, H, W) of batches, and the channels or features of layers.


def _options(**options: Any) -> dict[str, Any]:
    """Returns the options of layers that keep their states, and further ones."""
    return {"init_hidden": True, "spike_grad": surrogate.fast_sigmoid(slope=25), **options}


def _kept(**options: Any) -> dict[str, Any]:
    """Returns the options of most Leaky layers, and further ones."""
    return _options(beta=0.9, threshold=0.3) | options


def pyramid(cell: Any, shape: Sequence[int], *channels: int) -> nn.Module:
    """Makes convolutions with Leaky and a pool, then a cell of the last channels, and Linear."""
    layers, (*fronts, last) = list[nn.Module](), itertools.pairwise((shape[2], *channels))
    for one, other in fronts:
        layers += [nn.Conv2d(one, other, 3, padding=1), _leaky(cell, **_kept()), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers,
        cell(*last, 3, threshold=0.05, max_pool=2, **_options()),
        nn.Flatten(),
        nn.Linear(last[1] * (shape[3] >> len(channels)) ** 2, 10),
        _leaky(cell, beta=0.9, output=True, **_options()),
    )


def convolutions(cell: Any, shape: Sequence[int]) -> nn.Module:
    """Makes the network of snnTorch's tutorial 6."""
    layers, options, side = list[nn.Module](), _kept(beta=0.5), shape[3]
    for one, other in ((1, 12), (12, 64)):
        layers += [nn.Conv2d(one, other, 5), nn.MaxPool2d(2), _leaky(cell, **options)]
        side = (side - 4) // 2
    last = _leaky(cell, **options, output=True)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * side**2, 10), last)


def _normed(one: int, other: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(one, other, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(other))


def deep(cell: Any, shape: Sequence[int], *channels: int) -> nn.Module:
    """Makes two convolutions for each number of channels, each with batch norm and Leaky.

    Behind two comes a 3x3 pool with padding, and behind the last two the average of all pixels.
    """
    layers = list[nn.Module]()
    for before, count in itertools.pairwise((shape[2], *channels)):
        for one in (before, count):
            layers += [*_normed(one, count), _leaky(cell, **_kept())]
        layers += [nn.MaxPool2d(3, 2, padding=1)]
    layers[-1] = nn.AdaptiveAvgPool2d(1)
    last = _leaky(cell, **_kept(), output=True)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1], 10), last)


def wide(cell: Any, shape: Sequence[int], *channels: int) -> nn.Module:
    """Makes a convolution with Leaky for each number of channels, with a pool behind each second.

    Behind the last comes the average of all pixels.
    """
    layers = list[nn.Module]()
    for index, (one, other) in enumerate(itertools.pairwise((shape[2], *channels))):
        layers += [nn.Conv2d(one, other, 3, padding=1), _leaky(cell, **_kept())]
        layers += [nn.MaxPool2d(2)] * (index % 2)
    last = _leaky(cell, **_kept(), output=True)
    average = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *average, nn.Linear(channels[-1], 10), last)


class Residual(nn.Module):
    """Has two blocks of two convolutions with batch norm and Leaky; x (N, 2, H, W), one step.

    Each block adds its input before its last Leaky. The second one has twice as many channels at
    half the size, and a 1x1 convolution for what it adds.
    """

    def __init__(self, cell: Any, shape: Sequence[int], channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.norms = nn.ModuleList([
            _normed(2, channels), _normed(channels, channels), _normed(channels, channels),
            _normed(channels, wide, 3, 2), _normed(wide, wide), _normed(channels, wide, 1, 2),
        ])  # fmt: skip
        self.lifs = nn.ModuleList(_leaky(cell, **_kept()) for _ in range(5))
        self.fc, self.last = nn.Linear(wide, 10), _leaky(cell, **_kept(), output=True)

    def forward(self, x: Tensor) -> Any:
        stem, *norms, shortcut = self.norms
        spk = self.lifs[0](stem(x))
        for block in range(2):
            first, second = norms[2 * block : 2 * block + 2]
            one, other = self.lifs[2 * block + 1 : 2 * block + 3]
            spk = other(second(one(first(spk))) + (shortcut(spk) if block else spk))
        return self.last(self.fc(F.adaptive_avg_pool2d(spk, 1).flatten(1)))


def dense(cell: Any, shape: Sequence[int], *sizes: int) -> nn.Module:
    """Makes linear layers of these sizes, each with Leaky."""
    layers: list[nn.Module] = [nn.Flatten()]
    for one, other in itertools.pairwise((math.prod(shape[2:]), *sizes)):
        layers += [nn.Linear(one, other), _leaky(cell, beta=0.9, threshold=0.3, init_hidden=True)]
    layers[-1].output = True
    return nn.Sequential(*layers)


def _stepwise(
    title: str, make: Any, shape: tuple[int, ...], *sizes: int, image: bool = False,
    swap: bool = False, density: float = 0.3,
) -> Network:  # fmt: skip
    """Returns the network of make(cell, shape, *sizes).

    With `image` each step gets the same image of (N, C, H, W), as in snnTorch's tutorials. With
    `swap` accelerate swaps snnTorch's layers for ours.
    """

    def made(cell: Any) -> nn.Module:
        net = make(snn.SConv2dLSTM if swap else cell, shape, *sizes)
        return snnlstm.accelerate(net).model if swap and cell is snnlstm.SConv2dLSTM else net

    batch, steps, *one = shape
    title = f"{'swapped: ' * swap}{title}; T={steps} N={batch}{', one image' * image}"
    if not image:
        if density != 0.3:
            title += f", {100 * density:.0f} % events"
        ways = {"loop": _outside, "sequences": _unrolled}
        return Network(title, made, (shape,), density=density, **ways)
    loop, sequences = (functools.partial(way, steps=steps) for way in (_outside, _unrolled))
    return Network(title, made, ((batch, *one),), loop=loop, sequences=sequences)


def _evaluated(network: Network) -> Network:
    """Returns a network in evaluation, where batch norm has the running statistics."""
    title = f"eval(): {network.title}"
    return dataclasses.replace(network, title=title, make=lambda cell: network.make(cell).eval())


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


def _nowcasting() -> Network:
    """Returns a stack of ConvLSTMs on (N, T, C, H, W), beside the plain loop of the tests."""

    def make(plain: bool) -> nn.Module:
        from tests.shared.plain_convlstm import Stack

        kind: Any = Stack if plain else snnlstm.ConvLSTM
        return kind(1, [16, 16], (3, 3), 2, batch_first=True)

    def first(net: nn.Module, x: Tensor) -> Tensor:
        out = net(x)
        return out[0][0] if isinstance(out, tuple) else out

    forms = {"plain loop": Form("a loop", cell=True), "sequence": Form("ours", cell=False)}
    title = "ConvLSTM 1->16->16 3x3 48x48; T=10 N=8"
    return Network(title, make, ((8, 10, 1, 48, 48),), squared, loop=first, forms=forms)


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

    return Network(
        "your own network", make, (), squared, loop=fresh, own_input=lambda: function()[1],
        optimizer=functools.partial(torch.optim.SGD, lr=0.0), forms=LOOPS,
    )  # fmt: skip


# ---- all networks --------------------------------------------------------------------------------


def _users(small: bool = False) -> dict[str, Network]:
    """Returns networks as people have them; small ones have short batches of small images."""

    def size(*shape: int, side: int = 14) -> tuple[int, ...]:
        """Returns the shape (N, T, C, H, W) of batches."""
        return tuple(map(min, shape, (2, 3, shape[2], side, side))) if small else shape

    digits, images = size(128, 25, 1, 28, 28), size(32, 25, 1, 28, 28, side=16)
    conv = "Leaky alone: Conv 1->12->64 5x5 {0}x{0}, each with max_pool 2; Linear"
    norms = _stepwise(
        "2 x Conv 2->32->2 x 64 3x3 32x32, each with BatchNorm, Leaky; max_pool 3, average",
        deep, size(8, 10, 2, 32, 32), 32, 64, swap=True,
    )  # fmt: skip
    return {
        "documentation": _classifier(
            "1->8 28x28, max_pool 2, 8->8, avg_pool 2",
            layers(1, 8, threshold=0.1, max_pool=2) + layers(8, 8, threshold=0.03, avg_pool=2),
            size(32, 10, 1, 28, 28),
        ),
        "eeg": _classifier(
            "1->16->32->64 22x128, max_pool 2",
            layers(1, 16, 32, 64, threshold=0.05, max_pool=2), size(32, 10, 1, 22, 128),
        ),
        "electrodes": _classifier(
            "1->16 19x3 19x125, 16->64 3x3, max_pool 2",
            layers(1, 16, threshold=0.03, kernel=(19, 3), max_pool=2)
            + layers(16, 64, threshold=0.05, max_pool=2), size(16, 23, 1, 19, 125),
        ),
        "events": _stepwise(
            "Conv 2->16, Leaky, pool, cell 16->32 32x32", pyramid, size(16, 20, 2, 32, 32), 16, 32
        ),
        "events64": _stepwise(
            "2 x (Conv ->32, Leaky, pool), cell 32->32 64x64", pyramid,
            size(8, 10, 2, 64, 64), 32, 32, 32,
        ),
        "camera": Network(
            "convolution, Leaky, 32->1 128x128, learned threshold, autocast; T=18 N=2", Camera,
            ((10, 2, 2, 12, 12) if small else (18, 2, 2, 128, 128),), truncated, seen, SGD,
            autocast=True,
        ),
        "dense": _stepwise(
            "Leaky alone: Linear 784->1000->10", dense, digits, 1000, 10, density=0.13
        ),
        "dense-swapped": _stepwise(
            "Leaky alone: Linear 784->2 x 512->10", dense, digits, 512, 512, 10, swap=True,
            density=0.13,
        ),
        "dense-audio": _stepwise(
            "Leaky alone: Linear 700->2 x 256->20", dense, size(64, 100, 700, 1, 1), 256, 256, 20,
            swap=True, density=0.03,
        ),
        "dense-image": _stepwise(
            "Leaky alone: Linear 784->1000->10", dense, digits, 1000, 10, image=True
        ),
        # As mlx-snn's authors time.
        "dense-small": _stepwise(
            "Leaky alone: Linear 784->128->10", dense, digits, 128, 10, density=0.13
        ),
        "conv": _stepwise(conv.format(28), convolutions, images),
        "conv-swapped": _stepwise(
            conv.format(32), convolutions, size(32, 25, 1, 32, 32, side=20), swap=True
        ),
        "deep": norms,
        "deep-eval": _evaluated(norms),
        "wide": _stepwise(
            "Conv 2->2 x 64->3 x 128 3x3 32x32, each with Leaky; max_pool 2, average", wide,
            size(8, 10, 2, 32, 32), 64, 64, 128, 128, 128, swap=True,
        ),
        "residual": dataclasses.replace(
            _stepwise(
                "two residual blocks 2->32->64 32x32, BatchNorm, Leaky", Residual,
                size(8, 4, 2, 32, 32), 32, swap=True,
            ), forms=LOOPS,
        ),
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
TABLES = {"networks": USERS, "one-sample": ONE_SAMPLE, "convlstm": {"nowcasting": _nowcasting()}}
