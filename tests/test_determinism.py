"""Two runs give the same bits, in another process and in torch's deterministic mode.

tests/test_threads.py tests what depends on the number of threads.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import same
from torch import Tensor

import snnlstm

THREADS = (1, 2, 3)
ALGORITHMS = ("direct", "winograd")
# With many zeros in x the kernels skip the zeros; with few they do not.
DENSITIES = {"sparse": 0.05, "dense": 1.0}
OPTIONS = {
    "subtract": {"reset_mechanism": "subtract", "learn_threshold": True, "max_pool": 2},
    "inhibition": {"reset_mechanism": "zero", "inhibition": True, "checkpoint": True},
}


def train(density: float, options: dict) -> list[Tensor]:
    """Returns outputs, gradients and weights of two training steps on fixed numbers."""
    torch.manual_seed(4)
    cell = snnlstm.SConv2dLSTM(12, 16, 3, threshold=0.05, **options)
    x = torch.randn(3, 2, 12, 17, 18)
    x = torch.where(torch.rand(x.shape) < density, x, 0).requires_grad_()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    seen: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        cell.reset_mem()
        spk, syn, mem = cell(x)
        loss = (spk * spk.detach().cumsum(0)).sum() + (syn * mem).sum()
        loss.backward()
        optimizer.step()
        seen += [spk, syn, mem, x.grad, *(p.grad for p in cell.parameters()), *cell.parameters()]
        seen = [tensor.detach().clone() for tensor in seen]
    return seen


def bits(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def runs() -> Iterator[tuple[str, str]]:
    """Yields the name and a hash of the results of every combination."""
    for threads in THREADS:
        torch.set_num_threads(threads)
        for algorithm in ALGORITHMS:
            for density, value in DENSITIES.items():
                for option, options in OPTIONS.items():
                    with snnlstm.algorithm(algorithm):
                        yield (
                            f"{threads} {algorithm} {density} {option}",
                            bits(train(value, options)),
                        )


def test_a_fresh_process_gives_the_same_bits():
    code = "import json, test_determinism as t; print(json.dumps(dict(t.runs())))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    here, there = dict(runs()), json.loads(other.stdout)
    assert here == there
    assert len(set(here.values())) > len(DENSITIES) * len(OPTIONS)  # the runs do differ


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_torchs_deterministic_mode_is_met_and_changes_nothing(backend, density, option):
    """The mode raises or warns at operations that are not deterministic, and fills new memory."""
    if backend.name == "simt":
        pytest.skip("the emulated kernels know nothing of this mode")
    expected = train(DENSITIES[density], OPTIONS[option])
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = train(DENSITIES[density], OPTIONS[option])
    finally:
        torch.use_deterministic_algorithms(False)
    same(actual, expected)
