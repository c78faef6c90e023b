"""Tests what snnlstm.native.cuda asks of the core and of torch, on the emulated kernels."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import snnlstm
from snnlstm.calls import entries
from snnlstm.calls.entries import BoundedDict
from snnlstm.native import backends as native
from snnlstm.native import cuda, operators
from snnlstm.quant import state_quant
from tests.emulator.backend import float32_precision
from tests.emulator.modes import MODES, PLAIN
from tests.shared import flat
from tests.shared.cases import wanting_gradients
from tests.shared.fields import by_name, noted
from tests.shared.helpers import watched

TRAINED = PLAIN.but(reset="subtract", quant=state_quant(4))
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")


def train(case, inputs, algorithm="auto"):
    """Returns all outputs and gradients."""
    leaves = wanting_gradients(inputs)
    out = flat.run(*leaves, case.options, algorithm)
    grads = torch.autograd.grad(
        [o.float().square().sum() for o in out], [t for t in leaves if t is not None][:-1]
    )
    return *out, *grads


class Record(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
def test_nothing_waits_for_the_device(core, algorithm):
    """Therefore a CUDA graph can capture a call, forward and backward."""
    inputs = TRAINED.inputs()
    with core.installed(), Record() as record:
        train(TRAINED, inputs, algorithm)
    assert not record.seen & set(WAITING)
    with Record() as record:
        float(inputs.graded)
    assert record.seen & set(WAITING)


@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
def test_kernels_run_on_the_tensors_device_and_its_current_stream(core, monkeypatch, algorithm):
    guarded: list[torch.device] = []
    calls, asked = [], []

    @contextlib.contextmanager
    def guard(which):
        guarded.append(which)
        yield
        guarded.pop()

    def device(number):
        asked.append(number)
        return core.module.CudaDevice(80, 108, 163 * 1024)

    def note(name, place):
        method = getattr(core.module.CudaPass, name)

        def noted(*args, **kwargs):
            calls.append((name, list(guarded), args[place]))
            return method(*args, **kwargs)

        monkeypatch.setattr(core.module.CudaPass, name, noted)

    for name, place in {"pack": 3, "store_levels": -1, "run": 1}.items():
        note(name, place)
    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(cuda, "current_stream", lambda _: 77)
    monkeypatch.setattr(core.module, "cuda_device", device, raising=False)
    monkeypatch.setitem(native.BACKENDS, "cpu", cuda.Backend(core.module))
    train(TRAINED, TRAINED.inputs(), algorithm)
    packed = set() if algorithm == "cudnn" else {"pack"}
    assert {name for name, *_ in calls} == {"run", "store_levels"} | packed
    assert asked == [None]  # the number of this device
    for name, within, stream in calls:
        assert set(within) == {torch.device("cpu")}, name
        assert stream == 77, name


@pytest.mark.parametrize(
    ("precision", "capability", "dtype", "autocast", "algorithm", "expected"),
    [
        ("ieee", 80, torch.float32, None, "auto", "fma"),
        ("tf32", 80, torch.float32, None, "auto", "mma-tf32"),
        ("tf32", 75, torch.float32, None, "auto", "fma"),
        ("tf32", 75, torch.float16, None, "fused", "fma"),
        ("tf32", 75, torch.float32, torch.float16, "auto", "fma"),
        ("tf32", 75, torch.bfloat16, None, "fused", "fma"),
        ("tf32", 75, torch.float32, torch.bfloat16, "fused", "fma"),
        ("tf32", 80, torch.float64, None, "fused", "fma"),
        ("ieee", 80, torch.float16, None, "winograd", "mma-fp16"),
        ("ieee", 80, torch.bfloat16, None, "fused", "mma-bf16"),
        ("ieee", 80, torch.float32, torch.bfloat16, "fused", "mma-bf16"),
        ("ieee", 80, torch.float32, torch.float16, "fused", "mma-fp16"),
        ("ieee", 80, torch.float32, torch.float16, "cudnn", "cudnn"),
        ("tf32", 80, torch.float32, None, "fused", "mma-tf32"),
        ("tf32", 80, torch.float32, None, "direct", "mma-tf32"),
    ],
)
def test_what_multiplies_follows_torch(
    core, precision, capability, dtype, autocast, algorithm, expected
):
    core.device(capability)
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1).to(dtype)
    x = torch.zeros(1, 2, 5, 5, dtype=dtype)
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with core.installed(), float32_precision(precision), snnlstm.algorithm(algorithm), context:
        spk, syn, mem = cell(x)
    assert cell.path.name == f"emulator-{expected}"
    assert {spk.dtype, syn.dtype, mem.dtype} == {dtype}


@pytest.mark.parametrize(
    ("capability", "dtype", "autocast", "channels", "expected"),
    [
        (75, torch.float32, None, 87, "cudnn"),  # K is 9 * 89 = 801
        (75, torch.float32, None, 86, "fma"),
        (75, torch.float32, torch.float16, 87, "fma"),
        (75, torch.float64, None, 87, "fma"),
        (80, torch.float32, None, 87, "fma"),
    ],
)
def test_long_sums_of_float32_are_cudnns_on_a_t4(
    core, capability, dtype, autocast, channels, expected
):
    """It is the only choice by size; both passes make it."""
    core.device(capability)
    cell = snnlstm.SConv2dLSTM(2, channels, 3, threshold=0.1).to(dtype)
    x = torch.zeros(1, 2, 2, 2, dtype=dtype)
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with core.installed(), float32_precision("ieee"), context:
        cell(x)[2].sum().backward()
    assert cell.path.name == f"emulator-{expected}"


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_cudnn_convolves_x_with_mem_or_apart_if_it_has_a_stride(core, monkeypatch, stride):
    seen = watched(monkeypatch, cuda.cudnn, "_convolve")
    mode = replace(MODES["float32"], algorithm="cudnn")
    case = PLAIN.but(stride=stride)
    with mode.running(core), torch.no_grad():
        mode.run(*case.inputs(), case.options)
    of_step = [14] if stride == (1, 1) else [5, 9]
    assert [args[1].shape[1] for args, _ in seen] == of_step * case.time


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
@pytest.mark.parametrize(
    "mode", ["float32", pytest.param("bfloat16 autocast", marks=pytest.mark.emulator_long)]
)
def test_compiled_calls_equal_plain_ones(core, mode, algorithm):
    """Fake kernels know the sizes of what is saved."""
    case = PLAIN.but(time=2, batch=4, kernel_size=(1, 3))

    def run(*tensors):
        return flat.run(*tensors, case.options, algorithm)

    def trained(function):
        leaves = wanting_gradients(case.inputs())
        autocast = MODES[mode].operands
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = function(*leaves)
        return *out, *torch.autograd.grad(sum(o.sum() for o in out), leaves[:-1])

    with MODES[mode].running(core):
        actual = trained(torch.compile(run, fullgraph=True, backend="aot_eager"))
        expected = trained(run)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6, check_stride=True)


def test_a_call_of_half_types_copies_no_parameter(core):
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1, dtype=torch.float16)
    x = torch.rand(2, 1, 2, 5, 5, dtype=torch.float16)
    with MODES["float16 states"].running(core), Record() as record:
        cell(x)[0].sum().backward()
    assert cell.path.native
    assert "_to_copy" not in record.seen


def test_the_copy_of_a_weight_lives_as_long_as_its_pass_runs(core, monkeypatch):
    """The packing, which reads it, may still be queued."""
    copies, alive = [], []

    def noted(tensor, dtype):
        copies.append(weakref.ref(copy := contiguous_as(tensor, dtype)))
        assert copy is not tensor
        return copy

    contiguous_as, run = cuda.contiguous_as, core.module.CudaPass.run
    monkeypatch.setattr(cuda, "contiguous_as", noted)
    monkeypatch.setattr(
        core.module.CudaPass, "run", lambda *args: (alive.append(copies[-1]()), run(*args))
    )
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1).to(memory_format=torch.channels_last)
    with core.installed():
        cell(torch.rand(1, 2, 5, 5))[2].sum().backward()
    assert len(alive) == 2
    assert None not in alive


def test_calls_of_the_operator_share_no_plan_that_reads_numbers_otherwise(core):
    """A bias with strides is copied, whatever the numbers of the call before were."""
    case = PLAIN.but(dtype=torch.float16, graded=0.7)
    x, syn, mem, weight, bias, threshold, graded = case.inputs()
    text = f"{operators.LAYOUT_CHECKSUM}|{x.dtype}|None|{case.options.spec.serialized}"
    found = []
    with MODES["float16 states"].running(core):
        for each in (bias, torch.stack([bias, bias + 1], -1)[:, 0]):
            tensors = x, syn, mem, weight, each, threshold, graded.float()
            out = torch.ops.snnlstm.forward(*tensors, None, False, text, "auto", False)
            found.append(out[:3])
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_one_algorithm_reads_what_the_other_saved(core):
    inputs, options = PLAIN.inputs(), PLAIN.options
    graded = [torch.randn(shape) for shape in PLAIN.output_shapes]
    with MODES["float32"].running(core):
        found = []
        for first, second in permutations(("fused", "cudnn")):
            call = (*inputs, options)
            result = flat.forward(*call, True, first)
            found.append(flat.backward(call, result, graded, (True,) * 6, second))
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
def test_a_loop_of_steps_has_the_gradients_of_the_sequence(core, algorithm):
    cell = snnlstm.SConv2dLSTM(2, 5, 3, threshold=0.1)
    x = torch.rand(4, 2, 2, 7, 6)
    found = []
    with MODES["float32"].running(core), snnlstm.algorithm(algorithm):
        for steps in (x, x.unbind()):
            syn, mem = cell.reset_mem()
            spks = []
            for step in [steps] if steps is x else steps:
                spk, syn, mem = cell(step, syn, mem)
                spks.append(spk if steps is x else spk.unsqueeze(0))
            loss = torch.cat(spks).sum() + mem.square().sum()
            found.append(torch.autograd.grad(loss, cell.conv.parameters()))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_a_batch_without_steps_keeps_its_states_and_gives_no_gradient(core):
    cell, x = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), torch.ones(3, 7, 2, 5, 5)
    with core.installed():
        for lengths in (torch.zeros(7, dtype=torch.int32), [0] * 7):
            cell.reset_mem()
            spk, syn, mem = cell(x, lengths=lengths)
            assert not torch.cat([spk.flatten(), syn.flatten(), mem.flatten()]).any()
            (gradient,) = torch.autograd.grad(mem.sum(), cell.conv.weight)
            assert not gradient.any()


@pytest.mark.parametrize("training", [False, True])
def test_a_new_shape_plans_each_pass_once(core, monkeypatch, training):
    """Inference has no backward pass."""
    monkeypatch.setattr(entries, "table", BoundedDict())
    made, make = [], core.module.CudaPass

    def noted(*args, **kwargs):
        made.append(args[4])
        return make(*args, **kwargs)

    monkeypatch.setattr(core.module, "CudaPass", noted)
    cell, x = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1), torch.rand(2, 1, 2, 5, 7)
    with core.installed(), torch.set_grad_enabled(training):
        for _ in range(2):
            spk, _, _ = cell(x, *cell.reset_mem())
            if training:
                spk.sum().backward()
    assert made == [False, True][: 1 + training]  # backward


@pytest.mark.parametrize("training", [False, True])
def test_what_the_kernels_cannot_count_runs_on_the_reference_path(core, training):
    cell, x = (
        snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1, stride=(1, 1 << 25)),
        torch.rand(1, 2, 5, 7),
    )
    with core.installed(), torch.set_grad_enabled(training):
        found = [cell(x, *cell.reset_mem()) for _ in range(2)]
    assert cell.path.name == "reference"
    assert "of the columns is" in cell.path.reason
    with snnlstm.algorithm("reference"), torch.set_grad_enabled(training):
        torch.testing.assert_close(found[1], cell(x, *cell.reset_mem()), atol=0, rtol=0)


def test_the_built_core_serves_cuda_tensors_where_it_has_the_kernels():
    assert ("cuda" in native.DEVICES) == bool(native._C.build_info()["cuda_archs"])


@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
def test_fields_are_given_in_the_order_of_the_cores(core, monkeypatch, algorithm):
    """Every address is that of the tensor by whose name csrc/args.h calls it."""
    methods = ("run", "pack", "store_levels")
    calls = [watched(monkeypatch, core.module.CudaPass, name) for name in methods]
    monkeypatch.setattr(entries, "table", BoundedDict())
    case = TRAINED.but(time=1, batch=6, pool="max", pool_size=(2, 2), record=True)
    with core.installed(), noted() as found:
        train(case, case.inputs(), algorithm)
    given, weights, levels = ([args[2] for args, _ in seen] for seen in calls)
    absent = {"x", "mem0", "grad_x", "grad_mem0", "grad_weight", "grad_bias", "lengths"}
    for number, struct in enumerate(("ForwardArgs", "BackwardArgs")):
        fields, expected = by_name(struct, given[number]), found.expected[number]
        assert fields["levels"] == levels[number]
        assert fields["weight"] == (weights[number] if weights else 0)
        for name, value in fields.items():
            if name in expected and (value or algorithm == "fused" or name not in absent):
                at, wanted = (v[0] if isinstance(v, tuple) else v for v in (value, expected[name]))
                assert at == wanted, name
