"""On the CPU torch convolves where that is estimated to be faster, in the type of autocast."""

import pytest
import torch
from cpu_kernels import native

import snnlstm
from snnlstm import call
from snnlstm.native import cpu, torch_conv

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

WIDE, NARROW = (48, 64, 12), (2, 4, 12)  # Cin, C and the side of the images


@pytest.fixture(autouse=True)
def one_thread_and_fresh_plans(monkeypatch):
    monkeypatch.setattr(call, "_signatures", {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def convolved(monkeypatch) -> list[torch.dtype]:
    """Returns the types in which torch convolves for the cells of a test."""
    seen, own = [], torch_conv._convolve

    def convolve(plan, x, mem, weight):
        sums = own(plan, x, mem, weight)
        assert {t.dtype for t in (x, mem, weight)} == {sums.dtype}
        seen.append(sums.dtype)
        return sums

    monkeypatch.setattr(torch_conv, "_convolve", convolve)
    return seen


def train(cell: snnlstm.SConv2dLSTM, x: torch.Tensor, narrow: bool = False) -> list[torch.Tensor]:
    """Returns mem and the gradients, with `narrow` under autocast to bfloat16."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        _, syn, mem = cell(leaf)
    leaves = leaf, *cell.conv.parameters()
    return [mem.detach(), *torch.autograd.grad((syn * mem).sum(), leaves)]


def cell_and_input(cin: int, c: int, side: int) -> tuple[snnlstm.SConv2dLSTM, torch.Tensor]:
    torch.manual_seed(0)
    return snnlstm.SConv2dLSTM(cin, c, 3, threshold=0.1), torch.randn(3, 4, cin, side, side)


def set_rate(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """Lets torch convolve in every type, so many times as fast as in float32."""
    found = rate, rate
    monkeypatch.setattr(torch_conv, "rates_on_cpu", lambda wanted, *_: (wanted, wanted, found))
    call._signatures.clear()  # and with them the plans


def names_of(x: torch.Tensor, cell: snnlstm.SConv2dLSTM, rate: float) -> tuple[str, str]:
    """Returns what the estimate chooses for the forward and the backward pass."""
    t, n, cin, h, w = x.shape
    facts = {"T": t, "N": n, "Cin": cin, "C": cell.out_channels, "H": h, "W": w}
    of_cell = snnlstm._C.Cell(
        **facts, dtype=0, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), pool=0, pool_size=(1, 1),
        reset=2, surrogate=1, p0=2.0, p1=0.0, inhibition=False, num_levels=0,
    )  # fmt: skip
    plan = snnlstm._C.CpuPlan(of_cell, 0, 1.0, 8, 1, (rate, rate))
    return plan.name, plan.backward_name


def test_a_wide_layer_under_autocast_leaves_the_convolution_to_torch(monkeypatch, convolved):
    """It has torch's errors of bfloat16, and keeps no copy of a weight that no kernel reads."""
    cell, x = cell_and_input(*WIDE)
    expected = train(cell, x)
    set_rate(monkeypatch, 100)
    cell, _ = cell_and_input(*WIDE)
    before = len(cpu._packed)
    found = train(cell, x, narrow=True)
    assert cell.path.name == f"cpu-{cpu.isa}-pointwise"
    assert convolved == [torch.bfloat16] * 3
    assert len(cpu._packed) == before
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert 1e-5 < (one - other).norm() / other.norm() < 2e-2


def test_a_narrow_layer_keeps_the_kernels(monkeypatch, convolved):
    set_rate(monkeypatch, 100)
    cell, x = cell_and_input(*NARROW)
    train(cell, x, narrow=True)
    assert "pointwise" not in cell.path.name
    assert not convolved


def test_without_instructions_for_bfloat16_torch_convolves_in_float32(monkeypatch, convolved):
    monkeypatch.setattr(torch_conv, "_bfloat16_rate", lambda: 0)
    cell, x = cell_and_input(*WIDE)
    with snnlstm.algorithm("pointwise"):
        train(cell, x, narrow=True)
    assert cell.path.name == f"cpu-{cpu.isa}-pointwise"
    assert convolved == [torch.float32] * 3


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize("checkpoint", [False, True, "gates"])
def test_one_pass_may_be_left_to_torch_alone(monkeypatch, side, checkpoint):
    """Each algorithm reads what another has saved, and the path names both."""
    cell, x = cell_and_input(*WIDE[:2], side)
    cell = snnlstm.SConv2dLSTM(*WIDE[:2], 3, threshold=0.1, checkpoint=checkpoint)
    expected = train(cell, x)
    rates = (k / 20 for k in range(1, 400))
    rate = next(r for r in rates if names_of(x, cell, r).count("pointwise") == 1)
    set_rate(monkeypatch, rate)
    again = snnlstm.SConv2dLSTM(*WIDE[:2], 3, threshold=0.1, checkpoint=checkpoint)
    again.load_state_dict(cell.state_dict())
    found = train(again, x)
    if checkpoint is not True:  # the segments have names of their own
        assert again.path.name == f"cpu-{cpu.isa}-" + "+".join(names_of(x, cell, rate))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < (1e-3 if checkpoint == "gates" else 1e-4) * other.norm()


def test_torch_compile_keeps_to_the_algorithm(convolved):
    cell, x = cell_and_input(*NARROW)
    with snnlstm.algorithm("pointwise"):
        expected = train(cell, x)
        cell.reset_mem()
        found = train(torch.compile(cell, backend="aot_eager"), x)
    assert len(convolved) == 6
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
