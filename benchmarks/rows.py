"""What a run leaves behind: one row per case, mode and provider, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measurement, with all that is needed to tell where it comes from.

    Times are milliseconds per time step. A field that was not measured is None; `note` says why
    where that needs saying.
    """

    # where
    version: str
    commit: str
    device: str
    date: str
    torch: str
    snntorch: str
    python: str
    threads: int
    dtype: str
    # what
    case: str
    steps: int
    batch: int
    cin: int
    cout: int
    height: int
    width: int
    kernel: str
    options: str
    density: float | None
    mode: str
    provider: str
    # found
    path: str = ""
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    speedup: float | None = None
    """Median of the baseline over this median: snnTorch eager, timed in the same rounds."""
    goal: float | None = None
    gflops: float | None = None
    """Effective: operations of direct convolution, whatever the algorithm, over the median."""
    peak_gflops: float | None = None
    peak_gbytes: float | None = None
    intensity: float | None = None
    """Operations over the fewest bytes that a step has to move."""
    live_mib: float | None = None
    """Peak of memory in use beyond weights and x (see benchmarks/memory.py)."""
    resident_mib: float | None = None
    """Peak of what the process took from the system for it, fragmentation included."""
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two rows of different runs the same measurement."""
        layer = (self.steps, self.batch, self.cin, self.cout, self.height, self.width)
        cell = (self.kernel, self.options, self.density)
        return (self.case, *layer, *cell, self.dtype, self.mode, self.provider)


_FIELDS = [field.name for field in dataclasses.fields(Row)]
_TYPES = typing.get_type_hints(Row)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    """Write a table, None as an empty cell, and its directory; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_rows(rows: Iterable[Row], directory: Path) -> tuple[Path, Path]:
    """Write rows.csv and rows.json into `directory`, which is made; returns both paths."""
    records = [dataclasses.asdict(row) for row in rows]
    as_csv = write_csv(directory / "rows.csv", _FIELDS, [r.values() for r in records])
    as_json = directory / "rows.json"
    as_json.write_text(json.dumps(records, indent=1) + "\n")
    return as_csv, as_json


def read_rows(path: Path) -> list[Row]:
    """Rows from a .csv or .json file, or from the directory that holds them.

    Raises ValueError naming the file where it is not one of ours.
    """
    if path.is_dir():
        path = path / "rows.json" if (path / "rows.json").exists() else path / "rows.csv"
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected rows.csv, rows.json or their directory")
    try:
        if path.suffix == ".json":
            return [Row(**record) for record in json.loads(path.read_text())]
        with path.open(newline="") as file:
            return [
                Row(**{name: _parse(name, text) for name, text in record.items()})
                for record in csv.DictReader(file)
            ]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of this suite: {error}") from None


def _parse(name: str, text: str) -> object:
    kinds = typing.get_args(_TYPES[name]) or (_TYPES[name],)
    if types.NoneType in kinds and text == "":
        return None
    return kinds[0](text)
