"""Writes and reads the rows of a run, one per case, mode and provider, as CSV, JSON and text."""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import json
import textwrap
import types
import typing
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A row is one measurement, with its machine, versions and layer.

    Times are milliseconds per time step. A field that was not measured is None, and `note` may say
    why.
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
    """The median of snnTorch eager, timed in the same rounds, over this median."""
    goal: float | None = None
    gflops: float | None = None
    """The operations of direct convolution, for any algorithm, over the median time."""
    peak_gflops: float | None = None
    peak_gbytes: float | None = None
    intensity: float | None = None
    """The operations of a step over the fewest bytes that it has to move."""
    live_mib: float | None = None
    """The peak of memory in use beyond weights and x (see benchmarks/memory.py)."""
    resident_mib: float | None = None
    """The peak of memory that the process took from the system, with fragmentation."""
    not_cell: float | None = None
    """The share of a network's time that is not spent in our cells."""
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """Returns the fields that are equal in rows of the same measurement of two runs."""
        layer = (self.steps, self.batch, self.cin, self.cout, self.height, self.width)
        cell = (self.kernel, self.options, self.density)
        return (self.case, *layer, *cell, self.dtype, self.mode, self.provider)


_FIELDS = [field.name for field in dataclasses.fields(Row)]
_TYPES = typing.get_type_hints(Row)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    """Writes a table, with None as an empty cell, and makes its directory; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_rows(rows: Iterable[Row], directory: Path) -> tuple[Path, Path]:
    """Writes rows.csv and rows.json into `directory`, which it makes; returns both paths."""
    records = [dataclasses.asdict(row) for row in rows]
    as_csv = write_csv(directory / "rows.csv", _FIELDS, [r.values() for r in records])
    as_json = directory / "rows.json"
    as_json.write_text(json.dumps(records, indent=1) + "\n")
    return as_csv, as_json


BEGIN, END = "-----BEGIN SNNLSTM ROWS-----", "-----END SNNLSTM ROWS-----"


def to_text(rows: Iterable[Row]) -> str:
    """Returns rows as a block of lines from BEGIN to END, which survives being sent as a text."""
    table = [_FIELDS, *(list(dataclasses.asdict(row).values()) for row in rows)]
    packed = base64.b64encode(zlib.compress(json.dumps(table).encode(), 9)).decode()
    return "\n".join([BEGIN, *textwrap.wrap(packed, 76), END])


def from_text(text: str) -> list[Row]:
    """Reads the rows of all blocks that `to_text` made, from a text with anything around them.

    The text may be quoted, with ">" before each line. Raises ValueError if there is no block.
    """
    found: list[Row] = []
    for part in text.split(BEGIN)[1:]:
        packed, end, _ = part.partition(END)
        if not end:
            raise ValueError(f"the text ends before {END}")
        try:
            packed = "".join(packed.replace(">", " ").split())
            table = json.loads(zlib.decompress(base64.b64decode(packed, validate=True)))
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"the block of rows was changed on its way: {error}") from None
        found += [Row(**dict(zip(table[0], values, strict=True))) for values in table[1:]]
    if BEGIN not in text:
        raise ValueError(f"no line {BEGIN}")
    return found


def read_rows(path: Path) -> list[Row]:
    """Reads rows from a .csv or .json file, from the directory that holds them, or from a text.

    Raises ValueError that names a file without rows.
    """
    if path.is_dir():
        path = path / "rows.json" if (path / "rows.json").exists() else path / "rows.csv"
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected rows.csv, rows.json or their directory")
    try:
        if path.suffix == ".json":
            return [Row(**record) for record in json.loads(path.read_text())]
        if path.suffix != ".csv":
            return from_text(path.read_text())
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
