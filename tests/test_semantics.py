"""What one step computes, row by row of the specification, against snntorch 1.0.0.

Each test says the rule it stands for. State, arguments, surrogates, quantisation and dtypes
have files of their own.
"""

import inspect

import pytest
import snntorch
import torch
from helpers import close, ours, quietly, same_gradients, states, steps, theirs, twins
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
    one, other = twins(reset_mechanism=reset, **pool)
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    actual, expected = one(x, syn, mem), other(x, syn, mem)
    close(actual, expected)
    assert expected[0].any()
    assert not expected[0].all()
    backend.check(one.path)
    torch.stack([a.sum() for a in actual]).sum().backward()
    torch.stack([e.sum() for e in expected]).sum().backward()
    same_gradients(one, other)


def test_gate_order_is_i_f_o_g(backend):
    """Each gate's bias alone moves the states as its place in the formula says."""
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
    assert torch.equal(spk.bool(), new_mem > 0.1)  # and spk uses the mem after the reset


def test_returned_mem_is_not_pooled(backend):
    for pool in POOLS[1:]:
        one, other = twins(**pool)
        x = steps(1, 2, 2, 6, 7)[0]
        spk, syn, mem = one(x)
        assert syn.shape == mem.shape == (2, 3, 6, 7)
        assert spk.shape == other(x)[0].shape != mem.shape
        pooled = {"max_pool": nn.MaxPool2d, "avg_pool": nn.AvgPool2d}[next(iter(pool))]
        close(spk, (pooled(next(iter(pool.values())))(mem) > 0.1).float())


def test_the_reset_is_a_constant_to_gradients(backend):
    """d mem / d mem_prev has no term of the reset's surrogate gradient."""
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    grads = []
    for cell in twins(reset_mechanism="subtract"):
        start = mem.clone().requires_grad_()
        cell(x, syn, start)[2].sum().backward()
        grads.append(start.grad)
    close(*grads)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1)], ids=str)
def test_a_broadcast_threshold_gets_the_gradient_summed_to_its_own_shape(backend, shape):
    syn, mem = states(2, 3, 6, 8)
    x = steps(1, 2, 2, 6, 8)[0]
    threshold = torch.full(shape, 0.1)
    one, other = twins(
        threshold=threshold, learn_threshold=True, reset_mechanism="subtract", max_pool=2
    )
    for cell in (one, other):
        spk, _, new_mem = cell(x, syn, mem)
        (spk.sum() + 3 * new_mem.sum()).backward()
        assert cell.threshold.grad.shape == shape
    close(one.threshold.grad, other.threshold.grad, atol=1e-5, rtol=1e-4)
    backend.check(one.path)


def test_gradient_of_threshold_is_minus_reset_and_minus_the_surrogate(backend):
    syn, mem = states(2, 3, 6, 7)
    x = steps(1, 2, 2, 6, 7)[0]
    for of, expected in (
        ("mem", lambda cell: -cell.reset.sum()),
        ("spk", lambda cell: -cell.spike_grad.factor(cell.mem - 0.1).sum()),
    ):
        cell = ours(learn_threshold=True, reset_mechanism="subtract")
        spk, _, new_mem = cell(x, syn, mem)
        if of == "mem":
            new_mem.sum().backward()
            close(cell.threshold.grad, expected(cell), atol=1e-4)
        else:  # of spk: its own surrogate, and through mem the reset's part
            spk.sum().backward()
            direct = expected(cell)
            through = (cell.spike_grad.factor(cell.mem - 0.1) * -cell.reset).sum()
            close(cell.threshold.grad, direct + through, atol=1e-4)


def test_nan_mem_gives_no_spike_and_stays_nan(backend):
    for reset in RESETS:
        one, other = twins(reset_mechanism=reset)
        syn, mem = states(1, 3, 5, 5)
        syn[0, 0, 2, 2] = torch.nan
        x = steps(1, 1, 2, 5, 5)[0]
        actual, expected = one(x, syn, mem), other(x, syn, mem)
        close(actual, expected)
        assert actual[2][0, 0, 2, 2].isnan()
        assert actual[0][0, 0, 2, 2] == 0
        backend.check(one.path)


def test_a_max_pool_window_that_holds_nan_gives_no_spike(backend):
    one, other = twins(max_pool=2)
    syn, mem = states(1, 3, 6, 6)
    syn += 3  # everything spikes but that window
    syn[0, 1, 3, 2] = torch.nan
    x = steps(1, 1, 2, 6, 6)[0]
    spk = one(x, syn, mem)[0]
    close(spk, other(x, syn, mem)[0])
    assert spk[0, 1, 1, 1] == 0
    backend.check(one.path)


def test_infinite_states_behave_as_in_snntorch(backend):
    for value in (torch.inf, -torch.inf):
        one, other = twins(reset_mechanism="zero")
        syn, mem = states(1, 3, 5, 5)
        syn[0, 0, 2, 2] = value
        x = steps(1, 1, 2, 5, 5)[0]
        close(one(x, syn, mem), other(x, syn, mem))


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
    # Its levels reach 1.2, so a mem near 1 can be rounded up to more than 1.
    snnlstm.SConv2dLSTM(2, 3, 3, state_quant=snnlstm.quant.state_quant(4))


# ---- constructor ------------------------------------------------------------------------


def test_positional_arguments_come_in_snntorchs_order():
    mine = inspect.signature(snnlstm.SConv2dLSTM).parameters
    reference = inspect.signature(snntorch.SConv2dLSTM).parameters
    assert list(mine)[: len(reference)] == list(reference)
    for name, parameter in reference.items():
        assert mine[name].default == parameter.default
        assert mine[name].kind == parameter.kind


def test_what_we_add_is_keyword_only():
    parameters = inspect.signature(snnlstm.SConv2dLSTM).parameters
    added = set(parameters) - set(inspect.signature(snntorch.SConv2dLSTM).parameters)
    assert added == {"stride", "dilation", "device", "dtype", "checkpoint", "batch_first"}
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
    forward = inspect.signature(snnlstm.SConv2dLSTM.forward).parameters
    assert forward["record"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 5), [5, 1], (1, 7)], ids=str)
def test_kernel_size_is_an_int_a_tuple_or_a_list_and_padding_is_its_half(backend, kernel):
    one, other = twins(2, 3, kernel)
    assert one.padding == other.padding
    assert tuple(one.conv.kernel_size) == tuple(other.conv.kernel_size)
    x = steps(2, 2, 2, 7, 6)
    for t in range(2):
        close(one(x[t]), other(x[t]))
    backend.check(one.path)


@pytest.mark.parametrize("kernel", [2, (3, 4), [2, 3]], ids=str)
def test_even_kernels_are_refused_by_the_constructor(kernel):
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*size of the state"):
        ours(2, 3, kernel)


@pytest.mark.parametrize("off", [0, None, False, (), []], ids=repr)
def test_a_falsy_pool_is_off(off):
    assert ours(max_pool=off, avg_pool=off)(torch.zeros(1, 2, 5, 5))[0].shape == (1, 3, 5, 5)


def test_both_pools_are_refused():
    with pytest.raises(ValueError, match="Only one of either `max_pool` or `avg_pool`"):
        theirs(max_pool=2, avg_pool=2)
    with pytest.raises(ValueError, match="Only one of either `max_pool` or `avg_pool`"):
        ours(max_pool=2, avg_pool=2)


@pytest.mark.parametrize(
    "shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (6, 7), (2, 1, 1, 1)], ids=str
)
def test_a_threshold_may_have_any_shape_that_broadcasts_to_mem(backend, shape):
    threshold = torch.rand(shape) / 5
    one, other = twins(threshold=threshold, reset_mechanism="subtract")
    x = steps(3, 2, 2, 6, 7)
    for t in range(3):
        close(one(x[t]), other(x[t]))
    # The kernels know one threshold, or one a channel.
    backend.check(one.path, native=threshold.numel() in (1, 3))


def test_a_threshold_tensor_is_copied():
    threshold = torch.tensor(0.1)
    for learn in (False, True):
        cell = ours(threshold=threshold, learn_threshold=learn)
        threshold.fill_(5)
        assert cell.threshold.item() == pytest.approx(0.1)
        threshold.fill_(0.1)


def test_a_threshold_that_does_not_broadcast_to_mem_is_refused():
    for shape in ((1, 1, 3, 1, 1), (2, 1, 1), (1, 4, 1, 1)):
        with pytest.raises(ValueError, match="threshold must broadcast"):
            ours(threshold=torch.full(shape, 0.1))
    cell = ours(threshold=torch.full((5, 5), 0.1), max_pool=2)
    with pytest.raises(ValueError, match=r"threshold must broadcast .* pooled"):
        cell(torch.zeros(1, 2, 5, 5))


def test_an_int_threshold_can_be_learned():
    cell = ours(threshold=1, learn_threshold=True)
    assert cell.threshold.dtype == torch.float32
    assert cell.threshold.requires_grad


def test_the_threshold_attribute_takes_a_number(backend):
    for learn in (False, True):
        cell = ours(learn_threshold=learn)
        before = cell.threshold
        cell.threshold = 0.3
        assert cell.threshold.item() == pytest.approx(0.3)
        assert (cell.threshold is before) == learn  # optimizers know the parameter
        spk, _, mem = cell(steps(1, 2, 2, 6, 7)[0] * 5)
        assert torch.equal(spk.bool(), mem > 0.3)
        assert "threshold" in cell.state_dict()


def test_unknown_reset_mechanisms_are_refused():
    with pytest.raises(ValueError, match=r"reset_mechanism .*'both'"):
        ours(reset_mechanism="both")
    cell = ours(reset_mechanism="zero")
    with pytest.raises(ValueError, match="reset_mechanism"):
        cell.reset_mechanism = "both"
    assert cell.reset_mechanism == "zero"


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


def test_loading_an_unknown_reset_mechanism_is_refused():
    cell = ours(reset_mechanism="zero")
    state = cell.state_dict() | {"reset_mechanism_val": torch.tensor(7)}
    with pytest.raises(RuntimeError, match="reset_mechanism_val must be 0, 1 or 2"):
        cell.load_state_dict(state)
    assert cell.reset_mechanism == "zero"


def test_the_meta_device_works():
    with torch.device("meta"):
        cell = ours()
        cell(torch.empty(1, 2, 5, 5))
        cell.reset_mechanism = "zero"
        assert cell._describe(False, False).reset == "zero"
        cell.reset_mechanism = "none"
    assert all(value.is_meta for value in cell.state_dict().values())
    assert cell(torch.empty(1, 2, 5, 5, device="meta"))[0].shape == (1, 3, 5, 5)
    cell.to_empty(device="cpu")
    assert cell.syn.shape == cell.mem.shape == (1, 3, 5, 5)
    assert not cell.syn.any()
    torch.manual_seed(0)
    cell.reset_parameters()
    x = steps(1, 1, 2, 5, 5)[0]
    close(cell(x), ours()(x))


def test_device_and_dtype_keywords():
    cell = ours(device="meta", dtype=torch.float64)
    for value in (cell.conv.weight, cell.threshold, cell.graded_spikes_factor, cell.syn):
        assert value.is_meta
        assert value.dtype == torch.float64


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("size", [(7, 8), (1, 1), (6, 5)], ids=str)
def test_stride_is_the_inputs_alone_and_dilation_is_both(backend, stride, dilation, size):
    """The definition, with two convolutions that torch runs."""
    cell = ours(stride=stride, dilation=dilation, dtype=torch.float64)
    sh, sw = cell.stride
    shape = (2, 3, -(-size[0] // sh), -(-size[1] // sw))
    syn, mem = (state.double() for state in states(*shape))
    x = steps(1, 2, 2, *size)[0].double()
    _, new_syn, new_mem = cell(x, syn, mem)
    assert new_syn.shape == shape
    weight, bias = cell.conv.weight, cell.conv.bias
    padding = tuple(d * (k - 1) // 2 for d, k in zip(cell.dilation, (3, 3), strict=True))
    gates = nn.functional.conv2d(x, weight[:, :2], bias, stride, padding, dilation)
    gates = gates + nn.functional.conv2d(mem, weight[:, 2:], None, 1, padding, dilation)
    i, f, o, g = gates.chunk(4, 1)
    expected = f.sigmoid() * syn + i.sigmoid() * g.tanh()
    close(new_syn, expected, atol=1e-12)
    close(new_mem, o.sigmoid() * expected.tanh(), atol=1e-12)
    backend.check(cell.path)


# ---- parameters and state_dict ------------------------------------------------------------


def test_conv_is_a_plain_conv2d_with_its_initial_values_bit_for_bit():
    for kwargs in ({}, {"bias": False}, {"learn_threshold": True}):
        one, other = twins(4, 5, (3, 5), **kwargs)
        assert type(one.conv) is nn.Conv2d
        assert one.conv.weight.shape == (20, 9, 3, 5)
        for mine, reference in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, reference)


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
