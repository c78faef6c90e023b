"""The cell starts, keeps, replaces, resets and copies its states as the documentation says."""

import copy
import pickle

import pytest
import torch
from helpers import close, ours, states, steps, twins
from torch import nn

import snnlstm


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_step_call_takes_and_returns(backend, hidden, output, explicit):
    """A step goes on from the stored state, not from zero, unless the caller passes a state."""
    one, other = twins(init_hidden=hidden, output=output)
    assert one.syn.shape == one.mem.shape == (0,)
    state = reference = states(2, 3, 6, 7) if explicit and not hidden else ()
    for x in steps(4, 2, 2, 6, 7):
        mine, expected = one(x, *state), other(x, *reference)
        assert isinstance(mine, tuple) == isinstance(expected, tuple) == (output or not hidden)
        close(mine, expected)
        if state:
            state, reference = mine[1:], expected[1:]
        spk, *kept = mine if isinstance(mine, tuple) else (mine, one.syn, one.mem)
        assert spk is one.spk
        assert kept[0] is one.syn
        assert kept[1] is one.mem


def test_one_state_may_be_passed_alone(backend):
    one, other = twins()
    x = steps(3, 2, 2, 6, 7)
    close(one(x[0]), other(x[0]))
    syn, mem = states(2, 3, 6, 7)
    close(one(x[1], syn=syn), other(x[1], syn=syn))
    close(one(x[2], mem=mem), other(x[2], mem=mem))


@pytest.mark.parametrize("how", ["reset_mem", "reset_hidden", "zeros", "empty", "init_sconv2dlstm"])
def test_what_restarts_the_state(backend, how):
    x = steps(2, 2, 2, 6, 7)
    cell, fresh = ours(), ours()
    cell(x[0])
    args = ()
    if how == "zeros":
        args = (torch.zeros(2, 3, 6, 7), torch.zeros(2, 3, 6, 7))
    elif how == "empty":
        args = (torch.zeros(0), torch.zeros(0))
    else:
        getattr(cell, how)()
    close(cell(x[1], *args), fresh(x[1]), atol=0, rtol=0)


HANDLED = {
    "as it is": lambda cell: cell.reset_mem(),
    "read": lambda cell: (cell.reset_mem(), cell.syn, cell.mem)[1:],
    "after a look": lambda cell: (cell.reset_mem(), cell.mem.abs().max())[0],
    "cloned": lambda cell: [state.clone() for state in cell.reset_mem()],
    "detached": lambda cell: [state.detach() for state in cell.reset_mem()],
    "moved": lambda cell: [state.to("cpu", torch.float64) for state in cell.reset_mem()],
}


@pytest.mark.parametrize("how", HANDLED)
def test_however_a_reset_state_was_handled_it_is_zeros_for_any_size(how):
    """snnTorch's cell takes zeros in the place of any state that does not fit."""
    one, other = twins()
    for cell in (one, other):
        cell(steps(1, 2, 2, 6, 7)[0])
    mine, reference = HANDLED[how](one), HANDLED[how](other)
    for shape in ((3, 2, 6, 7), (1, 2, 6, 7), (2, 2, 5, 5)):  # one result for several batches
        x = steps(1, *shape)[0]
        out, expected = one(x, *mine), other(x, *reference)
        close(out, expected)
    with pytest.raises(ValueError, match="mem must have shape"):  # out[2] is not a reset state
        one(steps(1, 1, 2, 5, 5)[0], mem=out[2])


def test_zeros_of_a_wrong_size_that_have_a_history_or_other_channels_are_refused():
    cell, x = ours(), torch.zeros(2, 2, 6, 7)
    learned = torch.zeros(1, 3, 6, 7, requires_grad=True)
    for state in (learned, torch.zeros(2, 4, 6, 7), torch.zeros(3, 6, 7)):
        with pytest.raises(ValueError, match="mem must have shape"):
            cell(x, mem=state)
    cell.mem = learned.detach() + 1  # which is no zeros of a reset any more
    with pytest.raises(ValueError, match="mem must have shape"):
        cell(x, mem=cell._state.mem)
    with pytest.raises(ValueError, match="mem must have shape"):
        torch.func.vmap(lambda mem: cell(x, mem=mem)[2])(torch.zeros(2, 1, 3, 6, 7))


@pytest.mark.parametrize("how", ["as it is", "reread", "passed"])
def test_a_reset_state_may_be_edited_in_place(backend, how):
    x, start = steps(1, 2, 2, 6, 7)[0], states(2, 3, 6, 7)
    cell = ours()
    for _ in range(2):
        cell(x)
        syn, mem = cell.reset_mem()
        if how == "reread":
            syn, mem = cell.syn, cell.mem
        syn.copy_(start[0])
        mem.copy_(start[1])
        close(cell(x, *((syn, mem) if how == "passed" else ())), ours()(x, *start))


def test_an_edited_reset_state_starts_the_first_sequence_of_its_kind():
    cell, start = ours(), states(2, 3, 6, 23)
    x = steps(7, 2, 2, 6, 23)  # no other test has this shape, whose arguments are checked anew
    cell(x[0])
    edited = cell.reset_mem()
    for state, value in zip(edited, start, strict=True):
        state.copy_(value)
    close(cell(x, *edited), ours()(x, *start))


def test_a_stored_state_of_another_size_is_replaced_by_zeros(backend):
    one, other = twins()
    for shape in ((2, 2, 6, 7), (3, 2, 6, 7), (3, 2, 5, 5), (1, 2, 5, 5)):
        x = steps(1, *shape)[0]
        close(one(x), other(x))


@pytest.mark.parametrize("how", ["reset", "passed"])
def test_a_state_that_was_stored_in_a_backward_pass_goes_on(how):
    cell, plain = ours(), ours()
    x = steps(2, 2, 2, 6, 7)
    leaf = torch.zeros(1, requires_grad=True)

    def step(grad):
        if how == "reset":
            cell.reset_mem()
            cell(x[0])
        else:
            cell(x[0], torch.zeros(0), torch.zeros(0))
        assert cell(x[0])[1].any()  # the state may be used within the pass, too

    leaf.register_hook(step)
    leaf.sum().backward()
    plain(x[0])
    plain(x[0])
    close(cell(x[1]), plain(x[1]))
    leaf.sum().backward()
    close(cell(x[0][:1]), ours()(x[0][:1]))  # another batch starts from zeros


def test_explicit_states_with_init_hidden_raise_before_anything_changes():
    cell = ours(init_hidden=True)
    cell(steps(1, 1, 2, 5, 5)[0])
    syn, mem = cell.syn, cell.mem
    for kwargs in ({"syn": torch.ones(1, 3, 5, 5)}, {"mem": torch.ones(1, 3, 5, 5)}):
        with pytest.raises(TypeError, match=r"should not be passed .* `init_hidden=True`"):
            cell(torch.zeros(1, 2, 5, 5), **kwargs)
        assert cell.syn is syn
        assert cell.mem is mem


def test_a_parameter_passed_as_a_state_gets_gradients_and_is_not_registered(backend):
    cell = ours()
    names = list(cell.state_dict())
    syn, mem = (nn.Parameter(state) for state in states(1, 3, 5, 5))
    x = steps(2, 1, 2, 5, 5)
    cell(x[0], syn, mem)[2].sum().backward()
    assert syn.grad.any()
    assert mem.grad.any()
    cell.syn, cell.mem = syn, mem  # a parameter may also be assigned by hand
    cell(x[1])[2].sum().backward()
    assert list(cell.state_dict()) == names
    assert len(list(cell.parameters())) == 2
    cell(x[0])
    backend.check(cell.path)


def test_a_call_that_fails_half_way_leaves_the_state_as_it_was():
    cell = ours()
    cell(steps(1, 1, 2, 5, 5)[0])
    held = (cell.syn, cell.mem, cell.spk, cell.path)
    cell.spike_grad = lambda u: 1 / 0
    with pytest.raises(ArithmeticError):
        cell(torch.zeros(1, 2, 5, 5), torch.ones(1, 3, 5, 5), torch.ones(1, 3, 5, 5))
    assert all(a is b for a, b in zip((cell.syn, cell.mem, cell.spk, cell.path), held, strict=True))


def test_the_callers_tensors_are_never_modified(backend):
    for reset in ("subtract", "zero", "none"):
        cell = ours(reset_mechanism=reset, state_quant=snnlstm.quant.state_quant(4))
        syn, mem = states(2, 3, 6, 7)
        x = steps(1, 2, 2, 6, 7)[0]
        given = [t.requires_grad_() for t in (x, syn, mem)]
        before = [t.detach().clone() for t in given]
        out = cell(*given)
        torch.stack([t.sum() for t in out]).sum().backward()
        for tensor, copied in zip(given, before, strict=True):
            assert torch.equal(tensor, copied)
            assert tensor._version == 0
        assert not any(o.data_ptr() == g.data_ptr() for o in out for g in given)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["spk", "syn", "mem"])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("pool", [{}, {"max_pool": 2}], ids=str)
def test_editing_a_returned_tensor_in_place_corrupts_no_gradient(backend, which, recurrent, pool):
    """Either autograd raises an error, or the gradient is that of the unedited tensors."""

    def run(edit):
        cell = ours(reset_mechanism="subtract", **pool)
        x = steps(2, 1, 2, 6, 6)
        out = cell(x[0])
        # The loss reads the outputs before the edit.
        loss = sum((o * torch.arange(o.numel()).view_as(o)).sum() for o in out)
        if recurrent:
            loss = loss + cell(x[1])[2].sum()
        if edit:
            with torch.no_grad():
                out[which].zero_()
        loss.backward()
        return cell.conv.weight.grad

    expected = run(edit=False)
    try:
        actual = run(edit=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 (one outcome of two)
    else:
        close(actual, expected)


def test_detaching_leaves_the_users_tensors_in_their_graphs():
    cell = ours()
    leaf = torch.zeros(1, 3, 5, 5, requires_grad=True)
    view = (2 * torch.zeros(2, 3, 5, 5, requires_grad=True))[1:]
    cell.syn, cell.mem = leaf, view
    cell.detach_hidden()
    assert leaf.requires_grad
    assert view.requires_grad
    assert not cell.syn.requires_grad
    assert not cell.mem.requires_grad


def test_detaching_a_returned_state_in_place_cuts_the_graph(backend):
    cell = ours()
    x = steps(2, 1, 2, 5, 5).requires_grad_()
    _, syn, mem = cell(x[0])
    syn.detach_()
    mem.detach_()
    cell(x[1])[2].sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1].any()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda cell: pickle.loads(pickle.dumps(cell))]
)
def test_copies_and_pickles_after_a_call_in_grad_mode(backend, copied):
    options = {"spike_grad": snnlstm.surrogate.fast_sigmoid(5), "reset_mechanism": "zero"}
    options |= {"checkpoint": True, "batch_first": True, "dilation": 2, "output": True}
    cell = ours(**options)
    x = steps(2, 1, 2, 5, 5)
    cell(x[0])
    other = copied(cell)
    assert other.spk is None
    assert not other.mem.requires_grad
    assert torch.equal(other.mem, cell.mem.detach())
    assert repr(other) == repr(cell)
    assert other.spike_grad == cell.spike_grad
    close(other(x[1]), ours(**options)(x[1], cell.syn, cell.mem))
    other.reset_mem()
    assert cell.mem.any()  # a copy has a state of its own
    other(x[1])
    snnlstm.SConv2dLSTM.reset_hidden()  # the class knows the copy
    assert not other.mem.any()


def test_states_are_no_buffers_but_move_with_the_cell():
    cell = ours()
    cell(torch.ones(1, 2, 5, 5))
    assert "mem" not in dict(cell.named_buffers())
    assert "mem" not in cell.state_dict()
    cell.double()
    assert cell.syn.dtype == cell.mem.dtype == torch.float64
    cell.half()
    assert cell.syn.dtype == torch.float16
    cell.to("meta")
    assert cell.syn.is_meta
    assert cell.mem.is_meta


@pytest.mark.filterwarnings("ignore")  # torch.jit warns of itself
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_that_a_trace_or_a_transform_leaves_are_where_they_were(device):
    cell, x = ours().double().to(device), steps(2, 1, 2, 5, 5).double().to(device)
    reset = []
    torch.jit.trace(lambda x: (reset.extend(cell.reset_mem()), 1 * x)[1], x[0], check_trace=False)
    torch.func.vmap(cell, randomness="same")(x)
    for state in (*reset, cell.syn, cell.mem):
        assert (state.shape, state.dtype, state.device.type) == ((0,), torch.float64, device)
    found = ours()._state._stored("mem", (0,), x, False)
    assert (found.dtype, found.device.type) == (torch.float64, device)


def test_memory_of_the_cell_alone_is_made_anew():
    """Tools that move a network module by module call to_empty() with recurse=False."""
    cell = ours()
    cell(torch.ones(1, 2, 5, 5))
    weight = cell.conv.weight
    cell.to_empty(device="meta", recurse=False)
    assert cell.mem.is_meta
    assert cell.conv.weight is weight
    assert not weight.is_meta


def test_a_state_set_by_hand_is_used(backend):
    one, other = twins(init_hidden=True, output=True)
    for cell in (one, other):
        cell.syn, cell.mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    close(one(x), other(x))
    with pytest.raises(TypeError, match="mem must be a tensor"):
        one.mem = None


def test_reset_is_computed_from_the_mem_before_the_call(backend):
    cell = ours()
    assert cell.reset is None
    syn, mem = states(1, 3, 5, 5)
    cell(steps(1, 1, 2, 5, 5)[0], syn, mem)
    assert torch.equal(cell.reset, (mem > 0.1).float())
    mem.zero_()
    with pytest.raises(RuntimeError, match="reset can no longer be computed"):
        _ = cell.reset
    cell(steps(2, 1, 2, 5, 5))
    assert cell.reset is None  # a sequence has no reset signal


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_reset_after_a_small_change_of_the_threshold_through_data(reset):
    cell = ours(threshold=1e-9, reset_mechanism=reset)
    cell(steps(1, 1, 2, 5, 5)[0], *states(1, 3, 5, 5))
    assert cell.reset.any()
    cell(steps(1, 1, 2, 5, 5)[0], *states(1, 3, 5, 5))
    cell.threshold.data.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"modified through \.data"):
        _ = cell.reset


def test_reset_is_what_an_override_returns_while_it_is_there():
    cell, x = ours(reset_mechanism="subtract"), steps(2, 1, 2, 5, 5)
    cell.mem_reset = lambda mem: torch.full_like(mem, 0.5)
    cell(x[0])
    assert cell.reset.eq(0.5).all()
    del cell.mem_reset
    before = cell.mem
    cell(x[1])
    assert torch.equal(cell.reset, (before > cell.threshold).float())


@torch.no_grad()
@pytest.mark.parametrize("learn", [False, True])
def test_reset_after_the_threshold_was_written_to_between_calls(learn):
    cell, mem = ours(threshold=0.1, learn_threshold=learn), torch.rand(2, 3, 5, 5)
    for threshold in (0.1, 0.4, 0.9):
        cell.threshold.fill_(threshold)
        cell(torch.rand(2, 2, 5, 5), torch.zeros_like(mem), mem)
        for written in (threshold, -5.0, 0.0):
            cell.threshold.fill_(written)
            assert torch.equal(cell.reset, (mem > threshold).float())


def test_reset_with_a_threshold_that_is_no_number():
    cell = ours(threshold=torch.tensor(float("nan")))
    cell(steps(1, 1, 2, 5, 5)[0])
    assert not cell.reset.any()


def test_reset_with_another_threshold_tensor_and_in_inference_mode():
    cell, (syn, mem) = ours(), states(1, 3, 5, 5)
    x = steps(1, 1, 2, 5, 5)[0]
    for threshold in (torch.tensor(0.3), torch.tensor(-0.3)):
        cell.threshold = threshold
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                cell(x.clone(), syn.clone(), mem.clone())
                assert torch.equal(cell.reset, (mem > threshold).float())


def test_a_recorded_sequence_of_one_step_is_stored():
    cell = ours()
    _, syn, mem = cell(steps(1, 1, 2, 5, 5), record=True)
    assert torch.equal(cell.syn, syn[0])
    assert torch.equal(cell.mem, mem[0])
