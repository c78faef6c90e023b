"""Compiled cells and networks compute eager's numbers, without graph breaks and recompilations."""

import copy
import itertools

import pytest
import torch
from helpers import close, described, ours, same_gradients, states, steps, theirs
from snntorch import surrogate
from snntorch.functional.quant import state_quant
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_inductor_cache as fresh_cache

import snnlstm
from snnlstm.native import function as native

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Older compilers guard on more attributes of a module, and compile more graphs.
counted = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="counted with torch 2.13"
)


def count_graphs(module: nn.Module, **kwargs):
    """Returns the compiled module, and a counter whose frame_count is the number of graphs."""
    counter = CompileCounter()
    return torch.compile(module, fullgraph=True, backend=counter, **kwargs), counter


OPTIONS = [
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
    [(False, options) for options in OPTIONS] + [(True, options) for options in OPTIONS[:2]],
    ids=described,
)
def test_steps_have_no_graph_break_and_equal_eager_ones(options, hidden):
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


@pytest.mark.parametrize("form", ["last", "record", "channels_last step"])
def test_sequences_and_strides_equal_eager_ones(form):
    """The operators tell the compiler the strides that the kernels give their outputs."""
    one, other = ours(reset_mechanism="subtract"), ours(reset_mechanism="subtract")
    x, record = steps(3, 2, 2, 6, 6), form == "record"
    if "step" in form:
        x = x[0].to(memory_format=torch.channels_last)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        actual, expected = compiled(x, record=record), other(x, record=record)
        close(actual, expected)
        close((one.syn, one.mem), (other.syn, other.mem))
        assert [out.stride() for out in actual] == [out.stride() for out in expected]
    for out in (actual, expected):
        (out[0].sum() + out[2].square().sum()).backward()
    same_gradients(one, other)


def test_under_autocast(backend):
    one, other = ours(reset_mechanism="zero"), ours(reset_mechanism="zero")
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x = steps(2, 2, 2, 6, 6)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        results = [call(x) for call in (compiled, other)]
    close(*results, atol=1e-2)
    for spk, _, mem in results:
        (spk.sum() + mem.sum()).backward()
    for parameter, reference in zip(one.parameters(), other.parameters(), strict=True):
        wanted = reference.grad
        assert (parameter.grad - wanted).norm() <= 1e-2 * wanted.norm()
    assert one.path.native == backend.native
    assert one.path.name.startswith(backend.device.type if backend.native else "reference")


LATER = {
    "threshold": lambda cell: setattr(cell, "threshold", 0.3),
    "reset": lambda cell: setattr(cell, "reset_mechanism", "subtract"),
    "pool": lambda cell: setattr(cell, "max_pool", 2),
    "surrogate": lambda cell: setattr(cell, "spike_grad", snnlstm.surrogate.sigmoid(3)),
    "state_dict": lambda cell: cell.load_state_dict(
        ours(seed=5, reset_mechanism="zero").state_dict()
    ),
    "weight_norm": lambda cell: nn.utils.parametrizations.weight_norm(cell.conv),
    "dtype": lambda cell: cell.double(),
    "algorithm": lambda cell: None,
}


@pytest.mark.parametrize("name", LATER)
def test_what_changes_after_compiling_is_followed(name):
    """The table has no hooks on conv, because dynamo looks for hooks only when it compiles."""
    one, other = ours(threshold=0.02), ours(threshold=0.02)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    x = steps(4, 2, 2, 6, 6)
    before = compiled(x)[2]
    for cell in (one, other):
        cell.reset_mem()
        LATER[name](cell)
    x = x.to(one.graded_spikes_factor.dtype)
    with snnlstm.algorithm("direct" if name == "algorithm" else "auto"):
        actual, expected = compiled(x), other(x)
    close(actual, expected)
    changes_mem = name in ("reset", "state_dict")
    assert torch.allclose(actual[2].float(), before, atol=1e-5) != changes_mem


SURROGATES = {
    "theirs": (surrogate.atan(), surrogate.atan(3.0)),
    "of two numbers": (surrogate.SFS(3.0, 0.5), surrogate.spike_rate_escape(2)),
    "ours": (snnlstm.surrogate.atan(2), snnlstm.surrogate.atan(3.0)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", SURROGATES)
def test_the_functional_form_recognises_surrogates(name, dynamic):
    """A second number is a symbol to the compiler, and is guarded on; all are if it is dynamic."""
    spikes = SURROGATES[name]
    weight, x = torch.randn(12, 5, 3, 3, requires_grad=True) / 9, steps(3, 2, 2, 6, 6)
    codes = []

    def backend(graph, _):
        codes.append(graph.code)
        return graph

    def call(spike, **options):
        return snnlstm.functional.sconv2dlstm(
            x, weight=weight, threshold=0.01, spike_grad=spike, **options
        )

    def closure_of(spike):
        return torch.compile(lambda: call(spike), fullgraph=True, backend=backend, dynamic=dynamic)

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    close(closure_of(spikes[0])(), call(spikes[0]))
    for spike in spikes:
        results = [form(spike) for form in (compiled, call)]
        close(*results)
        close(*(torch.autograd.grad(spk.sum() + mem.sum(), weight) for spk, _, mem in results))
    for stride in (1, 2):
        close(compiled(spikes[0], stride=stride), call(spikes[0], stride=stride))
    assert len(codes) >= 3
    assert all("snnlstm.forward" in code for code in codes)


def test_the_functional_form_names_what_torch_compile_cannot_take():
    """What the traced code makes itself, and foreign functions, run in plain torch."""
    weight, x = torch.randn(12, 5, 3, 3) / 9, steps(3, 2, 2, 6, 6)

    def call(spike, quant=None):
        spike = surrogate.atan() if spike is None else spike
        return snnlstm.functional.sconv2dlstm(
            x, weight=weight, threshold=0.01, spike_grad=spike, state_quant=quant
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for spike in (None, torch.sigmoid, surrogate.custom_surrogate(lambda x, grad, spk: grad)):
        close(compiled(spike), call(spike))
    slope = surrogate.fast_sigmoid(torch.tensor(25.0))
    for arguments, text in (
        ((surrogate.atan(), state_quant(4)), r"pass snnlstm\.quant\.state_quant"),
        ((slope,), "fast_sigmoid must hold numbers alone"),
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
            compiled(*arguments)
    close(torch.compile(call, backend="aot_eager")(slope), call(slope))


def test_truncated_backpropagation_and_a_stack():
    """A Sequential trains in chunks, the last of which is shorter; states are detached between."""
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        cell, relu = ours(init_hidden=True), nn.ReLU(inplace=True)
        stack = snnlstm.Sequential(nn.Conv2d(2, 2, 1), cell, relu, nn.Flatten(), nn.Linear(108, 2))
        call = torch.compile(stack, fullgraph=True, backend="aot_eager") if compiled else stack
        for x in steps(8, 2, 2, 6, 6).split(3):
            call(x).square().sum().backward()
            snnlstm.SConv2dLSTM.detach_hidden()
        grads.append([parameter.grad for parameter in stack.parameters()])
    close(*grads, atol=2e-5)


class Net(nn.Module):
    """This network has a stem, two cells, and a readout of mean rate and last potential."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.one = snnlstm.SConv2dLSTM(3, 4, 3, threshold=0.05, max_pool=2, init_hidden=True)
        self.two = snnlstm.SConv2dLSTM(4, 4, 3, threshold=0.05, reset_mechanism="zero")
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.one.reset_mem()
        self.two.reset_mem()
        current = self.stem(x.flatten(0, 1)).relu().unflatten(0, x.shape[:2])
        spk, _, mem = self.two(self.one(current))
        return self.head((spk.mean(0) + mem).flatten(1))


def test_inductor_trains_a_network_as_eager_does():
    """The graph of the default backend packs the weights anew after each step of the optimizer."""
    x, target = steps(3, 4, 2, 8, 8), torch.tensor([0, 1, 2, 1])
    nets, losses = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Net()
        call = torch.compile(net, fullgraph=True) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(call(x), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        nets.append(net.eval())
        with torch.no_grad():
            losses[-1].append(call(x).sum().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    assert losses[0][4] < losses[0][0] - 0.02
    close(nets[1].state_dict(), nets[0].state_dict(), atol=2e-3)


def test_a_graph_cached_on_disk_by_another_instruction_set_is_not_used(monkeypatch):
    """The cache outlives the process, and each instruction set saves tensors of other shapes."""
    x, before = steps(2, 2, 2, 6, 6), native.cpu.isa
    with fresh_cache():
        try:
            for isa in snnlstm._C.isa_names():
                native.cpu.set_isa(isa)
                monkeypatch.setattr(native, "LAYOUT", native.layout())
                torch._dynamo.reset()
                one, other = ours(), ours()
                compiled = torch.compile(one, fullgraph=True)
                close(compiled(x), other(x))
                one.mem.sum().backward()
                other.mem.sum().backward()
                same_gradients(one, other)
        finally:
            native.cpu.set_isa(before)


def test_the_mode_reduce_overhead_works():
    """On a GPU this mode uses CUDA graphs; on a CPU it is the default mode."""
    one, other = ours(reset_mechanism="subtract"), ours(reset_mechanism="subtract")
    compiled = torch.compile(one, fullgraph=True, mode="reduce-overhead")
    start = states(2, 3, 6, 6)
    for x in steps(2, 2, 2, 6, 6):
        close(compiled(x, *start), other(x, *start))


@counted
@pytest.mark.parametrize(
    ("state", "training"),
    [*itertools.product(("hidden", "stored"), (True, False)), ("passed", True)],
)
def test_states_take_one_graph_to_start_and_one_to_go_on(state, training):
    """Passed states take three graphs: for a new cell's, a reset cell's, and a step's states."""
    cell = ours(init_hidden=state == "hidden")
    compiled, counter = count_graphs(cell)
    seen = []
    with torch.set_grad_enabled(training):
        for x in (steps(4, 2, 2, 6, 6, seed=s) for s in range(3)):
            zeros = cell.reset_mem()
            passed = zeros if state == "passed" else ()
            for x_t in x:
                out = compiled(x_t, *passed)
                passed = out[1:] if state == "passed" else ()
                seen.append(counter.frame_count)
            if training:
                (out if state == "hidden" else out[2]).sum().backward()
    passed_in_all = [1, 2, 2, 2] + [3] * 8
    assert seen == (passed_in_all if state == "passed" else [1] + [2] * 11)


@counted
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_sequence_takes_one_graph(explicit, training):
    cell = ours()
    compiled, counter = count_graphs(cell)
    for seed in range(3):
        if not explicit:
            cell.reset_mem()
        with torch.set_grad_enabled(training):
            mem = compiled(steps(4, 2, 2, 6, 6, seed=seed), *states(2, 3, 6, 6)[: 2 * explicit])[2]
        if training:
            mem.sum().backward()
        cell(steps(2, 2, 2, 6, 6), record=True)  # an eager call of another kind comes between
    assert counter.frame_count == 1


@counted
@pytest.mark.parametrize("sequence", [False, True])
def test_training_and_validation_with_smaller_last_batches_stay_under_dynamos_limit(sequence):
    """Dynamo gives up above 8 graphs, and fullgraph=True raises."""
    cell = ours(init_hidden=True)
    compiled, counter = count_graphs(cell)
    after = []
    for _ in range(3):
        for batch, training in ((4, True), (4, True), (3, True), (6, False), (1, False)):
            x = steps(3, batch, 2, 6, 6)
            cell.reset_mem()
            with torch.set_grad_enabled(training):
                out = compiled(x) if sequence else [compiled(x_t) for x_t in x][-1]
            if training:
                out.sum().backward()
        after.append(counter.frame_count)
    assert after == [4 if sequence else 8] * 3


@counted
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic=True", "mark_dynamic"])
def test_one_graph_serves_all_batch_sizes(marked):
    one, other = ours(reset_mechanism="subtract"), ours(reset_mechanism="subtract")
    compiled, counter = count_graphs(one, **({} if marked else {"dynamic": True}))
    for batch in (4, 3, 5, 2, 7):  # the first differs from Cin: dynamo takes equal sizes for one
        inputs = [steps(1, batch, 2, 6, 6)[0], *states(batch, 3, 6, 6)]
        if marked:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        close(compiled(*inputs), other(*inputs), atol=0, rtol=0)
    assert counter.frame_count == 1


FRESH = {
    "new": lambda cell: cell,
    "moved": lambda cell: cell.to(torch.float64).to(torch.float32),
    "loaded": lambda cell: cell.load_state_dict(ours(reset_mechanism="zero").state_dict()) and cell,
    "copied": copy.deepcopy,
    "set": lambda cell: setattr(cell, "max_pool", 3) or cell,
    "accelerated": lambda _: snnlstm.accelerate(theirs(reset_mechanism="subtract")).model,
}


@pytest.mark.parametrize("name", FRESH)
def test_a_cell_that_was_not_called_before_compiles_for_all_sizes(name):
    """The options' text is made before torch.compile traces, and takes numbers for symbols."""
    warm = ours(reset_mechanism="subtract", max_pool=2)
    warm(steps(1, 4, 2, 6, 6)[0])
    cell = FRESH[name](warm)
    compiled = torch.compile(copy.deepcopy(cell), fullgraph=True, dynamic=True, backend="eager")
    cell.reset_mem()
    for batch in (4, 3, 5):
        inputs = [steps(1, batch, 2, 6, 6)[0], *states(batch, 3, 6, 6)]
        close(compiled(*inputs), cell(*inputs), atol=0, rtol=0)


class Loop(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x):
        self.cell.reset_mem()
        return torch.stack([self.cell(x_t)[0] for x_t in x])


def test_a_loop_within_a_graph_that_serves_all_sizes():
    one, other = (Loop(ours(reset_mechanism="subtract")) for _ in range(2))
    compiled = torch.compile(one, backend="eager", dynamic=True)
    for x in (steps(8, 4, 2, 6, 6), steps(8, 3, 2, 5, 7)):
        close(compiled(x), other(x), atol=0, rtol=0)


@counted
@pytest.mark.parametrize(
    ("passed", "counts"),
    [(False, ((2, 2), (3, 4), (5, 4), (2, 4), (7, 4))), (True, ((3, 2), (2, 4), (4, 4), (3, 4)))],
    ids=["stored", "passed"],
)
def test_batches_of_any_size(passed, counts):
    """The start and the rest of a sequence take a graph for one size and then one for all."""
    cell, other = ours(), ours()
    compiled, counter = count_graphs(cell)
    for batch, graphs in counts:
        states_ = [one.reset_mem() if passed else () for one in (cell, other)]
        for x in steps(3, batch, 2, 6, 6):
            out = [call(x, *own) for call, own in zip((compiled, other), states_, strict=True)]
            states_ = [o[1:] if passed else () for o in out]
            close(*out, atol=0, rtol=0)
        for one in (cell, other):
            one.reset_mem()
        assert counter.frame_count == graphs


def test_a_state_that_is_assigned_after_a_reset_is_used():
    cell = ours(init_hidden=True, output=True)
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    x, (syn, mem) = steps(1, 2, 2, 6, 6)[0], states(2, 3, 6, 6)
    expected = ours()(x, syn, mem)
    compiled(x)
    cell.reset_mem()
    cell.syn, cell.mem = syn, mem
    close(compiled(x), expected)
