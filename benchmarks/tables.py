"""Plain text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


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
