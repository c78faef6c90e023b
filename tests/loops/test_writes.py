"""Compiled loops keep the order of what writes to memory, and return tensors of their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.loops.compiled import BACKEND, Calls, merges, numbers
from tests.loops.parts import MODES, N, T, check, expect, looped

# ---- writing in place ----------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("how", ["+=", "add_", "from zeros", "index", "two sums"])
def test_sums_in_place_do_not_hinder_merging(how, training):
    """An accumulator is read and written by the loop alone: layers do not wait for it."""

    def forward(net, x):
        mem, total = net.lif1.reset_mem(), torch.zeros(N, 6)
        counts = torch.zeros(T, N, 6)
        if how == "+=":
            total = 0
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            if how == "add_":
                total.add_(spk)
            elif how == "index":
                counts[t] = spk
                total[:, 1:] += spk[:, 1:]
            elif how == "two sums":
                total += spk
                counts[0] += total
            else:
                total += spk
        return total, counts

    expect(check(forward, training), leaky=1, linear=1)


def written(how: str, late: bool) -> Callable[..., Any]:
    """Returns a loop that writes into the result of fc1, before lif1 reads it or `late`, after."""

    def write(cur: Tensor) -> None:
        if how == "iadd":
            cur += 1
        elif how == "method":
            cur.mul_(0.5)
        elif how == "relu":
            F.relu(cur, inplace=True)
        elif how == "slice":
            cur[1] = 0.25
        elif how == "view":
            cur.view(-1)[:5].add_(1)
        elif how == "out":
            torch.add(cur, cur, out=cur)
        elif how == "unbound":
            cur.unbind(0)[0].zero_()
        elif how == "foreach":
            torch._foreach_add_([cur], 1.0)

    def forward(net: Any, x: Tensor) -> Any:
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            cur = net.fc1(x[t])
            if not late:
                write(cur)
            spk, mem = net.lif1(cur, mem)
            if late:
                write(cur)
            out.append(spk)
            out.append(cur)
        return torch.stack(out), mem

    return forward


WAYS = ["iadd", "method", "relu", "slice", "view", "out", "unbound", "foreach"]


@pytest.mark.parametrize("late", [False, True], ids=["before it is read", "after"])
@pytest.mark.parametrize("how", WAYS)
def test_writing_into_a_result_keeps_its_order(how, late):
    """What is written is read before or after, as recorded: also by way of a view."""
    check(written(how, late), training=False)


@pytest.mark.parametrize("how", ["iadd", "method", "relu", "slice", "view"])
def test_writing_into_a_result_with_gradients(how):
    check(written(how, late=False), training=True)


@pytest.mark.parametrize("how", WAYS)
def test_results_that_are_written_are_not_shared(how):
    """fc1(x) is the same in all steps until one of them writes into it."""
    inner = written(how, late=True)
    check(lambda net, x: inner(net, x[:1].expand(T, N, 6)), training=False)


def test_an_equal_call_behind_a_write_is_another():
    """What is written between two equal calls makes them differ."""

    def forward(net, x):
        y, out = x[0] * 1, []
        for _ in range(T):
            out.append(net.fc1(y))
            y += 1
        return torch.stack(out)

    check(forward, training=False)


def test_an_input_and_a_parameter_that_are_written():
    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
            x += 0.5
            net.fc1.bias += 0.25
        return torch.stack(out), mem

    check(forward, training=False)


def test_a_state_that_is_written():
    """The next step starts from what was written, and the layer stores it."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            if t == 1:
                mem.mul_(0.5)
            out.append(spk)
        return torch.stack(out), mem

    check(forward, training=False)


@MODES
def test_batch_norm_writes_its_buffers_without_saying_so(training):
    """Each step reads the statistics behind Leaky; the next one writes them in front of it."""

    def forward(net, x):
        mean, var = net.bn.running_mean, net.bn.running_var
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            cur = F.batch_norm(net.fc1(x[t]), mean, var, None, None, True, 0.5)
            spk, mem = net.lif1(cur, mem)
            out.append(F.batch_norm(spk, mean, var, None, None, False) + mean)
        return torch.stack(out)

    calls = check(forward, training, atol=1e-5, rtol=1e-5)
    expect(calls, linear=1, leaky=T, batch_norm=2 * T)


def test_batch_norm_in_evaluation_folds_in_training_not():
    """A batch's own statistics are those of one step."""

    def forward(net, x):
        return torch.stack([net.bn(net.fc1(x_t)) for x_t in x])

    expect(check(forward, training=False, prepare=nn.Module.eval), linear=1, batch_norm=1)
    calls = check(forward, training=True, atol=1e-5, rtol=1e-5)
    expect(calls, linear=1, batch_norm=T)


@torch.library.custom_op("snnlstm_tests::doubled", mutates_args=("x",))
def doubled(x: Tensor) -> Tensor:
    """Is an operator that the backend does not know, which writes and returns."""
    x.mul_(2)
    return x.clone()


doubled.register_fake(lambda x: torch.empty_like(x))


def test_unknown_operators_keep_their_order():
    """What is not in the table counts as writing and reading."""

    def forward(net, x):
        y, out = x[0] * 1, []
        for _ in range(T):
            out += [net.fc1(y), doubled(y)]
        return torch.stack(out)

    expect(check(forward, training=False), linear=T)


# ---- what is returned, once the graph has run ----------------------------------------------------


def test_returned_tensors_share_no_memory_that_eager_does_not_share():
    """The caller may write into each: neither equal calls, nor a stack, nor x may be one memory."""

    def forward(net, x):
        once = [net.fc1(x[0]) for _ in range(T)]
        mem, spikes = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(x_t, mem)
            spikes.append(spk)
        return *once, torch.stack(once), *spikes, torch.stack(spikes), torch.stack(list(x))

    make, x = looped(forward), numbers(T, N, 6)
    with torch.no_grad(), Calls().counted() as backend:
        torch._dynamo.reset()
        outs = torch.compile(make(), backend=backend)(x)
        before = [out.clone() for out in (*outs, x)]
        for k, out in enumerate(outs):
            out += 1
            assert torch.equal(x, before[-1])
            for other in range(k + 1, len(outs)):
                assert torch.equal(outs[other], before[other]), (k, other)


def test_a_detached_input_is_a_tensor_of_its_own():
    @torch.compile(backend=BACKEND)
    def function(x):
        return x.detach(), x + 1

    x = numbers(N, 6)
    detached, _ = function(x)
    detached.requires_grad_()
    assert detached.data_ptr() == x.data_ptr()
    assert not x.requires_grad


def test_the_stored_state_is_the_returned_one():
    def forward(net, x):
        mem = net.lif1.reset_mem()
        for x_t in x:
            _, mem = net.lif1(x_t, mem)
        return mem

    net = looped(forward)()
    with torch.no_grad(), Calls().counted() as backend:
        torch._dynamo.reset()
        mem = torch.compile(net, backend=backend)(numbers(T, N, 6))
    assert net.lif1.mem.data_ptr() == mem.data_ptr()


@merges
@MODES
def test_a_stack_of_what_was_taken_apart_is_the_sequence_itself(training):
    """Neither the steps of x, nor the results of a run, are stacked for the next layer."""

    def forward(net, x):
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        for t in range(T):
            spk, mem1 = net.lif1(x[t], mem1)
            spk, mem2 = net.lif2(spk, mem2)
            out.append(spk)
        return torch.stack(out).sum(0)

    calls = check(forward, training)
    assert calls["leaky"] == 2
    assert calls["stack"] == calls["cat"] == 0


def test_steps_in_another_order_are_not_x_itself():
    """x[t] for all t is x only in the order of t, each once."""

    def forward(net, x):
        return (
            torch.stack([net.fc1(x[t]) for t in reversed(range(T))]),
            torch.stack([net.fc2(x[t // 2]) for t in range(T)]),
            torch.stack([net.back(x[-t]) for t in range(T)]),
            torch.stack([net.fc1(x[:, t]) for t in range(N)], dim=1),
        )

    check(forward)
