"""Rounding errors are those that Winograd's transforms explain, and no larger."""

import flat
import numpy as np
import pytest
from cases import PLAIN
from rounding import UNIT, growth_of, transforms


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(4, 2), (4, 3), (5, 3), (6, 2), (6, 3), (6, 4), (7, 4), (8, 4)]
)
def test_transforms_convolve(inputs, outputs):
    random = np.random.default_rng(0)
    x, taps = random.standard_normal(inputs), random.standard_normal(inputs - outputs + 1)
    at, g, bt = transforms(inputs, outputs)
    np.testing.assert_allclose(at @ ((g @ taps) * (bt @ x)), np.correlate(x, taps), atol=1e-12)


@pytest.mark.parametrize(
    "kernel",
    [(1, 3), (3, 1), (1, 5), (5, 1), (7, 1), (3, 3), (3, 5), (5, 3), (5, 5), (7, 3), (7, 7)],
    ids=str,
)
@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_errors_grow_with_the_transforms_constants(isa, algorithm, kernel):
    """The root mean square of the errors of many random states lies near what is derived."""
    case = PLAIN.but(
        kernel_size=kernel, time=1, batch=3, in_channels=4, height=11, width=11, reset="none"
    )
    squares, count, growth = 0.0, 0, np.ones(1)
    for seed in range(12):
        inputs = case.but(seed=seed).inputs()
        found = flat.run(*inputs, case.options, algorithm)[1:]
        growth = growth_of(flat.last_name(), kernel)
        wanted = flat.reference(*inputs.double(), case.options)[1:]
        for actual, exact in zip(found, wanted, strict=True):
            squares += float((actual.double() - exact).square().sum())
            count += exact.numel()
    expected = UNIT * np.sqrt(np.square(growth).mean())
    share = (squares / count) ** 0.5 / expected
    assert ("winograd" in flat.last_name()) == (algorithm == "winograd")
    assert 0.2 < share < (0.5 if algorithm == "winograd" else 1.0)
