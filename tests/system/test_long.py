"""Memory does not grow over many steps, iterations and cells, and long sequences stay accurate.

``make test-all`` runs ten times as many iterations.
"""

import os

import pytest
import snntorch
import torch

import snnlstm
from benchmarks import peak_memory
from tests.shared.cpu_kernels import native
from tests.shared.helpers import measures_memory, ours

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")

TIMES = 10 if os.environ.get("SNNLSTM_LONG") else 1
MIB = 1 << 20
MOST = 8 * MIB  # malloc's own memory may grow by this many bytes


def steps(cell, count):
    x = torch.rand(4, 1, 2, 24, 24)
    with torch.no_grad():
        for k in range(count):
            cell(x[k % 4])


def iterations(cell, count):
    x = torch.rand(4, 2, 2, 24, 24)
    optimizer = torch.optim.SGD(cell.parameters(), 1e-3)
    for _ in range(count):
        cell.reset_mem()
        loss = sum(spk.sum() + mem.square().mean() for spk, _, mem in map(cell, x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def made_and_dropped(cell, count):
    x = torch.rand(2, 2, 2, 24, 24)
    for k in range(count):
        other = ours(2, 16, 3, seed=k)
        other(x)[0].sum().backward()


@measures_memory
@pytest.mark.parametrize(
    ("work", "count"), [(steps, 2000), (iterations, 200), (made_and_dropped, 50)]
)
def test_memory_does_not_grow(work, count):
    """The growth is measured after a warm-up; a leak of states, cells or graphs exceeds MOST."""
    torch.set_num_threads(1)
    cell = ours(2, 16, 3)
    work(cell, count // 4)
    snnlstm.empty_cache()
    before = peak_memory.watch()
    work(cell, count * TIMES)
    snnlstm.empty_cache()
    grown = peak_memory.watch() - before
    assert grown < MOST, f"{grown / MIB:.1f} MiB more"
    assert len(snntorch.SpikingNeuron.instances) < 10


@pytest.mark.parametrize(("reset", "algorithm"), [("none", "direct"), ("subtract", "auto")])
def test_two_thousand_steps_stay_close_to_float64(reset, algorithm):
    """Errors stay below the bound of docs/numerics.md until a spike differs."""
    torch.set_num_threads(1)
    time = 2000
    cell = ours(2, 16, 3, reset_mechanism=reset, threshold=0.05)
    x = (torch.rand(time, 1, 2, 12, 12) < 0.2).float()
    options = {"threshold": 0.05, "reset_mechanism": reset, "record": True}

    def run(function, x, *parameters):
        weight, bias = parameters
        spk, _, mem = function(x, weight=weight, bias=bias, **options)
        return spk, mem.detach(), torch.autograd.grad(mem.square().sum(), parameters)

    own = cell.conv.weight, cell.conv.bias
    with snnlstm.algorithm(algorithm):
        spk, mem, grads = run(snnlstm.functional.sconv2dlstm, x, *own)
    doubles = (p.detach().double().requires_grad_() for p in own)
    exact_spk, exact, exact_grads = run(snnlstm.reference.sconv2dlstm, x.double(), *doubles)

    equal = (spk == exact_spk).flatten(1).all(1)
    end = time if equal.all() else int(equal.int().argmin())
    assert end > 50
    error = (mem - exact).abs().flatten(1).amax(1)
    assert error[:end].max() < 5e-7
    if end == time:
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert (grad - exact_grad).norm() < 2e-6 * exact_grad.norm()
    if reset == "none":  # without drift the last steps are as close as the first
        assert error[-50:].norm() < 3 * error[50:100].norm()
