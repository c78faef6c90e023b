"""A ConvLSTM in plain torch, written from the formulas: the oracle of the ConvLSTM's tests.

It has the constructor and the results that ConvLSTMs for torch commonly have.
"""

import torch
from torch import Tensor, nn


class Cell(nn.Module):
    def __init__(self, input_dim, hidden_dim, kernel_size, bias=True, stride=1, dilation=1):
        super().__init__()
        self.input_dim, self.hidden_dim = input_dim, hidden_dim
        self.kernel_size, self.bias = kernel_size, bias
        self.stride, self.dilation = stride, dilation
        self.padding = tuple(dilation * (k // 2) for k in kernel_size)
        self.conv = nn.Conv2d(
            input_dim + hidden_dim, 4 * hidden_dim, kernel_size, padding=self.padding,
            dilation=dilation, bias=bias,
        )  # fmt: skip

    def gates(self, x: Tensor, h: Tensor) -> Tensor:
        if self.stride == 1:
            return self.conv(torch.cat([x, h], 1))
        x_part, h_part = self.conv.weight.split([self.input_dim, self.hidden_dim], 1)
        shape = {"padding": self.padding, "dilation": self.dilation}
        out = nn.functional.conv2d(x, x_part, self.conv.bias, self.stride, **shape)
        return out + nn.functional.conv2d(h, h_part, None, **shape)

    def forward(self, input_tensor, cur_state):
        h, c = cur_state
        i, f, o, g = self.gates(input_tensor, h).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def init_hidden(self, batch_size, image_size):
        size = [-(-n // self.stride) for n in image_size]
        zeros = self.conv.weight.new_zeros(2, batch_size, self.hidden_dim, *size)
        return zeros[0].clone(), zeros[1].clone()


class Stack(nn.Module):
    def __init__(
        self, input_dim, hidden_dim, kernel_size, num_layers, batch_first=False, bias=True,
        return_all_layers=False, stride=1, dilation=1,
    ):  # fmt: skip
        super().__init__()
        self.batch_first, self.return_all_layers = batch_first, return_all_layers
        hidden = hidden_dim if isinstance(hidden_dim, list) else [hidden_dim] * num_layers
        sizes = kernel_size if isinstance(kernel_size, list) else [kernel_size] * num_layers
        inputs = [input_dim, *hidden]
        self.cell_list = nn.ModuleList(
            Cell(inputs[k], hidden[k], sizes[k], bias, stride, dilation) for k in range(num_layers)
        )

    def forward(self, input_tensor, hidden_state=None):
        x = input_tensor if self.batch_first else input_tensor.transpose(0, 1)
        outputs, last = [], []
        for k, cell in enumerate(self.cell_list):
            state = cell.init_hidden(x.shape[0], x.shape[-2:])
            if hidden_state is not None:
                state = hidden_state[k]
            every = []
            for t in range(x.shape[1]):
                state = cell(input_tensor=x[:, t], cur_state=state)
                every.append(state[0])
            x = torch.stack(every, 1)
            outputs.append(x)
            last.append([*state])
        if not self.return_all_layers:
            outputs, last = outputs[-1:], last[-1:]
        return outputs, last
