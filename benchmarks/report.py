"""Formats the suite's tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.cases import MODES, Case
from benchmarks.machine import Peak
from benchmarks.providers import BASELINE, DETAILS, PROVIDERS
from benchmarks.rows import Row

MODE_TITLES = {
    "forward": "forward (inference)",
    "backward": "backward alone",
    "both": "forward + backward (training)",
}


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Formats columns as wide as their longest cell; the first `left` columns are aligned left.

    A heading may have several lines, separated by "\\n".
    """
    depth = max(cell.count("\n") for cell in header) + 1
    heads = [["", "", *cell.split("\n")][-depth:] for cell in header]
    table = [*zip(*heads, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
    lines.insert(depth, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """Formats a value with this many significant digits and no exponent; None gives no text."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and value >= 1 else text


def ratio(value: float | None) -> str:
    """Formats a speed-up; None gives no text."""
    return "" if value is None else f"{value:.2f}x"


def percent(share: float | None) -> str:
    """Formats a share; None gives no text."""
    return "" if share is None else f"{share:.0%}"


def timed_rows(rows: Iterable[Row]) -> tuple[list[Row], list[str]]:
    """Returns the rows that are timed against the baseline, and their providers' names."""
    timed = [row for row in rows if row.speedup is not None]
    return timed, [name for name in PROVIDERS if any(row.provider == name for row in timed)]


def case_block(case: Case, mode: str, rows: Sequence[Row]) -> str:
    """Formats one case in one mode, with a line per provider."""
    header = ["provider", "p20", "p50", "p80", "speed-up", "GFLOP/s", "of peak", "live MiB"]
    network = any(row.not_cell is not None for row in rows)
    cells = []
    for row in rows:
        share = row.gflops / row.peak_gflops if row.gflops and row.peak_gflops else None
        cells.append(
            [
                row.provider,
                *map(number, (row.p20_ms, row.p50_ms, row.p80_ms)),
                ratio(row.speedup),
                number(row.gflops),
                "" if share is None else f"{share:.0%}",
                *map(number, (row.live_mib, row.resident_mib)),
                str(row.rounds),
                *([percent(row.not_cell)] if network else []),
            ]
        )
    notes = [f"  {row.provider}: {row.note}" for row in rows if row.note]
    for path in dict.fromkeys(row.path for row in rows if row.path):
        notes.append(f"  {path}: {', '.join(row.provider for row in rows if row.path == path)}")
    title = f"{case.name}  {MODE_TITLES[mode]}  [{case.title}], ms per time step"
    columns = [*header, "resident", "rounds", *(["not the cell"] if network else [])]
    table = format_table(columns, cells)
    return "\n".join([title, table, *notes, ""])


def summary(rows: Iterable[Row], goals: bool) -> str:
    """Formats the speed-ups of all cases, with a line per case and mode."""
    timed, names = timed_rows(rows)
    if not timed:
        return "Nothing was timed against the baseline."
    names.remove(BASELINE)
    loops = {"snnlstm", "snnlstm-step"} <= set(names)
    header = ["case", "mode", f"{BASELINE}\nms", *map(_in_lines, names)]
    header += ["step loop\n/ sequence"] if loops else []
    header += ["goal", ""] if goals else []
    lines, verdicts = [], []
    for case, mode in dict.fromkeys((row.case, row.mode) for row in timed):
        found = {row.provider: row for row in timed if (row.case, row.mode) == (case, mode)}
        cells = [case, mode, number(found[BASELINE].p50_ms)]
        cells += [ratio(found[name].speedup) if name in found else "-" for name in names]
        if loops:
            both = [found[name].p50_ms for name in ("snnlstm-step", "snnlstm") if name in found]
            cells.append(f"{both[0] / both[1]:.2f}" if len(both) == 2 else "-")
        if goals:
            ours = next((row for row in found.values() if row.goal), None)
            verdicts += [ours.speedup >= ours.goal] if ours else []
            met = "met" if ours and verdicts[-1] else "missed"
            cells += [f"{ours.goal:g}x", met] if ours else ["-", ""]
        lines.append(cells)
    text = [
        f"Speed-up over {BASELINE} (ratio of medians of interleaved rounds)",
        format_table(header, lines, left=2),
    ]
    if verdicts:
        of = " and ".join(sorted({row.provider for row in timed if row.goal}))
        text.append(f"{sum(verdicts)} of {len(verdicts)} goals met (the goals are for {of}).")
    return "\n".join(text)


WORST = 10


def ranking(rows: Iterable[Row]) -> str:
    """Lists our speed-ups over random shapes in order, and the shapes of the lowest."""
    text = []
    timed = [row for row in timed_rows(rows)[0] if row.case.startswith("random")]
    for mode in MODES:
        for name in ("snnlstm", "snnlstm-step"):
            found = [row for row in timed if (row.mode, row.provider) == (mode, name)]
            found.sort(key=lambda row: row.speedup or 0)
            if found:
                ratios = " ".join(f"{row.speedup:.2f}" for row in found)
                text.append(f"\n{name}, {MODE_TITLES[mode]}, {len(found)} random shapes: {ratios}")
                text += [f"  {ratio(row.speedup)}  {_shape(row)}" for row in found[:WORST]]
    return "\n".join(text)


def _shape(row: Row) -> str:
    """Returns a row's layer as `--shape` takes it, and the path."""
    density = "dense" if row.density is None else f"{row.density:g}"
    shape = f"{row.steps} {row.batch} {row.cin} {row.cout} {row.height} {row.width} {row.kernel}"
    return f'"{shape} density={density} {row.options}"  {row.path}'


def markdown(rows: Sequence[Row]) -> str:
    """Formats speed-ups as a table for a README, inference / training, or an empty text."""
    timed, names = timed_rows(row for row in rows if row.mode != "backward")
    names = [name for name in names if name not in (BASELINE, *DETAILS)]
    if not names:
        return ""
    modes = [mode for mode in MODES if any(row.mode == mode for row in timed)]
    network = any(row.not_cell is not None for row in timed)
    head = ["network or layer" if network else "layer", f"{BASELINE}, ms a step", *names]
    head += ["not the cell"] if network else []
    lines = [head, ["---"] * len(head)]
    for case in dict.fromkeys(row.case for row in timed):
        found = {(row.provider, row.mode): row for row in timed if row.case == case}
        row = next(iter(found.values()))
        x = "dense x" if row.density is None else f"{row.density:.0%} of x"
        layer = f"**{case}** T={row.steps} N={row.batch}"
        if row.kernel:
            layer += f" {row.cin}→{row.cout} {row.height}x{row.width}, {row.kernel}, {x}"
        cells = [f"{layer}, {row.options}" if row.options else layer]
        times = [found.get((BASELINE, mode)) for mode in modes]
        cells.append(" / ".join(number(row.p50_ms) if row else "-" for row in times))
        for name in names:
            ratios = [found.get((name, mode)) for mode in modes]
            cells.append(" / ".join(f"{number(row.speedup)}x" if row else "-" for row in ratios))
        if network:
            shares = [found.get((names[-1], mode)) for mode in modes]
            told = [percent(row.not_cell) for row in shares if row and row.not_cell is not None]
            cells.append(" / ".join(told))
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _in_lines(name: str) -> str:
    """Makes a heading of two lines of a provider's name."""
    return name.replace("-", "\n", 1)


def memory_table(rows: Iterable[Row], goals: bool) -> str:
    """Formats peak memory of the long sequence against T, or an empty text."""
    rows = [row for row in rows if row.case == "long" and row.p50_ms is None]
    if not rows:
        return ""
    names = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    lines = []
    order = sorted({(MODES.index(row.mode), row.steps) for row in rows})
    for mode, steps in ((MODES[index], steps) for index, steps in order):
        found = {row.provider: row for row in rows if (row.mode, row.steps) == (mode, steps)}
        for field in ("live", "resident"):
            peaks = {name: getattr(row, f"{field}_mib") for name, row in found.items()}
            cells = [_of_baseline(peaks.get(name), peaks.get(BASELINE)) for name in names]
            lines.append([mode, str(steps), field, *cells])
    first = rows[0]
    text = [
        f"Peak memory in MiB (and as a share of {BASELINE}'s), N={first.batch} "
        f"{first.cin}->{first.cout} {first.height}x{first.width}, beyond weights and x.\n"
        "live: in use; resident: taken from the system, fragmentation included.",
        format_table(["mode", "T", "", *map(_in_lines, names)], lines, left=3),
        *dict.fromkeys(f"{row.provider}: {row.note}" for row in rows if row.note),
    ]
    if goals:
        text.append("Goal in training at T=40: snnlstm-checkpoint 0.22.")
    return "\n".join(text)


def _of_baseline(peak: float | None, baseline: float | None) -> str:
    if peak is None:
        return "-"
    return f"{peak:.1f} ({peak / baseline:.2f})" if baseline else f"{peak:.1f}"


def peaks_line(peaks: Sequence[Peak]) -> str:
    """Says the machine's peaks before and after the run, and warns if they differ much."""
    first, last = peaks[0], peaks[-1]
    text = (
        f"Machine's peak, measured in this run: matrix product {number(first.gflops)} GFLOP/s, "
        f"copy {number(first.gbytes)} GB/s; after the run {number(last.gflops)} and "
        f"{number(last.gbytes)}."
    )
    if abs(last.gflops / first.gflops - 1) > 0.1:
        text += "\nThey differ by more than 10 %: something else ran meanwhile. Do not trust ms."
    return text
