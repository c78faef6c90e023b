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
from loops import STEPS, assert_same, cells, events, gradients, loss_of, unroll, zeros
from torch import Tensor

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
        _, syn, mem, weight, bias, threshold, graded = leaves
        total: Tensor = torch.zeros((), dtype=case.dtype)
        for t, x in enumerate(own):
            spk, syn, mem = run(x, syn, mem, weight, bias, threshold, graded, case.options)
            total = total + (t + 1) * spk.sum() + syn.square().sum() + (mem * (t - 2)).sum()
        wanted = [t for t in (weight, bias, threshold, leaves[1], leaves[2], *own) if t is not None]
        results.append(
            torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        )
    near = 1e-10 if case.dtype == torch.float64 else 3e-4
    for exact, found in zip(*results, strict=True):
        assert (exact - found).abs().max() <= near * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_loop_equals_snntorchs_and_one_call_for_the_sequence(steps, batch):
    theirs, ours = cells()
    x = events(steps, batch)
    for cell in (theirs, ours):
        loss_of(unroll(cell, x)).backward()
    assert_same(theirs, ours)
    _, whole = cells()
    spk, syn, mem = whole(x, *zeros(batch), record=True)
    loss_of(list(zip(spk, syn, mem, strict=True))).backward()
    assert_same(whole, ours)


def test_the_weight_gradient_is_formed_once_for_all_steps(monkeypatch):
    """One call of the core forms it, and no step forms one."""
    # An older torch does not tell whether the graph is kept, and with it the gates.
    tells = hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    seen = []
    form = native.cpu.Choice.weight_gradient
    backward = native.cpu.Choice.backward
    monkeypatch.setattr(
        native.cpu.Choice, "weight_gradient", lambda c, s, w: seen.append(len(s)) or form(c, s, w)
    )

    def checked(choice, call, saved, grads, wanted, d_gates=None):
        assert not wanted[3]
        if tells:
            assert d_gates is saved.gates, "no other memory than the gates' is taken"
        return backward(choice, call, saved, grads, wanted, d_gates)

    monkeypatch.setattr(native.cpu.Choice, "backward", checked)
    _, ours = cells()
    loss_of(unroll(ours, events(9))).backward()
    assert seen == [9]


@pytest.mark.parametrize("bound", ["MOST_BYTES", "MOST_STEPS"])
def test_what_waits_is_bounded(monkeypatch, bound):
    theirs, ours = cells()
    monkeypatch.setattr(loop, bound, 2 if bound == "MOST_STEPS" else 3 * 6 * 7 * 4 * 16 * 8)
    seen = []
    form = native.cpu.Choice.weight_gradient
    monkeypatch.setattr(
        native.cpu.Choice, "weight_gradient", lambda c, s, w: seen.append(len(s)) or form(c, s, w)
    )
    for cell in (theirs, ours):
        loss_of(unroll(cell, events(7))).backward()
    assert_same(theirs, ours)
    assert len(seen) > 1
    assert sum(seen) == 7


@pytest.mark.parametrize("reached", [(0,), (4,), (1, 3), ()])
def test_only_some_steps_are_reached_by_the_loss(reached):
    theirs, ours = cells()
    for cell in (theirs, ours):
        out = unroll(cell, events())
        used = [out[k][0].sum() + out[k][2].square().sum() for k in reached]
        (sum(used) + cell.conv.weight.sum()).backward()
    assert_same(theirs, ours)


def test_states_that_are_detached_within_the_loop():
    theirs, ours = cells()
    for cell in (theirs, ours):
        syn, mem = zeros()
        total = 0
        for t, x_t in enumerate(events(6)):
            spk, syn, mem = cell(x_t, syn, mem)
            total = total + spk.sum() + mem.square().sum()
            if t % 2:
                syn, mem = syn.detach(), mem.detach()
        total.backward()
    assert_same(theirs, ours)


def test_a_weight_that_is_changed_between_steps():
    """The change goes past torch: each step has the gradient of the weight that it saw."""
    theirs, ours = cells()
    of_x = []
    for cell in (theirs, ours):
        x = events(4).requires_grad_()
        syn, mem = zeros()
        losses = []
        for x_t in x:
            spk, syn, mem = cell(x_t, syn.detach(), mem.detach())
            losses.append(spk.sum() + mem.square().sum())
            if cell is theirs:  # torch's convolution would read the last weight later on
                losses.pop().backward()
            cell.conv.weight.data = cell.conv.weight.data * 1.1
        if losses:
            sum(losses).backward()
        of_x.append(x.grad)
    assert_same(theirs, ours)
    close(*of_x, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_parameters_without_gradients(frozen):
    theirs, ours = cells()
    found = []
    for cell in (theirs, ours):
        if frozen != "bias":
            cell.conv.weight.requires_grad_(False)
        if frozen != "weight":
            cell.conv.bias.requires_grad_(False)
        x = events().requires_grad_()
        loss_of(unroll(cell, x)).backward()
        found.append([x.grad, *(p.grad for p in cell.parameters() if p.requires_grad)])
        assert all(p.grad is None for p in cell.parameters() if not p.requires_grad)
    close(*found, atol=1e-11, rtol=1e-10)


def test_no_bias():
    theirs, ours = cells(bias=False)
    for cell in (theirs, ours):
        loss_of(unroll(cell, events())).backward()
    assert_same(theirs, ours)


def test_truncated_backpropagation_with_stored_states():
    theirs, ours = cells()
    for cell in (theirs, ours):
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.05)
        cell.reset_mem()
        for chunk in events(9).split(3):
            optimizer.zero_grad()
            losses = []
            for x_t in chunk:
                spk, syn, mem = cell(x_t)
                losses.append(spk.sum() + mem.square().sum())
            sum(losses).backward()
            optimizer.step()
            cell.detach_hidden()
    torch.testing.assert_close(theirs.conv.weight, ours.conv.weight, atol=1e-11, rtol=1e-10)


def test_second_derivatives_of_a_loop():
    found = []
    for cell in cells():
        x = events(3, 1).requires_grad_()
        mem = unroll(cell, x)[-1][2]
        (of_x,) = torch.autograd.grad(mem.square().sum(), x, create_graph=True)
        of_x.square().sum().backward()
        found.append([of_x.detach(), *gradients(cell)])
    close(*found, atol=1e-11, rtol=1e-9)


def test_a_penalty_on_the_gradients_of_the_parameters():
    """Only direct paths count in a step's own gradient: its states hang on the same parameters."""
    found = []
    for cell in cells(learn_threshold=True):
        parameters = list(cell.parameters())
        out = unroll(cell, events(3, 2))
        first = torch.autograd.grad(loss_of(out), parameters, create_graph=True)
        sum(grad.square().sum() for grad in first).backward()
        found.append([*(grad.detach() for grad in first), *gradients(cell)])
    close(*found, atol=1e-5, rtol=1e-7)  # snnTorch multiplies threshold and reset in float32.
