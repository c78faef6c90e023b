"""What the rules of csrc/cuda/rules.cpp choose. Nothing runs here."""

from __future__ import annotations

import pytest
import torch

import snnlstm
from benchmarks import devices
from tests.emulator.backend import float32_precision
from tests.shared.cases import FACTS

NAMES = ("auto", "fused", "cudnn")
# dtype, by csrc/args.h, and matrix, by csrc/cuda/pass.h; None: full precision.
TYPES = {"tf32": (0, 1), "float32": (0, None), "fp16": (0, 3), "bf16": (3, 0), "float64": (1, 0)}

# A layer (N, Cin, C, H, W), its card, dtype and direction, and what is chosen: a reason of
# rules.cpp each.
CHOSEN = [
    ((16, 32, 64, 16, 16), "t4", "float64", False, "fused"),  # nothing is better for float64
    ((8, 64, 128, 32, 32), "t4", "bf16", False, "fused"),  # nor for bfloat16 on sm_75
    ((1, 8, 16, 16, 16), "t4", "float32", False, "fused"),  # the launches of torch take longer
    ((32, 1, 16, 22, 128), "4090", "tf32", False, "fused"),
    ((32, 1, 16, 22, 128), "t4", "float32", True, "fused"),  # one channel: Winograd gains nothing
    ((8, 32, 64, 32, 32), "t4", "float32", False, "cudnn"),  # Winograd
    ((8, 32, 64, 32, 32), "t4", "float32", True, "fused"),
    ((8, 32, 64, 32, 32), "4090", "float32", True, "cudnn"),  # loads bind the plain cores
    ((16, 128, 128, 8, 8), "4090", "tf32", False, "cudnn"),  # few pixels, a long K
    ((256, 8, 64, 5, 5), "h100", "tf32", False, "cudnn"),  # tiles that images fill in part
    ((1, 32, 1, 720, 1580), "t4", "float32", True, "cudnn"),  # one channel of 16 columns
    ((8, 64, 128, 32, 32), "h100", "tf32", True, "cudnn"),  # wgmma
    ((16, 64, 128, 32, 32), "b200", "bf16", False, "cudnn"),
    ((8, 64, 128, 32, 32), "b200", "bf16", False, "fused"),  # launches take longer than products
    ((16, 32, 64, 32, 32), "h100", "tf32", True, "fused"),
    ((8, 64, 128, 32, 32), "h100", "float32", False, "fused"),  # 3xTF32
    ((8, 64, 128, 32, 32), "5090", "tf32", False, "fused"),
]


def facts_of(core, layer, card: str, dtype: str, **more):
    n, cin, c, h, w = layer
    device = core.module.CudaDevice(*devices.EMULATED[card])
    states, matrix = TYPES[dtype]
    if matrix is None:
        matrix = core.module.cuda_full_precision(device)
    facts = {"dtype": states, "T": 10, "N": n, "Cin": cin, "C": c, "H": h, "W": w}
    return core.module.Cell(**FACTS | facts | more), device, matrix


def chosen(core, layer, card: str, dtype: str, backward: bool, **more) -> str:
    facts = facts_of(core, layer, card, dtype, **more)
    return NAMES[core.module.CudaPass(*facts, 0, backward).algorithm]


@pytest.mark.parametrize(("layer", "card", "dtype", "backward", "name"), CHOSEN)
def test_each_rule_decides_somewhere_and_is_timed_first(core, layer, card, dtype, backward, name):
    assert chosen(core, layer, card, dtype, backward) == name
    facts = facts_of(core, layer, card, dtype)
    found = [plan.name for plan in core.module.CudaPass.candidates(*facts, backward)]
    assert (found[0] == "cudnn") == (name == "cudnn")
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("facts", [{"kernel": (5, 5)}, {"stride": (2, 1)}, {"dilation": (1, 2)}])
def test_sizes_without_winograd_run_on_our_kernels(core, facts):
    assert chosen(core, (8, 32, 64, 32, 32), "t4", "float32", False, **facts) == "fused"


@pytest.mark.parametrize("card", devices.EMULATED)
def test_full_precision_is_three_products_on_large_chips(core, card):
    matrix = core.module.cuda_full_precision(core.module.CudaDevice(*devices.EMULATED[card]))
    assert matrix == (2 if card in ("a100", "h100", "b200") else 0)


@pytest.mark.parametrize(
    ("card", "layer", "shape"),
    [
        ("h100", (8, 64, 128, 32, 32), "4x2"),  # two full rounds of the largest blocks
        ("a100", (8, 64, 128, 32, 32), "4x1"),  # three rounds of them would leave a fifth idle
        ("a100", (1, 2, 16, 16, 16), "2x1"),  # few pixels: small blocks
        ("h100", (16, 2, 32, 32, 32), "4x2"),  # 128 of the largest blocks are one round
    ],
)
def test_blocks_follow_the_rounds(core, card, layer, shape):
    found = core.module.CudaPass.candidates(*facts_of(core, layer, card, "tf32"), False)
    assert next(p.name for p in found if p.name.startswith("mma")) == f"mma-tf32-{shape}"


@pytest.mark.parametrize("backward", ["cudnn", "direct"])
def test_a_path_names_the_backward_pass_if_torch_convolves_there(core, monkeypatch, backward):
    core.device(algorithm="auto")
    core_pass = type(core.kernels).core_pass

    def planned(kernels, sizes, tf32, algorithm, is_backward, *others, **blocks):
        wanted = backward if is_backward else "fused"
        return core_pass(kernels, sizes, tf32, wanted, is_backward, *others, **blocks)

    monkeypatch.setattr(type(core.kernels), "core_pass", planned)
    cell, x = snnlstm.SConv2dLSTM(1, 8, 3, threshold=0.1), torch.rand(3, 1, 1, 10, 9)
    with core.installed(), float32_precision("tf32"):
        for _ in range(2):
            cell(x, *cell.reset_mem())[0].sum().backward()
    named = "+cudnn" if backward == "cudnn" else ""
    assert cell.path.name == f"emulator-mma-tf32{named}"
