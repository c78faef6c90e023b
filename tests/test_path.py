"""Which implementation runs, that the answer is said, and that it is right."""

import logging

import pytest
import torch
from helpers import close, ours, states, steps, theirs, twins
from kernels import native
from torch import nn
from torch.nn.utils import parametrizations, prune

import snnlstm
from snnlstm.run import Path

X, START = steps(1, 2, 2, 6, 7)[0], states(2, 3, 6, 7)


class Lora(nn.Module):
    """A wrapper as adapter libraries make them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.low = nn.Conv2d(5, 12, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.low(x)


def hook(cell):
    cell.conv.register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hook(cell):
    cell.conv.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def backward_hook(cell):
    cell.conv.register_full_backward_hook(lambda module, grads, out: (grads[0] * 2,))


def weight_norm(cell):
    parametrizations.weight_norm(cell.conv)


def spectral_norm(cell):
    torch.manual_seed(1)
    parametrizations.spectral_norm(cell.conv)


def old_weight_norm(cell):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(cell.conv)


def pruning(cell):
    prune.l1_unstructured(cell.conv, "weight", 0.5)


def lora(cell):
    torch.manual_seed(1)
    cell.conv = Lora(cell.conv)


def swapped(cell):
    torch.manual_seed(1)
    cell.conv = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 12, 1))


def another_kernel(cell):
    torch.manual_seed(1)
    cell.conv = nn.Conv2d(5, 12, 1)


def reflecting(cell):
    torch.manual_seed(1)
    cell.conv = nn.Conv2d(5, 12, 3, padding=1, padding_mode="reflect")


def dilated(cell):
    cell.conv.dilation, cell.conv.padding = (2, 2), (2, 2)


def replaced_forward(cell):
    forward = cell.conv.forward
    cell.conv.forward = lambda x: forward(x) * 0.5


CHANGES = [
    hook, pre_hook, backward_hook, weight_norm, spectral_norm, old_weight_norm, pruning, lora,
    swapped, another_kernel, reflecting, dilated, replaced_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("reset", ["none", "zero"])
def test_a_changed_conv_takes_effect_on_the_reference_path(change, reset):
    one, other = twins(reset_mechanism=reset)
    for cell in (one, other):
        change(cell)
        cell.eval()  # spectral_norm: one power iteration a call, and snnTorch's "zero" calls twice
    mem = [START[1].clone().requires_grad_() for _ in range(2)]
    for cell, start in zip((one, other), mem, strict=True):
        out = cell(X, START[0], start)
        sum(o.sum() for o in out).backward()
    assert one.path.name == "reference"
    assert "conv" in one.path.reason
    close((one.spk, one.syn, one.mem), (other.spk, other.syn, other.mem))
    close(mem[0].grad, mem[1].grad, atol=1e-5)
    if "weight_norm" in change.__name__:  # which only writes the same weight in another way
        return
    plain = ours(reset_mechanism=reset)
    start = START[1].clone().requires_grad_()
    sum(o.sum() for o in plain(X, START[0], start)).backward()
    same = torch.equal(plain.mem, one.mem) and torch.equal(start.grad, mem[0].grad)
    assert not same


def test_a_dilation_that_changes_the_size_fails_as_it_does_there():
    for cell in twins():
        cell.conv.dilation = (2, 2)
        with pytest.raises(RuntimeError, match="must match the size"):
            cell(X, *START)


def test_global_hooks_take_effect():
    cell = ours()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Conv2d) else None
    )
    try:
        doubled = cell(X, *START)
    finally:
        handle.remove()
    assert "global module hooks" in cell.path.reason
    assert not torch.equal(doubled[1], cell(X, *START)[1])


def test_a_fallback_is_logged_once_per_cell(caplog):
    with caplog.at_level(logging.WARNING, logger="snnlstm"):
        cells = [ours(spike_grad=lambda u: u.sigmoid()) for _ in range(2)]
        for cell in cells * 3:
            cell(X)
        cells[0].fire = lambda mem: mem
        cells[0](X)
        assert "overridden" in cells[0].path.reason
    said = [record.message for record in caplog.records]
    cell = "SConv2dLSTM(2, 3, kernel_size=3, threshold=0.1)"
    log = f"{cell} runs the reference path (plain torch, slower): %s"
    assert said == [log % "spike_grad is unknown to the kernels"] * 2


def test_hooks_on_every_conv_are_logged_once_for_all_cells(caplog, monkeypatch):
    """As tools that print summaries or count operations set them."""
    monkeypatch.setattr(snnlstm.run, "_logged", set())
    cells = [ours() for _ in range(3)]
    handles = [hook(cell) for cell in cells]
    for cell in cells:
        cell(X)
    (record,) = caplog.records
    assert record.getMessage().endswith("(plain torch, slower): conv carries hooks")
    assert len(handles) == 3


def test_the_log_names_the_layer_where_accelerate_knows_it(caplog):
    with snnlstm.patch():
        patched = theirs()  # nobody knows its name yet
    net = torch.nn.ModuleDict({"inner": torch.nn.Sequential(theirs(), patched)})
    snnlstm.accelerate(net)
    for cell in net["inner"]:
        cell.spike_grad = torch.sigmoid
        cell(X)
    assert [record.getMessage().partition(" runs ")[0] for record in caplog.records] == [
        f"layer inner.{n}, SConv2dLSTM(2, 3, kernel_size=3, threshold=0.1)," for n in (0, 1)
    ]


def test_what_nobody_expects_to_be_fast_is_not_logged(caplog):
    with caplog.at_level(logging.INFO, logger="snnlstm"), torch.device("meta"):
        cell = ours()
        cell(torch.empty(1, 2, 5, 5))
    assert cell.path == Path("reference", "there are no kernels for device meta")
    assert not caplog.records


def test_the_path_is_none_before_the_first_call():
    assert ours().path is None


@pytest.mark.skipif(native is None, reason="the core is not built")
def test_the_native_path_says_what_it_is():
    cell = ours()
    cell(X)
    assert cell.path.name.startswith("cpu-")
    assert str(cell.path) == f"{cell.path.name} ({cell.path.reason})"


def test_tensors_that_the_kernels_cannot_read_are_computed_all_the_same():
    expected = ours()(X, *START)

    class Tagged(torch.Tensor):
        pass

    cell = ours()
    close([o.as_subclass(torch.Tensor) for o in cell(X.as_subclass(Tagged), *START)], expected)
    assert "subclass" in cell.path.reason


def negated(values):
    """The same numbers, with a sign that is a flag of the tensor."""
    found = torch.complex(torch.zeros_like(values), -values.detach()).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize("which", ["x", "syn", "mem", "weight", "bias", "threshold"])
def test_lazily_negated_tensors_are_read_as_what_they_are(which):
    plain = ours()
    tensors = {
        "x": X, "syn": START[0], "mem": START[1], "weight": plain.conv.weight.detach(),
        "bias": plain.conv.bias.detach(), "threshold": torch.full((3, 1, 1), 0.05),
    }  # fmt: skip
    out = []
    for given in (tensors, tensors | {which: negated(tensors[which])}):
        out.append(snnlstm.functional.sconv2dlstm(**given))
    close(*out)


def test_torch_func_transforms_and_forward_mode():
    cell, x = ours(), X.double()
    cell.double()
    start = [state.double() for state in START]
    params = dict(cell.named_parameters())

    def loss(params):
        return torch.func.functional_call(cell, params, (x, *start))[2].square().sum()

    grads = torch.func.grad(loss)(params)
    expected = ours().double()
    expected(x, *start)[2].square().sum().backward()
    close(grads["conv.weight"], expected.conv.weight.grad, atol=1e-9)

    tangents = {name: torch.randn_like(value) for name, value in params.items()}
    _, jvp = torch.func.jvp(loss, (params,), (tangents,))
    close(jvp, sum((grads[name] * tangents[name]).sum() for name in params), atol=1e-9)

    each = torch.func.vmap(lambda row: cell(row, start[0][:1], start[1][:1])[1])(x[:, None])
    close(each[0], ours().double()(x[:1], start[0][:1], start[1][:1])[1], atol=1e-12)
    cell.reset_mem()  # although the stored state died with the transform
    close(cell(x)[1], ours().double()(x)[1], atol=1e-12)


def test_the_fallback_for_a_missing_core_is_said(monkeypatch, caplog):
    monkeypatch.setattr(snnlstm.run, "_native", None)
    monkeypatch.setattr(snnlstm.run, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="snnlstm"):
        for cell in (ours(), ours()):
            cell(X)
    assert str(cell.path) == f"reference ({snnlstm.run._MISSING})"
    (record,) = caplog.records  # once per process, and not of one cell
    assert record.getMessage().startswith("SConv2dLSTM runs the reference path")


@pytest.mark.skipif(native is None, reason="needs the core")
def test_a_gpu_that_the_build_does_not_serve_is_said_once(monkeypatch, caplog):
    """By way of a tensor that claims to be on a GPU: there is none here."""
    native = snnlstm.run._native
    monkeypatch.setattr(native, "_NO_CUDA", None)
    monkeypatch.setattr(native.cuda_check, "trouble", lambda index: f"GPU {index} is too old")
    monkeypatch.setattr(snnlstm.run, "_logged", set())
    path = snnlstm.run._path_of_device(torch.device("cuda", 3))
    assert str(path) == "reference (GPU 3 is too old)"
    with caplog.at_level(logging.WARNING, logger="snnlstm"):
        for seen in (set(), set()):  # two modules
            snnlstm.run.log_fallback(path, seen)
    assert [record.getMessage() for record in caplog.records] == [
        "SConv2dLSTM runs the reference path (plain torch, slower): GPU 3 is too old"
    ]


@pytest.mark.skipif(native is None, reason="needs the core")
def test_a_build_without_cuda_is_said_on_a_gpu(monkeypatch):
    native = snnlstm.run._native
    monkeypatch.setattr(native, "_NO_CUDA", native.cuda_check.without_kernels({"cuda": "off"}))
    path = snnlstm.run._path_of_device(torch.device("cuda", 0))
    assert "no CUDA kernels (off)" in path.reason
    assert path.slow
    assert path.general


def test_results_do_not_depend_on_the_path(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(snnlstm.run, "_native", None)
        expected = ours()(X, *START)
    close(ours()(X, *START), expected)
    close(theirs()(X, *START), expected)
