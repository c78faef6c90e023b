"""The project's CUDA kernels, emulated, in the place of snnlstm's native path.

    core = simt_core("checked")
    with core.installed():
        snnlstm.SConv2dLSTM(...)  # on CPU tensors: runs the kernels of csrc/cuda

:meth:`Core.forward` and :meth:`Core.backward` take and return what those of snnlstm.native do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from ctypes import c_double, c_int64, c_void_p

import torch
from builder import HERE, ROOT, build
from emulator import EmulationError, Emulator, symbolise
from torch import Tensor

from snnlstm import native
from snnlstm.options import CellOptions

SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
BRIDGE = HERE / "bridge" / "bridge.cpp"

# The numbers of csrc/args.h and csrc/cuda/api.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
RESETS = {"subtract": 0, "zero": 1, "none": 2}
POOLS = {"none": 0, "max": 1, "avg": 2}
MATRIX = {"exact": 0, "tf32": 1, "tf32x3": 2, "float16": 3, "bfloat16": 4}
ALGORITHM = {"automatic": 0, "fma": 1, "mma": 2}


class _View(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64 * 5))


def _struct(name: str, **fields: str) -> type[ctypes.Structure]:
    """A mirror of a struct of bridge.cpp: the names of its members, by type."""
    types = {"view": _View, "integer": c_int64, "real": c_double, "address": c_void_p}
    listed = [(field, types[kind]) for kind, names in fields.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": listed})


_Cell = _struct(
    "_Cell",
    integer="dtype T N Cin C H W kernel_h kernel_w stride_h stride_w dilation_h dilation_w "
    "pool pool_h pool_w reset surrogate inhibition num_levels",
    real="p0 p1",
)
_Forward = _struct(
    "_Forward",
    view="x syn0 mem0 spk syn mem",
    address="weight bias threshold levels saved_gates saved_syn winner workspace",
    integer="threshold_stride record",
    real="graded",
)
_Backward = _struct(
    "_Backward",
    view="x syn0 mem0 noise grad_spk grad_syn grad_mem grad_x grad_syn0 grad_mem0",
    address="weight threshold levels saved_gates saved_syn winner grad_weight grad_bias "
    "grad_threshold workspace",
    integer="threshold_stride record",
    real="graded",
)


def _view(tensor: Tensor | None) -> _View:
    if tensor is None:
        return _View()
    strides = tensor.stride()
    return _View(tensor.data_ptr(), (c_int64 * 5)(*((0,) * (5 - len(strides))), *strides))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


class Core(Emulator):
    """The emulator's settings, and the entry points of csrc/cuda/api.h."""

    def reset(self) -> None:
        super().reset()
        self.target()

    def target(
        self,
        compute_capability: int = 80,
        multiprocessors: int = 108,
        shared_bytes: int = 163 * 1024,
        matrix: str = "exact",
        algorithm: str = "automatic",
    ) -> None:
        """What the launchers are told of the device and of the precision that is wanted."""
        self.compute_capability(compute_capability)
        self._call(
            "core_target",
            *(compute_capability, multiprocessors, shared_bytes),
            *(MATRIX[matrix], ALGORITHM[algorithm]),
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, snnlstm's native path for CPU tensors is this core."""
        ours = {
            "forward": self.forward,
            "backward": self.backward,
            "name": lambda device, options: f"{device}-simt",
            "last_name": lambda: "cpu-simt",
        }
        before = {name: getattr(native, name) for name in ours if hasattr(native, name)}
        try:
            for name in before:
                setattr(native, name, ours[name])
            yield
        finally:
            for name, function in before.items():
                setattr(native, name, function)

    def forward(
        self,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threshold: Tensor,
        graded: float,
        options: CellOptions,
        training: bool,
        algorithm: str = "auto",
    ) -> native.Result:
        """As :func:`snnlstm.native.forward`."""
        cell = _cell(x, mem, options)
        sizes = self._sizes(cell)
        packed = self._pack(cell, weight, sizes[0], backward=False)
        keep = [packed, None if bias is None else bias.detach().contiguous()]
        keep += [_threshold(threshold, x.dtype), _levels(options, x.dtype), _bytes(sizes[4])]
        spk, new_syn, new_mem, _ = native.empty_result(x, mem, options, False)
        saved = None
        if training:
            count = cell.T * cell.N if options.inhibition else 0
            winner = torch.empty(count, dtype=torch.int64)
            saved = native.Saved(_bytes(sizes[2]), _bytes(sizes[3]), winner)
        args = _Forward(
            *map(_view, (x, syn, mem, spk, new_syn, new_mem)),
            *map(_address, keep[:4]),
            *map(_address, saved or (None, None, None)),
            _address(keep[4]),
            int(threshold.numel() > 1),
            int(options.record),
            graded,
        )
        self._call("core_forward", ctypes.byref(cell), ctypes.byref(args))
        return native.Result(spk, new_syn, new_mem, saved)

    def backward(
        self,
        x: Tensor,
        syn: Tensor,
        mem: Tensor,
        weight: Tensor,
        threshold: Tensor,
        graded: float,
        options: CellOptions,
        saved: native.Saved,
        grad_spk: Tensor | None,
        grad_syn: Tensor | None,
        grad_mem: Tensor | None,
        wanted: Sequence[bool],
        algorithm: str = "auto",
    ) -> native.Gradients:
        """As :func:`snnlstm.native.backward`."""
        cell = _cell(x, mem, options)
        sizes = self._sizes(cell)
        grads = native.empty_gradients(x, syn, mem, weight, wanted)
        keep = [self._pack(cell, weight, sizes[1], backward=True), _threshold(threshold, x.dtype)]
        keep += [_levels(options, x.dtype), native._noise(x, mem, options, grad_spk)]
        workspace = _bytes(sizes[5])
        views = (x, syn, mem, keep[3], grad_spk, grad_syn, grad_mem, grads.x, grads.syn, grads.mem)
        args = _Backward(
            *map(_view, views),
            *map(_address, (*keep[:3], *saved, grads.weight, grads.bias, grads.threshold)),
            _address(workspace),
            int(threshold.numel() > 1),
            int(options.record),
            graded,
        )
        self._call("core_backward", ctypes.byref(cell), ctypes.byref(args))
        if grads.threshold is not None:
            total = grads.threshold.sum() if threshold.numel() == 1 else grads.threshold
            grads = grads._replace(threshold=total.reshape(threshold.shape).to(threshold.dtype))
        return grads

    def _sizes(self, cell: _Cell) -> list[int]:
        sizes = (c_int64 * 6)()
        self._call("core_sizes", ctypes.byref(cell), sizes)
        return list(sizes)

    def _pack(self, cell: _Cell, weight: Tensor, size: int, backward: bool) -> Tensor:
        packed, weight = _bytes(size), weight.detach().contiguous()
        addresses = c_void_p(weight.data_ptr()), int(backward), c_void_p(packed.data_ptr())
        self._call("core_pack", ctypes.byref(cell), *addresses)
        return packed

    def _call(self, name: str, *args) -> None:
        function = getattr(self.lib, name)
        function.restype = ctypes.c_char_p
        problem = function(*args)
        if problem:
            raise EmulationError(symbolise(problem.decode()))


def _cell(x: Tensor, mem: Tensor, options: CellOptions) -> _Cell:
    surrogate, quant = options.surrogate, options.quant
    return _Cell(
        DTYPES[x.dtype],
        x.shape[0] if options.sequence else 1,
        x.shape[-4],
        x.shape[-3],
        mem.shape[1],
        *x.shape[-2:],
        *options.kernel_size,
        *options.stride,
        *options.dilation,
        POOLS[options.pool],
        *options.pool_size,
        RESETS[options.reset],
        surrogate.kind,
        int(options.inhibition),
        0 if quant is None else quant.levels.numel(),
        surrogate.p0,
        surrogate.p1,
    )


def _threshold(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    return threshold.detach().to(dtype).reshape(-1).contiguous()


def _levels(options: CellOptions, dtype: torch.dtype) -> Tensor | None:
    return None if options.quant is None else options.quant.levels.to(dtype).contiguous()


@functools.cache
def simt_core(variant: str = "plain", defines: tuple[str, ...] = ()) -> Core:
    """Builds and loads the emulated core; see builder.VARIANTS."""
    return Core(build("core", list(SOURCES), variant, defines, (HERE,), (BRIDGE,)))
