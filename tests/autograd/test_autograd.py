"""The kernels keep autograd's rules about edited tensors and those of inference mode."""

import pytest
import torch

from tests.shared import flat
from tests.shared.cases import PLAIN, Inputs, wanting_gradients
from tests.shared.cpu_kernels import native
from tests.shared.gradients import OUTPUTS, leaves_and_gradients, total
from tests.shared.helpers import ours, same, steps

pytestmark = pytest.mark.skipif(native is None, reason="the core is not built")


@pytest.mark.parametrize("name", ["x", "syn", "mem", "weight"])
def test_editing_an_input_in_place_is_noticed(name):
    # The call gets clones, because torch lets nobody edit leaves that require a gradient.
    held = Inputs(*(None if t is None else t.clone() for t in wanting_gradients(PLAIN.inputs())))
    out = flat.run(*held, PLAIN.options)
    with torch.no_grad():
        getattr(held, name).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[2].sum().backward()


@pytest.mark.parametrize("name", OUTPUTS)
def test_editing_an_output_in_place_gives_right_gradients(name):
    """An edit of a returned tensor enters the graph as the same operation out of place does."""
    for case in (PLAIN, PLAIN.but(sequence=False, record=False), PLAIN.but(record=False)):
        inputs, grads = leaves_and_gradients(case)
        outcomes = []
        for in_place in (True, False):
            out = dict(zip(OUTPUTS, flat.run(*inputs, case.options), strict=True))
            if in_place:
                out[name].mul_(3).add_(1)
            else:
                out[name] = out[name] * 3 + 1
            outcomes.append(torch.autograd.grad(total(tuple(out.values()), grads), inputs[:6]))
        same(*outcomes)


@pytest.mark.parametrize("time", [1, 3])
def test_an_input_made_in_inference_mode_may_be_trained_on(time):
    """snnTorch's cell copies x with `cat`, so that a frozen encoder may run in inference mode."""
    found = []
    for mode in (False, True):
        cell = ours()
        with torch.inference_mode(mode):
            x = steps(time, 2, 2, 6, 7) * 1
        for one in (x, x[0]):
            cell(one)[2].sum().backward()
            cell.reset_mem()
        assert cell.path.native
        found.append([p.grad for p in cell.parameters()])
    same(*found)
