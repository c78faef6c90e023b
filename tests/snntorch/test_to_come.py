"""What snnTorch is about to change meets our cell: stubs have the forms of its coming releases."""

import pytest
import snntorch
import snntorch.functional.quant as their_quant
import torch
from helpers import close, ours, steps, theirs, train_alike
from snntorch import utils
from torch import nn

import snnlstm
from snnlstm import swap
from snnlstm.quant import StateQuant, state_quant
from snnlstm.snntorch import recognise_quant

X = steps(4, 3, 2, 6, 6)


class Cast(torch.autograd.Function):
    """Casts the levels to the input's dtype before it compares, as snnTorch after 1.0.0."""

    @staticmethod
    def forward(ctx, x, levels):
        levels = levels.to(x.device, x.dtype)
        return levels[(levels - x[..., None]).abs().min(-1).indices]

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None


def closure(levels, work=Cast.apply):
    def inner(x):
        return work(x, levels)

    inner.__module__ = "snntorch.functional.quant"
    inner.__qualname__ = "state_quant.<locals>.inner"
    return inner


def instance(name="StateQuantizer", module="snntorch.functional.quant", work=None, **held):
    levels = held.get("levels", state_quant(4).levels)
    call = work or (lambda self, x: Cast.apply(x, levels))
    made = type(name, (), {"__module__": module, "__call__": call})()
    vars(made).update(held)
    return made


LEVELS = state_quant(4).levels
ARGUMENTS = {
    "num_bits": 4, "uniform": True, "thr_centered": True, "threshold": 1, "lower_limit": 0,
    "upper_limit": 0.2, "multiplier": None,
}  # fmt: skip
FORMS = {
    "closure": lambda: closure(LEVELS),
    "levels": lambda: instance(levels=LEVELS),
    "arguments": lambda: instance(**ARGUMENTS),
    "both": lambda: instance(levels=LEVELS, **ARGUMENTS),
}


@pytest.mark.parametrize("form", FORMS)
def test_quantisers_of_any_form_take_the_kernels(form):
    theirs_ = FORMS[form]()
    assert recognise_quant(theirs_) == state_quant(4)
    cell = ours(state_quant=theirs_)
    assert type(cell.state_quant) is StateQuant
    train_alike(cell, theirs(state_quant=theirs_), X)
    assert cell.path.native
    x = torch.linspace(-2, 2, 101, dtype=torch.float64)
    close(cell.state_quant(x), theirs_(x), atol=0)  # their levels are cast to the wider type


def _halves(x, levels):
    return Cast.apply(x / 2, levels)


def _down(x, levels):
    return levels[torch.bucketize(x.detach(), levels).clamp(max=len(levels) - 1)] + 0 * x


def _no_gradient(x, levels):
    return levels[(levels - x[..., None]).abs().min(-1).indices]


@pytest.mark.parametrize("work", [_halves, _down, _no_gradient, lambda x, levels: 1 / 0])
def test_quantisers_that_compute_something_else_stay_foreign(work):
    held = instance(levels=LEVELS, work=lambda self, x: work(x, LEVELS))
    for foreign in (closure(LEVELS, work), held):
        assert recognise_quant(foreign) is foreign


def test_quantisers_of_other_names_or_contents_stay_foreign():
    for foreign in (
        instance("Levels", levels=LEVELS),
        instance(module="mine.quant", levels=LEVELS),
        instance(levels=LEVELS, scale=torch.ones(1)),
        instance(num_bits=4),
        instance(),
        closure("levels"),
    ):
        assert recognise_quant(foreign) is foreign


def gaussian(name="GaussianSurrogate"):
    """Makes a surrogate that the kernels do not know, as an object of snnTorch's."""

    class Gaussian(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * torch.exp(-x.square() / 0.18)

    call = {"__module__": "snntorch.surrogate", "__call__": lambda self, x: Gaussian.apply(x)}
    made = type(name, (), call)()
    made.sigma = 0.3
    return made


@pytest.mark.parametrize("name", ["GaussianSurrogate", "SmoothedHeavisideSurrogate"])
def test_new_surrogates_work_in_plain_torch_and_the_path_says_so(name):
    spike = gaussian(name)
    cell, other = ours(spike_grad=spike), theirs(spike_grad=spike)
    train_alike(cell, other, X)
    assert cell.spike_grad is spike
    assert not cell.path.native
    assert "surrogate" in cell.path.reason or "spike_grad" in cell.path.reason


class Leaking(torch.autograd.Function):
    """The operator of snnTorch's LSO, with spikes of its input's dtype and a gradient."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.saved_tensors[0] > 0, grad, ctx.slope * grad), None


def leaky_operator(operator):
    """Makes what LSO() returns after 1.0.0, where it calls the operator of its own."""
    slope = 0.2

    def inner(x):
        return operator.apply(x, slope)

    inner.__module__, inner.__qualname__ = "snntorch.surrogate", "LSO.<locals>.inner"
    return inner


@pytest.mark.parametrize("operator", [snntorch.surrogate.LeakySpikeOperator, Leaking])
def test_LSO_is_recognised_whether_or_not_its_gradient_works(operator):
    """The operator of 1.0.0, which LSO does not call there, returns too few gradients."""
    spike, x = leaky_operator(operator), torch.ones(3, requires_grad=True)
    if operator is not Leaking:
        with pytest.raises(RuntimeError, match="incorrect number of gradients"):
            spike(x).sum().backward()
    cell = ours(spike_grad=spike)
    assert cell.spike_grad == snnlstm.surrogate.LSO(0.2)
    train_alike(cell, theirs(spike_grad=leaky_operator(Leaking)), X)
    assert cell.path.native


def test_LSO_that_computes_something_else_stays_foreign():
    class Steep(Leaking):
        @staticmethod
        def backward(ctx, grad):
            return 3 * grad, None

    spike = leaky_operator(Steep)
    assert ours(spike_grad=spike).spike_grad is spike


@pytest.fixture
def next_base(monkeypatch):
    """Gives snnTorch's base class reset functions, a setter that works, and zeros() in place."""
    base, calls = snntorch.SpikingNeuron, []

    def setter(self, value):
        self._reset_mechanism = value
        self.reset_mechanism_val = torch.as_tensor(self.reset_dict[value])
        self._set_reset_function()

    def set_reset_function(self):
        calls.append(type(self))
        chosen = {"subtract": self._base_sub, "zero": self._base_zero, "none": self._base_int}
        self.state_function = self.reset_function = chosen[self._reset_mechanism]

    def zeros(*args):
        for state in args:
            state.zero_()

    def reset(net):
        for module in net.modules():
            if isinstance(module, base):
                module.reset_mem()

    has = {"reset_dict": {"subtract": 0, "zero": 1, "none": 2, "subtract_beta": 3}}
    has |= {"_set_reset_function": set_reset_function, "zeros": staticmethod(zeros)}
    has["reset_mechanism"] = property(lambda self: self._reset_mechanism, setter)
    for name, value in has.items():
        monkeypatch.setattr(base, name, value, raising=False)
    monkeypatch.setattr(utils, "reset", reset)
    return calls


def test_reset_functions_of_the_base_class(next_base):
    old = theirs()
    old.reset_mechanism = "zero"
    assert next_base == [snntorch.SConv2dLSTM]
    net = nn.Sequential(nn.Sequential(old))
    expected = [old(x) for x in X]
    utils.reset(net)
    assert snnlstm.accelerate(net).swapped == ("0.0",)
    cell = net[0][0]
    assert "reset_function" not in vars(cell)
    assert cell.reset_mechanism == "zero"
    close([cell(x) for x in X], expected)
    assert cell.path.native
    utils.reset(net)  # which walks nested modules
    assert not cell.mem.any()
    cell.reset_mechanism = "subtract"
    assert int(cell.reset_mechanism_val) == 0
    subtracting = theirs(reset_mechanism="subtract")
    expected = [subtracting(x) for x in X]
    close([cell(x) for x in X], expected)
    assert len(next_base) == 1  # ours needs no function of the base class
    assert snnlstm.restore(net).swapped == ("0.0",)
    assert net[0][0] is old
    assert old.state_function.__self__ is old
    old.reset_mem()
    close([old(x) for x in X], expected)


def test_a_cell_without_a_state_function(next_base):
    """A release may choose by another attribute; what is there is compared, and no more."""
    old = theirs()
    del old.state_function
    assert snnlstm.accelerate(old).swapped == ("",)


def test_zeros_in_place(next_base):
    for kind in (snntorch.SConv2dLSTM, snnlstm.SConv2dLSTM):
        state = torch.ones(3)
        kind.zeros(state)
        assert not state.any()


def test_the_functions_of_snntorch_1_0_are_recognised_too():
    assert recognise_quant(their_quant.state_quant(4)) == state_quant(4)


# ---- the cell on signals ------------------------------------------------------------------


class Proposed(snntorch.SpikingNeuron):
    """A cell of one dimension with the names of the one that is proposed to snnTorch."""

    gates = "ifog"

    def __init__(self, in_channels, out_channels, kernel_size, bias=True, max_pool=0, avg_pool=0,
                 threshold=1.0, *args, **kwargs):  # fmt: skip
        super().__init__(threshold, *args, **kwargs)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.bias = kernel_size, bias
        self.max_pool, self.avg_pool, self.padding = max_pool, avg_pool, kernel_size // 2
        self.conv = nn.Conv1d(in_channels + out_channels, 4 * out_channels, kernel_size,
                              padding=self.padding, bias=bias)  # fmt: skip
        self.reset_mem()

    def reset_mem(self):
        for name in ("syn", "mem"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        return self.syn, self.mem

    def forward(self, input_, syn=None, mem=None):
        shape = len(input_), self.out_channels, input_.shape[-1]
        for name, given in (("syn", syn), ("mem", mem)):
            old = getattr(self, name) if given is None else given
            setattr(self, name, old if old.shape == shape else torch.zeros(shape))
        self.reset = self.mem_reset(self.mem)
        gates = self.conv(torch.cat([input_, self.mem], 1)).chunk(4, 1)
        i, f, o, g = (gates[self.gates.index(name)] for name in "ifog")
        self.syn = f.sigmoid() * self.syn + i.sigmoid() * g.tanh()
        self.mem = o.sigmoid() * self.syn.tanh()
        if self.reset_mechanism == "subtract":
            self.mem = self.mem - self.reset * self.threshold
        pooled = nn.functional.max_pool1d(self.mem, self.max_pool) if self.max_pool else self.mem
        self.spk = self.fire(pooled)
        alone = self.init_hidden and not self.output
        return self.spk if alone else (self.spk, self.syn, self.mem)


class InAnotherOrder(Proposed):
    gates = "fiog"


def signal_net(kind, **kwargs):
    torch.manual_seed(3)
    common = {"threshold": 0.05, "init_hidden": True} | kwargs
    return nn.Sequential(
        kind(2, 3, 5, max_pool=2, **common),
        kind(3, 4, 3, reset_mechanism="subtract", learn_threshold=True, output=True, **common),
    )


@pytest.mark.parametrize("kind", [Proposed, InAnotherOrder])
def test_their_cell_on_signals_is_taken_once_it_exists(monkeypatch, kind):
    monkeypatch.setitem(swap.OURS, kind, snnlstm.SConv1dLSTM)
    model, expected = signal_net(kind), signal_net(kind)
    random = torch.get_rng_state()
    report = snnlstm.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    if kind is InAnotherOrder:
        assert set(report.left.values()) == {"it computes other things than our cell"}
        return
    assert report.swapped == ("0", "1")
    assert not report.left
    parameters = list(model.parameters())
    for net in (model, expected):
        utils.reset(net)
    for step in steps(4, 3, 2, 12):
        outs = model(step), expected(step)
        close(*outs)
        assert outs[1][0].any()
    assert all(type(cell) is snnlstm.SConv1dLSTM and cell.path.native for cell in model)
    pairs = zip(outs, (model, expected), strict=True)
    close(*(torch.autograd.grad(out[0].sum(), list(net.parameters())) for out, net in pairs),
          atol=2e-5)  # fmt: skip
    assert snnlstm.restore(model).swapped == ("0", "1")
    assert all(type(cell) is kind for cell in model)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    close(model(steps(1, 3, 2, 12)[0]), expected(steps(1, 3, 2, 12)[0]))


def test_no_cell_on_signals_is_taken_that_fails(monkeypatch):
    class Fails(Proposed):
        def forward(self, input_, syn, mem):
            return super().forward(input_, syn, mem)

    monkeypatch.setitem(swap.OURS, Fails, snnlstm.SConv1dLSTM)
    (reason,) = snnlstm.accelerate(Fails(2, 3, 5)).left.values()
    assert reason.startswith("a call raises TypeError: ")
