"""Every bad argument raises an error that names the argument and the value that came.

An error leaves state, weights and random numbers as they were.
"""

import functools
import inspect
import itertools
import math
import re
import typing
import warnings

import numpy
import pytest
import snntorch
import torch
from torch import nn

import snnlstm
from snnlstm import surrogate, unroll
from snnlstm.functional import sconv2dlstm
from snnlstm.quant import StateQuant, state_quant
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close, ours, quietly, states, steps

X, STATE = torch.zeros(1, 2, 5, 5), torch.zeros(1, 3, 5, 5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype, and quantised ones are old
    NESTED = torch.nested.nested_tensor([STATE[0], STATE[0, :, :4]])
    QUANTISED = torch.quantize_per_tensor(STATE, 0.1, 0, torch.quint8)
WEIGHT, BIAS = torch.zeros(12, 5, 3, 3), torch.zeros(12)
ARRAYS = numpy.array([2, 2]), torch.tensor([2, 2]), numpy.zeros(0)
FLAG = {TypeError: ("yes", 2, None, 0.0, torch.tensor(True), *ARRAYS)}
CELL = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.1}

# The constructor, attributes and the functional form share these arguments.
OPTIONS = {
    "max_pool": {
        TypeError: (2.0, "2", True, [2, None], {2: 2}, "", {}, *ARRAYS),
        ValueError: (-2, (0, 2), (2, -1), (2, 2, 2)),
    },
    "avg_pool": {TypeError: (1.5, [2, None], "", set(), *ARRAYS), ValueError: ((2, -1), (2, 2, 2))},
    "spike_grad": {TypeError: (3, "atan")},
    "surrogate_disable": FLAG,
    "reset_mechanism": {ValueError: ("both", None, 1, *ARRAYS)},
    "state_quant": {TypeError: (True, 8)},
    "inhibition": FLAG,
    "stride": {TypeError: (1.0, True), ValueError: (0, (0, 1), (1, 1, 1), 2**31)},
    "dilation": {TypeError: (None, "1", [1.0, 1.0]), ValueError: (-1, (1,), (1, 2**40))},
    "batch_first": FLAG,
}
THRESHOLD = {
    TypeError: (
        "0.1", None, True, 1j, torch.tensor(True), QUANTISED, NESTED, STATE.to_sparse(),
    ),
    ValueError: (
        torch.zeros(0), torch.zeros(1, 1, 3, 1, 1), torch.zeros(2, 1, 1), math.nan,
        numpy.float32("nan"), torch.zeros((), device="meta"),
    ),
}  # fmt: skip
CONSTRUCTOR = OPTIONS | {
    "in_channels": {TypeError: (2.0, "2", True), ValueError: (0,)},
    "out_channels": {TypeError: (None,), ValueError: (-1,)},
    "kernel_size": {
        TypeError: (3.0, "3", (3, 3.0)),
        ValueError: ((3,), (3, 3, 3), [], 0, -1, 2, (3, 4), [2, 3]),
    },
    "bias": FLAG,
    "threshold": THRESHOLD,
    "init_hidden": FLAG,
    "learn_threshold": FLAG,
    "output": FLAG,
    "device": {TypeError: (3.5,), ValueError: ("gpu",)},
    "dtype": {TypeError: ("float32",), ValueError: (torch.int32, torch.complex64)},
}
ATTRIBUTES = OPTIONS | {
    "init_hidden": FLAG,
    "output": FLAG,
    "reset_mechanism_val": {ValueError: tuple(map(torch.tensor, (3, -1, [0, 1])))},
    "threshold": {ValueError: (math.nan, numpy.float64("nan"))},
    "syn": {TypeError: (None,)},
    "mem": {TypeError: (0.0,)},
}
# forward and the functional form share these arguments.
CALL = {
    "x": {
        TypeError: (
            [[1.0]], None, X.double(), X.to(torch.complex64), X.to_sparse(), X.to_mkldnn(),
            QUANTISED, NESTED,
        ),
        ValueError: (
            torch.zeros(2, 5, 5), torch.zeros(1, 1, 1, 2, 5, 5), torch.zeros(1, 3, 5, 5),
            torch.zeros(1, 2, 0, 5), torch.zeros(1, 2, 5, 0), torch.zeros(3, 1, 2, 0, 5),
            X.to("meta"),
        ),
    },
    "syn": {
        TypeError: (0, STATE.double(), QUANTISED, NESTED),
        ValueError: (
            torch.ones(1, 3, 5, 4), torch.ones(1, 4, 5, 5), torch.ones(()), STATE.to("meta"),
        ),
    },
    "mem": {
        TypeError: ("zeros", [0.0], STATE.double(), QUANTISED, NESTED),
        ValueError: (torch.ones(2, 3, 5, 5), torch.zeros(3, 5, 5), torch.zeros(0, 4, 5, 5)),
    },
    "record": {TypeError: ("yes", None, 2), ValueError: (True,)},
    "lengths": {ValueError: ([1], 1)},  # of one step; tests/sequences/test_lengths.py has others
}  # fmt: skip
FUNCTIONAL = OPTIONS | CALL | {
    "weight": {
        TypeError: (None, WEIGHT.int()),
        ValueError: (
            torch.zeros(12, 5, 3), torch.zeros(10, 5, 3, 3), torch.zeros(12, 2, 3, 3),
            torch.zeros(0, 5, 3, 3),
        ),
    },
    "kernel_size": {ValueError: (torch.zeros(12, 5, 2, 3),)},  # the value is passed as weight
    "bias": {TypeError: (0, BIAS.double()), ValueError: (torch.zeros(3), BIAS.to("meta"))},
    "threshold": {
        TypeError: (None, "0.1", 1j, torch.tensor(True)),
        ValueError: (
            torch.zeros(2, 1, 1), torch.zeros(4), torch.zeros(1, 1, 3, 1, 1), torch.zeros(0),
            torch.zeros(3, 1, 1, device="meta"),
        ),
    },
    "graded_spikes_factor": {TypeError: (None,), ValueError: (torch.zeros(2, 3),)},
    "max_pool": OPTIONS["max_pool"] | {ValueError: (6, (6, 1), (1, 6), (2, 2, 2))},
}  # fmt: skip


def rows(table):
    return [
        pytest.param(name, value, error, id=f"{name}-{number}")
        for name, errors in table.items()
        for error, values in errors.items()
        for number, value in enumerate(values)
    ]


def refused(name, error, call, *args, **kwargs):
    value = kwargs.get(name)
    came = f"({re.escape(repr(value))}|str)" if isinstance(value, str) else ""
    with pytest.raises(error, match=rf"(?s)\b{name}\b.*got.*{came}"):
        call(*args, **kwargs)


@pytest.mark.parametrize(("name", "value", "error"), rows(CONSTRUCTOR))
def test_the_constructor_refuses(name, value, error):
    random = torch.get_rng_state()
    refused(name, error, snnlstm.SConv2dLSTM, **(CELL | {name: value}))
    assert torch.equal(torch.get_rng_state(), random)


def test_the_tables_have_every_argument():
    assert set(CONSTRUCTOR) == set(inspect.signature(snnlstm.SConv2dLSTM).parameters)
    assert set(FUNCTIONAL) - {"kernel_size"} == set(inspect.signature(sconv2dlstm).parameters)


# Values that a stricter check could take for bad ones.
GOOD = [
    ("kernel_size", torch.Size([3, 5])),
    ("kernel_size", [5, 1]),
    ("bias", 0),
    ("init_hidden", 1),
    ("max_pool", (2,)),
    ("max_pool", (2, 1)),
    ("max_pool", (1, 2)),
    ("avg_pool", [2]),
    ("avg_pool", (6, 3)),  # as large as the image
    ("threshold", 0),
    ("threshold", [[[0.1]], [[0.2]], [[0.3]]]),
    ("state_quant", None),
    ("spike_grad", None),
    ("device", "cpu"),
    ("dtype", torch.bfloat16),
    *((name, off) for name in ("max_pool", "avg_pool") for off in (0, 0.0, None, False, (), [])),
]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=repr)
def test_the_constructor_accepts(name, value):
    cell = snnlstm.SConv2dLSTM(**(CELL | {name: value}))
    spk = cell(torch.zeros(1, 2, 6, 6).to(cell.conv.weight.dtype))
    pool = value if name.endswith("pool") and value else (1,)
    size = 6 // pool[0], 6 // pool[-1]
    assert (spk if cell.init_hidden else spk[0]).shape == (1, 3, *size)


def test_type_hints_of_sizes_have_lists_as_the_page_of_snntorch():
    hints = typing.get_type_hints(snnlstm.SConv2dLSTM.__init__)
    for name in ("kernel_size", "max_pool", "avg_pool", "stride", "dilation"):
        assert list[int] in typing.get_args(hints[name])
        assert int in typing.get_args(hints[name])


def test_numpys_numbers_are_accepted():
    cell = ours(numpy.int64(2), numpy.int32(3), numpy.int64(3), bias=numpy.bool_(False))
    assert cell.conv.bias is None
    cell.threshold = numpy.float32(0.25)
    assert cell.threshold == 0.25
    like_numpy_1 = type("bool_", (), {"__bool__": lambda self: True})
    for value in (numpy.bool_(True), like_numpy_1()):
        cell.inhibition = value
        assert cell.inhibition is True
        cell.inhibition = False


@pytest.mark.parametrize(("name", "value", "error"), rows(ATTRIBUTES))
def test_attributes_refuse(name, value, error):
    cell, x = ours(), steps(1, 1, 2, 5, 5)[0]
    before = getattr(cell, name)
    refused(name, error, setattr, cell, name, value)
    assert getattr(cell, name) is before
    close(cell(x), ours()(x))


@pytest.mark.parametrize(("name", "value", "error"), rows(CALL))
def test_forward_refuses_and_leaves_state_and_weights_as_they_were(name, value, error):
    cell = ours(reset_mechanism="subtract")
    cell(steps(1, 1, 2, 5, 5)[0])
    held = (cell.syn, cell.mem, cell.spk, cell.path)
    copies = [t.detach().clone() for t in held[:3]]
    weights = {key: value.clone() for key, value in cell.state_dict().items()}
    refused(name, error, cell, **({"x": X} | {name: value}))
    assert all(a is b for a, b in zip((cell.syn, cell.mem, cell.spk, cell.path), held, strict=True))
    close([cell.syn, cell.mem, cell.spk], copies, atol=0, rtol=0)
    close(cell.state_dict(), weights, atol=0, rtol=0)


WRONG = {"a number": 3, "dtype": X.double(), "3-D": X[0], "sparse": X.to_sparse(), "C": X[:, :1]}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_errors_call_x_by_the_name_that_it_was_given_by(value):
    for name in "x", "input_":
        with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
            ours()(**{name: value})


@pytest.mark.parametrize(("name", "value", "error"), rows(FUNCTIONAL))
def test_the_functional_form_refuses(name, value, error):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "threshold": 0.1, "stride": 1}
    wrong = {"weight" if name == "kernel_size" else name: value}
    refused(name, error, sconv2dlstm, **(arguments | wrong))


CONVERTED = "bool", "uint8", "uint16", "int64", "float16", "float8_e5m2"


@pytest.mark.parametrize("dtype", CONVERTED)
def test_an_input_that_converts_without_loss_is_converted(backend, dtype):
    x = steps(1, 1, 2, 5, 5)[0]
    cell, reference = ours(), ours()
    close(cell(x.to(getattr(torch, dtype))), reference(x), atol=0, rtol=0)
    backend.check(cell.path)


def test_the_functional_form_is_the_cell_without_its_state(backend):
    options = {"threshold": 0.1, "reset_mechanism": "subtract", "max_pool": [2, 2]}
    cell, x = ours(**options), steps(3, 2, 2, 6, 7)
    parameters = cell.conv.weight, cell.conv.bias
    zeros = torch.zeros(0), torch.zeros(0)
    for state in ((None, None), states(2, 3, 6, 7), zeros):
        start = zeros if state[0] is None else state
        close(sconv2dlstm(x[0], *state, *parameters, **options), cell(x[0], *start))
        recorded = sconv2dlstm(x, *state, *parameters, **options, record=True)
        close(recorded, cell(x, *start, record=True))


def test_a_number_is_read_in_the_dtype_of_x():
    x, (syn, mem) = steps(1, 2, 2, 6, 7)[0].double(), (s.double() for s in states(2, 3, 6, 7))
    given = {"x": x, "syn": syn, "mem": mem, "weight": ours().conv.weight.double()}
    given["reset_mechanism"] = "subtract"
    numbers = {"threshold": 0.1, "graded_spikes_factor": 0.7}
    exact = {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}
    close(sconv2dlstm(**given, **numbers), sconv2dlstm(**given, **exact), atol=0, rtol=0)


def test_an_input_without_channels():
    x, weight = torch.zeros(2, 0, 6, 7), torch.randn(12, 3, 3, 3)
    state = states(2, 3, 6, 7)
    actual = sconv2dlstm(x, *state, weight, threshold=0.1)
    with snnlstm.algorithm("reference"):
        expected = sconv2dlstm(x, *state, weight, threshold=0.1)
    close(actual, expected)
    assert actual[1].any()


def freed(tensor):
    """Frees the storage, as sharded training does with parameters between their uses."""
    tensor.untyped_storage().resize_(0)
    return tensor


def zeros(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


FREED = ("weight", "bias", "threshold", "graded_spikes_factor")
UNREADABLE = {
    "syn, sparse": (lambda s: s.to_sparse(), "must be dense"),
    "mem, sparse": (lambda s: s.to_sparse(), "must be dense"),
    "mem, mkldnn": (lambda s: s.to_mkldnn(), "must be dense"),
    "syn, zeros": (zeros, "must have memory"),
    "mem, zeros": (zeros, "must have memory"),
    "x, freed": (freed, "must have memory"),
    **{f"{name}, freed": (freed, "must have memory") for name in FREED},
}
READS = [*itertools.product(UNREADABLE, ["", "channels_last", "half"])]
READS += [("weight, freed", "half, autocast"), ("bias, freed", "half, autocast")]


@needs_core
@pytest.mark.parametrize("warm", [False, True], ids=["first call", "known call"])
@pytest.mark.parametrize(("case", "how"), READS)
def test_tensors_that_no_kernel_can_read_are_named(case, warm, how):
    name, (change, message) = case.partition(",")[0], UNREADABLE[case]
    # An x of more than two channels is searched for zeros.
    cell, given = ours(5, 3, 3), {"x": torch.ones(1, 5, 5, 5), "syn": STATE, "mem": STATE}
    if how == "channels_last":
        cell.to(memory_format=torch.channels_last)
    elif how:
        cell.bfloat16()
        given = given if "autocast" in how else {k: t.bfloat16() for k, t in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
        if warm:
            cell(**given)
        if name in FREED:
            change(getattr(cell.conv if name in ("weight", "bias") else cell, name))
        else:
            given[name] = change(given[name].clone())
        with pytest.raises((TypeError, ValueError), match=f"{name} {message}"):
            cell(**given)


def signals(*args, **kwargs):
    return snnlstm.SConv1dLSTM(*(args or (2, 3, 5)), **{"threshold": 0.1} | kwargs)


MISFITS = {
    "(1,)": lambda bias: bias[:1],
    "(12, 1)": lambda bias: bias[:, None],
    "torch.float64": lambda bias: bias.double(),
    "one on meta": lambda bias: bias.to("meta"),
}


@pytest.mark.parametrize("got", MISFITS)
@pytest.mark.parametrize("kind", ["SConv2dLSTM", "SConv1dLSTM", "ConvLSTMCell"])
def test_no_call_reads_beyond_a_bias_that_does_not_fit(kind, got):
    cell = quietly(getattr(snnlstm, kind), 2, 3, 3)
    x = X[..., 0] if kind == "SConv1dLSTM" else X
    for _ in range(2):
        cell(x)
    cell.conv.bias = nn.Parameter(MISFITS[got](cell.conv.bias.detach()))
    with pytest.raises((TypeError, ValueError), match=f"bias must .* got .*{re.escape(got)}"):
        cell(x)


def test_autocast_takes_a_bias_of_another_dtype_as_torch_does():
    cell, expected = ours(dtype=torch.bfloat16), ours(dtype=torch.bfloat16)
    cell.conv.bias = nn.Parameter(cell.conv.bias.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        close(cell(X), expected(X), atol=0, rtol=0)


def without_snntorch(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snnlstm.networks.swap, "Base", nn.Module)
        function(*args)


EVENTS, STEP, FILLED = torch.ones(4, 1, 2, 5, 5), torch.ones(1, 2, 5), torch.ones(1, 3, 5, 5)
STACK = functools.partial(snnlstm.ConvLSTM, 2)
WITHOUT = r"needs snntorch, which is not installed or has no SConv2dLSTM: pip install snntorch"
# What other public functions say, by the rule that a message names what came and what is accepted.
SAID = {
    "forward takes x, syn and mem, and others by name": lambda: ours()(X, STATE, STATE, True),
    "forward takes x or input_, which mean the same, got both": lambda: ours()(X, input_=X),
    "max_pool must not be larger than the state, got (6, 6)": lambda: ours(max_pool=6)(X),
    "conv must be a plain nn.Conv2d without hooks where stride is not 1": lambda: normed(2)(X),
    "Wrong overrides _base_sub, which": lambda: type(
        "Wrong", (snnlstm.SConv2dLSTM,), {"_base_sub": None}
    ),
    "reset_mechanism_val must be 0, 1 or 2, got 7": lambda: ours().load_state_dict(
        ours().state_dict() | {"reset_mechanism_val": torch.tensor(7)}
    ),
    "got a function: call it, as in atan()": lambda: ours(spike_grad=surrogate.atan),
    "got a function: call it, as in SFS()": lambda: ours(spike_grad=snntorch.surrogate.SFS),
    "spike_grad must return a tensor, got NoneType": lambda: ours(spike_grad=lambda u: None)(X),
    "got 1: shape (2, 3, 1, 7, 6)": lambda: ours(batch_first=True)(torch.zeros(2, 3, 1, 7, 6)),
    "(N, T, 2, H, W) for a sequence, got (5, 5)": lambda: ours(batch_first=True)(X[0, 0]),
    # surrogates, quantisers, settings
    "alpha of atan must be a number, got '2'": lambda: surrogate.atan("2"),
    "alpha of atan must be finite, got inf": lambda: surrogate.atan(float("inf")),
    "function must be a callable f(x, grad, spk), got 3": lambda: surrogate.custom_surrogate(3),
    "levels must be a floating point tensor, got [0.0]": lambda: StateQuant([0.0]),
    "levels must have shape (n,) with n >= 1, got (0,)": lambda: StateQuant(torch.zeros(0)),
    "levels must be finite, got nan": lambda: StateQuant(torch.tensor([0.0, torch.nan])),
    "num_bits must be an int, got 8.0": lambda: state_quant(8.0),
    "num_bits must lie between 1 and 16, got 17": lambda: state_quant(17),
    "threshold must be a number, got '1'": lambda: state_quant(4, threshold="1"),
    "must leave a range around": lambda: state_quant(4, uniform=False, threshold=0),
    "name must be one of auto, direct": lambda: snnlstm.set_algorithm("fft"),
    # signals
    "kernel_size must be an int or a tuple of one int": lambda: signals(2, 3, (3, 3)),
    "kernel_size must be odd, got 4": lambda: signals(2, 3, 4),
    "threshold must broadcast to mem's shape (N, 3, L), got": lambda: signals(
        threshold=torch.zeros(4, 1)
    ),
    "threshold must broadcast to mem's shape (3, 3, 5), got": lambda: signals(
        threshold=torch.zeros(2, 1, 1)
    )(torch.ones(3, 2, 5)),
    "x must have shape (N, 2, L) for one step or (T, N, 2, L)": lambda: signals()(STEP[0]),
    "x of shape (T, N, Cin, L), got one": lambda: signals()(STEP, record=True),
    "syn must have shape (1, 3, 5)": lambda: signals()(STEP, FILLED),
    "got (6,) for a state of 5": lambda: signals(avg_pool=6)(STEP),
    "x must be a sequence of steps (N, 2, L) for layer 0": lambda: unroll(EVENTS, signals()),
    # the ConvLSTM
    "hidden_dim must have one entry for each of 3 layers": lambda: STACK([3, 4], 3, 3),
    "input_tensor must be a tensor, got str": lambda: STACK(3, 3, 1)("events"),
    "a sequence of a step or more, (T, N, 2, H, W), got": lambda: STACK(3, 3, 1)(EVENTS[:0]),
    "hidden_state must have h and c of 2 layers, got 1": lambda: STACK(3, 3, 2)(EVENTS, [None]),
    "hidden_state[0] must be h and c, (Tensor, Tensor), or None, got 1 items": lambda: STACK(
        3, 3, 1
    )(EVENTS, [STATE]),
    "input_tensor must be one step, (N, 2, H, W), got": lambda: plain_cell()(EVENTS),
    "x must be a plain tensor, got a nested one": lambda: ours()(NESTED),
    "syn must be a plain tensor, got a nested one": lambda: ours()(X, syn=NESTED),
    "mem must be a plain tensor, got a nested one": lambda: ours()(X, mem=NESTED),
    "input_tensor must be a plain tensor, got a nested one": lambda: plain_cell()(NESTED),
    "input_tensor must have 2 channels, got 1": lambda: plain_cell()(X[:, :1]),
    "h of cur_state must have shape (1, 3, 5, 5)": lambda: plain_cell()(X, (FILLED[:, 1:], STATE)),
    "c of cur_state must be torch.float32 like": lambda: plain_cell()(X, (STATE, STATE.double())),
    # stacks
    "net must be an nn.Sequential, got list": lambda: snnlstm.Sequential.of([ours()]),
    "layers must be modules, such as nn.ReLU() instead of torch.relu, got": lambda: unroll(
        EVENTS, torch.relu
    ),
    "a * in front of the list unpacks it, got list": lambda: unroll(EVENTS, [ours()]),
    "x must be a tensor, got list": lambda: snnlstm.Sequential(ours())([X]),
    "(T, N, ...) with at least one step, got (0,": lambda: snnlstm.Sequential(ours())(EVENTS[:0]),
    "(N, 2, H, W) for layer 0.1 (SConv2dLSTM), got steps of shape (1, 50)": lambda: (
        snnlstm.Sequential(nn.Sequential(nn.Flatten(), ours()))(EVENTS)
    ),
    # in the place of snnTorch's cell
    "model must be an nn.Module, got list": lambda: snnlstm.accelerate([]),
    "returns a report: call the model itself": lambda: snnlstm.accelerate(ours())(X),
    "got an unexpected keyword argument 'surrogates'": lambda: snnlstm.accelerate(
        ours(), surrogates=True
    ),
    "net must be an nn.Module, got list": lambda: snnlstm.reset([ours()]),
    f"accelerate() {WITHOUT}": lambda: without_snntorch(snnlstm.accelerate, ours()),
    f"patch() {WITHOUT}": lambda: without_snntorch(snnlstm.patch),
}


def normed(stride):
    cell = ours(stride=stride)
    nn.utils.parametrizations.weight_norm(cell.conv)
    return cell


def plain_cell():
    return snnlstm.ConvLSTMCell(2, 3, 3)


@pytest.mark.parametrize("message", SAID)
def test_errors_name_what_came_and_what_is_accepted(message):
    with pytest.raises(Exception, match=re.escape(message)):
        SAID[message]()


def test_an_algorithm_is_set_for_a_block():
    before = snnlstm.get_algorithm()
    with snnlstm.algorithm("direct"):
        assert snnlstm.get_algorithm() == "direct"
        with pytest.raises(ValueError, match="name"), snnlstm.algorithm("none"):
            pass
        with pytest.raises(KeyError), snnlstm.algorithm("winograd"):
            raise KeyError
        assert snnlstm.get_algorithm() == "direct"
    assert snnlstm.get_algorithm() == before
