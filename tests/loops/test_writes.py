"""Compiled loops keep the order of what writes to memory, and return tensors of their own."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.loops.compiled import BACKEND, Calls, merges, numbers
from tests.loops.parts import MODES, N, T, check, expect, loop_test, looped

# ---- writing in place ----------------------------------------------------------------------------


@MODES
def test_sums_in_place_do_not_hinder_merging(training):
    """An accumulator is read and written by the loop alone: layers do not wait for it."""

    def forward(net, x):
        mem, total, parts = net.lif1.reset_mem(), 0, torch.zeros(N, 6)
        counts = torch.zeros(T, N, 6)
        for t in range(T):
            spk, mem = net.lif1(net.fc1(x[t]), mem)
            total += spk
            parts.add_(spk)
            parts[:, 1:] += spk[:, 1:]
            counts[t] = spk
            counts[0] += total
        return total, parts, counts

    expect(check(forward, training), leaky=1, linear=1)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "iadd": lambda cur: operator.iadd(cur, 1),
    "method": lambda cur: cur.mul_(0.5),
    "relu": lambda cur: F.relu(cur, inplace=True),
    "slice": lambda cur: cur.__setitem__(1, 0.25),
    "view": lambda cur: cur.view(-1)[:5].add_(1),
    "out": lambda cur: torch.add(cur, cur, out=cur),
    "unbound": lambda cur: cur.unbind(0)[0].zero_(),
    "foreach": lambda cur: torch._foreach_add_([cur], 1.0),
}
IN_TRAINING = [how for how in WRITES if how not in ("out", "unbound")]  # which autograd refuses


@pytest.mark.parametrize(
    ("how", "training"), [*((how, False) for how in WRITES), *((how, True) for how in IN_TRAINING)]
)
def test_writing_into_a_result_keeps_its_order(how, training):
    """What is written is read before or after, as recorded: also by way of a view."""

    def forward(net, x):
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        for x_t in x:
            early, late = net.fc1(x_t), net.fc2(x_t)
            WRITES[how](early)
            spk1, mem1 = net.lif1(early, mem1)
            spk2, mem2 = net.lif2(late, mem2)
            if not training:
                WRITES[how](late)
            out += [spk1, early, spk2, late]
        return torch.stack(out), mem1, mem2

    check(forward, training)


@loop_test("inference")
def test_an_equal_call_behind_a_write_is_another(net, x):
    """What is written between two equal calls makes them differ."""
    y, out = x[0] * 1, []
    for _ in range(T):
        out.append(net.fc1(y))
        y += 1
    return torch.stack(out)


@loop_test("inference")
def test_an_input_and_a_parameter_that_are_written(net, x):
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        out.append(spk)
        x += 0.5
        net.fc1.bias += 0.25
    return torch.stack(out), mem


@torch.library.custom_op("snnlstm_tests::doubled", mutates_args=("x",))
def doubled(x: Tensor) -> Tensor:
    """Is an operator that the backend does not know, which writes and returns."""
    x.mul_(2)
    return x.clone()


doubled.register_fake(lambda x: torch.empty_like(x))


@loop_test("inference", linear=T)
def test_unknown_operators_keep_their_order(net, x):
    """What is not in the table counts as writing and reading."""
    y, out = x[0] * 1, []
    for _ in range(T):
        out += [net.fc1(y), doubled(y)]
    return torch.stack(out)


# ---- what is returned, once the graph has run ----------------------------------------------------


def _equal_calls(net, x):
    once = [net.fc1(x[0]) for _ in range(T)]
    mem, spikes = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(x_t, mem)
        spikes.append(spk)
    return *once, torch.stack(once), *spikes, torch.stack(spikes), torch.stack(list(x))


def _stacked(net, x):
    steps = [net.fc1(x_t) for x_t in x]
    rec = torch.stack(steps)
    return (
        rec,
        rec[-1],
        steps[1],
        steps[1].view(-1),
        steps[2].float(),
        steps[0].detach(),
        sum(steps),
    )


def _views_without_gradients(net, x):
    steps = [net.fc1(x_t) for x_t in x]
    with torch.no_grad():
        views = [step.view(-1) for step in steps]
    return steps, views


def _first_without_gradient(net, x):
    mem, spks = net.lif1.reset_mem(), []
    for t, x_t in enumerate(x):
        spk, mem = net.lif1(net.fc1(x_t) if t else x_t.detach(), mem)
        spks.append(spk)
    return spks


def _records_of_one_run(net, x):
    mem, spks = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(x_t, mem)
        spks.append(spk)
    return torch.stack(spks), torch.stack(spks, 0), torch.stack(spks, 1), torch.stack(spks[1:])


# What is returned of x, (T, N, 6); the comparison includes strides, and who shares memory.
RELATED = {
    "equal calls, steps and their stacks": _equal_calls,
    "an equal call and a step of it": lambda net, x: (x * 2, (x * 2)[0]),
    "an equal call and a view": lambda net, x: (torch.cat(list(x)), torch.cat(list(x)).view(-1)),
    "equal sums": lambda net, x: (sum(net.fc1(t) for t in x), sum(net.fc1(t) for t in x).flatten()),
    "a record and its last step": _stacked,
    "records of one run": _records_of_one_run,
    "a state and itself detached": lambda net, x: [
        each for mem in [net.lif1(x[0])[1]] for each in (mem, mem.detach(), mem.view(-1), +mem)
    ],
    "views of x": lambda net, x: [x[0], x[0], x[1].flatten(), x[2].view(-1), x.detach(), x],
    "columns": lambda net, x: [torch.stack([x[:, t] for t in range(N)])],
    "a view of columns": lambda net, x: torch.stack([x[:, t] for t in range(N)]).view(-1),
    "columns by their strides": lambda net, x: (
        torch.stack([x[:, t] for t in range(N)]).as_strided((3, 5), (2, 7)),
        [torch.relu(x[:, t]).as_strided((4, 2), (3, 2)) for t in range(N)],
        [x[:, t].as_strided((4, 2), (3, 2)) for t in range(N)],
    ),
    "columns, unfolded and drawn": lambda net, x: [
        each for t in range(N) for y in [torch.relu(x[:, t])]
        for each in (y.unfold(0, 2, 1), torch.rand_like(y), F.dropout(y), y.view(-1), y.sum(0))
    ],
    "steps behind another layout": lambda net, x: [
        F.max_pool2d(image.unsqueeze(0), 3, 1, 1)
        for image in x[:, None].expand(T, 6, N, 6).permute(0, 2, 3, 1)
    ],
    "transposed": lambda net, x: [net.fc1(x_t).t() * 2 for x_t in x],
    "a view within no_grad": _views_without_gradients,
    "a first step without a gradient": _first_without_gradient,
}  # fmt: skip


@MODES
@pytest.mark.parametrize("name", RELATED)
def test_results_share_memory_and_have_strides_as_recorded(name, training):
    check(RELATED[name], training)


def _recorded(net, x, dim=0):
    mem, spks, mems = net.lif1.reset_mem(), [], []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        spks.append(spk)
        mems.append(mem)
    return torch.stack(spks, dim), torch.stack(mems, dim)


@merges
def test_a_returned_record_is_copied_only_where_others_see_its_memory():
    """The layer keeps the last mem, which gets memory of its own; the records need none."""
    calls = check(_recorded, training=False)
    expect(calls, clone=1, stack=0)


@MODES
def test_a_returned_record_may_be_written_behind_a_graph_break(training):
    """Its views show what is written, and what a backward pass reads is other memory."""

    def forward(net, x):
        records = _recorded(net, x)
        last = records[0][-1]
        torch._dynamo.graph_break()
        for record in records:
            record.mul_(0.5)
        return *records, last

    check(forward, training, graph_breaks=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_returned_record_can_be_detached_in_place(dim):
    """It is no view, not even if a copy would have its strides, as for one sample."""
    net = looped(lambda net, x: _recorded(net, x, dim))()
    with torch.no_grad():
        torch._dynamo.reset()
        for record in torch.compile(net, backend=BACKEND)(numbers(T, 1, 6)):
            record.detach_()


@pytest.mark.parametrize("name", ["vmap", "grad", "jvp", "grad of each"])
def test_transforms_of_torch_func_within_the_loop(name):
    """Tensors within a transform have no memory of their own."""

    def forward(net, x):
        function = {
            "vmap": torch.func.vmap(lambda row: net.fc1(row) + row.sum()),
            "grad": torch.func.grad(lambda x_t: (x_t * net.fc1(x_t)).sum()),
            "jvp": lambda x_t: torch.func.jvp(net.fc1, (x_t,), (x_t,))[1],
            "grad of each": torch.func.vmap(torch.func.grad(lambda row: (row * row).sum())),
        }[name]
        mem, out = net.lif1.reset_mem(), []
        for x_t in x:
            spk, mem = net.lif1(function(x_t), mem)
            out.append(spk)
        return torch.stack(out), mem

    check(forward, training=False)


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


@loop_test()
def test_steps_in_another_order_are_not_x_itself(net, x):
    """x[t] for all t is x only in the order of t, each once."""
    return (
        torch.stack([net.fc1(x[t]) for t in reversed(range(T))]),
        torch.stack([net.fc2(x[t // 2]) for t in range(T)]),
        torch.stack([net.back(x[-t]) for t in range(T)]),
        torch.stack([net.fc1(x[:, t]) for t in range(N)], dim=1),
    )


# ---- dropout that does nothing -------------------------------------------------------------------

IDLE: dict[str, Callable[..., Tensor]] = {
    "in evaluation": lambda net, h: net.drop(h),
    "p of 0": lambda net, h: F.dropout(h, p=0.0),
    "by name": lambda net, h: F.dropout(p=0.5, training=False, input=h),
    "torch.dropout": lambda net, h: torch.dropout(h, 0.5, train=False),
    "in place": lambda net, h: F.dropout(h, 0.5, False, inplace=True),
}


@MODES
@pytest.mark.parametrize("idle", IDLE)
def test_a_dropout_that_does_nothing_is_its_argument(idle, training):
    """So layers get all steps at once. A write to such a dropout, which stays, is one to h."""

    def forward(net, x):
        mem, out, written = net.lif1.reset_mem(), [], []
        for x_t in x:
            spk, mem = net.lif1(IDLE[idle](net, net.fc1(x_t)), mem)
            out.append(net.fc2(IDLE[idle](net, spk)))
            h = x_t * 1
            IDLE[idle](net, h).view(-1).mul_(2)
            written.append(h * 1)
        return torch.stack(out), mem, written

    calls = check(forward, training, prepare=lambda net: net.drop.eval())
    expect(calls, linear=2, leaky=1, dropout=T)
