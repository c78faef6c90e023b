"""torch.export, the ONNX exporters and torch.jit.trace export calls of a cell, and loops.

The exported programs run with other sizes or numbers.
"""

import copy
import inspect
import io
import warnings
from typing import Any

import pytest
import snntorch.utils
import torch
from torch import Tensor, nn
from torch.export import Dim

import snnlstm
from snnlstm.dispatch import reasons
from snnlstm.neurons import attributes, leaky
from tests.shared.helpers import close, flat, long, ours, same_gradients, states, steps

CELLS = {
    "pooled": {"max_pool": 2, "reset_mechanism": "subtract"},
    "strided": {"stride": 2, "inhibition": True, "learn_threshold": True},
    "quantised": {
        "state_quant": snnlstm.quant.state_quant(2),
        "avg_pool": 2,
        "reset_mechanism": "zero",
    },
    "no surrogate": {"surrogate_disable": True, "reset_mechanism": "zero"},
    "hidden": {"init_hidden": True},
}


def make(name: str, **more: Any) -> torch.nn.Module:
    if name == "ConvLSTM":
        torch.manual_seed(0)
        return snnlstm.ConvLSTM(2, [5, 3], 3, 2, return_all_layers=True)
    if name == "signals":
        torch.manual_seed(0)
        return snnlstm.SConv1dLSTM(2, 3, 5, threshold=0.1, max_pool=2, **more)
    return ours(**more | CELLS[name])


def example_inputs(name: str, batch: int, sequence: bool) -> tuple[Tensor, ...]:
    """Returns x, and syn and mem if they are passed; equal sizes give equal numbers."""
    sequence = sequence or name in ("ConvLSTM", "hidden")
    x = steps(3, batch, 2, *((6,) if name == "signals" else (6, 6)))
    x = x if sequence else x[0]
    if name in ("ConvLSTM", "hidden"):
        return (x,)
    return (x, *states(batch, 3, *{"strided": (3, 3), "signals": (6,)}.get(name, (6, 6))))


def any_batch(name: str, sequence: bool) -> Any:
    """Returns the sizes that may change, by argument and dimension."""
    batch = Dim("batch", min=1, max=64)
    if name in ("ConvLSTM", "hidden"):
        return {"x" if name == "hidden" else "input_tensor": {1: batch}}
    return {"x": {int(sequence): batch}, "syn": {0: batch}, "mem": {0: batch}}


# A strict export warns of the states that it records, and drops them.
SIDE_EFFECTS = pytest.mark.filterwarnings("ignore:.*certain side effects happened:UserWarning")


@SIDE_EFFECTS
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("name", "sequence", "strict"),
    [
        ("pooled", False, True), ("strided", True, True), ("quantised", False, False),
        ("no surrogate", True, False), ("hidden", True, False),
        ("signals", True, False), ("ConvLSTM", True, False),
        # What the others have in other pairs.
        *(pytest.param(*row, marks=long) for row in (
            ("pooled", False, False), ("pooled", True, False), ("pooled", True, True),
            ("ConvLSTM", True, True), ("hidden", True, True),
        )),
    ],
)  # fmt: skip
def test_an_exported_program_takes_batches_of_any_size_and_can_be_saved(name, sequence, strict):
    """It holds torch's operators alone, and without a surrogate it runs without snnlstm."""
    module = make(name)
    program = torch.export.export(
        module,
        example_inputs(name, 2, sequence),
        dynamic_shapes=any_batch(name, sequence),
        strict=strict,
    )
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    symbolic = {t for t in targets if t.startswith(("<built-in function", "_operator"))}
    assert all(t.startswith("aten.") for t in targets - symbolic - {"wrap_with_set_grad_enabled"})
    if name != "ConvLSTM":
        assert module.syn.shape == (0,)  # tracing leaves no state behind
        assert module.path is None
    if name in ("no surrogate", "ConvLSTM"):
        torch.export.save(program, file := io.BytesIO())
        file.seek(0)
        program = torch.export.load(file)
    for batch in (1, 2, 5):
        arguments = example_inputs(name, batch, sequence)
        close(flat(program.module()(*arguments)), flat(make(name)(*arguments)))


def run_onnx(path: str, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Runs a file by onnxruntime, or else by the reference evaluator of onnx."""
    try:
        import onnxruntime
    except ImportError:
        session = pytest.importorskip("onnx.reference").ReferenceEvaluator(path)
        names = session.input_names
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in arguments), strict=True))
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def check_onnx(name: str, sequence: bool, path: str, batches: tuple[int, ...], **how: Any) -> None:
    """Exports a module without a surrogate, and compares the program's results."""
    disabled = {} if name == "ConvLSTM" else {"surrogate_disable": True}
    with warnings.catch_warnings():  # the exporters warn about themselves
        warnings.simplefilter("ignore")
        torch.onnx.export(
            make(name, **disabled).eval(),
            example_inputs(name, 2, sequence),
            path,
            verbose=False,
            **how,
        )
    for batch in batches:
        arguments = example_inputs(name, batch, sequence)
        expected = flat(make(name, **disabled)(*arguments))
        close(run_onnx(path, arguments), [out.detach() for out in expected], atol=1e-5)


# ---- loops over steps ----------------------------------------------------------------------------


class Net(nn.Module):
    """Calls a cell, on images or signals, and a Leaky in each step."""

    def __init__(self, reset: str = "reset_mem", hidden: bool = True, dims: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = snnlstm.SConv2dLSTM if dims == 2 else snnlstm.SConv1dLSTM
        self.cell = kind(2, 3, 3, threshold=0.05, init_hidden=hidden, surrogate_disable=True)
        self.lif = snnlstm.Leaky(0.9, threshold=0.3, init_hidden=hidden, surrogate_disable=True)
        self.reset, self.dims = reset, dims

    def forward(self, x: Tensor) -> Tensor:
        if self.reset == "reset_mem":
            self.cell.reset_mem()
            self.lif.reset_mem()
        elif self.reset == "utils":
            snntorch.utils.reset(self)
        elif self.reset == "reset":
            snnlstm.reset(self)
        out = []
        for x_t in x.unbind():
            spk = self.cell(x_t)
            spk = spk if self.cell.init_hidden else spk[0]
            last = self.lif(spk + self.cell.syn)
            last = last if self.lif.init_hidden else last[0]
            out.append(torch.cat([spk, self.cell.spk, last, self.cell.mem, self.lif.mem]))
        return torch.stack(out)

    def example(self, seed: int = 0) -> Tensor:
        return steps(4, 2, 2, *(6, 7)[: self.dims], seed=seed)

    def stored(self) -> dict[str, Tensor | None]:
        cell, lif = self.cell, self.lif
        return {"syn": cell.syn, "mem": cell.mem, "spk": cell.spk, "lif": lif.mem}


def plain(net: nn.Module, x: Tensor) -> Tensor:
    """Runs a network in torch's operators, which an exported program has."""
    with snnlstm.algorithm("reference"):
        out = net(x)
    assert out.any()
    return out


RESETS = ["reset_mem", "utils", "none"]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("stored", [False, True], ids=["new", "stored"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(("hidden", "dims"), [(True, 2), (False, 2), (True, 1)])
@SIDE_EFFECTS
def test_an_exported_loop_hands_on_its_states_and_starts_from_zeros(
    hidden, dims, reset, stored, strict, recwarn
):
    """Two calls of the program are equal, and the network keeps the states that it had."""
    net = Net(reset, hidden, dims)
    x, other = net.example(), net.example(seed=1)
    if stored:
        with torch.no_grad():
            net(other)
    before = net.stored()
    program = torch.export.export(net, (x,), strict=strict).module()
    told = [str(warning.message) for warning in recwarn if "stored state" in str(warning.message)]
    assert len(told) == (2 if stored and reset == "none" else 0)  # of the cell and of the Leaky
    assert all("reset_mem" in message for message in told)
    assert all(net.stored()[name] is state for name, state in before.items())
    copy.deepcopy(net)
    torch.save(net, io.BytesIO())
    for events in (x, other, x):
        assert torch.equal(program(events), plain(Net("none", hidden, dims), events))


@pytest.mark.parametrize("reset", RESETS)
def test_an_exported_loop_equals_eager_in_onnx(reset, tmp_path):
    pytest.importorskip("onnxscript")
    path, net = str(tmp_path / "loop.onnx"), Net(reset)
    with warnings.catch_warnings():  # the exporters warn about themselves
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (net.example(),), path, dynamo=True, verbose=False)
    assert type(net.cell.mem) is type(net.lif.mem) is Tensor
    x = net.example(seed=1)
    close(run_onnx(path, (x,)), [Net("none")(x).detach()], atol=1e-5)


def test_what_an_exporter_without_a_context_reads_starts_from_zeros(monkeypatch):
    """With torch 2.4 only the exporter of torch.jit says that it exports, and it has none."""
    net, x = Net("none"), Net().example()
    net(x)
    stored = net.stored()
    for module in (attributes, leaky, reasons):
        monkeypatch.setattr(module, "exporting", lambda: True)
    with pytest.warns(UserWarning, match="stored state"):
        first, second = net.cell(x[0]), net.cell(x[0])
    assert torch.equal(first, second)
    monkeypatch.undo()
    assert all(net.stored()[name] is state for name, state in stored.items())


def test_a_state_that_a_loop_sets_is_part_of_the_export():
    class Sets(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.cell.syn = self.cell.mem = x.new_ones(2, 3, 6, 7) / 2
            self.lif.mem = x.new_ones(2, 3, 6, 7) / 4
            return super().forward(x)

    x = Net().example()
    net = Sets("none")
    program = torch.export.export(net, (x,)).module()
    assert torch.equal(program(x), plain(Sets("none"), x))
    assert net.cell.mem.shape == net.lif.mem.shape == (0,)


@pytest.mark.parametrize(
    ("name", "sequence"), [("strided", True), ("quantised", False), ("ConvLSTM", True)]
)
def test_onnx_gives_the_same_numbers_for_every_batch_size(tmp_path, name, sequence):
    pytest.importorskip("onnxscript")
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("before torch 2.5")
    shapes = any_batch(name, sequence)
    path = str(tmp_path / "cell.onnx")
    check_onnx(name, sequence, path, (1, 2, 5), dynamo=True, dynamic_shapes=shapes)


def test_onnx_by_the_older_exporter(tmp_path):
    """The older exporter is built on torch.jit.trace, and fixes the sizes."""
    pytest.importorskip("onnx")
    check_onnx("pooled", False, str(tmp_path / "cell.onnx"), (2,), dynamo=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
@pytest.mark.parametrize("name", ["pooled", "strided", "quantised"])
def test_a_trace_can_be_saved_and_loaded_and_takes_other_numbers(name, sequence):
    cell = make(name, surrogate_disable=True)
    traced = torch.jit.trace(cell, example_inputs(name, 2, sequence), check_trace=False)
    assert str(cell.path) == "reference (tracing records plain operators)"
    torch.jit.save(traced, file := io.BytesIO())
    file.seek(0)
    loaded = torch.jit.load(file)
    x, syn, mem = example_inputs(name, 2, sequence)
    for arguments in ((x, syn, mem), (1 - x, syn / 2, -mem)):
        close(loaded(*arguments), cell(*arguments))
    traced_cell, eager = make(name), make(name)
    for call in (torch.jit.trace(traced_cell, (x, syn, mem)), eager):
        spk, _, mem_after = call(x, syn, mem)
        (spk.sum() + mem_after.square().sum()).backward()
    same_gradients(traced_cell, eager)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("reset", ["reset_mem", "utils", "reset"])
@pytest.mark.parametrize("called", [0, 2, 3])
def test_a_trace_of_a_loop_serves_batches_of_any_size(called, reset):
    """The network may have been called before, with the batch size of the trace or with another."""
    net = Net(reset)
    if called:
        net(steps(4, called, 2, 6, 7))
    traced = torch.jit.trace(net, net.example(), check_trace=False)
    for batch in (1, 2, 5):
        x = steps(4, batch, 2, 6, 7, seed=batch)
        close(traced(x), plain(net, x))
