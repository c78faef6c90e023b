"""Users' loops leave what they leave eagerly, and their steps are computed together."""

import pytest

from tests.loops.compiled import BACKEND, as_eager
from tests.loops.networks import NETWORKS, Network

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def check(network: Network, training: bool, times: int = 1, **options):
    tolerance = 0.0 if network.exact else 1e-10
    return as_eager(
        network.made, *network.inputs(), training=training, atol=tolerance, rtol=tolerance,
        run=network.run, times=times, **options,
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, training):
    calls = check(NETWORKS[name], training)
    assert calls.graphs == 1
    if BACKEND == "snnlstm":
        expected = NETWORKS[name].expected(training)
        assert {kind: calls[kind] for kind in expected} == expected
