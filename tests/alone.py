"""Each option of the cell alone, and sizes at which kernels change their way.

The results of each case are checked by test_kernels.py, its gradients by test_kernel_gradients.py.
"""

from dataclasses import replace

import torch
from gradients import PLAIN, with_options

from snnlstm.quant import StateQuant, state_quant

UNEVEN = StateQuant(torch.tensor([-0.51, -0.13, 0.021, 0.1, 0.27]))
ALONE = {
    "plain": PLAIN,
    "one step": with_options(sequence=False, record=False),
    "last states": with_options(record=False),
    "no reset": with_options(reset="none"),
    "reset to zero": with_options(reset="zero"),
    "one threshold": replace(PLAIN, threshold="number"),
    "a threshold a channel, 4-D": replace(PLAIN, threshold="four"),
    "max_pool": with_options(pool="max", pool_size=(2, 3)),  # 7 x 10: both leave a remainder
    "avg_pool": with_options(pool="avg", pool_size=(2, 3)),
    "a window as large as the image": with_options(pool="max", pool_size=(7, 10)),
    "inhibition": with_options(inhibition=True),
    "inhibition of pooled": with_options(inhibition=True, pool="avg", pool_size=(3, 2)),
    "quantised": with_options(quant=state_quant(3, threshold=0.4)),
    "quantised twice": with_options(quant=UNEVEN, pool="avg", pool_size=(1, 3)),
    "quantised, ties in every window": with_options(
        quant=StateQuant(torch.tensor([0.0, 0.15])), pool="max", pool_size=(3, 3)
    ),
    "kernel 1x1": with_options(kernel_size=(1, 1)),
    "kernel 5x5": with_options(kernel_size=(5, 5)),
    "kernel 5x5, two rows": with_options(replace(PLAIN, height=2), kernel_size=(5, 5)),
    "kernel 7x7": with_options(kernel_size=(7, 7)),
    "kernel 7x7, sparse x": with_options(
        replace(PLAIN, density=0.1, in_channels=9), kernel_size=(7, 7)
    ),
    "kernel 1x7": with_options(kernel_size=(1, 7)),
    "kernel 5x3": with_options(kernel_size=(5, 3)),
    "kernel 9x9": with_options(replace(PLAIN, height=13, width=11), kernel_size=(9, 9)),
    "kernel 19x3": with_options(replace(PLAIN, height=19, width=23), kernel_size=(19, 3)),
    "kernel 11x1": with_options(replace(PLAIN, height=17, width=6), kernel_size=(11, 1)),
    "kernel 9x3, larger than the image": with_options(kernel_size=(9, 3)),
    "stride": with_options(stride=(2, 3)),
    "a stride beyond the kernel": with_options(kernel_size=(1, 1), stride=(3, 2)),
    "dilation": with_options(dilation=(2, 3)),
    "dilation, several tiles": with_options(
        replace(PLAIN, height=19, width=29), kernel_size=(3, 5), dilation=(2, 3)
    ),
    "dilation, a kernel in parts": with_options(
        replace(PLAIN, height=23, width=19), kernel_size=(9, 3), dilation=(2, 1)
    ),
    "dilation and stride": with_options(dilation=(3, 2), stride=(2, 2), kernel_size=(5, 3)),
    "no bias": replace(PLAIN, bias=False),
    "graded": replace(PLAIN, graded=0.3),
    "graded by less than nothing": replace(PLAIN, graded=-1.5),
    "checkpoint": with_options(replace(PLAIN, time=7), checkpoint=True),
    "checkpoint, last states": with_options(checkpoint=True, record=False, reset="zero"),
    "checkpoint, inhibition": with_options(checkpoint=True, inhibition=True),
    "few spikes": replace(PLAIN, density=0.03, spikes=True, in_channels=17),
    "few spikes, strided": with_options(
        replace(PLAIN, density=0.03, spikes=True, in_channels=17, height=13),
        stride=(2, 3),
        dilation=(1, 2),
    ),
    "many spikes": replace(PLAIN, density=0.6, spikes=True),
    "sparse numbers": replace(PLAIN, density=0.1, in_channels=9, channels=5, height=11),
    "sparse numbers, 5x5": with_options(
        replace(PLAIN, density=0.1, in_channels=9), kernel_size=(5, 5)
    ),
    "nothing": replace(PLAIN, density=0.0),
    "one pixel": replace(PLAIN, height=1, width=1),
    "one row": replace(PLAIN, height=1, width=29),
    "one column": replace(PLAIN, height=29, width=1),
    "a few columns, dilated beyond them": with_options(
        replace(PLAIN, height=13, width=4), kernel_size=(5, 7), dilation=(3, 2)
    ),
    "primes": replace(PLAIN, batch=3, in_channels=7, channels=11, height=13, width=17),
    "one channel": replace(PLAIN, in_channels=1, channels=1),
    # More than one block of rows a task, and rows that fill a block alone.
    "a tall image": replace(PLAIN, time=2, batch=1, height=61, width=19, channels=5),
    "a wide image": replace(PLAIN, time=2, batch=1, height=3, width=275, channels=5),
    # Three vectors of 8, for x and for mem.
    "three vectors": replace(PLAIN, time=2, batch=1, in_channels=24, channels=24, height=5),
    # More inputs than one chunk of weights holds, for x and for mem.
    "many channels": replace(PLAIN, time=2, batch=1, in_channels=71, channels=35, height=5),
}
