"""Shows the rows of a run: tables, pictures, and the comparison of two runs.

Rows are a pandas table, one row for each case, mode and provider; times are milliseconds of all
time steps. `speedup` is the median of the case's first provider, timed in the same rounds, over
this median; it is missing where the machine was too busy for ratios.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pandas as pd

RUN = ["threads", "dtype"]
CASE = [*RUN, "case", "mode"]
TEXTS = ["path", "note", "shape"]
KEY = [*CASE, "title", "provider"]  # what is the same measurement in two runs
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
        cells = [head, ["---"] * len(head)]
        for case, of in part.groupby("case", sort=False):
            line = [f"**{case}**: {of.title.iloc[0]}", _pair(of, of.provider.iloc[0], "ms")]
            cells.append([*line, *(_pair(of, name, "speedup", "x") for name in others)])
        lines += [f"{heading(part)}, {' / '.join(part['mode'].unique())}:", ""]
        lines += [f"| {' | '.join(line)} |" for line in cells] + [""]
    return "\n".join(lines)


def _pair(rows: pd.DataFrame, provider: str, column: str, unit: str = "") -> str:
    of = rows[rows.provider == provider].set_index("mode")[column]
    return " / ".join(number(of.get(mode), unit) for mode in rows["mode"].unique())


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
    """Writes rows.csv, table.md and, where there is Matplotlib, pictures; prints the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "rows.csv", index=False)
    print(f"wrote {out / 'rows.csv'}")
    if rows.empty:
        return
    (out / "table.md").write_text(markdown(rows))
    print("", markdown(rows), sep="\n")
    for path in draw(rows, out) if importlib.util.find_spec("matplotlib") else ():
        print(f"wrote {path}")


def draw(rows: pd.DataFrame, directory: Path) -> list[Path]:
    """Draws bars of speed-up, a panel for each mode; returns the files."""
    from matplotlib import style
    from matplotlib.figure import Figure  # which draws to files alone
    from matplotlib.ticker import LogLocator

    drawn = []
    for (threads, dtype), part in rows[rows.speedup.notna() & (rows.speedup != 1)].groupby(RUN):
        modes = part["mode"].unique()
        lines = part.case.nunique() * (part.provider.nunique() + 1)
        with style.context(STYLE):
            size = (1.2 + 4.2 * len(modes), 1.6 + 0.14 * lines)
            figure = Figure(figsize=size, layout="constrained")
            panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
            for mode, panel in zip(modes, panels, strict=True):
                of = part[part["mode"] == mode]
                table = of.pivot_table("speedup", "case", "provider", sort=False)
                table = table.reindex(part.case.unique())
                table.plot.barh(ax=panel, logx=True, width=0.8, legend=False)
                for bars in panel.containers:
                    panel.bar_label(bars, fmt="%.3gx", fontsize=7, padding=2)
                panel.axvline(1, color="black", linewidth=1)
                panel.set_title(mode, fontsize=10)
                limits = 0.8 * min(1, part.speedup.min()), 1.6 * part.speedup.max()
                panel.set(xlabel="speed-up over snnTorch eager", ylabel="", xlim=limits)
                panel.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}x")
                panel.minorticks_off()
                panel.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        row = part.iloc[0]
        origin = f"{row.device}, torch {row.torch}, snnlstm {row.version} ({row.commit})"
        figure.suptitle(f"{origin}, {heading(part)}", fontsize=8)
        drawn.append(directory / f"speedup-{threads}-{dtype}.png")
        figure.savefig(drawn[-1], dpi=150)
    return drawn
