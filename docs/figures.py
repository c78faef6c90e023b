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


DRAWN = {"surrogates": draw_surrogates, "quantisers": draw_quantisers}


def draw(folder: Path) -> None:
    """Write all pictures into `folder`."""
    folder.mkdir(exist_ok=True)
    for name, make in DRAWN.items():
        figure = make()
        figure.savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
        _pyplot().close(figure)
