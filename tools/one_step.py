"""Imports snnlstm and makes one training step, as a first test of each torch, NumPy and snnTorch.

``make versions`` runs this script in each of its environments. ``.ci/run`` runs it with versions
that are quick to install.
"""

import platform

import numpy as np
import torch

import snnlstm

try:
    import snntorch
except ImportError:
    snntorch = None

x = torch.from_numpy(np.random.default_rng(0).random((3, 2, 2, 8, 8), dtype=np.float32))
cell = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1)
cell(x)[0].sum().backward()
assert cell.path.native, cell.path
assert cell.conv.weight.grad.numpy().any()

if snntorch is not None:
    net = torch.nn.Sequential(snntorch.SConv2dLSTM(2, 4, 3, threshold=0.1, init_hidden=True))
    expected = net(x[0]).detach()
    snnlstm.accelerate(net)
    net[0].reset_mem()
    spk = net(x[0])
    spk.sum().backward()
    assert net[0].path.native, net[0].path
    assert (spk != expected).float().mean() < 0.01

python, theirs = platform.python_version(), getattr(snntorch, "__version__", "none")
print(
    f"Python {python}, torch {torch.__version__}, NumPy {np.__version__}, snnTorch {theirs}: ",
    end="",
)
print(cell.path)
