"""The node of a loop of step calls is a correct part of autograd's graph.

Graphs are kept, live at once, run in threads, fail, or want other gradients. Weights change
meanwhile, and hooks see gradients.
"""

import gc
import itertools
import weakref

import pytest
import torch
from cpu_kernels import native
from helpers import close, in_threads, same
from loops import assert_same, both, cells, events, gradients, loss_of, unroll, zeros

from snnlstm.native import autograd, loop

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")


def test_gradients_of_x_alone_leave_nothing_behind():
    """A pass without the weight's gradient must not add anything to that of a later pass."""
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
    close(*found, atol=1e-11, rtol=1e-10)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    def work(cell):
        out = unroll(cell, events())
        loss_of(out).backward(retain_graph=True)
        loss_of(out[:3]).backward(retain_graph=True)
        loss_of(out).backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss_of(out).backward()

    both(work)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_graphs_alive_at_once(order):
    def work(cell):
        losses = [loss_of(unroll(cell, events() * (k + 1))) for k in range(3)]
        for k in order:
            losses[k].backward()

    both(work)


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


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_threshold_that_adapts_from_step_to_step(learn, through_data):
    def work(cell):
        state, loss = zeros(), 0
        for x in events():
            spk, *state = cell(x, *state)
            loss = loss + spk.sum() + state[1].square().sum()
            with torch.no_grad():
                (cell.threshold.data if through_data else cell.threshold).mul_(2)
        loss.backward()

    both(work, learn_threshold=learn)


def test_a_threshold_that_was_changed_has_no_second_derivatives():
    _, ours = cells(learn_threshold=True)
    loss = loss_of(unroll(ours, events()))
    with torch.no_grad():
        ours.threshold.mul_(1.5)
    with pytest.raises(RuntimeError, match="threshold was modified by an inplace operation"):
        torch.autograd.grad(loss, ours.threshold, create_graph=True)


def test_a_weight_whose_data_is_replaced_before_the_backward_pass():
    """The backward pass reads no memory at the old address in the old shape."""
    found = []
    for cell in cells():
        loss = loss_of(unroll(cell, events()))
        if found:  # our cell alone: torch's convolution would read the new data
            cell.conv.weight.data = torch.zeros(3)
        found += torch.autograd.grad(loss, cell.conv.bias)
    close(*found, atol=1e-11, rtol=1e-10)


def test_hooks_on_parameters_see_the_whole_gradient_once():
    seen = []
    for cell in cells():
        calls = []
        cell.conv.weight.register_hook(calls.append)
        cell.conv.weight.register_post_accumulate_grad_hook(
            lambda p, calls=calls: calls.append(p.grad)
        )
        loss_of(unroll(cell, events())).backward()
        assert len(calls) == 2
        seen.append(calls)
    close(*seen, atol=1e-11, rtol=1e-10)


def test_threads_with_graphs_of_their_own_on_one_cell():
    _, alone = both(lambda cell: loss_of(unroll(cell, events())).backward())
    _, ours = cells()

    def work(_: int) -> None:
        for _ in range(5):
            loss = loss_of(unroll(ours, events()))
            out = torch.autograd.grad(loss, [*ours.parameters()])
            close(out, gradients(alone), atol=1e-11, rtol=1e-10)

    in_threads(work)


def test_two_backward_passes_over_one_kept_graph_at_once():
    _, ours = cells()
    loss = loss_of(unroll(ours, events(20)))
    wanted = [ours.conv.weight, ours.conv.bias]
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)

    def work(_: int) -> None:
        for _ in range(5):
            same(torch.autograd.grad(loss, wanted, retain_graph=True), expected)

    in_threads(work, 3)


def test_a_pass_that_fails_leaves_nothing_to_the_next():
    def work(cell):
        first = events().requires_grad_().clone()
        first.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(unroll(cell, first)).backward()
        cell.zero_grad()
        loss_of(unroll(cell, events())).backward()

    both(work)


def test_a_loop_lives_no_longer_than_its_graph():
    _, ours = cells()
    out = unroll(ours, events())
    node = weakref.ref(loop._loops[id(ours.conv.weight)])
    assert node() is not None
    del out
    ours.reset_mem()
    ours.spk = None
    ours._drop_caches()  # the cached reset signal of the last step holds its graph
    gc.collect()
    assert node() is None
    assert id(ours.conv.weight) not in loop._loops


def test_the_graph_of_a_step_is_asked_for_in_a_way_that_this_torch_has():
    assert callable(autograd._will_run)
    assert callable(loop._pass_number)
