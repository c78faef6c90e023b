"""A model of CUDA's streams for emulated kernels, which in truth run one after the other.

Work on a stream may read what was written on the same stream before, or on one that the stream has
waited for. :class:`Streams` notes where each read finds another write. Autograd runs a node's
backward pass on the stream of its forward pass, after what the gradients come from; what it does
between nodes is in order, too.

An allocator of CUDA memory hands out at once what was freed on the same stream, and knows nothing
of other streams. A kernel may therefore write only to memory that was allocated on its own stream.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.simt.backend import Core

Span = tuple[int, int]
Clock = Counter[int]  # by stream: how many of its launches are over


class Write(NamedTuple):
    start: int
    end: int
    stream: int | None  # None: between nodes
    number: int  # among the stream's launches
    clock: Clock  # what is over when it is


def span(tensor: torch.Tensor) -> Span:
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = 0 if tensor.numel() == 0 else (last + 1) * tensor.itemsize
    return tensor.data_ptr(), tensor.data_ptr() + size


class Streams(TorchDispatchMode):
    """Within the block, kernels and torch's operators run on the stream that :meth:`on` names."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self._core = core
        self._writes: list[Write] = []
        self._allocated: list[tuple[Span, int | None]] = []  # and the stream
        self._clocks: dict[int, Clock] = {}
        self.races: list[str] = []
        self.backward: set[int] = set()  # the streams of kernels of backward passes

    def __enter__(self) -> Streams:
        self._now: int | None = None
        self._in_backward = False
        self._core.module.watch(self._kernel)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._core.module.watch(None)
        self._enter(None)

    def _enter(self, stream: int | None) -> None:
        self._now = stream
        self._core.kernels.now = stream or 0

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """The block's calls run on `stream`."""
        self._enter(stream)
        try:
            yield
        finally:
            self._enter(None)

    def wait(self, stream: int, other: int) -> None:
        """What comes on `stream` waits for what is on the other one now."""
        self._clock(stream).update(self._clock(other) - self._clock(stream))

    def follow(self, node: Any) -> None:
        """The backward pass of `node`, which was made on the current stream, runs on that, too."""
        assert self._now is not None
        stream = self._now

        def before(grads: Iterable[torch.Tensor | None]) -> None:
            self._enter(stream)
            self._in_backward = True
            for write in self._written(span(g) for g in grads if g is not None):
                self._clock(stream).update(write.clock - self._clock(stream))

        def after(*_: Any) -> None:
            self._in_backward = False
            self._enter(None)

        node.register_prehook(before)
        node.register_hook(after)

    def _clock(self, stream: int) -> Clock:
        return self._clocks.setdefault(stream, Counter())

    def _written(self, spans: Iterable[Span]) -> list[Write]:
        spans = list(spans)
        return [w for w in self._writes if any(w.start < e and s < w.end for s, e in spans)]

    def _run(self, what: str, reads: Iterable[Span], writes: Iterable[Span]) -> None:
        """Note a piece of work on the current stream."""
        stream, number, clock = self._now, 0, Counter[int]()
        seen = self._written(reads)
        if stream is None:
            for write in seen:
                clock |= write.clock
        else:
            self._clock(stream)[stream] += 1
            clock, number = Counter(self._clock(stream)), self._clock(stream)[stream]
            self.races += [
                f"{what} on stream {stream} reads what stream {write.stream} writes"
                for write in seen
                if write.stream is not None and write.number > clock[write.stream]
            ]
        for start, end in writes:
            self._forget((start, end))
            self._writes.append(Write(start, end, stream, number, clock))

    def _forget(self, memory: Span) -> None:
        """Nobody has written to the memory: it is new, or somebody overwrites it."""
        start, end = memory
        rest = [(w, (w.start, min(w.end, start))) for w in self._writes]
        rest += [(w, (max(w.start, end), w.end)) for w in self._writes]
        self._writes = [w._replace(start=s, end=e) for w, (s, e) in rest if s < e]

    def _kernel(self, stream: int, arrays: list[tuple[int, int, bool, bool]]) -> None:
        assert stream == (self._now or 0)
        if self._in_backward:
            self.backward.add(stream)
        reads = [(start, end) for start, end, read, _ in arrays if read]
        writes = [(start, end) for start, end, _, written in arrays if written]
        self.races += [
            f"a kernel on stream {stream} writes to memory of stream {owner}"
            for (start, end), owner in self._allocated
            if owner not in (None, stream) and any(s < end and start < e for s, e in writes)
        ]
        self._run("a kernel", reads, writes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("detach", "alias"):
            return out
        given, made = (
            [span(t) for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        if "empty" in name:  # the allocator gives no memory of another stream's
            for start, end in made:
                self._forget((start, end))
                others = [a for a in self._allocated if a[0][1] <= start or end <= a[0][0]]
                self._allocated = [*others, ((start, end), self._now)]
        else:
            self._run(name, given, made)
        return out
