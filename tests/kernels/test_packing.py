"""A weight is packed once for each of its values, and an older value's packing is never used.

Neither the address nor the version counter of a tensor tells of all changes of its numbers:
``weight.data.add_(...)`` and ``torch._foreach_add_`` on ``.data`` change neither.
"""

import gc
import itertools
import pickle
import sys

import numpy
import pytest
import torch
from torch import Tensor, nn

import snnlstm
from snnlstm.calls.entries import BoundedDict
from snnlstm.native import cpu
from tests.shared.cpu_kernels import ISAS, Kernels, native, needs_core, use
from tests.shared.helpers import close, in_threads, ours, same

pytestmark = needs_core


@pytest.fixture(autouse=True)
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gives a test a cache of its own; returns the numbers of the layouts that are packed."""
    packed: list[int] = []
    pack = cpu.PackedWeight.pack

    def noting(self, key, size, run):
        packed.append(key[0])
        return pack(self, key, size, run)

    monkeypatch.setattr(cpu, "_packed", type(cpu._packed)())
    monkeypatch.setattr(cpu.PackedWeight, "pack", noting)
    return packed


def make(channels: int = 16) -> snnlstm.SConv2dLSTM:
    return ours(3, channels, 3, seed=3, threshold=0.05, reset_mechanism="subtract")


def call(cell: snnlstm.SConv2dLSTM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = cell(x, torch.zeros(0), torch.zeros(0))
    assert cell.path.native, str(cell.path)
    return out


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 7, generator=generator).to(dtype)


def by_optimizer(cell: snnlstm.SConv2dLSTM, **how: bool) -> None:
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5, **how)
    call(cell, image())[2].sum().backward()
    optimizer.step()


def by_assigning_load_state_dict(cell: snnlstm.SConv2dLSTM) -> None:
    state = {name: value.clone() for name, value in cell.state_dict().items()}
    state["conv.weight"] *= 1.5
    cell.load_state_dict(state, assign=True)


# Some changes write in place, with or without the version counter; some bring other memory.
CHANGES = {
    "optimizer": by_optimizer,
    "optimizer, foreach": lambda cell: by_optimizer(cell, foreach=True),
    "optimizer, fused": lambda cell: by_optimizer(cell, fused=True),
    "data.add_": lambda cell: cell.conv.weight.data.add_(0.1),
    "foreach on data": lambda cell: torch._foreach_add_([cell.conv.weight.data], 0.1),
    "numpy": lambda cell: numpy.multiply(w := cell.conv.weight.detach().numpy(), 1.5, out=w),
    "a view": lambda cell: cell.conv.weight.detach()[-1].zero_(),
    "other data": lambda cell: setattr(cell.conv.weight, "data", cell.conv.weight.data * 1.5),
    "load_state_dict": by_assigning_load_state_dict,
    "swapped contents": lambda cell: torch.utils.swap_tensors(
        cell.conv.weight, nn.Parameter(cell.conv.weight.detach() * 1.5)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight_is_used_at_once(name: str):
    """Results and gradients equal those of a cell that never saw the old weight."""
    cell, x = make(), image().requires_grad_()
    before = call(cell, x)
    (old,) = torch.autograd.grad(before[2].sum(), x)
    CHANGES[name](cell)
    fresh = make()
    fresh.load_state_dict(cell.state_dict())
    out, expected = call(cell, x), call(fresh, x)
    assert torch.equal(out[2], expected[2])
    assert not torch.allclose(out[1], before[1], atol=1e-3)
    (actual,), (wanted,) = (torch.autograd.grad(o[2].sum(), x) for o in (out, expected))
    assert torch.equal(actual, wanted)
    assert name.startswith("optimizer") or not torch.allclose(actual, old, atol=1e-3)


@pytest.mark.parametrize("channels", [16, 120], ids=["small", "by several threads"])
def test_one_changed_bit_is_seen(kernels, packings, channels):
    """A comparison of samples or sums of the weight would not see the bit."""
    cell, x = make(channels), image()
    with torch.no_grad():
        call(cell, x)
    once = len(packings)
    for place in (0, 1, cell.conv.weight.numel() // 2, -1):
        number = cell.conv.weight.data.view(-1)[place : place + 1 or None]
        number.view(torch.int32).bitwise_xor_(1)
        packings.clear()
        with torch.no_grad():
            call(cell, x)
        assert len(packings) == once, place


def test_a_weight_is_packed_once_for_each_of_its_values(kernels, packings):
    cell, x = make(), image()
    for value in range(3):
        packings.clear()
        for _ in range(4):  # the calls are steps, forward and backward
            (call(cell, x)[2].sum() + call(cell, x)[0].sum()).backward()
            with torch.no_grad():
                call(cell, x)
        assert packings, value
        assert len(packings) == len(set(packings)), value
        cell.conv.weight.data.mul_(1.1)


def test_each_instruction_set_and_algorithm_has_layouts_of_its_own():
    cell, x = make(), image()
    with snnlstm.algorithm("reference"):
        expected = cell(x)
    for isa, algorithm in 2 * list(itertools.product(ISAS, native.cpu.ALGORITHMS)):
        for _ in use(Kernels(isa, algorithm)):
            close(call(cell, x)[1:], expected[1:], atol=2e-5)


@pytest.mark.parametrize("cells", [1, 100])
def test_threads_that_share_a_weight_or_a_storage_of_more_weights_than_are_kept(cells, monkeypatch):
    """The cells have views of one buffer as weights, and images of other sizes in each thread."""
    monkeypatch.setattr(BoundedDict.__init__, "__defaults__", (64,))
    made = [make(4) for _ in range(cells)]
    for k, cell in enumerate(made):  # equal weights have one packed form
        cell.conv.weight.data.mul_(1 + k / 100)
    buffer = torch.stack([cell.conv.weight.detach() for cell in made])
    images = [image()[..., : k % 4 + 4] for k in range(20)]
    expected = [[call(cell, x) for x in images[:4]] for cell in made]
    for cell, view in zip(made, buffer, strict=True):
        cell.conv.weight.data = view

    def work(k: int) -> None:
        for _ in range(5):
            for n in range(k % cells, cells, 20):
                same(call(made[n], images[k]), expected[n][k % 4])

    sys.setswitchinterval(1e-5)
    in_threads(work, 20)
    assert max(map(len, cpu._packed.values()), default=0) < 64 + 20


def test_what_is_packed_dies_with_its_weight():
    cell, x = make(), image()
    for _ in range(3):
        call(cell, x)[2].sum().backward()
        cell.conv.weight.data.mul_(1.1)  # an old value is not kept, either
        out = snnlstm.functional.sconv2dlstm(x, weight=cell.conv.weight * 1, threshold=0.05)
        out[2].sum().backward()
    (places,) = (cpu._packed[key] for key in list(cpu._packed))
    (entry,) = places.values()
    assert len(entry.layouts) <= 6  # three layouts for each direction
    del out, cell, places, entry
    gc.collect()
    assert len(cpu._packed) == 0


def test_packed_weights_are_not_saved():
    cell, x = make(), image()
    sizes = []
    for _ in range(2):
        cell.syn, cell.mem = torch.zeros(0), torch.zeros(0)  # states would be saved
        sizes.append([len(pickle.dumps(what)) for what in (cell, cell.state_dict())])
        call(cell, x)
    weight = cell.conv.weight.numel() * 4
    assert all(two - one < weight / 4 for one, two in zip(*sizes, strict=True)), sizes
