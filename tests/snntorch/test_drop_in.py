"""Our cell works in the place of snnTorch's, without snnTorch, and with torch's own tools."""

import subprocess
import sys

import pytest
import snntorch
import torch
from helpers import close, ours, states, steps, theirs
from snntorch.functional import probe

import snnlstm

X, START = steps(1, 2, 2, 6, 6)[0], states(2, 3, 6, 6)


def test_the_calls_of_snntorchs_own_tests_of_the_cell():
    """snnTorch's test file checks sizes, reset_mechanism_val and hidden states by these calls."""
    x = torch.rand(2, 1, 1, 4, 4)
    cells = {reset: ours(1, 8, 3, reset_mechanism=reset) for reset in ("subtract", "zero", "none")}
    syn, mem = cells["none"].init_sconv2dlstm()
    for t in range(2):
        spk, syn, mem = cells["none"](x[t], syn, mem)
    assert spk.size() == syn.size() == mem.size() == (1, 8, 4, 4)
    for value, (reset, cell) in enumerate(cells.items()):
        assert cell.reset_mechanism_val == value
        cell.reset_mechanism = "none"
        assert cell.reset_mechanism_val == 2
        hidden = ours(1, 8, 3, init_hidden=True, reset_mechanism=reset)
        assert [hidden(x_t).size() for x_t in x] == [(1, 8, 4, 4)] * 2
    close(ours()(input_=X), theirs()(input_=X))


@pytest.mark.parametrize("name", ["syn", "mem", "threshold"])
def test_snntorchs_monitor_records_the_attributes_of_the_cell(name):
    records = []
    for cell in (ours(), theirs()):
        monitor = probe.AttributeMonitor(name, False, cell, instance=snntorch.SConv2dLSTM)
        cell(X)
        records.append(monitor.records)
    close(*records)
    with pytest.raises(AttributeError, match="'SConv2dLSTM' object has no attribute 'unknown'"):
        ours().unknown  # noqa: B018


def test_static_helpers():
    state = torch.ones(3, requires_grad=True) * 2
    snnlstm.SConv2dLSTM.zeros(state)
    assert not state.any()
    snnlstm.SConv2dLSTM.detach(state)
    assert not state.requires_grad


STEP = """
import logging, sys, torch, torch.nn as nn
logging.basicConfig(format="%(message)s")
import snnlstm
cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
cell(torch.zeros(1, 2, 5, 5))
snnlstm.SConv2dLSTM.reset_hidden(); snnlstm.SConv2dLSTM.detach_hidden()
snnlstm.SConv2dLSTM.init()
print(snnlstm.snntorch.Base.__module__)
net = snnlstm.Sequential(cell, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 2))
assert net(torch.zeros(4, 2, 2, 5, 5)).shape == (4, 2, 2)
for refused in (snnlstm.accelerate, snnlstm.restore, lambda model: snnlstm.patch()):
    try:
        refused(net)
    except ImportError as error:
        print(error)
snnlstm.unpatch()
assert not [name for name, module in sys.modules.items() if "snntorch." in name and module
            and not name.startswith("snnlstm")]
"""


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        (None, ""),
        ("raise OSError('no such library')", "snntorch is installed but does not import"),
        ("import a_module_that_is_missing", "snntorch is installed but does not import"),
        ("SConv2dLSTM = 3", ""),  # an old snnTorch has no such class
    ],
    ids=["missing", "broken", "half", "old"],
)
def test_a_missing_or_broken_snntorch_costs_no_more_than_its_features(tmp_path, stub, said):
    code = STEP
    if stub is None:
        code = "import sys; sys.modules['snntorch'] = None\n" + code
    else:
        (tmp_path / "snntorch.py").write_text(stub)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    base, *refused = done.stdout.splitlines()
    assert base == "torch.nn.modules.module"
    assert [line.split(", which")[0] for line in refused] == [
        f"{function}() needs snntorch" for function in ("accelerate", "restore", "patch")
    ]
    assert said in done.stderr


def test_it_imports_where_unix_modules_are_missing():
    code = "import sys, snntorch\nfor name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'):\n"
    code += "    sys.modules[name] = None\nimport os; del os.register_at_fork, os.fork\n"
    subprocess.run([sys.executable, "-c", code + "import snnlstm"], check=True)


def test_second_derivatives_are_those_of_snntorch(backend):
    """A penalty on gradients is differentiated through the states and through the surrogate."""
    penalties = []
    for cell in (ours(reset_mechanism="zero"), theirs(reset_mechanism="zero")):
        x = steps(2, 1, 2, 5, 5).requires_grad_()
        cell(x[0])
        spk, _, mem = cell(x[1])
        (grad,) = torch.autograd.grad(spk.sum() + mem.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        penalties.append((x.grad, cell.conv.weight.grad))
    close(*penalties, atol=1e-4, rtol=1e-4)


def test_gradcheck_of_syn_and_mem(backend):
    x = torch.randn(2, 1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    state = [s.double().requires_grad_() for s in states(1, 2, 2, 3)]
    weight = torch.randn(8, 3, 3, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def run(*args):
        return snnlstm.functional.sconv2dlstm(
            *args, stride=(2, 1), record=True, reset_mechanism="none", surrogate_disable=True
        )[1:]

    args = (x, *state, weight, bias)
    fast = backend.name == "simt"
    assert torch.autograd.gradcheck(run, args, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, args, atol=1e-4, fast_mode=fast)


def test_inference_mode_and_no_grad(backend):
    cell = ours(reset_mechanism="subtract")
    expected = ours(reset_mechanism="subtract")(X, *START)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            close(cell(X, *START), expected)
            assert cell.reset.shape == (2, 3, 6, 6)
            close(cell(X), theirs(reset_mechanism="subtract")(X, *expected[1:]))
        backend.check(cell.path)
