"""The elements of a matrix lie in the registers of a warp as the formulas of the PTX ISA say."""

import numpy as np
import pytest
import torch

# The emulator changes seldom.
pytestmark = pytest.mark.emulator_long

# The rows and columns of the elements that each lane holds: PTX ISA, "Matrix Fragments for
# mma.m16n8k16 with floating point type" and "... for mma.m16n8k8". There g is groupID, and t is
# threadID_in_group.
g, t = np.divmod(np.arange(32)[:, None], 4)


def ptx_a(K):
    v = np.arange(K // 2)
    if K == 16:
        return np.where((v < 2) | (v == 4) | (v == 5), g, g + 8), 2 * t + v % 2 + 8 * (v >= 4)
    return np.where((v == 0) | (v == 2), g, g + 8), t + 4 * (v >= 2)


def ptx_b(K):
    v = np.arange(K // 4)
    return (2 * t + v % 2 + 8 * (v >= 2), g) if K == 16 else (t + 4 * v, g)


def ptx_c():
    v = np.arange(4)
    return np.where(v < 2, g, g + 8), 2 * t + v % 2


# Numbers of the probes, types of torch, and K.
TYPES = {
    "fp16": (0, torch.float16, 16), "bf16": (1, torch.bfloat16, 16), "tf32": (2, None, 8),
}  # fmt: skip


def to_tf32(x):
    """x, rounded to nearest, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def bits_of(x, dtype):
    """The bit patterns of x in a type of 16 bits, rounded to nearest even."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def values_of(bits, dtype):
    return torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()


def registers(elements, at, dtype):
    """Those of all lanes, (32, n), with the elements at these places."""
    if dtype is None:
        return np.ascontiguousarray(elements[at]).view(np.uint32)
    return np.ascontiguousarray(bits_of(elements[at], dtype)).view(np.uint32)


@pytest.mark.parametrize("kind", TYPES)
def test_mma_follows_the_ptx_isa(emulator, kind):
    number, dtype, K = TYPES[kind]
    rng = np.random.default_rng(number)
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, K), (K, 8), (16, 8)))
    a, b = (values_of(bits_of(x, dtype), dtype) if dtype else to_tf32(x) for x in (a, b))
    ra, rb = registers(a, ptx_a(K), dtype), registers(b, ptx_b(K), dtype)
    rc, rd = np.ascontiguousarray(c[ptx_c()]), np.zeros((32, 4), np.float32)
    with emulator.arrays(a=ra, b=rb, c=rc, d=(rd, "w")):
        emulator.call("probe_mma", number, ra, rb, rc, rd)
    d = np.full((16, 8), np.nan)
    d[ptx_c()] = rd
    np.testing.assert_allclose(d, a.astype(np.float64) @ b + c, rtol=1e-5, atol=1e-5)


def test_tf32_ignores_the_lower_bits(emulator):
    a = np.zeros((32, 4), np.uint32)
    a[:] = np.float32(1).view(np.uint32) | 0x1FFF
    b = np.full((32, 2), np.float32(1).view(np.uint32), np.uint32)
    c, d = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    emulator.call("probe_mma", 2, a, b, c, d)
    assert (d == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_follows_the_ptx_isa(emulator, transposed):
    tiles = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) + 1
    r = np.zeros((32, 4), np.uint32)
    with emulator.arrays(tiles=tiles, r=(r, "w")):
        emulator.call("probe_ldmatrix", int(transposed), tiles, r)
    for i, tile in enumerate(tiles.swapaxes(1, 2) if transposed else tiles):
        pairs = tile.astype(np.uint32)
        assert (r[:, [i]] == (pairs[g, 2 * t] | pairs[g, 2 * t + 1] << 16)).all()


# ---- conversions --------------------------------------------------------------------------------


def convert(emulator, kind, back, bits):
    out = np.zeros(bits.size, np.uint32)
    emulator.call("convert", TYPES[kind][0], back, bits, out, bits.size)
    return out


def some_floats():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100000, dtype=np.uint32)
    edges = np.array([0, 1, 0x7F800000, 0x7F7FFFFF, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF])
    near = np.concatenate([edges + d for d in (-1, 0, 1)])
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = np.concatenate([halves | 0x8000, halves | 0x1000, halves | 0x3000])
    return np.concatenate([bits, near.astype(np.uint32), near.astype(np.uint32) | 0x80000000, ties])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_16_bit_conversions(emulator, kind):
    bits, halves, dtype = some_floats(), np.arange(1 << 16, dtype=np.uint32), TYPES[kind][1]
    x = bits.view(np.float32)
    expected = np.where(np.isnan(x), 0x7FFF, bits_of(x, dtype))
    np.testing.assert_array_equal(convert(emulator, kind, 0, bits), expected)
    values = convert(emulator, kind, 1, halves).view(np.float32)
    np.testing.assert_array_equal(values, values_of(halves.astype(np.uint16), dtype))


def test_tf32_conversions(emulator):
    bits = some_floats()
    x = bits.view(np.float32)
    finite = np.isfinite(x)
    got = convert(emulator, "tf32", 0, bits).view(np.float32)
    assert np.isnan(got[np.isnan(x)]).all()
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    # Half a unit of the 10-bit mantissa at most; ties away from zero.
    np.testing.assert_array_equal(got[finite].view(np.uint32), to_tf32(x[finite]).view(np.uint32))
