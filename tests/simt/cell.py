"""The emulated cell: csrc/cuda's entry points on CPU tensors, through ctypes.

``Cell(emulator).forward(...)`` takes torch tensors and a ``CellOptions``. Outputs, saved tensors and
workspaces are filled with NaN first, and every array is registered, so that the emulation sees
whatever is read before it was written, or lies outside.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from builder import build
from emulator import EmulationError, Emulator, symbolise

from snnlstm.options import CellOptions

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
    Path(__file__).parent / "kernels/cell.cpp",
]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
RESETS = {"subtract": 0, "zero": 1, "none": 2}
POOLS = {"none": 0, "max": 1, "avg": 2}
MATRIX = {"exact": 0, "tf32": 1, "tf32x3": 2, "float16": 3, "bfloat16": 4}
ALGORITHMS = {"automatic": 0, "fma": 1, "mma": 2}


class View(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5)]


class PlainCell(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("T", "N", "Cin", "C", "H", "W")),
        *((name, c_double) for name in ("p0", "p1")),
        ("dtype", c_int),
        *((f"{name}_{axis}", c_int) for name in ("kernel", "stride", "dilation") for axis in "hw"),
        *((name, c_int) for name in ("pool", "pool_h", "pool_w", "reset", "surrogate")),
        *((name, c_int) for name in ("inhibition", "num_levels")),
    ]


class PlainTarget(Structure):
    _fields_ = [
        ("shared_bytes", c_int64),
        *((n, c_int) for n in ("compute_capability", "multiprocessors", "matrix", "algorithm")),
    ]


VIEWS = (
    *("x", "syn0", "mem0", "spk", "syn", "mem", "noise", "grad_spk", "grad_syn", "grad_mem"),
    *("grad_x", "grad_syn0", "grad_mem0"),
)
ADDRESSES = (
    *("weight", "bias", "threshold", "levels", "saved_gates", "saved_syn", "workspace"),
    *("grad_weight", "grad_bias", "grad_threshold", "winner"),
)


class PlainArgs(Structure):
    _fields_ = [
        *((name, View) for name in VIEWS),
        *((name, c_void_p) for name in ADDRESSES),
        ("threshold_stride", c_int64),
        ("graded", c_double),
        ("record", c_int),
    ]


class Sizes(Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "packed_forward",
            "packed_backward",
            "saved_gates",
            "saved_syn",
            "forward_workspace",
            "backward_workspace",
        )
    ]


def _view(tensor: torch.Tensor | None) -> View:
    if tensor is None:
        return View()
    strides = tensor.stride()
    return View(tensor.data_ptr(), (c_int64 * 5)(*[0] * (5 - len(strides)), *strides))


def nan(count: int) -> torch.Tensor:
    """`count` bytes, all ones: NaN in every floating point type."""
    return torch.full((max(count, 1),), 0xFF, dtype=torch.uint8)


def nan_like(shape: tuple[int, ...], like: torch.Tensor, channels_last: bool = False):
    out = torch.full(shape, float("nan"), dtype=like.dtype)
    return to_channels_last(out) if channels_last else out


def to_channels_last(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with the channels (third from last) innermost."""
    return t.movedim(-3, -1).contiguous().movedim(-1, -3)


class Cell:
    """Runs the kernels of one library; `target` says for which GPU they choose."""

    def __init__(
        self, library: Path, matrix: str = "exact", algorithm: str = "automatic", **target
    ):
        self.emulator = Emulator(library)
        fields = {"compute_capability": 80, "multiprocessors": 4, "shared_bytes": 163 * 1024}
        self.target = PlainTarget(
            **{**fields, **target}, matrix=MATRIX[matrix], algorithm=ALGORITHMS[algorithm]
        )

    def _call(self, name: str, cell: PlainCell, *args) -> None:
        function = getattr(self.emulator.lib, name)
        function.restype = ctypes.c_char_p
        problem = function(byref(cell), byref(self.target), *args)
        if problem:
            raise EmulationError(symbolise(problem.decode()))

    def _run(self, name: str, cell: PlainCell, given: dict, outputs: tuple[str, ...], **numbers):
        """Calls an entry with tensors by the names of their fields; `outputs` may be written."""
        args = PlainArgs(**numbers)
        known = []
        try:
            for field, t in given.items():
                if t is None:
                    continue
                setattr(args, field, _view(t) if field in VIEWS else t.data_ptr())
                storage = t.untyped_storage()
                if storage.nbytes() == 0 or storage.data_ptr() in known:
                    continue
                self.emulator.register(
                    storage.data_ptr(), storage.nbytes(), field, field in outputs
                )
                known.append(storage.data_ptr())
            self._call(name, cell, byref(args))
        finally:
            for address in known:
                self.emulator.unregister(address)

    def describe(self, x, mem, options: CellOptions) -> PlainCell:
        n, cin, h, w = x.shape[-4:]
        surrogate, quant = options.surrogate, options.quant
        return PlainCell(
            x.shape[0] if options.sequence else 1,
            *(n, cin, mem.shape[1], h, w),
            *(surrogate.p0, surrogate.p1, DTYPES[x.dtype]),
            *options.kernel_size,
            *options.stride,
            *options.dilation,
            POOLS[options.pool],
            *options.pool_size,
            RESETS[options.reset],
            surrogate.kind,
            options.inhibition,
            0 if quant is None else quant.levels.numel(),
        )

    def sizes(self, cell: PlainCell) -> Sizes:
        sizes = Sizes()
        self._call("snnlstm_sizes", cell, byref(sizes))
        return sizes

    def pack(self, cell: PlainCell, weight: torch.Tensor, count: int, backward: bool):
        packed, weight = nan(count), weight.contiguous()
        addresses = [(packed, "packed", True), (weight, "weight", False)]
        for t, name, writable in addresses:
            self.emulator.register(t.data_ptr(), t.untyped_storage().nbytes(), name, writable)
        try:
            pointers = c_void_p(weight.data_ptr()), int(backward), c_void_p(packed.data_ptr())
            self._call("snnlstm_pack_weight", cell, *pointers)
        finally:
            for t, *_ in addresses:
                self.emulator.unregister(t.data_ptr())
        return packed

    def _constants(self, dtype, threshold, options) -> dict:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        levels = None if options.quant is None else options.quant.levels.to(real).contiguous()
        return {"threshold": threshold.to(dtype).reshape(-1).contiguous(), "levels": levels}

    def forward(
        self, x, syn, mem, weight, bias, threshold, graded, options, training=False, out_last=False
    ):
        """spk, syn, mem and (gates, syn, winner); out_last: outputs in channels-last layout."""
        cell = self.describe(x, mem, options)
        sizes = self.sizes(cell)
        (n, c, ho, wo), (ph, pw) = mem.shape, options.pool_size
        time = (x.shape[0],) if options.sequence else ()
        state = (*(time if options.record else ()), n, c, ho, wo)
        given = {
            "x": x,
            "syn0": syn,
            "mem0": mem,
            "weight": self.pack(cell, weight, sizes.packed_forward, False),
            "bias": bias,
            **self._constants(x.dtype, threshold, options),
            "spk": nan_like((*time, n, c, ho // ph, wo // pw), x, out_last),
            "syn": nan_like(state, x, out_last),
            "mem": nan_like(state, x, out_last),
            "saved_gates": nan(sizes.saved_gates) if training else None,
            "saved_syn": nan(sizes.saved_syn) if training else None,
            "winner": torch.full((cell.T, n), -7) if options.inhibition else None,
            "workspace": nan(sizes.forward_workspace),
        }
        outputs = ("spk", "syn", "mem", "saved_gates", "saved_syn", "winner", "workspace")
        self._run(
            "snnlstm_forward",
            cell,
            given,
            outputs,
            threshold_stride=int(given["threshold"].numel() > 1),
            graded=graded,
            record=options.record,
        )
        saved = given["saved_gates"], given["saved_syn"], given["winner"]
        return given["spk"], given["syn"], given["mem"], saved

    def backward(
        self, x, syn, mem, weight, threshold, graded, options, saved, grads, noise=None, last=False
    ):
        """Gradients of x, syn, mem, weight, bias and threshold; grads: of spk, syn and mem."""
        cell = self.describe(x, mem, options)
        sizes = self.sizes(cell)
        given = {
            "x": x,
            "syn0": syn,
            "mem0": mem,
            "weight": self.pack(cell, weight, sizes.packed_backward, True),
            **self._constants(x.dtype, threshold, options),
            "saved_gates": saved[0],
            "saved_syn": saved[1],
            "winner": saved[2],
            "noise": noise,
            **dict(zip(("grad_spk", "grad_syn", "grad_mem"), grads)),
            "grad_x": nan_like(tuple(x.shape), x, last),
            "grad_syn0": nan_like(tuple(syn.shape), x, last),
            "grad_mem0": nan_like(tuple(mem.shape), x, last),
            "grad_weight": nan_like(tuple(weight.shape), x),
            "grad_bias": nan_like((weight.shape[0],), x),
            "grad_threshold": nan_like((mem.shape[1],), x),
            "workspace": nan(sizes.backward_workspace),
        }
        outputs = tuple(
            f"grad_{name}" for name in ("x", "syn0", "mem0", "weight", "bias", "threshold")
        )
        self._run(
            "snnlstm_backward",
            cell,
            given,
            (*outputs, "workspace"),
            threshold_stride=int(given["threshold"].numel() > 1),
            graded=graded,
            record=options.record,
        )
        return tuple(given[name] for name in outputs)


def library(variant: str = "plain") -> Path:
    return build("cell", SOURCES, variant)
