"""torch.export, the ONNX exporters and torch.jit.trace export one call of a cell.

The cells were never called before. The exported programs run with other sizes or numbers.
"""

import inspect
import io
import warnings

import pytest
import torch
from helpers import close, ours, same_gradients, states, steps
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import snnlstm

CELLS = {
    "pooled": {"max_pool": 2, "reset_mechanism": "subtract"},
    "strided": {"stride": 2, "inhibition": True, "learn_threshold": True},
    "quantised": {
        "state_quant": snnlstm.quant.state_quant(2),
        "avg_pool": 2,
        "reset_mechanism": "zero",
    },
}


def inputs(name: str, batch: int, sequence: bool) -> tuple[Tensor, ...]:
    """Returns x, syn and mem; equal sizes give equal numbers."""
    size = (3, 3) if name == "strided" else (6, 6)
    x = steps(3, batch, 2, 6, 6)
    return (x if sequence else x[0], *states(batch, 3, *size))


def any_batch(sequence: bool) -> dict[str, dict[int, Dim]]:
    """Returns the sizes that may change, by argument and dimension."""
    batch = Dim("batch", min=1, max=64)
    return {"x": {int(sequence): batch}, "syn": {0: batch}, "mem": {0: batch}}


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_graph_of_make_fx(mode):
    """It is recorded while tensors have numbers: what the kernels do would not be in it."""
    cell = ours(**CELLS["pooled"]).requires_grad_(False)
    first, second = inputs("pooled", 2, False), inputs("pooled", 3, False)

    def call(buffers, *args):
        return torch.func.functional_call(cell, buffers, args)

    graph = make_fx(call, tracing_mode=mode)(cell.state_dict(), *first)
    other = second if mode == "symbolic" else (first[0].flip(0), *first[1:])
    close(graph(cell.state_dict(), *other), ours(**CELLS["pooled"])(*other))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("name", "sequence", "strict"),
    [
        *(("pooled", sequence, strict) for sequence in (False, True) for strict in (False, True)),
        ("strided", True, True),
        ("quantised", False, False),
    ],
)
def test_an_exported_program_takes_batches_of_any_size(name, sequence, strict):
    cell = ours(**CELLS[name])
    program = torch.export.export(
        cell, inputs(name, 2, sequence), dynamic_shapes=any_batch(sequence), strict=strict
    )
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    symbolic = {t for t in targets if t.startswith(("<built-in function", "_operator"))}
    assert all(t.startswith("aten.") for t in targets - symbolic - {"wrap_with_set_grad_enabled"})
    assert cell.syn.shape == (0,)  # tracing leaves no state behind
    assert cell.path is None
    for batch in (1, 2, 5):
        given = inputs(name, batch, sequence)
        close(program.module()(*given), ours(**CELLS[name])(*given))


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_cell_with_hidden_states_starts_from_zeros(strict):
    x = steps(3, 2, 2, 6, 6)
    batch = Dim("batch", min=1, max=64)
    program = torch.export.export(
        ours(init_hidden=True), (x,), dynamic_shapes={"x": {1: batch}}, strict=strict
    )
    for size in (2, 4):
        x = steps(3, size, 2, 6, 6)
        close(program.module()(x), ours(init_hidden=True)(x))


def test_an_exported_program_can_be_saved_and_loaded():
    """A program without a surrogate holds torch's operators alone, and runs without snnlstm."""
    cell = ours(surrogate_disable=True, reset_mechanism="zero")
    program = torch.export.export(
        cell, inputs("", 2, True), dynamic_shapes=any_batch(True), strict=False
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    close(loaded(*inputs("", 3, True)), cell(*inputs("", 3, True)))


def run_onnx(path: str, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Runs a file by onnxruntime, or else by the reference evaluator of onnx."""
    try:
        import onnxruntime
    except ImportError:
        session = pytest.importorskip("onnx.reference").ReferenceEvaluator(path)
        names = session.input_names
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in given), strict=True))
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def export_onnx(cell: snnlstm.SConv2dLSTM, given: tuple, path: str, **kwargs) -> None:
    with warnings.catch_warnings():  # the exporters warn about themselves
        warnings.simplefilter("ignore")
        torch.onnx.export(cell, given, path, verbose=False, **kwargs)


@pytest.mark.parametrize(("name", "sequence"), [("strided", True), ("quantised", False)])
def test_onnx_of_a_fresh_cell_gives_the_same_numbers_for_every_batch_size(tmp_path, name, sequence):
    pytest.importorskip("onnxscript")
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("before torch 2.5")
    path = str(tmp_path / "cell.onnx")
    options = {"surrogate_disable": True, **CELLS[name]}
    export_onnx(
        ours(**options).eval(), inputs(name, 2, sequence), path,
        dynamo=True, dynamic_shapes=any_batch(sequence),
    )  # fmt: skip
    for batch in (1, 2, 5):
        given = inputs(name, batch, sequence)
        close(run_onnx(path, given), [out.detach() for out in ours(**options)(*given)])


def test_onnx_by_the_older_exporter(tmp_path):
    """The older exporter is built on torch.jit.trace, and fixes the sizes."""
    pytest.importorskip("onnx")
    cell = ours(surrogate_disable=True, **CELLS["pooled"]).eval()
    given, path = inputs("pooled", 2, False), str(tmp_path / "cell.onnx")
    export_onnx(cell, given, path, dynamo=False)
    close(run_onnx(path, given), [out.detach() for out in cell(*given)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("sequence", [False, True], ids=["step", "sequence"])
@pytest.mark.parametrize("name", CELLS)
def test_a_trace_can_be_saved_and_loaded_and_takes_other_numbers(name, sequence):
    cell = ours(surrogate_disable=True, **CELLS[name])
    buffer = io.BytesIO()
    traced = torch.jit.trace(cell, inputs(name, 2, sequence), check_trace=False)
    assert str(cell.path) == "reference (tracing records plain operators)"
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    x, syn, mem = inputs(name, 2, sequence)
    for given in ((x, syn, mem), (1 - x, syn / 2, -mem)):
        close(loaded(*given), cell(*given))
    one, other = (ours(**CELLS[name]) for _ in range(2))
    for call in (torch.jit.trace(one, (x, syn, mem)), other):
        spk, _, mem_after = call(x, syn, mem)
        (spk.sum() + mem_after.square().sum()).backward()
    same_gradients(one, other)
