"""Draws pictures from the code when the documentation is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from snnlstm import quant, surrogate

GREY = "#808890"  # readable on white and on black
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


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY
    )
    pyplot.rcParams.update(grey | {"svg.hashsalt": "snnlstm", "legend.framealpha": 0})
    return pyplot


def draw_surrogates() -> Any:
    """Draw d spk / d x of the surrogates over x = mem - threshold."""
    figure, panels = _pyplot().subplots(1, 3, figsize=(9.5, 4), layout="constrained")
    x = torch.linspace(-2, 2, 801, dtype=torch.float64)
    for panel, (title, shown) in zip(panels, SHOWN.items(), strict=True):
        for one in shown:
            panel.plot(x, one.factor(x), label=repr(one))
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("mem - threshold")
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    panels[0].set_ylabel("derivative of spk")
    panels[1].set_xlim(-0.3, 0.3)
    return figure


def draw_quantisers() -> Any:
    """Draw two quantisers of three bits."""
    figure, panel = _pyplot().subplots(figsize=(5, 3), layout="constrained")
    x = torch.linspace(-1.2, 1.4, 1301)
    for uniform in (True, False):
        quantise = quant.state_quant(num_bits=3, uniform=uniform)
        panel.plot(x, quantise(x), label=f"num_bits=3, uniform={uniform}")
    panel.set_xlabel("state")
    panel.set_ylabel("quantised")
    panel.legend(fontsize="small")
    return figure


OPERATORS = ["cat", "conv", "split", "sigmoid", "tanh", "mul, add", "reset", "pool", "spike"]
STEPS = 3


def draw_calls() -> Any:
    """Draw some steps: snnTorch's cell runs operators one by one, and ours one call."""
    figure, panel = _pyplot().subplots(figsize=(9.5, 3), layout="constrained")

    # Black on these pale colours is readable in the light and in the dark theme.
    def row(bottom: float, left: str, names: list[str], colour: str) -> None:
        panel.text(-0.1, bottom, left, ha="right", va="center", fontsize="small")
        width = len(OPERATORS) / len(names)
        for k, name in enumerate(names):
            panel.barh(bottom, width - 0.1, 0.75, left=k * width, color=colour)
            middle = (k + 0.5) * width - 0.05
            panel.text(middle, bottom, name, ha="center", va="center", fontsize="small", color="k")

    def title(bottom: float, text: str) -> None:
        panel.text(0, bottom, text, va="center")

    title(STEPS + 3, "snnTorch's cell: each step is a row of operators, with tensors between them")
    for t in range(STEPS):
        row(STEPS + 2 - t, f"step {t + 1}", OPERATORS, "#FFD8B0")
    title(1.6, "snnlstm's cell: one call, in which one pass makes all of a step")
    row(
        0.6,
        f"{STEPS} steps",
        ["convolution, gates, state, reset, pool, spike"] * STEPS,
        "#BFE5BF",
    )
    row(-0.5, "result", ["spk, syn, mem and gradients: the same, to rounding"], "#BBD6EC")
    panel.set_xlim(-0.9, len(OPERATORS))
    panel.set_axis_off()
    return figure


DRAWN = {"calls": draw_calls, "surrogates": draw_surrogates, "quantisers": draw_quantisers}


def draw(folder: Path) -> None:
    """Write all pictures into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, make in DRAWN.items():
        figure = make()
        figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
        _pyplot().close(figure)
