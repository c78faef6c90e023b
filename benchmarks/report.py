"""Shows the rows of a run as tables, and draws what a release publishes.

Rows are a pandas table, one row for each case, mode and provider; times are milliseconds of all
time steps. `speedup` is the median of the case's first provider, timed in the same rounds, over
this median; it is missing where the machine was too busy for ratios. `compiling` is the processor
time in seconds that torch.compile took before the rounds, where it compiled the loop over time,
with that of the C++ compilers that it started.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = ["threads", "dtype"]
ROOT = Path(__file__).resolve().parents[1]
HISTORY = ROOT / "benchmarks" / "results" / "history.csv"  # rows of releases
RELEASE = ["version", "processor", "network", "form"]
MODES = ("inference", "training")
QUANTITIES = [mode + quantity for quantity in ("", " ms", " compiling") for mode in MODES]
COLUMNS = [*RELEASE, *QUANTITIES]
FORMS = ("snntorch", "loop", "compiled-loop", "sequence", "inductor")
COMPILED = ("compiled-loop", "inductor")
# These colours differ for any kind of colour vision (Okabe and Ito).
COLOURS = dict(zip(FORMS, ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7"), strict=True))
LIBRARIES = {"snntorch": COLOURS["snntorch"], "snnlstm": COLOURS["sequence"]}
COLOURED = "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"
# This grey is readable on white and on black.
STYLE = dict.fromkeys(COLOURED, "#808890") | {"svg.hashsalt": "snnlstm", "legend.framealpha": 0}
README_FORMS = {
    "loop": "loop: import or `accelerate`",
    "compiled-loop": "loop, compiled",
    "inductor": "snnTorch under `torch.compile`",
}
README_NETWORKS = {  # what a reader has, which names the bars of the pictures; and its sizes
    "documentation": "two cells: 28x28, T=10 N=32, as in snnTorch's documentation",
    "events": "convolution, Leaky, one cell: 32x32, T=20 N=16",
    "conv": "convolutions, Leaky: 28x28, T=25 N=32, tutorial 6",
    "dense": "Leaky alone: 784-1000-10, T=25 N=128, tutorial 5",
    "deep": "batch norm, convolutions, Leaky: 32x32, T=10 N=8",
}


def number(value: Any, unit: str = "") -> str:
    """Formats a value with three significant digits and no exponent; "-" if it is missing."""
    if value is None or pd.isna(value):
        return "-"
    text = f"{value:.3g}"
    return (f"{float(text):.0f}" if "e" in text and value >= 1 else text) + unit


def factor(value: Any, unit: str = "") -> str:
    """Formats a speed-up with two digits, as every table and picture shows it."""
    if value is None or pd.isna(value):
        return "-"
    return (
        f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
    ) + unit


def heading(rows: pd.DataFrame) -> str:
    """Says with how many threads, in which type and in which time the rows were measured."""
    row = rows.iloc[0].to_dict()
    plural = "s" if row["threads"] > 1 else ""
    time = "processor time" if row["clock"] == "processor" else "time"
    return f"{row['threads']} thread{plural}, {row['dtype']}, ms of {time}"


def block(rows: pd.DataFrame) -> str:
    """Formats one case in one mode, with a line for each provider."""
    units = {"p20": "", "ms": "", "p80": "", "speedup": "x", "gflops": "", "mib": ""}
    units["compiling"] = " s"
    shown = rows[["provider", *units, "rounds", "path"]].copy()
    for name, unit in units.items():
        shown[name] = [number(value, unit) for value in rows[name]]
    notes = [f"{row.provider}: {row.note}\n" for row in rows.itertuples() if row.note]
    row = rows.iloc[0].to_dict()
    title = f"{row['case']}, {row['mode']}  [{row['title']}], {heading(rows)}"
    table = shown.loc[:, (shown != "-").any()].to_string(index=False)
    return "\n".join([title, table, *notes, ""])


def figures(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what history.csv keeps of a run: a row for each network and form, of both modes."""
    quantities, case = ["speedup", "ms", "compiling"], ["version", "device", "case", "provider"]
    wide = rows.pivot_table(quantities, case, "mode", sort=False)
    wide.columns = [mode if q == "speedup" else f"{mode} {q}" for q, mode in wide.columns]
    return wide.rename_axis(index=RELEASE).reset_index().reindex(columns=COLUMNS)


def markdown(rows: pd.DataFrame) -> str:
    """Formats speed-ups as tables, inference / training, one for each type and thread count."""
    lines = []
    titles = dict(zip(rows.case, rows.title, strict=True))
    for _, part in rows.groupby(RUN, sort=False):
        lines += [f"{heading(part)}, {' / '.join(part['mode'].unique())}:", ""]
        lines += [table(figures(part), titles), ""]
    return "\n".join(lines)


def table(found: pd.DataFrame, titles: dict[str, str]) -> str:
    """Formats the figures of one run, with a line for each network."""
    firsts = found.groupby("network", sort=False).form.first()
    forms = _in_order({*found.form.unique()} - {*firsts})
    compiled = [form for form in forms if form in COMPILED]
    head = ["network or layer", f"{' or '.join(firsts.unique())}, ms", *forms]
    times = [f"compiling {form}, s" if len(compiled) > 1 else "compiling, s" for form in compiled]
    cells = [[*head, *times], ["---"] * (len(head) + len(compiled))]
    for network, first in firsts.items():
        own = found[found.network == network].set_index("form")
        line = [f"**{network}**: {titles[network]}", _pair(own, first, " ms", number)]
        line += [_pair(own, form, "", factor) for form in forms]
        cells.append([*line, *(_pair(own, form, " compiling", number) for form in compiled)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _pair(own: pd.DataFrame, form: str, quantity: str, text: Callable[[Any], str]) -> str:
    """Formats a form's quantity, inference / training, and one without either as "-"."""
    shown = [mode for mode in MODES if own[f"{mode} ms"].notna().any() or own[mode].notna().any()]
    texts = [text(own[mode + quantity].get(form)) for mode in shown]
    return " / ".join(texts) if any(text != "-" for text in texts) else "-"


def write(rows: pd.DataFrame, out: Path) -> None:
    """Writes rows.csv, history.csv and table.md, and prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "rows.csv", index=False)
    print(f"wrote {out / 'rows.csv'}")
    if rows.empty:
        return
    _, first = next(iter(rows.groupby(RUN, sort=False)))
    figures(first).to_csv(out / "history.csv", index=False, float_format="%.4g")
    (out / "table.md").write_text(markdown(rows))
    print("", markdown(rows), sep="\n")


def draw_history(mode: str) -> Figure:
    """Draws the speed-ups of all releases in a mode, a panel for each processor, the last first."""
    runs = reversed([*pd.read_csv(HISTORY).groupby(["version", "processor"], sort=False)])
    return _panels({", ".join(name): _speedups(part, mode) for name, part in runs}, mode)


def save(figure: Figure, path: Path) -> None:
    """Writes a picture that is readable on white and on black."""
    figure.savefig(path, transparent=True, metadata={"Date": None})


def _speedups(found: pd.DataFrame, mode: str) -> pd.DataFrame:
    """Returns the speed-ups in a mode, a line for each network and a column for each form."""
    others = found[found.duplicated("network") | (found.form.isin(FORMS[1:]))]
    bars = others.pivot_table(mode, "network", "form", sort=False)
    return bars[_in_order(bars)]


def _in_order(forms: Iterable[str]) -> list[str]:
    """Returns forms in the order of every table and picture."""
    return sorted(forms, key=lambda form: FORMS.index(form) if form in FORMS else len(FORMS))


def _panels(
    panels: dict[str, pd.DataFrame], mode: str, width: float = 3.7, most: float = 1
) -> Figure:
    """Draws bars that begin at 1x, a group for each network, by default as wide as a telephone.

    The axis reaches beyond `most`, and beyond every bar.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # which draws to files alone
    from matplotlib.ticker import LogLocator

    a_bar = 0.18 if width < 4 else 0.13  # inches
    heights = [0.8 + a_bar * len(bars) * (1 + len(bars.columns)) for bars in panels.values()]
    with rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(width, 1 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
        for panel, (title, bars) in zip(axes, panels.items(), strict=True):
            look: Any = {"left": 1, "logx": True, "width": 0.8, "legend": False, "color": COLOURS}
            (bars - 1).plot.barh(ax=panel, **look)
            for drawn, form in zip(panel.containers, bars, strict=True):
                labels = bars[form].map(lambda value: factor(value, "x"), na_action="ignore")
                panel.bar_label(drawn, labels.fillna("").tolist(), padding=2)
            panel.axvline(1, color="gray", linewidth=1)
            least = bars.min(axis=None)
            limits = 0.65 * least if least < 1 else 1, 1.6 * max(most, bars.max(axis=None))
            panel.set(ylabel="", xlim=limits)
            panel.set_title(title, fontsize=8)
            panel.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}x")
            panel.minorticks_off()
            panel.spines[["top", "right"]].set_visible(False)
            panel.invert_yaxis()
        axes[-1].set_xlabel(f"speed-up over snnTorch in {mode}\n(logarithmic axis)")
        handles = {bar.get_label(): bar for panel in axes for bar in panel.containers}
        names = [README_FORMS.get(form, form).replace("`", "") for form in handles]
        columns = 1 if width < 4 else 2
        figure.legend(handles.values(), names, loc="outside lower center", ncols=columns)
    return figure


# ---- what a release publishes --------------------------------------------------------------------


def published() -> dict[Path, str]:
    """Returns README.md and docs/performance.md with the figures of the last run in HISTORY.

    Both pages have them between the lines "speed:begin" and "speed:end".
    """
    from benchmarks.networks import TABLES

    found = _last_run()
    titles = {name: case.title for part in TABLES.values() for name, case in part.items()}
    titles = {name: title.replace("->", "→") for name, title in titles.items()}
    forms = {form: title for form, title in README_FORMS.items() if form in {*found.form}}
    head = ["speed-up, inference / training", *forms.values()]
    lines = [head, ["---"] * len(head)]
    for network, title in README_NETWORKS.items():
        own = found[found.network == network].set_index("form")
        if own.empty:
            continue  # the last run has not timed it
        pairs = [_pair(own, form, "", factor) for form in forms]
        name, _, sizes = title.partition(": ")
        lines.append([f"**{name}**: {sizes}", *pairs])
    tables = {
        ROOT / "README.md": "\n".join(f"| {' | '.join(line)} |" for line in lines),
        ROOT / "docs" / "performance.md": table(found, titles),
    }
    return {page: _between(page.read_text(), text) for page, text in tables.items()}


def _last_run() -> pd.DataFrame:
    rows = pd.read_csv(HISTORY)
    return rows[rows.processor == rows.processor.iloc[-1]]


def _between(page: str, text: str) -> str:
    """Puts a text between the lines that mark its place."""
    begin, end = "<!-- speed:begin -->\n", "<!-- speed:end -->"
    before, rest = page.split(begin)
    return before + begin + text + "\n" + end + rest.split(end)[1]


def publish() -> None:
    """Writes the pages of :func:`published`, and the two pictures of README.md."""
    for page, text in published().items():
        page.write_text(text)
    found = _last_run()
    title = f"one thread of an {found.processor.iloc[0]}"
    names = {
        key: textwrap.fill(text.partition(":")[0], 16) for key, text in README_NETWORKS.items()
    }
    bars = {mode: _speedups(found, mode).reindex(names) for mode in MODES}
    for mode, own in bars.items():
        forms = [form for form in README_FORMS if form in own]
        own = own[forms].rename(index=names)
        most = max(part[forms].max(axis=None) for part in bars.values())
        path = ROOT / "docs" / "images" / f"speedup-{mode}.svg"
        save(_panels({title: own}, mode, 4.6, most), path)


if __name__ == "__main__":
    publish()
