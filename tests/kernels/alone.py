"""This table has a call for each option of the cell alone, and for each kind of size.

test_kernels.py checks the results and gradients of each row, on every instruction set of the CPU.
The tests of the emulated CUDA kernels take rows by their names. No row is of a bias, a threshold's
shape, a graded factor or a density alone, because fuzz.py draws these for every call.
"""

import torch

from snnlstm.quant import StateQuant, state_quant
from tests.shared.cases import PLAIN, SILENT

ALONE = {
    "plain": PLAIN,
    "one step": PLAIN.but(sequence=False, record=False),
    "last states": PLAIN.but(record=False),
    "no reset": PLAIN.but(reset="none"),
    "reset to zero": PLAIN.but(reset="zero"),
    "max_pool": PLAIN.but(pool="max", pool_size=(2, 3)),  # 7 x 10: both leave a remainder
    "avg_pool": PLAIN.but(pool="avg", pool_size=(2, 3)),
    "a window as large as the image": PLAIN.but(pool="max", pool_size=(7, 10)),
    "inhibition": PLAIN.but(inhibition=True),
    "inhibition of pooled": PLAIN.but(inhibition=True, pool="avg", pool_size=(3, 2)),
    "quantised": PLAIN.but(quant=state_quant(3, threshold=0.4)),
    "quantised twice": PLAIN.but(
        quant=StateQuant(torch.tensor([-0.51, -0.13, 0.021, 0.1, 0.27])),
        pool="avg",
        pool_size=(1, 3),
    ),
    "quantised, ties in every window": PLAIN.but(
        quant=StateQuant(torch.tensor([0.0, 0.15])), pool="max", pool_size=(3, 3)
    ),
    "kernel 1x1": PLAIN.but(kernel_size=(1, 1)),
    "kernel 5x5": PLAIN.but(kernel_size=(5, 5)),
    "kernel 7x7": PLAIN.but(kernel_size=(7, 7)),
    "kernel 9x9": PLAIN.but(kernel_size=(9, 9), height=13, width=11),
    "kernel 19x3": PLAIN.but(kernel_size=(19, 3), height=19, width=23),
    "kernel 11x1": PLAIN.but(kernel_size=(11, 1), height=17, width=6),
    "kernel 9x3, larger than the image": PLAIN.but(kernel_size=(9, 3)),
    "stride": PLAIN.but(stride=(2, 3)),
    "a stride beyond the kernel": PLAIN.but(kernel_size=(1, 1), stride=(3, 2)),
    "dilation": PLAIN.but(dilation=(2, 3)),
    "dilation, a kernel in parts": PLAIN.but(
        kernel_size=(9, 3), dilation=(2, 1), height=23, width=19
    ),
    "dilation and stride": PLAIN.but(kernel_size=(5, 3), dilation=(3, 2), stride=(2, 2)),
    "checkpoint": PLAIN.but(checkpoint=True, time=7),
    "checkpoint, last states": PLAIN.but(checkpoint=True, record=False, reset="zero"),
    "inhibition, last states": PLAIN.but(record=False, reset="zero", inhibition=True, channels=17),
    "no spikes": PLAIN.but(**SILENT),
    "no spikes, last states": PLAIN.but(**SILENT, record=False),
    "no spikes, checkpoint": PLAIN.but(**SILENT, record=False, checkpoint=True, time=7),
    "no spikes, many samples": PLAIN.but(**SILENT, record=False, batch=9),
    "no spikes, stride and dilation": PLAIN.but(
        **SILENT, record=False, stride=(2, 3), dilation=(2, 1), layouts=("channels_last",) * 4
    ),
    "few spikes": PLAIN.but(density=0.03, spikes=True, in_channels=17),
    "few spikes, strided": PLAIN.but(
        density=0.03, spikes=True, in_channels=17, height=13, stride=(2, 3), dilation=(1, 2)
    ),
    "many spikes": PLAIN.but(density=0.6, spikes=True),
    "nothing": PLAIN.but(density=0.0),
    "one pixel": PLAIN.but(height=1, width=1),
    "one row": PLAIN.but(height=1, width=29),
    "one column": PLAIN.but(height=29, width=1),
    "a few columns, dilated beyond them": PLAIN.but(
        kernel_size=(5, 7), dilation=(3, 2), height=13, width=4
    ),
    "one channel": PLAIN.but(in_channels=1, channels=1),
    # A tall image gives a task several blocks of rows; one row of a wide image fills a block.
    "a tall image": PLAIN.but(time=2, batch=1, height=61, width=19, channels=5),
    "a wide image": PLAIN.but(time=2, batch=1, height=3, width=275, channels=5),
    # A thread takes several small images together: with two threads four images make a group.
    "small images": PLAIN.but(time=2, batch=9, height=5, width=3),
    "small images, sparse x": PLAIN.but(
        time=2, batch=8, height=4, width=4, in_channels=17, density=0.05, spikes=True
    ),
    "small images, pooled and strided": PLAIN.but(
        time=2, batch=10, height=7, width=9, stride=(2, 1), pool="max", pool_size=(2, 2)
    ),
    "small images, inhibition": PLAIN.but(time=2, batch=8, height=2, width=3, inhibition=True),
    "small images, one step": PLAIN.but(sequence=False, record=False, batch=9, height=3, width=3),
    # These weights do not stay in a thread's L2 cache.
    "many weights": PLAIN.but(time=2, batch=3, in_channels=43, channels=40, height=7, width=17),
    # 24 channels are three vectors of 8 lanes, in x and in mem.
    "three vectors": PLAIN.but(time=2, batch=1, in_channels=24, channels=24, height=5),
    # x and mem have more channels than one chunk of weights holds.
    "many channels": PLAIN.but(time=2, batch=1, in_channels=71, channels=35, height=5),
}
# Tests compare the results of these rows alone: with levels so close to one another, or so few,
# rounding decides which level a state gets, and with it the gradients.
LEVELS = {
    "quantised finely": PLAIN.but(quant=state_quant(5, threshold=0.4)),
    "quantised finely, twice": PLAIN.but(
        quant=state_quant(3, threshold=0.4), pool="avg", pool_size=(2, 2)
    ),
    "quantised to equal levels": PLAIN.but(quant=StateQuant(torch.tensor([-0.5, 0.0, 0.0, 0.25]))),
    "quantised to one level": PLAIN.but(quant=StateQuant(torch.tensor([0.15]))),
    "quantised with ties": PLAIN.but(quant=state_quant(3, threshold=0.4), inhibition=True),
}
