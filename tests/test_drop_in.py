"""Ours in the place of snnTorch's: in its own tools, and in those of torch."""

import copy
import io
import subprocess
import sys

import pytest
import snntorch
import torch
from helpers import THRESHOLD, close, ours, same_gradients, states, steps, theirs
from snntorch import utils
from torch import nn
from torch.utils.checkpoint import checkpoint

import snnlstm

X, START = steps(1, 2, 2, 6, 6)[0], states(2, 3, 6, 6)


class Net(nn.Module):
    """The network of snnTorch's documentation, a little smaller."""

    def __init__(self, cell, **kwargs):
        super().__init__()
        self.first = cell(2, 3, 3, threshold=THRESHOLD, max_pool=2, **kwargs)
        self.second = cell(3, 2, 3, threshold=THRESHOLD, avg_pool=3, **kwargs)
        self.head = nn.Linear(2, 4)
        self.leaky = snntorch.Leaky(beta=0.5, init_hidden=True, output=True)

    def forward(self, x):
        spk = self.second(self.first(x)[0])[0]
        return self.leaky(self.head(spk.flatten(1)))


def net(cell, **kwargs):
    torch.manual_seed(0)
    return Net(cell, **kwargs)


# ---- snnTorch's own tools -------------------------------------------------------------------


def test_isinstance_holds():
    assert isinstance(ours(), snntorch.SConv2dLSTM)
    assert isinstance(ours(), snntorch.SpikingNeuron)


def test_utils_reset_reaches_our_cells():
    for library in (snnlstm, snntorch):
        model = net(library.SConv2dLSTM)
        model(X)
        assert model.first.mem.any()
        assert model.first.mem.requires_grad
        utils.reset(model)
        for cell in (model.first, model.second):
            assert not cell.mem.any()
            assert not cell.syn.any()
            assert not cell.mem.requires_grad


def test_backprop_trains_a_net_that_holds_our_cell():
    with pytest.warns(DeprecationWarning, match="backprop"):
        from snntorch import backprop
    from snntorch import functional

    losses = []
    data = [(steps(5, 4, 2, 6, 6, seed=s), torch.arange(4)) for s in range(2)]
    for library in (snnlstm, snntorch):
        torch.manual_seed(0)
        model = nn.Sequential(
            library.SConv2dLSTM(2, 3, 3, threshold=THRESHOLD, init_hidden=True),
            nn.Flatten(),
            nn.Linear(3 * 36, 4),
            snntorch.Leaky(beta=0.9, threshold=0.2, init_hidden=True, output=True),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = functional.ce_count_loss()
        losses.append([backprop.BPTT(model, data, optimizer, loss).item() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_the_calls_of_snntorchs_own_tests_of_the_cell():
    """Sizes, reset_mechanism_val and hidden states, as its test file goes through them."""
    x = torch.rand(2, 1, 1, 4, 4)
    cells = {reset: ours(1, 8, 3, reset_mechanism=reset) for reset in ("subtract", "zero", "none")}
    syn, mem = cells["none"].init_sconv2dlstm()
    for t in range(2):
        spk, syn, mem = cells["none"](x[t], syn, mem)
    assert spk.size() == syn.size() == mem.size() == (1, 8, 4, 4)
    for value, (reset, cell) in enumerate(cells.items()):
        assert cell.reset_mechanism_val == value
        cell.reset_mechanism = "none"
        assert cell.reset_mechanism_val == 2
        hidden = ours(1, 8, 3, init_hidden=True, reset_mechanism=reset)
        assert [hidden(x_t).size() for x_t in x] == [(1, 8, 4, 4)] * 2
    explained = torch._dynamo.explain(ours(1, 8, 3, surrogate_disable=True))(x[0])
    assert explained.graph_break_count == 0


def test_static_helpers():
    state = torch.ones(3, requires_grad=True) * 2
    snnlstm.SConv2dLSTM.zeros(state)
    assert not state.any()
    snnlstm.SConv2dLSTM.detach(state)
    assert not state.requires_grad


# ---- accelerate -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reset_mechanism": "subtract"}], ids=str)
def test_accelerate_trains_as_before(options):
    x = steps(6, 2, 2, 6, 6)
    models = [net(snntorch.SConv2dLSTM, **options) for _ in range(2)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.05) for model in models]
    models[0](x[0])
    models[1](x[0])
    assert snnlstm.accelerate(models[0]) is models[0]  # in the midst of it
    for t in range(1, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            utils.reset(model)
            spk, mem = model(x[t])
            (spk.sum() + mem.square().sum()).backward()
            optimizer.step()
    close(models[0].state_dict(), models[1].state_dict(), atol=1e-4)
    assert type(models[0].first) is snnlstm.SConv2dLSTM


def test_accelerate_shares_all_that_the_cell_has():
    old = theirs(
        max_pool=2, learn_threshold=True, reset_mechanism="zero", init_hidden=True, output=True,
        spike_grad=snntorch.surrogate.sigmoid(5), state_quant=None,
    )  # fmt: skip
    seen = []
    handle = old.register_forward_hook(lambda module, args, out: seen.append(module))
    old(X)
    old.eval()
    old.remark = "mine"
    new = snnlstm.accelerate(old)
    assert type(new) is snnlstm.SConv2dLSTM
    for name, parameter in old.named_parameters():
        assert dict(new.named_parameters())[name] is parameter
    assert list(new.state_dict()) == list(old.state_dict())
    assert new.conv is old.conv
    assert new.mem is old.mem
    assert not new.training
    assert (new.init_hidden, new.output, new.reset_mechanism) == (True, True, "zero")
    assert new.spike_grad == snnlstm.surrogate.sigmoid(5)
    assert new.remark == "mine"
    assert len(list(new.buffers())) == 2
    close(new(X), old(X))
    assert seen[1] is new
    handle.remove()
    new(X)
    assert len(seen) == 3


def test_accelerate_finds_cells_wherever_they_are(caplog):
    shared = theirs(3, 3, 3)
    quiet = theirs(2, 3, 3, surrogate_disable=True)
    model = nn.ModuleDict(
        {"a": nn.Sequential(quiet, nn.ModuleList([shared])), "b": shared, "c": nn.Flatten()}
    )
    with caplog.at_level("INFO", logger="snnlstm"):
        snnlstm.accelerate(model)
    assert model["a"][1][0] is model["b"]
    assert type(model["b"]) is type(model["a"][0]) is snnlstm.SConv2dLSTM
    assert model["a"][0].spike_grad == snnlstm.surrogate.NONE
    assert caplog.messages == ["accelerate replaced 2 snntorch.SConv2dLSTM"]
    assert not any(entry is shared for entry in snntorch.SpikingNeuron.instances)


def test_accelerate_leaves_subclasses_alone_and_says_that_it_found_nothing(caplog):
    class Mine(snntorch.SConv2dLSTM):
        pass

    model = nn.Sequential(Mine(2, 3, 3), nn.Flatten())
    with caplog.at_level("WARNING", logger="snnlstm"):
        assert snnlstm.accelerate(model) is model
    assert type(model[0]) is Mine
    assert caplog.messages == ["accelerate found no snntorch.SConv2dLSTM to replace"]
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got list"):
        snnlstm.accelerate([theirs()])


def test_accelerate_replaces_nothing_if_one_cell_cannot_work():
    good, even = theirs(), theirs(2, 3, 2)
    model = nn.Sequential(good, even)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        snnlstm.accelerate(model)
    assert model[0] is good
    assert model[1] is even


def test_accelerate_runs_the_reset_mechanism_that_a_checkpoint_brought():
    old, expected = theirs(reset_mechanism="none"), theirs(reset_mechanism="zero")
    old.load_state_dict(expected.state_dict())
    close(snnlstm.accelerate(old)(X, *START), expected(X, *START))


# ---- without snntorch, or with a broken one -------------------------------------------------

STEP = """
import logging, sys, torch, torch.nn as nn
logging.basicConfig(format="%(message)s")
import snnlstm
cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1)
cell(torch.zeros(1, 2, 5, 5))
snnlstm.SConv2dLSTM.reset_hidden(); snnlstm.SConv2dLSTM.detach_hidden()
snnlstm.SConv2dLSTM.init()
print(snnlstm.snntorch.Base.__module__)
try:
    snnlstm.accelerate(cell)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("stub", "said"),
    [
        (None, ""),
        ("raise OSError('no such library')", "snntorch is installed but does not import"),
        ("import a_module_that_is_missing", "snntorch is installed but does not import"),
        ("SConv2dLSTM = 3", ""),  # an old one
    ],
    ids=["missing", "broken", "half", "old"],
)
def test_a_missing_or_broken_snntorch_costs_no_more_than_its_features(tmp_path, stub, said):
    code = STEP
    if stub is None:
        code = "import sys; sys.modules['snntorch'] = None\n" + code
    else:
        (tmp_path / "snntorch.py").write_text(stub)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "torch.nn.modules.module\naccelerate() replaces cells of snntorch"
    )
    assert said in done.stderr


# ---- torch's own tools ----------------------------------------------------------------------

COMPILED = [
    {},
    {"max_pool": 2, "reset_mechanism": "subtract"},
    {"avg_pool": 2, "reset_mechanism": "zero", "learn_threshold": True},
    {"state_quant": snnlstm.quant.state_quant(4)},
    {"inhibition": True},
    {"stride": 2, "dilation": 2},
    {"surrogate_disable": True},
    {"checkpoint": True},
    {"spike_grad": torch.sigmoid},
]


@pytest.mark.parametrize(
    ("hidden", "options"),
    [(False, options) for options in COMPILED] + [(True, options) for options in COMPILED[:2]],
    ids=str,
)
def test_torch_compile_has_no_graph_break(options, hidden):
    torch._dynamo.reset()
    cells = [ours(init_hidden=hidden, output=True, **options) for _ in range(2)]
    step = torch.compile(cells[0], fullgraph=True, backend="aot_eager")
    x = steps(3, 2, 2, 6, 6)
    start = () if hidden else states(2, 3, *((3, 3) if "stride" in options else (6, 6)))
    results = []
    for cell, call in zip(cells, (step, cells[1]), strict=True):
        state, loss = start, 0
        for t in range(3):
            spk, *state = call(x[t], *state)
            loss = loss + spk.sum() * (t + 1) + state[1].sum()
            state = [] if hidden else state
        loss.backward()
        results.append((spk, cell.syn, cell.mem, cell.reset, cell.spk))
    close(*results)
    same_gradients(*cells)


def test_torch_compile_of_a_sequence():
    torch._dynamo.reset()
    one, other = ours(), ours()
    x = steps(3, 2, 2, 6, 6)
    close(torch.compile(one, fullgraph=True, backend="aot_eager")(x, record=True),
          other(x, record=True))  # fmt: skip


def test_inductor_compiles_it():
    torch._dynamo.reset()
    one, other = ours(reset_mechanism="subtract"), ours(reset_mechanism="subtract")
    actual = torch.compile(one, fullgraph=True)(X, *START)
    expected = other(X, *START)
    close(actual, expected)
    actual[2].sum().backward()
    expected[2].sum().backward()
    same_gradients(one, other)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_gives_a_plain_graph(strict):
    cell = ours(reset_mechanism="subtract", max_pool=2)
    program = torch.export.export(cell, (X, *START), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    plain = {"<built-in function getitem>", "wrap_with_set_grad_enabled"}
    assert all(target.startswith("aten.") for target in targets - plain)
    assert cell.syn.shape == (0,)  # nothing of the tracing stays behind
    close(program.module()(X, *START), cell(X, *START))
    buffer = io.BytesIO()
    silent = ours(surrogate_disable=True)
    torch.export.save(torch.export.export(silent, (X, *START), strict=strict), buffer)
    buffer.seek(0)
    close(torch.export.load(buffer).module()(X, *START), silent(X, *START))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    "options", [{"max_pool": 2, "reset_mechanism": "subtract"}, {"stride": 2, "inhibition": True}],
    ids=str,
)  # fmt: skip
def test_onnx_export_with_surrogate_disable(tmp_path, dynamo, options):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnx.reference")
    cell = ours(surrogate_disable=True, **options).eval()
    start = states(2, 3, 3, 3) if "stride" in options else START
    torch.onnx.export(cell, (X, *start), tmp_path / "cell.onnx", dynamo=dynamo, verbose=False)
    session = runtime.ReferenceEvaluator(str(tmp_path / "cell.onnx"))
    inputs = dict(zip(session.input_names, (t.numpy() for t in (X, *start)), strict=True))
    close([torch.from_numpy(o) for o in session.run(None, inputs)],
          [o.detach() for o in cell(X, *start)])  # fmt: skip


def test_jit_trace():
    cell = ours(surrogate_disable=True)
    expected = cell(X, *START)
    traced = torch.jit.trace(cell, (X, *START))
    close(traced(X, *START), expected)


def test_torch_save_of_a_whole_module_and_of_a_state_dict():
    cell = ours(reset_mechanism="zero", spike_grad=snnlstm.surrogate.SFS(5))
    cell(X)
    buffer = io.BytesIO()
    torch.save(cell, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    close(loaded(X), cell(X))
    buffer = io.BytesIO()
    torch.save(cell.state_dict(), buffer)
    buffer.seek(0)
    other = ours(seed=9)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    close(other(X, *START), cell(X, *START))


def test_deepcopy_of_a_net():
    model = net(snnlstm.SConv2dLSTM)
    model(X)
    utils.reset(model)
    other = copy.deepcopy(model)
    close(other(X), model(X))


@pytest.mark.parametrize("inside", [False, True], ids=["torch's", "ours"])
def test_activation_checkpointing(backend, inside):
    one, other = (
        ours(checkpoint=inside, reset_mechanism="subtract"),
        theirs(reset_mechanism="subtract"),
    )
    x = steps(4, 2, 2, 6, 6)
    syn, mem = START
    loss = 0
    for t in range(4):
        if inside:
            spk, syn, mem = one(x[t], syn, mem)
        else:
            spk, syn, mem = checkpoint(one, x[t], syn, mem, use_reentrant=False)
        loss = loss + spk.sum() + mem.sum()
    loss.backward()
    syn, mem = START
    loss = 0
    for t in range(4):
        spk, syn, mem = other(x[t], syn, mem)
        loss = loss + spk.sum() + mem.sum()
    loss.backward()
    same_gradients(one, other)


def test_second_derivatives_are_those_of_snntorch(backend):
    """A gradient penalty, through the states and through the surrogate."""
    penalties = []
    for cell in (ours(reset_mechanism="zero"), theirs(reset_mechanism="zero")):
        x = steps(2, 1, 2, 5, 5).requires_grad_()
        cell(x[0])
        spk, _, mem = cell(x[1])
        (grad,) = torch.autograd.grad(spk.sum() + mem.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        penalties.append((x.grad, cell.conv.weight.grad))
    close(*penalties, atol=1e-4, rtol=1e-4)


def test_gradcheck_of_syn_and_mem(backend):
    x = torch.randn(2, 1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    state = [s.double().requires_grad_() for s in states(1, 2, 2, 3)]
    weight = torch.randn(8, 3, 3, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def run(*args):
        return snnlstm.functional.sconv2dlstm(
            *args, stride=(2, 1), record=True, reset_mechanism="none", surrogate_disable=True
        )[1:]

    args = (x, *state, weight, bias)
    fast = backend.name == "simt"
    assert torch.autograd.gradcheck(run, args, fast_mode=fast)
    assert torch.autograd.gradgradcheck(run, args, atol=1e-4, fast_mode=fast)


def test_inference_mode_and_no_grad(backend):
    cell = ours(reset_mechanism="subtract")
    expected = ours(reset_mechanism="subtract")(X, *START)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            close(cell(X, *START), expected)
            assert cell.reset.shape == (2, 3, 6, 6)
            close(cell(X), theirs(reset_mechanism="subtract")(X, *expected[1:]))
        backend.check(cell.path)


def _one_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    cell, alone = ours(), ours()
    parallel = nn.parallel.DistributedDataParallel(cell)
    for batch in (2, 2, 1 + rank):  # the last batches differ, as those of a data set do
        x = steps(1, batch, 2, 6, 6, seed=10 * rank + batch)[0]
        spk, syn, mem = parallel(x)
        close((spk, syn, mem), alone(x))
        (spk.sum() + mem.sum()).backward()
        snnlstm.SConv2dLSTM.detach_hidden()
    torch.distributed.destroy_process_group()


def test_data_parallel_ranks_keep_their_own_states(tmp_path):
    """snnTorch's states are buffers: rank 0's replace those of the others."""
    assert not {"syn", "mem"} & {name for name, _ in ours().named_buffers()}
    torch.multiprocessing.spawn(_one_rank, (tmp_path / "store",), nprocs=2)
