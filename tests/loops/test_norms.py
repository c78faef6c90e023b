"""Batch norm in a compiled loop: all steps in one call, or as part of a convolution."""

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnlstm
from tests.loops.compiled import BACKEND, as_eager, dyadic_, equal, merges, numbers, outcome
from tests.loops.networks import exact_leaky
from tests.loops.parts import MODES, N, T, expect

CLOSE = {"atol": 1e-9, "rtol": 1e-9}
IN_EVALUATION = pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])


class Normed(nn.Module):
    """Has the layers that the loops below call; x is (T, N, 2, 5, 5)."""

    def __init__(self, forward: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
        )
        self.bn1, self.bn2 = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
        self.lif1, self.lif2 = exact_leaky(), exact_leaky(init_hidden=True)
        self.loop = forward

    def forward(self, x: Tensor) -> Any:
        self.lif2.reset_mem()
        return self.loop(self, x)


def check(forward: Any, training: bool = True, evaluated: bool = False, **options: Any) -> Any:
    """Compares a loop with eager's, in float64, and returns its calls."""
    given = {
        key: options.pop(key) for key in [*options] if key in ("affine", "track_running_stats")
    }

    def make() -> nn.Module:
        net = dyadic_(Normed(forward, **given))
        snnlstm.accelerate(net)
        for k, norm in enumerate((net.bn1, net.bn2)):
            norm.eps = 0.01 + k
        return net.double().train(not evaluated)

    x = numbers(T, N, 2, 5, 5).double()
    return as_eager(make, x, training=training, **CLOSE, **options)


def plain(net: Any, x: Tensor) -> Any:
    return torch.stack([net.lif2(net.bn2(net.conv2(net.bn1(net.conv1(x_t))))) for x_t in x])


def shared(net: Any, x: Tensor) -> Any:
    """Calls one norm at two places of a step."""
    return [net.lif2(net.bn1(net.conv2(net.bn1(net.conv1(x_t))))) for x_t in x]


def fed_back(net: Any, x: Tensor) -> Any:
    """Normalises what depends on the last result of the norm, and what is that result itself."""
    back, again, out = x.new_zeros(N, 4, 5, 5), net.conv1(x[0]), []
    for x_t in x:
        back = net.bn1(net.conv1(x_t) + back)
        again = net.bn2(again)
        out += [back, again]
    return out


def read_between(net: Any, x: Tensor) -> Any:
    """Reads the running statistics of a norm in each step, but none of its results."""
    out = []
    for x_t in x:
        net.bn1(net.conv1(x_t))
        out += [net.lif2(net.bn2(net.conv1(x_t))), net.bn1.running_mean * 2]
    return out


def unread(net: Any, x: Tensor) -> Any:
    """Reads of one norm neither results nor statistics, but these change."""
    out = []
    for x_t in x:
        net.bn1(net.conv1(x_t))
        out.append(net.lif2(net.bn2(net.conv1(x_t))))
    return out


def read_too(net: Any, x: Tensor) -> Any:
    """Reads what is normalised, too."""
    currents = [net.conv1(x_t) for x_t in x]
    return [(net.lif2(net.bn1(cur)), cur) for cur in currents]


def read_beside(net: Any, x: Tensor) -> Any:
    """Adds to what is also returned, and to what another sum reads."""
    out = []
    for x_t in x:
        cur, other = net.bn1(net.conv1(x_t)), net.bn2(net.conv2(net.conv1(x_t)))
        out += [cur + other, other + 0.5 * cur, cur]
    return out


def by_name(net: Any, x: Tensor) -> Any:
    """Calls the function, in a momentum of its own, with and without statistics."""
    mean, var, out = net.bn1.running_mean, net.bn1.running_var, []
    for x_t in x:
        cur = F.batch_norm(net.conv1(x_t), mean, var, training=True, momentum=0.5)
        out.append(F.batch_norm(cur, None, None, weight=net.bn2.weight, training=True))
    return out


def of_two_norms(net: Any, x: Tensor) -> Any:
    """Normalises a convolution of odd steps by another norm."""
    return [(net.bn2 if t % 2 else net.bn1)(net.conv1(x_t)) for t, x_t in enumerate(x)]


def changed_inside(net: Any, x: Tensor) -> Any:
    out = []
    for x_t in x:
        out.append(net.bn1(net.conv1(x_t)))
        net.bn1.running_mean.add_(1)
    return out


def summed(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    """A view of the second sum is read, too."""
    mem, out = net.lif1.reset_mem(), []
    for x_t in x:
        spk, mem = net.lif1(add(net.bn1(net.conv1(x_t)), 0.25 * x_t[:, :1]), mem)
        cur = add(net.bn2(net.conv2(spk)), spk)
        out += [net.lif2(cur), cur[:, 0]]
    return out, mem


def of_last(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    """Adds the last result to what is known of all steps, and to what is not."""
    back, out = x.new_zeros(N, 4, 5, 5), []
    for x_t in x:
        back = add(net.bn2(net.conv2(add(net.bn1(net.conv1(x_t)), back))), x_t[:, :1])
        out.append(net.lif2(back))
    return out


def of_one(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    """In evaluation one tensor is what all steps add to."""
    back, out = x.new_zeros(N, 4, 5, 5), []
    for _ in x:
        back = add(net.bn1(net.conv1(x[0])), back)
        out.append(net.lif2(back))
    return out


def not_recorded(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    """What is added has no gradient, but its sum has."""
    currents = [net.bn1(net.conv1(x_t)) for x_t in x]
    with torch.no_grad():
        currents = [add(cur, x_t[:, :1]) for cur, x_t in zip(currents, x, strict=True)]
    return [net.lif2(cur) for cur in currents]


def read_before(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    out = []
    for x_t in x:
        cur = net.bn1(net.conv1(x_t))
        view = cur[:, 0]
        out += [net.lif2(add(cur, 0.5 * x_t[:, :1])), 2 * view]
    return out


def wider(net: Any, x: Tensor, add: Any = operator.iadd) -> Any:
    """In place the sum has the type of what is added to."""
    return [add(net.bn1(net.conv1(x_t)), x_t[:, :1].double()) for x_t in x]


# The calls of batch norm that are left of each loop, with and without gradients: in training mode,
# and in evaluation, where 0 have become part of their convolution. Autograd refuses None.
LOOPS: dict[Callable[..., Any], tuple[Any, ...]] = {
    plain: (2, 2, 2, 0), shared: (2 * T, 2 * T, 2, 0), fed_back: (2 * T,) * 4,
    read_between: (T + 1, T + 1, 1, 1), unread: (2, 2, 1, 1), read_too: (1,) * 4,
    read_beside: (2, 2, 2, 1), by_name: (2,) * 4, of_two_norms: (2,) * 4,
    changed_inside: (None, T, None, T),
    summed: (2, 2, 2, 0), of_last: (1 + T, 1 + T, 1 + T, 0), of_one: (1, 1, 1, 0),
    not_recorded: (T, 1, T, 0), read_before: (T,) * 4,
}  # fmt: skip


@IN_EVALUATION
@MODES
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_norms_leave_what_eager_does(loop, training, evaluated):
    """Running statistics change in the order of the steps; so does what reads them."""
    left, times = LOOPS[loop][2 * evaluated + (not training)], 1 if training or evaluated else 2
    if left is not None:
        calls = check(loop, training, evaluated, times=times)
        expect(calls, batch_norm=times * left)
        if loop is of_last and training and not evaluated:  # those of num_batches_tracked, too
            expect(calls, add_=3 * T)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
@IN_EVALUATION
def test_norms_without_parameters_or_statistics(evaluated, options):
    in_eval = evaluated and options.get("track_running_stats", True)
    for training in True, False:
        calls = check(plain, training, evaluated, **options)
        expect(calls, batch_norm=(0 if in_eval and not training else 2))


def test_norms_of_numbers_and_of_changing_batches():
    """A graph for any number of samples refuses one sample, as torch does."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    fc, norm = nn.Linear(6, 3), nn.BatchNorm1d(3)
    other = nn.BatchNorm1d(3)
    run = torch.compile(lambda x: torch.stack([norm(fc(x_t)) for x_t in x]), backend=BACKEND)
    for samples in 5, 7, 9:
        x = torch.randn(T, samples, 6)
        torch.testing.assert_close(run(x), torch.stack([other(fc(x_t)) for x_t in x]))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())
    with pytest.raises(Exception, match="more than 1 value per channel"):
        run(torch.randn(T, 1, 6))


def test_parameters_may_change_between_calls():
    """The scaled weight is made in each call."""
    net = dyadic_(Normed(plain)).eval()
    snnlstm.accelerate(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=BACKEND)
    x = numbers(T, N, 2, 5, 5)
    for change in (
        lambda: net.conv1.weight.data.mul_(0.5), lambda: net.bn1.running_var.add_(1),
        lambda: setattr(net.bn2.weight, "data", torch.full((4,), 0.5)),
        lambda: net.bn2.requires_grad_(False), lambda: net.bn1.bias.data.add_(1),
    ):  # fmt: skip
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))


@IN_EVALUATION
@MODES
def test_sums_in_place_by_bits(training, evaluated):
    """They leave what sums in new memory leave; in evaluation, where all is exact, also eagerly."""

    def left(add: Any, compiled: bool, loop: Any = summed) -> Any:
        def make() -> nn.Module:
            net = dyadic_(Normed(partial(loop, add=add)).train(not evaluated))
            snnlstm.accelerate(net)
            return net

        return outcome(make, numbers(T, N, 2, 5, 5), training=training, compiled=compiled)

    equal(left(operator.iadd, True), left(operator.add, True))
    for loop in (summed, wider) if evaluated else ():
        equal(left(operator.iadd, True, loop), left(operator.iadd, False, loop))


class Feedback(nn.Module):
    """Feeds a norm's result back, so that no two steps can be one call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out, back = [], torch.zeros(())
        for x_t in x:
            normed = self.bn(self.conv(x_t + back))
            back, _ = normed.mean(), out.append(self.pool(normed))
        return torch.stack(out)


class NoFeedback(Feedback):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.pool(self.bn(self.conv(x_t))) for x_t in x])


@merges
@pytest.mark.parametrize("size", [(8, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("kind", [Feedback, NoFeedback])
def test_channels_last_norms_are_as_precise_as_contiguous_ones(kind, size):
    """Large steps run one by one, and by the kernels, too."""
    torch.manual_seed(0)
    net, samples, side = kind(), *size
    x = torch.rand(2, samples, 2, side, side)
    factors = torch.randn(2, samples, 16, side // 2, side // 2)

    def left(form: str) -> list[Tensor]:
        one, dtype = copy.deepcopy(net), torch.float64 if form == "exact" else torch.float32
        run = torch.compile(one, backend=BACKEND) if form == "compiled" else one
        out = run.to(dtype)(x.to(dtype))
        (out * factors.to(dtype)).sum().backward()
        trained = one.conv.weight, one.bn.weight, one.bn.bias
        return [out.detach(), *(p.grad for p in trained), one.bn.running_mean, one.bn.running_var]

    exact, eager, compiled = map(left, ("exact", "eager", "compiled"))

    def error(found: Tensor, k: int) -> float:
        return float((found - exact[k]).norm() / exact[k].norm())

    for k, (ours, torchs) in enumerate(zip(compiled, eager, strict=True)):
        assert error(ours, k) <= max(2 * error(torchs, k), 3e-7), k
