"""A loop of step calls has the gradients of snnTorch's loop, the reference, and one sequence call.

A node of the graph forms the gradients of weight and bias once for the whole loop.
test_loop_graph.py tests that node as a part of autograd's graph.
"""

import pytest
import torch
from alone import ALONE
from checks import check_gradients
from cpu_kernels import native
from fuzz import Calls
from helpers import close
from loops import STEPS, assert_same, both, cells, events, loss_of, unroll, zeros

from snnlstm.native import loop

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

# "many samples" has images enough that the kernels sum the weight gradient in several parts.
ROWS = (
    "one step", "reset to zero", "one threshold", "max_pool", "inhibition", "quantised",
    "kernel 5x3", "kernel 9x9", "one column", "stride", "dilation and stride", "no bias",
    "few spikes", "sparse numbers", "checkpoint", "half gates", "a tall image",
    "small images, pooled and strided", "many weights, small images", "many channels",
)  # fmt: skip
CASES = {name: ALONE[name].but(sequence=True, record=True, time=STEPS) for name in ROWS}
CASES["many samples"] = CASES["one step"].but(batch=9, channels=12, height=13, width=9)


@pytest.mark.parametrize("name", CASES)
def test_a_loop_has_the_gradients_of_the_reference(kernels, name):
    steps = Calls(kernels.isa, kernels.algorithm, "steps")
    for dtype in kernels.dtypes:
        # A case in which rounding decides proves nothing: take the next numbers.
        cases = (CASES[name].but(dtype=dtype, seed=seed) for seed in range(3))
        assert any(check_gradients(steps, case) for case in cases)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_equals_snntorchs_and_one_call_for_the_sequence(steps, batch):
    x = events(steps, batch)
    _, ours = both(lambda cell: loss_of(unroll(cell, x)).backward())
    _, whole = cells()
    spk, syn, mem = whole(x, *zeros(batch), record=True)
    loss_of(list(zip(spk, syn, mem, strict=True))).backward()
    assert_same(whole, ours)


@pytest.fixture
def formed(monkeypatch):
    """Collects of how many steps each weight gradient of the core is formed."""
    seen, form = [], native.cpu.Choice.weight_gradient
    monkeypatch.setattr(
        native.cpu.Choice, "weight_gradient", lambda c, s, w: seen.append(len(s)) or form(c, s, w)
    )
    return seen


def test_the_weight_gradient_is_formed_once_for_all_steps(formed, monkeypatch):
    """No step forms a weight gradient of its own."""
    # An older torch does not tell whether a graph is kept; the gates are then not overwritten.
    tells = hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    backward = native.cpu.Choice.backward

    def checked(choice, call, saved, grads, wanted, d_gates=None, steps=None):
        assert not wanted[3]
        assert steps == 9
        if tells:
            assert d_gates is saved.gates, "no other memory than the gates' is taken"
        return backward(choice, call, saved, grads, wanted, d_gates, steps)

    monkeypatch.setattr(native.cpu.Choice, "backward", checked)
    _, ours = cells()
    loss_of(unroll(ours, events(9))).backward()
    assert formed == [9]


@pytest.mark.parametrize(
    ("bound", "most"), [("MOST_STEPS", 2), ("MOST_BYTES", 3 * 6 * 7 * 4 * 16 * 8)]
)
def test_what_waits_is_bounded(formed, monkeypatch, bound, most):
    monkeypatch.setattr(loop, bound, most)
    both(lambda cell: loss_of(unroll(cell, events(7))).backward())
    assert len(formed) > 1
    assert sum(formed) == 7


@pytest.mark.parametrize("reached", [(0,), (4,), (1, 3), ()])
def test_only_some_steps_are_reached_by_the_loss(reached):
    def work(cell):
        out = unroll(cell, events())
        used = [out[k][0].sum() + out[k][2].square().sum() for k in reached]
        (sum(used) + cell.conv.weight.sum()).backward()

    both(work)


def test_states_that_are_detached_within_the_loop():
    def work(cell):
        state, total = zeros(), 0
        for x in events(6).split(2):
            out = unroll(cell, x, state)
            total = total + loss_of(out)
            state = [s.detach() for s in out[-1][1:]]
        total.backward()

    both(work)


def test_a_weight_that_is_changed_between_steps():
    """Torch does not see the change: each step has the gradient of the weight that it read."""
    of_x = []

    def work(cell):
        x = events(4).requires_grad_()
        state, losses = zeros(), []
        for x_t in x:
            spk, *state = cell(x_t, *(s.detach() for s in state))
            losses.append(spk.sum() + state[1].square().sum())
            if not of_x:  # a later backward pass of torch's convolution would read the last weight
                losses.pop().backward()
            cell.conv.weight.data = cell.conv.weight.data * 1.1
        if losses:
            sum(losses).backward()
        of_x.append(x.grad)

    both(work)
    close(*of_x, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ()], ids=str)
def test_parameters_without_gradients_and_no_bias(frozen):
    of_x = []

    def work(cell):
        for name in frozen:
            getattr(cell.conv, name).requires_grad_(False)
        x = events().requires_grad_()
        loss_of(unroll(cell, x)).backward()
        of_x.append(x.grad)
        assert all((p.grad is not None) == p.requires_grad for p in cell.parameters())

    both(work, bias=bool(frozen))
    close(*of_x, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("learn", [False, True])
def test_a_penalty_on_first_gradients(learn):
    """A step's gradient takes only direct paths: its states depend on the same parameters."""
    found = []
    for cell in cells(learn_threshold=learn, threshold=0.0625):
        leaves = [events(3, 2).requires_grad_(), *cell.parameters()]
        first = torch.autograd.grad(loss_of(unroll(cell, leaves[0])), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        found.append([*(grad.detach() for grad in first), *second])
    # snnTorch multiplies threshold and reset in float32.
    close(*found, atol=1e-5 if learn else 1e-11, rtol=1e-7 if learn else 1e-9)
