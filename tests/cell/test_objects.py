"""All that is public can be copied, pickled, saved and printed, also when it is in use."""

import copy
import io
import itertools
import pickle
from functools import partial

import pytest
import snntorch
import torch
from snntorch.functional.quant import state_quant as theirs_quant
from torch import nn

import snnlstm
from snnlstm import surrogate
from snnlstm.quant import StateQuant, state_quant
from tests.shared.helpers import flat, ours, same, steps, theirs

OPTIONS = {
    "spike_grad": surrogate.fast_sigmoid(5), "state_quant": state_quant(3), "dilation": 2,
    "reset_mechanism": "zero", "batch_first": True, "output": True,
}  # fmt: skip
# snnTorch's closures cannot be pickled; ours take their places in a copy.
OF_SNNTORCH = {
    "default": {},
    "closures": {"spike_grad": snntorch.surrogate.fast_sigmoid(7), "state_quant": theirs_quant(4)},
    "no surrogate": {"surrogate_disable": True, "reset_mechanism": "none"},
}


def leaky(options, library=snntorch):
    layer = library.Leaky(0.8, threshold=0.3, learn_beta=True, **options)
    return layer if library is snnlstm else snnlstm.accelerate(layer).model


# A function that makes each object, and the shape of an input.
MODULES = {
    "cell": (lambda: ours(**OPTIONS), (1, 2, 5, 6)),
    "signals": (lambda: snnlstm.SConv1dLSTM(2, 3, 5, threshold=0.1, stride=(2,)), (1, 2, 9)),
    "accelerated": (lambda: snnlstm.accelerate(theirs()).model, (1, 2, 5, 6)),
    "Leaky": (lambda: leaky({"init_hidden": True}, snnlstm), (1, 9)),
    **{
        f"accelerated Leaky, {name}": (partial(leaky, options), (3, 5))
        for name, options in OF_SNNTORCH.items()
    },
    "ConvLSTMCell": (lambda: snnlstm.ConvLSTMCell(2, 3, 3, stride=2), (1, 2, 5, 6)),
    "ConvLSTM": (lambda: snnlstm.ConvLSTM(2, [3, 4], 3, 2, True, stride=2), (1, 3, 2, 5, 6)),
    "Sequential": (
        lambda: snnlstm.Sequential(ours(init_hidden=True), nn.Flatten(), batch_first=True),
        (1, 3, 2, 5, 6),
    ),
}
VALUES = [
    *(getattr(surrogate, kind.name)() for kind in surrogate.KINDS[1:]),
    surrogate.SFS(slope=5, B=0.125), surrogate.NONE, state_quant(4),
    StateQuant(torch.tensor([1.0, -0.5], dtype=torch.float64)),
]  # fmt: skip


def saved(one):
    torch.save(one, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "save": saved,
}


# A shallow copy of a Sequential has the same cells, and so the same states.
@pytest.mark.parametrize(
    ("name", "how"), sorted({*itertools.product(MODULES, COPIES)} - {("Sequential", "copy")})
)
def test_a_copy_of_a_module_in_use_goes_on_as_it_does(name, how):
    make, shape = MODULES[name]
    module, x = make(), steps(2, *shape)
    module(x[0])  # in grad mode, with a state whose history can be neither copied nor kept
    copied = COPIES[how](module)
    assert repr(copied) == repr(module)
    assert all(type(one) is type(other) for one, other in
               zip(copied.modules(), module.modules(), strict=True))  # fmt: skip
    expected = flat(module(x[1]))
    same(flat(copied(x[1])), expected)
    sum(out.sum() for out in flat(copied(x[1]))).backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_a_pickle_of_a_module_in_use_says_nothing_of_how_it_ran(name, compiled):
    """Older versions can read it, whose classes of paths differ."""
    make, shape = MODULES[name]
    module, (x,) = make(), steps(1, *shape)
    (torch.compile(module, backend="eager") if compiled else module)(x)
    assert b"snnlstm.dispatch" not in pickle.dumps(module)
    for one in copy.deepcopy(module).modules():
        assert getattr(one, "path", None) is getattr(one, "report", None) is None


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_cell_has_a_state_of_its_own(how):
    cell = ours(**OPTIONS)
    cell(steps(1, 1, 2, 5, 6)[0])
    copied = COPIES[how](cell)
    assert copied.spk is None
    assert not copied.mem.requires_grad
    assert copied.spike_grad == cell.spike_grad
    copied.reset_mem()
    assert cell.mem.any()
    copied(steps(1, 1, 2, 5, 6)[0])
    snnlstm.SConv2dLSTM.reset_hidden()  # the class knows the copy
    assert not copied.mem.any()


def test_a_replica_of_data_parallel_goes_on_from_the_modules_state():
    """As in snnTorch, states do not come back from replicas: each call starts from one state."""
    for cell, state in ((ours(), ()), (snnlstm.ConvLSTMCell(2, 3, 3), (None,))):
        x = steps(2, 2, 2, 6, 6)
        cell(x[0], *state)
        before, expected = getattr(cell, "mem", None), copy.deepcopy(cell)(x[1], *state)
        replica = cell._replicate_for_data_parallel()
        replica._parameters, replica._buffers = dict(cell._parameters), dict(cell._buffers)
        replica._modules = dict(cell._modules)
        same(replica(x[1], *state), expected)
        assert getattr(cell, "mem", None) is before


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_are_equal_to_their_copies_and_cannot_be_changed(value):
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
    assert len({value, copy.deepcopy(value)}) == 1
    assert sum(value == other for other in VALUES) == 1
    if isinstance(value, surrogate.Surrogate):
        assert value is surrogate.NONE or eval(repr(value), vars(surrogate)) == value
        with pytest.raises(AttributeError):
            value.p0 = 3.0


def test_reprs_name_what_is_not_a_default():
    cell = snnlstm.SConv2dLSTM(2, 3, 3, threshold=0.1, batch_first=True)
    expected = "2, 3, kernel_size=3, batch_first=True, threshold=0.1"
    assert cell.extra_repr() == expected
    signals = snnlstm.SConv1dLSTM(2, 3, 5, threshold=0.05, stride=(2,), max_pool=2)
    assert repr(signals).startswith("SConv1dLSTM(\n  2, 3, kernel_size=5, max_pool=2, stride=(2,)")
    assert "stride=(2, 2)" in repr(snnlstm.ConvLSTM(2, 3, 3, 1, stride=2))
    assert repr(state_quant(4)) == "StateQuant(16 levels, -1 to 1.2)"
