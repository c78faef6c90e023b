"""Sequential decides how each of its layers runs, says why, and stays an nn.Sequential.

Layers that run step by step take turns at every step, and their results are stacked.
"""

import copy
from collections import OrderedDict

import pytest
import snntorch
import torch
from snntorch import utils
from torch import nn

import snnlstm
from snnlstm.networks.layers import way_of
from tests.sequences.stacks import (
    N,
    T,
    X,
    equals_the_loop,
    fold_up_to,
    hidden,
    leaky,
    loop,
)
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close, ours, theirs


def test_layers_that_change_under_way_take_effect():
    calls = []
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), ours(3, 2, 3), nn.ReLU())
    for layer in net:
        layer.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[0]))
    one = snnlstm.Sequential(*net)
    expected = loop(copy.deepcopy(net), X)
    calls.clear()
    close(one(X), expected)
    assert [layer.reason for layer in one.report] == 3 * ["it carries hooks"]
    assert calls == 3 * T * [N]  # a hook sees each step, as in the loop
    net[0]._forward_hooks.clear()
    net[0].forward = lambda x: torch.cat([x, x[:, :1] * x.mean()], 1)  # mixes samples
    expected = loop(copy.deepcopy(net), X)
    close(one(X), expected)
    assert one.report[0].reason == "its forward was replaced"


@pytest.mark.parametrize(
    ("layer", "kib", "count", "kind"),
    [
        (nn.Tanh(), 128, 1000, "fold"),
        (nn.Tanh(), 129, 63, "fold"),
        (nn.Tanh(), 129, 64, "step"),
        (nn.Tanh(), 1024, 8, "fold"),
        (nn.Tanh(), 1025, 2, "step"),
        (nn.Linear(256, 512), 512, 1000, "fold"),
        (nn.Linear(256, 513), 512, 2, "step"),
        (nn.Linear(256, 128), 1024, 1000, "fold"),
        (nn.Linear(256, 128), 1025, 2, "step"),
        (snnlstm.Leaky(0.9), 1024, 1000, "sequence"),
        (snnlstm.Leaky(0.9), 1025, 2, "step"),
    ],
)
def test_large_steps_run_one_by_one(layer, kib, count, kind):
    """The sizes of steps from both sides of each limit; x takes no memory."""
    x = torch.zeros(()).expand(count, kib, 256)
    assert way_of("", layer, x, x.dim() - 1, count, False).kind == kind
    assert way_of("", layer, x[0], x.dim() - 1, count, False, one=True).kind == kind


@needs_core
@pytest.mark.parametrize("kind", ["fold", "step", "once"])
def test_pools_in_a_stack_run_the_kernels(kind, monkeypatch):
    """The network was not accelerated; a pool that carries hooks stays torch's."""
    called, run = [], snnlstm._C.pool_forward
    monkeypatch.setattr(snnlstm._C, "pool_forward", lambda of: called.append(of) or run(of))
    fold_up_to(0 if kind == "step" else 1 << 20, monkeypatch)
    x = torch.rand(1 if kind == "once" else T, N, 4, 30, 24).expand(T, N, 4, 30, 24)
    one = equals_the_loop(nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(3, 1)), x, f"{kind} {kind}")
    runs, calls = 2, T if kind == "step" else 1
    assert len(called) == runs * 2 * calls
    one[0].register_forward_hook(lambda *_: None)
    called.clear()
    one(x)
    assert len(called) == calls


@pytest.mark.parametrize("batch_first", [False, True])
def test_global_hooks_are_called_at_every_step(batch_first):
    seen = []
    inner = snnlstm.Sequential(nn.Sigmoid(), hidden(2, 2, 3), batch_first=batch_first)
    net = snnlstm.Sequential(nn.Tanh(), inner, nn.ReLU())
    expected = loop(copy.deepcopy(net), X)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        close(net(X), expected)
    finally:
        handle.remove()
    of_a_step = [nn.Tanh, nn.Sigmoid, nn.Conv2d, snnlstm.SConv2dLSTM, snnlstm.Sequential, nn.ReLU]
    assert [kind for kind in seen if kind in of_a_step] == [*of_a_step * T, snnlstm.Sequential]
    assert {layer.reason for layer in net.report} == {"global module hooks are registered"}


REASONS = {
    "it keeps a state from step to step": [snntorch.Synaptic(0.9, 0.8, init_hidden=True)],
    "it is snntorch's, and snnlstm.accelerate(net) makes it ours": [leaky()],
    "it draws new random numbers for every step": [nn.Dropout(0.5), nn.Dropout2d(1.0)],
    "InstanceNorm2d is not known to treat every sample by itself": [nn.InstanceNorm2d(2)],
    "one call, all steps as a larger batch": [
        nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.GroupNorm(1, 2), nn.ReLU(),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_the_report_says_why(reason):
    for layer in REASONS[reason]:
        net = snnlstm.Sequential(layer)
        net(X)
        assert net.report[0].reason == reason


class Keeps(nn.Module):
    """A cell within a layer of one's own, which keeps other things too."""

    def __init__(self):
        super().__init__()
        self.cell, self.by_channel, self.all = hidden(), torch.zeros(N), torch.zeros(N + 1, 2)
        self.register_buffer("saved", torch.zeros(N, 2))
        self.register_buffer("absent", None, persistent=False)

    def forward(self, x):
        self.by_channel, self.all, self.saved = (
            kept + 1 for kept in (self.by_channel, self.all, self.saved)
        )
        return self.cell(x)


def test_a_layer_keeps_the_state_of_a_padded_sample():
    net, lengths = snnlstm.Sequential(Keeps()), torch.arange(N) + 1
    net(X[:N], lengths=lengths)
    kept = net[0]
    for n, length in enumerate(lengths):
        alone = copy.deepcopy(Keeps().cell)
        alone.load_state_dict(kept.cell.state_dict())
        snnlstm.unroll(X[:length, n : n + 1], alone)
        close([kept.cell.syn[n], kept.cell.mem[n]], [alone.syn[0], alone.mem[0]])
    for counted in (kept.by_channel, kept.all, kept.saved):
        assert counted.eq(N).all()


class Louder(snnlstm.SConv2dLSTM):
    def forward(self, x):
        return super().forward(x * x.mean())[0]


class Renamed(snnlstm.SConv2dLSTM):
    pass


class Block(nn.Sequential):
    """This subclass changes nothing."""


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def test_subclasses_are_known_by_their_forward():
    louder, renamed = Louder(2, 3, 3, threshold=0.1), Renamed(3, 2, 3, threshold=0.1)
    net = snnlstm.Sequential(louder, Block(renamed, nn.ReLU()), Residual(nn.BatchNorm2d(2)))
    other = copy.deepcopy(net)
    outs = []
    for x in X:
        spk = other[1][1](other[1][0](other[0](x))[0])
        outs.append(other[2](spk))
    close(net(X), torch.stack(outs))
    assert [(layer.name, layer.layer, layer.kind) for layer in net.report] == [
        ("0", "Louder", "step"),
        ("1.0", "Renamed", "sequence"),
        ("1.1", "ReLU", "fold"),
        ("2", "Residual", "step"),
    ]
    assert net.report[0].reason == "its class has a forward of its own"


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequential_with_hooks_within_a_sequential_is_called_once(batch_first):
    inner = snnlstm.Sequential(ours(), nn.ReLU(), leaky(), batch_first=batch_first)
    net, calls = snnlstm.Sequential(inner, nn.Flatten()), []
    expected = equals_the_loop(nn.Sequential(inner, nn.Flatten()), X, "sequence fold step fold")(X)
    utils.reset(net)
    inner.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    close(net(X), expected)
    assert calls == [(X.transpose(0, 1) if batch_first else X).shape]
    assert [layer.kind for layer in net.report] == ["sequence", "fold"]


@pytest.mark.parametrize(("tied", "name"), [("Leaky", "2"), ("cell", "2"), ("norm", "1")])
def test_layers_that_share_a_state_say_so(tied, name, caplog):
    cell, norm = hidden(2, 2, 3), nn.BatchNorm2d(2)
    layer = leaky(init_hidden=True) if tied == "Leaky" else cell
    net = (
        [nn.Sequential(norm, cell), norm] if tied == "norm" else [layer, nn.Conv2d(2, 2, 1), layer]
    )
    one = snnlstm.Sequential(*net)
    one(X)
    reason = f"layer {name} may keep a state that an earlier layer also has"
    assert {layer.reason for layer in one.report} == {reason}
    where = "0.1" if tied == "norm" else "0"
    said = f"layer {where} (SConv2dLSTM) of a stack runs step by step: {reason}"
    assert caplog.messages[:1] == [said] * (tied != "Leaky")  # a Leaky's steps are fast, too


def test_batch_first_is_kept_and_shown():
    net = snnlstm.Sequential(hidden(), hidden(3, 2, 3), nn.Flatten(), batch_first=True)
    assert net[:2].batch_first
    assert isinstance(net[0], snnlstm.SConv2dLSTM)
    assert not snnlstm.Sequential(*net)[:2].batch_first
    assert "batch_first=True" in repr(net)
    assert copy.deepcopy(net).batch_first
    assert snnlstm.Sequential.of(nn.Sequential(*net), batch_first=True).batch_first
    x, other = X.transpose(0, 1), copy.deepcopy(net)
    close(net(x), snnlstm.unroll(x, *other, batch_first=True), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(N, T, ...\) with at least one step, got \(3, 0"):
        net(x[:, :0])


class WithItsRate(nn.Module):
    def forward(self, x):
        return x, x.mean(), (x.mean((0, 2, 3)),)


def test_a_cell_with_batch_first_in_a_stack_without_it_is_logged_once(caplog):
    cell = hidden(batch_first=True)
    for _ in range(2):
        snnlstm.unroll(X, cell)
        snnlstm.Sequential(cell)(X)
    said = "layer 0 (SConv2dLSTM) of a stack has batch_first=True, and the stack, whose setting "
    assert caplog.messages == [said + "counts, has batch_first=False: x is read as (T, N, ...)"]
    snnlstm.unroll(X.transpose(0, 1), hidden(batch_first=True), batch_first=True)
    assert len(caplog.messages) == 1


def test_batch_first_leaves_a_number_a_step_as_it_is():
    spk, rate, (by_channel,) = snnlstm.unroll(X, WithItsRate())
    found = snnlstm.unroll(X.transpose(0, 1), WithItsRate(), batch_first=True)
    close(found, (spk.transpose(0, 1), rate, (by_channel.transpose(0, 1),)))
    assert rate.shape == (T,)


def test_stacks_that_are_added_or_multiplied_take_sequences():
    net = snnlstm.Sequential(hidden(2, 2, 3), nn.ReLU(), batch_first=True)
    for made, layers in ((net + nn.Sequential(nn.Flatten()), 3), (net * 2, 4), (2 * net, 4)):
        assert type(made) is snnlstm.Sequential
        assert made.batch_first
        assert len(made) == layers
        utils.reset(net)
        expected = loop(made, X)
        utils.reset(net)
        close(made(X.transpose(0, 1)).transpose(0, 1), expected)


@pytest.mark.parametrize("replaced", [False, True])
def test_of_refuses_a_forward_that_would_be_lost(replaced):
    net = nn.Sequential(nn.ReLU()) if replaced else Residual(nn.ReLU())
    if replaced:
        net.forward = net.forward
    with pytest.raises(TypeError, match=r"must have nn.Sequential's forward, got .* of its own"):
        snnlstm.Sequential.of(net)


def test_it_is_an_nn_sequential_and_of_keeps_names_and_mode():
    tied = nn.ReLU()
    layers = {"cell": ours(), "relu": tied, "flat": nn.Flatten(), "again": tied}
    net = nn.Sequential(OrderedDict(layers)).eval()
    one = snnlstm.Sequential.of(net)
    assert str(one) == str(net)
    assert type(one) is type(one[:2]) is snnlstm.Sequential
    assert one[0] is net[0]
    assert list(one.state_dict()) == list(net.state_dict())
    assert not one.training
    assert one.report is None
    expected = loop(copy.deepcopy(net), X)
    close(one(X), expected)
    assert [layer.name for layer in one.report] == ["cell", "relu", "flat", "again"]


class Theirs(snntorch.SConv2dLSTM):
    pass


def test_accelerate_works_on_it_and_fallbacks_of_cells_are_logged_once(caplog):
    net = snnlstm.Sequential(theirs(), Theirs(3, 3, 3, threshold=0.01), leaky(), ours(3, 2, 3))
    net[3].register_forward_hook(lambda *_: None)
    for _ in range(2):
        net(X)
    assert caplog.messages == [
        "layer 0 (SConv2dLSTM) of a stack runs step by step: it is snntorch's, and "
        "snnlstm.accelerate(net) makes it ours",
        "layer 1 (Theirs) of a stack runs step by step: its class is a subclass of "
        "snntorch.SConv2dLSTM",
        "layer 2 (Leaky) of a stack runs step by step: it is snntorch's, and "
        "snnlstm.accelerate(net) makes it ours",
        "layer 3 (SConv2dLSTM) of a stack runs step by step: it carries hooks",
    ]
    before = net(X)
    utils.reset(net)
    assert snnlstm.accelerate(net).swapped == ("0", "2")
    first = net(X)
    assert net.report[0].kind == "sequence"
    utils.reset(net)
    close(net(X), first)
    assert not torch.equal(before[0], first[0])  # utils.reset reached the cells


# ---- step by step --------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request, monkeypatch):
    """Steps are small, or so large that they run one by one."""
    if request.param:
        fold_up_to(0, monkeypatch)
    return request.param


class Each(nn.Module):
    """A layer of the user's applies a function, which may know the step."""

    def __init__(self, function):
        super().__init__()
        self.function, self.step = function, -1

    def forward(self, x):
        self.step += 1
        return self.function(x, self.step)


def test_a_step_goes_through_all_layers_before_the_next(monkeypatch):
    fold_up_to(0, monkeypatch)
    order = []

    def noted(name):
        return Each(lambda x, step: (order.append(name + str(step)), x.tanh())[1])

    net = [noted("a"), nn.Conv2d(2, 3, 3, padding=1), noted("b"), ours(3, 2, 3), noted("c")]
    snnlstm.unroll(X, *net)
    assert order == [f"{name}{t}" for t in range(T) for name in "ab"] + [f"c{t}" for t in range(T)]


def test_gradients_of_the_first_and_the_second_order(large):
    net = [nn.Conv2d(1, 2, 3, dtype=torch.float64), Each(lambda x, t: torch.tanh(x * (t + 1)))]
    x = torch.rand(3, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        net[1].step = -1
        return snnlstm.unroll(x, *net)

    assert torch.autograd.gradcheck(run, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, x)
    _, found = torch.func.jvp(run, (x,), (x,))
    close(found, torch.autograd.functional.jvp(run, x, x)[1])


def test_steps_without_a_gradient_among_steps_with_one():
    weight = torch.tensor(3.0, requires_grad=True)
    layer = Each(lambda x, t: x * weight if t in (1, 3) else x * 1)
    out = snnlstm.unroll(X, layer)
    (out * torch.arange(1.0, T + 1).view(-1, 1, 1, 1, 1)).sum().backward()
    close(weight.grad, 2 * X[1].sum() + 4 * X[3].sum(), atol=1e-4)
    out = snnlstm.unroll(X, Each(lambda x, t: x * 2))
    assert not out.requires_grad


def test_steps_of_several_dtypes_become_one_as_in_the_loop():
    layer = Each(lambda x, t: x.double() if t == 3 else x * 1)
    close(snnlstm.unroll(X, layer), X.double(), atol=0)


def test_steps_of_several_shapes_are_an_error():
    said = r"layer 1 must return tensors of one shape at every step, got \(3, 2, 6.* and \(3, 1, 6"
    with pytest.raises(ValueError, match=said):
        snnlstm.unroll(X, nn.Tanh(), Each(lambda x, t: x[:, :1] if t == 3 else x * 1))


def test_tuples_must_come_at_every_step():
    said = "layer 0 must return tensors, or tuples of as many tensors, at every step, got "
    for odd in ("a text", None, ()):
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, odd=odd: odd if t == 3 else x * 1))
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, odd=odd: odd), nn.BatchNorm2d(2))
    for few in (lambda x: x * 1, lambda x: (x,)):
        with pytest.raises(TypeError, match=said):
            snnlstm.unroll(X, Each(lambda x, t, few=few: few(x) if t == 3 else (x, x)))


def test_vmap_sees_every_step(large):
    layers = [nn.Conv2d(2, 2, 3), Each(lambda x, t: x.sin())]
    x = torch.rand(3, T, N, 2, 5, 5)
    expected = torch.stack([snnlstm.unroll(each, *layers) for each in x])
    with torch.no_grad():
        close(torch.func.vmap(lambda each: snnlstm.unroll(each, *layers))(x), expected)


def test_norms_that_share_running_statistics_write_to_them_in_turns():
    nets = [nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))]
    torch.manual_seed(0)
    nets[0][0].running_mean = nets[0][2].running_mean
    nets.append(copy.deepcopy(nets[0]))
    found, expected = snnlstm.unroll(X, *nets[0]), torch.stack([nets[1](x) for x in X])
    close([found, *nets[0].buffers()], [expected, *nets[1].buffers()])


@pytest.mark.parametrize("trouble", ["eps=0", "one value", "no running mean"])
def test_errors_of_norms_are_those_of_the_loop(trouble):
    norm, x = nn.BatchNorm1d(2), X[..., 0, 0]
    if trouble == "eps=0":
        norm.eps = 0.0
    elif trouble == "one value":
        x = x[:, :1]
    else:
        norm.running_mean = None
        norm.eval()
    other = copy.deepcopy(norm)
    raised = []
    for run in lambda: other(x[0]), lambda: snnlstm.unroll(x, norm):
        with pytest.raises((ValueError, RuntimeError)) as error:
            run()
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]
    assert norm.num_batches_tracked == other.num_batches_tracked
