"""One cell's computation, described without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from .surrogate import NONE

__all__ = ["CellOptions", "Pool", "Reset"]

Reset = Literal["subtract", "zero", "none"]
Pool = Literal["none", "max", "avg"]


@dataclass(frozen=True)
class CellOptions:
    """What a cell computes, besides its tensors.

    Frozen and hashable, so that it can key a cache; it holds no tensor of the computation.
    The padding is always ``dilation * (kernel_size - 1) / 2`` and the state of an image of
    H x W is ``ceil(H / stride[0])`` x ``ceil(W / stride[1])``.

    Parameters
    ----------
    kernel_size, stride, dilation : (int, int)
        Of the gate convolution, height first. The stride applies to the input half only.
    reset : {"subtract", "zero", "none"}
        What a spike of the previous step does to the membrane potential.
    pool : {"none", "max", "avg"}
        Pooling of the membrane potential before the threshold.
    pool_size : (int, int)
        Kernel and stride of the pooling; (1, 1) without.
    surrogate : Surrogate or callable
        A callable that is no :class:`~snnlstm.surrogate.Surrogate` needs the reference path.
    quant : StateQuant, callable or None
        Quantisation of the states; a foreign callable needs the reference path.
    inhibition : bool
        Of each sample only the neuron with the highest (pooled) potential may spike.
    sequence : bool
        x is (T, N, Cin, H, W) and spk (T, N, C, Hp, Wp); otherwise both are 4-D.
    record : bool
        With `sequence`: syn and mem are returned for every step, (T, N, C, Ho, Wo).
    checkpoint : bool
        Keep only the states for the backward pass and recompute the gates there.
    operands : torch.dtype or None
        Type of the convolution's operands where it is not the states': torch.float16 or
        torch.bfloat16 under autocast, which leaves states in float32.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    reset: Reset = "none"
    pool: Pool = "none"
    pool_size: tuple[int, int] = (1, 1)
    surrogate: Any = NONE
    quant: Any = None
    inhibition: bool = False
    sequence: bool = False
    record: bool = False
    checkpoint: bool = False
    operands: torch.dtype | None = None

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros on each side that keep the image size, height first."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1) // 2, dw * (kw - 1) // 2

    def state_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of syn and mem for an image of `height` x `width`."""
        sh, sw = self.stride
        return -(-height // sh), -(-width // sw)
