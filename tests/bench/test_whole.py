"""Networks in the benchmark compute the same in a loop and as sequences, and become rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.shared.helpers import close, same_gradients

pytest.importorskip("matplotlib")

import snnlstm
from benchmarks import agreement, cli, whole
from benchmarks.cases import find_cases
from benchmarks.providers import Setting, Unavailable
from benchmarks.rows import read_rows

NETWORKS = whole.TABLES["networks"]
SMALL = {n: case for n, case in whole.TABLES["fronts"].items() if n.endswith("-32")}
EACH = NETWORKS | SMALL


@pytest.mark.parametrize("name", EACH)
def test_sequences_compute_what_the_loop_computes(name):
    case, nets, found = EACH[name], [], []
    for network in case.forms:
        torch.manual_seed(0)
        net = network.make(snnlstm.SConv2dLSTM)
        optimizer = network.optimizer(net.parameters(), lr=0.0)
        (x, y), *_ = network.batches()
        torch.manual_seed(1)  # dropout
        with torch.no_grad():
            out = network.infer(net, x)
        loss = network.step(net, optimizer, x, y).detach()
        nets.append(net)
        found.append((out, loss))
    rounding = 0.05 if case.forms[0].autocast else 1e-5
    assert found[0][0].any()
    if "dropout" not in name:  # whose masks come in another order
        close(found[1], found[0], atol=rounding)
    if not case.forms[0].autocast and "dropout" not in name:
        same_gradients(*nets, atol=1e-4)


def test_a_network_that_computes_something_else_is_not_timed(capsys, tmp_path, monkeypatch):
    loop, sequences = NETWORKS["lit"].forms

    class Louder(whole.SEQUENCES["lit"].make):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return 1.1 * super().forward(x)

    wrong = dataclasses.replace(
        NETWORKS["lit"], forms=(loop, dataclasses.replace(sequences, make=Louder))
    )
    with pytest.raises(agreement.Disagreement, match="snnlstm: the loss is"):
        wrong.providers(whole.FORMS, Setting())
    monkeypatch.setitem(whole.TABLES["networks"], "lit", wrong)
    arguments = ["--shapes", "lit", "--memory", "off", "--no-plots", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "NOT TIMED, computes something else: lit: snnlstm: the loss" in capsys.readouterr().err


def test_networks_are_float32():
    with pytest.raises(Unavailable, match="float32, not in float64"):
        NETWORKS["lit"].providers(whole.FORMS, Setting(dtype="float64"))


def test_a_training_step_begins_with_weights_that_moved_by_a_rounding_error():
    provider = whole.WholeNetwork(NETWORKS["columns"], "snnlstm", Setting())
    setup, run = provider.prepare("both")
    weight, losses, before = provider.net.lstm.conv.weight, [], []
    for _ in range(3):
        setup()
        before.append(weight.detach().clone())
        losses.append(float(run().detach()))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    assert torch.equal(before[0], before[2])
    assert not torch.equal(before[0], before[1])
    close(before[0], before[1], atol=1e-6)
    assert float(run().detach()) != pytest.approx(losses[0], rel=1e-4)


def test_the_time_of_cells_is_noted_within_the_block_alone():
    cell, x = snnlstm.SConv2dLSTM(2, 4, 3, threshold=0.1), torch.rand(2, 1, 2, 6, 6)
    with whole._timed_cells() as spent:
        cell(x)[2].sum().backward()
    assert len(spent) == 2
    assert min(spent) > 0
    cell.reset_mem()
    cell(x)[2].sum().backward()
    assert len(spent) == 2


def test_networks_become_rows_beside_layers(tmp_path, capsys):
    arguments = [
        "--shapes", "documentation", "--shape", "2 1 2 4 6 6 3 name=small", "--seconds", "0.1",
        "--memory", "off", "--no-plots", "--goals", "--out", str(tmp_path),
        "--providers", "snntorch", "snnlstm-step", "snnlstm",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    rows = read_rows(tmp_path)
    networks = [row for row in rows if row.case == "documentation"]
    assert {(row.mode, row.provider) for row in networks} == {
        (mode, provider) for mode in ("forward", "both") for provider in whole.FORMS
    }
    for row in networks:
        assert (row.steps, row.batch, row.gflops) == (10, 32, None)
        assert row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.goal == {"forward": 3, "both": 2.6}[row.mode] or row.provider != "snnlstm-step"
        if row.provider == "snntorch":
            assert row.not_cell is None
        else:
            assert 0 < row.not_cell < 1
            assert row.path.startswith("cpu-")
    assert all(row.not_cell is None for row in rows if row.case == "small")
    header, _, network, small = (tmp_path / "table.md").read_text().splitlines()
    assert header.endswith("| snnlstm-step | snnlstm | not the cell |")
    assert network.startswith("| **documentation** T=10 N=32, x 32x10x1x28x28 | ")
    assert network.count("%") == 2
    assert small.endswith("x |  |")
    assert "of 2 goals met" in capsys.readouterr().out


def test_tables_and_single_networks_are_found_by_name():
    assert find_cases(["networks"]) == list(NETWORKS.values())
    assert len(find_cases(["fronts"])) == 20
    assert find_cases(["lit", "mid"])[0] is NETWORKS["lit"]
    with pytest.raises(ValueError, match=r"'lits'; known: .*networks, fronts, documentation"):
        find_cases(["lits"])
