"""exp, sigmoid and tanh of the CPU kernels have the errors of ERRORS, on every instruction set.

An error is measured against extended precision, in units in the last place (ulp): one ulp is the
distance of the two floats around the exact value. exp takes abs(x) > 87 (708 in float64) for 87
(708). For x < -87 (-708) sigmoid lies between 0 and 2e-38 (4e-308). NaN gives NaN.
"""

import numpy as np
import pytest

import snnlstm

_C = getattr(snnlstm, "_C", None)
pytestmark = [
    pytest.mark.skipif(not hasattr(_C, "cpu_evaluate"), reason="the core is not built for tests"),
    pytest.mark.skipif(
        np.finfo(np.longdouble).nmant <= 52, reason="no type here is wider than float64"
    ),
]

DTYPES = {
    "float32": (np.float32, 87.0),
    "float64": (np.float64, 708.0),
}
ERRORS = {"exp": 1.1, "sigmoid": 2.75, "tanh": 2.75}


def exact(function: str, x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.longdouble)
    if function == "sigmoid":
        # Nothing overflows or cancels at -|x|, and symmetry gives the values at |x|.
        half = np.exp(-np.abs(wide)) / (1 + np.exp(-np.abs(wide)))
        return np.where(wide < 0, half, 1 - half)
    return {"exp": np.exp, "tanh": np.tanh}[function](wide)


def arguments(kind: type, limit: float) -> np.ndarray:
    """Returns floats of every magnitude and sign, special floats, and their neighbours."""
    random = np.random.default_rng(0)
    bits, unsigned = (32, np.uint32) if kind is np.float32 else (64, np.uint64)
    any_bits = random.integers(0, 2**bits, 200_000, dtype=unsigned).view(kind)
    usual = random.normal(0, 4, 200_000).astype(kind)
    even = np.linspace(-1.1 * limit, 1.1 * limit, 200_001).astype(kind)
    halves = np.arange(-200, 200) * np.log(2) / 2  # the kernels' argument reduction jumps there
    info = np.finfo(kind)
    special = [0, limit, 20, 1, 0.5, info.tiny, info.smallest_subnormal, info.max, info.eps]
    special = np.concatenate([halves, special]).astype(kind)
    with np.errstate(over="ignore"):
        beside = [np.nextafter(special, kind(to)) for to in (-np.inf, np.inf)]
    positive = np.concatenate([any_bits, usual, even, special, *beside])
    return np.concatenate([positive, -positive, np.array([-np.inf, np.inf, np.nan], kind)])


def evaluate(function: str, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    dtype = [np.float32, np.float64].index(x.dtype)
    _C.cpu_evaluate(function, dtype, x.ctypes.data, out.ctypes.data, x.size)
    return out


def ulps(actual: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Returns the distances in units in the last place of the exact values."""
    size = np.abs(wide).astype(actual.dtype)
    size = np.where(size > np.abs(wide), np.nextafter(size, 0, dtype=size.dtype), size)
    return np.abs(actual - wide) / np.spacing(size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ERRORS)
def test_error_in_units_in_the_last_place(isa, function, dtype):
    kind, limit = DTYPES[dtype]
    x = arguments(kind, limit)
    x = x[np.isfinite(x)]
    if function == "exp":
        x = x[np.abs(x) <= limit]
    elif function == "sigmoid":
        x = x[x >= -limit]
    error = ulps(evaluate(function, x), exact(function, x))
    worst = int(error.argmax())
    assert error[worst] <= ERRORS[function], f"{error[worst]:.2f} ulp at {float(x[worst])!r}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_out_values_are_bounded(isa, dtype):
    kind, limit = DTYPES[dtype]
    x = arguments(kind, limit)
    far = x[x > limit]
    assert len(far) > 1000
    ceiling, floor = evaluate("exp", np.array([limit, -limit], kind))
    assert (evaluate("exp", far) == ceiling).all()
    assert (evaluate("exp", -far) == floor).all()
    small = evaluate("sigmoid", -far)
    assert ((small >= 0) & (small <= floor * kind(1.000001))).all()
    assert (evaluate("sigmoid", far) == 1).all()
    assert (evaluate("tanh", far) == 1).all()
    assert (evaluate("tanh", -far) == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ERRORS)
def test_nan_stays_nan_in_every_lane(isa, function, dtype):
    for count in range(1, 40):
        x = np.zeros(count, DTYPES[dtype][0])
        x[-1] = np.nan
        for sign in (1, -1):
            out = evaluate(function, x * sign)
            assert np.isnan(out[-1])
            assert (out[:-1] == exact(function, x[:-1])).all()
