"""One step computes what one step of snntorch 1.0.0's cell computes, or what docs/ promise instead.

States, arguments, surrogates, quantisation and dtypes have test files of their own.
"""

import pytest
import snntorch
import torch
from helpers import close, ours, quietly, same, same_gradients, states, steps, theirs, twins
from torch import nn

import snnlstm
from snnlstm.functional import sconv2dlstm

RESETS = ["subtract", "zero", "none"]
POOLS = [{}, {"max_pool": 2}, {"avg_pool": 2}, {"max_pool": (2, 3)}, {"avg_pool": [3, 1]}]


def test_the_oracle_is_snntorch_1_0_0():
    assert snntorch.__version__ == "1.0.0"


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("reset", RESETS)
def test_one_step_computes_what_snntorch_computes(backend, reset, pool):
    """No gradient flows through the reset, and the returned mem is not pooled."""
    one, other = twins(reset_mechanism=reset, **pool)
    results, grads = [], []
    for cell in (one, other):
        inputs = [t.requires_grad_() for t in (steps(1, 2, 2, 6, 7)[0], *states(2, 3, 6, 7))]
        results.append(cell(*inputs))
        torch.stack([out.sum() for out in results[-1]]).sum().backward()
        grads.append([t.grad for t in inputs])
    close(*results)
    assert results[0][0].any()
    assert not results[0][0].all()
    backend.check(one.path)
    close(*grads, atol=2e-5, rtol=1e-4)
    same_gradients(one, other)


def test_gate_order_is_i_f_o_g(backend):
    """The bias of one gate moves the states as the formula says of that gate."""
    syn, mem = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, 1, 1, 1)
    weight, x = torch.zeros(4, 2, 1, 1), torch.zeros(1, 1, 1, 1)
    for bias, new_syn, factor in (
        ([9.0, -9.0, 0.0, 9.0], 1.0, 0.5),  # i and g open, f shut: g enters
        ([-9.0, 9.0, 0.0, 9.0], 0.5, 0.5),  # f open, i shut: syn stays
        ([-9.0, 9.0, -9.0, 0.0], 0.5, 0.0),  # o shut: mem is hidden
        ([-9.0, 9.0, 9.0, 0.0], 0.5, 1.0),
    ):
        _, s, m = sconv2dlstm(x, syn, mem, weight, torch.tensor(bias))
        close(s, torch.full_like(s, new_syn), atol=1e-3)
        close(m, factor * torch.tanh(s), atol=1e-3)


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_reset_reads_the_mem_that_was_passed_in(backend, reset):
    cell = ours(reset_mechanism=reset)
    free = ours()
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    spk, _, new_mem = cell(x, syn, mem)
    _, _, unreset = free(x, syn, mem)
    spiked = mem > 0.1
    assert torch.equal(cell.reset, spiked.float())
    expected = {"subtract": unreset - 0.1, "zero": torch.zeros_like(unreset)}[reset]
    close(new_mem, torch.where(spiked, expected, unreset))
    assert torch.equal(spk.bool(), new_mem > 0.1)  # spk uses the mem after the reset


@pytest.mark.parametrize("options", [*({"reset_mechanism": r} for r in RESETS), {"max_pool": 2}])
def test_nan_mem_gives_no_spike_and_stays_nan(backend, options):
    """A pooling window that holds NaN does not spike, although the rest of the window would."""
    one, other = twins(**options)
    syn, mem = states(1, 3, 6, 6)
    syn += 3
    syn[0, 1, 3, 2] = torch.nan
    x = steps(1, 1, 2, 6, 6)[0]
    actual, expected = one(x, syn, mem), other(x, syn, mem)
    close(actual, expected)
    assert actual[2][0, 1, 3, 2].isnan()
    assert actual[0][0, 1][(1, 1) if "max_pool" in options else (3, 2)] == 0
    backend.check(one.path)


def test_zero_reset_needs_one_convolution(backend):
    cell, other = twins(reset_mechanism="zero")
    calls = []
    handle = cell.conv.register_forward_hook(lambda *_: calls.append(1))
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    close(cell(x, syn, mem), other(x, syn, mem))
    assert len(calls) == 1
    handle.remove()


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


def test_the_default_threshold_never_spikes_and_warns_once():
    with pytest.warns(UserWarning, match=r"threshold=1\.0 .* never spikes\. .*0\.1") as caught:
        cell = snnlstm.SConv2dLSTM(2, 3, 3)
    assert len(caught) == 1
    assert not cell(torch.full((1, 2, 5, 5), 100.0))[0].any()
    with pytest.warns(UserWarning, match="threshold"):
        snnlstm.SConv2dLSTM(2, 3, 3, threshold=torch.full((3, 1, 1), 2.0))


@pytest.mark.filterwarnings("error")
def test_no_warning_where_the_cell_can_spike():
    snnlstm.SConv2dLSTM(2, 3, 3, learn_threshold=True)
    snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.9)
    snnlstm.SConv2dLSTM(2, 3, 3, threshold=torch.tensor([0.5, 1, 2]).view(3, 1, 1))
    # The levels reach 1.2, so the quantiser can round a mem near 1 up to more than 1.
    snnlstm.SConv2dLSTM(2, 3, 3, state_quant=snnlstm.quant.state_quant(4))


# ---- parameters and state_dict ------------------------------------------------------------


def test_conv_is_a_plain_conv2d_with_its_initial_values_bit_for_bit():
    for kwargs in ({}, {"bias": False}, {"learn_threshold": True}):
        one, other = twins(4, 5, (3, 5), **kwargs)
        assert type(one.conv) is nn.Conv2d
        assert one.conv.weight.shape == (20, 9, 3, 5)
        same(one.parameters(), other.parameters())


@pytest.mark.parametrize("learn", [False, True])
def test_state_dicts_are_interchangeable_both_ways(learn):
    one, other = ours(learn_threshold=learn), theirs(learn_threshold=learn, seed=5)
    keys = ["threshold", "graded_spikes_factor", "reset_mechanism_val", "conv.weight", "conv.bias"]
    assert list(one.state_dict()) == list(other.state_dict()) == keys
    assert [n for n, _ in one.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert next(iter(dict(one.named_parameters()))) == ("threshold" if learn else "conv.weight")
    assert one.state_dict()["reset_mechanism_val"].dtype == torch.int64
    for old, new in ((other, ours(seed=7, learn_threshold=learn)), (one, theirs(seed=8))):
        state = old.state_dict()
        new.load_state_dict(state, strict=True)
        for key, value in new.state_dict().items():
            assert torch.equal(value, state[key])


def test_attributes_that_users_touch(backend):
    one, other = twins(reset_mechanism="subtract", max_pool=2)
    x = steps(1, 2, 2, 6, 6)[0]
    for _ in range(3):
        one(x)
        other(x)
    for name in ("spk", "syn", "mem", "reset"):
        close(getattr(one, name), getattr(other, name))
    for name in (
        "in_channels", "out_channels", "kernel_size", "padding", "max_pool", "avg_pool", "bias",
        "init_hidden", "inhibition", "output", "surrogate_disable", "state_quant",
        "reset_mechanism", "reset_mechanism_val", "graded_spikes_factor", "threshold",
    ):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    assert callable(one.spike_grad)
    close(one.fire(one.mem), other.fire(other.mem))
    close(one.mem_reset(one.mem), other.mem_reset(other.mem))


def test_a_graded_factor_scales_the_spikes(backend):
    one, other = twins()
    for factor in (2.5, torch.tensor(0.5)):
        one.graded_spikes_factor = factor
        other.graded_spikes_factor = torch.as_tensor(factor)
        x = steps(1, 2, 2, 6, 7)[0]
        close(one(x), other(x))
        backend.check(one.path)
    learned = ours()
    learned.graded_spikes_factor = nn.Parameter(torch.tensor(2.0))
    learned(x)[0].sum().backward()
    assert learned.graded_spikes_factor.grad == (learned.mem > 0.1).sum()
    backend.check(learned.path, native=False)


def test_foreign_surrogates_and_quantisers_that_are_modules_are_submodules():
    class Spike(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return snnlstm.surrogate.atan()(x) * self.slope

    one, other = ours(spike_grad=Spike()), quietly(theirs, spike_grad=Spike())
    assert list(one.state_dict()) == list(other.state_dict())
    x = steps(1, 2, 2, 6, 7)[0]
    close(one(x), other(x))
    one(x)[0].sum().backward()
    other(x)[0].sum().backward()
    same_gradients(one, other)
    assert not one.path.native


# ---- sequences ----------------------------------------------------------------------------


def test_states_are_carried_from_sequences_to_steps_and_back(backend):
    one, other = twins(reset_mechanism="zero")
    x = steps(7, 2, 2, 6, 7)
    parts = [one(x[:3])[0], one(x[3])[0][None], one(x[4:6], record=True)[0], one(x[6])[0][None]]
    close(torch.cat(parts), torch.stack([other(x[t])[0] for t in range(7)]))
    assert not one.mem._is_view()


@pytest.mark.parametrize("record", [False, True])
def test_a_sequence_of_no_steps_leaves_the_states_unchanged(backend, record):
    cell = ours(max_pool=2)
    cell(steps(1, 2, 2, 6, 7)[0])
    syn, mem = cell.syn.clone(), cell.mem.clone()
    spk, s, m = cell(torch.zeros(0, 2, 2, 6, 7), record=record)
    assert spk.shape == (0, 2, 3, 3, 3)
    same((cell.syn, cell.mem), (syn, mem))
    assert s.shape == m.shape == ((0, 2, 3, 6, 7) if record else (2, 3, 6, 7))


@pytest.mark.parametrize("pool", POOLS[:3], ids=str)
def test_an_empty_batch_works(backend, pool):
    cell = ours(inhibition=True, **pool)
    for x in (torch.zeros(0, 2, 6, 7), torch.zeros(3, 0, 2, 6, 7)):
        cell.reset_mem()
        spk, syn, mem = cell(x)
        assert spk.shape[-4] == 0
        assert syn.shape == mem.shape == (0, 3, 6, 7)
        (spk.sum() + mem.sum()).backward()
        assert not cell.conv.weight.grad.any()


def test_record_with_init_hidden_and_output(backend):
    x = steps(3, 1, 2, 5, 5)
    assert ours(init_hidden=True)(x, record=True).shape == (3, 1, 3, 5, 5)
    out = ours(init_hidden=True, output=True)(x, record=True)
    assert [tuple(o.shape) for o in out] == [(3, 1, 3, 5, 5)] * 3
