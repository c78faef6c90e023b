"""A loop of step calls: the gradients of weight and bias are formed once, by a node of the loop.

Their values, against a loop over snnTorch's cell, the reference, and one call for the sequence.
What the node means for the graph: test_loop_graph.py.
"""

import flat
import pytest
import torch
from cases import PLAIN, wanting_gradients
from helpers import close
from kernels import native
from loops import STEPS, assert_same, both, cells, events, loss_of, unroll, zeros

from snnlstm import surrogate
from snnlstm.native import loop
from snnlstm.quant import state_quant

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

STEP = PLAIN.but(
    sequence=False, record=False, reset="none", threshold="number", dtype=torch.float64,
    time=1, in_channels=2, channels=4, height=6, width=5,
)  # fmt: skip
FLOAT32 = STEP.but(dtype=torch.float32, reset="subtract")
CASES = {
    "plain": STEP.but(reset="subtract", in_channels=3, channels=5, height=7, width=6),
    "one column": STEP.but(
        surrogate=surrogate.NONE, batch=3, in_channels=4, channels=9, height=13, width=1
    ),
    "5x3, dilated": STEP.but(
        kernel_size=(5, 3), dilation=(1, 2), in_channels=1, channels=3, height=9, width=8
    ),
    "strided": STEP.but(stride=(2, 3), surrogate=surrogate.NONE, height=9, width=11),
    "max pool": STEP.but(pool="max", pool_size=(2, 2), channels=16, height=9, width=8),
    "quantised": STEP.but(quant=state_quant(4)),
    "inhibition": STEP.but(inhibition=True, batch=3),
    "checkpoint": STEP.but(checkpoint=True),
    "float32": FLOAT32.but(in_channels=6, channels=16, height=12, width=13),
    "many samples": FLOAT32.but(batch=9, in_channels=3, channels=12, height=13, width=9),
    "many samples, strided": STEP.but(
        stride=(2, 2), batch=8, in_channels=3, channels=5, height=11, width=8
    ),
    "many rows": FLOAT32.but(channels=5, height=61, width=17),
    "9x9": FLOAT32.but(kernel_size=(9, 9), reset="none", batch=4, channels=6, height=21, width=14),
    "sparse": FLOAT32.but(
        in_channels=24, channels=16, height=12, width=13, density=0.05, spikes=True
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd"])
def test_a_loop_has_the_gradients_of_the_reference(name, algorithm):
    case = CASES[name]
    inputs = case.inputs()
    xs = [inputs.x * (0.5 + 0.3 * t) for t in range(STEPS)]
    results = []
    for run in (flat.reference, lambda *a: flat.run(*a, algorithm)):
        leaves = wanting_gradients(inputs)
        own = [x.clone().requires_grad_() for x in xs]
        _, syn, mem, *rest = leaves
        out = []
        for x in own:
            spk, syn, mem = run(x, syn, mem, *rest, case.options)
            out.append((spk, syn, mem))
        wanted = [*leaves[1:6], *own]
        results.append(
            torch.autograd.grad(loss_of(out), wanted, allow_unused=True, materialize_grads=True)
        )
    near = 1e-10 if case.dtype == torch.float64 else 3e-4
    for exact, found in zip(*results, strict=True):
        assert (exact - found).abs().max() <= near * exact.abs().max().clamp(min=1)


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
    """One call of the core forms it, and no step forms one."""
    # An older torch does not tell whether the graph is kept, and with it the gates.
    tells = hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    backward = native.cpu.Choice.backward

    def checked(choice, call, saved, grads, wanted, d_gates=None):
        assert not wanted[3]
        if tells:
            assert d_gates is saved.gates, "no other memory than the gates' is taken"
        return backward(choice, call, saved, grads, wanted, d_gates)

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
    """The change goes past torch: each step has the gradient of the weight that it saw."""
    of_x = []

    def work(cell):
        x = events(4).requires_grad_()
        state, losses = zeros(), []
        for x_t in x:
            spk, *state = cell(x_t, *(s.detach() for s in state))
            losses.append(spk.sum() + state[1].square().sum())
            if not of_x:  # torch's convolution would read the last weight later on
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
    """Only direct paths count in a step's own gradient: its states hang on the same parameters."""
    found = []
    for cell in cells(learn_threshold=learn):
        leaves = [events(3, 2).requires_grad_(), *cell.parameters()]
        first = torch.autograd.grad(loss_of(unroll(cell, leaves[0])), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        found.append([*(grad.detach() for grad in first), *second])
    # snnTorch multiplies threshold and reset in float32.
    close(*found, atol=5e-5 if learn else 1e-11, rtol=1e-6 if learn else 1e-9)
