"""The suite's plots: bars of speed-up, a roofline, memory against T.

Colours are Okabe and Ito's, told apart with any kind of colour vision (https://jfly.uni-koeln.de/
color/); markers and hatches differ too, so that the plots survive a black-and-white print.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "snnlstm-direct": ("#009E73", "P", "--"),
    "snnlstm-winograd": ("#D55E00", "X", "++"),
    "snnlstm-pointwise": ("#009E73", "<", "||"),
    "snnlstm-cudagraph": ("#D55E00", "p", "**"),
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
    """Draw every plot for which there are rows, one set per dtype; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for dtype in dtypes:
        suffix = f"-{dtype}" if len(dtypes) > 1 else ""
        chosen = [row for row in rows if row.dtype == dtype]
        for name, draw in (("speedup", speedup), ("roofline", roofline), ("memory", memory)):
            figure = draw(chosen)
            if figure is not None:
                path = directory / f"{name}{suffix}.png"
                figure.savefig(path, dpi=150)
                pyplot().close(figure)
                drawn.append(path)
    return drawn


def _origin(rows: Sequence[Row]) -> str:
    row = rows[0]
    return (
        f"{row.device}, {row.threads} threads, {row.dtype}, torch {row.torch}, "
        f"snnlstm {row.version} ({row.commit}), {row.date[:10]}"
    )


def _names(rows: Sequence[Row]) -> list[str]:
    return [name for name in PROVIDERS if any(row.provider == name for row in rows)]


def speedup(rows: Sequence[Row]) -> Any:
    """Bars of speed-up over snnTorch eager, inference and training; None without timed rows."""
    rows = [row for row in rows if row.speedup and row.provider not in (BASELINE, *DETAILS)]
    rows = [row for row in rows if row.mode != "backward"]  # the table has it
    if not rows:
        return None
    plt = pyplot()
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    cases = list(dict.fromkeys(row.case for row in rows))
    names = _names(rows)
    values = [row.speedup or 1.0 for row in rows]
    low, high = min(0.7, 0.8 * min(values)), max(2.0, 1.7 * max(values))
    figure, panels = _panels(modes, 4.2, 1.6 + 0.14 * len(cases) * (len(names) + 1), sharey=True)
    for panel, mode in zip(panels, modes, strict=True):
        for place, name in enumerate(names):
            _bars(panel, rows, cases, mode, name, place, len(names))
        panel.set_xscale("log")
        panel.set_xlim(low, high)
        ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low < t < high]
        panel.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        panel.minorticks_off()
        panel.axvline(1, color="black", linewidth=1)
        panel.set_title(MODE_TITLES[mode], fontsize=10)
        panel.set_xlabel("speed-up over snnTorch eager")
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=STYLE[n][0], hatch=STYLE[n][2], edgecolor="white")
        for n in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))
    figure.suptitle(_origin(rows), fontsize=8)
    return figure


def _panels(modes: Sequence[str], width: float, height: float, sharey: bool) -> tuple[Any, Any]:
    figure, panels = pyplot().subplots(
        1,
        len(modes),
        sharey=sharey,
        squeeze=False,
        figsize=(1.2 + width * len(modes), height),
        layout="constrained",
    )
    return figure, panels[0]


def _bars(
    panel: Any, rows: Sequence[Row], cases: list[str], mode: str, name: str, place: int, of: int
) -> None:
    """One provider's bars, from 1 to its speed-up, each in its place among `of` in its case."""
    colour, _, hatch = STYLE[name]
    height = 0.8 / of
    for row in rows:
        if (row.mode, row.provider) != (mode, name) or not row.speedup:
            continue
        y = cases.index(row.case) + (place - (of - 1) / 2) * height
        panel.barh(
            y,
            row.speedup - 1,
            left=1,
            height=0.9 * height,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.5,
        )
        digits = 2 if row.speedup < 1 else 1 if row.speedup < 10 else 0
        text = f"{row.speedup:.{digits}f}x"
        panel.text(1.04 * max(row.speedup, 1), y, text, va="center", fontsize=7)


def roofline(rows: Sequence[Row]) -> Any:
    """Effective GFLOP/s against operations per byte, under the roofs of this run's machine."""
    rows = [row for row in rows if row.gflops and row.intensity and row.peak_gflops]
    rows = [row for row in rows if row.provider not in DETAILS and row.mode != "backward"]
    # What a quantised cell costs in snnTorch is no convolution: it would stretch the axis.
    rows = [row for row in rows if "quant" not in row.options]
    if not rows:
        return None
    plt = pyplot()
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, panels = _panels(modes, 5.0, 5.4, sharey=True)
    peak, bandwidth = rows[0].peak_gflops or 1.0, rows[0].peak_gbytes or 1.0
    ridge = peak / bandwidth
    rates = [row.gflops or peak for row in rows]
    for panel, mode in zip(panels, modes, strict=True):
        here = [row for row in rows if row.mode == mode]
        places = [row.intensity or ridge for row in here]
        low, high = 0.4 * min(*places, ridge), 1.6 * max(*places, ridge)
        panel.plot([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.2)
        panel.text(1.05 * low, 1.04 * peak, f"matrix product {peak:.0f} GFLOP/s", fontsize=8)
        panel.text(1.05 * low, low * bandwidth, f"copy {bandwidth:.1f} GB/s", va="top", fontsize=8)
        for name in _names(here):
            colour, marker, _ = STYLE[name]
            points = [row for row in here if row.provider == name]
            panel.scatter(
                [row.intensity for row in points],
                [row.gflops for row in points],
                c=colour,
                marker=marker,
                s=70 if marker == "*" else 28,
                label=name,
                zorder=3,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(low, high)
        panel.set_ylim(0.25 * min(rates), 2.0 * max(peak, *rates))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        _name_columns(panel, here)
        panel.set_title(MODE_TITLES[mode], fontsize=10)
        panel.set_xlabel("operations per byte that must move (FLOP/B)")
    panels[0].set_ylabel("effective GFLOP/s (direct convolution's operations)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))
    figure.suptitle(
        "Above the roof: fewer operations than direct convolution (Winograd, zeros skipped)\n"
        + _origin(rows),
        fontsize=8,
    )
    return figure


def _name_columns(panel: Any, rows: Sequence[Row]) -> None:
    """A thin line through the points of each case, and its name at the foot of it."""
    columns: dict[float, list[str]] = {}
    for row in rows:
        intensity = row.intensity or 1.0
        # Cases that lie within a few per cent share a line.
        near = [x for x in columns if abs(x / intensity - 1) < 0.05]
        names = columns.setdefault(near[0] if near else intensity, [])
        if row.case not in names:
            names.append(row.case)
    for x, names in columns.items():
        panel.axvline(x, color="#CCCCCC", linewidth=0.8, zorder=0)
        panel.text(
            x,
            0.015,
            ", ".join(names),
            transform=panel.get_xaxis_transform(),
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=7,
        )


def memory(rows: Sequence[Row]) -> Any:
    """Peak memory against the length of the sequence, inference and training."""
    rows = [row for row in rows if row.case == "long" and row.live_mib is not None]
    if not rows:
        return None
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure, panels = _panels(modes, 4.2, 4.0, sharey=False)
    for panel, mode in zip(panels, modes, strict=True):
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
    panels[0].set_ylabel("peak memory beyond weights and x (MiB)")
    panels[0].plot([], [], color="#555555", linestyle=":", label="resident")
    panels[0].legend(fontsize=8)
    first = rows[0]
    shape = f"N={first.batch} {first.cin}->{first.cout} {first.height}x{first.width}"
    figure.suptitle(f"{shape}, measured\n{_origin(rows)}", fontsize=8)
    return figure
