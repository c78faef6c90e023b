"""The elements of a matrix lie in the registers of a warp as the formulas of the PTX ISA say."""

import numpy as np
import pytest

from tests.emulator.own import from_bf16, own_kernels, to_bf16, to_tf32

# The emulator changes seldom.
pytestmark = pytest.mark.emulator_long

# The position of element v that a lane holds: PTX ISA, "Matrix Fragments for mma.m16n8k16 with
# floating point type" and "... for mma.m16n8k8".


def ptx_a(K):
    def at(lane, v):
        g, t = divmod(lane, 4)
        if K == 16:
            row = g if v < 2 or 4 <= v < 6 else g + 8
            return row, 2 * t + (v & 1) + (8 if v >= 4 else 0)
        return g + (8 if v in (1, 3) else 0), t + (4 if v >= 2 else 0)

    return at


def ptx_b(K):
    def at(lane, v):
        g, t = divmod(lane, 4)
        if K == 16:
            return 2 * t + (v & 1) + (8 if v >= 2 else 0), g
        return t + 4 * v, g

    return at


def ptx_c(lane, v):
    g, t = divmod(lane, 4)
    return (g if v < 2 else g + 8), 2 * t + (v & 1)


# Numbers of the probes, and K. sm_75 has K = 16 in two instructions.
TYPES = {"fp16": (0, 16), "bf16": (1, 16), "tf32": (2, 8), "fp16_sm75": (3, 16)}


def encode(x, kind):
    """The bit patterns of elements in registers, and the elements' values."""
    if kind in ("fp16", "fp16_sm75"):
        half = x.astype(np.float16)
        return half.view(np.uint16).astype(np.uint32), half.astype(np.float64)
    if kind == "bf16":
        bits = to_bf16(x)
        return bits.astype(np.uint32), from_bf16(bits).astype(np.float64)
    value = to_tf32(x)
    return value.view(np.uint32), value.astype(np.float64)


def scatter(elements, at, per_lane, packed):
    registers = np.zeros((32, per_lane // packed), np.uint32)
    for lane in range(32):
        for v in range(per_lane):
            shift = 16 * (v % packed)
            registers[lane, v // packed] |= np.uint32(int(elements[at(lane, v)]) << shift)
    return registers


def run_mma(kind, at_a, at_b, at_c):
    """(result, expected) of one mma whose operands have the given positions."""
    number, K = TYPES[kind]
    rng = np.random.default_rng(number)
    a_bits, a = encode(rng.standard_normal((16, K)).astype(np.float32), kind)
    b_bits, b = encode(rng.standard_normal((K, 8)).astype(np.float32), kind)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    packed = 2 if K == 16 else 1
    ra = scatter(a_bits, at_a, 4 * packed, packed)
    rb = scatter(b_bits, at_b, 2 * packed, packed)
    rc = scatter(c.view(np.uint32), at_c, 4, 1).view(np.float32)
    rd = np.zeros((32, 4), np.float32)
    emulator = own_kernels()
    emulator.reset()
    if kind == "fp16_sm75":
        emulator.settings.compute_capability = 75
    with emulator.arrays(a=ra, b=rb, c=rc, d=(rd, "w")):
        emulator.call("probe_mma", number, ra, rb, rc, rd)
    emulator.reset()
    d = np.full((16, 8), np.nan)
    for lane in range(32):
        for v in range(4):
            d[at_c(lane, v)] = rd[lane, v]
    return d, a @ b + c


def run_ldmatrix(transposed):
    tiles = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) + 1
    r = np.zeros((32, 4), np.uint32)
    emulator = own_kernels()
    with emulator.arrays(tiles=tiles, r=(r, "w")):
        emulator.call("probe_ldmatrix", int(transposed), tiles, r)
    return tiles, r


@pytest.mark.parametrize("kind", TYPES)
def test_mma_follows_the_ptx_isa(kind):
    K = TYPES[kind][1]
    result, expected = run_mma(kind, ptx_a(K), ptx_b(K), ptx_c)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_tf32_ignores_the_lower_bits():
    a = np.zeros((32, 4), np.uint32)
    a[:] = np.float32(1).view(np.uint32) | 0x1FFF
    b = np.full((32, 2), np.float32(1).view(np.uint32), np.uint32)
    c, d = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    own_kernels().call("probe_mma", 2, a, b, c, d)
    assert (d == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_follows_the_ptx_isa(transposed):
    tiles, r = run_ldmatrix(transposed)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            tile = tiles[i].T if transposed else tiles[i]
            assert r[lane, i] == tile[g, 2 * t] | np.uint32(tile[g, 2 * t + 1]) << 16


# ---- conversions --------------------------------------------------------------------------------


def convert(kind, back, bits):
    bits = np.ascontiguousarray(bits, np.uint32)
    out = np.zeros_like(bits)
    own_kernels().call("convert", TYPES[kind][0], back, bits, out, bits.size)
    return out


def some_floats():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100000, dtype=np.uint32)
    edges = np.array([0, 1, 0x7F800000, 0x7F7FFFFF, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF])
    near = np.concatenate([edges + d for d in (-1, 0, 1)])
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = np.concatenate([halves | 0x8000, halves | 0x1000, halves | 0x3000])
    return np.concatenate([bits, near.astype(np.uint32), near.astype(np.uint32) | 0x80000000, ties])


ALL_HALVES = np.arange(1 << 16, dtype=np.uint32)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_16_bit_conversions(kind):
    x = some_floats().view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        to = {"fp16": lambda x: x.astype(np.float16).view(np.uint16), "bf16": to_bf16}[kind]
        expected = np.where(np.isnan(x), 0x7FFF, to(x))
    np.testing.assert_array_equal(convert(kind, 0, x.view(np.uint32)), expected)
    values = convert(kind, 1, ALL_HALVES).view(np.float32)
    bits = ALL_HALVES.astype(np.uint16)
    exact = bits.view(np.float16) if kind == "fp16" else from_bf16(bits)
    np.testing.assert_array_equal(values, exact)


def test_tf32_conversions():
    bits = some_floats()
    x = bits.view(np.float32)
    finite = np.isfinite(x)
    got = convert("tf32", 0, bits).view(np.float32)
    assert np.isnan(got[np.isnan(x)]).all()
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    # Half a unit of the 10-bit mantissa at most; ties away from zero.
    np.testing.assert_array_equal(got[finite].view(np.uint32), to_tf32(x[finite]).view(np.uint32))
