"""Networks with a loop over steps, as users write them, and the calls that are left of the loops.

They are written for snnTorch, and snnlstm.accelerate makes its layers ours. T is the number of
steps; N, that of samples, equals no other size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
from snntorch import surrogate, utils
from torch import Tensor, nn

import snnlstm
from tests.loops.compiled import dyadic_, numbers

T, N = 4, 3


@dataclass(frozen=True)
class Network:
    """Describes a network, its inputs, and the calls that are left in its compiled graph.

    make: makes the network with snnTorch's layers. shapes: of its inputs. run: takes the place of
    net(*inputs). calls: the number of calls by their names in tests/loops/compiled.py. dtype: of
    the network. exact: weights and results are dyadic, and equal eager's by bits. prepare: changes
    the network once it is accelerated.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    calls: dict[str, int]
    run: Callable[..., Any] | None = None
    dtype: torch.dtype = torch.float64
    exact: bool = False
    rounding: float = 0.0
    prepare: Callable[[nn.Module], object] = lambda net: None

    def made(self) -> nn.Module:
        net = self.make()
        if self.exact:
            dyadic_(net)
        snnlstm.accelerate(net)
        self.prepare(net)
        return net.to(self.dtype)

    def inputs(self) -> list[Tensor]:
        return [numbers(*shape, seed=k).to(self.dtype) for k, shape in enumerate(self.shapes)]

    def tolerance(self, training: bool) -> float:
        """Returns that of numbers up to 1."""
        return (self.rounding if training else 0.0) if self.exact else 1e-10


def leaky(**options: Any) -> nn.Module:
    """Makes snnTorch's layer, which spikes often."""
    grad = surrogate.fast_sigmoid(slope=5)
    return snn.Leaky(**{"beta": 0.9, "threshold": 0.4, "spike_grad": grad} | options)


def exact_leaky(**options: Any) -> nn.Module:
    """Makes a Leaky whose sums and gradients are dyadic."""
    grad = snnlstm.surrogate.LSO(0.5)
    return leaky(**{"beta": 0.5, "threshold": 0.625, "spike_grad": grad} | options)


def cell(*channels: int, **options: Any) -> nn.Module:
    grad = surrogate.straight_through_estimator()
    return snn.SConv2dLSTM(*channels, **{"threshold": 0.05, "spike_grad": grad} | options)


class Recurrent(nn.Module):
    """Has a Linear within a neuron, which reads its own last result, and one behind the neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.fc = snn.RLeaky(0.5, linear_features=6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        spk, mem, out = *self.lif.init_rleaky(), []
        for x_t in x:
            spk, mem = self.lif(x_t, spk, mem)
            out.append(self.fc(spk))
        return torch.stack(out)


# ---- snnTorch's tutorials and documentation ------------------------------------------------------


class Dense(nn.Module):
    """Tutorial 5: one image for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(12, 10), leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(10, 5), leaky(beta=0.95)

    def forward(self, x: Tensor) -> Any:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        mem2_rec = []
        for _ in range(T):
            cur1 = self.fc1(x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


def events() -> nn.Sequential:
    """Tutorial 7: layers that keep their states, for events of (T, N, ...)."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.MaxPool2d(2),
        leaky(init_hidden=True),
        nn.Conv2d(4, 6, 3),
        nn.MaxPool2d(2),
        leaky(init_hidden=True),
        nn.Flatten(),
        nn.Linear(6, 5),
        leaky(init_hidden=True, output=True),
    )


def over_events(net: nn.Module, data: Tensor) -> Tensor:
    """Loops outside of the network, as tutorial 7 does."""
    spk_rec = []
    utils.reset(net)
    for step in range(data.size(0)):
        spk_out, mem_out = net(data[step])
        spk_rec.append(spk_out)
    return torch.stack(spk_rec)


class Documentation(nn.Module):
    """The example in snnTorch's documentation of the cell; x (N, T, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.sclstm1 = cell(1, 4, 3, max_pool=2)
        self.sclstm2 = cell(4, 6, 3, max_pool=2)
        self.fc1 = nn.Linear(6 * 2 * 2, 5)
        self.lif1 = leaky(beta=0.5)

    def forward(self, x: Tensor) -> Any:
        syn1, mem1 = self.sclstm1.reset_mem()
        syn2, mem2 = self.sclstm2.reset_mem()
        mem3 = self.lif1.init_leaky()
        spk3_rec = []
        mem3_rec = []
        num_steps = x.size()[1]
        for step in range(num_steps):
            x_step = x[:, step, :, :, :]
            spk1, syn1, mem1 = self.sclstm1(x_step, syn1, mem1)
            spk2, syn2, mem2 = self.sclstm2(spk1, syn2, mem2)
            cur = self.fc1(spk2.flatten(1))
            spk3, mem3 = self.lif1(cur, mem3)
            spk3_rec.append(spk3)
            mem3_rec.append(mem3)
        return torch.stack(spk3_rec), torch.stack(mem3_rec)


# ---- variants ------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Has two linear layers with Leaky each, for x of (..., 6)."""

    steps: Callable[..., Any] = staticmethod(lambda x: x)
    """Makes the steps of x."""

    def __init__(self, make: Callable[..., nn.Module] = leaky, **options: Any) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(6, 8), make(**options)
        self.fc2, self.lif2 = nn.Linear(8, 5), make(**options)

    def start(self) -> tuple[Tensor, Tensor]:
        return self.lif1.reset_mem(), self.lif2.reset_mem()

    def step(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spk, mem1 = self.lif1(self.fc1(x), mem1)
        spk, mem2 = self.lif2(self.fc2(spk), mem2)
        return spk, mem1, mem2

    def forward(self, x: Tensor) -> Any:
        mem1, mem2 = self.start()
        out = []
        for x_t in self.steps(x):
            spk, mem1, mem2 = self.step(x_t, mem1, mem2)
            out.append(spk)
        return torch.stack(out), mem1, mem2


class Unbound(Layers):
    steps = staticmethod(lambda x: x.unbind(0))


class BatchFirst(Layers):
    steps = staticmethod(lambda x: [x[:, t] for t in range(x.shape[1])])


class Exact(Layers):
    def __init__(self) -> None:
        super().__init__(exact_leaky)


class Half(Exact):
    """Gives its second layer spikes of x's half type; Leaky's are float32."""

    def step(self, x: Tensor, mem1: Tensor, mem2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spk, mem1 = self.lif1(self.fc1(x), mem1)
        spk, mem2 = self.lif2(self.fc2(spk.to(x.dtype)), mem2)
        return spk, mem1, mem2


class Learned(Layers):
    def __init__(self) -> None:
        super().__init__(learn_beta=True, learn_threshold=True)


class LearnedCell(nn.Module):
    """Learns the threshold of a cell, whose first state it is given; x (T, N, 2, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = cell(2, 3, 3, learn_threshold=True, reset_mechanism="subtract")

    def forward(self, x: Tensor, syn: Tensor, mem: Tensor) -> Any:
        out = []
        for x_t in x:
            spk, syn, mem = self.cell(x_t, syn, mem / 4 if not out else mem)
            out.append((spk, mem))
        return out, syn


class Residual(nn.Module):
    """Adds what it has around a block, with batch norms; x (T, N, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.lif1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), leaky()
        self.conv2, self.bn2, self.lif2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), leaky()
        self.fc = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Any:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        out = []
        for x_t in x:
            spk1, mem1 = self.lif1(self.bn1(self.conv1(x_t)), mem1)
            spk2, mem2 = self.lif2(self.bn2(self.conv2(spk1)) + x_t, mem2)
            out.append(self.fc(F.adaptive_avg_pool2d(spk2 + spk1, 1).flatten(1)))
        return torch.stack(out)


class Scale(torch.autograd.Function):
    """Doubles, and triples gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


def under_autocast(net: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def merged(linear: int = 2, leaky: int = 2, **others: int) -> dict[str, int]:
    return {"linear": linear, "leaky": leaky} | others


FLAT, IMAGES = (T, N, 6), (T, N, 2, 6, 6)
# A network that runs step by step in part has numbers of calls that are sums with T.
NETWORKS = {
    "tutorial 5": Network(Dense, ((N, 12),), merged()),
    "tutorial 7": Network(
        events, ((T, N, 2, 10, 10),), merged(1, 3, conv=2), run=over_events
    ),
    "documentation": Network(Documentation, ((N, T, 1, 8, 8),), merged(1, 1, cell=2)),
    "unbind": Network(Unbound, (FLAT,), merged()),
    "x[:, t]": Network(BatchFirst, ((N, T, 6),), merged()),
    "learned": Network(Learned, (FLAT,), merged()),
    "learned cell": Network(LearnedCell, (IMAGES, (N, 3, 6, 6), (N, 3, 6, 6)), {"cell": 1}),
    "residual": Network(Residual, ((T, N, 3, 5, 5),), merged(1, 2, conv=2, batch_norm=2)),
    "residual, evaluation": Network(
        Residual, ((T, N, 3, 5, 5),), merged(1, 2, conv=2), prepare=nn.Module.eval
    ),
    "dyadic": Network(Exact, (FLAT,), merged(), dtype=torch.float32, exact=True),
    "bfloat16": Network(Half, (FLAT,), merged(), dtype=torch.bfloat16, exact=True, rounding=0.03),
    "autocast": Network(
        Exact, (FLAT,), merged(), run=under_autocast, dtype=torch.float32, exact=True,
        rounding=0.03,
    ),
}  # fmt: skip
