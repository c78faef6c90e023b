"""Our cell takes the place of snnTorch's: its calls, patch(), checkpoints; and without snnTorch."""

import copy
from pathlib import Path

import pytest
import snntorch
import torch
from snntorch import utils
from snntorch.functional import probe
from torch import nn

import snnlstm
from tests.shared.fresh import fresh
from tests.shared.helpers import close, ours, quietly, steps, theirs

X = steps(1, 2, 2, 6, 6)[0]
# A file of an earlier release has for each cell its arguments, its state_dict, an input of three
# steps and their last results.
DATA = Path(__file__).parents[1] / "shared" / "data"
FILES = ("snntorch-0.9.4.pt", "snntorch-1.0.0.pt", "snnlstm-0.1.0.pt")


def test_x_may_have_snntorchs_name():
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
print(snnlstm.compat.snntorch.Base.__module__)
net = snnlstm.Sequential(cell, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 2))
assert net(torch.zeros(4, 2, 2, 5, 5)).shape == (4, 2, 2)
for refused in (snnlstm.accelerate, lambda model: snnlstm.patch()):
    try:
        refused(net)
    except ImportError as error:
        print(error)
snnlstm.unpatch()
assert not {"Leaky", "TheirLeaky"} & {*vars(snnlstm), *snnlstm.__all__}
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
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    base, *refused = done.stdout.splitlines()
    assert base == "torch.nn.modules.module"
    assert [line.split(", which")[0] for line in refused] == [
        f"{function}() needs snntorch" for function in ("accelerate", "patch")
    ]
    assert said in done.stderr


def test_it_imports_where_unix_modules_are_missing():
    code = "import sys, snntorch\nfor name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'):\n"
    code += "    sys.modules[name] = None\nimport os; del os.register_at_fork, os.fork\n"
    assert fresh(code + "import snnlstm").returncode == 0


# ---- patch ----------------------------------------------------------------------------------


class Mine(snntorch.SConv2dLSTM):
    pass


early = snntorch.SConv2dLSTM  # the name was imported before patch()


@pytest.fixture
def patched():
    with snnlstm.patch() as handle:
        yield handle


def test_patch_makes_every_new_cell_ours_whoever_imported_the_name(patched):
    from snntorch import SConv2dLSTM
    from snntorch._neurons.sconv2dlstm import SConv2dLSTM as inner

    for cell in (early, SConv2dLSTM, inner, snntorch.SConv2dLSTM):
        torch.manual_seed(0)
        made = cell(2, 3, 3, threshold=0.1, reset_mechanism="zero", stride=1)
        assert type(made) is snnlstm.SConv2dLSTM
        close(made(X), ours(reset_mechanism="zero")(X))


def test_patch_leaves_old_cells_and_subclasses_alone():
    old = theirs()
    with snnlstm.patch():
        model = nn.Sequential(old, theirs())
        assert [type(cell) for cell in model] == [snntorch.SConv2dLSTM, snnlstm.SConv2dLSTM]
        assert all(isinstance(cell, snntorch.SConv2dLSTM) for cell in model)
        assert type(Mine(2, 3, 3)) is Mine
        plain = theirs(spike_grad=torch.sigmoid)  # snnTorch's own surrogates cannot be copied
        assert type(copy.deepcopy(Mine(2, 3, 3, spike_grad=torch.sigmoid))) is Mine
        assert type(copy.deepcopy(plain)) is snnlstm.SConv2dLSTM
        close(model[0](X), model[1](X))
        utils.reset(model)
        assert not any(cell.mem.any() for cell in model)
        utils.reset(nn.Sequential(old))  # this network holds old cells alone


def test_patched_code_with_the_old_names_runs(monkeypatch):
    assert not hasattr(snntorch, "SConvLSTM")
    for _ in range(2):
        with snnlstm.patch(), snnlstm.patch():
            from snntorch import SConvLSTM

            cell = SConvLSTM(2, 3, 3, threshold=0.1)
            assert SConvLSTM is snntorch.SConv2dLSTM
            assert type(cell) is snnlstm.SConv2dLSTM
            syn, mem = cell.init_sconvlstm()
            close(cell(X, syn, mem), cell(X, *cell.reset_mem()))
        assert not hasattr(snntorch, "SConvLSTM")
    monkeypatch.setattr(snntorch, "SConvLSTM", Mine, raising=False)
    with snnlstm.patch():
        assert snntorch.SConvLSTM is Mine  # a name that is there stays
    assert snntorch.SConvLSTM is Mine


def test_patched_the_warning_about_the_threshold_names_the_line_that_makes_the_cell(patched):
    class Mine(snnlstm.SConv1dLSTM):
        pass

    for make in (snntorch.SConv2dLSTM, snnlstm.SConv1dLSTM, Mine):  # patch's goes through swap.py
        with pytest.warns(UserWarning, match="never spikes") as caught:
            make(2, 3, 3)
        assert caught[0].filename == __file__


def test_patch_can_be_undone_in_three_ways():
    def makes_ours():
        return type(theirs()) is snnlstm.SConv2dLSTM

    init = snntorch.SConv2dLSTM.__init__
    with snnlstm.patch():
        assert makes_ours()
        with snnlstm.patch():  # neither the second patch nor its end changes anything
            assert makes_ours()
        assert makes_ours()
    assert not makes_ours()
    with pytest.raises(KeyError), snnlstm.patch():
        raise KeyError
    assert not makes_ours()
    snnlstm.patch()
    snnlstm.patch()
    assert makes_ours()
    snnlstm.unpatch()
    assert not makes_ours()
    snnlstm.unpatch()
    assert snntorch.SConv2dLSTM.__init__ is init


# ---- checkpoints ------------------------------------------------------------------------------


def last_step(cell, x):
    with torch.inference_mode():
        return [cell(step) for step in x][-1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("library", [snnlstm, snntorch], ids=lambda library: library.__name__)
def test_a_checkpoint_loads_and_computes_what_it_did(name, library):
    """snnTorch's cell loads the files too: keys, shapes and dtypes are those of its state_dict."""
    saved = torch.load(DATA / name, weights_only=True)
    assert len(saved) >= 5
    for key, cell in saved.items():
        threshold = cell["state_dict"]["threshold"]
        arguments = cell["arguments"] | {"threshold": torch.zeros_like(threshold)}
        made = quietly(library.SConv2dLSTM, 2, 3, 3, **arguments)
        made.load_state_dict(cell["state_dict"], strict=True)
        close(last_step(made, cell["x"]), cell["out"])
        assert cell["out"][0].any(), key
