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


def half_gemm(emulator: Emulator, kind: str, M: int, N: int, K: int, splits: int = 1):
    """Runs a product of 16-bit matrices; returns (result, expected), float32 (M, N)."""
    rng = np.random.default_rng(M + N + K)
    a = rng.standard_normal((M, K)).astype(np.float32)
    b = rng.standard_normal((K, N)).astype(np.float32)
    if kind == "bf16":
        a_bits, b_bits = to_bf16(a), to_bf16(b)
        a, b = from_bf16(a_bits), from_bf16(b_bits)
    else:
        a_bits, b_bits = a.astype(np.float16), b.astype(np.float16)
        a, b = a_bits.astype(np.float32), b_bits.astype(np.float32)
    parts = np.full((splits, M, N), np.nan, np.float32)
    d = np.full((M, N), np.nan, np.float32)
    with emulator.arrays(a=a_bits, b=b_bits, parts=(parts, "w"), d=(d, "w")):
        emulator.call(f"gemm_{kind}", a_bits, b_bits, parts, d, M, N, K, splits)
    return d, a.astype(np.float64) @ b


def tf32_gemm(emulator: Emulator, M: int, N: int, K: int, exact: bool):
    """Returns (result, product of the rounded factors, product), (M, N)."""
    rng = np.random.default_rng(M + N + K)
    a = rng.standard_normal((M, K)).astype(np.float32)
    b = rng.standard_normal((N, K)).astype(np.float32)
    d = np.full((M, N), np.nan, np.float32)
    with emulator.arrays(a=a, b=b, d=(d, "w")):
        emulator.call("gemm_tf32", a, b, d, M, N, K, int(exact))
    rounded = to_tf32(a).astype(np.float64) @ to_tf32(b).astype(np.float64).T
    return d, rounded, a.astype(np.float64) @ b.astype(np.float64).T


def box_sum(emulator: Emulator, H: int, W: int):
    """Returns (result, expected): 3x3 sums with zero padding."""
    x = np.random.default_rng(H * W).standard_normal((H, W)).astype(np.float32)
    y = np.full((H, W), np.nan, np.float32)
    with emulator.arrays(x=x, y=(y, "w")):
        emulator.call("run_box_sum", x, y, H, W)
    padded = np.pad(x.astype(np.float64), 1)
    return y, sum(padded[i : i + H, j : j + W] for i in range(3) for j in range(3))


def lstm_update(emulator: Emulator, n: int):
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


def sum_all(emulator: Emulator, n: int, blocks: int):
    """Returns (result, expected): a sum that the last block finishes."""
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    parts = np.full(blocks, np.nan, np.float32)
    counter = np.zeros(1, np.uint32)
    total = np.full(1, np.nan, np.float32)
    with emulator.arrays(x=x, parts=(parts, "w"), counter=(counter, "w"), sum=(total, "w")):
        emulator.call("run_sum_all", x, parts, counter, total, n, blocks)
    return total[0], x.astype(np.float64).sum()
