"""Users' loops leave what they leave eagerly, and their steps are computed together."""

import pytest

from tests.loops.compiled import BACKEND, as_eager
from tests.loops.networks import NETWORKS


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, training):
    network = NETWORKS[name]
    error = network.tolerance(training)
    calls = as_eager(
        network.made, *network.inputs(), training=training, atol=error, rtol=error, run=network.run
    )
    assert calls.graphs == 1
    if BACKEND == "snnlstm":
        assert {kind: calls[kind] for kind in network.calls} == network.calls
