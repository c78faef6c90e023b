"""Equal calls have bitwise equal results, in any process and mode, beside any other callers.

Outputs do not depend on the number of threads, either.
"""

import hashlib
import itertools
import sys
import threading
import time
import warnings

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
import snnlstm.dispatch.run
from snnlstm.calls.entries import BoundedDict
from tests.shared import flat
from tests.shared.cases import PLAIN, Case, wanting_gradients
from tests.shared.cpu_kernels import Kernels, native, needs_core
from tests.shared.fresh import HANG
from tests.shared.gradients import leaves_and_gradients, total
from tests.shared.helpers import beside, close, in_processes, ours, same

pytestmark = needs_core

# A step has work for seven threads: threads.h gives each thread some 200,000 products.
LARGE = PLAIN.but(time=2, batch=4, in_channels=8, channels=16, height=16, width=18)
CASES = {
    "large": LARGE,
    "one sample": LARGE.but(batch=1, height=130, width=41),
    "pooled": LARGE.but(pool="max", pool_size=(3, 2)),
    "strided": LARGE.but(stride=(2, 1), height=33),
    "few spikes": LARGE.but(density=0.03, spikes=True, in_channels=17),
    "5x5": LARGE.but(kernel_size=(5, 5)),
    "float64": LARGE.but(dtype=torch.float64, batch=2),
    "small": LARGE.but(batch=1, height=4, width=4, channels=3),
}
THREADS = (1, 2, 3, 7)


def train(kernels, case: Case, threads: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Returns outputs and gradients; `threads` may change before the backward pass."""
    leaves, grads = leaves_and_gradients(case)
    out = kernels.run(*leaves, case.options)
    torch.set_num_threads(threads or torch.get_num_threads())
    return [o.detach() for o in out], list(torch.autograd.grad(total(out, grads), leaves[:6]))


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_of_threads(name, algorithm):
    """Outputs are equal to the bit, and so are gradients for one number of threads."""
    kernels, case = Kernels(native.cpu.isa, algorithm), CASES[name]
    first = None
    for count in THREADS:
        torch.set_num_threads(count)
        out, grads = train(kernels, case)
        again = train(kernels, case)
        same(out + grads, again[0] + again[1])
        changed = train(kernels, case, count % 3 + 2)[1]
        if first is None:
            first = out, grads
        same(out, first[0])
        for *actual, expected in zip(grads, changed, first[1], strict=True):
            scale = float(expected.abs().max())
            close(actual, [expected] * 2, atol=1e-5 * scale, rtol=0)


def hashes() -> dict[str, str]:
    """Returns hashes of the results of some cases, algorithms and numbers of threads."""
    found, names = {}, ("pooled", "few spikes", "small")
    for count, algorithm, name in itertools.product((1, 3), ("direct", "winograd"), names):
        torch.set_num_threads(count)
        out, grads = train(Kernels(native.cpu.isa, algorithm), CASES[name])
        data = b"".join(t.contiguous().numpy().tobytes() for t in out + grads)
        found[f"{name}, {algorithm}, {count}"] = hashlib.sha256(data).hexdigest()
    return found


def have_the_same_bits(_: int, expected: dict[str, str]) -> None:
    assert hashes() == expected


def test_a_fresh_process_gives_the_same_bits():
    here = hashes()
    in_processes(have_the_same_bits, here)
    assert len(set(here.values())) >= len(here) / 2  # the two algorithms differ


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {"reset_mechanism": "subtract", "learn_threshold": True, "max_pool": 2},
        {"reset_mechanism": "zero"},
    ],
    ids=["subtract", "zero"],
)
def test_deterministic_mode_raises_nothing_and_changes_no_bit(backend, density, options):
    """The mode raises or warns at operations that are not deterministic, and fills new memory."""
    if backend.name == "emulator":
        pytest.skip("the emulated kernels know nothing of this mode")

    def two_steps() -> list[Tensor]:
        cell = ours(12, 16, 3, seed=4, threshold=0.05, **options)
        x = torch.randn(3, 2, 12, 17, 18)
        x = torch.where(torch.rand(x.shape) < density, x, 0).requires_grad_()
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        for _ in range(2):
            cell.reset_mem()
            spk, syn, mem = cell(x)
            ((spk * spk.detach().cumsum(0)).sum() + (syn * mem).sum()).backward()
            optimizer.step()
        return [spk, syn, mem, x.grad, *(p.grad for p in cell.parameters()), *cell.parameters()]

    expected = two_steps()
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = two_steps()
    finally:
        torch.use_deterministic_algorithms(False)
    same(actual, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_gil_is_released(direction, monkeypatch):
    """Python goes on in another thread while the core works."""
    torch.set_num_threads(1)
    case = LARGE.but(time=200, channels=32, record=False)
    leaves, function = wanting_gradients(case.inputs()), snnlstm._C.CpuPass.run
    working, seen = threading.Event(), []

    def watched(a_pass, fields):
        if a_pass.backward == (direction == "backward"):
            working.set()
        try:
            return function(a_pass, fields)
        finally:
            working.clear()

    def look() -> None:
        seen.append(working.is_set())
        time.sleep(0.0005)

    monkeypatch.setattr(snnlstm._C.CpuPass, "run", watched)
    monkeypatch.setattr(snnlstm.calls.entries, "table", BoundedDict())  # plans keep functions
    with beside(look):
        sys.setswitchinterval(HANG)  # Python takes the GIL from no thread that does not release it
        limit = time.monotonic() + HANG  # on a busy machine the other thread may miss many calls
        while not any(seen) and time.monotonic() < limit:
            flat.run(*leaves, case.options)[2].sum().backward()
    assert any(seen)


def test_layers_come_and_go_while_another_thread_resets_all():
    """Neither library's walk over all layers may stumble over one that comes or goes meanwhile."""
    kinds = [getattr(lib, name) for lib in (snntorch, snnlstm) for name in ("SConv2dLSTM", "Leaky")]

    def walk() -> None:
        for kind in (*kinds, snntorch.Synaptic):
            kind.reset_hidden()
            kind.detach_hidden()

    with beside(walk):
        sys.setswitchinterval(1e-5)
        for _ in range(30):
            made = [ours(), snnlstm.Leaky(0.9), snntorch.Leaky(0.9), snntorch.Synaptic(0.9, 0.8)]
            snnlstm.accelerate(torch.nn.Sequential(*made))
            del made
    assert {type(one) for one in snntorch.SpikingNeuron.instances} == {snntorch.Synaptic}
