"""Every surrogate computes what snnTorch's does, alone, in snnTorch's neurons and in the cell."""

import math

import numpy
import pytest
import snntorch
import snntorch.surrogate as theirs
import snntorch.utils
import torch

import snnlstm
from snnlstm import surrogate
from snnlstm.compat.snntorch import recognise_surrogate
from tests.shared.cases import SURROGATES
from tests.shared.helpers import close, ours, states, steps, train_alike, twins
from tests.shared.helpers import theirs as cell_of_snntorch


def parameters_of(spike):
    return dict(zip(surrogate.KINDS[spike.kind].parameters, (spike.p0, spike.p1), strict=False))


# Each surrogate by name with its defaults, and with other numbers.
UNUSUAL = {spike.name: parameters_of(spike) for spike in SURROGATES if spike.kind}
ALL = [(name, kwargs) for name, own in UNUSUAL.items() for kwargs in ([{}, own] if own else [{}])]
each = pytest.mark.parametrize(("name", "kwargs"), ALL, ids=str)
each_of_snntorch = pytest.mark.parametrize(
    ("name", "kwargs"), [row for row in ALL if hasattr(theirs, row[0])], ids=str
)


def points() -> torch.Tensor:
    return torch.cat([torch.linspace(-3, 3, 101), torch.tensor([0.0, -0.0, 1.0, 0.1])])


def gradient(spike, x, weights=None):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    spk = spike(x)
    spk.backward(torch.ones_like(spk) if weights is None else weights)
    return spk.detach(), x.grad


@each_of_snntorch
def test_it_spikes_and_differentiates_as_snntorchs(name, kwargs):
    x, weights = points(), torch.linspace(-1, 1, 105)
    reference = getattr(theirs, name)(**kwargs)
    if name == "LSO":  # snnTorch's raises TypeError, because it calls another Function
        slope = kwargs.get("slope", 0.1)
        expected = (x > 0).float(), torch.where(x > 0, 1.0, slope) * weights
    else:
        expected = gradient(reference, x, weights)
    close(gradient(getattr(surrogate, name)(**kwargs), x, weights), expected, atol=1e-6)


class _Spike(torch.autograd.Function):
    """Spikes in the input's dtype, as on snnTorch's master, with the gradient `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor(*ctx.saved_tensors), None


def stand_in(class_name, like, module="snntorch.surrogate", change=lambda x: x, **attributes):
    """Makes an object with attributes, as surrogates are in snnTorch after 1.0.0."""

    def call(self, x):
        return _Spike.apply(x, lambda u: change(like.factor(u)))

    made = type(class_name, (), {"__module__": module, "__call__": call})()
    vars(made).update(attributes)
    return made


@each_of_snntorch
def test_snntorchs_closures_and_objects_are_recognised(name, kwargs):
    spike = getattr(surrogate, name)(**kwargs)
    class_name = name.title().replace("_", "") + "Surrogate"
    made = stand_in(class_name, spike, **parameters_of(spike))
    for theirs_ in (getattr(theirs, name)(**kwargs), made):
        assert recognise_surrogate(theirs_) == spike
        assert ours(spike_grad=theirs_).spike_grad == spike


ATAN = surrogate.atan()
FOREIGN = [
    theirs.fast_sigmoid(torch.tensor(25.0)),  # a user may learn the slope
    theirs.atan(math.nan),
    stand_in("ATanSurrogate", ATAN, slope=2.0),
    stand_in("ATanSurrogate", ATAN, alpha=3.0),
    stand_in("GaussianSurrogate", ATAN, alpha=2.0),
    theirs.custom_surrogate(lambda x, grad, spk: grad),
    torch.nn.ReLU(),
    len,
]


@each
def test_what_computes_something_else_stays_foreign(name, kwargs):
    spike = getattr(surrogate, name)(**kwargs)
    attributes = parameters_of(spike)
    for change in (lambda x: 1.001 * x, torch.zeros_like, lambda x: x + 1e-3):
        changed = stand_in(name, spike, change=change, **attributes)
        assert recognise_surrogate(changed) is changed
    broken = stand_in(name, spike, **attributes)
    type(broken).__call__ = lambda self, x: 1 / 0
    elsewhere = stand_in(name, spike, module="mine.surrogate", **attributes)
    for foreign in (broken, elsewhere, *FOREIGN):
        assert recognise_surrogate(foreign) is foreign


def test_a_network_of_the_next_release_takes_the_kernels(backend, monkeypatch):
    """In the next release the default surrogate of every cell is an object."""
    made = stand_in("ATanSurrogate", surrogate.atan(), alpha=2.0)
    monkeypatch.setattr(snntorch._neurons.neurons, "atan", lambda: made)
    net = torch.nn.Sequential(
        snntorch.SConv2dLSTM(2, 3, 3, threshold=0.1, init_hidden=True),
        snntorch.Leaky(beta=0.9, init_hidden=True),
    )
    assert net[0].spike_grad is net[1].spike_grad is made
    x = steps(1, 2, 2, 6, 7)[0]
    expected = net(x)
    snntorch.utils.reset(net)
    assert snnlstm.accelerate(net).swapped == ("0", "1")
    close(net(x), expected)
    backend.check(net[0].path)


EDGES = [*ALL, ("SFS", {"slope": 5, "B": 0.125})]


@pytest.mark.parametrize(("name", "kwargs"), EDGES, ids=str)
def test_the_kernels_spike_reset_and_differentiate_exactly_at_edges(backend, name, kwargs):
    """mem is 0.5 to the last bit, so mem - threshold is u, where some surrogates jump."""
    closure = getattr(surrogate if name == "LSO" else theirs, name, getattr(surrogate, name))(
        **kwargs
    )
    u = torch.tensor([0.0, 0.125, 1.0, -1.0]).view(4, 1, 1)  # one for each channel
    options = {"threshold": 0.5 - u, "reset_mechanism": "subtract"}
    cells = twins(1, 4, 1, spike_grad=closure, **options)
    zeros = torch.zeros(1, 4, 1, 1)
    for cell in cells:
        with torch.no_grad():
            cell.conv.weight.zero_()
            cell.conv.bias.copy_(torch.tensor([99.0, 99.0, 0.0, 99.0]).repeat_interleave(4))
        x = zeros[:, :1]
        spk, syn, mem = cell(x, torch.full_like(zeros, 50.0), torch.full_like(zeros, -9.0))
        assert torch.equal(mem, torch.full_like(zeros, 0.5))
        assert torch.equal(spk[0], (u > 0).float())
        # The next step resets if this one spiked.
        assert torch.equal(cell(x, syn, mem)[2][0], 0.5 - (u > 0) * (0.5 - u))
        torch.manual_seed(4)
        spk.sum().backward()
    backend.check(cells[0].path, native=name != "SSO")
    close(cells[0].conv.bias.grad, cells[1].conv.bias.grad, atol=0)


@pytest.mark.parametrize("last", ["x", "states", "both", "none"])
def test_SSO_draws_the_noise_of_snntorchs_steps_whatever_the_form_and_layout(last):
    """The last step draws first. The numbers are those of contiguous tensors."""
    x, (syn, mem), grads = steps(3, 2, 2, 6, 8), states(2, 3, 6, 8), []
    for make, kind in ((ours, surrogate), (cell_of_snntorch, theirs)):
        cell, given = make(spike_grad=kind.SSO(variance=2.0), max_pool=2), [x, syn, mem]
        if make is ours:
            for k, names in enumerate((("x", "both"), ("states", "both"), ("states", "both"))):
                if last in names:
                    given[k] = given[k].movedim(-3, -1).contiguous().movedim(-1, -3)
            spk = cell(*given)[0]
            assert str(cell.path) == "reference (spike_grad draws random numbers)"
        else:
            spk = torch.stack([cell(x[0], syn, mem)[0], *(cell(x_t)[0] for x_t in x[1:])])
        torch.manual_seed(4)
        (spk * torch.arange(1, 4).view(3, 1, 1, 1, 1)).sum().backward()
        grads.append(cell.conv.weight.grad)
    close(*grads, atol=1e-4, rtol=1e-4)


def test_sigmoid_is_finite_for_very_negative_inputs(backend):
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    assert not gradient(theirs.sigmoid(), x)[1].isfinite().all()  # e^-kx overflows there
    spk, grad = gradient(surrogate.sigmoid(), x)
    assert grad.isfinite().all()
    cell = ours(spike_grad=surrogate.sigmoid(slope=1e4), threshold=0.9)
    cell(steps(1, 1, 2, 5, 5)[0])[0].sum().backward()
    assert cell.conv.weight.grad.isfinite().all()
    # For large x the gradient does not cancel to zero.
    close(gradient(surrogate.sigmoid(1), torch.tensor([30.0]))[1], torch.tensor([9.3576e-14]), 0)


def test_surrogate_disable_gives_spikes_without_gradient_but_states_with(backend):
    for cell in twins(surrogate_disable=True, spike_grad=None):
        spk, syn, mem = cell(steps(1, 1, 2, 5, 5)[0])
        assert not spk.requires_grad
        assert syn.requires_grad
        mem.sum().backward()
        assert cell.conv.weight.grad.any()
    assert ours(surrogate_disable=True).spike_grad == surrogate.NONE
    late = ours()
    late.surrogate_disable = True
    assert not late(torch.zeros(1, 2, 5, 5))[0].requires_grad


def doubled(x, grad, spk):
    grad *= 2  # snnTorch's own examples work in place, too
    return grad * spk * x.cos()


FOREIGN_TWINS = {
    "custom": (surrogate.custom_surrogate(doubled), theirs.custom_surrogate(doubled)),
    "never zero": (torch.sigmoid, torch.sigmoid),
}


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("name", FOREIGN_TWINS)
def test_a_foreign_spike_grad_also_makes_the_reset(backend, name, reset):
    options = {"reset_mechanism": reset, "learn_threshold": True}
    mine, reference = FOREIGN_TWINS[name]
    cell = ours(spike_grad=mine, **options)
    expected = cell_of_snntorch(spike_grad=reference, **options)
    train_alike(cell, expected, steps(3, 2, 2, 6, 7))
    assert str(cell.path) == "reference (spike_grad is unknown to the kernels)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_spikes_have_the_dtype_of_their_input(dtype):
    for name in UNUSUAL:
        spk, grad = gradient(getattr(surrogate, name)(), points().to(dtype))
        assert spk.dtype == grad.dtype == dtype
        assert grad.isfinite().all()
    close(surrogate.NONE(points().to(dtype)), spk)


@pytest.mark.parametrize("name", [name for name in UNUSUAL if name != "SSO"])
def test_the_derivative_of_its_gradient_is_that_of_its_factor(name):
    x = torch.linspace(-2, 2.21, 50, dtype=torch.float64, requires_grad=True)
    spike, step = getattr(surrogate, name)(**UNUSUAL[name]), 1e-6
    (first,) = torch.autograd.grad(spike(x).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else 0 * x
    with torch.no_grad():
        expected = (spike.factor(x + step) - spike.factor(x - step)) / (2 * step)
    close(second, expected, atol=1e-5, rtol=1e-5)


@each
def test_it_works_in_forward_mode_and_under_vmap(name, kwargs):
    spike = getattr(surrogate, name)(**kwargs)
    x, tangent = points(), torch.linspace(-1, 1, 105)
    torch.manual_seed(3)
    close(torch.func.jvp(spike, (x,), (tangent,)), gradient(spike, x, tangent))
    if name != "SSO":  # vmap allows no random numbers
        batched = torch.func.vmap(torch.func.grad(lambda row: spike(row).sum()))(x.view(15, 7))
        close(batched.flatten(), gradient(spike, x)[1])


@pytest.mark.parametrize("value", [None, 1.0, [1.0], numpy.ones(2)], ids=str)
def test_a_surrogate_takes_tensors_alone(value):
    made = [getattr(surrogate, name)() for name in ("atan", "SSO", "LSO")]
    made += [surrogate.NONE, surrogate.custom_surrogate(lambda x, grad, spk: grad)]
    for spike in made:
        with pytest.raises(TypeError, match="must be a tensor, got"):
            spike(value)
