"""Draws pictures from the code when the documentation is built."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.report import LIBRARIES, STYLE, draw_history, save
from snnlstm import quant, surrogate

ROWS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "accuracy.csv"
SHOWN = {  # panels, each with curves of one scale
    "wide": [surrogate.atan(), surrogate.sigmoid(5), surrogate.spike_rate_escape(slope=1)],
    "narrow": [surrogate.atan(20), surrogate.sigmoid(), surrogate.fast_sigmoid()],
    "in pieces": [
        surrogate.straight_through_estimator(),
        surrogate.triangular(),
        surrogate.heaviside(),
        surrogate.LSO(),
    ],
}


def draw_surrogates() -> Figure:
    """Draw d spk / d x of the surrogates over x = mem - threshold."""
    figure = Figure(figsize=(4.2, 10), layout="constrained")
    panels = figure.subplots(3)
    x = torch.linspace(-2, 2, 801, dtype=torch.float64)
    for panel, (title, shown) in zip(panels, SHOWN.items(), strict=True):
        for one in shown:
            panel.plot(x, one.factor(x), label=repr(one))
        panel.set_title(title, fontsize="medium")
        panel.set(xlabel="mem - threshold", ylabel="derivative of spk")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[1].set_xlim(-0.3, 0.3)
    return figure


def draw_quantisers() -> Figure:
    """Draw two quantisers of three bits."""
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    panel = figure.subplots()
    x = torch.linspace(-1.2, 1.4, 1301)
    for uniform in (True, False):
        quantise = quant.state_quant(num_bits=3, uniform=uniform)
        panel.plot(x, quantise(x), label=f"num_bits=3, uniform={uniform}")
    panel.set_xlabel("state")
    panel.set_ylabel("quantised")
    panel.legend()
    return figure


def draw_accuracy() -> Figure:
    """Draw the losses of the demo's trainings, thin lines for seeds and thick ones for means."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    panel = figure.subplots()
    rows = list(csv.DictReader(ROWS.read_text().splitlines()))
    batches = [name for name in rows[0] if name.isdecimal()]
    for library, width in (("snntorch", 4.5), ("snnlstm", 1.8)):
        own = [row for row in rows if row["library"] == library]
        curves = torch.tensor([[float(row[name]) for row in own] for name in batches])
        found = torch.tensor([100 * float(row["accuracy"]) for row in own])
        label = f"{library}: {found.mean():.1f} ± {found.std():.1f} % of test digits"
        x = [int(name) for name in batches]
        panel.plot(x, curves, color=LIBRARIES[library], linewidth=0.7, alpha=0.5)
        panel.plot(x, curves.mean(1), color=LIBRARIES[library], linewidth=width, label=label)
    panel.set(xlabel="batch", ylabel="loss, mean of 30 batches", ylim=0)
    panel.legend(fontsize="small")
    return figure


def draw(folder: Path) -> None:
    """Write all pictures into `folder`."""
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        figures = {"surrogates": draw_surrogates(), "quantisers": draw_quantisers()}
        figures |= {f"history_{mode}": draw_history(mode) for mode in ("inference", "training")}
        figures["accuracy"] = draw_accuracy()
        for name, figure in figures.items():
            save(figure, folder / f"{name}.svg")
