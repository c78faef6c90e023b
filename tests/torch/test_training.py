"""The cell trains as snnTorch's does: checkpointed, and with weights that it is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.shared.helpers import close, documented, ours, same_gradients, states, steps


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # with tensors this small, threads cost more than they save


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Returns x of four steps, syn and mem."""
    return steps(4, 2, 2, 6, 6), *states(2, 3, 6, 6)


def test_a_chunk_without_detached_states_says_what_is_wrong():
    """torch raises an error, because the first backward pass freed the graph of earlier steps."""
    cell, x = ours(), data()[0]
    cell(x[:3])[2].sum().backward()
    with pytest.raises(RuntimeError, match=r"second time .* Call reset_mem\(\) before each new"):
        cell(x[3:])[2].sum().backward()
    cell.reset_mem()
    (loss := cell(x)[2].sum()).backward()
    with pytest.raises(RuntimeError, match="on one loss needs retain_graph=True"):
        loss.backward()


# ---- activation checkpointing ---------------------------------------------------------------


@pytest.mark.emulator_long
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_parts_of_a_loop(backend, reentrant):
    cells = [ours(reset_mechanism="subtract") for _ in range(2)]
    inputs = []
    for cell in cells:

        def part(x, syn, mem, cell=cell):
            total = 0
            for x_t in x:
                spk, syn, mem = cell(x_t, syn, mem)
                total = total + spk.sum() + mem.square().sum()
            return total, syn, mem

        inputs.append([t.requires_grad_() for t in data()])
        x, *state = inputs[-1]
        losses = []
        for two_steps in x.split(2):
            if cell is cells[0]:
                loss, *state = checkpoint(part, two_steps, *state, use_reentrant=reentrant)
            else:
                loss, *state = part(two_steps, *state)
            losses.append(loss)
        sum(losses).backward()
    same_gradients(*cells)
    close(*([t.grad for t in own] for own in inputs), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("between", ["nothing", "a reset"])
def test_checkpointing_steps_of_stored_states_is_an_error(reentrant, between):
    """At the recomputation of a step, the stored state is already that after the last step."""
    cell = ours(init_hidden=True)
    x = data()[0].requires_grad_()
    loss = sum(checkpoint(cell, x_t, use_reentrant=reentrant).sum() for x_t in x)
    if between == "a reset":
        cell.reset_mem()
    with pytest.raises(RuntimeError, match="stored state has changed since"):
        loss.backward()
    cell.reset_mem()
    close(cell(x), ours(init_hidden=True)(x))  # the cell still works after the error


def _with_dropout(cell):
    cell.conv = nn.Sequential(cell.conv, nn.Dropout(0.5))


RANDOM = {
    "nothing": lambda cell: None,
    "conv": _with_dropout,
    "hook": lambda cell: cell.conv.register_forward_hook(lambda m, x, out: F.dropout(out)),
    "spike_grad": lambda cell: setattr(
        cell, "spike_grad", lambda u: torch.sigmoid(F.dropout(8 * u))
    ),
    "state_quant": lambda cell: setattr(cell, "state_quant", F.dropout),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_sequence_in_chunks_draws_the_random_numbers_of_foreign_code_again(name):
    found, in_chunks = [], documented("in_chunks")
    for again in (False, True):
        cell, x = ours(threshold=0.02), steps(6, 2, 2, 6, 7)
        RANDOM[name](cell)
        torch.manual_seed(3)
        spk, _, mem = in_chunks(cell, x, 2) if again else cell(x)
        (spk.sum() + mem.square().sum()).backward()
        found.append([parameter.grad for parameter in cell.parameters()])
        found[-1].append(torch.rand(3))  # behind the pass the generator is where it was
    close(*found)


def test_functional_call_uses_the_weights_that_it_is_given(backend):
    cell, other = ours(learn_threshold=True), ours(seed=3, learn_threshold=True)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    for call in (lambda *args: torch.func.functional_call(cell, given, args), other):
        x, *state = data()
        for x_t in x:
            spk, *state = call(x_t, *state)
        (spk.sum() + state[1].sum()).backward()
    backend.check(cell.path)
    for name, value in given.items():
        close(value.grad, other.get_parameter(name).grad, atol=2e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in cell.parameters())
