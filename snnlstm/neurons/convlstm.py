"""The ConvLSTM without spikes: the cell, and a stack of cells over whole sequences.

Both have the constructor, attributes, keys and results that most ConvLSTMs for torch have. They
use the kernels of the spiking cell, whose mem is the hidden state h, and syn the cell state c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import spec
from ..calls.call import checked_call, dtype_source, state_tensor
from ..calls.entries import NO_ENTRIES, find_entry, kept_entries
from ..calls.lengths import CheckedLengths, checked_lengths, held, mask_padding
from ..calls.spec import Size
from ..dispatch.path import LastPath, log_fallback, log_once
from ..dispatch.reasons import EXPORT, beyond_forward, misfit, recording_and_overrides
from ..dispatch.run import run_call, run_traced
from ..reference import Overrides

States = Sequence[Tensor | None]
"""h and c, (N, C, Ho, Wo) each; None means zeros."""


class ConvLSTMCell(nn.Module):
    """One step of a convolutional LSTM without spikes.

    It has the constructor, attributes, keys, initial values and results of the ``ConvLSTMCell``
    in many repositories. It computes the cell of Shi et al. 2015, without peepholes
    (https://arxiv.org/abs/1506.04214)::

        i, f, o, g = conv(cat[x, h]).chunk(4)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)

    A wrong type raises TypeError; a wrong value, shape or device raises ValueError.

    Parameters
    ----------
    input_dim, hidden_dim : int
        Channels Cin of the input and C of the states.
    kernel_size : int or (int, int)
        Odd. The padding keeps the image size.
    bias : bool, default True
        Whether ``conv`` has a bias.
    stride, dilation, device, dtype
        Those of :class:`snnlstm.SConv2dLSTM`, with the same defaults.

    Attributes
    ----------
    conv : nn.Conv2d
        weight (4C, Cin + C, kh, kw), gates in the order i, f, o, g, and bias (4C,).
    path : snnlstm.Path or None
        The implementation that ran the last call, and why. A `path` that the user sets stays.
    """

    path = LastPath()
    _entries: Any = NO_ENTRIES
    """As a cell's."""

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        kernel_size: Size,
        bias: bool = True,
        *,
        stride: Size = 1,
        dilation: Size = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = spec.integer("input_dim", input_dim)
        self.hidden_dim = spec.integer("hidden_dim", hidden_dim)
        self.bias = spec.flag("bias", bias)
        described = self._spec = spec.make_spec(
            kernel_size, surrogate_disable=True, spiking=False, stride=stride, dilation=dilation
        )
        self.kernel_size, self.padding = described.kernel_size, described.padding
        self.stride, self.dilation = described.stride, described.dilation
        self.conv = nn.Conv2d(
            input_dim + hidden_dim,
            4 * hidden_dim,
            self.kernel_size,
            padding=self.padding,
            dilation=self.dilation,
            bias=self.bias,
            device=spec.device_or_none("device", device),
            dtype=spec.dtype_or_none("dtype", dtype),
        )

    def forward(self, input_tensor: Tensor, cur_state: States | None = None) -> States:
        """Run one step.

        Parameters
        ----------
        input_tensor : Tensor
            (N, Cin, H, W), in the cell's dtype, or in one that converts to it without loss.
        cur_state : (Tensor, Tensor), optional
            h and c, (N, C, Ho, Wo) each; zeros by default.

        Returns
        -------
        h, c : Tensor
            (N, C, Ho, Wo), after the step.
        """
        if isinstance(input_tensor, Tensor) and input_tensor.dim() == 5:
            raise ValueError(
                f"input_tensor must be one step, (N, {self.input_dim}, H, W), got "
                f"{tuple(input_tensor.shape)}: snnlstm.ConvLSTM takes sequences"
            )
        _, h, c = self._run(input_tensor, cur_state, "cur_state")
        return h, c

    def _run(
        self, x: Any, state: Any, name: str, lengths: Any = None, record: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return h of every step, which is empty if x is one step, and the last h and c.

        x has time first, and `name` is that of the state in errors. `lengths` are the steps of
        each sample. With `record` h and c are those of every step.
        """
        state = (None, None) if state is None else state
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            got = f"{len(state)} items" if hasattr(state, "__len__") else type(state).__name__
            raise TypeError(f"{name} must be h and c, (Tensor, Tensor), or None, got {got}")
        conv, traced = self.conv, torch.compiler.is_compiling()
        channels = self.input_dim, self.hidden_dim
        recording, overrides = recording_and_overrides(conv, nn.Conv2d, self._spec, traced=traced)
        if overrides is None:
            reason = misfit(conv, nn.Conv2d, self._spec, channels)
            overrides = None if reason is None else Overrides(conv, reason)
        usual = type(conv) is nn.Conv2d
        weight, bias = (conv.weight, conv.bias) if usual else (dtype_source(conv, x, x), None)
        passed = {"mem": (f"h of {name}", state[0]), "syn": (f"c of {name}", state[1])}
        call = checked_call(
            x, weight, bias, None, None, channels, self._spec,
            lambda name, shape, x: state_tensor(*passed[name], shape, x, weight),
            record=record, lengths=lengths, traced=traced, name="input_tensor",
        )  # fmt: skip
        if traced:
            every, c, h, path = run_traced(call, self._spec, recording, overrides)
        else:
            entry = find_entry(self._entries, call, self._spec, shared=overrides is None)
            # nn.Module.__setattr__ is slow.
            self.__dict__["_entries"] = kept_entries(self._entries, entry)
            every, c, h, path = run_call(entry, call, recording, overrides)
        if recording is not EXPORT:
            object.__setattr__(self, "_path", path)
            if path.slow and not traced:
                log_fallback(path, self)
        return every, h, c

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_entries": NO_ENTRIES, "_path": None}

    def init_hidden(self, batch_size: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return zeros for h and c, (batch_size, C, Ho, Wo), for images of `image_size`."""
        size = self._spec.state_size(*image_size)
        zeros = self.conv.weight.detach().new_zeros((batch_size, self.hidden_dim, *size))
        return zeros, zeros.clone()

    def extra_repr(self) -> str:
        """Arguments that the convolution does not show."""
        stride = "" if self.stride == (1, 1) else f", stride={self.stride}"
        return f"{self.input_dim}, {self.hidden_dim}, kernel_size={self.kernel_size}{stride}"


def _per_layer(name: str, value: Any, count: int) -> list[Any]:
    """One value for each layer: those of a list, or any other value for all layers."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must have one entry for each of {count} layers, got {value!r}")
    return value


class ConvLSTM(nn.Module):
    """A stack of convolutional LSTMs without spikes, over whole sequences.

    It has the constructor, attributes, keys, initial values and results of the ``ConvLSTM`` in many
    repositories. A layer takes all steps in one call. A cell with hooks or a forward of its own is
    called step by step, and the log says so. Errors are those of :class:`ConvLSTMCell`.

    Parameters
    ----------
    input_dim : int
        Channels of the input.
    hidden_dim : int or list of int
        Channels of the states, for all layers or for each.
    kernel_size : int, (int, int), or list of these
        Odd, for all layers or for each. The padding keeps the image size.
    num_layers : int
    batch_first : bool, default False
        The input is (N, T, ...), not (T, N, ...).
    bias, return_all_layers : bool, default True and False
        Whether convolutions have a bias, and whether the results of all layers are returned.
    **cell_options
        ``stride``, ``dilation``, ``device`` and ``dtype`` for every cell.

    Attributes
    ----------
    cell_list : nn.ModuleList
        A :class:`ConvLSTMCell` for each layer, so that ``cell_list.0.conv.weight`` is a key.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | list[int],
        kernel_size: int | tuple[int, int] | list[Any],
        num_layers: int,
        batch_first: bool = False,
        bias: bool = True,
        return_all_layers: bool = False,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        count = spec.integer("num_layers", num_layers)
        self.input_dim, self.num_layers = input_dim, count
        self.hidden_dim = _per_layer("hidden_dim", hidden_dim, count)
        self.kernel_size = _per_layer("kernel_size", kernel_size, count)
        self.batch_first = spec.flag("batch_first", batch_first)
        self.bias = spec.flag("bias", bias)
        self.return_all_layers = spec.flag("return_all_layers", return_all_layers)
        sizes = zip([input_dim, *self.hidden_dim], self.hidden_dim, self.kernel_size, strict=False)
        self.cell_list = nn.ModuleList(ConvLSTMCell(*size, bias, **cell_options) for size in sizes)

    def forward(
        self,
        input_tensor: Tensor,
        hidden_state: Sequence[States | None] | None = None,
        lengths: Any = None,
        record: bool = False,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run a sequence.

        Parameters
        ----------
        input_tensor : Tensor
            (T, N, Cin, H, W), or (N, T, Cin, H, W) with ``batch_first``; T is at least 1.
        hidden_state : list of (Tensor, Tensor), optional
            h and c of each layer before the first step, (N, C, Ho, Wo) each; None means zeros.
        lengths : Tensor or list of int, optional
            (N,) ints, the steps of each sample, between 0 and T. After its last step a sample is
            padded: its outputs are 0, and its states stay as they are. Lengths on a GPU are
            clamped without a check.
        record : bool, default False
            Return h and c of every step in `last_state_list`, instead of only the last ones.

        Returns
        -------
        layer_output_list : list of Tensor
            h of every step, (N, T, C, Ho, Wo) **whatever batch_first is**, of the last layer, or
            of all layers with ``return_all_layers``.
        last_state_list : list of [Tensor, Tensor]
            h and c of these layers after the last step, (N, C, Ho, Wo) each, or of every step,
            (N, T, C, Ho, Wo), with `record`.
        """
        record = spec.flag("record", record)
        x, order = input_tensor, "N, T" if self.batch_first else "T, N"
        if not isinstance(x, Tensor):
            raise TypeError(f"input_tensor must be a tensor, got {type(x).__name__}")
        if x.dim() != 5 or x.shape[self.batch_first] == 0:
            raise ValueError(
                f"input_tensor must be a sequence of a step or more, ({order}, {self.input_dim}, "
                f"H, W), got {tuple(x.shape)}"
            )
        x = x.transpose(0, 1) if self.batch_first else x
        if lengths is not None:
            traced = torch.compiler.is_compiling()
            lengths = checked_lengths(lengths, x.shape[0], x.shape[1], x.device, traced)
        states = [None] * self.num_layers if hidden_state is None else hidden_state
        if len(states) != self.num_layers:
            raise ValueError(
                f"hidden_state must have h and c of {self.num_layers} layers, got {len(states)}"
            )
        outputs, last = [], []
        for k, (cell, state) in enumerate(zip(self.cell_list, states, strict=True)):
            x, *after = _run_layer(cell, x, state, k, lengths, record)
            outputs.append(x)
            last.append([s.transpose(0, 1).contiguous() for s in after] if record else after)
        if not self.return_all_layers:
            outputs, last = outputs[-1:], last[-1:]
        return [out.transpose(0, 1).contiguous() for out in outputs], last


def _run_layer(
    cell: Any, x: Tensor, state: Any, layer: int, lengths: Tensor | None, record: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a cell over x (T, N, Cin, H, W); return h of every step, and the last or all h and c."""
    if type(cell).forward is ConvLSTMCell.forward and beyond_forward(cell) is None:
        checked = None if lengths is None else CheckedLengths(lengths, x.shape[0])
        return cell._run(x, state, f"hidden_state[{layer}]", checked, record)
    if not torch.compiler.is_compiling():
        text = "ConvLSTM calls layer %d step by step: its %s has hooks or a forward of its own"
        log_once(cell, text, text, layer, type(cell).__name__)
    state = cell.init_hidden(x.shape[1], tuple(x.shape[-2:])) if state is None else state
    states = []
    for t, x_t in enumerate(x if lengths is None else mask_padding(x, lengths)):
        before, state = state, cell(x_t, state)
        if lengths is not None:
            state = held(lengths > t, state, before)
        states.append(state)
    h = torch.stack([h for h, _ in states])
    out = h if lengths is None else mask_padding(h, lengths)
    return (out, h, torch.stack([c for _, c in states])) if record else (out, *state)
