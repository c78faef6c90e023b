"""The emulated cell: csrc/cuda's entry points on CPU tensors, through ctypes.

``Cell(emulator).forward(...)`` takes torch tensors and a ``CellOptions``. Outputs, saved tensors and
workspaces are filled with NaN first, and every array is registered, so that the emulation sees
whatever is read before it was written, or lies outside.
"""

from __future__ import annotations

import contextlib
import ctypes
from ctypes import POINTER, Structure, byref, c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from build import build
from emulator import EmulationError, Emulator, symbolise

from snnlstm.options import CellOptions

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), Path(__file__).parent / "kernels/cell.cpp"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
RESETS = {"subtract": 0, "zero": 1, "none": 2}
POOLS = {"none": 0, "max": 1, "avg": 2}
MATRIX = {"exact": 0, "tf32": 1, "tf32x3": 2, "float16": 3, "bfloat16": 4}
ALGORITHMS = {"automatic": 0, "fma": 1, "mma": 2}


class CellStruct(Structure):
    _fields_ = [
        ("dtype", c_int),
        *((name, c_int64) for name in ("T", "N", "Cin", "C", "H", "W")),
        *((f"{name}_{axis}", c_int) for name in ("kernel", "stride", "dilation") for axis in "hw"),
        ("pool", c_int),
        ("pool_h", c_int),
        ("pool_w", c_int),
        ("reset", c_int),
        ("surrogate", c_int),
        ("p0", c_double),
        ("p1", c_double),
        ("inhibition", c_bool),
        ("num_levels", c_int),
    ]


class View(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64 * 5)]


class ForwardArgs(Structure):
    _fields_ = [
        ("cell", CellStruct),
        ("x", View),
        ("syn0", View),
        ("mem0", View),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("threshold", c_void_p),
        ("threshold_stride", c_int64),
        ("graded", c_double),
        ("levels", c_void_p),
        ("record", c_bool),
        ("spk", View),
        ("syn", View),
        ("mem", View),
        ("saved_gates", c_void_p),
        ("saved_syn", c_void_p),
        ("winner", c_void_p),
        ("workspace", c_void_p),
        ("threads", c_int),
    ]


class BackwardArgs(Structure):
    _fields_ = [
        ("cell", CellStruct),
        ("x", View),
        ("syn0", View),
        ("mem0", View),
        ("weight", c_void_p),
        ("threshold", c_void_p),
        ("threshold_stride", c_int64),
        ("graded", c_double),
        ("levels", c_void_p),
        ("saved_gates", c_void_p),
        ("saved_syn", c_void_p),
        ("winner", c_void_p),
        ("noise", View),
        ("grad_spk", View),
        ("grad_syn", View),
        ("grad_mem", View),
        ("record", c_bool),
        ("grad_x", View),
        ("grad_syn0", View),
        ("grad_mem0", View),
        ("grad_weight", c_void_p),
        ("grad_bias", c_void_p),
        ("grad_threshold", c_void_p),
        ("workspace", c_void_p),
        ("threads", c_int),
    ]


class Target(Structure):
    _fields_ = [
        ("compute_capability", c_int),
        ("multiprocessors", c_int),
        ("shared_bytes", c_int64),
        ("stream", c_void_p),
        ("matrix", c_int),
        ("algorithm", c_int),
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

    def __init__(self, library: Path, matrix: str = "exact", algorithm: str = "automatic", **target):
        self.emulator = Emulator(library)
        fields = {"compute_capability": 80, "multiprocessors": 4, "shared_bytes": 163 * 1024}
        self.target = Target(
            **{**fields, **target}, matrix=MATRIX[matrix], algorithm=ALGORITHMS[algorithm]
        )

    def _call(self, name: str, *args) -> None:
        function = getattr(self.emulator.lib, name)
        function.restype = ctypes.c_char_p
        problem = function(*args)
        if problem:
            raise EmulationError(symbolise(problem.decode()))

    @contextlib.contextmanager
    def _registered(self, **tensors: torch.Tensor | None):
        known = []
        try:
            for name, t in tensors.items():
                writable, name = name.endswith("_w"), name.removesuffix("_w")
                if t is None or t.numel() == 0:
                    continue
                storage = t.untyped_storage()
                if storage.data_ptr() in known:
                    continue
                self.emulator.register(storage.data_ptr(), storage.nbytes(), name, writable)
                known.append(storage.data_ptr())
            yield
        finally:
            for address in known:
                self.emulator.unregister(address)

    def describe(self, x, mem, options: CellOptions) -> CellStruct:
        n, cin, h, w = x.shape[-4:]
        surrogate, quant = options.surrogate, options.quant
        return CellStruct(
            DTYPES[x.dtype],
            x.shape[0] if options.sequence else 1,
            *(n, cin, mem.shape[1], h, w),
            *options.kernel_size,
            *options.stride,
            *options.dilation,
            POOLS[options.pool],
            *options.pool_size,
            RESETS[options.reset],
            surrogate.kind,
            surrogate.p0,
            surrogate.p1,
            options.inhibition,
            0 if quant is None else quant.levels.numel(),
        )

    def sizes(self, cell: CellStruct) -> Sizes:
        sizes = Sizes()
        self._call("snnlstm_sizes", byref(cell), byref(self.target), byref(sizes))
        return sizes

    def pack(self, cell: CellStruct, weight: torch.Tensor, count: int, backward: bool):
        packed, weight = nan(count), weight.contiguous()
        with self._registered(packed_w=packed, weight=weight):
            self._call(
                "snnlstm_pack_weight",
                byref(cell),
                c_void_p(weight.data_ptr()),
                int(backward),
                c_void_p(packed.data_ptr()),
                byref(self.target),
            )
        return packed

    def common(self, x, threshold, options):
        real = torch.float64 if x.dtype == torch.float64 else torch.float32
        levels = None if options.quant is None else options.quant.levels.to(real).contiguous()
        thresholds = threshold.to(x.dtype).reshape(-1).contiguous()
        return thresholds, int(thresholds.numel() > 1), levels

    def forward(
        self, x, syn, mem, weight, bias, threshold, graded, options, training=False, out_last=False
    ):
        """spk, syn, mem and (gates, syn, winner); out_last: outputs in channels-last layout."""
        cell = self.describe(x, mem, options)
        sizes = self.sizes(cell)
        packed = self.pack(cell, weight, sizes.packed_forward, False)
        thresholds, stride, levels = self.common(x, threshold, options)
        (n, c, ho, wo), (ph, pw) = mem.shape, options.pool_size
        time = (x.shape[0],) if options.sequence else ()
        state = (*(time if options.record else ()), n, c, ho, wo)
        spk = nan_like((*time, n, c, ho // ph, wo // pw), x, out_last)
        new_syn, new_mem = nan_like(state, x, out_last), nan_like(state, x, out_last)
        gates = nan(sizes.saved_gates) if training else None
        saved_syn = nan(sizes.saved_syn) if training else None
        winner = torch.full((cell.T, n), -7, dtype=torch.int64)
        workspace = nan(sizes.forward_workspace)
        args = ForwardArgs(
            cell,
            _view(x),
            _view(syn),
            _view(mem),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            thresholds.data_ptr(),
            stride,
            graded,
            None if levels is None else levels.data_ptr(),
            options.record,
            _view(spk),
            _view(new_syn),
            _view(new_mem),
            None if gates is None else gates.data_ptr(),
            None if saved_syn is None else saved_syn.data_ptr(),
            winner.data_ptr() if options.inhibition else None,
            workspace.data_ptr(),
            1,
        )
        with self._registered(
            x=x,
            syn=syn,
            mem=mem,
            packed=packed,
            bias=bias,
            threshold=thresholds,
            levels=levels,
            spk_w=spk,
            new_syn_w=new_syn,
            new_mem_w=new_mem,
            gates_w=gates,
            saved_syn_w=saved_syn,
            winner_w=winner,
            workspace_w=workspace,
        ):
            self._call("snnlstm_forward", byref(args), byref(self.target))
        return spk, new_syn, new_mem, (gates, saved_syn, winner)


def library(variant: str = "plain") -> Path:
    return build("cell", SOURCES, variant)


__all__ = ["BackwardArgs", "Cell", "EmulationError", "POINTER", "library"]
