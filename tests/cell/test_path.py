"""The cell runs the kernels or the reference as it should; cell.path and the log name which."""

import re
from functools import partial
from importlib import util

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, prune

import snnlstm
from snnlstm import Path
from snnlstm.calls.entries import BoundedDict
from snnlstm.compat import torch_private
from snnlstm.dispatch.reasons import against_device
from snnlstm.native import function
from tests.shared.cpu_kernels import native, needs_core
from tests.shared.helpers import close, described, ours, states, steps, theirs, twins

X, START = steps(1, 2, 2, 6, 7)[0], states(2, 3, 6, 7)


def hooked(kind="forward", hook=lambda module, args, out: out * 1.5):
    """Returns a function that registers a hook on a module."""

    def change(conv):
        getattr(conv, f"register_{kind}_hook")(hook)
        return conv

    return change


def with_plain_bias(conv):
    bias = conv.bias.detach() + 1
    del conv.bias
    conv.bias = bias
    return conv


def with_same_padding(conv):
    conv.padding = "same"
    return conv


def dilated(conv):
    conv.dilation, conv.padding = (2, 2), (2, 2)
    return conv


def replaced(name):
    """Returns a function that replaces a method of one convolution."""

    def change(conv):
        method = getattr(conv, name)
        setattr(conv, name, lambda *args: method(*args) * 0.5)
        return conv

    return change


CHANGES = {
    "hook": (hooked(), "conv carries hooks"),
    "pre-hook": (hooked("forward_pre", lambda _, args: (args[0] * 1.5,)), "conv carries hooks"),
    "backward hook": (
        hooked("full_backward", lambda _, grads, out: (grads[0] * 2,)),
        "conv carries hooks",
    ),
    "weight_norm": (parametrizations.weight_norm, "conv is a ParametrizedConv2d"),
    "spectral_norm": (parametrizations.spectral_norm, "conv is a ParametrizedConv2d"),
    "old weight_norm": (nn.utils.weight_norm, "conv carries hooks"),
    "pruned": (lambda conv: prune.l1_unstructured(conv, "weight", 0.3), "conv carries hooks"),
    "plain bias": (with_plain_bias, "the native kernels"),
    "same padding": (with_same_padding, "the native kernels"),
    "an adapter on a frozen conv": (
        lambda conv: nn.Sequential(conv.requires_grad_(False), nn.Tanh(), nn.Conv2d(12, 12, 1)),
        "conv is a Sequential",
    ),
    "another kernel": (lambda conv: nn.Conv2d(5, 12, 1), "conv has another geometry"),
    "reflecting": (
        lambda conv: nn.Conv2d(5, 12, 3, padding=1, padding_mode="reflect"),
        "conv has another geometry",
    ),
    "dilated": (dilated, "conv has another geometry"),
    "replaced forward": (replaced("forward"), "conv.forward was replaced"),
    "replaced _conv_forward": (replaced("_conv_forward"), "conv.forward was replaced"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_what_changes_conv_takes_effect_and_trains_as_with_snntorch(name, reset):
    change, reason = CHANGES[name]
    for _ in range(2):  # a conv without bias is known by now
        ours(bias=False, reset_mechanism=reset)(X, *START)
    cells, curves, starts = twins(reset_mechanism=reset), [], []
    for cell in cells:
        torch.manual_seed(5)
        cell.conv = change(cell.conv)
        # With "zero" snnTorch calls conv twice; in training each call of spectral_norm iterates.
        cell.train(reset != "zero")
        optimizer = torch.optim.SGD([p for p in cell.parameters() if p.requires_grad], lr=0.005)
        start = START[1].clone().requires_grad_()
        curves.append([])
        for _ in range(3):
            optimizer.zero_grad()
            state, loss = (START[0], start), 0
            for x in steps(2, 2, 2, 6, 7):
                spk, *state = cell(x, *state)
                loss = loss + spk.sum() + state[1].sum()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
        starts.append(start.grad)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][2] != pytest.approx(curves[0][0], rel=1e-5)
    close(*starts, atol=1e-4, rtol=1e-4)
    close(cells[0].state_dict(), cells[1].state_dict(), atol=1e-4)
    assert cells[0].path.native == (name in ("plain bias", "same padding"))
    assert cells[0].path.reason.startswith(reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilation": 2}, "must match the size"),
        ({"kernel_size": 1}, "must match the size"),
        ({"stride": 2}, "must match the size"),
        ({"padding": 0}, "must match the size"),
        ({"in_channels": 4}, "to have 4 channels"),
    ],
    ids=described,
)
def test_a_conv_that_does_not_fit_fails_as_it_does_there_each_time(change, message):
    sizes = {"in_channels": 5, "out_channels": 12, "kernel_size": 3, "padding": 1}
    for cell in twins():
        cell.conv = nn.Conv2d(**sizes | change)
        for _ in range(3):
            with pytest.raises(RuntimeError, match=message):
                cell(X, *START)


def test_a_function_in_the_place_of_conv():
    found = []
    for cell in twins():
        conv = cell.conv
        del cell.conv
        cell.conv = lambda x, conv=conv: conv(x) * 2
        found += [cell(X, *START), cell(X, *START)]
    for other in found[1:]:
        close(other, found[0])


def louder(function):
    def changed(*args, **kwargs):
        out = function(*args, **kwargs)
        return out * 0.5 if isinstance(out, torch.Tensor) else out

    return changed


def hook(module, args, out):
    return out * 2 if isinstance(module, nn.Conv2d) else None


# What is patched for all convolutions.
PATCHED = [(nn.Module, "__call__"), (nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward")]
PATCHED += [(nn.functional, "conv2d"), (nn.modules.module, "_global_forward_hooks")]


@pytest.mark.parametrize(("holder", "name"), PATCHED, ids=[name for _, name in PATCHED])
def test_what_is_patched_for_all_convolutions_takes_effect(holder, name, monkeypatch):
    cells, before, hooks = twins(), getattr(holder, name), name == "_global_forward_hooks"
    for cell in cells:
        cell(X, *START)
    monkeypatch.setattr(holder, name, {0: hook} if hooks else louder(before))
    actual, expected = (cell(X, *START) for cell in cells)
    close(actual, expected)
    reason = "global module hooks are registered" if hooks else "conv.forward was replaced"
    assert cells[0].path == Path("reference", reason, slow=True, general=hooks)


@needs_core
def test_the_native_path_says_what_it_is():
    cell = ours()
    assert cell.path is None
    for algorithm in ("direct", "winograd"):
        with snnlstm.algorithm(algorithm):
            cell(X)
        assert re.fullmatch(rf"cpu-\w+-{algorithm}(\dx\d)?(-sparse)?", cell.path.name)
        assert str(cell.path) == f"{cell.path.name} (the native kernels cover this call)"


@needs_core
@pytest.mark.parametrize("algorithm", ["fused", "cudnn"])
def test_algorithms_of_cuda_alone_are_auto_on_the_cpu(algorithm):
    auto, cell = ours(), ours()
    auto(X)
    with snnlstm.algorithm(algorithm):
        cell(X)
    assert cell.path == auto.path


FUNCTIONAL = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0)) / 9
# What runs a sequence, and returns a tensor that has to be the same on either path.
RUNS = {
    "cell": ours,
    "signals": lambda: snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1),
    "ConvLSTM": lambda: snnlstm.ConvLSTM(2, 3, 3, 1),
    "functional": lambda: partial(snnlstm.functional.sconv2dlstm, weight=FUNCTIONAL),
}


@needs_core
@pytest.mark.parametrize("name", RUNS)
def test_the_user_may_choose_the_reference_path_where_plans_exist(name, monkeypatch, caplog):
    run, x = RUNS[name](), steps(3, 2, 2, 6, 7)
    x = x[..., 0] if name == "signals" else x
    expected = run(x)[-1]
    monkeypatch.setattr(function, "run_plan", None)
    for _ in range(2):
        with snnlstm.algorithm("reference"):
            getattr(run, "reset_mem", lambda: None)()
            close(run(x)[-1], expected)
    with pytest.raises(TypeError, match="not callable"):
        run(x)  # the kernels again
    if isinstance(run, snnlstm.SConv2dLSTM):
        assert run.path == Path("reference", "set_algorithm or SNNLSTM_ALGORITHM chose it")
    assert caplog.messages == []


def test_a_process_starts_with_the_algorithm_of_its_environment(monkeypatch):
    module = util.spec_from_file_location("another_process", snnlstm.calls.algorithms.__file__)
    another = util.module_from_spec(module)
    for name, starts in (("reference", "reference"), ("", "auto")):
        monkeypatch.setenv("SNNLSTM_ALGORITHM", name)
        module.loader.exec_module(another)
        assert another.get_algorithm() == starts
    monkeypatch.setenv("SNNLSTM_ALGORITHM", "torch")
    with pytest.raises(ValueError, match=r"SNNLSTM_ALGORITHM must be one of .*, got 'torch'"):
        module.loader.exec_module(another)


def test_wide_layers_train_in_torch_where_it_multiplies_bfloat16_fast(monkeypatch):
    monkeypatch.setattr(torch_private, "multiplies_bfloat16", True)
    names = {}
    for channels, training, dtype, algorithm in [
        (32, True, torch.bfloat16, "auto"), (31, True, torch.bfloat16, "auto"),
        (32, False, torch.bfloat16, "auto"), (32, True, torch.float32, "auto"),
        (32, True, torch.bfloat16, "direct"),
    ]:  # fmt: skip
        cell, x = ours(channels, 3, 3), steps(1, 2, channels, 6, 7)[0]
        autocast = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
        with snnlstm.algorithm(algorithm), torch.set_grad_enabled(training), autocast:
            cell(x), cell(x)
        names[channels, training, dtype, algorithm] = cell.path.native
    assert list(names.values()) == [False, True, True, True, True]


def test_a_path_that_the_user_sets_stays():
    """An accelerated cell may have a tensor of this name; torch adds none to a new cell."""
    accelerated = theirs()
    accelerated.register_buffer("path", X)
    snnlstm.accelerate(nn.Sequential(accelerated))
    cells = [ours(), snnlstm.ConvLSTMCell(2, 3, 3), accelerated]
    for cell, value in zip(cells, ("a/file", nn.Identity(), X), strict=True):
        cell.path = value
        cell(X)
        assert cell.path is value
        del cell.path
        cell(X)
        assert isinstance(cell.path, Path)


def negated(values):
    """Returns equal numbers whose sign is a flag of the tensor."""
    found = torch.complex(torch.zeros_like(values), -values.detach()).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize("which", ["x", "syn", "mem", "weight", "bias", "threshold"])
def test_lazily_negated_tensors_are_read_with_their_signs(which):
    plain = ours()
    tensors = {
        "x": X, "syn": START[0], "mem": START[1], "weight": plain.conv.weight.detach(),
        "bias": plain.conv.bias.detach(), "threshold": torch.full((3, 1, 1), 0.05),
    }  # fmt: skip
    other = tensors | {which: negated(tensors[which])}
    close(*(snnlstm.functional.sconv2dlstm(**given) for given in (tensors, other)))


def in_forward_mode(cell):
    with torch.autograd.forward_ad.dual_level():
        cell(torch.autograd.forward_ad.make_dual(X, X), *START)


def with_a_sparse_weight(cell):
    cell.conv.weight = nn.Parameter(cell.conv.weight.detach().to_sparse())
    cell(X, *START)


class Tagged(torch.Tensor):
    pass


def with_a_tagged_weight(cell):
    cell.conv.weight = nn.Parameter(cell.conv.weight.detach().as_subclass(Tagged))
    return cell(X, *START)


PASSING = [
    ("a torch.func transform is active",
     lambda cell: torch.func.vmap(cell, randomness="same")(X[:, None])),
    ("forward-mode differentiation is active", in_forward_mode),
    ("weight is not strided", with_a_sparse_weight),
    ("x is empty", lambda cell: cell(X[:0])),
    ("a tensor is a lazily negated view", lambda cell: cell(negated(X), *START)),
    ("a tensor is of a subclass", lambda cell: cell(X.as_subclass(Tagged), *START)),
    ("a tensor is of a subclass", with_a_tagged_weight),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "call"), PASSING)
def test_reasons_that_come_and_go(reason, call):
    cell = ours()
    try:
        out = call(cell)
    except (RuntimeError, NotImplementedError):  # torch convolves with no sparse weight
        assert reason == "weight is not strided"
        return
    assert cell.path == Path("reference", reason)
    if reason.startswith("a tensor"):
        close([o.as_subclass(torch.Tensor) for o in out], ours()(X, *START))


@pytest.mark.parametrize("make", [ours, partial(snnlstm.Leaky, 0.5)], ids=["cell", "Leaky"])
@pytest.mark.parametrize("later", [False, True])
def test_a_fake_tensor_mode_computes_no_numbers(make, later):
    layer = make()
    out = layer(X)
    layer.reset_mem()
    if later:  # the layer has an entry, and a state
        layer(X)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = layer(X)
    assert layer.path == Path("reference", "a FakeTensorMode is active")
    for fake, real in zip(fakes, out, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    layer.reset_mem()
    layer(X)


# ---- the log -----------------------------------------------------------------------------------


def without_the_core(monkeypatch):
    monkeypatch.setattr(snnlstm.dispatch.reasons, "backends", None)
    monkeypatch.setattr(snnlstm.calls.entries, "BACKENDS", {})


def on_an_old_gpu(monkeypatch):
    """The kernels are asked about GPU 3 in the place of the CPU, on which cells run."""
    asked, gpu = native.reason_against_device, torch.device("cuda", 3)
    monkeypatch.setattr(native, "reason_against_device", lambda _, traced: asked(gpu, traced))
    monkeypatch.setattr(native, "_NO_CUDA", None)
    monkeypatch.setattr(native.cuda_check, "trouble", lambda index: f"GPU {index} is too old")


# What is unusual, how cells are made, and what is logged of three calls of each of two cells.
KNOWN = "SConv2dLSTM(2, 3, kernel_size=3, threshold=0.1)"
LOGGED = {
    "each cell": (None, lambda: ours(spike_grad=torch.sigmoid),
                  [f"{KNOWN} %s: spike_grad is unknown to the kernels"] * 2),
    "hooks": (None, lambda: hooked_cell(), ["SConv2dLSTM %s: conv carries hooks"]),
    "core": (without_the_core, ours, [f"SConv2dLSTM %s: {snnlstm.dispatch.reasons._MISSING}"]),
    "GPU": (on_an_old_gpu, ours, ["SConv2dLSTM %s: GPU 3 is too old"]),
    "native": (None, ours, []),
}  # fmt: skip


def hooked_cell():
    cell = ours()
    hooked()(cell.conv)
    return cell


@needs_core
@pytest.mark.parametrize("name", LOGGED)
def test_a_fallback_is_logged_once(name, monkeypatch, caplog):
    """Tools that print summaries or count operations set hooks on every module."""
    change, make, expected = LOGGED[name]
    monkeypatch.setattr(snnlstm.calls.entries, "table", BoundedDict())
    if change is not None:
        change(monkeypatch)
    for cell in [make(), make()] * 3:
        cell(X.to(cell.conv.weight.device))
    start = "takes the reference path, which is slower"
    assert caplog.messages == [message % start for message in expected]
    assert cell.path.slow == bool(expected)


def test_the_log_names_the_layer_where_accelerate_knows_it(caplog):
    with snnlstm.patch():
        patched = theirs()  # the cell is not yet in a network, so it has no name
    net = torch.nn.ModuleDict({"inner": torch.nn.Sequential(theirs(), patched)})
    snnlstm.accelerate(net)
    for cell in net["inner"]:
        cell.spike_grad = torch.sigmoid
        cell(X)
    assert [message.partition(" takes ")[0] for message in caplog.messages] == [
        f"layer inner.{n}, {KNOWN}," for n in (0, 1)
    ]


def test_a_device_without_kernels_is_logged_once_per_cell(caplog):
    path = Path("reference", "there are no kernels for device meta", slow=True)
    with torch.device("meta"):
        cells = ours(), snnlstm.SConv1dLSTM(2, 3, 3, threshold=0.1), snnlstm.ConvLSTMCell(2, 3, 3)
        for cell in cells:
            cell(torch.empty((1, 2, 5) if cell.conv.weight.dim() == 3 else (1, 2, 5, 5)))
            assert cell.path == path
        cells[0](torch.empty(0, 2, 5, 5))
        assert cells[0].path == Path("reference", "x is empty")
        cells[0](torch.empty(1, 2, 5, 5))
        assert cells[0].path == path
    who = [f"{type(cell).__name__}({cell.extra_repr()})" for cell in cells]
    said = f" takes the reference path, which is slower: {path.reason}"
    assert caplog.messages == [name + said for name in who]


@needs_core
def test_on_mps_the_reason_names_the_kernels_of_the_cpu():
    reasons = {kind: against_device(torch.device(kind)) for kind in ("cpu", "mps", "xpu")}
    assert reasons["cpu"] is None
    start = "there are no kernels for device "
    assert reasons["mps"].reason == f"{start}mps; the CPU has native kernels"
    assert reasons["xpu"].reason == f"{start}xpu"
