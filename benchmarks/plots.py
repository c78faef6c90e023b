"""Draws the suite's plots: bars of speed-up, a roofline, memory against T.

The colours are Okabe and Ito's, which differ for any kind of colour vision
(https://jfly.uni-koeln.de/color/). Markers and hatches differ too, for prints in black and white.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from benchmarks.providers import BASELINE, DETAILS, PROVIDERS
from benchmarks.report import MODE_TITLES
from benchmarks.rows import Row

STYLE = {
    "snntorch": ("#000000", "o", ""),
    "snntorch-compile": ("#E69F00", "^", "//"),
    "snntorch-cudagraph": ("#CC79A7", "v", "\\\\"),
    "hoisted": ("#999999", "D", ".."),
    "snnlstm-step": ("#56B4E9", "s", "xx"),
    "snnlstm": ("#0072B2", "*", ""),
    "snnlstm-cudagraph": ("#D55E00", "p", "**"),
    "snnlstm-checkpoint": ("#F0E442", "h", "oo"),
    "snntorch-compile-last": ("#009E73", "P", "--"),
    "snntorch-compile-graph": ("#D55E00", "X", "++"),
    "snnlstm-measured": ("#009E73", "<", "||"),
}
"""STYLE has colour, marker and hatch of each provider that a plot may show."""


def pyplot() -> Any:
    """Returns matplotlib.pyplot, which draws to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_all(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draws every plot for which there are rows, one set per dtype; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    timed = [row for row in rows if row.mode != "backward" and row.provider not in DETAILS]
    plots = {
        "speedup": (speedup, [r for r in timed if r.speedup and r.provider != BASELINE]),
        # snnTorch's time for a quantised cell is no convolution's, and would stretch the axis.
        "roofline": (roofline, [r for r in timed if r.gflops and "quant" not in r.options]),
        "memory": (memory, [r for r in rows if r.case == "long" and r.live_mib is not None]),
    }
    for dtype in dtypes:
        for name, (draw, chosen) in plots.items():
            if shown := [row for row in chosen if row.dtype == dtype]:
                suffix = f"-{dtype}" if len(dtypes) > 1 else ""
                drawn.append(directory / f"{name}{suffix}.png")
                figure = draw(shown)
                figure.savefig(drawn[-1], dpi=150)
                pyplot().close(figure)
    return drawn


def _figure(
    rows: Sequence[Row], size: tuple[float, float], draw: Callable, sharey: bool, title: str = ""
) -> tuple[Any, Any]:
    """Makes a figure with a panel of `size` for each mode, which draw(panel, rows) draws."""
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    width, height = size
    figure, panels = pyplot().subplots(
        1, len(modes), sharey=sharey, squeeze=False,
        figsize=(1.2 + width * len(modes), height), layout="constrained",
    )  # fmt: skip
    for panel, mode in zip(panels[0], modes, strict=True):
        draw(panel, [row for row in rows if row.mode == mode])
        panel.set_title(MODE_TITLES[mode], fontsize=10)
    row = rows[0]
    origin = (
        f"{row.device}, {row.threads} threads, {row.dtype}, torch {row.torch}, "
        f"snnlstm {row.version} ({row.commit}), {row.date[:10]}"
    )
    figure.suptitle(f"{title}{origin}", fontsize=8)
    return figure, panels[0][0]


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in PROVIDERS if any(row.provider == name for row in rows)]


def speedup(rows: Sequence[Row]) -> Any:
    """Draws bars of speed-up over snnTorch eager, inference and training."""
    plt = pyplot()
    cases, names = list(dict.fromkeys(row.case for row in rows)), _names(rows)
    values = [row.speedup or 1.0 for row in rows]
    low, high = min(0.7, 0.8 * min(values)), max(2.0, 1.7 * max(values))
    ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low < t < high]
    height = 0.8 / len(names)

    def draw(panel: Any, here: Sequence[Row]) -> None:
        for row in here:  # a bar reaches from 1 to the speed-up
            colour, _, hatch = STYLE[row.provider]
            place = names.index(row.provider) - (len(names) - 1) / 2
            y = cases.index(row.case) + place * height
            panel.barh(
                y, row.speedup - 1, left=1, height=0.9 * height, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            digits = 2 if row.speedup < 1 else 1 if row.speedup < 10 else 0
            text = f"{row.speedup:.{digits}f}x"
            panel.text(1.04 * max(row.speedup, 1), y, text, va="center", fontsize=7)
        panel.set_xscale("log")
        panel.set_xlim(low, high)
        panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        panel.minorticks_off()
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("speed-up over snnTorch eager")

    size = (4.2, 1.6 + 0.14 * len(cases) * (len(names) + 1))
    figure, first = _figure(rows, size, draw, sharey=True)
    first.set_yticks(range(len(cases)), cases)
    first.set_ylim(len(cases) - 0.5, -0.5)
    look = [{"facecolor": STYLE[name][0], "hatch": STYLE[name][2]} for name in names]
    _legend(
        figure, [plt.Rectangle((0, 0), 1, 1, edgecolor="white", **kind) for kind in look], names
    )
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Draws effective GFLOP/s against operations per byte, and the roofs of the run's machine."""
    ticker = pyplot().matplotlib.ticker
    peak, bandwidth = rows[0].peak_gflops, rows[0].peak_gbytes
    ridge = peak / bandwidth
    rates = [row.gflops for row in rows]

    def draw(panel: Any, here: Sequence[Row]) -> None:
        places = [row.intensity for row in here]
        low, high = 0.4 * min(*places, ridge), 1.6 * max(*places, ridge)
        panel.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.2)
        panel.text(1.05 * low, 1.04 * peak, f"matrix product {peak:.0f} GFLOP/s", fontsize=8)
        panel.text(1.05 * low, low * bandwidth, f"copy {bandwidth:.1f} GB/s", va="top", fontsize=8)
        for name in _names(here):
            colour, marker, _ = STYLE[name]
            points = [(row.intensity, row.gflops) for row in here if row.provider == name]
            size = 70 if marker == "*" else 28
            panel.scatter(*zip(*points, strict=True), size, colour, marker, label=name, zorder=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(low, high)
        panel.set_ylim(0.25 * min(rates), 2.0 * max(peak, *rates))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        _name_columns(panel, here)
        panel.set_xlabel("operations per byte that must move (FLOP/B)")

    above = "Above the roof: fewer operations than direct convolution (Winograd, zeros skipped)\n"
    figure, first = _figure(rows, (5.0, 5.4), draw, sharey=True, title=above)
    first.set_ylabel("effective GFLOP/s (direct convolution's operations)")
    _legend(figure, *first.get_legend_handles_labels())
    return figure


def _name_columns(panel: Any, rows: Sequence[Row]) -> None:
    """Draws a thin line through the points of each case, with the case's name at its foot."""
    columns: dict[float, list[str]] = {}
    for row in rows:
        # Cases within 5 % of each other share a line.
        near = [x for x in columns if abs(x / row.intensity - 1) < 0.05]
        names = columns.setdefault(near[0] if near else row.intensity, [])
        if row.case not in names:
            names.append(row.case)
    up = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 7}
    for x, names in columns.items():
        panel.axvline(x, color="#CCCCCC", linewidth=0.8, zorder=0)
        transform = panel.get_xaxis_transform()
        panel.text(x, 0.015, ", ".join(names), transform=transform, **up)


def memory(rows: Sequence[Row]) -> Any:
    """Draws peak memory against the length of the sequence, inference and training."""

    def draw(panel: Any, here: Sequence[Row]) -> None:
        for name in _names(rows):
            points = sorted(
                (row.steps, row.live_mib, row.resident_mib) for row in here if row.provider == name
            )
            steps, live, resident = zip(*points, strict=True) if points else ((), (), ())
            colour, marker, _ = STYLE[name]
            panel.plot(steps, live, color=colour, marker=marker, label=name)
            panel.plot(steps, resident, color=colour, linestyle=":", linewidth=1.2)
        panel.set_xlabel("time steps T")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)

    one = rows[0]
    shape = f"N={one.batch} {one.cin}->{one.cout} {one.height}x{one.width}, measured\n"
    figure, first = _figure(rows, (4.2, 4.0), draw, sharey=False, title=shape)
    first.set_ylabel("peak memory beyond weights and x (MiB)")
    first.plot([], [], color="#555555", linestyle=":", label="resident")
    first.legend(fontsize=8)
    return figure
