"""Cells work in every dtype, on meta, by torch's default dtype and device, and under autocast.

Under autocast, and with a GradScaler, states and gradients stay in float32: the reference path and
the CUDA kernels multiply in the autocast type, and the CPU kernels in float32.
"""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

import snnlstm
from benchmarks.cases import loop
from tests.shared.cpu_kernels import native
from tests.shared.helpers import close, ours, states, steps, theirs

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def test_stored_states_follow_a_change_of_dtype(backend):
    cell, other = ours(), ours()
    x = steps(2, 1, 2, 5, 5)
    cell(x[0])
    other(x[0])
    close(cell.double()(x[1].double())[1].float(), other(x[1])[1])
    cell.float()
    with torch.no_grad():
        cell.conv.double()  # the states stay in float32
    assert cell(x[1].double())[1].dtype == torch.float64


def test_thresholds_of_another_dtype_are_converted(backend):
    """The test sets an integer threshold, as a checkpoint of snnTorch may hold one."""
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_is_that_of_a_new_cell(dtype):
    torch.set_default_dtype(dtype)
    cell = ours(max_pool=2, learn_threshold=True)  # snnTorch's resets are always float32
    single = ours(dtype=torch.float32)  # a cell may have another dtype than the default
    for made, its in ((cell, dtype), (single, torch.float32)):
        tensors = *made.parameters(), made.syn, made.threshold, made.graded_spikes_factor
        assert {t.dtype for t in tensors} == {its}
    x = steps(2, 1, 2, 6, 6).to(dtype)
    out = cell(x)
    assert {t.dtype for t in out} == {dtype}
    (out[0].sum() + out[2].sum()).backward()
    assert cell.conv.weight.grad.dtype == cell.threshold.grad.dtype == dtype
    assert single(x.float())[1].dtype == torch.float32
    if dtype == torch.float64:
        with torch.no_grad():
            other = theirs(max_pool=2)
            for x_t in x:
                reference = other(x_t)
            close(out[1:], reference[1:], atol=1e-12)


def test_the_default_device_is_that_of_a_new_cell_that_names_none():
    """Tensors on meta have no memory: a tensor that was made there by mistake raises an error."""
    torch.set_default_device(default_device := torch.device("meta"))
    x = steps(3, 2, 2, 6, 6)
    assert x.device == default_device  # tests rely on this to run on their backend's device
    cell = ours()
    assert {t.device for t in (*cell.parameters(), *cell.buffers(), cell.mem)} == {default_device}
    assert cell(x)[0].device == default_device
    options = {
        "threshold": torch.full((3, 1, 1), 0.1, device="cpu"),
        "state_quant": snnlstm.quant.state_quant(4, uniform=False),
        "reset_mechanism": "subtract",
    }  # fmt: skip
    for named in (ours(device="cpu"), ours(device="cpu", **options)):
        out = named(torch.zeros(3, 2, 2, 6, 6, device="cpu"))
        assert {o.device.type for o in out} == {"cpu"}
        (out[0].sum() + out[2].sum()).backward()
        assert named.conv.weight.grad.device.type == "cpu"
        assert native is None or named.path.native
        named.reset_parameters()


def test_a_threshold_without_a_device_is_put_on_that_of_x():
    """Lists and NumPy's arrays have no device; torch's default device need not be that of x."""
    torch.set_default_device("meta")
    x = torch.ones(2, 2, 5, 5, device="cpu")
    weight = torch.full((12, 5, 3, 3), 0.01, device="cpu")
    expected = snnlstm.functional.sconv2dlstm(x, weight=weight, threshold=0.1)
    for threshold in ([0.1], [[[0.1]]] * 3, np.full((3, 1, 1), 0.1)):
        out = snnlstm.functional.sconv2dlstm(
            x, weight=weight, threshold=threshold, graded_spikes_factor=[1.0]
        )
        close(out, expected)


def test_a_cell_without_memory_gets_it_by_to_empty():
    with torch.device("meta"):
        cell = ours(learn_threshold=True, threshold=torch.full((3, 1, 1), 0.05, device="cpu"))
        cell(torch.empty(1, 2, 5, 5))
    # This is to_empty(device="cpu") where the memory holds sevens.
    cell = copy.deepcopy(cell)._apply(lambda t: torch.full_like(t, 7, device="cpu"))
    assert cell.syn.shape == cell.mem.shape == (1, 3, 5, 5)
    assert not cell.syn.any()
    torch.manual_seed(0)
    cell.reset_parameters()
    other = ours(threshold=0.05)
    close(cell(steps(2, 1, 2, 5, 5)), other(steps(2, 1, 2, 5, 5)), atol=0, rtol=0)
    with torch.device("meta"):
        assigned = ours()
        assigned.reset_mechanism = "subtract"
        assert all(value.is_meta for value in assigned.state_dict().values())
    assigned.load_state_dict(ours(reset_mechanism="zero").state_dict(), assign=True)
    assert assigned.reset_mechanism == "zero"
    assert assigned(steps(2, 1, 2, 5, 5))[0].device.type == "cpu"


# ---- autocast -------------------------------------------------------------------------------


def one_call_a_step(cell: snnlstm.SConv2dLSTM, *args: Tensor) -> tuple:
    spks, syn, mem = loop(cell, *args)
    return torch.stack(spks), syn, mem


def functional(cell: snnlstm.SConv2dLSTM, x: Tensor, syn: Tensor, mem: Tensor) -> tuple:
    return snnlstm.functional.sconv2dlstm(
        x, syn, mem, cell.conv.weight, cell.conv.bias, threshold=cell.threshold
    )


FORMS = {"steps": one_call_a_step, "sequence": lambda cell, *args: cell(*args), "f": functional}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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
