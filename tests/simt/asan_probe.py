"""Run under AddressSanitizer by test_asan.py: `good` computes, anything else names a violation."""

import ctypes
import sys

import numpy as np
import own
from own import own_kernels


def main(what: str) -> None:
    emulator = own_kernels("asan")
    if what != "good":
        given, out, counter = np.zeros(64, "f"), np.zeros(64, "f"), np.zeros(1, np.uint32)
        function = emulator.lib.violate
        function.restype = ctypes.c_char_p
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in (given, out, counter))
        print("returned", function(what.encode(), 1, *pointers))
        return
    for schedule in ("in_order", "shuffled", "ahead"):
        emulator.schedule(schedule, 1)
        for result, expected in (
            own.half_gemm(emulator, "bf16", 70, 40, 136, 2),
            own.tf32_gemm(emulator, 35, 33, 20, False)[:2],
            own.box_sum(emulator, 17, 21),
            own.lstm_update(emulator, 200),
            own.sum_all(emulator, 3000, 5),
        ):
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    print("all good")


main(sys.argv[1])
