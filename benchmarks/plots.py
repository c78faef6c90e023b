"""The suite's plots: bars of speed-up, a roofline, memory against T.

Colours are Okabe and Ito's, told apart with any kind of colour vision (https://jfly.uni-koeln.de/
color/); markers and hatches differ too, so that the plots survive a black-and-white print.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from benchmarks.providers import BASELINE, PROVIDERS
from benchmarks.report import MODE_TITLES
from benchmarks.rows import Row

STYLE = {
    "snntorch": ("#000000", "o", ""),
    "snntorch-compile": ("#E69F00", "^", "//"),
    "snntorch-cudagraph": ("#CC79A7", "v", "\\\\"),
    "hoisted": ("#999999", "D", ".."),
    "snnlstm-step": ("#56B4E9", "s", "xx"),
    "snnlstm": ("#0072B2", "*", ""),
    "snnlstm-direct": ("#009E73", "P", "--"),
    "snnlstm-winograd": ("#D55E00", "X", "++"),
    "snnlstm-checkpoint": ("#F0E442", "h", "oo"),
}
"""provider -> (colour, marker, hatch)"""


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw_all(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw every plot for which there are rows; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in (("speedup", speedup), ("roofline", roofline), ("memory", memory)):
        figure = draw(rows)
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=150)
            pyplot().close(figure)
            drawn.append(path)
    return drawn


def _origin(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row.device}, {row.threads} threads, torch {row.torch}, "
        f"snnlstm {row.version} ({row.commit}), {row.date[:10]}"
    )


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in PROVIDERS if any(row.provider == name for row in rows)]


def speedup(rows: Sequence[Row]) -> Any:
    """Bars of speed-up over snnTorch eager, one panel per mode; None without timed rows."""
    rows = [row for row in rows if row.speedup and row.provider != BASELINE]
    if not rows:
        return None
    plt = pyplot()
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    cases = list(dict.fromkeys(row.case for row in rows))
    names = _names(rows)
    bar = 0.8 / len(names)
    figure, panels = plt.subplots(
        1,
        len(modes),
        sharey=True,
        squeeze=False,
        figsize=(2.5 + 3.6 * len(modes), 2.0 + 0.21 * len(cases) * (len(names) + 1)),
        layout="constrained",
    )
    longest = max(row.speedup or 0 for row in rows)
    shortest = min(row.speedup or 1 for row in rows)
    for panel, mode in zip(panels[0], modes, strict=True):
        for place, name in enumerate(names):
            colour, _, hatch = STYLE[name]
            found = {row.case: row for row in rows if (row.provider, row.mode) == (name, mode)}
            for number, case in enumerate(cases):
                if case not in found:
                    continue
                value = found[case].speedup or 0
                y = number + (place - (len(names) - 1) / 2) * bar
                panel.barh(
                    y,
                    value - 1,
                    left=1,
                    height=0.9 * bar,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.5,
                    label=name if number == 0 else None,
                )
                end = max(value, 1) * 1.04
                panel.text(end, y, f"{value:.2g}x", va="center", fontsize=7)
        panel.set_xscale("log")
        low, high = min(0.7, 0.8 * shortest), max(2.0, 1.6 * longest)
        panel.set_xlim(low, high)
        ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200) if low < t < high]
        panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        panel.minorticks_off()
        panel.axvline(1, color="black", linewidth=1)
        panel.set_title(MODE_TITLES[mode], fontsize=10)
        panel.set_xlabel(f"speed-up over {BASELINE} eager")
    panels[0][0].set_yticks(range(len(cases)), cases)
    panels[0][0].invert_yaxis()
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=STYLE[n][0], hatch=STYLE[n][2], edgecolor="white")
        for n in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    figure.suptitle(_origin(rows), fontsize=8)
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Effective GFLOP/s against operations per byte, under the roofs of this run's machine."""
    rows = [row for row in rows if row.gflops and row.intensity and row.peak_gflops]
    shown = ("snntorch", "snntorch-compile", "hoisted", "snnlstm")
    rows = [row for row in rows if row.provider in shown and row.mode != "backward"]
    if not rows:
        return None
    plt = pyplot()
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, panels = plt.subplots(
        1,
        len(modes),
        sharey=True,
        squeeze=False,
        figsize=(1.0 + 5.2 * len(modes), 5.0),
        layout="constrained",
    )
    peak = rows[0].peak_gflops or 1.0
    bandwidth = rows[0].peak_gbytes or 1.0
    for panel, mode in zip(panels[0], modes, strict=True):
        here = [row for row in rows if row.mode == mode]
        low = 0.4 * min(min(row.intensity or 1 for row in here), peak / bandwidth)
        high = 2.5 * max(max(row.intensity or 1 for row in here), peak / bandwidth)
        ridge = peak / bandwidth
        panel.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.2)
        panel.text(high, peak * 1.05, f"matrix product {peak:.0f} GFLOP/s", ha="right", fontsize=8)
        panel.annotate(
            f"copy {bandwidth:.1f} GB/s",
            (low, low * bandwidth),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
        for name in _names(here):
            colour, marker, _ = STYLE[name]
            points = [row for row in here if row.provider == name]
            panel.scatter(
                [row.intensity for row in points],
                [row.gflops for row in points],
                c=colour,
                marker=marker,
                s=60 if marker == "*" else 28,
                label=name,
                zorder=3,
            )
        _label_columns(panel, here)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(low, high)
        top = max(peak, *(row.gflops or 0 for row in rows))
        panel.set_ylim(0.4 * min(row.gflops or peak for row in rows), 2.5 * top)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        panel.grid(which="major", alpha=0.25)
        panel.set_title(MODE_TITLES[mode], fontsize=10)
        panel.set_xlabel("operations per byte that must move (FLOP/B)")
    panels[0][0].set_ylabel("effective GFLOP/s (direct convolution's operations)")
    panels[0][0].legend(loc="lower right", fontsize=8)
    figure.suptitle(
        "Above the roof: fewer operations than direct convolution (Winograd, zeros skipped)\n"
        + _origin(rows),
        fontsize=8,
    )
    return figure


def _label_columns(panel: Any, rows: Sequence[Row]) -> None:
    """Write each case's name over its highest point; names that share a place share a label."""
    tops: dict[float, tuple[float, list[str]]] = {}
    for row in rows:
        x, y = row.intensity or 1.0, row.gflops or 0.0
        for known in tops:
            if abs(known / x - 1) < 0.08:
                x = known
        height, names = tops.get(x, (0.0, []))
        if row.case not in names:
            names.append(row.case)
        tops[x] = (max(height, y), names)
    for x, (height, names) in tops.items():
        panel.annotate(
            "\n".join(reversed(names)),
            (x, height),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )


def memory(rows: Sequence[Row]) -> Any:
    """Peak memory against the length of the sequence, inference and training."""
    rows = [row for row in rows if row.case == "long" and row.live_mib is not None]
    if not rows:
        return None
    plt = pyplot()
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, panels = plt.subplots(
        1, len(modes), squeeze=False, figsize=(1.0 + 4.2 * len(modes), 4.0), layout="constrained"
    )
    for panel, mode in zip(panels[0], modes, strict=True):
        for name in _names(rows):
            here = [row for row in rows if (row.provider, row.mode) == (name, mode)]
            here.sort(key=lambda row: row.steps)
            colour, marker, _ = STYLE[name]
            steps = [row.steps for row in here]
            live = [row.live_mib for row in here]
            resident = [row.resident_mib for row in here]
            panel.plot(steps, live, color=colour, marker=marker, label=name)
            panel.plot(steps, resident, color=colour, linestyle=":", linewidth=1.2)
        panel.set_title(MODE_TITLES[mode], fontsize=10)
        panel.set_xlabel("time steps T")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel("peak memory beyond weights and x (MiB)")
    panels[0][0].plot([], [], color="#555555", linestyle=":", label="resident")
    panels[0][0].legend(fontsize=8)
    first = rows[0]
    shape = f"N={first.batch} {first.cin}->{first.cout} {first.height}x{first.width}"
    figure.suptitle(f"{shape}, measured\n{_origin(rows)}", fontsize=8)
    return figure
