"""float32, float64, half precision and autocast."""

import pytest
import torch
from helpers import close, ours, states, steps, theirs, twins

import snnlstm

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
half = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def test_float64_agrees_with_snntorch_to_float64(backend):
    one, other = (cell.double() for cell in twins(reset_mechanism="subtract", max_pool=2))
    # snnTorch's spikes are float32 whatever the cell is; ours have the cell's dtype.
    x = steps(3, 2, 2, 6, 7).double()
    start = [state.double() for state in states(2, 3, 6, 7)]
    mine, reference = (None, *start), (None, *start)
    for t in range(3):
        mine, reference = one(x[t], *mine[1:]), other(x[t], *reference[1:])
    assert mine[0].dtype == torch.float64
    close(mine[1:], reference[1:], atol=1e-13)
    assert torch.equal(mine[0], reference[0].double())
    backend.check(one.path)
    for out in (mine, reference):
        (out[0].sum() + out[2].square().sum()).backward()
    close(one.conv.weight.grad, other.conv.weight.grad, atol=1e-5)


@half
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_half_precision_modules_work_without_explicit_states(dtype, reset):
    cell = ours(reset_mechanism=reset).to(dtype)
    exact = ours(reset_mechanism=reset).double()
    x = steps(2, 2, 2, 6, 7)
    for t in range(2):
        spk, syn, mem = cell(x[t].to(dtype))
        assert {spk.dtype, syn.dtype, mem.dtype} == {dtype}
        expected = exact(x[t].double())
        if t == 0 or reset == "none":  # a flipped spike changes the reset
            close(syn.double(), expected[1], atol=TOLERANCE[dtype])
            close(mem.double(), expected[2], atol=TOLERANCE[dtype])
        assert torch.equal(spk.bool(), mem > cell.threshold)
    mem.sum().backward()
    assert cell.conv.weight.grad.dtype == dtype
    assert cell.conv.weight.grad.isfinite().all()


def test_snntorch_cannot_do_that():
    with pytest.raises(RuntimeError):
        theirs().half()(torch.zeros(1, 2, 5, 5, dtype=torch.float16))


@half
def test_a_half_precision_sequence_is_its_steps(dtype):
    one, other = ours().to(dtype), ours().to(dtype)
    x = steps(3, 1, 2, 5, 5).to(dtype)
    close(one(x)[0], torch.stack([other(x_t)[0] for x_t in x]), atol=0, rtol=0)


@half
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_states_and_spikes_stay_float32(dtype, input_dtype):
    cell, other, exact = ours(), theirs(), ours()
    x = steps(3, 2, 2, 6, 7)
    start = states(2, 3, 6, 7)
    seen = []
    with torch.autocast("cpu", dtype=dtype):
        original = torch.nn.functional.conv2d
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.functional,
                "conv2d",
                lambda *a: seen.append(original(*a)) or seen[-1],
            )
            spk, syn, mem = cell(x[0].to(input_dtype), *start)
        reference = other(x[0], *start)  # which fails for bfloat16 in float16
    assert {out.dtype for out in seen} == {dtype}  # the matrix work
    assert {spk.dtype, syn.dtype, mem.dtype} == {torch.float32}
    assert {out.dtype for out in reference} == {torch.float32}
    close((syn, mem), exact(x[0], *start)[1:], atol=TOLERANCE[dtype])
    close((syn, mem), reference[1:], atol=TOLERANCE[dtype])
    assert cell.path.name == "reference"
    mem.sum().backward()
    assert cell.conv.weight.grad.dtype == torch.float32
    # and go on without it
    cell.reset_mem()
    close(cell(x[1], syn.detach(), mem.detach()), exact(x[1], syn, mem))


def test_stored_states_follow_a_change_of_dtype(backend):
    cell, other = ours(), ours()
    x = steps(2, 1, 2, 5, 5)
    cell(x[0])
    other(x[0])
    close(cell.double()(x[1].double())[1].float(), other(x[1])[1])
    cell.float()
    with torch.no_grad():
        cell.conv.double()  # the states are where they were
    assert cell(x[1].double())[1].dtype == torch.float64


def test_thresholds_of_another_dtype_are_converted(backend):
    """As in a checkpoint of snnTorch with an integer threshold."""
    cell = ours(threshold=0.5)
    cell.threshold = torch.tensor(0)
    x = steps(1, 2, 2, 6, 7)[0]
    spk, _, mem = cell(x)
    assert torch.equal(spk.bool(), mem > 0)
    backend.check(cell.path)
    double = torch.nn.Parameter(torch.full((3, 1, 1), 0.1, dtype=torch.float64))
    snnlstm.functional.sconv2dlstm(
        x, weight=cell.conv.weight, bias=cell.conv.bias, threshold=double
    )[0].sum().backward()
    assert double.grad.dtype == torch.float64
    assert double.grad.all()
