"""Under torch.autocast and GradScaler the cell keeps states and gradients in float32.

Plain torch and the CUDA kernels multiply in the autocast type; the CPU kernels stay in float32.
"""

import pytest
import torch
from cpu_kernels import native
from helpers import close, ours, states, steps, theirs
from torch import Tensor

import snnlstm

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
half = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def one_call_a_step(cell: snnlstm.SConv2dLSTM, x: Tensor, syn: Tensor, mem: Tensor) -> tuple:
    spks = []
    for x_t in x:
        spk, syn, mem = cell(x_t, syn, mem)
        spks.append(spk)
    return torch.stack(spks), syn, mem


def functional(cell: snnlstm.SConv2dLSTM, x: Tensor, syn: Tensor, mem: Tensor) -> tuple:
    return snnlstm.functional.sconv2dlstm(
        x, syn, mem, cell.conv.weight, cell.conv.bias, threshold=cell.threshold
    )


FORMS = {"steps": one_call_a_step, "sequence": lambda cell, *args: cell(*args), "f": functional}


@half
@pytest.mark.parametrize("form", FORMS)
def test_states_spikes_and_gradients_stay_float32(backend, dtype, form):
    x, start = steps(3, 2, 2, 6, 7), states(2, 3, 6, 7)
    cell, exact = ours(), ours()
    with torch.autocast(backend.device.type, dtype=dtype):
        out = FORMS[form](cell, x, *start)
    expected = FORMS[form](exact, x, *start)
    assert {o.dtype for o in out} == {torch.float32}
    close(out[1:], expected[1:], atol=TOLERANCE[dtype])
    assert torch.equal(out[2], expected[2]) == (backend.name == "cpu")  # it computes in float32
    for _, syn, mem in (out, expected):
        (syn.square().sum() + mem.square().sum()).backward()
    for name, parameter in cell.named_parameters():
        grad, wanted = parameter.grad, exact.get_parameter(name).grad
        assert grad.dtype == torch.float32
        assert (grad - wanted).norm() < 2 * TOLERANCE[dtype] * wanted.norm()
    if form != "f":
        backend.check(cell.path)


@half
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_results_have_snntorchs_types_and_are_closer_to_float64(dtype, input_dtype):
    cell, other, exact = ours(), theirs(), ours().double()
    x, start = steps(1, 2, 2, 6, 7)[0].to(input_dtype), states(2, 3, 6, 7)
    with torch.autocast("cpu", dtype=dtype):
        out, reference = cell(x, *start), other(x.float(), *start)
    wanted = exact(x.double(), *(s.double() for s in start))
    for one, theirs_, right in zip(out, reference, wanted, strict=True):
        assert one.dtype == theirs_.dtype == torch.float32
        assert (one - right).norm() <= (theirs_ - right).norm()
    assert (out[2] - wanted[2]).norm() < 0.01 * (reference[2] - wanted[2]).norm()
    assert native is None or cell.path.native


@half
def test_autocast_that_is_switched_off_inside_leaves_the_kernels_as_they_were(backend, dtype):
    cell, exact = ours(), ours()
    x = steps(3, 2, 2, 6, 7)
    with torch.autocast(backend.device.type, dtype=dtype):
        cell(x[0])
        cell.reset_mem()
        with torch.autocast(backend.device.type, enabled=False):
            close(cell(x), exact(x), atol=0, rtol=0)
            backend.check(cell.path)
    _, syn, mem = cell(x[1], *states(2, 3, 6, 7))
    close((syn, mem), exact(x[1], *states(2, 3, 6, 7))[1:], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_stay_float32_across_the_border_of_autocast_and_of_a_half_module(backend, dtype):
    cell, exact = ours(reset_mechanism="zero").to(dtype), ours(reset_mechanism="zero")
    for t, x in enumerate(steps(4, 2, 2, 6, 7)):
        inside = t % 2 == 0 or dtype != torch.float32
        with torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=inside):
            out = cell(x.to(dtype))
        exact(x)
        assert {o.dtype for o in out} == {torch.float32}
    out[2].sum().backward()
    exact.mem.sum().backward()
    grad, expected = cell.conv.weight.grad, exact.conv.weight.grad
    assert grad.dtype == dtype
    assert (grad - expected).norm() < 0.1 * expected.norm()


def scaled_step(cell, x, optimizer, scaler, device: str, factor: float = 1.0) -> Tensor:
    """Runs a training step in float16 and returns the gradient after unscaling."""
    optimizer.zero_grad()
    cell.reset_mem()
    with torch.autocast(device, dtype=torch.float16):
        spk, _, mem = cell(x)
        loss = (spk.mean() + mem.square().mean()) * factor
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad = cell.conv.weight.grad.clone()
    scaler.step(optimizer)
    scaler.update()
    return grad


def test_grad_scaler(backend):
    """Unscaled gradients are those without a scaler; the scaler skips a step with an infinity."""
    device = backend.device.type
    cell, exact = ours(), ours()
    x = steps(3, 2, 2, 6, 7)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    grad = scaled_step(cell, x, optimizer, scaler, device)
    spk, _, mem = exact(x)
    (spk.mean() + mem.square().mean()).backward()
    expected = exact.conv.weight.grad
    assert (grad - expected).norm() < 0.02 * expected.norm()
    close(cell.conv.weight.detach(), exact.conv.weight.detach() - 0.1 * expected, atol=1e-3)

    before = cell.conv.weight.detach().clone()
    grad = scaled_step(cell, x, optimizer, scaler, device, factor=1e38)
    assert not grad.isfinite().all()
    assert torch.equal(cell.conv.weight, before)
    assert scaler.get_scale() == 512.0
    scaled_step(cell, x, optimizer, scaler, device)
    assert not torch.equal(cell.conv.weight, before)
    assert cell.conv.weight.isfinite().all()
