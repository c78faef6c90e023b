"""Training keeps and inference takes as many bytes as the documentation says.

Memory does not grow over many steps, iterations and cells, and long sequences stay accurate.
``make test-all`` runs ten times as many iterations.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import snnlstm
from benchmarks import peak_memory
from snnlstm.native import lender
from snnlstm.quant import state_quant
from tests.shared import cases
from tests.shared.cases import Case, wanting_gradients
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import documented, measures_memory, ours

pytestmark = needs_core

# 16 channels are whole vectors on every instruction set, in float32 and in float64.
PLAIN = cases.PLAIN.but(time=10, in_channels=8, channels=16, height=12, width=13, record=False)
VARIANTS = {
    "plain": PLAIN,
    "recorded": PLAIN.but(record=True),
    "one step": PLAIN.but(time=1, sequence=False),
    "pooled": PLAIN.but(pool="max", pool_size=(2, 2)),
    "quantised": PLAIN.but(quant=state_quant(8)),
    "float64": PLAIN.but(dtype=torch.float64),
    "few spikes": PLAIN.but(density=0.03, spikes=True),
}


def storage(tensor: Tensor) -> tuple[int, int]:
    """Returns address and bytes of a tensor's memory."""
    return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def saved_bytes(run: Callable[..., Any], held: Iterable[Tensor | None], *inputs: Any) -> int:
    """Returns how many bytes autograd keeps that are neither in `held` nor in the outputs."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        address, size = storage(tensor)
        saved[address] = size
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(*inputs)
    assert saved
    addresses = {storage(t)[0] for t in (*held, *out) if t is not None}
    return sum(size for address, size in saved.items() if address not in addresses)


def state_bytes(case: Case) -> int:
    n, c, ho, wo = case.state_shape
    return n * c * ho * wo * case.dtype.itemsize


@pytest.mark.parametrize("name", VARIANTS)
def test_training_keeps_the_activated_gates_and_syn(kernels, name):
    """A step keeps four gates, syn, and a byte for each pixel of a max_pool; no more."""
    case = VARIANTS[name]
    (ph, pw), (n, c, ho, wo) = case.options.pool_size, case.state_shape
    pooled = n * c * (ho // ph) * (wo // pw) * (case.options.pool == "max")
    leaves = wanting_gradients(case.inputs())
    kept = saved_bytes(kernels.run, leaves, *leaves, case.options)
    assert kept == case.time * (5 * state_bytes(case) + pooled)


def test_a_sequence_in_chunks_keeps_states_alone():
    """Each chunk but the first keeps the two states before it."""
    cell, x, in_chunks = ours(), torch.rand(40, 2, 2, 6, 7), documented("in_chunks")
    kept = saved_bytes(lambda x: in_chunks(cell, x, 4), [x, *cell.parameters()], x)
    assert kept == 2 * 9 * cell.mem.nbytes


class Allocations(TorchDispatchMode):
    """Records the sizes of all memory that torch allocates, also of memory that it then frees."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        before = {storage(t)[0] for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and storage(tensor)[0] not in before | self._seen:
                self._seen.add(storage(tensor)[0])
                self.found.append(storage(tensor)[1])
        return out


def taken_in_inference(kernels, case: Case) -> tuple[int, int]:
    """Returns bytes of outputs, and of all else that a second call of inference allocates."""
    inputs = case.inputs()
    with torch.no_grad():
        kernels.run(*inputs, case.options)  # packs the weight
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lender, "SMALLEST", float("inf"))  # torch allocates all blocks
            patch.setattr(lender, "small", deque(maxlen=0))
            patch.setattr(lender, "workspace", lambda count: lender.empty((count,), torch.uint8))
            with Allocations() as taken:
                out = kernels.run(*inputs, case.options)
    outputs = sum(storage(o)[1] for o in out)
    return outputs, sum(taken.found) - outputs


def test_inference_takes_its_outputs_and_a_workspace_that_does_not_grow_with_time(kernels):
    sizes = {}
    for time in (2, 20, 200):
        outputs, others = taken_in_inference(kernels, PLAIN.but(time=time))
        spk = time * state_bytes(PLAIN)
        assert outputs == spk + 2 * state_bytes(PLAIN)
        # Each step has a counter of tasks, which takes a cache line.
        sizes[time] = others - 64 * time
    assert len(set(sizes.values())) == 1, sizes
    # The workspace holds a few states, and for each thread as many tiles as fit into its L2 cache.
    assert sizes[2] < 16 * state_bytes(PLAIN) + torch.get_num_threads() * (512 << 10)


# ---- long runs -----------------------------------------------------------------------------------

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
    assert not snntorch.SpikingNeuron.instances


@pytest.mark.parametrize(("reset", "algorithm"), [("none", "direct"), ("subtract", "auto")])
def test_two_thousand_steps_stay_close_to_float64(reset, algorithm):
    """Errors stay below the bound of docs/numerics.md until a spike differs."""
    torch.set_num_threads(1)
    time = 2000
    cell = ours(2, 16, 3, reset_mechanism=reset, threshold=0.05)
    x = (torch.rand(time, 1, 2, 8, 8) < 0.2).float()
    options = {"threshold": 0.05, "reset_mechanism": reset, "record": True}

    def run(algorithm, x, *parameters):
        weight, bias = parameters
        with snnlstm.algorithm(algorithm):
            spk, _, mem = snnlstm.functional.sconv2dlstm(x, weight=weight, bias=bias, **options)
        return spk, mem.detach(), torch.autograd.grad(mem.square().sum(), parameters)

    own = cell.conv.weight, cell.conv.bias
    spk, mem, grads = run(algorithm, x, *own)
    doubles = (p.detach().double().requires_grad_() for p in own)
    exact_spk, exact, exact_grads = run("reference", x.double(), *doubles)

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
