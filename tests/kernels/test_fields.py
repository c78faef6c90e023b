"""Compares the fields of each call with the structs of csrc/args.h, by name.

A call is one tuple: two fields that were exchanged would give the kernels the wrong memory.
tests/emulator/test_calls.py does the same with the calls of CUDA.
"""

import re

import pytest
import torch

import snnlstm
from snnlstm import _C, surrogate
from snnlstm.calls.call import LeakyCall
from snnlstm.calls.entries import BoundedDict, Entry, backend_of
from snnlstm.calls.spec import leaky_spec
from snnlstm.native import cpu, leaky, lender, pool2d
from snnlstm.quant import state_quant
from tests.shared.cpu_kernels import needs_core
from tests.shared.fields import CSRC, address, by_name, fields_of, noted

pytestmark = needs_core

READS = {
    "pass_args": ("PassArgs", "ForwardArgs", "BackwardArgs"),
    "leaky_args": ("LeakyArgs", "LeakyBackwardArgs", "LeakyForwardArgs"),
    "pool_args": ("PoolArgs", "PoolForwardArgs", "PoolBackwardArgs"),
}


# The fields of CUDA alone, and the weight of direct sums, which Winograd's backward pass needs not.
ABSENT = {"gate_sums", "d_gates", "mem_after", "weight"}


@pytest.mark.parametrize("function", READS)
def test_the_bindings_read_the_fields_in_their_order(function):
    text = (CSRC / "bindings.h").read_text().partition(f"\nArgs {function}(")[2]
    reads = re.findall(r"f\.read\((.*?)\);", text.partition("\n}\n")[0], re.DOTALL)
    read = [[name.strip().removeprefix("a.") for name in each.split(",")] for each in reads]
    names = [
        list(dict.fromkeys(n.partition(".")[0] for n in fields_of(s))) for s in READS[function]
    ]
    assert read == [names[0], *(of_pass[len(names[0]) :] for of_pass in names[1:])]


def test_the_cpu_gives_the_fields_in_their_order(monkeypatch):
    """Few fields are absent in these calls, and all addresses differ."""
    given, orders = [], []
    run = _C.CpuPass.run
    monkeypatch.setattr(
        _C.CpuPass, "run", lambda of, fields: given.append(fields) or run(of, fields)
    )
    longest_first = cpu.longest_first
    monkeypatch.setattr(
        cpu, "longest_first", lambda of: orders.append(longest_first(of)) or orders[-1]
    )
    monkeypatch.setattr(snnlstm.calls.entries, "_entries", BoundedDict())  # plans keep functions
    cell = snnlstm.SConv2dLSTM(
        4, 8, 3, threshold=torch.rand(8, 1, 1), learn_threshold=True, max_pool=2,
        state_quant=state_quant(2), reset_mechanism="subtract",
    )  # fmt: skip
    x = torch.rand(2, 3, 4, 8, 8, requires_grad=True)
    states = [torch.rand(3, 8, 8, 8, requires_grad=True) for _ in range(2)]
    with noted() as found, snnlstm.algorithm("winograd"):
        out = cell(x, *states, record=True, lengths=[2, 0, 1])
        sum(o.sum() for o in out).backward()
    plan = cell._entries[0].plan
    packed = cpu.packed_weight(cell.conv.weight)
    for pass_number, struct in enumerate(("ForwardArgs", "BackwardArgs")):
        fields = by_name(struct, given[pass_number])
        of_device = {"levels": address(plan.passes.levels), "order": address(orders[pass_number])}
        of_device["workspace"] = address(lender.small[-1])
        for (number, _), (at, _) in packed.layouts.items():
            if number // 3 == pass_number:
                of_device[("weight", "weight_mem", "weight_x")[number % 3]] = at
        expected = found.expected[pass_number] | of_device
        assert {k: v for k, v in fields.items() if v} == expected
        assert fields.keys() - expected.keys() <= ABSENT
        addresses = [v[0] if isinstance(v, tuple) else v for k, v in expected.items()]
        assert len(set(addresses)) == len(addresses) - 1  # threshold_stride and record are both 1


def test_leaky_gives_the_fields_in_their_order(monkeypatch):
    given, memory = [], []
    for name in ("leaky_forward", "leaky_backward"):
        monkeypatch.setattr(_C, name, given.append)
    for name in ("_empty_like", "laid_out"):
        function = getattr(leaky, name)
        noting = lambda *of, run=function, **how: memory.append(run(*of, **how)) or memory[-1]  # noqa: E731
        monkeypatch.setattr(leaky, name, noting)
    beta, threshold = (torch.rand(3, 1, requires_grad=True) for _ in range(2))
    graded, mem = torch.tensor(0.5), torch.rand(2, 3, 4, requires_grad=True)
    spike = surrogate.SFS(1, 0.25)
    x = torch.rand(5, 2, 3, 4, requires_grad=True)
    call = LeakyCall(x, mem, beta, threshold, graded)
    settings = backend_of(x, "auto")
    plan = leaky.Plan(Entry(leaky_spec("zero", spike, True), *settings), call)
    memory.clear()  # of what the plan has tried
    spk, after = leaky.run_plan(plan, call, True)
    common = {
        "dtype": 0, "reset": 1, "surrogate": spike.kind, "T": 5, "n": 24,
        "surrogate_p0": spike.p0, "surrogate_p1": spike.p1,
        "beta.values": address(beta), "beta.count": 3, "beta.stride": 4,
        "threshold.values": address(threshold), "threshold.count": 3, "threshold.stride": 4,
        "graded_factor": address(graded), "mem0": address(mem),
    }  # fmt: skip
    results = {"x": address(x), "spk": address(spk), "mem": address(after), "record": True}
    assert by_name("LeakyForwardArgs", given[0]) == common | results
    memory.clear()
    grads = torch.rand_like(spk), torch.rand_like(after)
    torch.autograd.grad((spk, after), (x, mem, beta, threshold), grads)
    names = "mem", "mem0", "grad_spk", "grad_mem", "grad_x", "grad_mem0"
    noted_as = dict(zip((*names, "grad_beta", "grad_threshold"), map(address, memory), strict=True))
    [(copies, *at)] = plan._kept.values()
    kept = {"beta.values": at[0], "threshold.values": at[1]}
    assert at == [*map(address, copies)]
    assert not set(at) & {*map(address, (beta, threshold))}
    assert by_name("LeakyBackwardArgs", given[1]) == common | noted_as | kept
    assert len(set(noted_as.values())) == len(noted_as)


def test_pools_give_the_fields_in_their_order(monkeypatch):
    given = []
    for name in ("pool_forward", "pool_backward"):
        monkeypatch.setattr(_C, name, given.append)
    monkeypatch.setattr(pool2d, "LEAST_IN_TRAINING", 0)
    x = torch.rand(5, 11, 17, 29).contiguous(memory_format=torch.channels_last).requires_grad_()
    common = {
        "dtype": 0, "channels_last": True, "N": 5, "C": 11, "H": 17, "W": 29, "Ho": 8, "Wo": 9,
        "kernel_h": 4, "kernel_w": 7, "stride_h": 2, "stride_w": 3, "padding_h": 1, "padding_w": 2,
    }  # fmt: skip
    options = {"kernel_size": (4, 7), "stride": (2, 3), "padding": (1, 2)}
    averaged = {"count_include_pad": False, "divisor_override": 9}
    for number, pool, own, others in (
        (1, pool2d.max_pool2d, {"counts_padding": True, "divisor": 0}, {}),
        (2, pool2d.avg_pool2d, {"counts_padding": False, "divisor": 9}, averaged),
    ):
        given.clear()
        y = pool(x, **options, **others)
        (saved,) = y.grad_fn.saved_tensors
        (grad,) = torch.autograd.grad(y, x, ones := torch.ones_like(y))
        expected = common | own | {"pool": number, "places": address(saved)}
        assert by_name("PoolForwardArgs", given[0]) == expected | {"x": address(x), "y": address(y)}
        ends = {"grad_y": address(ones), "grad_x": address(grad)}
        assert by_name("PoolBackwardArgs", given[1]) == expected | ends
