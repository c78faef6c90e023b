"""A loop of step calls: the gradients of weight and bias are formed once, by a node of the loop.

Against a loop over snnTorch's cell, and against one call for the sequence.
"""

import gc
import itertools
import threading
import weakref

import flat
import pytest
import snntorch
import torch
from cases import Case, wanting_gradients
from kernels import native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snnlstm
from snnlstm import surrogate
from snnlstm.call import CellOptions
from snnlstm.native import autograd, loop
from snnlstm.quant import state_quant

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

OPTIONS = CellOptions((3, 3), surrogate=surrogate.atan(), reset="subtract")
CASES = {
    "plain": Case(OPTIONS, torch.float64, 1, 2, 3, 5, 7, 6),
    "one column": Case(CellOptions((3, 3)), torch.float64, 1, 3, 4, 9, 13, 1),
    "5x3, dilated": Case(
        CellOptions((5, 3), dilation=(1, 2), surrogate=surrogate.atan()), torch.float64,
        1, 2, 1, 3, 9, 8,
    ),
    "strided": Case(CellOptions((3, 3), stride=(2, 3)), torch.float64, 1, 2, 2, 4, 9, 11),
    "max pool": Case(
        CellOptions((3, 3), pool="max", pool_size=(2, 2), surrogate=surrogate.atan()),
        torch.float64, 1, 2, 2, 16, 9, 8,
    ),
    "quantised": Case(
        CellOptions((3, 3), quant=state_quant(4), surrogate=surrogate.atan()), torch.float64,
        1, 2, 2, 4, 6, 5,
    ),
    "inhibition": Case(
        CellOptions((3, 3), inhibition=True, surrogate=surrogate.atan()), torch.float64,
        1, 3, 2, 4, 6, 5,
    ),
    "checkpoint": Case(
        CellOptions((3, 3), checkpoint=True, surrogate=surrogate.atan()), torch.float64,
        1, 2, 2, 4, 6, 5,
    ),
    "float32": Case(OPTIONS, torch.float32, 1, 2, 6, 16, 12, 13),
    "sparse": Case(OPTIONS, torch.float32, 1, 2, 24, 16, 12, 13, density=0.05, spikes=True),
}  # fmt: skip
STEPS = 5


def cells(**arguments) -> tuple[nn.Module, nn.Module]:
    """snnTorch's cell and ours, of the same weights, in float64."""
    torch.manual_seed(1)
    arguments = {"threshold": 0.05, "reset_mechanism": "subtract"} | arguments
    theirs = snntorch.SConv2dLSTM(2, 4, 3, **arguments).double()
    ours = snnlstm.SConv2dLSTM(2, 4, 3, **arguments).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def events(steps: int = STEPS, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.rand(steps, batch, 2, 6, 7, generator=generator, dtype=torch.float64).gt(0.7).double()
    )


def zeros(batch: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, 4, 6, 7).double(), torch.zeros(batch, 4, 6, 7).double()


def unroll(cell: nn.Module, x: Tensor, state=None) -> list[tuple[Tensor, Tensor, Tensor]]:
    syn, mem = zeros(x.shape[1]) if state is None else state
    out = []
    for x_t in x:
        spk, syn, mem = cell(x_t, syn, mem)
        out.append((spk, syn, mem))
    return out


def gradients(cell: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in cell.parameters()]


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(gradients(one), gradients(other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def loss_of(out: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    return sum(
        (k + 1) * spk.sum() + syn.square().sum() + mem.sum()
        for k, (spk, syn, mem) in enumerate(out)
    )


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
    """By one call of the core, and no step forms one."""
    seen = []
    form = native.cpu.Choice.weight_gradient
    backward = native.cpu.Choice.backward
    monkeypatch.setattr(
        native.cpu.Choice, "weight_gradient", lambda c, s, w: seen.append(len(s)) or form(c, s, w)
    )

    def checked(choice, call, saved, grads, wanted, d_gates=None):
        assert not wanted[3]
        assert not wanted[4]
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


def test_gradients_of_x_alone_leave_nothing_behind():
    """What a pass that does not want the weight's gradient did must not reach a later pass."""
    found = []
    for cell in cells():
        x = events().requires_grad_()
        loss = loss_of(unroll(cell, x))
        (of_x,) = torch.autograd.grad(loss, x, retain_graph=True)
        (again,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(of_x, again)
        loss.backward(inputs=[cell.conv.weight], retain_graph=True)
        loss.backward()
        found.append([of_x, x.grad, *gradients(cell)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    theirs, ours = cells()
    for cell in (theirs, ours):
        out = unroll(cell, events())
        loss_of(out).backward(retain_graph=True)
        loss_of(out[:3]).backward(retain_graph=True)
        loss_of(out).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss_of(out).backward()
    assert_same(theirs, ours)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_graphs_alive_at_once(order):
    theirs, ours = cells()
    for cell in (theirs, ours):
        losses = [loss_of(unroll(cell, events() * (k + 1))) for k in range(3)]
        for k in order:
            losses[k].backward()
    assert_same(theirs, ours)


def test_a_weight_that_is_changed_between_steps():
    """Behind torch's back: each step has the gradient of the weight that it saw."""
    theirs, ours = cells()
    for cell in (theirs, ours):
        syn, mem = zeros()
        total = 0
        for x_t in events(4):
            spk, syn, mem = cell(x_t, syn.detach(), mem.detach())
            total = total + spk.sum() + mem.square().sum()
            cell.conv.weight.data = cell.conv.weight.data * 1.1
        total.backward()
    assert_same(theirs, ours)


def test_a_weight_that_is_changed_in_place_is_noticed():
    _, ours = cells()
    out = unroll(ours, events())
    with torch.no_grad():
        ours.conv.weight.mul_(1.1)
    more = unroll(ours, events(), tuple(t.detach() for t in out[-1][1:]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(out).backward()
    loss_of(more).backward()
    theirs, _ = cells()
    with torch.no_grad():
        theirs.conv.weight.mul_(1.1)
    loss_of(unroll(theirs, events(), tuple(t.detach() for t in out[-1][1:]))).backward()
    assert_same(theirs, ours)


def test_a_weight_whose_data_is_replaced_before_the_backward_pass():
    """Its memory was read at the old address with the old shape."""
    theirs, ours = cells()
    for cell in (theirs, ours):
        loss = loss_of(unroll(cell, events()))
        if cell is ours:
            shape = ours.conv.weight.shape
            ours.conv.weight.data = torch.zeros(3)
        (found,) = torch.autograd.grad(loss, cell.conv.bias)
        cell.conv.bias.grad = found
    torch.testing.assert_close(theirs.conv.bias.grad, ours.conv.bias.grad)
    assert shape == theirs.conv.weight.shape


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
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def test_no_bias():
    torch.manual_seed(1)
    theirs = snntorch.SConv2dLSTM(2, 4, 3, bias=False, threshold=0.05).double()
    ours = snnlstm.SConv2dLSTM(2, 4, 3, bias=False, threshold=0.05).double()
    ours.load_state_dict(theirs.state_dict())
    for cell in (theirs, ours):
        loss_of(unroll(cell, events())).backward()
    assert_same(theirs, ours)


def test_hooks_on_parameters_see_the_whole_gradient_once():
    theirs, ours = cells()
    seen: dict[nn.Module, list[Tensor]] = {theirs: [], ours: []}
    for cell, calls in seen.items():
        cell.conv.weight.register_hook(calls.append)
        cell.conv.weight.register_post_accumulate_grad_hook(
            lambda p, calls=calls: calls.append(p.grad)
        )
        loss_of(unroll(cell, events())).backward()
    assert len(seen[ours]) == len(seen[theirs]) == 2
    for one, other in zip(seen[theirs], seen[ours], strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_own_checkpointing_of_steps_and_of_the_loop(reentrant):
    theirs, ours = cells()

    for cell in (theirs, ours):

        def two_steps(x, syn, mem, cell=cell):
            total = 0
            for x_t in x:
                spk, syn, mem = cell(x_t, syn, mem)
                total = total + spk.sum() + mem.square().sum()
            return total, syn, mem

        syn, mem = (s.requires_grad_() for s in zeros())
        losses = []
        for x in events(6).split(2):
            if cell is ours:
                loss, syn, mem = checkpoint(two_steps, x, syn, mem, use_reentrant=reentrant)
            else:
                loss, syn, mem = two_steps(x, syn, mem)
            losses.append(loss)
        sum(losses).backward()
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
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-9)


def test_threads_with_graphs_of_their_own_on_one_cell():
    _, alone = cells()
    loss_of(unroll(alone, events())).backward()
    _, ours = cells()
    failures = []

    def work() -> None:
        try:
            for _ in range(5):
                out = torch.autograd.grad(
                    loss_of(unroll(ours, events())), [ours.conv.weight, ours.conv.bias]
                )
                for one, other in zip(out, gradients(alone), strict=True):
                    torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_two_backward_passes_over_one_kept_graph_at_once():
    _, ours = cells()
    loss = loss_of(unroll(ours, events(20)))
    wanted = [ours.conv.weight, ours.conv.bias]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    failures = []

    def work() -> None:
        for _ in range(5):
            out = torch.autograd.grad(loss, wanted, retain_graph=True)
            failures.extend(not torch.equal(a, b) for a, b in zip(out, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(failures)


def test_a_pass_that_fails_leaves_nothing_to_the_next():
    theirs, ours = cells()
    x = events().requires_grad_()
    first = x.clone()

    def fail(_):
        raise ZeroDivisionError

    first.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss_of(unroll(ours, first)).backward()
    ours.zero_grad()
    for cell in (theirs, ours):
        loss_of(unroll(cell, events())).backward()
    assert_same(theirs, ours)


def test_a_loop_lives_no_longer_than_its_graph():
    _, ours = cells()
    out = unroll(ours, events())
    node = weakref.ref(loop._loops[id(ours.conv.weight)])
    assert node() is not None
    del out
    ours.reset_mem()
    ours.spk = None
    ours._drop_caches()  # the reset signal of the last step hangs on its graph
    gc.collect()
    assert node() is None
    assert id(ours.conv.weight) not in loop._loops


@pytest.mark.parametrize("change", ["dtype", "strides"])
def test_saved_tensors_that_hooks_bring_back_otherwise(change):
    """In another memory order they are read in that; in another dtype they are converted."""
    theirs, ours = cells()

    def unpack(t: Tensor) -> Tensor:
        if change == "dtype":
            return t.float()
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.clone()

    for cell in (theirs, ours):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, unpack if cell is ours else lambda t: t
        ):
            loss = loss_of(unroll(cell, events()))
        if change == "dtype" and cell is ours:
            loss.backward()
        else:
            loss.backward()
    near = 1e-10 if change == "strides" else 1e-5
    for one, other in zip(gradients(theirs), gradients(ours), strict=True):
        assert (one - other).abs().max() <= near * one.abs().max()


def test_lazily_negated_gradients_are_resolved():
    """torch.complex(...).conj() gives gradients whose sign is a flag of the tensor."""
    found = []
    for cell in cells():
        _, syn, mem = unroll(cell, events())[-1]
        (torch.complex(syn, mem).conj() ** 2).imag.sum().backward()
        found.append(gradients(cell))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-10)


def test_the_graph_of_a_step_is_asked_for_in_a_way_that_this_torch_has():
    assert callable(autograd._will_run)
    assert callable(autograd._pass_number)
