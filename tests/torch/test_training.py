"""The cell trains as snnTorch's does: checkpointed, with other weights, and with hooks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.shared.helpers import close, ours, same_gradients, states, steps, theirs


@pytest.fixture(autouse=True)
def _one_thread(_same_start):
    torch.set_num_threads(1)  # with tensors this small, threads cost more than they save


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Returns x of four steps, syn and mem."""
    return steps(4, 2, 2, 6, 6), *states(2, 3, 6, 6)


def loop(call, x: Tensor, syn: Tensor, mem: Tensor) -> Tensor:
    """Runs `call` once a step, with the states of the step before; returns a loss of all steps."""
    loss = 0
    for x_t in x:
        spk, syn, mem = call(x_t, syn, mem)
        loss = loss + spk.sum() + mem.sum()
    return loss


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
    with pytest.raises(RuntimeError, match="stored state is a later one"):
        loss.backward()
    cell.reset_mem()
    close(cell(x), ours(init_hidden=True)(x))  # the cell still works after the error


def _with_dropout(cell):
    cell.conv = nn.Sequential(cell.conv, nn.Dropout(0.5))


RANDOM = {
    "conv": _with_dropout,
    "hook": lambda cell: cell.conv.register_forward_hook(lambda m, x, out: F.dropout(out)),
    "spike_grad": lambda cell: setattr(
        cell, "spike_grad", lambda u: torch.sigmoid(F.dropout(8 * u))
    ),
    "state_quant": lambda cell: setattr(cell, "state_quant", F.dropout),
}


@pytest.mark.parametrize("name", RANDOM)
def test_checkpoint_draws_the_random_numbers_of_foreign_code_again(name):
    found = []
    for again in (False, True):
        cell, x = ours(checkpoint=again, threshold=0.02), steps(6, 2, 2, 6, 7)
        RANDOM[name](cell)
        torch.manual_seed(3)
        spk, _, mem = cell(x)
        (spk.sum() + mem.square().sum()).backward()
        found.append([parameter.grad for parameter in cell.parameters()])
        found[-1].append(torch.rand(3))  # behind the pass the generator is where it was
    close(*found)


def test_functional_call_uses_the_weights_that_it_is_given(backend):
    cell, other = ours(learn_threshold=True), ours(seed=3, learn_threshold=True)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    loop(lambda *args: torch.func.functional_call(cell, given, args), *data()).backward()
    backend.check(cell.path)
    loop(other, *data()).backward()
    for name, value in given.items():
        close(value.grad, other.get_parameter(name).grad, atol=2e-5, rtol=1e-4)
    assert all(parameter.grad is None for parameter in cell.parameters())


# ---- state_dict hooks -----------------------------------------------------------------------


def _method(module: nn.Module, name: str):
    """Returns a method of `module` that torch before 2.5 names with an underscore."""
    return getattr(module, name, None) or getattr(module, f"_{name}")


def test_hooks_on_saving_and_loading_are_called_as_with_snntorch():
    """The hooks lie on a cell within a network; they add and scale entries."""
    seen = []
    for make in (ours, theirs):
        model, calls = nn.Sequential(nn.Identity(), make(learn_threshold=True)), []
        cell = model[1]

        def after(module, state, prefix, metadata, calls=calls):
            calls.append(("saved", prefix))
            state[prefix + "note"] = state[prefix + "conv.weight"] * 2

        def on_load(module, state, prefix, *rest, calls=calls):
            calls.append(("loading", prefix))
            state[prefix + "conv.weight"] = state.pop(prefix + "note") / 4

        def when_loaded(module, keys, calls=calls):
            calls.append(("loaded", len(keys.missing_keys), len(keys.unexpected_keys)))

        _method(cell, "register_state_dict_post_hook")(after)
        _method(cell, "register_load_state_dict_pre_hook")(on_load)
        cell.register_load_state_dict_post_hook(when_loaded)
        weight = cell.conv.weight.detach().clone()
        state = copy.deepcopy(dict(model.state_dict()))
        model.load_state_dict(state)
        close(cell.conv.weight.detach(), weight / 2)
        seen.append((list(state), calls))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 3
