"""The choice of kernels by the model: close to the best by that model, and hardly moved by errors
of its constants. Nothing runs here, and no time is a GPU's."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import snnlstm
from benchmarks import devices, estimate
from benchmarks.cases import CASES
from tests.simt.backend import float32_precision
from tests.simt.model import Model

CARDS = (*devices.EMULATED, "b200", "5090")
LAYERS = ("tiny", "mnist", "dvs", "mid", "big", "k5", "wide64", "small")
PASSES = (False, True)
NAMES = ("auto", "direct", "fused", "resident", "hybrid", "pointwise")


def gpu_of(core, name: str, **model: float) -> estimate.Gpu:
    (card,) = (card for card in core.module.cuda_cards() if card["name"] == name)
    return estimate.Gpu(core.module, card, tuple(model.items()))


def cases_of(gpu: estimate.Gpu):
    return itertools.product((CASES[name] for name in LAYERS), gpu.types(), PASSES)


def test_the_table_of_cards_agrees_with_its_sources(core):
    cards = core.module.cuda_cards()
    assert [card["name"] for card in cards] == sorted(CARDS, key=[c["name"] for c in cards].index)
    for card in cards:
        cycles = 2e-3 * card["multiprocessors"] * card["gigahertz"]
        rates = [cycles * card[of] for of in ("fp32", "half", "tf32")]
        (listed,) = re.findall(r"([\d., and]+) TFLOP/s", card["source"])
        said = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", listed.split(": ")[-1])]
        for flops in said[-3:]:
            assert any(abs(rate / flops - 1) < 0.03 for rate in rates), (card["name"], flops, rates)
        (moved, unit) = re.findall(r"(\d+) (GB|TB)/s", card["source"])[0]
        assert float(moved) * (1000 if unit == "TB" else 1) == card["gigabytes"]


def test_the_emulated_devices_are_cards(core):
    cards = {card["name"]: card["capability"] for card in core.module.cuda_cards()}
    assert devices.EMULATED.items() <= cards.items()


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_the_choice_is_close_to_the_best_of_all(core, name):
    """model.py computes the time of every way, block, tile and number of splits by itself."""
    gpu = gpu_of(core, name)
    for case, dtype, backward in cases_of(gpu):
        plan = estimate.chosen(gpu, case, dtype, backward)
        ways = Model(gpu, case, dtype).ways(backward)
        best, way = min(ways.values()), ways[NAMES[plan.algorithm]]
        assert 0.99 * best <= plan.seconds <= 1.05 * best, (case.name, dtype, plan.name, ways)
        assert 0.99 * way <= plan.seconds <= 1.05 * way, (case.name, dtype, plan.name, ways)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_errors_of_each_constant_by_a_fifth_cost_little(core, name):
    gpu = gpu_of(core, name)
    worst = 1.0
    best = {
        (case.name, dtype, backward): estimate.chosen(gpu, case, dtype, backward).seconds
        for case, dtype, backward in cases_of(gpu)
    }
    for constant, value in core.module.cuda_model().items():
        for factor in (0.8, 1.2):
            wrong = gpu_of(core, name, **{constant: factor * value})
            for case, dtype, backward in cases_of(gpu):
                plan = estimate.chosen(wrong, case, dtype, backward)
                lost = plan.seconds_on(gpu.device) / best[case.name, dtype, backward]
                assert lost <= 1.25, (constant, factor, case.name, dtype, backward, plan.name)
                worst = max(worst, lost)
    assert worst > 1.0  # some choice did change


@pytest.mark.parametrize("model", [{"no_such": 1.0}, {"launch": 0.0}, {"launch": float("nan")}])
def test_constants_that_are_none_are_refused(core, model):
    with pytest.raises(ValueError, match=f"cuda_model\\(\\), got {next(iter(model))}"):
        core.module.CudaDevice(80, 108, 163 * 1024, model)


def test_each_pass_is_chosen_by_itself(core):
    """Each algorithm is the best somewhere, and the passes of a call may differ."""
    found, differ = set(), 0
    for name in CARDS:
        gpu = gpu_of(core, name)
        for case, dtype, _ in cases_of(gpu):
            forward, backward = (
                NAMES[estimate.chosen(gpu, case, dtype, of).algorithm] for of in PASSES
            )
            found |= {forward, backward}
            differ += forward != backward
    assert found >= {"fused", "resident", "hybrid", "pointwise"}
    assert differ


@pytest.mark.parametrize("backward", ["hybrid", "pointwise", "direct"])
def test_a_path_names_the_backward_pass_if_torch_convolves_there(core, monkeypatch, backward):
    core.device(algorithm="auto")
    plan_of = type(core.kernels).core_plan

    def chosen(kernels, sizes, tf32, algorithm, of_backward):
        wanted = backward if of_backward else "fused"
        return plan_of(kernels, sizes, tf32, wanted, of_backward)

    monkeypatch.setattr(type(core.kernels), "core_plan", chosen)
    cell, x = snnlstm.SConv2dLSTM(1, 8, 3, threshold=0.1), torch.rand(3, 1, 1, 10, 9)
    with core.installed(), float32_precision("tf32"):
        for _ in range(2):
            cell(x, *cell.reset_mem())[0].sum().backward()
    named = {"hybrid": "+hybrid-mma-tf32", "pointwise": "+pointwise", "direct": ""}
    assert cell.path.name == f"simt-mma-tf32{named[backward]}"


def test_bandwidth_is_the_cards_own(core):
    """An L4 has the multiprocessors' kind of a 4090, and less than a third of its bandwidth."""
    case = CASES["dvs64"]
    for name in ("l4", "4090"):
        gpu = gpu_of(core, name)
        least = case.fewest_bytes("forward", 4) / (1e9 * gpu.card["gigabytes"])
        assert estimate.chosen(gpu, case, "tf32", False).seconds / case.steps >= least


def test_blocks_are_chosen_by_their_rounds(core):
    """128 blocks of the largest kind would run in two rounds on 108 multiprocessors."""
    gpu = gpu_of(core, "a100")
    for name in ("dvs", "mid"):
        of = estimate.arguments(gpu, CASES[name], "tf32")
        by_shape = [gpu.core.CudaPlan(*of, NAMES.index("fused"), False, row) for row in range(4)]
        assert min(plan.seconds for plan in by_shape) < by_shape[0].seconds / 1.2
        chosen = gpu.core.CudaPlan(*of, NAMES.index("fused"), False)
        assert chosen.seconds <= min(plan.seconds for plan in by_shape) / 0.98


def test_the_command_prints_each_layer_and_says_that_nothing_was_measured(capsys, monkeypatch):
    assert estimate.main(["--gpu", "t4", "--layers", "mnist", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "Tesla T4: 40 multiprocessors" in said
    assert "no GPU has been timed" in said
    assert re.search(r"mnist +float32 +training +\S+ +\d+ +\d+ +\d+ +\d+\.\dx", said)
    with pytest.raises(SystemExit):
        estimate.main(["--gpu", "t4", "--dtype", "tf32"])
    assert "the t4 has no instructions for tf32" in capsys.readouterr().err
