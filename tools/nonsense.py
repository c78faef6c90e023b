"""Makes random calls of the core with nonsense among the arguments; each must raise an error.

Each call is printed before it is made, so that the last line names a call that crashed. Valid
addresses lie in one block of memory, which is large enough for any tensor.
"""

import argparse
import math
import os
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # before the core

from snnlstm import _C

SIZES = {"T": 2, "N": 2, "Cin": 3, "C": 5, "H": 6, "W": 7}
ROOM = 1 << 16  # bytes for a tensor, more than any tensor of these sizes takes
HALF = 1 << 24  # bytes of half of the block: tensors lie in the first half, workspaces behind
MOST_MEMORY = 1 << 34  # bytes that this process may take: the core must refuse larger sizes
HUGE = [2**53, 2**61, 2**62, 2**63 - 1, 2**64, -(2**63)]
NO_NUMBER = ["x", 1.5, None, (), [1]]
NO_ADDRESS = [-1, 2**64, *NO_NUMBER]
NONSENSE: dict[str, list[Any]] = {
    "address": NO_ADDRESS,  # 0 is valid, and means absent
    "memory": [0, *NO_ADDRESS],
    "aligned": [0, 8, *NO_ADDRESS],
    "aligned or none": [8, *NO_ADDRESS],
    "number": NO_NUMBER,
    "enum": [-1, 99, 2**31, *NO_NUMBER],
    "size": [0, -1, *HUGE, *NO_NUMBER],
    "count": [-1, *HUGE, *NO_NUMBER],
    "int": [0, -1, 2**31, *HUGE, *NO_NUMBER],
    "pair": [(0, 1), (1, -1), (1,), (1, 2, 3), 3, None, (2**31, 1), (1, 2**40), ("x", 1)],
    "kernel": [(2, 3), (3, 0), (-1, 1), (2**31 - 1, 2**31 - 1), (65537, 65537), (3,), None],
    "window": [(0, 1), (9, 1), (1, 2**31 - 1), (2**31, 1), (-1, 1), (1,), None],
    "part": [-0.1, 1.1, math.nan, math.inf, "x", None],
    "real": ["x", None, (1,)],
    "flag": ["x", ()],
    "stride": [2, -1, *HUGE, "x", 1.5, None],
    "text": ["", "nonsense", 7, None],
    "object": [7, None, "x"],
}
Arguments = dict[str, tuple[str, Any]]  # an argument's kind and a valid value, by its name
# The core takes the fields of a pass as one tuple, in the order of the structs of csrc/args.h.
PASS = (
    "x", "syn0", "mem0", "weight", "weight_mem", "weight_x", "threshold", "threshold_stride",
    "graded", "levels", "record", "saved_gates", "saved_syn", "winner", "places", "lengths",
    "order", "workspace",
)  # fmt: skip
FORWARD = (*PASS, "bias", "gate_sums", "spk", "syn", "mem")
BACKWARD = (
    *PASS, "noise", "grad_spk", "grad_syn", "grad_mem", "grad_x", "grad_syn0", "grad_mem0",
    "grad_weight", "grad_bias", "grad_threshold", "d_gates", "mem_after",
)  # fmt: skip


class Calls(ABC):
    """Holds the functions of a core, each with arguments that it accepts."""

    step = 8  # valid addresses are multiples of this many bytes

    def __init__(self, module: Any, block: int) -> None:
        self.module, self.block, self.used = module, block, 0
        self.facts = {name: value for name, (_, value) in self.cell_arguments().items()}
        self.cell = module.Cell(**self.facts)

    def address(self) -> int:
        """Returns an unused place of the block's first half, and begins again at its end."""
        self.used = (self.used + ROOM) % HALF
        return self.block + self.used + self.step * random.randrange(4)

    def view(self, *shape: int) -> tuple[int, tuple[int, ...]]:
        return self.address(), tuple(math.prod(shape[k + 1 :]) for k in range(5))

    def nonsense(self, kind: str) -> Any:
        if kind not in ("view", "view?"):
            return random.choice(NONSENSE[kind])
        memory, strides = self.view(*SIZES.values())
        wrong = random.choice([-1, -(2**40), 2**49, 2**63, "x", 1.5, None])
        broken: list[Any] = [
            (memory, strides[:4]), (memory, (*strides, 1)), (memory, list(strides)), (memory,),
            [memory, strides], memory, "x", (memory, None), (-1, strides), (2**64, strides),
            (memory, (*strides[:2], wrong, *strides[3:])),
        ]  # fmt: skip
        return random.choice(broken if kind == "view?" else [*broken, None, (0, strides)])

    def cell_arguments(self) -> Arguments:
        spiking = random.random() < 0.8
        pool = random.randrange(3) * spiking
        return {
            "dtype": ("enum", random.randrange(2)),
            **{name: ("count" if name in "TN" else "size", size) for name, size in SIZES.items()},
            "kernel": ("kernel", (3, 3)), "stride": ("pair", (1, 1)), "dilation": ("pair", (1, 1)),
            "pool": ("enum", pool), "pool_size": ("window", (1, 2) if pool else (1, 1)),
            "reset": ("enum", random.randrange(3) if spiking else 2),
            "surrogate": ("enum", random.randrange(11) * spiking),
            "p0": ("real", 2.0), "p1": ("real", 0.0),
            "inhibition": ("flag", spiking and random.random() < 0.3),
            "num_levels": ("count", random.choice([0, 3]) * spiking), "spiking": ("flag", spiking),
        }  # fmt: skip

    def a_pass(self, backward: bool) -> Arguments:
        """Returns the fields of a pass in their order; 0 is that of a field that is not given."""
        known = self.fields(backward)
        names = BACKWARD if backward else FORWARD
        assert known.keys() <= set(names), known.keys() - set(names)
        return {name: known.get(name, ("address", 0)) for name in names}

    def fields(self, backward: bool) -> Arguments:
        """Returns the fields that forward and backward passes of both halves have."""
        t, n, cin, c, h, w = SIZES.values()
        x, state, spikes = (self.view(*shape) for shape in (
            (t, n, cin, h, w), (1, n, c, h, w), (t, n, c, h, w)))  # fmt: skip
        of_levels = "memory" if self.facts["num_levels"] else "address"
        of_spikes = "memory" if self.facts["spiking"] else "address"
        found: Arguments = {
            "record": ("number", True), "x": ("view", x), "syn0": ("view", state),
            "mem0": ("view", state), "threshold": (of_spikes, self.address()),
            "threshold_stride": ("stride", 1), "graded": (of_spikes, self.address()),
            "levels": (of_levels, self.address()), "saved_syn": ("memory", self.address()),
            "saved_gates": ("memory" if backward else "address", self.address()),
        }  # fmt: skip
        winners = self.block + 2 * HALF  # holds valid indices, which a backward pass may follow
        of_places = "memory" if backward and self.facts["pool"] == 1 else "address"
        if not backward:
            return found | {
                "bias": ("address", self.address()), "winner": ("address", winners),
                "places": (of_places, self.address()), "gate_sums": ("view?", None),
                **{name: ("view", self.view(t, n, c, h, w)) for name in ("spk", "syn", "mem")},
            }  # fmt: skip
        of_winner = "memory" if self.facts["inhibition"] else "address"
        of_noise = "view" if self.facts["surrogate"] == 9 else "view?"
        optional = ("grad_bias", "grad_weight", "grad_threshold", "d_gates")
        return found | {
            "winner": (of_winner, winners), "noise": (of_noise, spikes),
            "places": (of_places, self.address()),
            **dict.fromkeys(("grad_spk", "grad_syn", "grad_mem"), ("view?", spikes)),
            **{name: ("view?", self.view(1, n, c, h, w)) for name in ("grad_syn0", "grad_mem0")},
            **{name: ("address", self.address()) for name in optional},
            "grad_x": ("view?", self.view(t, n, cin, h, w)),
        }  # fmt: skip

    def behind_torch(self, backward: bool, cudnn: bool, hybrid: bool = False) -> Arguments:
        """Returns the fields of a pass that change if torch forms sums or gradients."""
        _, n, _, c, h, w = SIZES.values()
        found: Arguments = {"x": ("view?", None)} if cudnn else {}
        if not backward:
            sums = "view", self.view(1, n, 4 * c, h, w)
            return found | ({"gate_sums": sums} if cudnn else {})
        if not (cudnn or hybrid):
            return {"d_gates": ("address", 0)}
        return found | ({"mem0": ("view?", None)} if cudnn else {}) | {
            "d_gates": ("memory", self.address()), "mem_after": ("address", self.address()),
            "grad_weight": ("address", 0), "grad_bias": ("address", 0),
        }  # fmt: skip

    def workspace(self, step: int) -> int:
        return self.block + HALF + step * random.randrange(64 // step)

    def calls(self) -> dict[str, tuple[Callable[..., Any], Arguments, int]]:
        """Returns functions by name, their arguments, and the number of positional arguments."""
        return {"Cell": (self.module.Cell, self.cell_arguments(), 0)}

    @abstractmethod
    def sizes(self, cell: Any) -> list[int]:
        """Returns all counts of bytes that the core tells of a cell."""


class Cpu(Calls):
    def __init__(self, module: Any, block: int) -> None:
        super().__init__(module, block)
        plan = {name: value for name, (_, value) in self.plan_arguments().items()}
        self.plan = module.CpuPlan(**plan)
        self.direct = module.CpuPlan(self.cell, 1, 1.0, 8, 1)

    def plan_arguments(self) -> Arguments:
        return {
            "cell": ("object", self.cell), "algorithm": ("enum", random.randrange(3)),
            "density": ("part", random.random()), "most_inputs": ("number", random.choice([0, 8])),
            "threads": ("int", 1),
        }  # fmt: skip

    def fields(self, backward: bool) -> Arguments:
        read = {form % 3 for form, *_ in self.plan.forms(backward=backward, grad_x=True)}
        weights = {
            name: ("memory" if k in read else "address", self.address())
            for k, name in enumerate(("weight", "weight_mem", "weight_x"))
        }
        workspace = {"workspace": ("memory", self.workspace(1))}
        found = super().fields(backward) | weights | workspace
        return found | self.behind_torch(backward, False)

    def calls(self) -> dict[str, tuple[Callable[..., Any], Arguments, int]]:
        core, plan, address = self.module, self.plan, self.address
        x = self.view(*(SIZES[of] for of in ("T", "N", "Cin", "H", "W")))
        forms = [form for form, *_ in self.direct.forms(backward=False, grad_x=True)]
        of_name: dict[str, tuple[Arguments, int]] = {
            "build_info": ({}, 0), "isa_names": ({}, 0), "isa_name": ({}, 0),
            "openmp_library": ({}, 0), "CpuPlan": (self.plan_arguments(), 0),
            "set_isa": ({"name": ("text", random.choice(core.isa_names()))}, 1),
            "same": ({
                "weight": ("memory", address()), "copy": ("memory", address()),
                "bytes": ("count", 64),
            }, 3),
            "density": ({
                "cell": ("object", self.cell), "x": ("view", x), "lengths": ("address", 0),
            }, 3),
            "copy_weight": ({
                "weight": ("memory", address()), "copy": ("memory", address()),
                "dtype": ("enum", 0), "count": ("count", 64),
            }, 4),
            "cpu_padded_channels": ({"dtype": ("enum", 1), "C": ("size", 5)}, 2),
            "cpu_evaluate": ({
                "function": ("text", "tanh"), "dtype": ("enum", 0), "in": ("memory", address()),
                "out": ("memory", address()), "count": ("count", 9),
            }, 5),
        }  # fmt: skip
        of_plan: dict[str, tuple[Arguments, int]] = {
            "forms": ({"backward": ("flag", True), "grad_x": ("flag", True)}, 0),
            "pack": ({
                "form": ("enum", random.choice(forms)), "weight": ("memory", address()),
                "packed": ("memory", address()),
            }, 3),
            "backward_workspace": ({"weight": ("flag", True)}, 1),
            "forward": (self.a_pass(False), 0), "backward": (self.a_pass(True), 0),
        }  # fmt: skip
        found = {name: (getattr(core, name, None), *rest) for name, rest in of_name.items()}
        of_plan_too = {f"CpuPlan.{k}": (getattr(plan, k), *rest) for k, rest in of_plan.items()}
        of_plan_too["CpuPlan.pack"] = (self.direct.pack, *of_plan["pack"])
        return super().calls() | {k: v for k, v in found.items() if v[0]} | of_plan_too

    def sizes(self, cell: Any) -> list[int]:
        values = {name: value for name, (_, value) in self.plan_arguments().items()}
        values |= {"cell": cell, "threads": 2 ** random.randrange(15)}
        plan = self.module.CpuPlan(**values)
        found = [bytes_ for _, _, bytes_ in plan.forms(backward=True, grad_x=True)]
        return [
            *found, plan.forward_workspace, plan.backward_workspace(True),
            plan.backward_workspace(False),
        ]  # fmt: skip


class Cuda(Calls):
    step = 16
    own = ("saved_gates", "saved_syn", "d_gates", "mem_after", "packed")

    def __init__(self, module: Any, block: int) -> None:
        super().__init__(module, block)
        self.device = module.CudaDevice(80, 108, 163 * 1024)
        algorithm = random.randrange(4)
        self.forward, self.backward = (
            module.CudaPlan(self.cell, self.device, 1, algorithm, backward)
            for backward in (False, True)
        )

    def fields(self, backward: bool) -> Arguments:
        plan = self.backward if backward else self.forward
        cudnn = plan.name == "cudnn"
        kind = "aligned or none" if cudnn else "aligned"
        found = super().fields(backward) | {"weight": (kind, self.address())}
        found["workspace"] = (
            "aligned" if plan.workspace else "aligned or none",
            self.workspace(16),
        )
        if cudnn:
            found["saved_syn"] = "address", self.address()
        hybrid = plan.name.startswith("hybrid")
        return found | self.behind_torch(backward, cudnn, hybrid)

    def calls(self) -> dict[str, tuple[Callable[..., Any], Arguments, int]]:
        core, address = self.module, self.address
        stream, device = {"stream": ("address", 0)}, {"device": ("object", self.device)}
        facts = {"cell": ("object", self.cell)} | device | {"matrix": ("enum", random.randrange(5))}
        backward = {"backward": ("flag", random.random() < 0.5)}
        levels = ("memory" if self.facts["num_levels"] else "address", address())
        of_device = {
            "compute_capability": ("size", 80), "multiprocessors": ("size", 108),
            "shared_bytes": ("size", 1 << 17),
        }  # fmt: skip
        packed = "memory" if self.forward.packed_bytes else "address"
        weight = {"weight": ("memory", address()), "packed": (packed, address())}
        found: dict[str, tuple[Callable[..., Any] | None, Arguments, int]] = {
            "cuda_device": (getattr(core, "cuda_device", None), {}, 0),
            "cuda_full_precision": (core.cuda_full_precision, device, 1),
            "cuda_padded_channels": (core.cuda_padded_channels, {"C": ("size", 5)}, 1),
            "CudaDevice": (core.CudaDevice, of_device, 0),
            "CudaPlan": (
                core.CudaPlan, facts | {"algorithm": ("enum", random.randrange(4))} | backward, 0
            ),
            "CudaPlan.candidates": (core.CudaPlan.candidates, facts | backward, 0),
            "CudaPlan.pack": (self.forward.pack, weight | stream, 0),
            "CudaPlan.store_levels": (
                self.forward.store_levels, {"values": levels, "levels": levels} | stream, 0
            ),
            "CudaPlan.forward": (self.forward.forward, stream | self.a_pass(False), 1),
            "CudaPlan.backward": (self.backward.backward, stream | self.a_pass(True), 1),
        }  # fmt: skip
        for _, arguments, _ in found.values():
            for key in set(arguments) & set(self.own):
                kind, value = arguments[key]
                arguments[key] = ("aligned" if kind == "memory" else "aligned or none", value)
        return super().calls() | {k: (f, *rest) for k, (f, *rest) in found.items() if f}

    def sizes(self, cell: Any) -> list[int]:
        device, matrix = self.device, random.randrange(5)
        plan = self.module.CudaPlan(
            cell, device, matrix, random.randrange(4), random.random() < 0.5
        )
        return [plan.packed_bytes, plan.workspace]


def no_pass(fields: dict[str, Any]) -> tuple[list[Any], dict[str, Any], tuple[type[Exception]]]:
    """Returns arguments that are no tuple of a pass's fields, and the error they must raise."""
    values = tuple(fields.values())
    cut = random.randrange(len(values))
    of_length = [(*values[:cut], *values[cut + 1 :]), (*values, 0), ()]
    of_type = [([list(values)], {}), ([None], {}), ([*values], {}), ([], fields), ([], {}),
               ([values], {"nonsense": 1})]  # fmt: skip
    if random.random() < 0.5:
        return [random.choice(of_length)], {}, (ValueError,)
    return *random.choice(of_type), (TypeError,)


def one(calls: Calls, number: int) -> None:
    """Calls a random function with valid arguments, or with up to three faults among them."""
    functions = calls.calls()
    name = random.choice(list(functions))
    function, arguments, places = functions[name]
    faults = min(random.choice([0, 1, 1, 1, 2]), len(arguments))
    wrong = random.sample(list(arguments), faults)
    given = {
        key: calls.nonsense(kind) if key in wrong else value
        for key, (kind, value) in arguments.items()
    }
    values, by_name = list(given.values())[:places], dict(list(given.items())[places:])
    errors: tuple[type[Exception], ...] = ValueError, TypeError, OverflowError
    needed = [key for key in by_name if arguments[key][0] in ("memory", "aligned", "view")]
    if name.endswith((".forward", ".backward")):
        if "stream" not in wrong and random.random() < 0.2:
            wrong.append("the tuple")
            instead, by_name, errors = no_pass(by_name)
            values += instead
        else:
            values, by_name = [*values, tuple(by_name.values())], {}
    elif needed and random.random() < 0.1:
        wrong.append(random.choice(needed))
        del by_name[wrong[-1]]
    elif random.random() < 0.05:
        wrong.append("nonsense")
        by_name["nonsense"] = 1
    print(f"{number}: {name}(*{values}, **{by_name}), wrong: {wrong}", flush=True)
    try:
        function(*values, **by_name)
    except errors:
        if not wrong:
            raise
    else:
        assert not wrong, "accepted"


def extreme(calls: Calls, number: int) -> None:
    """Makes a cell of any size: the core must refuse the cell, or count the bytes it needs."""

    def size(most: int) -> int:
        return int(2 ** (random.random() ** 3 * most))

    facts = dict(calls.facts)
    for key in random.sample(list(SIZES), random.choice([1, 1, 2, 3])):
        facts[key] = size(64)
    kernel, *others = ((size(31), size(31)) for _ in range(3))
    if random.random() < 0.5:
        facts["kernel"] = tuple(min(side, 2000) // 2 * 2 + 1 for side in kernel)
    if random.random() < 0.5:
        facts["stride"], facts["dilation"] = others
    print(f"{number}: {facts}", flush=True)
    try:
        sizes = calls.sizes(calls.module.Cell(**facts))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        print(error)
    else:
        assert all(0 <= bytes_ < 2**62 for bytes_ in sizes), sizes


def complete(calls: Calls) -> None:
    """Asserts that every function of the core is called."""
    half = isinstance(calls, Cuda)
    there = {
        name for name in dir(calls.module)
        if not name.startswith("__") and (name.lower().startswith("cuda") == half)
    }  # fmt: skip
    there -= {"watch", "time_tasks"}  # of the emulator, and one that calls a function of Python's
    known = {name.partition(".")[0] for name in calls.calls()} - ({"Cell"} if half else set())
    assert known == there, known ^ there
    for kind in (name for name in there if name[0].isupper() and name != "Cell"):
        methods = {n for n, f in vars(getattr(calls.module, kind)).items() if n[0] != "_" and
                   not isinstance(f, property)}  # fmt: skip
        called = {name.partition(".")[2] for name in calls.calls() if name.startswith(kind)} - {""}
        assert called == methods, called ^ methods


def main(core: str, count: int, seed: int) -> None:
    random.seed(seed)
    torch.set_num_threads(1)
    if sys.platform == "linux" and "asan" not in os.environ.get("LD_PRELOAD", ""):
        import resource  # not on Windows; macOS refuses such limits

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    kind: type[Calls] = Cpu if core == "cpu" else Cuda
    module = _C
    if core == "simt":
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from tests.simt.backend import simt_core

        module = simt_core("plain").module
    block = torch.zeros(
        2 * HALF + 4096, dtype=torch.uint8, device="cuda" if core == "cuda" else "cpu"
    )
    start = block.data_ptr() + -block.data_ptr() % 256
    complete(kind(module, start))
    for number in range(count):
        if number % 10 == 0:
            calls = kind(module, start)
        (extreme if number % 10 == 9 else one)(calls, number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("core", choices=("cpu", "cuda", "simt"), help="simt: CUDA's, emulated")
    parser.add_argument("count", type=int, help="how many calls")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    main(args.core, args.count, args.seed)
