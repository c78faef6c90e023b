"""The suite's tables."""

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
    """Columns as wide as their longest cell; the first `left` ones aligned left, others right.

    A heading may have several lines, separated by "\\n".
    """
    heads = [cell.split("\n") for cell in header]
    depth = max(map(len, heads))
    above = [[""] * (depth - len(lines)) + lines for lines in heads]
    head_lines = [[lines[i] for lines in above] for i in range(depth)]
    table = [*head_lines, *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*map(line, head_lines), rule, *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A value with so many significant digits and no exponent; nothing for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and value >= 1 else text


def case_block(case: Case, mode: str, rows: Sequence[Row]) -> str:
    """One case in one mode: a line per provider."""
    header = ["provider", "p20", "p50", "p80", "speed-up", "GFLOP/s", "of peak", "live MiB"]
    header += ["resident", "rounds"]
    cells = []
    for row in rows:
        share = row.gflops / row.peak_gflops if row.gflops and row.peak_gflops else None
        cells.append(
            [
                row.provider,
                number(row.p20_ms),
                number(row.p50_ms),
                number(row.p80_ms),
                "" if row.speedup is None else f"{row.speedup:.2f}x",
                number(row.gflops),
                "" if share is None else f"{share:.0%}",
                number(row.live_mib),
                number(row.resident_mib),
                str(row.rounds),
            ]
        )
    table = format_table(header, cells)
    notes = [f"  {row.provider}: {row.note}" for row in rows if row.note]
    for path in dict.fromkeys(row.path for row in rows if row.path):
        ran = ", ".join(row.provider for row in rows if row.path == path)
        notes.append(f"  {path}: {ran}")
    title = f"{case.name}  {MODE_TITLES[mode]}  [{case.title}], ms per time step"
    return "\n".join([title, table, *notes, ""])


def summary(rows: Iterable[Row], goals: bool) -> str:
    """Speed-ups of all cases: one line per case and mode, one column per provider."""
    timed = [row for row in rows if row.speedup is not None]
    if not timed:
        return "Nothing was timed against the baseline."
    names = [name for name in PROVIDERS if any(row.provider == name for row in timed)]
    names.remove(BASELINE)
    header = ["case", "mode", f"{BASELINE}\nms", *(_in_lines(name) for name in names)]
    loops = {"snnlstm", "snnlstm-step"} <= set(names)
    header += ["step loop\n/ sequence"] if loops else []
    header += ["goal", ""] if goals else []
    lines = []
    met = wanted = 0
    for case, mode in dict.fromkeys((row.case, row.mode) for row in timed):
        found = {row.provider: row for row in timed if (row.case, row.mode) == (case, mode)}
        cells = [case, mode, number(found[BASELINE].p50_ms)]
        cells += [f"{found[name].speedup:.2f}x" if name in found else "-" for name in names]
        if loops:
            both = [found[name].p50_ms for name in ("snnlstm-step", "snnlstm") if name in found]
            cells.append(f"{both[0] / both[1]:.2f}" if len(both) == 2 else "-")
        if goals:
            ours = next((row for row in found.values() if row.goal), None)
            goal = ours.goal if ours else None
            verdict = ""
            if ours and ours.speedup and goal:
                wanted += 1
                met += ours.speedup >= goal
                verdict = "met" if ours.speedup >= goal else "missed"
            cells += [f"{goal:g}x" if goal else "-", verdict]
        lines.append(cells)
    text = [
        f"Speed-up over {BASELINE} (ratio of medians of interleaved rounds)",
        format_table(header, lines, left=2),
    ]
    if goals and wanted:
        of = " and ".join(sorted({row.provider for row in timed if row.goal}))
        text.append(f"{met} of {wanted} goals met (the goals are for {of}).")
    return "\n".join(text)


WORST = 10


def ranking(rows: Iterable[Row]) -> str:
    """Our speed-ups over a random sample in order, and where the lowest are; else empty."""
    text = []
    timed = [row for row in rows if row.speedup is not None and row.case.startswith("random")]
    for mode in MODES:
        for name in ("snnlstm", "snnlstm-step"):
            found = [row for row in timed if (row.mode, row.provider) == (mode, name)]
            found.sort(key=lambda row: row.speedup or 0)
            if not found:
                continue
            ratios = " ".join(f"{row.speedup:.2f}" for row in found)
            text.append(f"\n{name}, {MODE_TITLES[mode]}, {len(found)} random shapes: {ratios}")
            text += [f"  {row.speedup:.2f}x  {_shape(row)}" for row in found[:WORST]]
    return "\n".join(text)


def _shape(row: Row) -> str:
    """A row's layer as `--shape` takes it, and what ran."""
    kernel, density = row.kernel, "dense" if row.density is None else f"{row.density:g}"
    shape = f"{row.steps} {row.batch} {row.cin} {row.cout} {row.height} {row.width} {kernel}"
    return f'"{shape} density={density} {row.options}"  {row.path}'


def markdown(rows: Sequence[Row]) -> str:
    """Speed-ups as a table for a README, inference / training; empty without any."""
    timed = [row for row in rows if row.speedup is not None and row.mode != "backward"]
    names = [name for name in PROVIDERS if any(row.provider == name for row in timed)]
    names = [name for name in names if name not in (BASELINE, *DETAILS)]
    if not names:
        return ""
    modes = [mode for mode in MODES if any(row.mode == mode for row in timed)]
    header = ["layer", f"{BASELINE}, ms a step", *names]
    lines = [header, ["---"] * len(header)]
    for case in dict.fromkeys(row.case for row in timed):
        found = {(row.provider, row.mode): row for row in timed if row.case == case}
        row = next(iter(found.values()))
        x = "dense x" if row.density is None else f"{row.density:.0%} of x"
        layer = f"**{case}** T={row.steps} N={row.batch} {row.cin}→{row.cout} "
        layer += f"{row.height}x{row.width}, {row.kernel}, {x}"
        cells = [f"{layer}, {row.options}" if row.options else layer]
        times = [found.get((BASELINE, mode)) for mode in modes]
        cells.append(" / ".join(number(row.p50_ms) if row else "-" for row in times))
        for name in names:
            ratios = [found.get((name, mode)) for mode in modes]
            cells.append(" / ".join(f"{number(row.speedup)}x" if row else "-" for row in ratios))
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _in_lines(name: str) -> str:
    """A provider's name as a heading: its family above, what sets it apart below."""
    return name.replace("-", "\n", 1)


def memory_table(rows: Iterable[Row], goals: bool) -> str:
    """Peak memory of the long sequence against T; empty where it was not measured."""
    rows = [row for row in rows if row.case == "long" and row.p50_ms is None]
    if not rows:
        return ""
    names = [name for name in PROVIDERS if any(row.provider == name for row in rows)]
    lines = []
    for mode in MODES:
        for steps in dict.fromkeys(row.steps for row in rows if row.mode == mode):
            found = {row.provider: row for row in rows if (row.steps, row.mode) == (steps, mode)}
            for field in ("live", "resident"):
                peaks = {name: getattr(row, f"{field}_mib") for name, row in found.items()}
                cells = [_of_baseline(peaks.get(name), peaks.get(BASELINE)) for name in names]
                lines.append([mode, str(steps), field, *cells])
    notes = dict.fromkeys(f"{row.provider}: {row.note}" for row in rows if row.note)
    first = rows[0]
    text = [
        f"Peak memory in MiB (and as a share of {BASELINE}'s), N={first.batch} "
        f"{first.cin}->{first.cout} {first.height}x{first.width}, beyond weights and x.\n"
        "live: in use; resident: taken from the system, fragmentation included.",
        format_table(["mode", "T", "", *map(_in_lines, names)], lines, left=3),
        *notes,
    ]
    if goals:
        text.append("Goals in training at T=40: snnlstm 0.42, snnlstm-checkpoint 0.22.")
    return "\n".join(text)


def _of_baseline(peak: float | None, baseline: float | None) -> str:
    if peak is None:
        return "-"
    return f"{peak:.1f} ({peak / baseline:.2f})" if baseline else f"{peak:.1f}"


def peaks_line(peaks: Sequence[Peak]) -> str:
    """The machine's own peaks, before and after the run, and whether it stayed the same machine."""
    first, last = peaks[0], peaks[-1]
    text = (
        f"Machine's peak, measured in this run: matrix product {number(first.gflops)} GFLOP/s, "
        f"copy {number(first.gbytes)} GB/s; after the run {number(last.gflops)} and "
        f"{number(last.gbytes)}."
    )
    if abs(last.gflops / first.gflops - 1) > 0.1:
        text += "\nThey differ by more than 10 %: something else ran meanwhile. Do not trust ms."
    return text
