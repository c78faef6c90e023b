"""Custom autograd Functions in loops: results, first and second derivatives, and what is kept."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from snnlstm.loops import backend, rules
from tests.loops.compiled import BACKEND, merges, numbers
from tests.shared.helpers import close

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Saving(Function):
    """Saves x and its result; alpha and a tensor are attributes of ctx."""

    @staticmethod
    def forward(ctx, x, alpha):
        result = x.exp()
        ctx.save_for_backward(x, result)
        ctx.alpha, ctx.positive = alpha, x > 0
        return result

    @staticmethod
    def backward(ctx, grad):
        x, result = ctx.saved_tensors
        return grad * result * x * ctx.alpha * ctx.positive, None


class Attributes(Function):
    """Keeps x, its result and a tensor between them as attributes."""

    @staticmethod
    def forward(ctx, x):
        ctx.x, ctx.between, ctx.result = x, x * 2, x.exp()
        return ctx.result

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.x * ctx.between * ctx.result


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
    """Calls another Function in forward, and writes to a tensor of its own in backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return Saving.apply(x, 2.0) * 2

    @staticmethod
    def backward(ctx, grad):
        own = grad.clone()
        own[ctx.saved_tensors[0] < 0] *= 0.5
        return own * ctx.saved_tensors[0].sin()


quiet = torch.no_grad


class Modes(Function):
    """Turns gradients off and on in its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with quiet():
            square = x * x
            with torch.enable_grad():
                again = x * 0.5
        return grad * 3 * square * x + again


class Once(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


class Inner(Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return grad * x.cos()

    @staticmethod
    def backward(ctx, grad):
        return grad * 3, grad * ctx.saved_tensors[0]


class Outer(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return Inner.apply(grad, ctx.saved_tensors[0])


# The functions of a step, (4,).
STEPS: dict[str, Callable[[Tensor], Any]] = {
    "saved": lambda x: Saving.apply(x, 3.0),
    "attributes": Attributes.apply,
    "itself": Itself.apply,
    "non-differentiable": Marked.apply,
    "in place": lambda x: InPlace.apply(x * 1),
    "setup_context": lambda x: Separate.apply(x, x * 2),
    "random": Drawing.apply,
    "of another": Calling.apply,
}


def looped(step: Callable[[Tensor], Any], steps: int = 3) -> Callable[[Tensor], list[Tensor]]:
    """Returns a loop over steps, whose results are all results of all steps."""

    def loop(x: Tensor) -> list[Tensor]:
        results: list[Tensor] = []
        for t in range(steps):
            out = step(x * (t + 1))
            results += [out] if isinstance(out, Tensor) else out
        return results

    return loop


def derivatives(function: Callable[[Tensor], Any]) -> list[Any]:
    """Returns results, which of them require gradients, and gradients of two orders, or errors."""
    torch.manual_seed(0)
    x = torch.tensor([0.5, -0.25, 1.25, -2.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 0.25, -0.5], dtype=torch.float64, requires_grad=True)
    results = function(x * weight)
    wanted = [out for out in results if out.requires_grad]
    found: list[Any] = [*results, torch.tensor([out.requires_grad for out in results])]
    for create_graph in (False, True):
        loss = sum(out.square().sum() for out in wanted)
        grads = torch.autograd.grad(loss, (x, weight), create_graph=create_graph, retain_graph=True)
        found += grads
    try:
        found += torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, weight))
    except RuntimeError as error:
        found.append(str(error))
    return [*found, torch.rand(3)]


@pytest.mark.parametrize("name", STEPS)
def test_results_and_derivatives(name):
    """torch alone has other second derivatives: it turns gradients off in all of backward."""
    eager = derivatives(looped(STEPS[name]))
    compiled = torch.compile(looped(STEPS[name]), backend=BACKEND, fullgraph=True)
    for one, other in zip(derivatives(compiled), eager, strict=True):
        close(one, other, atol=0, rtol=1e-12)


class Lambda(Saving):
    """Has a lambda, a generator expression and a comprehension in its backward."""

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        factor = (lambda y: y.cos() * ctx.alpha)(x)
        total = sum(factor * x**k for k in range(2))
        return grad * sum([total * k for k in (1, 2)]), None


class Quiet(Saving):
    """Has a lambda that runs without gradients."""

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        with torch.no_grad():
            factor = (lambda y: y.cos())(x)
        return grad * factor * x, None


@merges
def test_second_derivatives_behind_functions_without_a_name():
    def step(x):
        return Lambda.apply(x, 2.0)

    compiled = torch.compile(looped(step), backend=BACKEND, fullgraph=True)
    for one, other in zip(derivatives(compiled), derivatives(looped(step)), strict=True):
        close(one, other, atol=0, rtol=1e-12)
    *_, error, _ = derivatives(
        torch.compile(looped(lambda x: Quiet.apply(x, 1.0)), backend=BACKEND)
    )
    assert "has not recorded the second derivative" in error


@merges
@pytest.mark.parametrize("kind", [Modes, Once, Outer])
def test_a_second_derivative_that_is_not_recorded_raises(kind):
    """dynamo records neither a user's grad modes nor the inner Function's backward."""
    *first, error, _ = derivatives(torch.compile(looped(kind.apply), backend=BACKEND))
    assert "has not recorded the second derivative" in error
    for one, other in zip(first, derivatives(looped(kind.apply)), strict=False):
        close(one, other, atol=0, rtol=1e-12)


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

    def twice(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)

    x = numbers(4)
    for function in (torch.func.grad(loss), twice):
        outs = [f(x) for f in (torch.compile(function, backend=BACKEND, fullgraph=True), function)]
        close(*outs, atol=0, rtol=1e-6)
        close(*(torch.autograd.grad(out.sum(), weight) for out in outs), atol=0, rtol=1e-6)
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


class Recurrent(nn.Module):
    """Has a neuron of snnTorch's, whose surrogate is a Function, and a Linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid()
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)
        self.lif = snn.RLeaky(0.9, linear_features=5, spike_grad=grad)

    def forward(self, x: Tensor) -> Tensor:
        (spk, mem), out = self.lif.reset_mem(), []
        for x_t in x:
            spk, mem = self.lif(self.fc1(x_t), spk, mem)
            out.append(self.fc2(spk))
        return torch.stack(out)


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


@merges
def test_an_inner_backend_gets_the_functions_as_they_are(monkeypatch):
    graphs = []
    monkeypatch.setattr(
        backend, "backend_of", lambda name: lambda gm, _: graphs.append(gm) or gm.forward
    )
    torch.compile(Recurrent(), backend=BACKEND, options={"inner": "any"})(numbers(4, 3, 6))
    assert [node.target for node in graphs[-1].graph.nodes].count(rules.APPLY) == 7
