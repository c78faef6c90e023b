"""Convolutions of spikes on the CPU kernels: by lists of nonzeros or Winograd's tiles.

The gradient of x is a convolution of y's gradient with the weight turned around. Tiles compute y
only where neurons alone read it: they round equal pixels apart, and a max_pool2d behind them would
give the gradient to another one of these pixels than the first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..calls.call import may_require_grad
from ..calls.entries import TORCH_TYPES, BoundedDict
from ..compat.torch_private import is_tracing
from . import cpu, lender, products
from .function import differentiable
from .products import Ran
from .tensors import contiguous_strides, laid_out, pointer, restored, with_time


def conv2d(*args: Any, **options: Any) -> Tensor:
    """``torch.nn.functional.conv2d``, by the kernels where they gain; equal to rounding."""
    return run(*args, **options)[0]


def run(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    for_neurons: bool = False,
) -> tuple[Tensor, Ran]:
    """The result of :func:`conv2d`, and what ran; tiles may compute what only neurons read."""
    options = stride, padding, dilation, groups
    call = _decided(input, weight, bias, options, for_neurons)
    if isinstance(call, str):
        return F.conv2d(input, weight, bias, *options), call
    return _run(call, input, weight, bias), call.ran


class _Call(NamedTuple):
    """What runs a call, the packed weight that it reads, and whether a gradient follows."""

    layer: _Layer
    ran: Ran
    packed: cpu.PackedWeight | None
    needs_grad: bool


@lender.where_it_fits
def _run(call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if call.needs_grad:
        return _apply(call.layer, call, x, weight, bias)
    return call.layer.forward(call, x, weight, bias)


# In multiply-adds of torch's function: a value of a packed weight, which some steps of a loop
# share, and of a weight's gradient; and what a pass must save.
OF_PACKED, OF_GRADIENT, LEAST, LEAST_IN_TRAINING = 50, 150, 3_000_000, 5_000_000
MOST_TIME = 0.9  # the share of torch's time that a pass must not exceed
LEAST_PERCENT = 5  # of nonzeros in x that lists must be able to take, so that a look at x pays
FEWEST = 4  # input channels; lists gain nothing with fewer
PIXELS = 512  # of the images that a piece of the weight's gradient sums, or about as many
LARGEST = 64  # of a kernel's sides and strides
LISTS, TILES, TURNED, WEIGHT = range(4)  # the passes of csrc/bindings_cpu.h
# Where torch's function adds few numbers it rounds less, and so do fine tiles: for what is computed
# from fewer nonzeros than this percentage (of 5x5 there are none), and for the gradient of a weight
# up to so many pixels.
FINE_BELOW, FINE_BELOW_OF_5, FINE_PIXELS = 85, 45, 4096
MOST_INPUTS = 6  # of a tile along an axis


def _decided(
    x: Any, weight: Any, bias: Any, options: tuple[Any, ...], for_neurons: bool
) -> _Call | str:
    """Decide what runs a call: the kernels, or why torch's function does.

    The steps come in the order of what they cost, because each step of a loop asks.
    """
    if type(x) not in TORCH_TYPES or type(weight) not in TORCH_TYPES or is_tracing():
        return products.INTERCEPTED  # sizes may be symbols
    try:
        shapes = x.shape, x.stride(), weight.shape, weight.stride(), options
        key = *shapes, cpu.isa, torch.get_num_threads()
        layer = _layers.get(key)
        needs_grad = may_require_grad((x, weight, bias))
    except TypeError:  # an option is a list, or nothing that torch takes
        frozen = tuple(tuple(o) if isinstance(o, list) else o for o in options)
        if frozen == options:
            return products.SHAPES
        return _decided(x, weight, bias, frozen, for_neurons)
    except (AttributeError, RuntimeError):  # None, or a tensor without strides
        return products.SHAPES
    if layer is None:
        layer = _layers.keep(key, _layer_of(*shapes))
    if isinstance(layer, str):
        return layer
    if not (all(map(operator.is_, options, layer.given)) or _are_plain(options)):
        return products.SHAPES  # 1.0 finds the layer of 1
    gains = needs_grad and (
        (x.requires_grad and layer.of_x.pay) or (weight.requires_grad and layer.of_weight.pay)
    )
    most = layer.most_in_training if needs_grad else layer.most
    for_neurons = for_neurons and layer.of_y.pay
    if most < 0 and not (gains or for_neurons):
        return products.SMALL
    if (reason := products.reason_against(x)) is not None:
        return reason
    ran: Ran = products.NO_LISTS
    by_tiles, largest = False, 1.0
    if most >= 0 or for_neurons:
        percent, largest = _facts(layer.lists, x)
        ran = percent if percent <= most else products.too_dense(percent / 100)
        beside_lists = percent > min(most, layer.most_beside_tiles)
        by_tiles = for_neurons and beside_lists and layer.of_y.for_share(percent) is not None
    if isinstance(ran, str) and not (gains or by_tiles):
        return ran
    if (reason := products.reason_against_weight(weight, bias)) is not None:
        return reason
    if bias is not None and bias.shape != weight.shape[:1]:
        return products.SHAPES
    packed = layer.packed(weight) if by_tiles or not isinstance(ran, str) else None
    if by_tiles and packed and _admits_tiles(packed, largest):
        ran = products.ByTiles(percent)
    return _Call(layer, ran, packed, needs_grad)


def _facts(convolution: Any, x: Tensor) -> tuple[int, float]:
    """How many percent of a convolution's x are not zero, and its largest magnitude, at least 1."""
    return convolution.facts((x.data_ptr(), with_time(x.stride())))


def _admits_tiles(weight: cpu.PackedWeight, largest: float) -> bool:
    """Whether tiles round little enough beside the largest number of x.

    In networks of whole numbers mem may equal the threshold exactly, which no tile keeps.
    """
    return weight.max_tile_inputs(largest) >= MOST_INPUTS and not weight.has_few_digits


class _Tiles(NamedTuple):
    """The passes that compute something by tiles from numbers of few zeros, and of many.

    None where no pass gains, or rounds little enough.
    """

    coarse: Any = None
    fine: Any = None
    fine_below: int = FINE_BELOW

    @property
    def pay(self) -> bool:
        """Whether there is a pass."""
        return self.coarse is not None or self.fine is not None

    def for_share(self, percent: int) -> Any:
        """The pass for this percentage of nonzeros."""
        return self.fine if percent < self.fine_below else self.coarse


class _Layer:
    """What calls of equal sizes and layouts share: the passes of csrc/bindings_cpu.h that pay.

    Attributes
    ----------
    given, options : tuple
        Stride, padding, dilation and groups of the first call; the first three as pairs.
    channels_last : bool
        Whether results and gradients are so: if x or the weight is, as torch's are.
    lists : Convolution
        Computes y. It pays up to ``most`` percent of nonzeros in x, which is negative if it never
        does, and up to ``most_in_training`` if a gradient follows; beside tiles, up to
        ``most_beside_tiles``.
    of_y : _Tiles
        Compute y from x.
    grad : Convolution
        Looks at the gradient of y, if the stride is 1.
    of_x, of_weight : _Tiles
        Compute the gradients of x, or of weight and bias, from that of y.
    piece : int
        The images of which `of_weight` sums the gradient at a time.
    """

    of_y = of_x = of_weight = _Tiles()
    most_beside_tiles = 100.0

    def __init__(
        self, x: Any, weight: Any, orders: Any, outputs: Any, stride: Any, padding: Any, given: Any
    ) -> None:
        (n, cin, *image), (cout, _, *kernel) = x, weight
        self.given, self.channels_last = given, 1 in orders
        self.options = stride, padding, (1, 1)
        self.weight_shape, self.weight_last = weight, orders[1] == 1
        self.y_shape = n, cout, *outputs
        products_of_all = n * math.prod(outputs) * math.prod(weight)

        def share(least: int, of_value: int, one: Any) -> float:
            """The share of torch's time that a pass may take."""
            values = one.packed_bytes // 4
            return MOST_TIME - (of_value * values + least) / products_of_all

        last = self.weight_last
        self.lists = _C.Convolution(
            LISTS, False, last, 1, n, cin, cout, *image, kernel, stride, padding
        )
        empty, full = self.lists.cost(0), self.lists.cost(1)
        shares = share(LEAST, 0, self.lists), share(LEAST_IN_TRAINING, OF_PACKED, self.lists)
        most = (100 * (allowed - empty) / (full - empty) for allowed in shares)
        self.most, self.most_in_training = (m if m >= LEAST_PERCENT else -1 for m in most)
        if stride != (1, 1):
            return

        of_5 = min(kernel) == 5  # of which there are no fine tiles

        def tiles(number: int, of_value: int, *sizes: Any) -> _Tiles:
            def if_it_pays(fine: bool) -> Any:
                one = _C.Convolution(number, fine, last, *sizes)
                return one if one.cost(1) < share(LEAST_IN_TRAINING, of_value, one) else None

            fine = None if of_5 else if_it_pays(True)
            return _Tiles(if_it_pays(False), fine, FINE_BELOW_OF_5 if of_5 else FINE_BELOW)

        self.of_y = tiles(TILES, OF_PACKED, 1, n, cin, cout, *image, kernel, stride, padding)
        if (one := self.of_y.fine or self.of_y.coarse) is not None:
            self.most_beside_tiles = 100 * (one.cost(1) - empty) / (full - empty)
        turned = tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))
        from_y = 1, n, cout, cin, *outputs, kernel, stride, turned
        self.grad = _C.Convolution(LISTS, False, last, *from_y)
        self.of_x = tiles(TURNED, OF_PACKED, *from_y)
        pixels = math.prod(outputs)
        divisors = (d for d in range(1, n + 1) if n % d == 0)
        self.piece = min(divisors, key=lambda d: abs(math.log(d * pixels / PIXELS)))
        of_both = n // self.piece, self.piece, cin, cout, *image, kernel, stride, padding
        self.of_weight = tiles(WEIGHT, OF_GRADIENT, *of_both)
        if n * pixels > FINE_PIXELS:
            self.of_weight = self.of_weight._replace(fine=self.of_weight.coarse)

    def forward(self, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The result, by what `call` tells."""
        if isinstance(call.ran, str):
            return F.conv2d(x, weight, bias, *self.options)
        by_tiles = isinstance(call.ran, products.ByTiles)
        convolution = self.of_y.for_share(call.ran) if by_tiles else self.lists
        y = self._empty(self.y_shape, x)
        self._run(convolution, self._pack(call.packed, convolution), x, y, pointer(bias))
        return y

    def gradient_of_x(
        self, convolution: Any, weight: Tensor, shape: Sequence[int], grad: Tensor
    ) -> Tensor | None:
        """The gradient of x by a pass, None if tiles would spread what is not finite."""
        packed = self.packed(weight)
        if not packed.gain < math.inf:
            return None
        x = self._empty(shape, grad)
        self._run(convolution, self._pack(packed, convolution), grad, x)
        return x

    def gradients_of_parameters(
        self, convolution: Any, x: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias by a pass."""
        weight, bias = grad.new_empty(self.weight_shape), grad.new_empty(self.weight_shape[0])
        self._run(convolution, 0, x, grad, 0, weight.data_ptr(), bias.data_ptr(), self.piece)
        if self.channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, bias

    def readable_grad(self, grad: Tensor, *memory: Any) -> Tensor:
        """The gradient of y, or a copy, in a layout without gaps."""
        if any(grad.stride() == strides(self.y_shape) for strides in ORDERS):
            return laid_out(grad, self.y_shape, grad.stride(), *memory)
        return laid_out(grad, self.y_shape, ORDERS[self.channels_last](self.y_shape), *memory)

    def packed(self, weight: Tensor) -> cpu.PackedWeight:
        """The packed copy of the weight, or of the view of a channels-last one without gaps."""
        return cpu.packed_weight(weight.permute(0, 2, 3, 1) if self.weight_last else weight)

    def _pack(self, packed: Any, convolution: Any) -> int:
        """The address of the weight in the layout that a pass reads."""
        key = convolution.layout
        layout = packed.layouts.get(key)
        return (layout or packed.pack(key, convolution.packed_bytes, convolution.pack))[0]

    def _empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for a result of this shape."""
        strides = ORDERS[self.channels_last](shape)
        return lender.empty_result(shape, strides, like.dtype, like.device)

    def _run(
        self, convolution: Any, packed: int, x: Tensor, y: Tensor, bias: int = 0,
        of_weight: int = 0, of_bias: int = 0, piece: int = 0,
    ) -> None:  # fmt: skip
        """Run a pass, with the addresses of what it reads and writes beside x and y."""
        views = [(t.data_ptr(), (piece * t.stride(0), *t.stride())) for t in (x, y)]
        lender.with_workspace(
            convolution.workspace,
            lambda workspace: convolution.run(
                (workspace, packed, views[0], bias, views[1], of_weight, of_bias)
            ),
        )


def _channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, c, h, w = shape
    return h * w * c, 1, w * c, c


ORDERS = contiguous_strides, _channels_last_strides


# ---- which calls have a layer --------------------------------------------------------------------

_layers: BoundedDict[Any, _Layer | str] = BoundedDict()


def _layer_of(
    x: Any, strides: Any, weight: Any, weight_strides: Any, options: tuple[Any, ...]
) -> _Layer | str:
    """Make the layer of calls with these sizes, or say why torch's function runs them."""
    if len(x) != 4 or len(weight) != 4 or 0 in (*x, *weight):
        return products.SHAPES
    kernel, (stride, padding, dilation) = weight[2:], map(_pair, options[:3])
    if stride is None or dilation != (1, 1) or options[3] != 1 or max(kernel) == 1:
        return products.GEOMETRY
    if options[1] == "valid":
        padding = 0, 0
    elif options[1] == "same" and stride == (1, 1):
        padding = kernel[0] // 2, kernel[1] // 2
    if padding is None or not all(k % 2 and k <= LARGEST for k in kernel):
        return products.GEOMETRY
    geometry = [*zip(x[2:], kernel, stride, padding, strict=True)]
    if not all(s in range(1, LARGEST) and p in range(k) for _, k, s, p in geometry):
        return products.GEOMETRY
    outputs = [(size + 2 * p - k) // s + 1 for size, k, s, p in geometry]
    if x[1] != weight[1] or min(outputs) < 1:
        return products.SHAPES
    if x[1] < FEWEST:
        return products.FEW
    orders = [_order(x, strides), _order(weight, weight_strides)]
    if None in orders:
        return products.X if orders[0] is None else products.WEIGHT
    layer = _Layer(x, weight, orders, outputs, stride, padding, options)
    pays = layer.most >= 0 or layer.of_y.pay or layer.of_x.pay or layer.of_weight.pay
    return layer if pays else products.SMALL


def _pair(value: Any) -> tuple[int, int] | None:
    """Both numbers of an argument of torch's, which is an int or a tuple of one or two."""
    values = value if isinstance(value, tuple) else (value,)
    plain = len(values) in (1, 2) and all(type(number) is int for number in values)
    return (values[0], values[-1]) if plain else None


def _are_plain(options: tuple[Any, ...]) -> bool:
    """Whether torch takes options that equal those of another call."""
    return all(isinstance(option, str) or _pair(option) is not None for option in options)


def _order(shape: Any, strides: Any) -> int | None:
    """Which of ORDERS a tensor's memory has, None if it has neither, or both."""
    orders = [
        order
        for order, made in enumerate(ORDERS)
        if all(s == 1 or a == b for s, a, b in zip(shape, strides, made(shape), strict=True))
    ]
    return orders[0] if len(orders) == 1 else None


# ---- the Function --------------------------------------------------------------------------------


def _forward(
    ctx: Any, layer: _Layer, call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Any]:
    ctx.x_memory = x.shape, x.stride(), x.dtype, x.device
    ctx.save_for_backward(x, weight)
    return layer.forward(call, x, weight, bias), ()


def _gradients(
    ctx: Any, saved: Sequence[Any], grads: Sequence[Any], by_torch: bool
) -> Sequence[Tensor | None]:
    layer, (x, weight), grad = ctx.plan, saved, grads[0]
    shape, _, *memory = ctx.x_memory
    wanted, out = [*ctx.needs_input_grad[2:]], [None] * 3
    weight = restored(weight, layer.weight_shape, *memory)
    if not by_torch and ((wanted[0] and layer.of_x.pay) or (wanted[1] and layer.of_weight.pay)):
        grad = layer.readable_grad(grad, *memory)
        percent = _facts(layer.grad, grad)[0]
        if wanted[1] and (convolution := layer.of_weight.for_share(percent)) is not None:
            x = laid_out(x, *ctx.x_memory)
            out[1:] = layer.gradients_of_parameters(convolution, x, grad)
        if wanted[0] and (convolution := layer.of_x.for_share(percent)) is not None:
            out[0] = layer.gradient_of_x(convolution, weight, shape, grad)
    rest = [want and one is None for want, one in zip(wanted, out, strict=True)]
    if any(rest):
        x, sizes = restored(x, shape, *memory), layer.weight_shape[:1]
        by_aten = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, *layer.options, False, (0, 0), 1, rest
        )
        out = [
            ours if ours is not None else other for ours, other in zip(out, by_aten, strict=True)
        ]
    return [one if want else None for want, one in zip(wanted, out, strict=True)]


_apply = differentiable("_Conv2d", _forward, _gradients)
