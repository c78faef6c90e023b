"""The constructor and its attributes take what those of snntorch 1.0.0 take, and more."""

import inspect
import re
import warnings

import pytest
import snntorch
import torch
from torch import nn

import snnlstm
from snnlstm.calls.spec import OPTIONS, RESETS
from tests.shared.helpers import (
    close,
    described,
    ours,
    same,
    states,
    steps,
    theirs,
    train_alike,
    twins,
)


def test_arguments_come_in_snntorchs_order_and_ours_by_keyword():
    mine = inspect.signature(snnlstm.SConv2dLSTM).parameters
    reference = inspect.signature(snntorch.SConv2dLSTM).parameters
    assert list(mine)[: len(reference)] == list(reference)
    for name, parameter in reference.items():
        assert (mine[name].default, mine[name].kind) == (parameter.default, parameter.kind)
    added = [name for name, option in OPTIONS.items() if not option.in_snntorch]
    added += ["device", "dtype"]
    assert sorted(set(mine) - set(reference)) == sorted(added)
    record = inspect.signature(snnlstm.SConv2dLSTM.forward).parameters["record"]
    assert {p.kind for p in (record, *map(mine.get, added))} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.emulator_long
@pytest.mark.parametrize(
    "shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (6, 8), (2, 1, 1, 1)], ids=str
)
def test_a_threshold_of_any_shape_that_broadcasts_gets_a_gradient_of_that_shape(backend, shape):
    pool = {"max_pool": 2} if shape != (6, 8) else {}
    threshold = torch.rand(shape) / 5
    cell, reference = twins(
        threshold=threshold, learn_threshold=True, reset_mechanism="subtract", **pool
    )
    train_alike(cell, reference, steps(3, 2, 2, 6, 8))
    assert cell.threshold.grad.shape == shape
    # The kernels know one threshold, or one a channel.
    backend.check(cell.path, native=threshold.numel() in (1, 3))


def test_the_threshold_attribute_takes_a_number(backend):
    for learn in (False, True):
        tensor = torch.tensor(0.1)
        cell = ours(threshold=tensor, learn_threshold=learn)
        tensor.fill_(5)  # the cell has a copy
        assert cell.threshold.item() == pytest.approx(0.1)
        assert ours(threshold=1, learn_threshold=learn).threshold.dtype == torch.float32
        before = cell.threshold
        cell.threshold = 0.3
        assert cell.threshold.item() == pytest.approx(0.3)
        assert (cell.threshold is before) == learn  # optimizers know the parameter
        spk, _, mem = cell(steps(1, 2, 2, 6, 7)[0] * 5)
        assert torch.equal(spk.bool(), mem > 0.3)
        assert "threshold" in cell.state_dict()


@pytest.mark.emulator_long
@pytest.mark.parametrize("reset", RESETS)
def test_a_reset_mechanism_that_is_set_or_loaded_is_what_runs(backend, reset):
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    expected = theirs(reset_mechanism=reset)(x, syn, mem)
    for start in RESETS:
        cell = ours(reset_mechanism=start)
        cell(x, syn, mem)
        cell.reset_mechanism = reset
        close(cell(x, syn, mem), expected)
        assert cell.reset_mechanism_val == RESETS.index(reset)
        loaded = ours(reset_mechanism=start)
        loaded(x, syn, mem)
        loaded.load_state_dict(cell.state_dict())
        close(loaded(x, syn, mem), expected)
        assert loaded.reset_mechanism == reset
        assigned = ours(reset_mechanism=start)
        assigned.reset_mechanism_val = torch.tensor(RESETS.index(reset))
        close(assigned(x, syn, mem), expected)


def test_an_infinite_threshold_with_subtract_makes_no_nan(backend):
    threshold = torch.tensor([0.1, torch.inf, 0.1]).view(3, 1, 1)
    cell = ours(threshold=threshold, reset_mechanism="subtract", learn_threshold=True)
    syn, mem = states(2, 3, 6, 7)
    spk, _, new_mem = cell(steps(1, 2, 2, 6, 7)[0], syn, mem)
    assert new_mem.isfinite().all()
    assert spk[:, 0].any()
    assert not spk[:, 1].any()
    new_mem.sum().backward()
    assert cell.threshold.grad.isfinite().all()


SILENT = r"threshold=1\.0 .* never spikes\. .*0\.05"
NOISY = r"exceeded by mem = 0, .* threshold=0\.05, .*rates"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, SILENT),
        ({"threshold": torch.full((3, 1, 1), 2.0)}, "never spikes"),
        ({"threshold": -0.05}, NOISY),
        ({"threshold": torch.tensor([0.1, -0.05, 0.1]).view(3, 1, 1)}, NOISY),
        ({"learn_threshold": True}, ""),
        ({"threshold": 0.9}, ""),
        ({"threshold": 0}, ""),
        ({"threshold": torch.tensor([0.5, 1, 2]).view(3, 1, 1)}, ""),
        # The levels reach 1.2, so the quantiser can round a mem near 1 up to more than 1.
        ({"state_quant": snnlstm.quant.state_quant(4)}, ""),
    ],
    ids=described,
)
def test_a_threshold_beyond_or_below_every_mem_warns_once(options, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cell = snnlstm.SConv2dLSTM(2, 3, 3, **options)
    assert [bool(re.search(said, str(w.message))) for w in caught] == [True] * bool(said)
    if said:
        x = torch.full((8, 4, 2, 5, 5), 0.0 if said == NOISY else 100.0)
        assert cell(x)[0].any() == (said == NOISY)


def test_conv_is_a_plain_conv2d_with_its_initial_values_bit_for_bit():
    for kwargs in ({}, {"bias": False}, {"learn_threshold": True}):
        cell, reference = twins(4, 5, (3, 5), **kwargs)
        assert type(cell.conv) is nn.Conv2d
        assert cell.conv.weight.shape == (20, 9, 3, 5)
        same(cell.parameters(), reference.parameters())


def test_a_graded_factor_scales_the_spikes(backend):
    cell, reference = twins()
    for factor in (2.5, torch.tensor(0.5)):
        cell.graded_spikes_factor = factor
        reference.graded_spikes_factor = torch.as_tensor(factor)
        x = steps(1, 2, 2, 6, 7)[0]
        close(cell(x), reference(x))
        backend.check(cell.path)
    learned = ours()
    learned.graded_spikes_factor = nn.Parameter(torch.tensor(2.0))
    learned(x)[0].sum().backward()
    assert learned.graded_spikes_factor.grad == (learned.mem > 0.1).sum()
    backend.check(learned.path, native=False)
