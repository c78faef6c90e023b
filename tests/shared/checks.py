"""Checks the results of a call of the kernels, and its gradients, by the float64 reference.

Both checks run the kernels on poisoned and fenced memory (poison.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.shared import flat
from tests.shared.cases import Case, Inputs, wanting_gradients
from tests.shared.cpu_kernels import Kernels, one_thread
from tests.shared.gradients import (
    NAMES,
    OUTPUTS,
    agrees,
    exact_or_undecided,
    gradients,
    gradients_for,
)
from tests.shared.helpers import same
from tests.shared.oracle import check_steps
from tests.shared.poison import HUGE, NAN, poisoned


def infer(
    kernels: Kernels, case: Case, inputs: Inputs, pattern: int = NAN
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs inference on poisoned memory."""
    with torch.no_grad(), poisoned(pattern) as fenced:
        out = kernels.run(*inputs, case.options)
    fewest = 4 if case.options.spiking else 3  # a step without spikes has no spk
    assert len(fenced.blocks) >= fewest, "the poison does not reach spk, syn, mem and the workspace"
    return out


def check_results(case: Case, kernels: Kernels) -> None:
    """Judges a forward call that records states; other forms must be bitwise equal."""
    inputs, recorded = case.inputs(), case.recorded()
    before = [None if t is None else t.clone() for t in inputs]
    out = infer(kernels, recorded, inputs)
    assert tuple(tensor.shape for tensor in out) == recorded.output_shapes
    assert {tensor.dtype for tensor in out} == {case.dtype}
    with one_thread():
        check_steps(recorded, inputs, out, kernels.state_error(case.dtype))

    last = out
    if case.options.sequence and not case.options.record:
        last = (out[0], out[1][-1], out[2][-1])
    same(infer(kernels, case, inputs, HUGE), last)
    with poisoned(HUGE):
        trained = kernels.run(*wanting_gradients(inputs), case.options)
    same(trained, last)
    for tensor, kept in zip(inputs, before, strict=True):
        assert tensor is None or torch.equal(tensor.isnan(), kept.isnan())
        assert tensor is None or torch.equal(tensor.nan_to_num(), kept.nan_to_num())


def check_gradients(
    kernels: Kernels,
    case: Case,
    outputs: Sequence[str] = OUTPUTS,
    wanted: Sequence[str] = NAMES,
    pattern: int = NAN,
    ask: Callable[..., Sequence[Tensor]] = torch.autograd.grad,
) -> bool:
    """Compares one case; returns False if it differs because the runs made different decisions."""
    inputs, grads = case.inputs(), gradients_for(case, outputs)
    with poisoned(pattern):
        actual = gradients(kernels.run, inputs, case.options, grads, wanted, ask=ask)
    with one_thread():
        exact = gradients(flat.reference, inputs.double(), case.options, grads, wanted)
    for name, leaf in zip(NAMES, inputs, strict=False):
        assert name not in actual or actual[name].shape == leaf.shape
    with one_thread():
        error = kernels.gradient_error(case.dtype)
        return exact_or_undecided(
            actual, exact, error, grads, lambda: agrees(kernels.run, case, inputs)
        )
