"""The cell on signals of one dimension, as images of height 1 to the same kernels."""

from __future__ import annotations

from torch import Tensor, nn

from .sconv2dlstm import SConv2dLSTM
from .snntorch import Base1d

__all__ = ["SConv1dLSTM"]


class SConv1dLSTM(SConv2dLSTM, *filter(None, [Base1d])):  # type: ignore[misc]
    """:class:`SConv2dLSTM` on signals, (N, Cin, L), in the place of images.

    x is (N, Cin, L) for one step or (T, N, Cin, L) for a sequence, and syn and mem are
    (N, C, ceil(L / stride)). ``conv`` is an nn.Conv1d, whose weight is (4C, Cin + C, k).
    `kernel_size`, `max_pool`, `avg_pool`, `stride` and `dilation` are an int, or a tuple of one.
    Everything else is as of that class: arguments, attributes, results and errors.
    """

    _dims, _conv_kind = 1, nn.Conv1d

    def init_sconv1dlstm(self) -> tuple[Tensor, Tensor]:
        """Another name of :meth:`reset_mem`, which an open proposal to snnTorch has."""
        return self.reset_mem()
