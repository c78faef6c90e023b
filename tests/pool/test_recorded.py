"""What records a network finds torch's functions in the pools that are ours."""

import pytest
import torch
from torch import nn

import snnlstm
from tests.shared.left_to_torch import RECORDS

X = torch.randn(2, 3, 40, 44)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", RECORDS)
def test_whatever_records_a_pool_finds_torchs_function(way):
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True))
    expected = net(X)
    snnlstm.accelerate(net)
    made, found = RECORDS[way](net, X)
    assert torch.equal(made(X), expected)
    assert "max_pool2d" in found
    assert "avg_pool2d" in found
    assert "snnlstm" not in found
