"""When the backend must not merge: a test fails for each rule that is left out.

The loops are small, of dyadic numbers, and compared by bits. The numbers of calls tell what was
merged; `T` calls of a layer are its loop.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from snntorch import utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import snnlstm
from snnlstm.loops import steps as loop_steps
from tests.loops.compiled import BACKEND, Calls, as_eager, dyadic_, merges, numbers, outcome
from tests.loops.networks import Scale, cell, exact_leaky
from tests.shared.helpers import close, in_processes

T, N = 4, 3
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


class Parts(nn.Module):
    """Has the layers that the loops below call; x is (T, N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.back = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.lif1, self.lif2, self.hidden = (
            exact_leaky(), exact_leaky(threshold=0.375), exact_leaky(init_hidden=True),
        )  # fmt: skip
        self.drop = nn.Dropout(0.5)
        self.bn = nn.BatchNorm1d(6)


def looped(
    forward: Callable[..., Any], prepare: Callable[[Any], object] = lambda net: None
) -> Callable[[], nn.Module]:
    """Returns a function that makes a network of Parts with this forward."""

    def make() -> nn.Module:
        net = type("Net", (Parts,), {"forward": forward})()
        snnlstm.accelerate(dyadic_(net))
        prepare(net)
        return net

    return make


def check(
    forward: Callable[..., Any], training: bool = True, prepare: Any = lambda net: None, **options
) -> Calls:
    """Compares a loop over (T, N, 6) with eager's, and returns its calls."""
    return as_eager(looped(forward, prepare), numbers(T, N, 6), training=training, **options)


def expect(calls: Calls, **expected: int) -> None:
    """Asserts the numbers of calls, if our backend made them."""
    if BACKEND == "snnlstm":
        assert {name: calls[name] for name in expected} == expected


# ---- dependence ----------------------------------------------------------------------------------


def feedback(net: Any, x: Tensor) -> Any:
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    spk2, out = torch.zeros(N, 6), []
    for x_t in x:
        spk1, mem1 = net.lif1(net.fc1(x_t) + net.back(spk2), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return torch.stack(out)


@MODES
def test_feedback_from_a_later_layer_stays_a_loop(training):
    """Merging without asking for dependence makes a graph with a cycle."""
    expect(check(feedback, training), leaky=2 * T, linear=1 + 2 * T)


def test_a_layer_that_reads_its_own_result_stays_a_loop():
    """The chain of states does not excuse an x that is the last spk or mem."""

    def forward(net, x):
        mem = net.lif1.reset_mem()
        spk = x[0]
        for _ in range(T):
            spk, mem = net.lif1(spk, mem)
        other = net.lif2.reset_mem()
        for x_t in x:
            _, other = net.lif2(x_t + other, other)
        return spk, other

    # The first other is (0,) and has no sum with x: it is zeros of x's shape here.
    def of_shape(net, x):
        net.lif2.reset_mem = functools.partial(torch.zeros, N, 6)
        return forward(net, x)

    expect(check(of_shape), leaky=2 * T)


def test_feedback_into_one_step_cuts_a_run_in_two():
    """Only the steps behind the one that needs a result wait for it."""

    def forward(net, x):
        mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
        out, early = [], None
        for t in range(T):
            cur = net.fc1(x[t])
            spk1, mem1 = net.lif1(cur if t != 2 else cur + early, mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            early = spk2 if t == 1 else early
            out.append(spk2)
        return torch.stack(out)

    expect(check(forward), leaky=4, linear=3)


def test_two_groups_that_each_could_merge_but_not_both():
    """Each layer reads the other's last result: merging one group, then the other, is a cycle."""

    def forward(net, x):
        one, other, out = torch.zeros(N, 6), torch.zeros(N, 6), []
        for x_t in x:
            one, other = net.fc1(other + x_t), net.fc2(one)
            out.append(one + other)
        return torch.stack(out)

    expect(check(forward), linear=2 * T)


def test_early_results_that_a_later_step_reads():
    """A skip connection over time depends on the run, and not the run on it."""

    def forward(net, x):
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        spikes = []
        for x_t in x:
            spk1, mem1 = net.lif1(net.fc1(x_t), mem1)
            spikes.append(spk1)
            spk2, mem2 = net.lif2(net.fc2(spikes[max(0, len(spikes) - 3)]), mem2)
            out.append(spk2)
        return torch.stack(out), spikes[0] * 2

    expect(check(forward), leaky=2)


@merges
def test_the_search_for_dependence_grows_with_the_graph_and_not_with_its_square():
    """Counts Python calls within the backend for loops of T and 4T steps."""

    def counted(time: int) -> int:
        def forward(net, x):
            spk, out = x[0], []
            for x_t in x:
                cur = net.fc1(x_t)
                spk = net.fc2(spk) + cur
                out.append(torch.relu(cur))
            return torch.stack(out), spk

        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        def backend(graph: Any, inputs: Any) -> Any:
            sys.setprofile(count)
            try:
                return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)
            finally:
                sys.setprofile(None)

        torch._dynamo.reset()
        net = looped(forward)()
        torch.compile(net, backend=backend, fullgraph=True)(numbers(time, N, 6))
        return calls

    few, many = counted(16), counted(64)
    assert many < 6 * few


# ---- chains --------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("change", ["reset_mem", "zeros", "halved", "by a layer", "stored"])
def test_a_state_that_is_reset_or_changed_ends_a_run(change, training):
    """Chains are those of the recorded states: no other tensor in a state's place is one."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        net.hidden.reset_mem()
        for t in range(T):
            if t == 2:
                if change == "reset_mem":
                    mem = net.lif1.reset_mem()
                elif change == "zeros":
                    mem = torch.zeros_like(mem)
                elif change == "halved":
                    mem = mem * 0.5
                elif change == "by a layer":
                    mem = net.back(mem)
                else:
                    net.hidden.mem = net.hidden.mem * 0.5
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            out.append(net.hidden(spk))
        return torch.stack(out)

    hidden, passed = (2, 1) if change == "stored" else (1, 2)
    expect(check(forward, training), leaky=hidden + passed)


def test_the_states_of_two_chains_of_one_layer_are_not_mixed():
    """The steps of one layer belong to the chain of their states, not to that of the layer."""

    def forward(net, x):
        one, other, out = net.lif1.reset_mem(), net.lif1.reset_mem(), []
        for t in range(T):
            cur = net.fc1(x[t])
            spk, one = net.lif1(cur, one)
            out.append(spk)
            if t == 1:
                one, other = other, one
            spk, other = net.lif1(cur * 0.5, other)
            out.append(spk)
        return torch.stack(out), one, other

    check(forward)


def test_a_state_that_two_steps_start_from():
    """A tree of steps is no chain."""

    def forward(net, x):
        mem = net.lif1.reset_mem()
        spk, mem = net.lif1(x[0], mem)
        left, one = net.lif1(x[1], mem)
        right, other = net.lif1(x[2], mem)
        return spk, left, right, net.lif1(x[3], one)[1], other

    check(forward)


@pytest.mark.parametrize(("training", "runs"), [(True, 2), (False, 1)])
def test_a_detach_ends_a_run_only_where_gradients_are_recorded(training, runs):
    """The gradient stops there; without gradients a detach is nothing."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            mem = mem.detach() if t == 1 else mem
            out.append(mem)
        return torch.stack(out)

    expect(check(forward, training), leaky=runs)


@MODES
@pytest.mark.parametrize("reset", ["none", "subtract", "zero"])
def test_detaches_of_the_operator_itself_do_not_end_a_run(reset, training):
    """Without gradients, and with x of spikes alone, it detaches states between the steps."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(2, 3, 3, reset_mechanism=reset)

        def forward(self, x):
            syn, mem = self.cell.reset_mem()
            out = []
            for x_t in x:
                spk, syn, mem = self.cell(x_t, syn, mem)
                out.append(spk)
            return torch.stack(out), syn, mem

    def make():
        net = Net().double()
        snnlstm.accelerate(net)
        return net

    x = numbers(T, N, 2, 5, 5, dtype=torch.float64)
    calls = as_eager(make, x, training=training, atol=1e-10, rtol=1e-10)
    expect(calls, cell=1)


def test_layers_of_other_parameters_or_settings_are_not_one():
    """Two layers that share a weight, or one whose options change, have chains of their own."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            layer = net.lif1 if t < 2 else net.lif2
            spk, mem = layer(net.fc1(x[t]), mem)
            out.append(spk)
        return torch.stack(out), mem

    expect(check(forward), leaky=2, linear=1)


def test_numbers_that_differ_from_step_to_step():
    """A call that has another number in each step is another call."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t]) * (t + 1) + x[t].sum(t % 2, keepdim=True), mem)
            out.append(torch.clamp(spk, max=t / 4))
        return torch.stack(out)

    check(forward)


def test_steps_of_other_shapes():
    """A Leaky starts from zeros where x has another shape than its mem."""

    def forward(net, x):
        out = []
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t][: 2 if t < 2 else N]))
            out += [spk, mem]
        return out

    expect(check(forward), linear=2, leaky=2)


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


# ---- memory --------------------------------------------------------------------------------------


@merges
@pytest.mark.parametrize("steps_at_once", [1, 2, 3, T])
def test_without_gradients_steps_are_computed_in_pieces(monkeypatch, steps_at_once):
    """All of their parameters want gradients, but no_grad records none."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out)

    monkeypatch.setattr(loop_steps, "PIECE", steps_at_once * N * 6 * 4)
    pieces = -(-T // steps_at_once)
    expect(check(forward, training=False), leaky=pieces, linear=pieces)
    expect(check(forward, training=True), leaky=1, linear=1)


# ---- once ----------------------------------------------------------------------------------------


@merges
@MODES
def test_a_call_with_the_same_inputs_is_computed_once(training):
    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for _ in range(T):
            spk, mem = net.lif1(net.fc2(torch.relu(net.fc1(x[0]))), mem)
            out.append(spk)
        return torch.stack(out)

    calls = check(forward, training)
    assert {kind: calls[kind] for kind in ("linear", "relu", "leaky")} == {
        "linear": 2, "relu": 1, "leaky": 1,
    }  # fmt: skip


@MODES
def test_random_calls_with_the_same_inputs_are_drawn_anew(training):
    """A dropout, or torch.rand, is not pure."""

    def forward(net, x):
        out = [net.drop(net.fc1(x[0])) for _ in range(T)]
        return torch.stack([*out, *(torch.rand_like(x[0]) for _ in range(T)), torch.rand(N, 6)])

    calls = check(forward, training)
    expect(calls, linear=1, dropout=T, rand_like=T)


# ---- random numbers ------------------------------------------------------------------------------


def test_a_layers_random_numbers_are_drawn_step_by_step():
    """One mask for all steps, or one for a batch of all steps, has other numbers."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.drop(net.fc1(x_t)), mem)
            out.append(spk)
        return torch.stack(out)

    expect(check(forward), dropout=T, linear=1, leaky=1)
    expect(check(forward, prepare=nn.Module.eval), linear=1, leaky=1)


# ---- regions -------------------------------------------------------------------------------------


def without_gradients(net: Any, x: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for x_t in x:
        with torch.no_grad():
            spk1, mem1 = net.lif1(net.fc1(x_t), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return torch.stack(out)


def test_nothing_moves_across_a_region_of_grad_mode():
    """fc1 has no gradient: its calls stay within no_grad."""
    check(without_gradients)


def test_set_grad_enabled_in_one_step_alone():
    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for t in range(T):
            torch.set_grad_enabled(t != 1)
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            out.append(mem)
        return torch.stack(out)

    check(forward)


def test_enable_grad_within_no_grad():
    def forward(net, x):
        out = []
        with torch.no_grad():
            for x_t in x:
                with torch.enable_grad():
                    out.append(net.fc1(x_t))
        return torch.stack(out)

    check(forward)


@MODES
def test_nothing_moves_across_a_region_of_autocast(training):
    """fc1 multiplies in bfloat16, fc2 in float32: 1/512 is lost in one and not in the other."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            with torch.autocast("cpu", torch.bfloat16):
                cur = net.fc1(x_t + 1 / 512)
            spk, mem = net.lif1(cur.float(), mem)
            out.append(net.fc2(spk + 1 / 512))
        return torch.stack(out)

    check(forward, training)


def test_custom_autograd_functions_are_barriers():
    """Their backward is the user's, and merged calls would not run it."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(Scale.apply(net.fc1(x_t)), mem)
            out.append(spk)
        return torch.stack(out)

    check(forward)


def test_checkpointed_steps_are_barriers():
    """A higher-order operator has graphs of its own."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            cur = torch.utils.checkpoint.checkpoint(net.fc1, x_t, use_reentrant=False)
            spk, mem = net.lif1(cur, mem)
            out.append(spk)
        return torch.stack(out)

    check(forward)


def test_asserts_stay_where_they_are():
    def forward(net, x):
        out = []
        for x_t in x:
            torch._assert_async((x_t >= -1).all())
            out.append(net.fc1(x_t))
        return torch.stack(out)

    check(forward)


# ---- what mixes samples --------------------------------------------------------------------------

# Functions of a step (N, 6).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax(1)": lambda x: x.softmax(1),
    "softmax(0)": lambda x: x.softmax(0),
    "softmax(-2)": lambda x: F.softmax(x, dim=-2),
    "mean(0)": lambda x: x.mean(0),
    "mean": lambda x: x.mean(),
    "sum(0)": lambda x: x.sum(0, keepdim=True) + x,
    "max": lambda x: x.max(0).values,
    "max of all": lambda x: x * x.max(),
    "min of all": lambda x: x - torch.min(x),
    "max of a number": lambda x: x * x.mean().max(),
    "maximum by max": lambda x: torch.max(x, x.mean(0)),
    "sort": lambda x: x.sort(0)[0],
    "cumsum": lambda x: x.cumsum(0),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "squeeze": lambda x: x[:1].squeeze(),
    "transpose": lambda x: x.t() @ x,
    "flatten(0)": lambda x: x.flatten(),
    "flatten(1)": lambda x: x.view(N, 2, 3).flatten(1),
    "view": lambda x: x.view(x.shape[0], -1),
    "view of other rows": lambda x: x.reshape(-1, 3),
    "view of all": lambda x: x.reshape(2, 9),
    "unsqueeze(0)": lambda x: x.unsqueeze(0),
    "a row": lambda x: x[0],
    "columns": lambda x: x[:, 1:4],
    "cat(0)": lambda x: torch.cat([x, x]),
    "cat(1)": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "a row for all": lambda x: x + x[0],
    "one for each sample": lambda x: x + torch.arange(N)[:, None] / 4,
    "one for each number": lambda x: x * torch.arange(6) / 4,
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm of all": lambda x: F.layer_norm(x, (N, 6)),
    "unbatched convolution": lambda x: F.conv1d(x, torch.ones(2, N, 3) / 4),
    "unbatched pool": lambda x: F.max_pool1d(x, 2),
    "group_norm": lambda x: F.group_norm(x, 3),
    "normalize(0)": lambda x: F.normalize(x, dim=0),
    "einsum": lambda x: torch.einsum("ni,mi->nm", x, x),
    "cdist": lambda x: torch.cdist(x, x),
    "batch_norm of its own": lambda x: F.batch_norm(x, None, None, training=True),
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, False),
    "where": lambda x: torch.where(x > 0, x, x.mean(0)),
    "alpha": lambda x: torch.add(x, x.sum(1, keepdim=True), alpha=2),
    "a number in float64": lambda x: x * x.mean().double(),
    "a vector in float64": lambda x: x * x.mean(0).double(),
    "integers": lambda x: (x * 4).long() // 3,
    "type_as": lambda x: (x > 0).type_as(x),
    "column": lambda x: x[:, 0],
    "last": lambda x: x[..., -1:],
    "None": lambda x: x[None],
    "expand": lambda x: x[:1].expand(N, 6) + 1,
    "repeat": lambda x: x.repeat(2, 1),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "split": lambda x: x.split([1, 2])[1],
    "permute": lambda x: x.permute(1, 0),
    "pad": lambda x: F.pad(x, (1, 0)),
    "pad of samples": lambda x: F.pad(x, (0, 0, 1, 0)),
    "circular pad": lambda x: F.pad(x[None], (1, 2), mode="circular"),
    "cat(-1)": lambda x: torch.cat([x, x[:, :2]], -1),
    "cat(-2)": lambda x: torch.cat([x, torch.ones(1, 6)], dim=-2),
    "cat by name": lambda x: torch.cat(tensors=[x, x], dim=1),
    "cat with an empty tensor": lambda x: torch.cat([torch.ones(0), x]),
    "stack by name": lambda x: torch.stack(tensors=[x, x]),
    "channels_last": lambda x: x.view(N, 1, 2, 3).to(memory_format=torch.channels_last) + 1,
    "a number by reshape": lambda x: x.mean().reshape(()),
    "cat with the same": lambda x: torch.cat([torch.ones(N, 2), x], dim=1),
    "stack(1)": lambda x: torch.stack([x, x * 2], dim=1),
    "another weight in each step": lambda x: F.linear(x, x),
    "another bias in each step": lambda x: F.linear(x, torch.eye(6), x[0]),
    "one image for each sample": lambda x: F.max_pool2d(x.view(N, 1, 2, 3), (1, 2)).flatten(1),
    "max_pool with indices": lambda x: F.max_pool1d(x[None], 2, return_indices=True)[1],
    "gather": lambda x: x.gather(0, torch.zeros(N, 6, dtype=torch.long)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_mixes_samples_stays_in_steps(name):
    """A function that is folded although it mixes samples has other results."""
    function = FUNCTIONS[name]

    def forward(net, x):
        return torch.stack([function(net.fc1(x_t)) for x_t in x])

    check(forward, training=False, atol=1e-6, rtol=1e-6)


# ---- what a layer may be -------------------------------------------------------------------------


@MODES
def test_hooks_see_each_step(training):
    """torch.compile traces hooks: what they read and change is part of the graph."""

    def prepare(net):
        net.lif1.register_forward_hook(lambda layer, args, out: (out[0] * 2, out[1]))
        net.fc1.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out)

    expect(check(forward, training, prepare), leaky=1, linear=1)


class Cells(nn.Module):
    """Has a cell and calls it on two sequences of (T, N, 2, 5, 5), one after the other."""

    def __init__(self, lengths: bool = False, **options: Any) -> None:
        super().__init__()
        self.cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.05, **options)
        self.lengths = torch.tensor([4, 1, 3]) if lengths else None

    def forward(self, x: Tensor) -> Any:
        state, out = self.cell.reset_mem(), []
        for part in (x, x * 0.5):
            spk, *state = self.cell(part, *state, lengths=self.lengths)
            out.append(spk)
        return torch.stack(out), state


@MODES
@pytest.mark.parametrize("options", [{"lengths": True}, {"checkpoint": True}, {}], ids=str)
def test_calls_of_sequences_are_left_as_they_are(options, training):
    """Sequences are not stacked once more, and `lengths` are those of each.

    In training, checkpoint=True cuts them into segments, which here are steps.
    """

    def make():
        return Cells(**options).double()

    x = numbers(T, N, 2, 5, 5, dtype=torch.float64)
    cut = training and "checkpoint" in options
    expect(as_eager(make, x, training=training, atol=1e-10, rtol=1e-10), cell=2 * T if cut else 2)


@MODES
def test_checkpointed_cells_and_those_with_all_options(training):
    """In training each step is an operator of a higher order, and such stay where they are."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = snnlstm.SConv2dLSTM(
                2, 3, 3, threshold=torch.full((3, 1, 1), 0.05), checkpoint=True, stride=2,
                dilation=2, learn_threshold=True, reset_mechanism="zero", inhibition=True,
                init_hidden=True, output=True,
            )  # fmt: skip

        def forward(self, x):
            return [self.cell(x_t) for x_t in x]

    x = numbers(T, N, 2, 6, 6, dtype=torch.float64)
    calls = as_eager(lambda: Net().double(), x, training=training, atol=1e-10, rtol=1e-10)
    expect(calls, cell=T if training else 1)


def test_large_convolutions_are_not_stacked():
    """One step is larger than LARGEST: folded steps would be slower."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3, padding=1)

        def forward(self, x):
            return torch.stack([self.conv(x_t) for x_t in x])

    calls = as_eager(Net, numbers(T, N, 2, 48, 48), training=False, atol=1e-5, rtol=1e-5)
    expect(calls, conv=T)


# ---- calls of the compiled network ---------------------------------------------------------------


def plain(net: Any, x: Tensor) -> Any:
    """Is a loop of two layers, whose states are stored."""
    out = []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t))
        out.append(net.hidden(net.fc2(spk)))
    return torch.stack(out), mem


def test_states_go_on_across_calls():
    """The stored state is an input of the second call's graph, and a constant of neither."""
    check(plain, training=False, times=3)


@MODES
def test_a_loop_outside_of_the_module_with_utils_reset(training):
    """A compiled function has the loop, the reset and the loss."""

    def train_step(net, x):
        utils.reset(net)
        out = []
        for x_t in x:
            spk, _ = net.lif1(net.fc1(x_t))
            out.append(net.hidden(net.fc2(spk)))
        return torch.stack(out).mean(0).square().sum()

    x = numbers(T, N, 6)
    calls = as_eager(looped(plain), x, training=training, run=train_step, atol=1e-6, rtol=1e-6)
    expect(calls, leaky=2, linear=2)


def without_numbers(net: Any) -> None:
    """Gives Leaky a surrogate without numbers; dynamo makes symbols of them, and fails at one."""
    for layer in (net.lif1, net.lif2, net.hidden):
        layer.spike_grad = snnlstm.surrogate.straight_through_estimator()


def test_batch_sizes_that_change():
    """Sizes are symbols here, and states are of the last batch's size."""
    make, calls = looped(plain, without_numbers), Calls()
    net, eager = make(), make()
    with calls.counted() as backend:
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
        for batch in (3, 5, 2, 7):
            x = numbers(T, batch, 6)
            for layer in (net.lif1, net.hidden, eager.lif1, eager.hidden):
                layer.reset_mem()
            close(compiled(x), eager(x), atol=0, rtol=0)
    expect(calls, leaky=8, linear=8)


@MODES
@pytest.mark.parametrize("dynamic", [None, True], ids=["number", "symbol"])
def test_a_view_that_holds_the_batch_size(dynamic, training):
    """view(N, -1) has N as a number, or as a symbol with dynamic shapes."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            size = x_t.shape[0]
            cur = net.fc1(x_t.view(size, 2, 3).flatten(1))
            spk, mem = net.lif1(cur.view(size, -1), mem)
            out.append(spk.reshape(len(x_t), 2, 3))
        return torch.stack(out)

    expect(check(forward, training, without_numbers, dynamic=dynamic), leaky=1, linear=1)


def test_numbers_of_steps_that_change():
    """Each T has a graph of its own, and then dynamo's limit runs the loop eagerly."""
    net, eager, calls = looped(plain)(), looped(plain)(), Calls()
    with calls.counted() as backend, torch._dynamo.config.patch(recompile_limit=2):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend)
        for time in (4, 3, 5, 4):
            x = numbers(time, N, 6)
            for layer in (net.lif1, net.hidden, eager.lif1, eager.hidden):
                layer.reset_mem()
            close(compiled(x), eager(x), atol=0, rtol=0)
    assert calls.graphs >= 2


def test_the_small_graph_goes_on_to_another_backend():
    """options={"inner": name} compiles what is left; aot_eager has a backward graph of its own."""
    if BACKEND != "snnlstm":
        pytest.skip("only our backend has options")
    options = {"options": {"inner": "aot_eager"}}
    as_eager(looped(plain), numbers(T, N, 6), **options)
    as_eager(looped(plain), numbers(T, N, 6), training=False, **options)


def test_no_gradient_is_formed_that_nobody_wants():
    """Frozen layers stay frozen: merged calls have the gradients of the loop, and no others."""

    def prepare(net):
        net.fc1.requires_grad_(False)

    check(plain, prepare=prepare)
    found = outcome(looped(plain, prepare), numbers(T, N, 6), training=True, compiled=True)
    assert found.results["gradient of fc1.weight"] is None


# ---- several processes ---------------------------------------------------------------------------


def _averaged(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", world_size=world, rank=rank)
    x = numbers(T, 2 * world, 6)

    def prepare(net):  # DistributedDataParallel waits for the gradient of each parameter
        net.back.requires_grad_(False)
        net.bn.requires_grad_(False)

    net, alone = looped(plain, prepare)(), looped(plain, prepare)()
    compiled = DistributedDataParallel(torch.compile(net, backend=BACKEND))
    compiled(x[:, 2 * rank : 2 * rank + 2])[0].mean().backward()
    alone(x)[0].mean().backward()
    for one, other in zip(net.parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        close([one.grad], [other.grad], atol=1e-6)
    os._exit(0)


def test_distributed_data_parallel_of_a_compiled_network(tmp_path):
    in_processes(_averaged, 2, str(tmp_path / "store"), count=2)
