"""Has Hypothesis draw the same examples for everybody, or fresh ones for ``make fuzz``.

The environment variable SNNLSTM_EXAMPLES chooses: unset for the former, "fresh" for the latter. A
failure prints the code that repeats it.
"""

import os
from collections.abc import Callable

import hypothesis
from hypothesis import HealthCheck

FRESH = os.environ.get("SNNLSTM_EXAMPLES") == "fresh"
_MORE = 10 if FRESH else 1

# No clock may decide, and no example that failed on one machine may come first there. `too_slow`
# is a clock.
_COMMON = hypothesis.settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis.settings.register_profile("default", _COMMON, derandomize=True)
hypothesis.settings.register_profile("fresh", _COMMON, max_examples=100 * _MORE)
hypothesis.settings.load_profile("fresh" if FRESH else "default")


def drawing(count: int, name: str) -> Callable[[Callable], Callable]:
    """Returns a decorator of functions with ``@given``, which then draw `count` examples.

    Each `name` has other examples. Fresh ones are ten times as many.
    """
    limits = hypothesis.settings(
        max_examples=count * _MORE, suppress_health_check=list(HealthCheck)
    )

    def decorate(function: Callable) -> Callable:
        return limits(function if FRESH else hypothesis.seed(name)(function))

    return decorate
