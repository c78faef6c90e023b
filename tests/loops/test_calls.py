"""Calls of compiled networks: states that go on, sizes that change, processes."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from snntorch import utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import snnlstm
from tests.loops.compiled import BACKEND, Calls, as_eager, merges, numbers, outcome
from tests.loops.networks import NETWORKS
from tests.loops.parts import MODES, N, T, check, expect, looped
from tests.shared.helpers import close, in_processes

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


@pytest.mark.parametrize("name", ["documentation", "tutorial 5"])
def test_training_and_evaluation_take_a_graph_for_each_size(name):
    """A reset within the loop looks at no state of the last call, of which there are many kinds."""
    network, calls = NETWORKS[name], Calls()
    (x,) = network.inputs()
    with calls.counted() as backend:
        torch._dynamo.reset()
        compiled = torch.compile(network.made(), backend=backend, dynamic=False)
        for batch in (x, x[:2], x, x[:2]):
            for training in (True, True, False, False):
                with torch.set_grad_enabled(training):
                    compiled(batch)
    assert calls.graphs == 4


@merges
def test_the_bits_of_unroll():
    """Both cut these sequences alike, so each kernel gets the same numbers in the same calls.

    The convolution is one that no layout makes faster: a channels-last one rounds differently.
    """

    def network():
        torch.manual_seed(0)
        cell, leaky = {"threshold": 0.05}, {"beta": 0.9, "threshold": 0.1}
        return nn.Sequential(
            snnlstm.SConv2dLSTM(1, 4, 3, max_pool=2, init_hidden=True, **cell),
            nn.Conv2d(4, 5, 1),
            snnlstm.Leaky(init_hidden=True, **leaky),
            snnlstm.SConv2dLSTM(5, 3, 3, init_hidden=True, **cell),
            nn.Flatten(),
            nn.Linear(3 * 10 * 10, 10),
            snnlstm.Leaky(init_hidden=True, **leaky),
        )

    def results(net, run):
        out = run(net)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        assert 0 < float(out.detach().mean()) < 1
        return [out, *(parameter.grad for parameter in net.parameters())]

    x = (numbers(6, N, 1, 20, 20) > 0.5).float()
    loop = torch.compile(lambda net: torch.stack([net(x_t) for x_t in x]), backend=BACKEND)
    compiled = results(network(), loop)
    unrolled = results(network(), lambda net: snnlstm.unroll(x, *net))
    assert all(map(torch.equal, compiled, unrolled))


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


@pytest.mark.parametrize("which", ["batch", "steps"])
def test_sizes_that_change(which):
    """A batch size is a symbol here, and states are of the last batch's size.

    Each number of steps has a graph of its own, and then dynamo's limit runs the loop eagerly.
    """
    make, calls, by_batch = looped(plain, without_numbers), Calls(), which == "batch"
    net, eager = make(), make()
    with calls.counted() as backend, torch._dynamo.config.patch(recompile_limit=2):
        torch._dynamo.reset()
        compiled = torch.compile(net, backend=backend, fullgraph=by_batch, dynamic=by_batch or None)
        for size in (4, 3, 5, 4):
            x = numbers(T, size, 6) if by_batch else numbers(size, N, 6)
            for layer in (net.lif1, net.hidden, eager.lif1, eager.hidden):
                layer.reset_mem()
            close(compiled(x), eager(x), atol=0, rtol=0)
    assert calls.graphs == 2
    if by_batch:
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
