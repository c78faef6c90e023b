"""Bad arguments: one table each for the constructor, forward, attributes and functional form.

Each row says the argument, a bad value and the error. The error's text must name the argument,
and what came; state, weights and random numbers must be as before.
"""

import pytest
import torch
from helpers import close, ours, states, steps

import snnlstm
from snnlstm.functional import sconv2dlstm

BAD_FLAGS = ("yes", 2, None, 0.0, torch.tensor(True))

CONSTRUCTOR = [
    ("in_channels", 2.0, TypeError),
    ("in_channels", "2", TypeError),
    ("in_channels", True, TypeError),
    ("in_channels", 0, ValueError),
    ("out_channels", None, TypeError),
    ("out_channels", -1, ValueError),
    ("kernel_size", 3.0, TypeError),
    ("kernel_size", "3", TypeError),
    ("kernel_size", (3, 3.0), TypeError),
    ("kernel_size", (3,), ValueError),
    ("kernel_size", (3, 3, 3), ValueError),
    ("kernel_size", [], ValueError),
    ("kernel_size", 0, ValueError),
    ("kernel_size", -1, ValueError),
    ("kernel_size", 2, ValueError),
    ("kernel_size", (3, 4), ValueError),
    ("max_pool", 2.0, TypeError),
    ("max_pool", "2", TypeError),
    ("max_pool", True, TypeError),
    ("max_pool", -2, ValueError),
    ("max_pool", (0, 2), ValueError),
    ("max_pool", (2, 2, 2), ValueError),
    ("avg_pool", 1.5, TypeError),
    ("avg_pool", [2, None], TypeError),
    ("avg_pool", (2, -1), ValueError),
    ("threshold", "0.1", TypeError),
    ("threshold", None, TypeError),
    ("threshold", True, TypeError),
    ("threshold", 1j, TypeError),
    ("threshold", torch.tensor(True), TypeError),
    ("threshold", torch.zeros(0), ValueError),
    ("threshold", torch.zeros(1, 1, 3, 1, 1), ValueError),
    ("threshold", torch.zeros(2, 1, 1), ValueError),
    ("spike_grad", 3, TypeError),
    ("spike_grad", "atan", TypeError),
    ("reset_mechanism", "both", ValueError),
    ("reset_mechanism", None, ValueError),
    ("reset_mechanism", 1, ValueError),
    ("state_quant", True, TypeError),
    ("state_quant", 8, TypeError),
    ("stride", 1.0, TypeError),
    ("stride", 0, ValueError),
    ("stride", (1, 1, 1), ValueError),
    ("dilation", None, TypeError),
    ("dilation", -1, ValueError),
    ("dilation", (1,), ValueError),
    ("device", 3.5, TypeError),
    ("device", "gpu", ValueError),
    ("dtype", "float32", TypeError),
    ("dtype", torch.int32, ValueError),
    ("dtype", torch.complex64, ValueError),
    *(
        (name, value, TypeError)
        for name in (
            "bias", "surrogate_disable", "init_hidden", "inhibition", "learn_threshold", "output",
            "checkpoint", "batch_first",
        )
        for value in BAD_FLAGS
    ),
]  # fmt: skip


def ident(value):
    return type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)


@pytest.mark.parametrize(("name", "value", "error"), CONSTRUCTOR, ids=ident)
def test_the_constructor_refuses(name, value, error):
    arguments = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.1}
    random = torch.get_rng_state()
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        snnlstm.SConv2dLSTM(**(arguments | {name: value}))
    assert "got" in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random)


def test_the_table_of_the_constructor_has_every_argument():
    import inspect

    names = set(inspect.signature(snnlstm.SConv2dLSTM).parameters)
    assert {name for name, *_ in CONSTRUCTOR} == names


# Values that a stricter check could take for bad ones.
GOOD = [
    ("kernel_size", torch.Size([3, 5])),
    ("bias", 0),
    ("init_hidden", 1),
    ("max_pool", (2,)),
    ("avg_pool", [2]),
    ("threshold", 0),
    ("threshold", [[[0.1]], [[0.2]], [[0.3]]]),
    ("state_quant", None),
    ("spike_grad", None),
    ("device", "cpu"),
    ("dtype", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=ident)
def test_the_constructor_accepts(name, value):
    arguments = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.1}
    cell = snnlstm.SConv2dLSTM(**(arguments | {name: value}))
    cell(torch.zeros(1, 2, 6, 6).to(cell.conv.weight.dtype))


def test_numpys_numbers_are_accepted():
    import numpy

    cell = ours(numpy.int64(2), numpy.int32(3), numpy.int64(3), bias=numpy.bool_(False))
    assert cell.conv.bias is None
    cell.threshold = numpy.float32(0.25)
    assert cell.threshold == 0.25


ATTRIBUTES = [
    ("spike_grad", 3, TypeError),
    ("state_quant", 8, TypeError),
    ("inhibition", "yes", TypeError),
    ("surrogate_disable", None, TypeError),
    ("checkpoint", 3, TypeError),
    ("batch_first", 3, TypeError),
    ("init_hidden", "no", TypeError),
    ("output", None, TypeError),
    ("max_pool", -1, ValueError),
    ("avg_pool", 1.5, TypeError),
    ("stride", 0, ValueError),
    ("dilation", "1", TypeError),
    ("reset_mechanism", "both", ValueError),
    ("reset_mechanism_val", torch.tensor(7), ValueError),
    ("syn", None, TypeError),
    ("mem", 0.0, TypeError),
]


@pytest.mark.parametrize(("name", "value", "error"), ATTRIBUTES, ids=ident)
def test_attributes_refuse(name, value, error):
    cell, x = ours(), steps(1, 1, 2, 5, 5)[0]
    before = getattr(cell, name)
    with pytest.raises(error, match=rf"\b{name}\b"):
        setattr(cell, name, value)
    assert getattr(cell, name) is before
    close(cell(x), ours()(x))


X = torch.zeros(1, 2, 5, 5)
STATE = torch.zeros(1, 3, 5, 5)

FORWARD = [
    ({"x": [[1.0]]}, "x", TypeError),
    ({"x": None}, "x", TypeError),
    ({"x": torch.zeros(2, 5, 5)}, "x", ValueError),
    ({"x": torch.zeros(1, 1, 1, 2, 5, 5)}, "x", ValueError),
    ({"x": torch.zeros(1, 3, 5, 5)}, "x", ValueError),
    ({"x": torch.zeros(1, 2, 0, 5)}, "x", ValueError),
    ({"x": X.double()}, "x", TypeError),
    ({"x": X.to(torch.complex64)}, "x", TypeError),
    ({"x": X.to("meta")}, "x", ValueError),
    ({"x": X, "syn": 0}, "syn", TypeError),
    ({"x": X, "syn": torch.ones(1, 3, 5, 4)}, "syn", ValueError),
    ({"x": X, "syn": STATE.double()}, "syn", TypeError),
    ({"x": X, "syn": STATE.to("meta")}, "syn", ValueError),
    ({"x": X, "syn": STATE, "mem": "zeros"}, "mem", TypeError),
    ({"x": X, "syn": STATE, "mem": torch.ones(2, 3, 5, 5)}, "mem", ValueError),
    ({"x": X, "mem": torch.zeros(0, 4, 5, 5)}, "mem", ValueError),
    ({"x": X, "mem": STATE.double()}, "mem", TypeError),
    ({"x": X, "record": True}, "record", ValueError),
    ({"x": X, "record": "yes"}, "record", TypeError),
    ({"x": X[None], "record": None}, "record", TypeError),
]


@pytest.mark.parametrize(("kwargs", "name", "error"), FORWARD, ids=range(len(FORWARD)))
def test_forward_refuses_and_leaves_state_and_weights_as_they_were(kwargs, name, error):
    cell = ours(reset_mechanism="subtract")
    cell(steps(1, 1, 2, 5, 5)[0])
    held = (cell.syn, cell.mem, cell.spk, cell.path)
    copies = [t.detach().clone() for t in held[:3]]
    weights = {key: value.clone() for key, value in cell.state_dict().items()}
    with pytest.raises(error, match=rf"^{name}\b.*got"):
        cell(**kwargs)
    assert all(a is b for a, b in zip((cell.syn, cell.mem, cell.spk, cell.path), held, strict=True))
    close([cell.syn, cell.mem, cell.spk], copies, atol=0, rtol=0)
    close(dict(cell.state_dict()).values(), weights.values(), atol=0, rtol=0)


def test_forward_refuses_a_pool_larger_than_the_state():
    cell = ours(max_pool=(2, 6))
    with pytest.raises(ValueError, match=r"max_pool .* got \(2, 6\) for a state of 5 x 5"):
        cell(X)


def test_forward_refuses_a_fourth_position():
    with pytest.raises(TypeError, match="record by name"):
        ours()(X[None], STATE, STATE, True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64], ids=str)
def test_an_input_that_converts_without_loss_is_converted(backend, dtype):
    x = steps(1, 1, 2, 5, 5)[0]
    one, other = ours(), ours()
    close(one(x.to(dtype)), other(x), atol=0, rtol=0)
    backend.check(one.path)


WEIGHT, BIAS = torch.zeros(12, 5, 3, 3), torch.zeros(12)

FUNCTIONAL = [
    ("x", None, TypeError),
    ("x", torch.zeros(2, 5, 5), ValueError),
    ("x", X.double(), TypeError),
    ("syn", 1, TypeError),
    ("syn", torch.zeros(1, 3, 4, 5), ValueError),
    ("mem", [0.0], TypeError),
    ("mem", torch.zeros(3, 5, 5), ValueError),
    ("weight", None, TypeError),
    ("weight", torch.zeros(12, 5, 3), ValueError),
    ("weight", torch.zeros(10, 5, 3, 3), ValueError),
    ("weight", torch.zeros(12, 2, 3, 3), ValueError),
    ("weight", torch.zeros(0, 5, 3, 3), ValueError),
    ("weight", torch.zeros(12, 5, 3, 3, dtype=torch.int32), TypeError),
    ("kernel_size", torch.zeros(12, 5, 2, 3), ValueError),  # of weight
    ("bias", 0, TypeError),
    ("bias", torch.zeros(3), ValueError),
    ("bias", BIAS.double(), TypeError),
    ("bias", BIAS.to("meta"), ValueError),
    ("threshold", None, TypeError),
    ("threshold", "0.1", TypeError),
    ("threshold", torch.zeros(2, 1, 1), ValueError),
    ("threshold", torch.zeros(0), ValueError),
    ("threshold", torch.zeros(3, 1, 1, device="meta"), ValueError),
    ("spike_grad", 1, TypeError),
    ("surrogate_disable", "no", TypeError),
    ("reset_mechanism", "sub", ValueError),
    ("max_pool", 1.5, TypeError),
    ("max_pool", {2: 2}, TypeError),
    ("max_pool", 6, ValueError),
    ("avg_pool", (2, 2, 2), ValueError),
    ("state_quant", 8, TypeError),
    ("graded_spikes_factor", None, TypeError),
    ("graded_spikes_factor", torch.zeros(2, 3), ValueError),
    ("inhibition", "yes", TypeError),
    ("stride", True, TypeError),
    ("stride", (0, 1), ValueError),
    ("dilation", [1.0, 1.0], TypeError),
    ("record", True, ValueError),
    ("record", 2, TypeError),
    ("checkpoint", "no", TypeError),
    ("batch_first", "no", TypeError),
]


@pytest.mark.parametrize("function", [sconv2dlstm, snnlstm.reference.sconv2dlstm])
@pytest.mark.parametrize(("name", "value", "error"), FUNCTIONAL, ids=ident)
def test_the_functional_form_refuses(function, name, value, error):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "threshold": 0.1, "stride": 1}
    wrong = {"weight" if name == "kernel_size" else name: value}
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        function(**(arguments | wrong))
    assert "got" in str(caught.value)


def test_the_table_of_the_functional_form_has_every_argument():
    import inspect

    names = set(inspect.signature(sconv2dlstm).parameters)
    assert {name for name, *_ in FUNCTIONAL} - {"kernel_size"} == names


def test_the_functional_form_is_the_cell_without_its_state(backend):
    cell = ours(reset_mechanism="subtract", max_pool=2, threshold=0.1)
    weight, bias = cell.conv.weight, cell.conv.bias
    x, (syn, mem) = steps(3, 2, 2, 6, 7), states(2, 3, 6, 7)
    kwargs = {"threshold": 0.1, "reset_mechanism": "subtract", "max_pool": [2, 2]}
    for state in ((None, None), (syn, mem), (torch.zeros(0), torch.zeros(0))):
        start = (torch.zeros(0), torch.zeros(0)) if state[0] is None else state
        for function in (sconv2dlstm, snnlstm.reference.sconv2dlstm):
            close(function(x[0], *state, weight, bias, **kwargs), cell(x[0], *start))
            recorded = function(x, *state, weight, bias, **kwargs, record=True)
            close(recorded, cell(x, *start, record=True))


def test_set_algorithm_takes_known_names_only():
    names = "auto, direct, winograd, fused, resident, hybrid, pointwise, measure"
    with pytest.raises(ValueError, match=f"name must be one of {names}, got 'fft'"):
        snnlstm.set_algorithm("fft")
    before = snnlstm.settings.get_algorithm()
    with snnlstm.algorithm("direct"):
        assert snnlstm.settings.get_algorithm() == "direct"
        with pytest.raises(ValueError, match="name"), snnlstm.algorithm("none"):
            pass
        with pytest.raises(KeyError), snnlstm.algorithm("winograd"):
            raise KeyError
        assert snnlstm.settings.get_algorithm() == "direct"
    assert snnlstm.settings.get_algorithm() == before
