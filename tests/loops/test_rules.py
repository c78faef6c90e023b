"""When calls of a loop may become one: a test fails for each rule that is left out.

The loops are small, of dyadic numbers, and compared by bits. The numbers of calls tell what was
merged; `T` calls of a layer are its loop.
"""

import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnlstm
from snnlstm.networks import layers as sizes
from tests.loops.compiled import BACKEND, as_eager, merges, numbers
from tests.loops.networks import Scale, cell
from tests.loops.parts import MODES, N, T, check, expect, loop_test, looped

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


@loop_test(leaky=4, linear=3)
def test_feedback_into_one_step_cuts_a_run_in_two(net, x):
    """Only the steps behind the one that needs a result wait for it."""
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    out, early = [], None
    for t in range(T):
        cur = net.fc1(x[t])
        spk1, mem1 = net.lif1(cur if t != 2 else cur + early, mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        early = spk2 if t == 1 else early
        out.append(spk2)
    return torch.stack(out)


@loop_test(linear=2 * T)
def test_two_groups_that_each_could_merge_but_not_both(net, x):
    """Each layer reads the other's last result: merging one group, then the other, is a cycle."""
    one, other, out = torch.zeros(N, 6), torch.zeros(N, 6), []
    for x_t in x:
        one, other = net.fc1(other + x_t), net.fc2(one)
        out.append(one + other)
    return torch.stack(out)


@loop_test(leaky=2)
def test_early_results_that_a_later_step_reads(net, x):
    """A skip connection over time depends on the run, and not the run on it."""
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    spikes = []
    for x_t in x:
        spk1, mem1 = net.lif1(net.fc1(x_t), mem1)
        spikes.append(spk1)
        spk2, mem2 = net.lif2(net.fc2(spikes[max(0, len(spikes) - 3)]), mem2)
        out.append(spk2)
    return torch.stack(out), spikes[0] * 2


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
    """Chains are those of the recorded states: no other tensor in a state's place is one.

    A layer behind two runs gets the results of both as they are, and not step by step.
    """

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
    expect(check(forward, training), leaky=hidden + passed, cat=passed - 1)


@loop_test(leaky=3, mul=2)
def test_changes_of_a_state_depend_on_each_other(net, x):
    """The second one needs the first one by way of two steps, of which one hands on its state."""
    mem, out = net.lif1.reset_mem(), []
    for t in range(T):
        mem = mem * 0.5 if t % 2 else mem
        spk, mem = net.lif1(net.fc1(x[t]), mem)
        out.append(spk)
    return torch.stack(out), mem


@loop_test()
def test_the_states_of_two_chains_of_one_layer_are_not_mixed(net, x):
    """The steps of one layer belong to the chain of their states, not to that of the layer."""
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


@loop_test()
def test_a_state_that_two_steps_start_from(net, x):
    """A tree of steps is no chain."""
    mem = net.lif1.reset_mem()
    spk, mem = net.lif1(x[0], mem)
    left, one = net.lif1(x[1], mem)
    right, other = net.lif1(x[2], mem)
    return spk, left, right, net.lif1(x[3], one)[1], other


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


@loop_test(leaky=2, linear=1)
def test_layers_of_other_parameters_or_settings_are_not_one(net, x):
    """Two layers that share a weight, or one whose options change, have chains of their own."""
    mem, out = net.lif1.reset_mem(), []
    for t in range(T):
        layer = net.lif1 if t < 2 else net.lif2
        spk, mem = layer(net.fc1(x[t]), mem)
        out.append(spk)
    return torch.stack(out), mem


@loop_test()
def test_numbers_that_differ_from_step_to_step(net, x):
    """A call that has another number in each step is another call."""
    mem, out = net.lif1.reset_mem(), []
    for t in range(T):
        spk, mem = net.lif1(net.fc1(x[t]) * (t + 1) + x[t].sum(t % 2, keepdim=True), mem)
        out.append(torch.clamp(spk, max=t / 4))
    return torch.stack(out)


@loop_test(linear=2, leaky=2)
def test_steps_of_other_shapes(net, x):
    """A Leaky starts from zeros where x has another shape than its mem."""
    out = []
    for t in range(T):
        spk, mem = net.lif1(net.fc1(x[t][: 2 if t < 2 else N]))
        out += [spk, mem]
    return out


@loop_test("inference", linear=1, leaky=1, unbind=0)
def test_zeros_like_a_step_do_not_take_its_sequence_apart(net, x):
    """They read a dtype and a device alone."""
    mem, out = None, []
    for x_t in x:
        cur = net.fc1(x_t)
        mem = cur.new_zeros(N, 6) if mem is None else mem
        spk, mem = net.lif1(cur, mem)
        out.append(spk)
    return torch.stack(out)


# ---- memory --------------------------------------------------------------------------------------


@merges
@pytest.mark.parametrize("steps_at_once", [1, 2, 3, T])
def test_without_gradients_steps_are_computed_in_pieces(monkeypatch, steps_at_once):
    """All parameters want gradients, but no_grad records none; with them, relu has large steps."""

    def forward(net, x):
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t).relu(), mem)
            out.append(spk)
        return torch.stack(out)

    monkeypatch.setattr(sizes, "_SMALL", 0)
    monkeypatch.setattr(sizes, "_LARGEST_SEQUENCE", steps_at_once * N * 6 * 4)
    pieces = -(-T // steps_at_once)
    expect(check(forward, training=False), leaky=pieces, linear=pieces, relu=pieces)
    expect(check(forward, training=True), leaky=1, linear=1, relu=1 if pieces == 1 else T)


def test_views_take_no_memory_and_have_all_steps(monkeypatch):
    """relu, whose steps are as large, runs step by step."""

    def forward(net, x):
        return torch.stack([net.fc1(x_t.reshape(-1, 2, 3).flatten(1).relu()) for x_t in x])

    monkeypatch.setattr(sizes, "_SMALL", 0)
    monkeypatch.setattr(sizes, "_LARGEST_SEQUENCE", 0)
    expect(check(forward, training=True), reshape=1, flatten=1, relu=T)


# ---- regions -------------------------------------------------------------------------------------


@loop_test()
def test_nothing_moves_across_a_region_of_grad_mode(net, x):
    """fc1 has no gradient: its calls stay within no_grad."""
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for x_t in x:
        with torch.no_grad():
            spk1, mem1 = net.lif1(net.fc1(x_t), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return torch.stack(out)


@loop_test("training", "inference")
def test_nothing_moves_across_a_region_of_autocast(net, x):
    """fc1 multiplies in bfloat16, fc2 in float32: 1/512 is lost in one and not in the other."""
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        with torch.autocast("cpu", torch.bfloat16):
            cur = net.fc1(x_t + 1 / 512)
        spk, mem = net.lif1(cur.float(), mem)
        out.append(net.fc2(spk + 1 / 512))
    return torch.stack(out)


@loop_test(linear=1 + T, leaky=1)
def test_custom_autograd_functions_are_called_step_by_step(net, x):
    """A layer before them gets all steps, and so does a Leaky behind; a Linear behind does not."""
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.fc2(Scale.apply(net.fc1(x_t))), mem)
        out.append(spk)
    return torch.stack(out)


@loop_test()
def test_checkpointed_steps_are_barriers(net, x):
    """A higher-order operator has graphs of its own."""
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        cur = torch.utils.checkpoint.checkpoint(net.fc1, x_t, use_reentrant=False)
        spk, mem = net.lif1(cur, mem)
        out.append(spk)
    return torch.stack(out)


@loop_test()
def test_asserts_stay_where_they_are(net, x):
    out = []
    for x_t in x:
        torch._assert_async((x_t >= -1).all())
        out.append(net.fc1(x_t))
    return torch.stack(out)
