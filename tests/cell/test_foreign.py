"""accelerate takes the ConvLSTMs of others if they compute what ours does, and leaves the rest."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from helpers import close, same_gradients
from torch import Tensor, nn

import snnlstm
from benchmarks.plain_convlstm import Cell, Stack

SIZE = (5, 7)


@pytest.fixture
def steps(monkeypatch):
    """Returns a list that gets an entry for each step that plain torch computes."""
    seen, gates = [], Cell.gates
    monkeypatch.setattr(Cell, "gates", lambda *args: seen.append(1) or gates(*args))
    return seen


class Named(nn.Module):
    """The convolution has another name, the padding is a word, and the first state may be None."""

    def __init__(self, inputs=2, channels=3):
        super().__init__()
        self.channels, self.bias = channels, True
        self.Gates = nn.Conv2d(inputs + channels, 4 * channels, 3, padding="same")

    def gates(self, x, h):
        return self.Gates(torch.cat((x, h), 1)).chunk(4, 1)

    def after(self, c, i, f, o, g):
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, input_, prev_state=None):
        if prev_state is None:
            zeros = input_.new_zeros(input_.shape[0], self.channels, *input_.shape[2:])
            prev_state = zeros, zeros
        h, c = prev_state
        return self.after(c, *self.gates(input_, h))


class Nested(Named):
    def forward(self, x, hidden, lengths=None):
        h, c = super().forward(x, hidden)
        return [h, (h, c)]


class Last(nn.Module):
    """A stack that returns the last h alone, of a sequence with time first."""

    def __init__(self):
        super().__init__()
        self.cell = Cell(2, 3, (3, 3))

    def forward(self, frames):
        state = self.cell.init_hidden(frames.shape[1], frames.shape[-2:])
        for frame in frames:
            state = self.cell(frame, state)
        return state[0]


TAKEN = {
    "paired": lambda: Cell(2, 3, (3, 5)),
    "no bias": lambda: Cell(2, 3, (3, 3), bias=False),
    "dilated": lambda: Cell(2, 3, (3, 3), dilation=2),
    "named": Named,
    "nested": Nested,
}


def called(cell: nn.Module, *given: Tensor) -> list[Tensor]:
    """Returns the results of a cell, one behind the other."""
    out = cell(given[0], given[1:])
    return [*out] if isinstance(out[1], Tensor) else [out[0], *out[1]]


def inputs(time: int = 0) -> list[Tensor]:
    lead = (time, 2) if time else (2,)
    return [torch.randn(*lead, 2, *SIZE), torch.randn(2, 3, *SIZE), torch.randn(2, 3, *SIZE)]


@pytest.mark.parametrize("name", TAKEN)
def test_a_cell_is_taken_and_given_back(backend, name):
    cell = TAKEN[name]()
    theirs, kind, before = copy.deepcopy(cell), type(cell), dict(cell.__dict__)
    keys, state = list(cell.state_dict()), torch.get_rng_state()
    report = snnlstm.accelerate(cell)
    assert report.swapped == ("",)
    assert "a ConvLSTM cell by its" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(cell, kind)
    assert list(cell.state_dict()) == keys
    assert cell.bias is (name != "no bias")
    given = [inputs(), None]
    given[1] = [t.clone().requires_grad_() for t in given[0]]
    given[0] = [t.requires_grad_() for t in given[0]]
    outs = called(cell, *given[0]), called(theirs, *given[1])
    close(*outs)
    backend.check(cell.path)
    for out in outs:
        sum(o.square().sum() for o in out).backward()
    same_gradients(cell, theirs)
    close([t.grad for t in given[0]], [t.grad for t in given[1]], atol=1e-5)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert isinstance(other, kind)
        close(called(other, *inputs()), called(other, *inputs()), atol=9)
        assert torch.equal(called(other, *given[0])[0], outs[0][0])
    assert snnlstm.accelerate(cell).left == {"": "is snnlstm's already"}
    assert snnlstm.restore(cell).swapped == ("",)
    assert type(cell) is kind
    assert cell.__dict__ == before


def test_a_cell_with_a_path_of_its_own_keeps_it():
    kind = type("WithPath", (Cell,), {"path": "its own"})
    cell = kind(2, 3, (3, 3), True)
    assert snnlstm.accelerate(cell).swapped == ("",)
    called(cell, *inputs())
    assert cell.path == "its own"


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("return_all", [True, False])
def test_a_stack_goes_in_one_call(backend, batch_first, return_all, steps):
    net = nn.ModuleDict(
        {
            "stack": Stack(2, [3, 4], (3, 3), 2, batch_first, True, return_all),
            "head": nn.Conv2d(4, 1, 1),
        }
    )
    theirs = copy.deepcopy(net)
    report = snnlstm.accelerate(net)
    assert set(report.swapped) == {"stack", "stack.cell_list.0", "stack.cell_list.1"}
    assert "a stack of 2, with a sequence in one call" in str(report)
    x = torch.randn(3, 2, 2, *SIZE)
    steps.clear()
    outs = net["stack"](x), theirs["stack"](input_tensor=x)
    assert len(steps) == 2 * (2 if batch_first else 3)  # only theirs
    assert type(outs[0][1][0]) is list
    close(*outs)
    assert outs[0][0][0].is_contiguous()
    backend.check(net["stack"].cell_list[1].path)
    for out in outs:
        sum(
            leaf.square().sum() for leaf in [*out[0], *(s for pair in out[1] for s in pair)]
        ).backward()
    same_gradients(net["stack"], theirs["stack"])
    # Initial states, hooks and other cells are for the own forward.
    states = [(h + 1, c) for h, c in (cell.init_hidden(x.shape[not batch_first], SIZE)
              for cell in net["stack"].cell_list)]  # fmt: skip
    close(net["stack"](x, states), theirs["stack"](x, states))
    seen = []
    net["stack"].cell_list[0].register_forward_hook(lambda *_: seen.append(1))
    close(net["stack"](x), theirs["stack"](x))
    assert len(seen) == (2 if batch_first else 3)
    snnlstm.restore(net)
    assert type(net["stack"]) is Stack


def test_a_stack_of_other_results(steps):
    net = nn.Sequential(Last())
    theirs, x = copy.deepcopy(net), torch.randn(3, 2, 2, *SIZE)
    assert snnlstm.accelerate(net).taken["0"] == "a stack of 1, with a sequence in one call"
    steps.clear()
    out = net(x)
    assert not steps
    close(out, theirs(x))


def test_torchgeos(backend):
    models = pytest.importorskip("torchgeo.models")
    net = models.ConvLSTM(2, [3, 4], 3, 2, return_all_layers=True)
    own = snnlstm.ConvLSTM(2, [3, 4], 3, 2, batch_first=True, return_all_layers=True)
    own.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 2, *SIZE)
    expected = net(x)
    close(own(x)[0], expected[0])
    assert len(snnlstm.accelerate(net).swapped) == 3
    close(net(x), expected)


class Swapped(Named):
    def after(self, c, i, f, g, o):
        return super().after(c, i, f, o, g)


class Peephole(Named):
    def __init__(self):
        super().__init__()
        self.w_ci = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def after(self, c, i, f, o, g):
        return super().after(c, i + self.w_ci * c, f, o, g)


class Gained(Peephole):  # at its zeros the gradients are zeros, too
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def after(self, c, i, f, o, g):
        return Named.after(self, c, i + self.gain * self.w_ci * c, f, o, g)


class Normed(Named):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 12)

    def gates(self, x, h):
        return self.norm(self.Gates(torch.cat([x, h], 1))).chunk(4, 1)


class Clamped(Named):
    def after(self, c, i, f, o, g):
        h, c = super().after(c, i, f, o, g)
        return h, c.clamp(-10, 10)


class Dropping(Named):
    def after(self, c, i, f, o, g):
        h, c = super().after(c, i, f, o, g)
        return nn.functional.dropout(h, 0.5, self.training), c


class Detached(Named):
    def after(self, c, i, f, o, g):
        return super().after(c.detach(), i, f, o, g)


class Counting(Named):
    steps = 0

    def after(self, c, i, f, o, g):
        self.steps += 1
        return super().after(c, i, f, o, g)


class Deep(Named):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 64, 3, padding=1)

    def forward(self, x, state):
        raise AssertionError("what is so large is not tried")


class Fixed(Named):
    def after(self, c, i, f, o, g):
        return super().after(c + torch.zeros(1, 3, 9, 9), i, f, o, g)


class TwoConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_x, self.of_h = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x, state):
        i, f, o, g = (self.of_x(x) + self.of_h(state[0])).chunk(4, 1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


LEFT = {
    Swapped: "in training it computes other things than gates i, f, o, g",
    Peephole: "gates i, f, o, g; beside Gates it has w_ci",
    Gained: "gates i, f, o, g; beside Gates it has w_ci, gain",
    Normed: "gates i, f, o, g; beside Gates it has norm",
    Clamped: "in training it computes other things",
    Dropping: "in training it computes other things",
    Detached: "in training it computes other things",
    Counting: "it keeps something from call to call",
    Deep: "it has more layers than its Gates",
    Fixed: "a call raises RuntimeError",
    TwoConvLSTM: "no convolution of [x, h] to the four gates",
}


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_what_computes_something_else_is_left(kind):
    named = type(kind.__name__ if "LSTM" in kind.__name__ else "ConvLSTM", (kind,), {})
    net = nn.Sequential(named(), Cell(2, 3, (3, 3)))
    before = dict(net[0].__dict__)
    report = snnlstm.accelerate(net)
    assert report.swapped == ("1",)
    assert LEFT[kind] in report.left["0"]
    assert type(net[0]) is named
    assert net[0].__dict__ == before


def test_hooked_cells_and_blocks_that_are_no_cells_are_left():
    class Block(nn.Module):  # looks like a cell, but for its name
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(5, 12, 3, padding=1)

        def forward(self, x, skip):
            raise AssertionError("it is for others")

    class ConvLSTMCell(Cell):
        pass

    net = nn.ModuleList([Block(), ConvLSTMCell(2, 3, (3, 3)), Cell(2, 3, (3, 3))])
    net[1].register_forward_hook(lambda *_: None)
    report = snnlstm.accelerate(net)
    assert report.left == {"1": "it carries hooks, or its forward was replaced"}
    assert report.swapped == ("2",)


def test_a_stack_that_does_more_is_called_step_by_step():
    class ResidualConvLSTM(Stack):
        def forward(self, x, states=None):
            out, last = super().forward(x, states)
            return [o + 1 for o in out], last

    net = ResidualConvLSTM(2, 3, (3, 3), 1)
    theirs, x = copy.deepcopy(net), torch.randn(3, 2, 2, *SIZE)
    report = snnlstm.accelerate(net)
    assert report.swapped == ("cell_list.0",)
    assert "h and c of its cells over time" in report.left[""]
    close(net(x), theirs(x))


def test_a_call_of_another_kind_goes_to_the_own_forward(caplog):
    cell, x = Named(), inputs()[0]
    expected = cell(x)
    snnlstm.accelerate(cell)
    assert torch.equal(cell(x)[0], expected[0])
    assert torch.equal(cell(input_=x, prev_state=None)[0], expected[0])
    h, c = expected
    close(cell(x, prev_state=[h, c]), cell(prev_state=(h, c), input_=x))
    with pytest.raises(ValueError, match="h of prev_state must have shape"):
        cell(x, (h[:, 1:], c))
    with pytest.raises(TypeError):
        cell(x, (h, c), 3)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled():
    net = Stack(2, 3, (3, 3), 1)
    theirs, x = copy.deepcopy(net), torch.randn(3, 2, 2, *SIZE)
    snnlstm.accelerate(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    close(compiled(x), theirs(x))


def test_snntorch_is_not_needed_for_these():
    with mock.patch.object(snnlstm.swap, "Base", nn.Module):
        net = Stack(2, 3, (3, 3), 1)
        assert len(snnlstm.accelerate(net).swapped) == 2
        assert len(snnlstm.restore(net).swapped) == 2
        with pytest.raises(ImportError, match="snntorch"):
            snnlstm.accelerate(nn.Linear(1, 1))
