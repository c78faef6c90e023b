"""torch's own checks of first and second derivatives, of the functional form in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.two_tensor import TwoTensor

import snnlstm
from snnlstm import surrogate
from snnlstm.calls.call import Call
from snnlstm.calls.spec import make_spec
from snnlstm.functional import sconv2dlstm
from snnlstm.native import operators
from tests.shared.cpu_kernels import needs_core
from tests.shared.helpers import close

pytestmark = needs_core

# Options, and whether the call is one step. Quantisers and some surrogates jump, as no numerical
# derivative does; tests/kernels compares those with the reference.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "step": ({"reset_mechanism": "subtract"}, True),
    "sequence": ({"reset_mechanism": "zero"}, False),
    "recorded": ({"reset_mechanism": "subtract", "record": True}, False),
    "max_pool": ({"max_pool": 2, "reset_mechanism": "subtract"}, False),
    "avg_pool": ({"avg_pool": (2, 1), "spike_grad": surrogate.sigmoid(3)}, False),
    "stride": ({"stride": (2, 1), "dilation": (1, 2)}, False),
    "lengths": ({"lengths": [2, 1], "record": True}, False),
    "no surrogate": ({"surrogate_disable": True}, False),
}


def float64_inputs(options: dict[str, Any], step: bool) -> tuple[Tensor, ...]:
    """Returns x, syn, mem, weight, bias and a threshold for each channel."""
    size = (2, 5) if "stride" in options else (4, 5)
    shapes = ((2, 2, 1, 4, 5)[step:], (2, 2, *size), (2, 2, *size), (8, 3, 3, 3), (8,), (2, 1, 1))
    generator = torch.Generator().manual_seed(1)
    return tuple(
        (torch.randn(shape, generator=generator, dtype=torch.float64) / 3).requires_grad_()
        for shape in shapes
    )


def called(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    *first, threshold = tensors
    return sconv2dlstm(*first, threshold=threshold, **options)


def by_operator(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    lengths, record = options.pop("lengths", None), options.pop("record", False)
    lengths = None if lengths is None else torch.tensor(lengths)
    call = Call(*tensors, tensors[0].new_ones(()), lengths, record)
    return operators.run_operator(call, make_spec((3, 3), **options), "auto")[:3]


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_pass_torchs_checks(name):
    """Output gradients come alone, in batches, and with tangents."""
    options, step = CASES[name]

    run = partial(called, **options)
    tensors = float64_inputs(options, step)
    # Spikes jump where they have a surrogate's gradient, whose own derivative is checked below.
    assert gradcheck(
        lambda *tensors: run(*tensors)[1:], tensors, check_batched_grad=True, fast_mode=True
    )
    spiking = (lambda *t: run(*t)[1:]) if "surrogate_disable" in options else run
    assert gradgradcheck(
        spiking, tensors, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("run", [called, by_operator])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_that_is_wanted_alone_is_as_beside_the_others(name, run):
    """Results that reach no wanted one are constant, but those of frozen weights reach x."""
    options, step = CASES[name]
    tensors = float64_inputs(options, step)
    every = run(*tensors, **options)
    for position in range(len(tensors)):
        alone = [t.detach().requires_grad_(k == position) for k, t in enumerate(tensors)]
        for of_alone, of_every in zip(run(*alone, **options), every, strict=True):
            found = []
            for result, leaf in (of_alone, alone[position]), (of_every, tensors[position]):
                grad = None
                if result.requires_grad:
                    loss = (result * torch.arange(result.numel()).view_as(result)).sum()
                    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
                found.append(torch.zeros_like(leaf) if grad is None else grad)
            close(*found, atol=1e-12, rtol=1e-12)


def test_a_convlstm_passes_torchs_checks():
    cell = snnlstm.ConvLSTMCell(1, 2, 3, dtype=torch.float64)
    x, c, h, *_ = float64_inputs({}, True)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda x, h, c: cell(x, (h, c)), (x, h, c), fast_mode=True)


def test_output_gradients_of_a_subclass_give_gradients_of_the_subclass():
    *first, threshold = float64_inputs({}, False)
    out = sconv2dlstm(*first, threshold=threshold)
    grads = [torch.randn_like(o) for o in out]
    expected = torch.autograd.grad(out, first, grads, retain_graph=True)
    wrapped = torch.autograd.grad(out, first, [TwoTensor(g, 2 * g) for g in grads])
    for actual, exact in zip(wrapped, expected, strict=True):
        close([actual.a, actual.b], [exact, 2 * exact], atol=1e-12, rtol=1e-12)
