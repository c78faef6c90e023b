"""The fields of a call by name, in the order of the structs of csrc/args.h."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from snnlstm.native.plan import Plan

CSRC = Path(__file__).resolve().parents[2] / "csrc"
OF_THE_CORE = ("cell", "threads")  # Python does not give these in a call


def fields_of(struct: str) -> list[str]:
    """Returns the names of a struct's fields, those of its base first."""
    text = re.sub(r"//.*", "", (CSRC / "args.h").read_text())
    base, body = re.search(
        rf"struct {struct}(?: : (\w+))? {{\n(.*?)\n}};", text, re.DOTALL
    ).groups()
    names = fields_of(base) if base else []
    for kind, declared in re.findall(r"^  (?:const )?(\w+)\*? ([^;(]+);", body, re.MULTILINE):
        for name in (each.split()[0] for each in declared.split(",")):
            parts = fields_of(kind) if kind == "LeakyParameter" else []
            names += [f"{name}.{part}" for part in parts] or [name]
    return [name for name in names if name not in OF_THE_CORE]


def by_name(struct: str, given: tuple[Any, ...]) -> dict[str, Any]:
    """Returns what Python gave in a call, by the names of a struct's fields."""
    return dict(zip(fields_of(struct), given, strict=True))


def view(tensor: Tensor | None) -> Any:
    """Returns the address and the five strides of a tensor."""
    if tensor is None:
        return None
    return tensor.data_ptr(), (*(0,) * (5 - tensor.dim()), *tensor.stride())


def address(tensor: Tensor | None) -> int:
    """Returns the address of a tensor; 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


class Noted:
    """What plans were given and returned, as the fields of their calls should tell it."""

    def __init__(self) -> None:
        self.expected: list[dict[str, Any]] = []

    def common(self, plan: Plan, call: Any, saved: Tensor) -> dict[str, Any]:
        """Returns the fields of both passes, but those that a device's plan adds."""
        names = "saved_gates", "saved_syn", "argmax"
        parts = (plan.saved.part(saved, number) for number in range(3))
        return {
            **{name: view(t) for name, t in zip(("x", "syn0", "mem0"), call[:3], strict=True)},
            "threshold": address(call.threshold),
            "threshold_stride": int(call.threshold.numel() > 1),
            "graded_factor": address(call.graded), "lengths": address(call.lengths),
            "record": call.record,
            **{name: address(part) for name, part in zip(names, parts, strict=True)},
        }  # fmt: skip


@contextmanager
def noted() -> Iterator[Noted]:
    """Within the block plans note what a test compares with the fields of their calls."""
    found = Noted()
    forward, backward = Plan.forward, Plan.backward

    def noting_forward(plan: Plan, call: Any, training: bool) -> Any:
        result = forward(plan, call, training)
        outs = {"spk": view(result.spk), "syn": view(result.syn), "mem": view(result.mem)}
        fields = found.common(plan, call, result.saved) | outs
        found.expected.append(fields | {"bias": address(call.bias)})
        return result

    def noting_backward(plan: Plan, call: Any, saved: Any, grads: Any, *others: Any) -> Any:
        out = backward(plan, call, saved, grads, *others)
        fields = found.common(plan, call, saved)
        fields |= zip(("grad_spk", "grad_syn", "grad_mem"), map(view, grads), strict=True)
        fields |= zip(("grad_x", "grad_syn0", "grad_mem0"), map(view, out[:3]), strict=True)
        names = "grad_weight", "grad_bias", "grad_threshold"
        last = out[3:]
        if call.threshold.numel() == 1:  # out has the sum of the kernels' numbers
            names, last = names[:2], last[:2]
        found.expected.append(fields | dict(zip(names, map(address, last), strict=True)))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "forward", noting_forward)
        patch.setattr(Plan, "backward", noting_backward)
        yield found
