"""The emulator's own kernels, built once per variant, with inputs and expected results."""

from __future__ import annotations

import functools

import numpy as np
from builder import KERNELS, build
from emulator import Emulator

SOURCES = sorted(KERNELS.glob("*.cu"))


@functools.cache
def own_kernels(variant: str) -> Emulator:
    return Emulator(build("own", SOURCES, variant))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns, rounded to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """As float32, rounded to nearest, ties away from zero."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def run_case(emulator: Emulator, name: str, bad: bool = False, given=None, out=None) -> None:
    """Runs a CASE of kernels/ on arrays of 64 or those given; raises EmulationError as reported."""
    given = np.arange(64, dtype=np.float32) if given is None else given
    out = np.zeros(64, np.float32) if out is None else out
    counter = np.zeros(1, np.uint32)
    with emulator.arrays(**{"in": given, "out": (out, "w"), "counter": (counter, "w")}):
        emulator.call("run_case", name, int(bad), given, out, counter)


def aligned(count: int) -> np.ndarray:
    """float32 zeros whose address is a multiple of 128."""
    raw = np.zeros(count + 32, np.float32)
    return raw[(-raw.ctypes.data % 128) // 4 :][:count]


def gemm(emulator: Emulator, M: int = 70, N: int = 40, K: int = 136, splits: int = 2):
    """Runs a product of bf16 matrices; returns (result, expected), float32 (M, N)."""
    rng = np.random.default_rng(M + N + K)
    a = to_bf16(rng.standard_normal((M, K)))
    b = to_bf16(rng.standard_normal((K, N)))
    parts = np.full((splits, M, N), np.nan, np.float32)
    d = np.full((M, N), np.nan, np.float32)
    with emulator.arrays(a=a, b=b, parts=(parts, "w"), d=(d, "w")):
        emulator.call("run_gemm", a, b, parts, d, M, N, K, splits)
    return d, from_bf16(a).astype(np.float64) @ from_bf16(b)


def box_sum(emulator: Emulator, H: int = 17, W: int = 21):
    """Returns (result, expected): 3x3 sums with zero padding."""
    x = np.random.default_rng(H * W).standard_normal((H, W)).astype(np.float32)
    y = np.full((H, W), np.nan, np.float32)
    with emulator.arrays(x=x, y=(y, "w")):
        emulator.call("run_box_sum", x, y, H, W)
    padded = np.pad(x.astype(np.float64), 1)
    return y, sum(padded[i : i + H, j : j + W] for i in range(3) for j in range(3))


def lstm_update(emulator: Emulator, n: int = 200):
    """Returns (result, expected), (2, n): syn and mem."""
    rng = np.random.default_rng(n)
    gates = rng.random((n, 4), np.float32)
    syn = rng.standard_normal(n).astype(np.float32)
    i, f, o, g = gates.T
    expected_syn = f * syn + i * g
    mem = np.full(n, np.nan, np.float32)
    with emulator.arrays(gates=gates, syn=(syn, "w"), mem=(mem, "w")):
        emulator.call("run_lstm_update", gates, syn, mem, n)
    return np.stack([syn, mem]), np.stack([expected_syn, o * np.tanh(expected_syn)])


def sum_all(emulator: Emulator, n: int = 3000, blocks: int = 5):
    """Returns (result, expected): a sum that the last block finishes."""
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    parts = np.full(blocks, np.nan, np.float32)
    counter = np.zeros(1, np.uint32)
    total = np.full(1, np.nan, np.float32)
    with emulator.arrays(x=x, parts=(parts, "w"), counter=(counter, "w"), sum=(total, "w")):
        emulator.call("run_sum_all", x, parts, counter, total, n, blocks)
    return total[0], x.astype(np.float64).sum()


def sum_columns(emulator: Emulator, rows: int):
    """Returns (result, expected): sums (50,) by atomics of as many blocks as there are rows."""
    x = np.random.default_rng(0).standard_normal((rows, 50)).astype(np.float32)
    sums = np.zeros(50, np.float32)
    with emulator.arrays(x=x, sums=(sums, "w")):
        emulator.call("run_sum_columns", x, sums, rows, 50)
    return sums, x.sum(0)
