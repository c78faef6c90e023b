"""Cells start, keep, replace, reset and copy their states as snnTorch's do, and as documented."""

import copy

import hypothesis.strategies as st
import pytest
import snntorch
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn

import snnlstm
from snnlstm.calls.spec import RESETS
from tests.shared.cases import drawing
from tests.shared.helpers import close, ours, states, steps, twins

SHAPES = st.sampled_from([(2, 5, 6), (1, 5, 6), (2, 4, 4)])  # N, H and W
SEEDS = st.integers(0, 9)
NAMES = st.sampled_from([(), ("syn",), ("mem",), ("syn", "mem")])


# What becomes of a reset state, which stays zeros for any size.
HANDLED = {
    "as it is": lambda cell: cell.reset_mem(),
    "after a look": lambda cell: (cell.reset_mem(), cell.syn, cell.mem.abs() * cell.mem)[1:],
    "cloned": lambda cell: [state.clone() for state in cell.reset_mem()],
    "moved": lambda cell: [state.to("cpu", torch.float32) for state in cell.reset_mem()],
    "empty": lambda cell: (torch.zeros(0), torch.zeros(0)),
}


class Programs(RuleBasedStateMachine):
    """Equal calls, resets and edits of both libraries' cells, in any order.

    float64, and a threshold that float32 holds, keep rounding away from all decisions.
    """

    @initialize(reset=st.sampled_from(RESETS), pool=st.sampled_from([0, 2]), hidden=st.booleans())
    def make(self, reset, pool, hidden):
        snntorch.SpikingNeuron.instances.clear()
        options = {"threshold": 0.0625, "reset_mechanism": reset, "max_pool": pool}
        cells = twins(**options, init_hidden=hidden, output=True, learn_threshold=True)
        self.cells = [cell.double() for cell in cells]
        self.losses = [0, 0]

    def compare(self, actual, expected):
        close([t.double() for t in actual], [t.double() for t in expected], atol=1e-11)

    @rule(shape=SHAPES, seed=SEEDS, time=st.sampled_from([0, 0, 0, 1, 3]), names=NAMES)
    def call(self, shape, seed, time, names):
        """A step that gets some states, or `time` steps, which our cell runs in one call."""
        (cell, oracle), (n, h, w) = self.cells, shape
        x = steps(time or 1, n, 2, h, w, seed=seed).double()
        given = dict(zip(("syn", "mem"), (s.double() for s in states(n, 3, h, w)), strict=True))
        given = {} if cell.init_hidden else {name: given[name] for name in names}
        outs = [oracle(x[0], **given), *(oracle(x_t) for x_t in x[1:])]
        expected = (torch.stack([out[0] for out in outs]), *outs[-1][1:]) if time else outs[0]
        actual = cell(x if time else x[0], **given)
        self.compare(actual, expected)
        # float32 holds these weights, and snnTorch's spikes are of float32.
        weights = torch.arange(expected[0].numel()).view_as(expected[0]) % 13 / 8
        for k, out in enumerate((actual, expected)):
            self.losses[k] = self.losses[k] + (out[0] * weights).sum().double()

    @rule(how=st.sampled_from(["reset_mem", "reset_hidden", "init_sconv2dlstm", "detach_hidden"]))
    def restart(self, how):
        for cell in self.cells:
            getattr(cell, how)()
            graphs = cell.syn.requires_grad or cell.mem.requires_grad
            assert not (graphs and how == "detach_hidden")
        self.losses = [0, 0]

    @rule(shapes=st.lists(SHAPES, min_size=1), seed=SEEDS, how=st.sampled_from([*HANDLED]))
    def call_from_a_reset_state(self, shapes, seed, how):
        given = [HANDLED[how](cell) for cell in self.cells]
        for n, h, w in [] if self.cells[0].init_hidden else shapes:
            x = steps(1, n, 2, h, w, seed=seed)[0].double()
            self.compare(*(cell(x, *state) for cell, state in zip(self.cells, given, strict=True)))

    @rule(shape=SHAPES, seed=SEEDS)
    def set(self, shape, seed):
        for cell in self.cells:
            cell.syn, cell.mem = (s.double() for s in states(shape[0], 3, *shape[1:], seed=seed))

    @rule(factor=st.sampled_from([0.0, -0.5]))
    def edit(self, factor):
        """The stored tensors may be written to."""
        self.restart("detach_hidden")
        for cell in self.cells:
            cell.mem.mul_(factor)

    @rule(copied=st.sampled_from([copy.deepcopy, copy.copy]))
    def copy(self, copied):
        self.restart("detach_hidden")  # a copy has no history
        self.cells[0] = copied(self.cells[0])

    @rule(seed=SEEDS)
    def load(self, seed):
        self.restart("detach_hidden")
        loaded = ours(seed=seed, threshold=0.125, reset_mechanism=self.cells[0].reset_mechanism)
        for cell in self.cells:
            cell.load_state_dict(loaded.state_dict())

    @rule()
    def train(self):
        losses = [loss + cell.mem.square().sum() + cell.syn.sum()
                  for loss, cell in zip(self.losses, self.cells, strict=True)]  # fmt: skip
        if losses[0].requires_grad:
            self.compare(*(
                torch.autograd.grad(loss, list(cell.parameters()), materialize_grads=True)
                for loss, cell in zip(losses, self.cells, strict=True)
            ))  # fmt: skip
        self.restart("detach_hidden")

    @invariant()
    def states_are_equal(self):
        self.compare(*((cell.syn, cell.mem) for cell in self.cells))


Programs.TestCase.settings = drawing(40)


@pytest.mark.drawn
class TestPrograms(Programs.TestCase):
    pass


def test_zeros_of_a_wrong_size_that_have_a_history_or_other_channels_are_refused():
    cell, x = ours(), torch.zeros(2, 2, 6, 7)
    learned = torch.zeros(1, 3, 6, 7, requires_grad=True)
    for state in (learned, torch.zeros(2, 4, 6, 7), torch.zeros(3, 6, 7)):
        with pytest.raises(ValueError, match="mem must have shape"):
            cell(x, mem=state)
    cell.mem = learned.detach() + 1  # which is no zeros of a reset any more
    with pytest.raises(ValueError, match="mem must have shape"):
        cell(x, mem=cell._state.mem)
    with pytest.raises(ValueError, match="mem must have shape"):
        torch.func.vmap(lambda mem: cell(x, mem=mem)[2])(torch.zeros(2, 1, 3, 6, 7))


@pytest.mark.emulator_long
@pytest.mark.parametrize("how", ["as it is", "reread", "passed"])
@pytest.mark.parametrize("time", [1, 7])
def test_a_reset_state_may_be_edited_in_place(backend, how, time):
    x, start = steps(time, 2, 2, 6, 7), states(2, 3, 6, 7)
    cell = ours()
    for _ in range(2):
        cell(x[0])
        syn, mem = cell.reset_mem()
        if how == "reread":
            syn, mem = cell.syn, cell.mem
        syn.copy_(start[0])
        mem.copy_(start[1])
        close(cell(x, *((syn, mem) if how == "passed" else ())), ours()(x, *start))


def test_a_parameter_passed_as_a_state_gets_gradients_and_is_not_registered(backend):
    cell = ours()
    names = list(cell.state_dict())
    syn, mem = (nn.Parameter(state) for state in states(1, 3, 5, 5))
    x = steps(2, 1, 2, 5, 5)
    cell(x[0], syn, mem)[2].sum().backward()
    assert syn.grad.any()
    assert mem.grad.any()
    cell.syn, cell.mem = syn, mem  # a parameter may also be assigned by hand
    cell(x[1])[2].sum().backward()
    assert list(cell.state_dict()) == names
    assert len(list(cell.parameters())) == 2
    cell(x[0])
    backend.check(cell.path)


EXPLICIT = r"should not be passed .* `init_hidden=True`"


@pytest.mark.parametrize(
    ("hidden", "given", "message"),
    [(True, ["syn"], EXPLICIT), (True, ["mem"], EXPLICIT), (False, ["syn", "mem"], "division")],
)
def test_a_call_that_fails_leaves_the_state_as_it_was(hidden, given, message):
    """The last row fails half way."""
    cell = ours(init_hidden=hidden)
    cell(steps(1, 1, 2, 5, 5)[0])
    held = (cell.syn, cell.mem, cell.spk, cell.path)
    cell.spike_grad = lambda u: 1 / 0
    with pytest.raises((TypeError, ArithmeticError), match=message):
        cell(torch.zeros(1, 2, 5, 5), **dict.fromkeys(given, torch.ones(1, 3, 5, 5)))
    assert all(a is b for a, b in zip((cell.syn, cell.mem, cell.spk, cell.path), held, strict=True))


def test_the_callers_tensors_are_never_modified(backend):
    for reset in ("subtract", "zero", "none"):
        cell = ours(reset_mechanism=reset, state_quant=snnlstm.quant.state_quant(4))
        syn, mem = states(2, 3, 6, 7)
        x = steps(1, 2, 2, 6, 7)[0]
        given = [t.requires_grad_() for t in (x, syn, mem)]
        before = [t.detach().clone() for t in given]
        out = cell(*given)
        torch.stack([t.sum() for t in out]).sum().backward()
        for tensor, copied in zip(given, before, strict=True):
            assert torch.equal(tensor, copied)
            assert tensor._version == 0
        assert not any(o.data_ptr() == g.data_ptr() for o in out for g in given)


def test_detaching_leaves_the_users_tensors_in_their_graphs():
    cell = ours()
    leaf = torch.zeros(1, 3, 5, 5, requires_grad=True)
    view = (2 * torch.zeros(2, 3, 5, 5, requires_grad=True))[1:]
    cell.syn, cell.mem = leaf, view
    cell.detach_hidden()
    assert leaf.requires_grad
    assert view.requires_grad
    assert not cell.syn.requires_grad | cell.mem.requires_grad


def test_detaching_a_returned_state_in_place_cuts_the_graph(backend):
    cell, x = ours(), steps(2, 1, 2, 5, 5).requires_grad_()
    for state in cell(x[0])[1:]:
        state.detach_()
    cell(x[1])[2].sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_states_are_no_buffers_but_move_with_the_cell():
    cell = ours()
    cell(torch.ones(1, 2, 5, 5))
    assert "mem" not in dict(cell.named_buffers())
    assert "mem" not in cell.state_dict()
    cell.half()
    assert cell.syn.dtype == cell.mem.dtype == torch.float16
    weight = cell.conv.weight
    cell.to_empty(device="meta", recurse=False)  # as tools do that move a network module by module
    assert cell.syn.is_meta
    assert cell.mem.is_meta
    assert cell.conv.weight is weight
    assert not weight.is_meta
