"""After patch(), every new cell of snnTorch's is one of ours, until unpatch()."""

import copy

import pytest
import snntorch
import torch
from helpers import close, ours, steps, theirs
from snntorch import utils
from torch import nn

import snnlstm

X = steps(1, 2, 2, 6, 6)[0]


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


def test_patched_the_old_cells_and_subclasses_stay_what_they_are():
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
        assert type(snnlstm.restore(model[1]).model) is snntorch.SConv2dLSTM


def test_patched_the_warning_about_the_threshold_names_the_line_that_makes_the_cell(patched):
    with pytest.warns(UserWarning, match="never spikes") as caught:
        snntorch.SConv2dLSTM(2, 3, 3)
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
