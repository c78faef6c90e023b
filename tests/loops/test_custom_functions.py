"""Custom autograd Functions in loops: results, gradients, and what is kept."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from tests.loops.compiled import BACKEND, merges, numbers
from tests.loops.networks import Recurrent
from tests.shared.helpers import close

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Saving(Function):
    """Saves x and its result; the result, a number and a tensor are attributes of ctx."""

    @staticmethod
    def forward(ctx, x, alpha):
        result = x.exp()
        ctx.save_for_backward(x, result)
        ctx.alpha, ctx.positive, ctx.result = alpha, x > 0, result
        return result

    @staticmethod
    def backward(ctx, grad):
        x, result = ctx.saved_tensors
        with torch.no_grad():
            factor = x * ctx.alpha * ctx.positive
        return grad * result * ctx.result * factor, None


class Itself(Function):
    """Returns x itself, and saves what may be x itself."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.contiguous())
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0]


class Marked(Function):
    """Has results without gradients, whose gradients are zeros in its backward."""

    @staticmethod
    def forward(ctx, x):
        positive, tripled = (x > 0).to(x.dtype), x * 3
        ctx.mark_non_differentiable(positive, tripled)
        ctx.save_for_backward(x, tripled)
        return x * x, positive, tripled

    @staticmethod
    def backward(ctx, grad, zeros, others):
        x, tripled = ctx.saved_tensors
        return grad * 2 * x * tripled + zeros + others


class InPlace(Function):
    """Modifies its argument."""

    @staticmethod
    def forward(ctx, x):
        x.mul_(2)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0]


class Separate(Function):
    """Has a setup_context, which computes what is saved."""

    @staticmethod
    def forward(x, y):
        return x * y, x + y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.smooth = torch.sigmoid(inputs[0])

    @staticmethod
    def backward(ctx, grad, other):
        x, y, total = ctx.saved_tensors
        return grad * y * total + other * ctx.smooth, grad * x * total


class Drawing(Function):
    """Draws numbers in both directions."""

    @staticmethod
    def forward(ctx, x):
        kept = torch.rand_like(x)
        ctx.save_for_backward(kept, x)
        return x * kept

    @staticmethod
    def backward(ctx, grad):
        kept, x = ctx.saved_tensors
        return grad * kept * torch.rand_like(grad) * x


class Calling(Function):
    """Calls another Function in both passes, and writes to a tensor of its own in backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Saving.apply(x, 2.0) * 2

    @staticmethod
    def backward(ctx, grad):
        own = grad.clone()
        own[ctx.saved_tensors[0] < 0] *= 0.5
        return own * Saving.apply(ctx.saved_tensors[0], 0.5)


# The functions of a step, (4,).
STEPS: dict[str, Callable[[Tensor], Any]] = {
    "saved": lambda x: Saving.apply(x, 3.0),
    "itself": Itself.apply,
    "non-differentiable": Marked.apply,
    "in place": lambda x: InPlace.apply(x * 1),
    "setup_context": lambda x: Separate.apply(x, x * 2),
    "random": Drawing.apply,
    "of another": Calling.apply,
}


def looped(step: Callable[[Tensor], Any]) -> Callable[[Tensor], list[Tensor]]:
    """Returns a loop over three steps, whose results are all results of all steps."""

    def loop(x: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for t in range(3):
            out = step(x * (t + 1))
            results += [out] if isinstance(out, Tensor) else out
        return results

    return loop


def gradients(function: Callable[[Tensor], Any], **options: Any) -> tuple[list[Tensor], list[Any]]:
    """Returns two leaves, and results, which of them require gradients, and the gradients."""
    torch.manual_seed(0)
    x = torch.tensor([0.5, -0.25, 1.25, -2.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 0.25, -0.5], dtype=torch.float64, requires_grad=True)
    results = function(x * weight)
    loss = sum(out.square().sum() for out in results if out.requires_grad)
    flags = torch.tensor([out.requires_grad for out in results])
    grads = torch.autograd.grad(loss, (x, weight), **options)
    return [x, weight], [*results, flags, torch.rand(3), *grads]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_results_and_gradients(name, twice):
    """A second derivative is refused by a message whose advice helps."""
    loop = looped(STEPS[name])
    compiled = torch.compile(loop, backend=BACKEND, fullgraph=True)
    leaves, found = gradients(compiled, create_graph=twice)
    _, expected = gradients(loop, create_graph=twice)
    for one, other in zip(found, expected, strict=True):
        close(one, other, atol=0, rtol=1e-12)
    if twice and BACKEND == "snnlstm":
        with pytest.raises(RuntimeError, match=r"no second derivative.*set_stance\(\"force_eager"):
            torch.autograd.grad(found[-1].sum(), leaves)
        with torch.compiler.set_stance("force_eager"):
            leaves, found = gradients(compiled, create_graph=True)
        assert all(grad.any() for grad in torch.autograd.grad(found[-1].sum(), leaves))


def test_sizes_that_change_are_arguments():
    step = torch.compile(looped(STEPS["saved"]), backend=BACKEND, dynamic=True)
    for size in (3, 5):
        x = numbers(size).requires_grad_()
        grads = [torch.autograd.grad(f(x)[-1].sum(), x) for f in (step, looped(STEPS["saved"]))]
        close(*grads, atol=0)


@merges
def test_transforms_of_torch_func():
    """dynamo records a Function within a transform if a parameter requires a gradient."""
    weight = torch.tensor(0.5, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return sum(out.square().sum() for out in looped(lambda x: Separate.apply(x, weight))(x))

    x, grad = numbers(4), torch.func.grad(loss)
    out = torch.compile(grad, backend=BACKEND, fullgraph=True)(x)
    close(out, grad(x), atol=0, rtol=1e-6)
    with pytest.raises(RuntimeError, match="no second derivative"):
        out.sum().backward()
    drawing = torch.func.grad(lambda x: Drawing.apply(x * weight).sum())
    try:
        with pytest.raises(RuntimeError, match=r"torch\.func.*draws random numbers"):
            torch.compile(drawing, backend=BACKEND)(x)
    finally:  # code that dynamo compiles leaves a transform open where an error ends it
        torch._C._autograd._saved_tensors_hooks_enable()
        while torch._C._functorch.peek_interpreter_stack() is not None:
            torch._C._functorch._grad_decrement_nesting()


@merges
def test_a_saved_tensor_that_is_modified_raises():
    step = torch.compile(lambda x: (Saving.apply(x, 3.0), x), backend=BACKEND)
    x = numbers(4).requires_grad_()
    out, _ = step(x)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@merges
def test_training_leaves_nothing_to_the_garbage_collector():
    """torch alone leaves a class for each call, with all that it has saved."""
    net = torch.compile(Recurrent(), backend=BACKEND)

    def train():
        net.zero_grad()
        net(numbers(4, 3, 6)).sum().backward()

    for _ in range(3):
        train()
    gc.disable()
    try:
        while gc.collect():  # what compiling left
            pass
        for _ in range(3):
            train()
        assert gc.collect() == 0
    finally:
        gc.enable()
