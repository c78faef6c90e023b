"""The neurons alone, behind a convolution of torch's, emulated, against the float64 reference."""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, byref, c_double, c_int64, c_void_p

import pytest
import torch
from backend import DTYPES, POOLS, RESETS
from builder import HERE, ROOT, build
from emulator import EmulationError, Emulator, symbolise

from snnlstm import reference, surrogate
from snnlstm.options import CellOptions
from snnlstm.quant import state_quant

CUDA = ROOT / "csrc" / "cuda"
SOURCES = [*sorted(CUDA.glob("*.cu")), HERE / "kernels" / "neurons.cpp"]
N, C, H, W = 2, 5, 9, 14

pytestmark = pytest.mark.skipif(not (CUDA / "pointwise.cu").exists(), reason="no such kernels")


class View(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5)]


class Neurons(Structure):
    """As in kernels/neurons.cpp."""

    _fields_ = [
        *((n, c_int64) for n in ("dtype", "N", "C", "H", "W", "pool", "pool_h", "pool_w")),
        *((n, c_int64) for n in ("reset", "surrogate", "inhibition", "num_levels")),
        *((n, c_double) for n in ("p0", "p1", "graded")),
        ("gates", View),
        ("gate_type", c_int64),
        *((n, View) for n in ("syn0", "mem0")),
        *((n, c_void_p) for n in ("threshold", "levels", "saved_gates", "winner", "workspace")),
        *((n, View) for n in ("spk", "syn", "mem")),
        *((n, View) for n in ("grad_spk", "grad_syn", "grad_mem", "grad_syn0")),
        ("grad_threshold", c_void_p),
    ]


VIEWS = {name for name, kind in Neurons._fields_ if kind is View}


@functools.cache
def emulator(variant: str) -> Emulator:
    return Emulator(build("neurons", SOURCES, variant))


def call(core: Emulator, name: str, args: Neurons, given: dict, written: tuple[str, ...]) -> None:
    """Calls an entry with tensors by the names of their fields."""
    for field, t in given.items():
        if t is None:
            continue
        core.register(t.data_ptr(), t.untyped_storage().nbytes(), field, field in written)
        address = t.data_ptr()
        if field in VIEWS:
            strides = (c_int64 * 5)(*[0] * (5 - t.dim()), *t.stride())
            setattr(args, field, View(address, strides))
        else:
            setattr(args, field, address)
    try:
        function = getattr(core.lib, name)
        function.restype = ctypes.c_char_p
        if problem := function(byref(args)):
            raise EmulationError(symbolise(problem.decode()))
    finally:
        for t in given.values():
            if t is not None:
                core.unregister(t.data_ptr())


def nan(like: torch.Tensor, *shape: int) -> torch.Tensor:
    memory = torch.channels_last if like.stride(1) == 1 else torch.contiguous_format
    return torch.full(shape, float("nan"), dtype=like.dtype).contiguous(memory_format=memory)


def nan_bytes(count: int) -> torch.Tensor:
    return torch.full((max(count, 8),), 0xFF, dtype=torch.uint8)


def pretend(sums: torch.Tensor) -> dict:
    """Arguments that make the reference's convolution give just these sums: 1 x 1, with x = sums."""
    channels = sums.shape[1]
    weight = torch.zeros(channels, channels + channels // 4, 1, 1, dtype=sums.dtype)
    weight[:, :channels, 0, 0] = torch.eye(channels, dtype=sums.dtype)
    return {"x": sums, "weight": weight, "bias": None}


def run(options: CellOptions, dtype, gate_type, last: bool, seed: int = 0):
    """Kernels and reference; returns pairs (name, found, expected)."""
    torch.manual_seed(seed)
    order = torch.channels_last if last else torch.contiguous_format
    sums = torch.randn(N, 4 * C, H, W).to(gate_type).contiguous(memory_format=order)
    syn, mem = (torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=order) for _ in "sm")
    threshold = (torch.rand(C) * 0.3).to(dtype)
    (ph, pw), graded, quant = options.pool_size, 1.5, options.quant
    real = torch.float64 if dtype == torch.float64 else torch.float32
    args = Neurons(
        *(DTYPES[dtype], N, C, H, W, POOLS[options.pool], ph, pw, RESETS[options.reset]),
        *(options.surrogate.kind, options.inhibition, 0 if quant is None else len(quant.levels)),
        *(options.surrogate.p0, options.surrogate.p1, graded),
        gate_type=DTYPES[gate_type],
    )
    core = emulator("faults")
    core.schedule("ahead", seed)
    sizes = c_int64(), c_int64()
    core.lib.neurons_sizes(byref(args), *map(byref, sizes))
    given = {
        "gates": sums,
        "syn0": syn,
        "mem0": mem,
        "threshold": threshold,
        "levels": None if quant is None else quant.levels.to(real).contiguous(),
        "saved_gates": nan_bytes(sizes[0].value),
        "winner": torch.full((N,), -7) if options.inhibition else None,
        "spk": nan(sums.to(dtype), N, C, H // ph, W // pw),
        "syn": nan(syn, N, C, H, W),
        "mem": nan(mem, N, C, H, W),
    }
    call(core, "neurons_forward", args, given, ("spk", "syn", "mem", "saved_gates", "winner"))
    outputs = given["spk"], given["syn"], given["mem"]
    grads = [torch.randn_like(o) for o in outputs]
    back = {
        **{k: given[k] for k in ("syn0", "threshold", "levels", "saved_gates", "winner")},
        "gates": nan(sums, N, 4 * C, H, W),
        **dict(zip(("grad_spk", "grad_syn", "grad_mem"), grads, strict=True)),
        "grad_syn0": nan(syn, N, C, H, W),
        "grad_threshold": torch.full((C,), float("nan"), dtype=dtype),
        "workspace": nan_bytes(sizes[1].value),
    }
    written = "gates", "grad_syn0", "grad_threshold", "workspace"
    call(core, "neurons_backward", args, back, written)

    leaves = [t.double().requires_grad_() for t in (sums, syn, threshold.view(C, 1, 1))]
    exact = reference.run(
        **pretend(leaves[0]),
        syn=leaves[1],
        mem=mem.double(),
        threshold=leaves[2],
        graded=torch.tensor(graded, dtype=torch.float64),
        options=options,
    )
    wanted = torch.autograd.grad(exact, leaves, [g.double() for g in grads])
    names = "spk", "syn", "mem", "d gates", "d syn", "d threshold"
    found = *outputs, back["gates"], back["grad_syn0"], back["grad_threshold"].view(C, 1, 1)
    return list(zip(names, found, (*exact, *wanted), strict=True))


def options(**changes) -> CellOptions:
    return CellOptions((1, 1), **{"surrogate": surrogate.fast_sigmoid(2.0), **changes})


CASES = {
    "plain": options(),
    "subtract": options(reset="subtract"),
    "zero": options(reset="zero"),
    "max pool": options(reset="subtract", pool="max", pool_size=(2, 2)),
    "average pool": options(pool="avg", pool_size=(3, 2)),
    "one window": options(pool="max", pool_size=(9, 14)),
    "inhibition": options(inhibition=True),
    "inhibition, pooled": options(inhibition=True, pool="max", pool_size=(2, 2)),
    "quantised": options(quant=state_quant(num_bits=3, uniform=True), reset="subtract"),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("name", CASES)
def test_float32(name, last):
    for what, found, expected in run(CASES[name], torch.float32, torch.float32, last):
        error = (found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        assert error < 1e-5, f"{what}: {error}"


@pytest.mark.parametrize("name", ["subtract", "average pool"])
def test_float64(name):
    for what, found, expected in run(CASES[name], torch.float64, torch.float64, False):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-12, f"{what}: {error}"


@pytest.mark.parametrize(
    ("dtype", "gate_type"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_half_precision(dtype, gate_type, last):
    bound = 3e-2 if torch.bfloat16 in (dtype, gate_type) else 5e-3
    for what, found, expected in run(CASES["plain"], dtype, gate_type, last):
        if what == "spk":  # a mem that is rounded over its threshold
            assert (found.double() != expected).sum() <= 3
            continue
        error = (found.double() - expected).norm() / expected.norm()
        assert error < bound, f"{what}: {error}"
