"""Defines the providers, which are the ways of running a layer or a network that are compared."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import snnlstm
from snnlstm.loops import backend

from . import devices
from .theirs import snntorch

Runner = tuple[Callable[[], object], Callable[[], object]]
"""A pair (setup, run), of which setup is not timed."""

MODES = ("inference", "training")
OPERANDS = {"autocast": torch.bfloat16, "autocast16": torch.float16}
WIDE = ("tf32", *OPERANDS)  # float32 tensors with other precisions of products
TOLERANCE = {
    "float64": (1e-10, 1e-8),
    "float32": (3e-5, 1e-3),
    "tf32": (5e-3, 5e-2),
    "autocast": (1e-1, 3e-1),
    "autocast16": (2e-2, 1e-1),
    "float16": (2e-2, 1e-1),
    "bfloat16": (1e-1, 3e-1),
}
"""The largest differences over a short sequence, by dtype: an absolute difference of states, and a
relative difference of a gradient in norm."""


class Unavailable(RuntimeError):
    """This error says that a form cannot run a case, by design."""


@dataclass(frozen=True)
class Setting:
    """All providers of a run share one setting.

    device: see benchmarks/devices.py. dtype: "float32", "tf32" (float32 tensors, tensor cores),
    "autocast" (float32 tensors under torch.autocast to bfloat16), "autocast16" (to float16),
    "float64", "bfloat16" or "float16".
    """

    device: str = "cpu"
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Returns the type of x, states and weights."""
        return torch.float32 if self.dtype in WIDE else getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """Returns the device of x, states and weights."""
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    def apply_precision(self) -> None:
        """Allows tensor cores for float32 under "tf32" and autocast, and forbids them otherwise."""
        torch.backends.cudnn.allow_tf32 = self.dtype in WIDE
        torch.backends.cuda.matmul.allow_tf32 = self.dtype in WIDE

    def context(self) -> AbstractContextManager[Any]:
        """Returns the context in which a provider runs, forward and backward."""
        if self.dtype in OPERANDS:
            return torch.autocast(self.torch_device.type, OPERANDS[self.dtype])
        return nullcontext()


class Form(NamedTuple):
    """A form is a cell's class, and the way that it is run; ours are made by `make(cell)`.

    backend: that of torch.compile, which compiles the function that has the loop over time.
    """

    title: str
    cell: Any = snnlstm.SConv2dLSTM
    sequences: bool = False
    compiled: bool = False
    backend: str = ""
    captured: bool = False
    algorithm: str = "auto"


_CELL: Any = snntorch and snntorch.SConv2dLSTM
FORMS = {
    "snntorch": Form("snnTorch eager, one call a time step", _CELL),
    "snntorch-compile": Form("snnTorch's cell under torch.compile", _CELL, compiled=True),
    "snntorch-cudagraph": Form("snnTorch in a CUDA graph", _CELL, captured=True),
    "snntorch-compile-graph": Form("both", _CELL, compiled=True, captured=True),
    "loop": Form("snnlstm in the same loop, one call a time step"),
    "loop-cudagraph": Form("our loop in a CUDA graph", captured=True),
    "sequence": Form("snnlstm, whole sequences in one call", sequences=True),
    "compiled-loop": Form('the loop under torch.compile, backend="snnlstm"', backend="snnlstm"),
    "inductor": Form("snnTorch's whole loop under torch.compile", _CELL, backend="inductor"),
    "sequence-cudagraph": Form("the same in a CUDA graph", sequences=True, captured=True),
}
BASELINE = "snntorch"
DEFAULT = (BASELINE, "loop", "sequence", "compiled-loop")


def find_form(name: str) -> Form:
    """Returns the form of a name; "sequence:direct" forces an algorithm.

    Raises ValueError that names an unknown provider or algorithm.
    """
    known, (name, _, algorithm) = snnlstm.calls.algorithms.ALGORITHMS, name.partition(":")
    if name not in FORMS or (algorithm and (name != "sequence" or algorithm not in known)):
        text = f"{', '.join(FORMS)}, or sequence:ALGORITHM of {', '.join(known)}"
        raise ValueError(f"--providers: {name}:{algorithm} is not known; known: {text}")
    return FORMS[name]._replace(algorithm=algorithm or "auto")


def forget_compiled() -> None:
    """Lets torch.compile begin anew, with no warning of the last network's number of steps."""
    torch._dynamo.reset()
    backend._graphs.clear()


@dataclass
class Compiling:
    """Tells what torch.compile did: its seconds of processor time, and the log's warnings.

    The time includes that of the C++ compilers that inductor starts.
    """

    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@contextmanager
def compiling() -> Iterator[Compiling]:
    """Watches torch.compile within the context, which alone gets the warnings of the log."""
    found, begun = Compiling(), 0.0

    def begin(_: object) -> None:
        nonlocal begun
        begun = sum(os.times()[:4])

    def end(_: object) -> None:
        found.seconds += sum(os.times()[:4]) - begun

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.warnings.append(record.getMessage())  # type: ignore
    log, callbacks = logging.getLogger("snnlstm"), torch._dynamo.callback.callback_handler
    log.addHandler(handler)
    callbacks.register_start_callback(begin)
    callbacks.register_end_callback(end)
    try:
        yield found
    finally:
        callbacks.remove_start_callback(begin)
        callbacks.remove_end_callback(end)
        log.removeHandler(handler)


@contextmanager
def inductor_anew() -> Iterator[None]:
    """Lets inductor compile in this process, and also what it has compiled before."""
    from torch._inductor import config  # whose import takes seconds
    from torch._inductor.utils import fresh_cache

    with fresh_cache(), config.patch(compile_threads=1):
        yield


class Provider:
    """A provider runs a case, that is a layer or a network, in one form.

    Equal networks have equal weights. A case makes the module of a cell's class (`make`), has
    data (`batches`), runs it in a `loop` over time or by `sequences`, and has a training step
    (`train`), inference (`infer`) and the results to compare (`results`).
    """

    def __init__(self, case: Any, form: Form, setting: Setting) -> None:
        self.case, self.form, self.setting = case, form, setting
        if setting.torch_dtype not in (torch.float32, *case.dtypes):
            raise Unavailable(f"networks run in float32, not in {setting.dtype}")
        if form.captured and not (setting.device == "cuda" and case.captures):
            raise Unavailable("CUDA graphs need --device cuda, and a layer")
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        if form.backend == "snnlstm" and version < backend.OLDEST:
            raise Unavailable(f"compiled loops need torch {'.'.join(map(str, backend.OLDEST))}")
        self.over_time = case.sequences if form.sequences else case.loop
        if form.backend:
            self.over_time = torch.compile(self.over_time, backend=form.backend)
        setting.apply_precision()
        forget_compiled()  # graphs of the case before would count towards the recompile limit
        # In a run a default device would cost time in each call of torch.
        with torch.device("cuda") if setting.device == "cuda" else nullcontext():
            torch.manual_seed(0)
            self.net = case.make(form.cell).to(setting.torch_dtype)
            self.x, self.y = case.batches(setting.torch_dtype)[0]
        for cell in self.net.modules():
            if form.compiled and isinstance(cell, snntorch.SConv2dLSTM):
                cell.compile(dynamic=False)
        self.optimizer = case.optimizer(self.net.parameters())
        self.initial = copy.deepcopy(self.net.state_dict())

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function as this form runs; the algorithm holds within the call alone."""
        algorithm = self.form.algorithm
        forced = snnlstm.algorithm(algorithm) if algorithm != "auto" else nullcontext()
        with self.setting.context(), forced:
            return function(self.over_time, self.net, *arguments)

    @property
    def path(self) -> str:
        """Returns the names of what ran in layers of ours, with the reason against the kernels."""
        kinds = snnlstm.SConv2dLSTM, snnlstm.Leaky
        paths = [m.path for m in self.net.modules() if isinstance(m, kinds) and m.path]
        return ", ".join(dict.fromkeys(path.name if path.native else str(path) for path in paths))

    def prepare(self, mode: str) -> Runner:
        """Returns (setup, run): `setup` goes before each call of `run`, and only `run` is timed.

        Inference runs without gradients. In training the setup clears the gradients and moves the
        weights by about a rounding error, as an optimizer's step does between two batches. So a
        provider has to derive anew, while it is timed, what it derives from weights.
        """
        half = self.setting.torch_dtype.itemsize < 4
        factors = itertools.cycle((1.01 if half else 1 + 1e-6, 1.0))

        @torch.no_grad()
        def setup() -> None:
            if mode == "training":
                self.net.load_state_dict(self.initial)
                factor = next(factors)
                for parameter in self.net.parameters():
                    parameter.mul_(factor)
                for tensor in (*self.net.parameters(), *tree_leaves(self.x)):
                    tensor.grad = None

        def run() -> object:
            if mode == "training":
                return self.within(self.case.train, self.optimizer, self.x, self.y)
            with torch.no_grad():
                return self.within(self.case.infer, self.x)

        if not self.form.captured:
            return setup, run
        # Each replay overwrites the gradients in the graph's memory, so that none is cleared.
        return (lambda: None), devices.captured(run, setup)[0]

    def first_run(self, mode: str) -> tuple[Runner, Compiling]:
        """Returns what `prepare` returns, and what compiling took, for which it runs once."""
        if self.form.backend:
            forget_compiled()  # the comparison has compiled the graph of training
        setup, run = runner = self.prepare(mode)
        gc.collect()  # objects of other forms would be looked through while this one compiles
        anew = inductor_anew() if self.form.backend == "inductor" else nullcontext()
        with anew, compiling() as found:
            setup()
            run()
        return runner, found

    def spiking_threshold(self) -> Tensor:
        """Returns a layer's threshold for the comparison of spikes; see :meth:`Case`."""
        with self.setting.context():
            return self.case.spiking_threshold(self.net, *self.x)

    def results(self, threshold: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the case's results that all providers have in common, in float64 on the CPU.

        threshold: takes the place of a layer's own within this call.
        """
        torch.manual_seed(1)  # dropout
        if threshold is not None:
            own, self.net.threshold = self.net.threshold, threshold
        results = self.within(self.case.results, self.optimizer, self.x, self.y)
        if threshold is not None:
            self.net.threshold = own
        self.net.load_state_dict(self.initial)
        return {name: tensor.detach().double().cpu() for name, tensor in results.items()}

    def exact_loss(self) -> Tensor | None:
        """Returns a network's loss of a first training step in float64, by our reference path.

        It is None for layers, under autocast, and for one's own network, which may need float32.
        """
        case = self.case
        if not hasattr(case, "own_input") or case.own_input or case.autocast:
            return None
        torch.manual_seed(0)
        net = case.make(snnlstm.SConv2dLSTM).to(self.setting.device, torch.float64)
        x = tree_map(lambda t: t.double() if t.is_floating_point() else t, self.x)
        torch.manual_seed(1)  # dropout
        with snnlstm.algorithm("reference"):
            loss = case.train(case.loop, net, case.optimizer(net.parameters()), x, self.y)
        return loss.detach().cpu()
