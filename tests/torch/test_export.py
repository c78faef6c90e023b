"""torch.export, the ONNX exporters and torch.jit.trace export one call of a cell.

The cells were never called before. The exported programs run with other sizes or numbers.
"""

import inspect
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import snnlstm
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
