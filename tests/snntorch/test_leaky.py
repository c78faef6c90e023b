"""Leaky computes what snntorch 1.0.0's does: bitwise in float32, and to 1e-12 by a formula."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor

import snnlstm
from snnlstm import surrogate
from snnlstm.surrogate import KINDS
from tests.shared.helpers import close, described

F64 = torch.float64
T = 4


def twins(**options: Any) -> list[Any]:
    """Makes our layer and snnTorch's with equal arguments."""
    options = {"beta": 0.8, "threshold": 0.3, **options}
    return [library.Leaky(**copy.deepcopy(options)) for library in (snnlstm, snntorch)]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draws x of T steps, whose neurons spike at some of them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((T, *shape), generator=generator, dtype=F64).to(dtype)


def run(layer: Any, x: Tensor, through: str = "both") -> tuple[list[Tensor], list[Tensor]]:
    """Runs a loop of steps; returns spk, mem and reset of all steps, and the gradients."""
    x = x.clone().requires_grad_()
    outs, total = [], torch.zeros((), dtype=F64)
    weights = inputs(*x.shape, dtype=F64, seed=1)
    for t, x_t in enumerate(x):
        out = layer(x_t)
        spk, mem = out if isinstance(out, tuple) else (out, layer.mem)
        outs += [spk.detach(), mem.detach().clone(), layer.reset]
        if through != "mem":
            total = total + (spk * weights[0, t]).sum()
        if through != "spk":
            total = total + (mem * weights[1, t]).sum()
    total.backward()
    return outs, [x.grad, *gradients(layer)]  # type: ignore[list-item]


def gradients(layer: Any) -> list[Any]:
    return [getattr(layer, name).grad for name in ("beta", "threshold")]


def alike(ours: Any, theirs: Any, x: Tensor, through: str = "both", **tolerance: float) -> None:
    (out, grads), (expected, exact) = run(ours, x, through), run(theirs, x, through)
    assert ours.path.native, ours.path
    for one, other in zip(out, expected, strict=True):
        assert torch.equal(one.to(other.dtype), other)
    assert any(spk.any() for spk in out[::3]), "no neuron has spiked"
    close(grads, exact, **tolerance or {"atol": 1e-5})


SHAPES = [(7,), (3, 5), (2, 3, 5), (2, 3, 4, 5), (1, 1), (33, 67)]
# snnTorch's LSO cannot be called, and SSO draws numbers.
SURROGATES = [kind.name for kind in KINDS[1:] if kind.name not in ("LSO", "SSO")]


@pytest.mark.parametrize("through", ["spk", "mem", "both"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=described)
def test_steps(shape: tuple[int, ...], reset: str, through: str) -> None:
    options: dict[str, Any] = {"reset_mechanism": reset, "learn_beta": True, "init_hidden": True}
    alike(*twins(**options, learn_threshold=True), inputs(*shape), through, atol=1e-4, rtol=1e-4)
    alike(*twins(**options, output=True), inputs(*shape, seed=2), through, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name: str) -> None:
    spike_grad = getattr(snntorch.surrogate, name)()
    x = inputs(3, 5) / 2  # snnTorch's sigmoid is NaN for very negative inputs
    alike(*twins(spike_grad=spike_grad, learn_threshold=True), x, atol=1e-4, rtol=1e-4)


OF_CHANNELS, OF_FEATURES = torch.tensor([0.3, 0.6, 0.9])[:, None, None], torch.linspace(0.1, 0.9, 5)
OPTIONS: list[dict[str, Any]] = [
    {"beta": 1, "threshold": 1}, {"beta": 1.3}, {"beta": -0.2}, {"beta": 0.0}, {"beta": 1.0},
    {"beta": OF_CHANNELS}, {"beta": OF_FEATURES}, {"threshold": OF_CHANNELS},
    {"beta": OF_CHANNELS, "threshold": OF_FEATURES}, {"threshold": OF_FEATURES[None, None]},
    {"beta": torch.tensor([0.7]), "threshold": torch.tensor(0.2, dtype=F64)},
    {"beta": OF_CHANNELS * 3 - 1, "threshold": OF_CHANNELS}, {"graded_spikes_factor": -0.5},
    {"surrogate_disable": True}, {"beta": OF_CHANNELS[:2, None] + 0.2},
]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_options(options: dict[str, Any], reset: str, layout: str) -> None:
    learn = {f"learn_{name}": torch.is_tensor(options.get(name)) for name in ("beta", "threshold")}
    x = inputs(2, 3, 4, 5)
    if layout == "channels_last":
        x = torch.stack([x_t.to(memory_format=torch.channels_last) for x_t in x])
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "gaps":
        x = torch.stack([x, x], -1)[..., 0]
    alike(*twins(**options, **learn, reset_mechanism=reset), x, atol=1e-4, rtol=1e-4)


def formula(x: Tensor, mem: Tensor, beta: Tensor, threshold: Tensor, reset: str) -> Any:
    """The step of semantics, in x's dtype, with the fast sigmoid's gradient."""
    signal = (mem > threshold).to(x.dtype).detach()
    mem = mem * (1 - signal) if reset == "zero" else mem
    mem = beta.clamp(0, 1) * mem + x - (signal * threshold if reset == "subtract" else 0)
    return surrogate.fast_sigmoid()(mem - threshold), mem


def by_formula(x: Tensor, reset: str, *parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
    mem, outs, total = torch.zeros_like(x[0]), [], torch.zeros((), dtype=F64)
    weights = inputs(*x.shape, dtype=F64, seed=1)
    for t, x_t in enumerate(leaves[0]):
        before = mem
        spk, mem = formula(x_t, mem, *leaves[1:], reset)
        outs += [spk, mem, (before > parameters[1]).to(x.dtype)]
        total = total + (spk * weights[0, t]).sum() + (mem * weights[1, t]).sum()
    return outs, list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "sequence"])
@pytest.mark.parametrize("dtype", [F64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_dtypes(reset: str, dtype: torch.dtype, whole: bool) -> None:
    """x of a half type is read as it is, and all is computed in float32."""
    real = F64 if dtype is F64 else torch.float32
    beta, threshold = torch.rand(3, 1, 1, dtype=real), torch.rand(5, dtype=real)
    layer = snnlstm.Leaky(
        beta, threshold, surrogate.fast_sigmoid(), learn_beta=True, learn_threshold=True,
        reset_mechanism=reset,
    )  # fmt: skip
    x = inputs(2, 3, 4, 5, dtype=dtype)
    outs, grads = run_whole(layer, x) if whole else run(layer, x)
    expected, exact = by_formula(x.to(real), reset, beta, threshold)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype is F64 else {"atol": 2e-5, "rtol": 2e-5}
    for out, one in zip(outs, expected, strict=True):
        assert out.dtype is real
        close(out, one, **tolerance)
    assert grads[0].dtype is dtype
    close(grads[0], exact[0].to(dtype), atol=tolerance["atol"], rtol=0 if dtype is F64 else 1e-2)
    close(grads[1:], exact[1:], **tolerance if dtype is F64 else {"atol": 1e-3, "rtol": 1e-3})


def run_whole(layer: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """As run(), in one call."""
    x, weights = x.clone().requires_grad_(), inputs(*x.shape, dtype=F64, seed=1)
    spks, mems = layer.sequence(x, True)
    assert torch.equal(layer.mem, mems[-1])
    assert not layer.mem._is_view()
    ((spks * weights[0]).sum() + (mems * weights[1]).sum()).backward()
    resets = [torch.zeros_like(mems[:1]), mems[:-1]]
    signal = torch.cat(resets).detach() > layer.threshold
    outs = [
        t.detach() for step in zip(spks, mems, signal.to(mems.dtype), strict=True) for t in step
    ]
    return outs, [x.grad, *gradients(layer)]  # type: ignore[list-item]


# ---- which forward runs --------------------------------------------------------------------------


def quantiser(x: Tensor) -> Tensor:
    return x.round()


OTHERS = {
    "reset_delay is False": {"reset_delay": False},
    "inhibition": {"inhibition": True},
    "state_quant": {"state_quant": quantiser},
    "the surrogate is not a known one": {"spike_grad": lambda u: (u > 0).float() + 0 * u},
    "graded_spikes_factor is learned": {"learn_graded_spikes_factor": True},
    "graded_spikes_factor is learned, or is not": {"graded_spikes_factor": torch.ones(5)},
    "beta varies along more than one dimension": {"beta": torch.rand(3, 5)},
    "threshold varies along more than one": {"threshold": torch.rand(2, 1, 3, 5)},
    "beta is of torch.float64": {"beta": torch.rand(5, dtype=F64)},
}


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("reason", OTHERS)
def test_snntorch_s_own_forward_runs(reason: str, caplog: Any) -> None:
    layer, other = twins(**OTHERS[reason])
    x = inputs(3, 5)
    for x_t in x:
        close(layer(x_t), other(x_t), atol=0)
        close(layer.reset, other.reset, atol=0)
    assert layer.path.name == "reference"
    assert layer.path.reason.startswith(reason)
    assert [reason in message for message in caplog.messages] == [True]  # once


def test_a_call_runs_what_state_function_says() -> None:
    layer, other = twins()
    for neuron in (layer, other):
        neuron.reset_mechanism = "zero"  # changes no call, as in snnTorch
    alike(layer, other, inputs(3, 5))
    for neuron in (layer, other):
        neuron.state_function = neuron._base_zero
        neuron.reset_mem()
    alike(layer, other, inputs(3, 5))
    layer.state_function = lambda x: x
    layer(inputs(3, 5)[0])
    assert layer.path.reason == "its state_function was replaced"


@pytest.mark.parametrize("name", ["fire", "mem_reset", "_base_sub", "_base_state_function"])
def test_replaced_methods_are_called(name: str, monkeypatch: Any) -> None:
    layer = twins()[0]
    seen: list[Any] = []
    original = getattr(layer, name)
    setattr(layer, name, lambda x: (seen.append(name), original(x))[1])
    layer(inputs(3, 5)[0])
    assert layer.path.reason == f"its {name} was replaced"
    assert seen or name == "_base_sub"  # state_function holds the method itself
    net = torch.nn.Sequential(twins()[1])
    setattr(net[0], name, original)
    assert snnlstm.accelerate(net).left == {"0": f"its {name} was replaced"}
    other = twins()[0]
    monkeypatch.setattr(snntorch.Leaky, name, lambda self, x: x)
    other(inputs(3, 5)[0])
    assert other.path.reason == f"its {name} was replaced"


def test_transforms_and_compilers_see_plain_torch() -> None:
    layer, other = twins(init_hidden=True, spike_grad=surrogate.atan())
    x = inputs(3, 5)
    expected = torch.func.vmap(other)(x)
    assert torch.equal(torch.func.vmap(layer)(x), expected)
    layer.mem, other.mem = torch.zeros(3, 5), torch.zeros(3, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    same = [torch.equal(compiled(x_t), other(x_t)) for x_t in x]
    assert all(same)
    assert torch.equal(layer.reset, other.reset)
    assert torch.equal(layer.mem, other.mem)


def test_second_derivatives() -> None:
    found = []
    for layer in twins(learn_beta=True, learn_threshold=True):
        x = inputs(3, 5, dtype=F64).requires_grad_()
        leaves = [x, layer.beta, layer.threshold]
        total = sum((spk + mem.square()).sum() for spk, mem in map(layer, x))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    close(*found, atol=1e-6, rtol=1e-5)


# ---- the state -----------------------------------------------------------------------------------


def test_mem_may_be_passed() -> None:
    layer, other = twins()
    x, mem = inputs(3, 5)[:2]
    for neuron in (layer, other):
        neuron(x, mem)
    same = torch.equal(layer(x, mem=mem)[1], other(x, mem=mem)[1])
    assert same
    parameter = torch.nn.Parameter(mem)  # which snnTorch refuses
    layer(x, parameter)[1].sum().backward()
    close(parameter.grad, torch.full((3, 5), 0.8))
    assert set(layer._buffers) == set(other._buffers)
    assert not layer._parameters
    close(layer(x, torch.ones(7)), other(x, torch.ones(7)), atol=0)  # zeros, as in snnTorch


def test_after_an_error_the_state_is_as_before() -> None:
    layer = twins(init_hidden=True)[0]
    x = inputs(3, 5)[0]
    layer(x)
    before, reset = layer.mem, layer.reset
    with pytest.raises(TypeError, match="`mem` should not be passed"):
        layer(x, x)
    with pytest.raises(TypeError, match="input_ must be a tensor, got list"):
        layer([x])
    layer.inhibition = True  # snnTorch's own forward, which takes a batch
    with pytest.raises(IndexError):
        layer(x[0])
    assert layer.mem is before
    assert torch.equal(layer.reset, reset)


def test_the_mem_that_is_returned_is_stored() -> None:
    layer = twins(learn_beta=True)[0]
    assert layer(inputs(3, 5)[0])[1] is layer.mem
    mem = layer.mem
    snnlstm.Leaky.detach_hidden()
    assert mem.grad_fn is None
    layer.reset_mem()
    assert not layer.mem.any()


def test_nothing_outlives_a_reset() -> None:
    """The graph of old steps goes with mem, and what no gradient needs is not kept."""
    layer = twins(init_hidden=True, learn_beta=True)[0]
    kept = []
    for x_t in inputs(3, 5):
        layer(x_t)
        kept.append(weakref.ref(layer.mem.grad_fn))
    layer.reset_mem()
    assert [node() for node in kept] == [None] * T


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "sequence"])
@pytest.mark.parametrize("change", ["clone", "strides", "double", "shape"])
def test_hooks_on_saved_tensors(change: str, whole: bool) -> None:
    def unpack(saved: Tensor) -> Any:
        if change == "strides" and saved.dim() > 1:
            return saved.mT.contiguous().mT
        if change == "shape" and saved.dim() > 1:
            return saved[:1]
        return saved.double() if change == "double" else saved.clone()

    options: dict[str, Any] = {"learn_beta": True, "learn_threshold": True}
    layer, other = twins(**options)[0], twins(**options)[0]
    go = run_whole if whole else run
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        if change == "shape":
            with pytest.raises(RuntimeError, match="must keep its shape"):
                go(layer, inputs(3, 5))
            return
        _, grads = go(layer, inputs(3, 5))
    close(grads, go(other, inputs(3, 5))[1])


def test_changes_in_place_are_noticed() -> None:
    for change in ("mem", "beta", "threshold"):
        layer = twins(learn_beta=True)[0]
        x = inputs(3, 5).requires_grad_()
        spk, mem = layer(x[0])
        with torch.no_grad():
            {"mem": mem, "beta": layer.beta, "threshold": layer.threshold}[change].mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (spk.sum() + mem.sum()).backward()


def test_graphs_run_again_and_layers_travel() -> None:
    layer = twins(learn_beta=True, init_hidden=True, spike_grad=surrogate.sigmoid())[0]
    x = inputs(3, 5).requires_grad_()
    total = sum(layer(x_t).sum() for x_t in x)
    first = torch.autograd.grad(total, x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(total, x))
    for duplicate in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer.mem = layer.mem.detach()
        copied = duplicate(layer)
        assert copied.state_function.__self__ is copied
        assert torch.equal(copied(x[0]), layer(x[0]))
        assert torch.equal(copied.reset, layer.reset)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 4), (0,)], ids=described)
def test_no_samples(shape: tuple[int, ...]) -> None:
    layer = twins(learn_beta=True)[0]
    x = torch.zeros(T, *shape, requires_grad=True)
    total = sum(mem.sum() for _, mem in map(layer, x)) + layer.sequence(x, True)[1].sum()
    total.backward()
    assert x.grad.shape == x.shape  # type: ignore[union-attr]
    assert layer.beta.grad == 0


def test_a_state_of_inference_mode_serves_in_training() -> None:
    layer = twins(learn_beta=True, init_hidden=True, reset_mechanism="zero")[0]
    with torch.inference_mode():
        layer(inputs(3, 5)[0])
    layer(inputs(3, 5)[1]).sum().backward()
    assert layer.beta.grad is not None


def test_nan_and_infinity() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.5, -0.5]).repeat(T, 1)
    for reset in ("subtract", "zero", "none"):
        layer, other = twins(reset_mechanism=reset)
        for x_t in x:
            close(layer(x_t), other(x_t), atol=0)
            close(layer.reset, other.reset, atol=0)
    layer = twins(threshold=float("inf"))[0]
    assert layer(x[0])[1][3] == 0.5  # snnTorch's is NaN


def test_stochastic_surrogate() -> None:
    """Its factor is drawn in the backward pass: below the threshold within its range."""
    layer = twins(spike_grad=snntorch.surrogate.SSO(mean=0.5, variance=0.2))[0]
    x = torch.full((T, 40, 50), -0.5, requires_grad=True)
    spk, _ = layer.sequence(x, True)
    torch.manual_seed(0)
    spk.sum().backward()
    last = x.grad[-1]  # type: ignore[index]
    torch.manual_seed(0)
    assert torch.equal(last, torch.rand(40, 50) * 0.2)


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 40, 50)], ids=described)
def test_sequences_are_steps(shape: tuple[int, ...], threads: int) -> None:
    options = {"learn_beta": True, "beta": OF_CHANNELS} if len(shape) == 4 else {}
    layer, other = twins(**options)[0], twins(**options)[0]
    x = inputs(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (outs, grads), (expected, exact) = run_whole(layer, x), run(other, x)
        with torch.no_grad():
            spks = twins(**options)[0].sequence(x, False)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, outs, expected))
    assert torch.equal(spks, torch.stack(expected[::3]))
    close(grads[0], exact[0], atol=1e-5)
    if options:
        close(grads[1], exact[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_stacks(padded: bool, output: bool) -> None:
    """A Sequential calls our layer once, and gives what it gives with snnTorch's layer."""
    nets = []
    for layer in twins(init_hidden=True, output=output, learn_threshold=True):
        torch.manual_seed(0)
        nets.append(snnlstm.Sequential(torch.nn.Linear(5, 4), layer))
    x, lengths = inputs(3, 5), torch.tensor([2, 0, T]) if padded else None
    found = []
    for net in nets:
        for _ in range(2):  # the second call goes on from the stored state
            out = net(x, lengths)
        (out[0] + out[1] if output else out).square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        found.append((out if output else (out,), net[1].mem.detach(), grads))
    close(*found, atol=1e-5)
    assert [net.report[1].kind for net in nets] == ["sequence", "step"]
    assert "accelerate" in nets[1].report[1].reason
    large = snnlstm.Sequential(twins()[0])
    large(torch.zeros(T, 2, 128, 129))
    assert large.report[0].kind == "step"  # in the cache, on the CPU


def test_spike_rates_of_a_sequence() -> None:
    counts = []
    for layer in twins(init_hidden=True):
        net, x = snnlstm.Sequential(layer), inputs(3, 5)
        with snnlstm.spike_rates(net, show=False) as rates:
            net(x)
        counts.append((rates["0"].spikes, rates["0"].chances, rates["0"].highest))
    assert counts[0] == counts[1]


# ---- in the place of snnTorch's ------------------------------------------------------------------


def test_accelerate_and_restore() -> None:
    layer = twins()[1]
    seen: list[Any] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    net = torch.nn.Sequential(layer, twins()[0])
    x = inputs(3, 5)
    layer(x[0])
    before = set(vars(layer)), layer.reset, layer.state_dict()
    assert snnlstm.accelerate(net).swapped == ("0",)
    assert type(layer) is snnlstm.Leaky
    assert layer.reset is before[1]
    assert layer in snntorch.Leaky.instances
    layer(x[1])
    signal, mem = layer.reset, layer.mem
    assert snnlstm.restore(net).swapped == ("0", "1")
    assert type(layer) is type(net[1]) is snntorch.Leaky
    assert set(vars(layer)) == before[0]
    assert layer.mem is mem
    assert torch.equal(layer.reset, signal)
    layer(x[2])
    assert len(seen) == 3
    assert str(snnlstm.accelerate(net)).count("swapped") == 3


def test_a_network_without_cells_is_no_warning(caplog: Any) -> None:
    snnlstm.accelerate(torch.nn.Sequential(twins()[1]))
    assert not caplog.messages
    snnlstm.accelerate(torch.nn.Sequential(torch.nn.ReLU()))
    assert caplog.messages == ["accelerate found neither SConv2dLSTM nor Leaky in the model"]


class Mine(snntorch.Leaky):
    pass


def test_patch_and_subclasses() -> None:
    with snnlstm.patch():
        made, mine = snntorch.Leaky(0.9, threshold=0.3), Mine(0.9)
    assert type(made) is snnlstm.Leaky
    assert type(mine) is Mine
    assert type(snntorch.Leaky(0.9)) is snntorch.Leaky
    assert "subclass" in snnlstm.accelerate(torch.nn.Sequential(mine)).left["0"]


def test_weights_load_both_ways() -> None:
    layer, other = twins(learn_beta=True, beta=0.5)
    layer.load_state_dict(other.state_dict())
    other.load_state_dict(layer.state_dict())
    assert list(layer.state_dict()) == list(other.state_dict())
