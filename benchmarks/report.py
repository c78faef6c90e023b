"""Shows the rows of a run: tables, pictures, and the comparison of two runs.

Rows are a pandas table, one row for each case, mode and provider; times are milliseconds of all
time steps. `speedup` is the median of the case's first provider, timed in the same rounds, over
this median; it is missing where the machine was too busy for ratios. `compiling` is the processor
time in seconds that torch.compile took before the rounds, where it compiled the loop over time.
"""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = ["threads", "dtype"]
CASE = [*RUN, "case", "mode"]
TEXTS = ["path", "note", "shape"]
KEY = [*CASE, "title", "provider"]  # what is the same measurement in two runs
HISTORY = Path(__file__).parent / "results" / "history.csv"  # rows of releases
RELEASE = ["version", "processor", "network", "form"]
SMALLEST_CHANGE = 0.03
"""Clocks and the placement of pages make medians of equal programs differ by up to this share."""
FEWEST_ROUNDS = 5
STYLE = "tableau-colorblind10"  # of Matplotlib; its colours differ for any kind of colour vision


def read(path: Path) -> pd.DataFrame:
    """Reads rows.csv, or that of a directory; raises ValueError that names a file without rows."""
    path = path / "rows.csv" if path.is_dir() else path
    try:
        rows = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
        return rows.assign(**{name: rows[name].fillna("") for name in TEXTS})
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of this suite: {error}") from None


def number(value: Any, unit: str = "") -> str:
    """Formats a value with three significant digits and no exponent; "-" if it is missing."""
    if value is None or pd.isna(value):
        return "-"
    text = f"{value:.3g}"
    return (f"{float(text):.0f}" if "e" in text and value >= 1 else text) + unit


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


def markdown(rows: pd.DataFrame) -> str:
    """Formats speed-ups as tables for a README, inference / training, one for each thread count."""
    lines = []
    first = set(rows.groupby(CASE, sort=False).provider.first())
    for _, part in rows.groupby(RUN, sort=False):
        others = [name for name in part.provider.unique() if name not in first]
        head = ["network or layer", f"{' or '.join(first)}, ms", *others]
        compiled = part[part.compiling.notna()].provider.unique()
        head += ["compiling"] * len(compiled)
        cells = [head, ["---"] * len(head)]
        for case, group in part.groupby("case", sort=False):
            line = [
                f"**{case}**: {group.title.iloc[0]}",
                _pair(group, group.provider.iloc[0], "ms"),
            ]
            line += [_pair(group, name, "speedup", "x") for name in others]
            cells.append([*line, *(_pair(group, name, "compiling", " s") for name in compiled)])
        lines += [f"{heading(part)}, {' / '.join(part['mode'].unique())}:", ""]
        lines += [f"| {' | '.join(line)} |" for line in cells] + [""]
    return "\n".join(lines)


def _pair(rows: pd.DataFrame, provider: str, column: str, unit: str = "") -> str:
    found = rows[rows.provider == provider].set_index("mode")[column]
    return " / ".join(number(found.get(mode), unit) for mode in rows["mode"].unique())


def compare(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Says which rows changed between two runs, and which differ by noise.

    A row counts as changed only if the bands between the 20th and the 80th percentile of both runs
    do not touch, and the medians lie more than SMALLEST_CHANGE apart. A row with too few rounds
    for percentiles, or of a machine that was too busy for ratios, gets no verdict.
    """
    both = before.merge(after, on=KEY, suffixes=(" A", " B"))
    if both.empty:
        return "The two runs have no row in common."
    both["change"] = both["ms B"] / both["ms A"] - 1
    both["verdict"] = [_verdict(row) for row in both.to_dict("records")]
    names = ["version", "commit", "date", "device", "torch", "snntorch", "python"]
    origins = pd.DataFrame({"A": before.iloc[0][names], "B": after.iloc[0][names]})
    text = [origins.to_string()]
    shown = both[[*CASE, "provider"]].copy()
    for name, unit in (("ms", ""), ("speedup", "x"), ("mib", "")):
        for run in ("A", "B"):
            shown[f"{name} {run}"] = [number(value, unit) for value in both[f"{name} {run}"]]
    shown = shown.loc[:, (shown != "-").any()]
    shown["change"] = both.change.map("{:+.1%}".format)
    shown["verdict"] = both.verdict
    drift = both.groupby(CASE).change.first().median()
    counts = ", ".join(f"{count} {name}" for name, count in both.verdict.value_counts().items())
    alone = len(before) + len(after) - 2 * len(both)
    text += ["", shown.to_string(index=False), "", f"{counts}; {alone} rows are in one run only."]
    text.append(f"The baseline, the same code in both runs, changed by {drift:+.1%} in the median.")
    return "\n".join(text)


def _verdict(row: dict[str, Any]) -> str:
    if not (row["quiet A"] and row["quiet B"]):
        return "busy"
    if min(row["rounds A"], row["rounds B"]) < FEWEST_ROUNDS:
        return "too few rounds"
    if abs(row["change"]) > SMALLEST_CHANGE and row["p80 B"] < row["p20 A"]:
        return "faster"
    if abs(row["change"]) > SMALLEST_CHANGE and row["p20 B"] > row["p80 A"]:
        return "slower"
    return "noise"


def write(rows: pd.DataFrame, out: Path) -> None:
    """Writes rows.csv, history.csv, table.md and, with Matplotlib, pictures; prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "rows.csv", index=False)
    print(f"wrote {out / 'rows.csv'}")
    if rows.empty:
        return
    ratios = rows[rows.speedup.notna() & (rows.speedup != 1)]
    ratios = ratios.pivot_table("speedup", ["version", "device", "case", "provider"], "mode")
    ratios.rename_axis(index=RELEASE).round(2).to_csv(out / "history.csv")
    (out / "table.md").write_text(markdown(rows))
    print("", markdown(rows), sep="\n")
    for path in draw(rows, out) if importlib.util.find_spec("matplotlib") else ():
        print(f"wrote {path}")


def draw(rows: pd.DataFrame, directory: Path) -> list[Path]:
    """Draws the speed-ups, a picture for each mode; returns the files."""
    drawn = []
    shown = rows[rows.speedup.notna() & (rows.speedup != 1)]
    for (threads, dtype, mode), part in shown.groupby([*RUN, "mode"]):
        table = part.pivot_table("speedup", "case", "provider", sort=False)
        figure = _bars(table.rename(index=lambda name: Path(name).name), mode)  # of a user's file
        row = part.iloc[0]
        origin = f"{row.device}, torch {row.torch}, snnlstm {row.version} ({row.commit})"
        figure.suptitle(textwrap.fill(f"{origin}, {heading(part)}", 66), fontsize=7)
        drawn.append(directory / f"speedup-{threads}-{dtype}-{mode}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None})
    return drawn


def draw_history(mode: str) -> Figure:
    """Draws the speed-ups of all releases in a mode."""
    rows = pd.read_csv(HISTORY).set_index("network")
    rows["release"] = rows.version + ", " + rows.processor + ", " + rows.form
    return _bars(rows.pivot_table(mode, "network", "release", sort=False), mode)


def _bars(table: pd.DataFrame, mode: str) -> Figure:
    """Draws bars that begin at 1x, a group for each row, as wide as a telephone's screen."""
    from matplotlib import style
    from matplotlib.figure import Figure  # which draws to files alone
    from matplotlib.ticker import LogLocator

    with style.context([STYLE, {"font.size": 9, "svg.hashsalt": "snnlstm"}]):
        size = (3.7, 2 + 0.18 * len(table) * (1 + len(table.columns)))
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        (table - 1).plot.barh(ax=panel, left=1, logx=True, width=0.8, legend=False)
        for bars, name in zip(panel.containers, table, strict=True):
            labels = table[name].map("{:.1f}x".format, na_action="ignore").fillna("")
            panel.bar_label(bars, labels.tolist(), padding=2)
        panel.axvline(1, color="gray", linewidth=1)
        least, most = table.min(axis=None), table.max(axis=None)
        limits = 0.8 * least if least < 1 else 1, 1.5 * max(1, most)
        panel.set(xlabel=f"speed-up over snnTorch, {mode}", ylabel="", xlim=limits)
        panel.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}x")
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
        panel.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=1 + (len(max(table, key=len)) < 20))
    return figure
