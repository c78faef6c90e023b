"""The backward pass step by step, and the weight's gradient of all steps in one call.

Here the core is called as the shared autograd node of a loop over steps calls it: each step's
backward leaves the gradient of its gate sums behind, and one call forms the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import flat
import pytest
import torch
from backend import Core
from cases import Case
from gradients import compare
from gradients import gradients as of_reference
from modes import CASES, MODES, PLAIN, Mode

from snnlstm.call import make_call
from snnlstm.native import tensors
from snnlstm.native.tensors import view


@dataclass
class Calls:
    """Calls of the bindings, on tensors of one step (N, ...) or several (T, N, ...)."""

    core: Core
    case: Case
    mode: Mode

    def __post_init__(self) -> None:
        self.module = self.core.module
        self.signature = make_call((*self.case.inputs(), self.case.options)).signature
        self.target = self.core.kernels.target(self.signature, self.mode.precision == "tf32")
        self.gate_dtype = self.mode.operands or self.case.dtype
        self.padded = self.module.cuda_padded_channels(self.case.channels)

    def cell(self, time: int):
        return tensors.make_cell(self.module, self.signature, time)

    def memory(self, size: int) -> torch.Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def gates(self, time: int) -> torch.Tensor:
        n, _, ho, wo = self.case.state_shape
        return torch.full((time, n, ho, wo, 4, self.padded), torch.nan, dtype=self.gate_dtype)

    def pack(self, weight: torch.Tensor, backward: bool) -> torch.Tensor:
        cell, weight = self.cell(1), weight.contiguous()
        packed = self.memory(self.module.cuda_packed_bytes(cell, self.target, backward))
        self.module.cuda_pack_weight(
            cell, self.target, 0, weight.data_ptr(), backward, packed.data_ptr()
        )
        return packed

    def neurons(self, inputs) -> dict[str, int]:
        self.threshold = inputs.threshold.detach().to(self.case.dtype).reshape(-1).contiguous()
        computed = torch.promote_types(self.case.dtype, torch.float32)
        self.graded = inputs.graded.detach().to(computed)
        return {
            "threshold": self.threshold.data_ptr(),
            "threshold_stride": 0 if self.threshold.numel() == 1 else 1,
            "graded": self.graded.data_ptr(),
        }

    def forward_steps(self, inputs):
        """States before each step and after the last (T + 1, N, C, Ho, Wo); gates of each step."""
        time, cell = self.case.time, self.cell(1)
        packed = self.pack(inputs.weight, False)
        workspace = self.memory(self.module.cuda_workspace(cell, self.target, False))
        syn = torch.empty((time + 1, *self.case.state_shape), dtype=self.case.dtype)
        mem = torch.empty_like(syn)
        syn[0], mem[0] = inputs.syn, inputs.mem
        gates = self.gates(time)
        bias = None if inputs.bias is None else inputs.bias.contiguous()
        for t in range(time):
            spk = torch.empty(self.case.output_shapes[0][1:], dtype=self.case.dtype)
            self.module.cuda_forward(
                cell, self.target, 0, x=view(inputs.x[t]), syn0=view(syn[t]), mem0=view(mem[t]),
                weight=packed.data_ptr(), bias=0 if bias is None else bias.data_ptr(),
                spk=view(spk), syn=view(syn[t + 1]), mem=view(mem[t + 1]),
                saved_gates=gates[t].data_ptr(), workspace=workspace.data_ptr(),
                **self.neurons(inputs),
            )  # fmt: skip
        return syn, mem, gates

    def backward_steps(self, inputs, syn, mem, gates, grads, in_place: bool):
        """d_gates of every step, and the gradients of x, syn and mem."""
        time, cell = self.case.time, self.cell(1)
        packed = self.pack(inputs.weight, True)
        workspace = self.memory(self.module.cuda_data_workspace(cell, self.target))
        d_gates = gates if in_place else self.gates(time)
        grad_x = torch.empty(inputs.x.shape, dtype=self.case.dtype)
        grad_syn, grad_mem = grads[1][time - 1].clone(), grads[2][time - 1].clone()
        for t in reversed(range(time)):
            before = torch.empty_like(grad_syn), torch.empty_like(grad_mem)
            self.module.cuda_backward(
                cell, self.target, 0, x=view(inputs.x[t]), syn0=view(syn[t]), mem0=view(mem[t]),
                weight=packed.data_ptr(), saved_gates=gates[t].data_ptr(),
                d_gates=d_gates[t].data_ptr(), grad_spk=view(grads[0][t]),
                grad_syn=view(grad_syn), grad_mem=view(grad_mem), grad_x=view(grad_x[t]),
                grad_syn0=view(before[0]), grad_mem0=view(before[1]),
                workspace=workspace.data_ptr(), **self.neurons(inputs),
            )  # fmt: skip
            grad_syn, grad_mem = before
            if t > 0:
                grad_syn, grad_mem = grad_syn + grads[1][t - 1], grad_mem + grads[2][t - 1]
        return d_gates, {"x": grad_x, "syn": grad_syn, "mem": grad_mem}

    def weight_gradient(self, x, mem, d_gates, weight, *, of_weight=True, of_bias=True):
        """Gradients of weight and bias, over the steps of x."""
        cell = self.cell(len(x))
        workspace = self.memory(self.module.cuda_weight_workspace(cell, self.target))
        grad_weight = torch.empty(weight.shape, dtype=self.case.dtype) if of_weight else None
        grad_bias = torch.empty(len(weight), dtype=self.case.dtype) if of_bias else None
        self.module.cuda_weight_gradient(
            cell, self.target, 0, x=view(x), mem=view(mem), d_gates=d_gates.data_ptr(),
            grad_weight=0 if grad_weight is None else grad_weight.data_ptr(),
            grad_bias=0 if grad_bias is None else grad_bias.data_ptr(),
            workspace=workspace.data_ptr(),
        )  # fmt: skip
        return {"weight": grad_weight, "bias": grad_bias}


def step_by_step(core: Core, case: Case, mode: Mode, in_place: bool):
    """Gradients of x, syn, mem, weight and bias, and the output gradients that they belong to."""
    case = mode.of(case)
    core.device(mode.compute_capability)
    calls, inputs, grads = Calls(core, case, mode), case.inputs(), case.output_gradients()
    syn, mem, gates = calls.forward_steps(inputs)
    d_gates, found = calls.backward_steps(inputs, syn, mem, gates, grads, in_place)
    found |= calls.weight_gradient(inputs.x, mem[:-1], d_gates, inputs.weight)
    return found, inputs, grads


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("float64", "plain"),
        ("float32", "plain"),
        ("tf32x3", "max pool"),
        ("tf32", "wide"),
        ("tf32x3", "channels last"),
        ("float32", "stride, dilation"),
        ("tf32x3", "stride, dilation"),
        ("bfloat16 autocast", "plain"),
        ("float16 states", "channels last"),
    ],
)
def test_steps_and_one_weight_gradient_equal_the_reference(core, mode, name, in_place):
    core.schedule("ahead", 1)
    case = CASES[name]
    found, inputs, grads = step_by_step(core, case, MODES[mode], in_place)
    options = MODES[mode].of(case).options
    exact = of_reference(flat.reference, inputs.double(), options, grads, tuple(found))
    compare(found, exact, MODES[mode].gradient, grads)


@pytest.mark.parametrize("mode", ["float64", "tf32x3"])
def test_steps_equal_the_sequence(core, mode):
    """The same kernels sum the same numbers, from states rounded alike."""
    case = PLAIN.but(reset="subtract")
    found, inputs, grads = step_by_step(core, case, MODES[mode], in_place=True)
    case = MODES[mode].of(case)
    with MODES[mode].running(core):
        whole = of_reference(MODES[mode].run, inputs, case.options, grads, tuple(found))
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_only_one_of_both_is_wanted(core):
    mode, case = MODES["tf32"], MODES["tf32"].of(PLAIN)
    core.device(mode.compute_capability)
    calls, inputs = Calls(core, case, mode), case.inputs()
    generator = torch.Generator().manual_seed(0)
    d_gates = torch.randn(calls.gates(case.time).shape, generator=generator)
    d_gates[..., case.channels :] = 0
    mem = torch.randn((case.time, *case.state_shape), generator=generator)
    both = calls.weight_gradient(inputs.x, mem, d_gates, inputs.weight)
    for name in both:
        wanted = {f"of_{other}": other == name for other in both}
        one = calls.weight_gradient(inputs.x, mem, d_gates, inputs.weight, **wanted)
        assert torch.equal(one[name], both[name])
    exact = d_gates[..., : case.channels].double().sum((0, 1, 2, 3)).flatten()
    torch.testing.assert_close(both["bias"].double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("batch", [0, 1])
def test_no_steps_and_no_images_give_zeros(core, batch):
    mode = MODES["tf32"]
    case = mode.of(PLAIN.but(batch=batch))
    core.device(mode.compute_capability)
    calls, inputs = Calls(core, case, mode), case.inputs()
    time = 0 if batch else 2
    mem = torch.zeros((time, *case.state_shape))
    found = calls.weight_gradient(inputs.x[:time], mem, calls.gates(time), inputs.weight)
    assert not any(gradient.any() for gradient in found.values())


def test_a_step_takes_few_launches(core):
    mode = MODES["tf32"]
    core.checks(counters=True)
    core.reset_counters()
    step_by_step(core, CASES["channels last"], mode, in_place=True)
    seen = core.counters()
    time = CASES["channels last"].time
    launches = {name: c["launches"] for name, c in seen.items()}
    backward = {n: k for n, k in launches.items() if n.startswith(("backward", "data"))}
    assert backward == {"backward step (mma)": time, "data gradient (mma)": time}
    assert seen["weight gradient (mma)"]["launches"] == 1
    assert seen["sum gate gradients"]["launches"] == 1


def long_sums(core, mode_name: str, time: int, special: float | None = None):
    """Gradients of a 1x1 convolution of one channel, and what they should be in float64."""
    mode = MODES[mode_name]
    case = mode.of(PLAIN.but(kernel_size=(1, 1), time=time, batch=1, in_channels=1, channels=8,
                             height=32, width=32))  # fmt: skip
    calls, generator = Calls(core, case, mode), torch.Generator().manual_seed(1)
    x = torch.rand((time, 1, 1, 32, 32), generator=generator) + 0.5
    mem = torch.rand((time, 1, 8, 32, 32), generator=generator) + 0.5
    if special is not None:
        x[0, 0, 0, 3, 5] = special
    d_gates = torch.rand(calls.gates(time).shape, generator=generator).to(calls.gate_dtype) + 0.5
    found = calls.weight_gradient(x, mem, d_gates, torch.empty((32, 9, 1, 1)))
    inputs = torch.cat([x, mem], 2).double()
    exact = torch.einsum("tnyxgc,tniyx->gci", d_gates.double(), inputs).flatten(0, 1)
    return found["weight"].double().reshape(32, 9), exact


@pytest.mark.parametrize("mode", ["tf32", "tf32x3", "bfloat16 autocast"])
def test_long_sums_bear_tensor_cores_that_truncate(core, mode):
    """One accumulator over all of a block's tiles would shrink them by 5e-5 and more."""
    core.device(multiprocessors=1)
    core.checks(races=False)
    nearest, exact = long_sums(core, mode, time=128)
    core.truncate()
    found, _ = long_sums(core, mode, time=128)
    assert abs(float((found / nearest).mean()) - 1) < 6e-6
    assert float((found / exact - 1).abs().max()) < {"tf32x3": 6e-6}.get(mode, 1e-3)


def test_long_sums_without_tensor_cores(core):
    core.device(compute_capability=86, multiprocessors=1)
    core.checks(races=False)
    found, exact = long_sums(core, "float32", time=64)
    assert float((found / exact - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("mode", ["tf32", "tf32x3"])
def test_infinity_and_nan_come_out_as_they_are(core, mode, special):
    found, exact = long_sums(core, mode, 1, special)
    if mode == "tf32x3":  # low parts of either sign meet an infinity: it, or NaN
        assert torch.equal(found.isfinite(), exact.isfinite())
        found, exact = (torch.where(exact.isfinite(), t, 0) for t in (found, exact))
    torch.testing.assert_close(found, exact, atol=0, rtol=1e-3, equal_nan=True)
