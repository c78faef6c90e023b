"""A loop of step calls has the gradients of snnTorch's loop, the reference, and one sequence call.

Graphs run in threads, or fail. What was saved, and the weights, change meanwhile. Edits of inputs
and outputs are noticed, or enter the graph.
"""

import gc
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from snntorch import AssociativeLeaky
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import snnlstm
import snnlstm.dispatch.run
from benchmarks import peak_memory
from snnlstm.calls.spec import RESETS
from tests.autograd.loops import STEPS, both, cells, events, loss_of, unroll, zeros
from tests.shared import flat
from tests.shared.cases import PLAIN, Inputs, wanting_gradients
from tests.shared.cpu_kernels import needs_core
from tests.shared.gradients import KEPT, OUTPUTS, leaves_and_gradients, total
from tests.shared.helpers import (
    close,
    in_threads,
    measures_memory,
    ours,
    same,
    same_gradients,
    states,
    steps,
)

pytestmark = needs_core


ADAPTS = {
    "in place": lambda threshold: threshold.detach().mul_(2),
    "through data": lambda threshold: threshold.data.mul_(2),
    "other data": lambda threshold: setattr(threshold, "data", threshold.data * 2),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("adapt", ADAPTS)
def test_a_threshold_that_adapts_from_step_to_step(adapt, order):
    """It is learned, and differentiated once or twice, or it is not learned."""

    def work(cell):
        state, loss = zeros(), 0
        for x in events(3):
            spk, *state = cell(x, *state)
            loss = loss + spk.sum() + state[1].square().sum()
            ADAPTS[adapt](cell.threshold)
        if order == 2:
            grads = torch.autograd.grad(loss, [*cell.parameters()], create_graph=True)
            loss = sum(grad.square().sum() for grad in grads).log() / 100
        loss.backward()

    both(work, learn_threshold=order > 0)


def test_a_computed_threshold_that_was_changed_has_no_second_derivatives():
    _, ours = cells(learn_threshold=True)
    threshold = ours.threshold * 1
    loss = torch.func.functional_call(ours, {"threshold": threshold}, events()[0])[2].sum()
    with torch.no_grad():
        threshold.mul_(1.5)
    with pytest.raises(RuntimeError, match="threshold was modified by an inplace operation"):
        torch.autograd.grad(loss, ours.threshold, create_graph=True)


@pytest.mark.parametrize("reset", RESETS)
def test_a_threshold_that_no_loss_reaches_has_no_gradient(reset):
    """An optimizer leaves a parameter alone whose gradient is None, and decays it at zeros."""
    found = []
    for cell in cells(learn_threshold=True, reset_mechanism=reset):
        _, syn, mem = cell(events()[0], *zeros())
        for loss in syn.sum(), mem.sum(), cell(events()[1])[1].sum():
            wanted = loss, cell.threshold
            found.append(torch.autograd.grad(*wanted, retain_graph=True, allow_unused=True)[0])
    close(found[:3], found[3:])
    assert found[0] is None
    assert (found[2] is None) == (reset != "subtract")


def test_a_weight_whose_data_is_replaced_before_the_backward_pass():
    """The backward pass reads no memory at the old address in the old shape."""
    found = []
    for cell in cells():
        loss = loss_of(unroll(cell, events()))
        if found:  # our cell alone: torch's convolution would read the new data
            cell.conv.weight.data = torch.zeros(3)
        found += torch.autograd.grad(loss, cell.conv.bias)
    close(*found, atol=1e-11, rtol=1e-10)


def test_two_backward_passes_over_one_kept_graph_at_once():
    _, ours = cells()
    loss = loss_of(unroll(ours, events(20)))
    wanted = [ours.conv.weight, ours.conv.bias]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)

    def work(_: int) -> None:
        for _ in range(5):
            same(torch.autograd.grad(loss, wanted, retain_graph=True), expected)

    in_threads(work, 3)


WAYS = (
    "moved", "made again", "read twice", "differentiated again", "with another weight",
    "read twice, with another weight",
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_loop_has_saved(backend, way):
    """On the CPU the packed weight of each step is among it, and no other weight is read.

    CUDA packs again where the packed weight is larger than what else is saved.
    """
    if "with another weight" in way and backend.native and backend.name != "cpu":
        pytest.skip("which weight is read is not promised")
    x, found = steps(3, 2, 2, 6, 7), []
    for chosen in ("", way):
        cell, loss = ours(reset_mechanism="subtract"), 0
        step = partial(checkpoint, cell, use_reentrant=False) if chosen == "made again" else cell
        syn, mem = cell.reset_mem()
        with save_on_cpu() if chosen == "moved" else nullcontext():
            for x_t in x:
                spk, syn, mem = step(x_t, syn, mem)
                loss = loss + spk.sum() + mem.square().sum()
        gradients = partial(torch.autograd.grad, loss, list(cell.conv.parameters()))
        if "read twice" in chosen:
            gradients(retain_graph=True)
        if "with another weight" in chosen:
            cell.conv.weight.data.mul_(2)
        found.append(gradients(create_graph=chosen == "differentiated again"))
        backend.check(cell.path)
    equal = all(map(partial(torch.allclose, rtol=1e-4, atol=1e-5), *found))
    assert equal == (backend.native or "with another weight" not in way)


# ---- what happens while the backward pass runs --------------------------------------------------


def _trained_within_the_pass(cell):
    """Each step has an x and first states of its own, which an optimizer changes in the pass."""
    leaves, losses = [], []
    for x in events():
        own = [t.requires_grad_() for t in (x.clone(), *(z + 0.1 for z in zeros()))]
        for leaf in own:
            leaf.register_post_accumulate_grad_hook(_descend)
        leaves += own
        spk, syn, mem = cell(*own)
        losses.append(spk.sum() + syn.square().sum() + mem.sum())
    sum(losses).backward()


def _descend(leaf):
    with torch.no_grad():
        leaf.sub_(leaf.grad).mul_(3)


def test_inputs_that_are_written_to_during_the_pass():
    both(_trained_within_the_pass)


@pytest.mark.parametrize("place", [0, STEPS - 1])
def test_a_pass_that_was_interrupted_is_run_again(place):
    """The second run over the graph finds everything as the first did."""
    _, ours = cells(learn_threshold=True)
    broken = []

    def interrupt(*_):
        if not broken:
            broken.append(True)
            raise KeyboardInterrupt

    x = events()
    mems = [mem for _, _, mem in unroll(ours, x)]
    mems[place].grad_fn.register_hook(interrupt)  # called behind the step's backward pass
    keep = place < STEPS - 1  # else autograd has freed nothing yet
    with pytest.raises(KeyboardInterrupt):
        mems[-1].backward(torch.ones_like(mems[-1]), retain_graph=keep)
    ours.zero_grad()
    mems[-1].backward(torch.ones_like(mems[-1]))
    _, whole = cells(learn_threshold=True)
    unroll(whole, x)[-1][2].sum().backward()
    same_gradients(whole, ours, atol=1e-11, rtol=1e-10)


def _loop(cell, x):
    for x_t in x:
        cell(x_t)


def _convlstm_loop(cell, x):
    state = None
    for x_t in x:
        state = cell(x_t, state)


def _fail(cell):
    cell.conv.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cell.mem.sum().backward()
    cell.reset_mem()


ENDS = {
    "failing": _fail,
    "reset_mem": lambda cell: cell.reset_mem(),
    "detach_hidden": lambda cell: cell.detach_hidden(),
    "reset_hidden": lambda cell: cell.reset_hidden(),
}
# What is called, how, and what ends it.
HELD = {
    **{f"a cell, {name}": (ours, _loop, end) for name, end in ENDS.items()},
    "a cell, backward": (ours, _loop, lambda cell: (cell.syn + cell.mem).sum().backward()),
    "learnt": (lambda: ours(learn_threshold=True), _loop, ENDS["detach_hidden"]),
    "signals": (lambda: snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1), _loop, ENDS["reset_mem"]),
    "a ConvLSTMCell": (lambda: snnlstm.ConvLSTMCell(2, 3, 3), _convlstm_loop, id),
    "a ConvLSTM": (lambda: snnlstm.ConvLSTM(2, 3, 3, 2), lambda net, x: net(x), id),
    "a stack": (
        lambda: snnlstm.Sequential(
            ours(init_hidden=True), nn.Flatten(), AssociativeLeaky(126, 5, 3, 15)
        ),
        lambda net, x: net(x), lambda net: net[0].reset_mem(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_nothing_that_was_saved_outlives_the_results_and_the_state(name):
    """A backward pass also ends what was saved."""
    make, run, end = HELD[name]
    net, x, saved = make(), steps(4, 2, 2, 6, 7), []
    x = x[..., 0] if name == "signals" else x

    def pack(tensor):
        saved.append(weakref.ref(tensor.untyped_storage()))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(net, x)
    assert len(saved) > 8
    end(net)
    for module in net.modules():
        module.spk = None
    gc.collect()
    own = {tensor.untyped_storage()._cdata for tensor in [x, *net.state_dict().values()]}
    left = [held()._cdata for held in saved if held() is not None]
    assert not set(left) - own


def test_hooks_that_bring_back_another_shape_are_refused():
    _, ours = cells()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1] if t.dim() else t):
        _, _, mem = ours(events(1)[0])
    with pytest.raises(RuntimeError, match="must keep its shape"):
        mem.sum().backward()


@pytest.mark.parametrize("kept", ["moved", "widened", "negated", "strided"])
def test_hooks_on_saved_tensors_come_and_go(kept):
    """One plan serves all backward passes, whatever the first one has met."""
    cell, found = ours(), []
    x, state = steps(1, 3, 2, 6, 7)[0].requires_grad_(), states(3, 3, 6, 7)
    for back in (None, KEPT[kept], KEPT[kept], None):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back or (lambda t: t)):
            spk, _, mem = cell(x, *state)
            found.append(torch.autograd.grad(spk.sum() + mem.square().sum(), x)[0])
        if len(found) == 1:
            snnlstm.calls.entries.table.clear()
            cell._entries = (None, None)
    for grad in found[1:]:
        close(grad, found[0], atol=1e-6)


# ---- second derivatives, where something has changed since the forward pass --------------------


def test_second_derivatives_within_autocast_of_a_pass_without():
    """The autocast of the forward pass counts, not that of the code that asks."""
    found = []
    for cell in cells():
        x = events(2).requires_grad_()
        loss = loss_of(unroll(cell.float(), x.float(), [z.float() for z in zeros()]))
        with torch.autocast("cpu", torch.bfloat16):
            (grad_of_x,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append(grad_of_x.detach())
    close(*found, atol=1e-5, rtol=1e-5)


@measures_memory
def test_the_pass_of_a_long_loop_needs_no_more_memory_than_that_of_a_short_one():
    """Autograd adds up the steps' gradients as it goes, and gives back what a step has saved."""
    torch.set_num_threads(1)
    grown = []
    for time in (20, 20, 200):  # the first run warms up
        cell = ours(2, 24, 3)
        x = steps(time, 2, 2, 24, 24)
        spks, state = [], cell.reset_mem()
        for x_t in x:
            spk, *state = cell(x_t, *state)
            spks.append(spk)
        loss = sum(spk.sum() for spk in spks)
        peak = peak_memory.watching("cpu")
        loss.backward()
        grown.append(peak())
    assert grown[2] < grown[1] + (4 << 20), [f"{g / 2**20:.1f} MiB" for g in grown]


# ---- tensors that are edited, or of inference mode -----------------------------------------------


@pytest.mark.parametrize("name", ["x", "syn", "mem", "weight"])
def test_editing_an_input_in_place_is_noticed(name):
    # The call gets clones, because torch lets nobody edit leaves that require a gradient.
    held = Inputs(*(None if t is None else t.clone() for t in wanting_gradients(PLAIN.inputs())))
    out = flat.run(*held, PLAIN.options)
    with torch.no_grad():
        getattr(held, name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[2].sum().backward()


@pytest.mark.parametrize("name", OUTPUTS)
def test_editing_an_output_in_place_gives_right_gradients(name):
    """An edit of a returned tensor enters the graph as the same operation out of place does."""
    for case in (PLAIN, PLAIN.but(sequence=False, record=False), PLAIN.but(record=False)):
        inputs, grads = leaves_and_gradients(case)
        outcomes = []
        for in_place in (True, False):
            out = dict(zip(OUTPUTS, flat.run(*inputs, case.options), strict=True))
            if in_place:
                out[name].mul_(3).add_(1)
            else:
                out[name] = out[name] * 3 + 1
            outcomes.append(torch.autograd.grad(total(tuple(out.values()), grads), inputs[:6]))
        same(*outcomes)


@pytest.mark.parametrize("time", [1, 3])
def test_an_input_made_in_inference_mode_may_be_trained_on(time):
    """snnTorch's cell copies x with `cat`, so that a frozen encoder may run in inference mode."""
    found = []
    for mode in (False, True):
        cell = ours()
        with torch.inference_mode(mode):
            x = steps(time, 2, 2, 6, 7) * 1
        for one in (x, x[0]):
            cell(one)[2].sum().backward()
            cell.reset_mem()
        assert cell.path.native
        found.append([p.grad for p in cell.parameters()])
    same(*found)
