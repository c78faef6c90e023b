"""Where the elements of a matrix lie in the registers of a warp, against two other sources: the
formulas of the PTX ISA, written down here anew, and the traits of CuTe where it is installed
(`pip install nvidia-cutlass`)."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from own import own_kernels, to_bf16, to_tf32

# Position of the v-th element that a lane holds. PTX ISA, "Matrix Fragments for mma.m16n8k16 with
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


TYPES = {"fp16": (0, 16), "bf16": (1, 16), "tf32": (2, 8)}


def encode(x, kind):
    """Elements as the bit patterns that registers hold, and their values."""
    if kind == "fp16":
        half = x.astype(np.float16)
        return half.view(np.uint16).astype(np.uint32), half.astype(np.float64)
    if kind == "bf16":
        bits = to_bf16(x).astype(np.uint32)
        return bits, (bits << 16).view(np.float32).astype(np.float64)
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
    """(result, expected) of one mma whose operands were laid out with the given positions."""
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
    emulator = own_kernels("checked")
    with emulator.arrays(a=ra, b=rb, c=rc, d=(rd, "w")):
        emulator.call("probe_mma", number, ra, rb, rc, rd)
    d = np.full((16, 8), np.nan)
    for lane in range(32):
        for v in range(4):
            d[at_c(lane, v)] = rd[lane, v]
    return d, a @ b + c


def run_ldmatrix(transposed):
    tiles = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) + 1
    r = np.zeros((32, 4), np.uint32)
    emulator = own_kernels("checked")
    with emulator.arrays(tiles=tiles, r=(r, "w")):
        emulator.call("probe_ldmatrix", int(transposed), tiles, r)
    return tiles, r


@pytest.mark.parametrize("kind", TYPES)
def test_mma_follows_the_ptx_isa(kind):
    K = TYPES[kind][1]
    result, expected = run_mma(kind, ptx_a(K), ptx_b(K), ptx_c)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_a_slip_in_any_operand_is_seen(kind, operand):
    """Two registers that change places must not go unnoticed."""
    K = TYPES[kind][1]
    layouts = [ptx_a(K), ptx_b(K), ptx_c]
    right = layouts[operand]
    last = (7 if K == 16 else 3, 3 if K == 16 else 1, 3)[operand]
    layouts[operand] = lambda lane, v: right(lane, {0: last, last: 0}.get(v, v))
    result, expected = run_mma(kind, *layouts)
    # c is read and written through the same positions: as a whole it is only moved about.
    assert not np.allclose(result, expected, rtol=1e-3, atol=1e-3)


def test_tf32_ignores_the_lower_bits():
    a = np.zeros((32, 4), np.uint32)
    a[:] = np.float32(1).view(np.uint32) | 0x1FFF
    b = np.full((32, 2), np.float32(1).view(np.uint32), np.uint32)
    c, d = np.zeros((32, 4), np.float32), np.zeros((32, 4), np.float32)
    own_kernels("plain").call("probe_mma", 2, a, b, c, d)
    assert (d == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_follows_the_ptx_isa(transposed):
    tiles, r = run_ldmatrix(transposed)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            tile = tiles[i].T if transposed else tiles[i]
            assert r[lane, i] == tile[g, 2 * t] | np.uint32(tile[g, 2 * t + 1]) << 16


# ---- CuTe ---------------------------------------------------------------------------------------


def cute_header(name):
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("nvidia-cutlass is not installed")
    for root in spec.submodule_search_locations:
        for path in Path(root).rglob(f"cute/atom/{name}"):
            return re.sub(r"//[^\n]*", "", path.read_text())
    pytest.skip(f"nvidia-cutlass has no {name}")


def cute_struct(text, name):
    return re.search(r"struct \w+<" + name + r">[^{]*\{(.*?)\n\};", text, re.DOTALL)


def cute_tuple(text):
    """``Shape<Shape<_4,_8>,_2>`` as ((4, 8), 2)."""
    text = re.sub(r"(Shape|Stride)\s*<", "(", text).replace(">", ",)").replace("_", "")
    return eval(text, {"__builtins__": {}})


def cute_layout(text, body, name):
    """A function of (thread, value); aliases are looked up in the header."""
    found = re.search(r"using\s+" + name + r"\s*=\s*(.*?);", body, re.DOTALL)[1]
    if "Layout" not in found:
        found = re.search(r"using\s+" + found.strip() + r"\s*=\s*(.*?);", text, re.DOTALL)[1]
    shape, stride = re.fullmatch(
        r"\s*Layout\s*<(Shape.*?),\s*(Stride.*)>\s*", found, re.DOTALL
    ).groups()

    def index(coordinate, shape, stride):
        if not isinstance(shape, tuple):
            return coordinate * stride
        total = 0
        for extent, step in zip(shape, stride, strict=True):
            size = int(np.prod(extent))
            total += index(coordinate % size, extent, step)
            coordinate //= size
        return total

    shape, stride = cute_tuple(shape), cute_tuple(stride)
    return lambda t, v: index(t, shape[0], stride[0]) + index(v, shape[1], stride[1])


@pytest.mark.parametrize("kind", TYPES)
def test_mma_follows_cute(kind):
    text = cute_header("mma_traits_sm80.hpp")
    name = {
        "fp16": "SM80_16x8x16_F32F16F16F32_TN",
        "bf16": "SM80_16x8x16_F32BF16BF16F32_TN",
        "tf32": "SM80_16x8x8_F32TF32TF32F32_TN",
    }[kind]
    body = cute_struct(text, name)[0]
    while "ALayout" not in body:
        body = cute_struct(text, re.search(r":\s*MMA_Traits<(\w+)>", body)[1])[0]
    a, b, c = (cute_layout(text, body, f"{x}Layout") for x in "ABC")

    def place(layout, rows, swap=False):
        def at(lane, v):
            column, row = divmod(layout(lane, v), rows)  # CuTe counts rows fastest
            return (column, row) if swap else (row, column)

        return at

    # CuTe's B is (N, K).
    result, expected = run_mma(kind, place(a, 16), place(b, 8, swap=True), place(c, 16))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_follows_cute(transposed):
    text = cute_header("copy_traits_sm75.hpp")
    name = "SM75_U16x8_LDSM_T" if transposed else "SM75_U32x4_LDSM_N"
    layout = cute_layout(text, cute_struct(text, name)[0], "DstLayout")  # to bits
    tiles, r = run_ldmatrix(transposed)
    flat = tiles.reshape(-1)
    for lane in range(32):
        for i in range(4):
            for half in (0, 1):
                bit = layout(lane, 32 * i + 16 * half)
                assert (int(r[lane, i]) >> 16 * half) & 0xFFFF == flat[bit // 16]


# ---- conversions --------------------------------------------------------------------------------


def convert(kind, back, bits):
    bits = np.ascontiguousarray(bits, np.uint32)
    out = np.zeros_like(bits)
    own_kernels("plain").call("convert", TYPES[kind][0], back, bits, out, bits.size)
    return out


def some_floats():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100000, dtype=np.uint32)
    edges = np.array([0, 1, 0x7F800000, 0x7F7FFFFF, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF])
    near = np.concatenate([edges + d for d in (-1, 0, 1)])
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = np.concatenate([halves | 0x8000, halves | 0x1000, halves | 0x3000])
    return np.concatenate([bits, near.astype(np.uint32), near.astype(np.uint32) | 0x80000000, ties])


def test_fp16_conversions():
    bits = some_floats()
    x = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    expected = np.where(np.isnan(x), 0x7FFF, expected)
    np.testing.assert_array_equal(convert("fp16", 0, bits), expected)
    all_halves = np.arange(1 << 16, dtype=np.uint32)
    values = convert("fp16", 1, all_halves).view(np.float32)
    np.testing.assert_array_equal(values, all_halves.astype(np.uint16).view(np.float16))


def test_bf16_conversions():
    bits = some_floats()
    expected = np.where(np.isnan(bits.view(np.float32)), 0x7FFF, to_bf16(bits.view(np.float32)))
    np.testing.assert_array_equal(convert("bf16", 0, bits), expected)
    all_halves = np.arange(1 << 16, dtype=np.uint32)
    np.testing.assert_array_equal(convert("bf16", 1, all_halves), all_halves << 16)


def test_tf32_conversions():
    bits = some_floats()
    x = bits.view(np.float32)
    finite = np.isfinite(x)
    got = convert("tf32", 0, bits).view(np.float32)
    assert np.isnan(got[np.isnan(x)]).all()
    assert (got.view(np.uint32) & 0x1FFF == 0).all()
    # Half a unit of the 10-bit mantissa at most; ties away from zero.
    np.testing.assert_array_equal(got[finite].view(np.uint32), to_tf32(x[finite]).view(np.uint32))
