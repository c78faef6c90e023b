"""Compiled cells and networks compute eager's numbers, without graph breaks and recompilations."""

import os
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from snntorch import surrogate
from snntorch.functional.quant import state_quant
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_inductor_cache as fresh_cache
from torch.utils._pytree import tree_leaves

import snnlstm
from snnlstm.calls import spec
from snnlstm.native import backends as native
from snnlstm.native import operators
from tests.shared.helpers import (
    close,
    described,
    flat,
    long,
    ours,
    same_gradients,
    states,
    steps,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Older compilers guard on more attributes of a module, and compile more graphs.
counted = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="counted with torch 2.13"
)


def count_graphs(module: nn.Module, **kwargs):
    """Returns the compiled module, and a counter whose frame_count is the number of graphs."""
    counter = CompileCounter()
    return torch.compile(module, fullgraph=True, backend=counter, **kwargs), counter


def step_calls(count=3, *, shape=(2, 2, 6, 6), **kwargs):
    """Returns the arguments of calls of one step; the states are the stored ones."""
    return [((x,), kwargs) for x in steps(count, *shape)]


def whole(*shape, **kwargs):
    """Returns the arguments of two calls of a sequence."""
    return [((steps(3, *(shape or (2, 2, 6, 6)), seed=seed),), kwargs) for seed in (1, 2)]


class Functional(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(12, 5, 3, 3) / 9), options

    def forward(self, x):
        return snnlstm.functional.sconv2dlstm(x, weight=self.weight, threshold=0.01, **self.options)


class Alone(nn.Module):
    """Every surrogate and a quantiser, each of numbers that are parameters."""

    def __init__(self):
        super().__init__()
        kinds = [kind.name for kind in snnlstm.surrogate.KINDS[1:] if kind.name != "SSO"]
        self.functions = [getattr(snnlstm.surrogate, name)() for name in kinds]  # SSO draws anew
        self.functions.append(snnlstm.quant.state_quant(4))
        numbers = torch.cat([torch.linspace(-3, 3, 101), torch.zeros(1)])
        self.numbers = nn.ParameterList(numbers.clone() for _ in self.functions)

    def forward(self):
        pairs = zip(self.functions, self.numbers, strict=True)
        return [function(numbers) for function, numbers in pairs]


CHANNELS_LAST = [((steps(1, 2, 2, 6, 6)[0].to(memory_format=torch.channels_last),), {})] * 2
PAIR = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
ATAN = snnlstm.surrogate.atan
# What is compiled, and its calls.
OBJECTS = {
    **{
        f"steps, {described(options) or 'plain'}": (lambda options=options: ours(**options),
                                                    step_calls())
        for options in (
            {}, {"max_pool": 2, "reset_mechanism": "subtract", "init_hidden": True},
            {"avg_pool": 2, "reset_mechanism": "zero", "learn_threshold": True, "output": True},
            {"state_quant": snnlstm.quant.state_quant(4), "stride": 2, "dilation": 2},
            {"inhibition": True, "dtype": torch.float64, "bias": False},
            {"spike_grad": torch.sigmoid},
        )
    },
    "a sequence": (
        lambda: ours(reset_mechanism="subtract", batch_first=True), whole(record=True),
    ),
    "channels_last": (ours, CHANNELS_LAST),
    "lengths": (ours, [whole(lengths=torch.tensor(n), record=True)[0] for n in ([3, 1], [0, 2])]),
    "signals": (lambda: snnlstm.SConv1dLSTM(2, 3, 5, threshold=0.05, max_pool=2), whole(2, 2, 9)),
    "ConvLSTM": (
        lambda: snnlstm.ConvLSTM(2, [5, 3], 3, 2, True, stride=2), whole(2, 2, 5, 6),
    ),
    "ConvLSTMCell": (
        lambda: snnlstm.ConvLSTMCell(2, 3, 3), step_calls(shape=(2, 2, 5, 6), cur_state=PAIR),
    ),
    "Sequential": (
        lambda: snnlstm.Sequential(ours(init_hidden=True), nn.BatchNorm2d(3), nn.Flatten()),
        whole(),
    ),
    "functional": (lambda: Functional(spike_grad=ATAN(2)), whole()),
    "functional, step": (lambda: Functional(spike_grad=ATAN(2), stride=2), step_calls(1)),
    "functional, made within": (lambda: Functional(spike_grad=None), whole()),
    "surrogates and a quantiser": (Alone, [((), {})]),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_what_is_compiled_has_no_graph_break_and_equals_eager(name):
    """The operators tell the compiler the strides that the kernels give their outputs."""
    make, calls = OBJECTS[name]
    modules, results = [], []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(make())
    compiled = torch.compile(modules[0], fullgraph=True, backend="aot_eager")
    for module, call in zip(modules, (compiled, modules[1]), strict=True):
        dtype = next(module.parameters()).dtype
        outs = [t for args, kwargs in calls
                for t in flat(call(*(a.to(dtype) for a in args), **kwargs))]  # fmt: skip
        kept = [getattr(module, n, None) for n in ("syn", "mem", "spk")]
        results.append([*outs, *(t for t in kept if t is not None)])
        if outs[0].requires_grad or len(outs) > 1:
            sum((o * (k + 1)).square().sum() for k, o in enumerate(outs)).backward()
    close(*results)
    assert [out.stride() for out in results[0]] == [out.stride() for out in results[1]]
    same_gradients(*modules)


def test_under_autocast(backend):
    cell, eager = ours(reset_mechanism="zero"), ours(reset_mechanism="zero")
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    x = steps(2, 2, 2, 6, 6)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        results = [call(x) for call in (compiled, eager)]
    close(*results, atol=1e-2)
    for spk, _, mem in results:
        (spk.sum() + mem.sum()).backward()
    for parameter, reference in zip(cell.parameters(), eager.parameters(), strict=True):
        expected = reference.grad
        assert (parameter.grad - expected).norm() <= 1e-2 * expected.norm()
    assert cell.path.native == backend.native
    assert cell.path.name.startswith(backend.device.type if backend.native else "reference")


# What changes one after the other, besides options.
LATER = {
    "direct": lambda cell: None,
    "reference": lambda cell: None,
    "threshold": lambda cell: setattr(cell, "threshold", 0.05),
    "state": lambda cell: setattr(cell, "mem", states(2, 3, 6, 6)[1]),
    "state_dict": lambda cell: cell.load_state_dict(
        ours(seed=5, reset_mechanism="zero").state_dict()
    ),
    "dtype": lambda cell: cell.double(),
    "weight_norm": lambda cell: nn.utils.parametrizations.weight_norm(cell.conv),
}
SAME_RESULTS = {"direct", "reference", "dtype", "weight_norm"}


def alike(one, other):
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), atol=1e-5)


def test_what_changes_after_compiling_is_followed():
    """The table has no hooks on conv, because dynamo looks for hooks only when it compiles."""
    changed, eager = ours(threshold=0.02), ours(threshold=0.02)
    compiled = torch.compile(changed, fullgraph=True, backend="aot_eager")
    x = steps(4, 2, 2, 6, 6)
    before = compiled(x)
    with torch._dynamo.config.patch(recompile_limit=len(LATER) + 1):
        for name, change in LATER.items():
            for cell in (changed, eager):
                cell.reset_mem()
                cell.zero_grad()
                change(cell)
            x = x.to(changed.graded_spikes_factor.dtype)
            with snnlstm.algorithm(name if name in snnlstm.calls.algorithms.ALGORITHMS else "auto"):
                actual, expected = compiled(x), eager(x)
            assert name != "reference" or changed.path == eager.path
            for spk, _, mem in (actual, expected):
                (spk.sum() + mem.square().sum()).backward()
            close(actual, expected)
            same_gradients(changed, eager)
            assert all(map(alike, actual, before)) == (name in SAME_RESULTS), name
            before = actual


# Values that are no defaults.
VALUES = {
    "reset_mechanism": "zero", "max_pool": 2, "inhibition": True, "surrogate_disable": True,
    "spike_grad": snnlstm.surrogate.sigmoid(3), "state_quant": snnlstm.quant.state_quant(4),
    "stride": 2, "dilation": 3, "avg_pool": 2,
}  # fmt: skip
SAME_NUMBERS = {"batch_first", "init_hidden", "output"}  # of a step that returns all


def test_every_option_that_changes_after_compiling_is_followed():
    """Each is set and then set back, after a first step that starts from zeros."""
    assert {*VALUES, *SAME_NUMBERS} == {*spec.OPTIONS}
    cells = [ours(threshold=0.02, output=True) for _ in range(2)]
    compiled = torch.compile(cells[0], fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=8 * len(VALUES)):
        for name, value in VALUES.items():
            before = getattr(cells[0], name)
            for now in (value, before):
                results = []
                for cell, call in zip(cells, (compiled, cells[1]), strict=True):
                    setattr(cell, name, now)
                    cell.reset_mem()
                    cell.zero_grad()
                    outs = flat([call(x) for x in steps(2, 2, 2, 6, 6)])
                    sum(o.square().sum() for o in outs if o.requires_grad).backward()
                    results.append([*outs, cell.conv.weight.grad])
                close(*results)


class Loud(snnlstm.SConv2dLSTM):
    def fire(self, mem):
        return 2 * super().fire(mem)


def in_doubles(name):
    return lambda cell: cell._buffers.update({name: cell._buffers[name].double()})


# What a call needs besides its tensors being read, and how the cell gets it.
UNUSUAL = {
    "a hook": lambda cell: cell.conv.register_forward_hook(lambda module, args, out: out * 2),
    "fire": lambda cell: setattr(cell, "fire", lambda mem: (mem > 0.03).float() + 0 * mem),
    "a subclass": lambda cell: setattr(cell, "__class__", Loud),
    "conv's forward": lambda cell: setattr(cell.conv, "forward", lambda x: conv_of(cell, 3 * x)),
    "a function for conv": lambda cell: as_a_function(cell),
    "padding": lambda cell: setattr(cell.conv, "padding", "same"),
    "conv's dilation": lambda cell: setattr(cell.conv, "dilation", (1, 1)),
    "threshold of float64": in_doubles("threshold"),
    "graded of float64": in_doubles("graded_spikes_factor"),
    "a threshold a channel": lambda cell: setattr(cell, "threshold", torch.full((3, 1, 1), 0.05)),
    "a threshold a column": lambda cell: setattr(cell, "threshold", torch.full((6,), 0.05)),
    "a learned factor": lambda cell: learned_factor(cell),
    "bfloat16": lambda cell: cell.bfloat16(),
    "hidden threshold": lambda cell: cell.__dict__.update(threshold=torch.tensor(0.02)),
    "hidden weight": lambda cell: cell.conv.__dict__.update(weight=cell.conv.weight.detach() * 2),
}


def conv_of(cell, x):
    return nn.functional.conv2d(x, cell.conv.weight, cell.conv.bias, padding=1)


def as_a_function(cell):
    conv = cell.conv
    del cell.conv
    cell.conv = lambda x: conv(x) * 2


def learned_factor(cell):
    del cell.graded_spikes_factor
    cell.graded_spikes_factor = nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_trace_looks_closer_where_a_call_is_unusual(name):
    """A second step does not start from zeros, so most of its checks could be left out."""
    results = []
    for compiled in (True, False):
        cell = ours(threshold=0.05)
        UNUSUAL[name](cell)
        call = torch.compile(cell, backend="eager", fullgraph=True) if compiled else cell
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        outs = flat([call(x.to(dtype)) for x in steps(3, 2, 2, 6, 6)])
        loss, learned = sum(o.float().square().sum() for o in outs), [*cell.parameters()]
        grads = torch.autograd.grad(loss, learned, allow_unused=True) if learned else ()
        results.append(([*outs, *grads], cell.path.native))
    close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_trace_of_a_plain_step_is_its_operator():
    graphs = []
    cell = ours()

    def loop(x):
        syn, mem = cell.reset_mem()
        for x_t in x:
            spk, syn, mem = cell(x_t, syn, mem)
        return spk, syn, mem

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(loop, backend=backend, fullgraph=True)(steps(3, 2, 2, 6, 6))
    names = [node.name.rstrip("_0123456789") for node in graphs[0].graph.nodes
             if node.op.startswith("call")]  # fmt: skip
    last = len(names) - names[::-1].index("forward_default") - 1
    second = names.index("forward_default", names.index("forward_default") + 1)
    assert [names[k] for k in range(second, last)] == ["forward_default", "syn", "mem"]


WRONG = [
    lambda x, syn, mem: (x[:, :1], syn, mem), lambda x, syn, mem: (x[..., :0], syn, mem),
    lambda x, syn, mem: (x, syn[:1], mem), lambda x, syn, mem: (x, syn, mem[..., 1:]),
    lambda x, syn, mem: (x.to(torch.complex64), syn, mem), lambda x, syn, mem: (x, [syn], mem),
    lambda x, syn, mem: (x.to("meta"), syn, mem), lambda x, syn, mem: (x, syn.to("meta"), mem),
    lambda x, syn, mem: (x.tolist(), syn, mem), lambda x, syn, mem: (x.to_sparse(), syn, mem),
]  # fmt: skip


# Some errors take the compiler 13 s to explain.
@pytest.mark.parametrize("wrong", [w if k in (0, 7, 8) else pytest.param(w, marks=long)
                                   for k, w in enumerate(WRONG)])  # fmt: skip
def test_wrong_tensors_raise_while_the_compiler_traces(wrong):
    cell = ours()
    given = steps(1, 2, 2, 6, 6)[0], *states(2, 3, 6, 6)
    compiled = torch.compile(cell, backend="eager")
    compiled(*given)
    for call in (cell, compiled):
        with pytest.raises(Exception):  # noqa: B017  dynamo wraps it
            call(*wrong(*given))


@pytest.mark.parametrize(
    ("library", "dynamic"), [(surrogate, None), (snnlstm.surrogate, True)], ids=["theirs", "ours"]
)
def test_the_functional_form_recognises_surrogates(library, dynamic):
    """A second number is a symbol to the compiler, and is guarded on; all are if it is dynamic."""
    weight, x = torch.randn(12, 5, 3, 3, requires_grad=True) / 9, steps(3, 2, 2, 6, 6)
    codes = []

    def backend(graph, _):
        codes.append(graph.code)
        return graph

    def call(spike):
        return snnlstm.functional.sconv2dlstm(x, weight=weight, threshold=0.01, spike_grad=spike)

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for spike in (library.atan(2), library.atan(3.0), library.SFS(3.0, 0.5)):
        results = [compiled(spike), call(spike)]
        close(*results)
        close(*(torch.autograd.grad(spk.sum() + mem.sum(), weight) for spk, _, mem in results))
    closure = torch.compile(lambda: call(spike), fullgraph=True, backend=backend, dynamic=dynamic)
    close(closure(), results[1])
    assert len(codes) >= 3
    assert all("snnlstm.forward" in code for code in codes)


def test_the_functional_form_names_what_torch_compile_cannot_take():
    """Closures that the traced code makes, and foreign functions, take the reference path."""
    weight, x = torch.randn(12, 5, 3, 3) / 9, steps(2, 2, 2, 6, 6)

    def call(spike, quant=None):
        spike = surrogate.atan() if spike is None else spike
        return snnlstm.functional.sconv2dlstm(
            x, weight=weight, threshold=0.01, spike_grad=spike, state_quant=quant
        )

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for spike in (None, torch.sigmoid, surrogate.custom_surrogate(lambda x, grad, spk: grad)):
        close(compiled(spike), call(spike))
    slope = surrogate.fast_sigmoid(torch.tensor(25.0))
    for arguments, text in (
        ((surrogate.atan(), state_quant(4)), r"pass snnlstm\.quant\.state_quant"),
        ((slope,), "fast_sigmoid must hold numbers alone"),
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
            compiled(*arguments)
    if os.environ.get("SNNLSTM_LONG"):  # a graph break has dynamo compile function by function
        close(torch.compile(call, backend="eager")(slope), call(slope))


def network(stem: bool) -> snnlstm.Sequential:
    """Makes a cell and a readout; a stem, if it is wanted, and then a second cell, too."""
    cells = (
        ours(3, 4, 3, threshold=0.05, max_pool=2, init_hidden=True),
        ours(4, 4, 3, threshold=0.05, reset_mechanism="zero", init_hidden=True),
    )
    first = (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) if stem else ()
    return snnlstm.Sequential(*first, *cells[: 1 + stem], nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=long)])
def test_inductor_trains_a_network_as_eager_does(whole):
    """The graph of the default backend packs the weights anew after each step of the optimizer.

    The whole network has a stem, and another graph for inference.
    """
    x, target = steps(3, 4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    nets, losses = [], []
    for compiled in (False, True):
        net = network(stem=whole)
        call = torch.compile(net, fullgraph=True) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            snnlstm.SConv2dLSTM.reset_hidden()
            loss = nn.functional.cross_entropy(call(x).mean(0), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        nets.append(net.eval())
        with torch.no_grad():
            if whole:
                losses[-1].append(call(x).sum().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)
    assert losses[0][4] < losses[0][0] - 0.02
    close(nets[1].state_dict(), nets[0].state_dict(), atol=2e-3)


def test_a_graph_cached_on_disk_by_another_instruction_set_is_not_used(monkeypatch):
    """The cache outlives the process, and each instruction set saves tensors of other shapes."""
    x, before = steps(2, 2, 2, 6, 6), native.cpu.isa
    with fresh_cache():
        try:
            for isa in snnlstm._C.isa_names()[-2:]:
                native.cpu.set_isa(isa)
                monkeypatch.setattr(operators, "LAYOUT_CHECKSUM", operators.layout_checksum())
                torch._dynamo.reset()
                cell, eager = ours(), ours()
                compiled = torch.compile(cell, fullgraph=True)
                close(compiled(x), eager(x))
                cell.mem.sum().backward()
                eager.mem.sum().backward()
                same_gradients(cell, eager)
        finally:
            native.cpu.set_isa(before)


def test_a_cuda_graph_holds_the_whole_loop(monkeypatch):
    """torch makes none of a graph with a tensor on the CPU, and cuts out operators with the tag.

    Tensors of the meta device stand for a GPU's.
    """
    core = SimpleNamespace(cuda_padded_channels=lambda channels: channels + 1)
    monkeypatch.setitem(native.BACKENDS, "meta", native.cuda.Backend(core))
    monkeypatch.setitem(
        snnlstm.dispatch.reasons.NATIVE_PATHS, "meta", snnlstm.dispatch.path.native_path("cuda")
    )
    monkeypatch.setattr(snnlstm.dispatch.reasons, "against_device", lambda *_: None)
    nodes = []

    def note(graph, _):
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    with torch.device("meta"):
        cell = ours(learn_threshold=True, state_quant=snnlstm.quant.state_quant(4))
        x, state = torch.rand(3, 2, 2, 6, 6), torch.zeros(2, 3, 6, 6)

    def each_event(events, syn, mem):
        for event in events:
            spk, syn, mem = cell(event, syn, mem)
        return spk, syn, mem

    noting = aot_autograd(fw_compiler=note, bw_compiler=note)
    out = torch.compile(each_event, fullgraph=True, backend=noting)(x, state, state)
    sum(o.sum() for o in out).backward()
    for name in ("forward", "backward"):
        operator = getattr(torch.ops.snnlstm, name).default
        assert sum(node.target is operator for node in nodes) == len(x)
        assert "cudagraph_unsafe" not in {tag.name for tag in operator.tags}
    values = tree_leaves([node.meta.get("val") for node in nodes])
    assert {t.device.type for t in values if isinstance(t, torch.Tensor)} == {"meta"}


T, F = True, False
# How states are kept; batches, each with whether it trains; and the graphs after each batch. Dynamo
# gives up above 8 graphs, and fullgraph=True raises. Passed states take a graph for a new cell's, a
# reset cell's and a step's.
GRAPHS = {
    "hidden": ("hidden", [(4, T), (4, T), (3, T), (6, F), (1, F)] * 2, [2, 2, 4, 6, 8, *[8] * 5]),
    "sequence": ("sequence", [(4, T), (4, T), (3, T), (6, F), (1, F)] * 2,
                 [1, 1, 2, 3, 4, *[4] * 5]),
    "stored": ("stored", [(2, T), (2, T), (3, T), (5, T), (2, T), (7, T)], [2, 2, 4, 4, 4, 4]),
    "passed": ("passed", [(3, T), (3, T), (2, T), (4, T), (3, T)], [2, 3, 5, 5, 5]),
}  # fmt: skip


@counted
@pytest.mark.parametrize("name", GRAPHS)
def test_how_many_graphs_are_compiled(name):
    """The start and the rest of a sequence take a graph for one size, and then one for all."""
    mode, batches, expected = GRAPHS[name]
    cells = [ours(init_hidden=mode == "hidden", output=True) for _ in range(2)]
    compiled, counter = count_graphs(cells[0])
    counts = []
    for batch, training in batches:
        passed = [cell.reset_mem() if mode == "passed" else () for cell in cells]
        with torch.set_grad_enabled(training):
            x = steps(3, batch, 2, 6, 6)
            for x_t in [x] if mode == "sequence" else x:
                pairs = zip((compiled, cells[1]), passed, strict=True)
                outs = [call(x_t, *state) for call, state in pairs]
                close(*outs, atol=0, rtol=0)
                passed = [out[1:] if mode == "passed" else () for out in outs]
        if training:
            outs[0][2].sum().backward()
        for cell in cells:
            cell.reset_mem()
        counts.append(counter.frame_count)
    assert counts == expected


@counted
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic=True", "mark_dynamic"])
def test_one_graph_serves_all_batch_sizes(marked):
    cell, eager = ours(reset_mechanism="subtract"), ours(reset_mechanism="subtract")
    compiled, counter = count_graphs(cell, **({} if marked else {"dynamic": True}))
    for batch in (4, 3, 5, 2, 7):  # the first differs from Cin: dynamo takes equal sizes for one
        inputs = [steps(1, batch, 2, 6, 6)[0], *states(batch, 3, 6, 6)]
        if marked:
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
        close(compiled(*inputs), eager(*inputs), atol=0, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [ours, lambda: snnlstm.ConvLSTMCell(2, 3, 3)])
def test_no_compiled_call_reads_beyond_a_weight_that_does_not_fit(make):
    cell = make()
    cell.conv.weight = nn.Parameter(cell.conv.weight.detach()[..., :1].clone())
    with pytest.raises(RuntimeError, match=r"must match|broadcast"):
        torch.compile(cell, backend="eager")(steps(1, 2, 2, 6, 6)[0])
