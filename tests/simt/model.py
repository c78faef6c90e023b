"""The model of csrc/cuda/estimate.h once more, in Python and by itself: every way of a pass with
every block, tile and number of splits, for layers of stride 1 without pooling. Tests judge the
core's choice by it. On tensor cores tiles whose rows meet the same banks count only if there are no
others. Times are in seconds, and the constants are the core's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.estimate import TYPES, Gpu, arguments

FIRST_LAYER = 4  # the most channels of x whose gradient nobody wants
FMA_TIME = {64: 1.0, 32: 817 / 730, 16: 954 / 730}


def up(number: int, of: int) -> int:
    return -(-number // of) * of


def counted(number: int, of: int) -> int:
    return -(-number // of)


def preferred(found: list[tuple[bool, Work]]) -> list[Work]:
    """What is marked, or everything if nothing is."""
    return [work for marked, work in found if marked] or [work for _, work in found]


class Work(NamedTuple):
    """What a launch does; the fields of csrc/cuda/estimate.h."""

    blocks: int
    warps: int
    shared: int
    products: float
    cache: float
    cycles: float
    memory: float
    mma: bool


class Model:
    """The seconds of a layer's passes on a card."""

    def __init__(self, gpu: Gpu, case: Case, dtype: str) -> None:
        self.gpu, self.c, self.dtype, card = gpu, case, dtype, gpu.card
        self.of = gpu.core.cuda_model() | dict(gpu.model)
        self.states, self.matrix = TYPES[dtype][0], arguments(gpu, case, dtype)[2]
        self.size = 2 if self.states >= 2 else 4
        self.capability, self.processors = card["capability"], card["multiprocessors"]
        self.clock, self.bytes = 1e9 * card["gigahertz"], 1e9 * card["gigabytes"]
        self.cp = up(case.cout, 8)
        self.taps = case.kernel[0] * case.kernel[1]
        self.pixels = case.height * case.width
        self.state = case.batch * case.cout * self.pixels * self.size
        self.x = case.batch * case.cin * self.pixels * self.size
        half = self.states >= 2 or self.matrix >= 3
        new = self.capability >= 80
        fp16 = self.states == 2 or self.matrix == 3
        self.multiply = (
            "half" if half and (new or fp16)
            else "fma" if not new or self.matrix == 0
            else ("tf32", "tf32x3")[self.matrix - 1]
        )  # fmt: skip
        self.mma, self.parts = self.multiply != "fma", self.multiply == "tf32x3"
        self.element = 2 if self.multiply == "half" else 4

    # ---- launches --------------------------------------------------------------------------

    def rate(self, mma: bool) -> float:
        card, of = self.gpu.card, self.of
        each = self.clock * self.processors
        if not mma:
            wide = card["fp32"] > 64
            return each * card["fp32"] * of["fma_part_of_128" if wide else "fma_part"]
        by_age = {120: 1.0, 100: 0.5, 90: 0.62}
        part = next((part for age, part in by_age.items() if self.capability >= age), 1.0)
        kind = card["half"] if self.multiply == "half" else card["tf32"] / (3 if self.parts else 1)
        return each * kind * part * of["mma_part"]

    def moving(self, count: float) -> float:
        return count / (self.bytes * self.of["memory_part"])

    def seconds(self, w: Work) -> float:
        of = self.of
        kept = 1024 if self.capability >= 80 else 0
        room = 1024 * self.gpu.card["shared_kib"] + kept
        each = counted(w.blocks, self.processors)
        together = min(max(min(16 // w.warps, room // max(w.shared + kept, 1)), 1), each)
        busy = min(1.0, w.warps * together / of["warps"])
        block = max(
            w.products * self.processors / (self.rate(w.mma) * busy),
            w.cache / (of["cache_bytes"] * self.clock),
        )
        block += w.cycles / self.clock
        rounds = counted(each, max(together, 1))
        return max(each * block + rounds * of["block"], self.moving(w.memory))

    # ---- steps -----------------------------------------------------------------------------

    def depth(self, channels: int, may_patch: bool) -> tuple[int, int, bool]:
        """K with its padding, the taps of the walk, and whether the taps lie side by side."""
        if not self.mma:
            return up(self.taps * channels, 16), self.taps, False
        step = 32 // self.element
        plain, patched = self.taps * up(channels, step), up(self.taps * channels, step)
        patches = may_patch and channels <= 4 and self.taps * channels <= 4 * step
        return (patched, 1, True) if patches and patched < plain else (plain, self.taps, False)

    def pitch(self, w: int, patches: bool) -> int:
        """Pixels from one row of a neighbourhood to the next."""
        if patches:
            return w
        columns = w + self.c.kernel[1] - 1
        pitch = up(columns + 1, 2)
        wanted = pitch + (w - pitch % 16 + 32) % 16
        return wanted if w % 16 and 5 * wanted <= 8 * columns else pitch

    def neighbourhood(self, h: int, w: int, patches: bool) -> int:
        rows = h if patches else h + self.c.kernel[0] - 1
        pixels = rows * self.pitch(w, patches)
        return up(64 * pixels + 16 * (pixels // 2) + 16, 128)

    def fits_banks(self, w: int, *patches: bool) -> bool:
        """Whether the rows of a tile lie on shared memory's banks as one long row would."""
        return w % 16 == 0 or all((self.pitch(w, of) - w) % 16 == 0 for of in patches)

    def tiles(self, pixels: int) -> Iterator[tuple[int, int, int]]:
        """Height and width of each tile of so many pixels, and the tiles of an image."""
        height, width = self.c.height, self.c.width
        for h in range(1, height + 1):
            for w in range(2, min(pixels // h, up(width, 2)) + 1, 2):
                yield h, w, counted(height, h) * counted(width, w)

    def steps(self, gates: bool, columns: int, images: int, memory: float, neuron: float):
        """The work of each block and tile: gates of x and mem, or data from d_gates."""
        c, pair = self.c, 1024 if self.parts else 512
        sources = ((c.cin, True), (c.cout, False)) if gates else ((4 * self.cp, False),)
        depths = [(channels, *self.depth(channels, patch)) for channels, patch in sources]
        of_warp = (4 if columns <= 8 else 8) if gates else (2 if columns <= 32 else 8)
        if not self.mma:
            shapes = [(64 // n, 0, n) for n in ((4, 2) if gates else (4, 2, 1))]
        elif gates:
            shapes = [(m, n, 1) for m in (4, 2) for n in (2, 1) if n == 1 or columns > 16]
        else:
            shapes = [(2, 2, 1)] if 16 < columns <= 32 else [(4, 1, 1), (2, 1, 2)]
        for m, n, k in shapes:
            own = 8 * of_warp * n if self.mma else 16 * k
            pixels = 32 * m if self.mma else 4096 // own
            channels = own // 4 if gates else own
            warps = m * n * k if self.mma else 4
            found = []
            for h, w, count in self.tiles(pixels):
                cache = products = 0.0
                for of, deep, _, _ in depths:
                    products += deep * pixels * own * (1 if self.mma else FMA_TIME[own])
                    cache += deep * own * self.element * (2 if self.parts else 1)
                    reach = (h + c.kernel[0] - 1) * (w + c.kernel[1] - 1)
                    cache += reach * of * self.element
                shared = 0
                if self.mma:
                    unit = n * (of_warp // 2) * pair
                    most = 16 * pair if self.capability >= 80 else min(16 * pair, 1024 * warps)
                    units = sum(deep * self.element // 32 for _, deep, _, _ in depths)
                    stage = max(min(most // unit, units), 1) * unit
                    buffer = max(self.neighbourhood(h, w, patch) for *_, patch in depths)
                    walk = 2 * buffer + 4 * stage + 64 + 16 * sum(taps for _, _, taps, _ in depths)
                    parked = 32 * warps * 32 * (of_warp // 2 if gates else of_warp)
                    shared = up(max(walk, parked), 128)
                    shared += channels * 4 * (5 if gates else 1 + k * m)
                elif not gates:
                    deep = 8 if own == 16 else 16
                    shared = 4 * (pixels // 64 * own + 5 * own // 4) + 8 * deep * (pixels + own)
                    shared = up(shared, 16) + 32 * deep
                if shared <= 1024 * self.gpu.card["shared_kib"]:
                    blocks = images * count * counted(columns, channels)
                    cycles = neuron * channels * pixels
                    together = 32 if self.mma else 64
                    wide = up(columns, channels if self.mma else 8 if gates else 16)
                    whole = up(c.height * up(c.width, 2), together) * wide / (pixels * channels)
                    work = Work(blocks, warps, shared, products, cache, cycles, memory, self.mma,
                                whole)  # fmt: skip
                    fits = not self.mma or self.fits_banks(w, *(patch for *_, patch in depths))
                    found.append((fits, work))
            yield from preferred(found)

    def forward_steps(self) -> list[Work]:
        memory = self.x + 5 * self.state
        return list(self.steps(True, self.c.cout, self.c.batch, memory, self.of["neuron"]))

    def backward_steps(self) -> list[Work]:
        of = self.of["neuron_backward"]
        return list(self.steps(False, self.c.cout, self.c.batch, 19 * self.state, of))

    # ---- gradients of x and weight ---------------------------------------------------------

    def weights(self) -> list[Work]:
        """The work of each way to form the weight's gradient, whatever the splits are: without
        tensor cores if there are none, or if their tiles do not fit."""
        return (self.mma_weights() if self.mma else []) or list(self.fma_weights())

    def fma_weights(self) -> Iterator[Work]:
        c = self.c
        moved = c.steps * (self.x + 5 * self.state)
        for own in (64, 32):
            rows, columns = up(4 * self.cp, own), up(self.taps * (c.cin + c.cout), 4096 // own)
            blocks, total = rows * columns // 4096, c.steps * c.batch * self.pixels
            for splits in range(1, self.most_splits(blocks, total // 256) + 1):
                share = up(counted(total, splits), 16)
                yield Work(blocks * splits, 4, 0, 4096 * share * FMA_TIME[own],
                           4.0 * (own + 4096 // own) * share, 0,
                           moved + 8.0 * splits * rows * columns, False)  # fmt: skip

    def most_splits(self, blocks: int, by_size: int) -> int:
        """At most 8 rounds of one block for each multiprocessor, and 256 pixels or more a split."""
        return max(min(8 * self.processors // blocks, by_size, 1024), 1)

    def mma_weights(self) -> list[Work]:
        c, found = self.c, []
        moved = c.steps * (self.x + 5 * self.state)
        wide = 64 // self.element
        for most in (4, 2, 1):
            for h, w, count in self.tiles(64):
                blocks = shared = threads = 0
                products = cache = parts = 0.0
                patched = []
                for channels, patch in ((c.cin, True), (c.cout, False)):
                    _, taps, patches = self.depth(channels, patch)
                    patched.append(patches)
                    across = self.taps * channels if patches else channels
                    groups, rows = min(counted(taps, 3), 3), most
                    while rows > 1 and (64 * rows * groups > 384 or 16 * rows >= 4 * self.cp):
                        rows //= 2
                    columns = up(across, 32) // 32 * counted(taps, 3 * groups)
                    blocks += columns * (up(4 * self.cp, 32 * rows) // (32 * rows))
                    parts += up(4 * self.cp, 32 * rows) * taps * up(across, 32)
                    products = max(products, 32 * rows * 32 * 3 * groups * 64)
                    cache = max(cache, 4.0 * (32 * rows + 32) * 64)
                    buffer = self.neighbourhood(h, w, patches)
                    stage = 384 + 2 * (rows * 32 // wide * 4672 + 32 // wide * buffer)
                    shared, threads = max(shared, stage), max(threads, 64 * rows * groups)
                shared += 192 * threads
                total = c.steps * c.batch * count
                if shared > 1024 * self.gpu.card["shared_kib"]:
                    continue
                fits = self.fits_banks(w, *patched)
                for splits in range(1, self.most_splits(blocks, total // 4) + 1):
                    share = counted(total, splits)
                    work = Work(blocks * splits, threads // 32, shared, products * share,
                                cache * share, 0, moved + 8.0 * splits * parts, True)  # fmt: skip
                    found.append((fits, work))
        return preferred(found)

    def gradients(self) -> float:
        c, launch = self.c, self.of["launch"]
        seconds = min(map(self.seconds, self.weights())) + 4 * launch
        if c.cin > FIRST_LAYER:
            memory = c.steps * (4 * self.state + self.x)
            of_x = self.steps(False, c.cin, c.steps * c.batch, memory, 0)
            seconds += min(map(self.seconds, of_x)) + launch
        return seconds

    def cudnn(self, outputs: int, inputs: int, winograd: bool = False) -> float:
        card, new = self.gpu.card, self.capability >= 80
        half = self.states >= 2 or self.matrix >= 3
        tensor_cores = self.states >= 2 or self.matrix not in (0, 2)
        each = self.clock * self.processors
        fp16 = self.states == 2 or self.matrix == 3
        rate = (
            each * card["half"] if fp16 or (half and new)
            else each * card["fp32"] / 4 if half
            else each * card["tf32"] if self.matrix == 1 and new
            else each * card["fp32"]
        )  # fmt: skip
        plain = not half and not (self.matrix == 1 and new)
        part = "cudnn_winograd" if winograd and plain and self.c.kernel == (3, 3) else "cudnn_part"
        wide = (64, 32) if tensor_cores else (32, 8)
        padded = up(outputs, wide[0]) * up(inputs, wide[1])
        return padded * self.c.batch * self.pixels / (rate * self.of[part])

    def gradients_of_cudnn(self) -> float:
        c, of_x = self.c, self.c.cin > FIRST_LAYER
        gates = 4 * c.cout
        multiplying = self.cudnn(self.taps * c.cin, gates) + self.cudnn(self.taps * c.cout, gates)
        multiplying += self.taps * self.cudnn(c.cin, gates) if of_x else 0
        moved = self.moving((16 if of_x else 12) * self.state + 2 * self.x)
        return c.steps * max(multiplying, moved) + (8 if of_x else 7) * self.of["launch"]

    # ---- passes ----------------------------------------------------------------------------

    def pointwise(self, backward: bool) -> float:
        c, of, gates = self.c, self.of, 4 * self.c.cout
        operands = self.moving(5 * self.state if backward else 2 * self.x + 6 * self.state)
        multiplying = self.taps * (
            self.cudnn(c.cout, gates) if backward else self.cudnn(gates, c.cin + c.cout, True)
        )
        gpu = max(multiplying, operands) + self.moving((14 if backward else 9) * self.state)
        gpu += 3 * of["launch"]
        step = max(gpu, of["host"] * (1.5 if backward else 1))
        return c.steps * step + (self.gradients_of_cudnn() if backward else 0)

    def ways(self, backward: bool) -> dict[str, float]:
        """The seconds of each way, with the best of all its blocks, tiles and splits."""
        steps = self.backward_steps() if backward else self.forward_steps()
        one = {"pointwise": self.pointwise(backward)}
        ours = self.gradients() if backward else 0
        each = min(map(self.seconds, steps)) + self.of["launch"]
        one["fused"] = self.c.steps * each + ours
        if backward:
            one["hybrid"] = self.c.steps * each + self.gradients_of_cudnn()
        return one
