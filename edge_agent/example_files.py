"""Reads examples out of files: .npz, .csv and .jsonl become rows of named arrays, or an error that names the place.

    .npz     one array per column, equal first dimensions
    .csv     a header; cells are numbers or JSON lists; a vector may be spread over columns name[0], name[1], ...; a
             column whose first cell is neither is one of text
    .jsonl   one object a line; values are numbers, nested lists or text

Whole numbers become int32, or int64 where they do not fit; real numbers become float32; true and false become 1 and 0.
One column has one type and one shape in all rows. Text has at most 10,000 characters and a column of its own. Missing
values, NaN and infinity are refused.
"""

from __future__ import annotations

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sottovoce.errors import BadExamples, ConfigError
from sottovoce.types import Array, TensorType

Cells: TypeAlias = Mapping[str, object]
Rows: TypeAlias = Iterator[tuple[str, Cells]]
"""Pairs of a place for messages (`line 7`, `row 3`) and the cells of one example by column."""

_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")
_UNREADABLE_NPZ = (
    *(OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError),
    *(SyntaxError, zipfile.BadZipFile, zlib.error),
)
"""What np.load and zipfile raise on damaged files."""
_WIDENS = ("int32", "int64", "float32")  # A column has the first of these that holds all its values.
TEXT = "str"
"""The dtype of a column of text."""
MAX_TEXT_CHARACTERS = 10_000


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a collection.

    Attributes:
        type: Type of one example's value, in the notation, without the batch dimension.
        since: Where in the file its type was decided, for messages.
    """

    type: TensorType
    since: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example's value; every dimension is known."""
        return tuple(length for length in self.type.shape if length is not None)

    @property
    def is_text(self) -> bool:
        """True for a column of text."""
        return self.type.dtype == TEXT

    def accepts(self, other: Column) -> bool:
        """Say whether values of `other` can be kept in this column: the same shape, and no real number as a whole."""
        if self.is_text or other.is_text:
            return self.type == other.type
        widens = _WIDENS.index(other.type.dtype) <= _WIDENS.index(self.type.dtype)
        return widens and other.type.shape == self.type.shape


def rows_of(path: Path) -> Callable[[], Rows]:
    """Return a function that reads the examples in the file `path` from its beginning, row by row.

    Raises:
        ConfigError: The file's name does not end in .npz, .csv or .jsonl, or there is no such file.
    """
    readers = {".npz": _npz_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path}: the name must end in {', '.join(readers)}; that says how to read it")
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    return lambda: reader(path)


def rows_of_arrays(arrays: Mapping[str, Array]) -> Rows:
    """Return the examples in `arrays`, whose first dimensions are equal.

    Raises:
        BadExamples: There is no array, one has no first dimension, or the first dimensions differ.
    """
    if not arrays or any(array.ndim == 0 for array in arrays.values()):
        raise BadExamples("every column must be an array with one entry per example")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise BadExamples(f"the columns have different numbers of examples: {counts}; make them equal")
    for index in range(next(iter(lengths.values()))):
        yield f"row {index}", {name: array[index] for name, array in arrays.items()}


def measure(rows: Rows) -> dict[str, Column]:
    """Return the columns that hold every row.

    Raises:
        BadExamples: There is no row, a value is neither a finite number nor text that can be kept, or columns, types
            or shapes change from row to row.
    """
    columns: dict[str, Column] = {}
    for place, cells in rows:
        if not columns:
            columns = {name: _measure_cell(cell, place, name) for name, cell in cells.items()}
        if cells.keys() != columns.keys():
            names = ", ".join(sorted(cells.keys() ^ columns.keys()))
            raise BadExamples(f"{place}: column {names} is not in every example; every one must have the same")
        for name, cell in cells.items():
            columns[name] = _widened(columns[name], _measure_cell(cell, place, name), place, name)
    if not columns:
        raise BadExamples("there is no example in it")
    return columns


def _measure_cell(cell: object, place: str, name: str) -> Column:
    where = f"{place}, column {name!r}"
    if not name.isprintable():
        raise BadExamples(f"{where}: a column's name is shown to people: it must be printable text")
    if isinstance(cell, str) and name:
        return _measure_text(cell, place, where)
    try:
        array = np.asarray(cell)
    except (ValueError, OverflowError) as error:
        raise BadExamples(f"{where}: the lists have different lengths; fill them up to one shape") from error
    dtype = _dtype_for(array)
    if dtype is None:
        raise BadExamples(f"{where}: {_shown(cell)} is neither a number nor text; write labels as whole numbers from 0")
    if not dtype:
        raise BadExamples(f"{where}: {_shown(cell)} is NaN, infinite or too large; leave the example out or fill it")
    if not array.size or not name:
        raise BadExamples(f"{where}: the list is empty" if name else f"{place}: a column has no name")
    return Column(TensorType(dtype, array.shape), since=place)


def _measure_text(text: str, place: str, where: str) -> Column:
    if len(text) > MAX_TEXT_CHARACTERS:
        raise BadExamples(
            f"{where}: a text of {len(text)} characters; at most {MAX_TEXT_CHARACTERS} can be kept, cut it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadExamples(
            f"{where}: {_shown(text)} is not Unicode text: half a character without its other half"
        ) from error
    return Column(TensorType(TEXT, ()), since=place)


def _dtype_for(array: Array) -> str | None:
    """Return the dtype that keeps `array`, nothing ("") if its values have none, None if they are no numbers."""
    match array.dtype.kind:
        case "b":
            return "int32"
        case "i" | "u":
            low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
            return next((name for name in ("int32", "int64") if _holds(name, low, high)), "")
        case "f":
            return "float32" if bool(np.all(np.abs(array) <= np.finfo(np.float32).max)) else ""
        case _:
            return "" if array.ndim == 0 and isinstance(array.item(), int) else None


def _holds(dtype: str, low: int, high: int) -> bool:
    bounds = np.iinfo(dtype)
    return bool(bounds.min <= low and high <= bounds.max)


def _widened(column: Column, found: Column, place: str, name: str) -> Column:
    if column.is_text != found.is_text:
        now, before = ("text", "numbers") if found.is_text else ("a number", "text")
        raise BadExamples(f"{place}, column {name!r}: {now}, but {before} before; one column has one type")
    if column.type.shape != found.type.shape:
        raise BadExamples(
            f"{place}, column {name!r}: shape {list(found.type.shape)}, but {list(column.type.shape)} before; "
            "one column has one shape"
        )
    return column if column.accepts(found) else found


def _shown(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else text[:37] + "..."


# --- formats ----------------------------------------------------------------------------------------------------------


def _npz_rows(path: Path) -> Rows:
    # The file is opened here because np.load leaves one open that it cannot read.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one bare array; save it by name with np.savez")
            arrays = {name: archive[name] for name in archive.files}
        except _UNREADABLE_NPZ as error:
            raise BadExamples(f"not a readable .npz of plain numbers: {error}") from error
    return rows_of_arrays(arrays)


def _jsonl_rows(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", json_object(line, f"line {number}")
    except UnicodeDecodeError as error:
        raise BadExamples(f"it is not UTF-8 text: {error}") from error


def json_object(line: str, place: str) -> Cells:
    """Return the cells of one line of JSON. Raises BadExamples: it is not a JSON object."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadExamples(f"{place}: not JSON: {error}") from error
    if not isinstance(parsed, dict) or not parsed:
        raise BadExamples(f'{place}: not an object; write one a line, such as {{"x": [0.5, 1], "y": 3}}')
    return parsed


def _csv_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            layout = csv_layout(header)
            texts: frozenset[int] | None = None
            for cells in reader:
                if cells:
                    texts = text_positions(cells, layout) if texts is None else texts
                    place = f"line {reader.line_num}"
                    yield place, csv_cells(cells, header, layout, place, texts=texts)
        except csv.Error as error:
            raise BadExamples(f"line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise BadExamples(f"it is not UTF-8 text: {error}") from error


def csv_layout(header: list[str]) -> dict[str, int | list[int]]:
    """Return column -> its position, or the positions of a vector's entries in the order of their indices.

    Raises:
        BadExamples: A name is missing or stands twice, or the indices of a vector have a gap.
    """
    if not header or not all(header) or len(set(header)) != len(header):
        raise BadExamples("line 1: the header must name every column, each name once")
    layout: dict[str, int | list[int]] = {}
    entries: dict[str, dict[int, int]] = {}
    for position, text in enumerate(header):
        match = _INDEXED.fullmatch(text)
        if match is None:
            layout[text] = position
        else:
            entries.setdefault(match["name"], {})[int(match["index"])] = position
    for name, positions in entries.items():
        if name in layout or sorted(positions) != list(range(len(positions))):
            raise BadExamples(
                f"line 1: {name}[...] must be {name}[0], {name}[1], ... without a gap, and no plain {name}"
            )
        layout[name] = [positions[index] for index in range(len(positions))]
    return layout


def csv_cells(
    cells: list[str],
    header: list[str],
    layout: Mapping[str, int | list[int]],
    place: str,
    *,
    texts: frozenset[int] = frozenset(),
) -> Cells:
    """Return the cells of one line of CSV by column.

    Args:
        cells: As they stand there.
        header: The columns' names.
        layout: What `csv_layout` returned.
        place: The line, for messages.
        texts: Positions of the columns of text; all others are numbers.

    Raises:
        BadExamples: There are too many or too few, or one is no number.
    """
    if len(cells) != len(header):
        raise BadExamples(f"{place}: {len(cells)} cells, and the header has {len(header)} columns")
    values = [
        text if position in texts else _csv_number(text, place, name)
        for position, (text, name) in enumerate(zip(cells, header, strict=True))
    ]
    return {
        name: values[where] if isinstance(where, int) else [values[position] for position in where]
        for name, where in layout.items()
    }


def text_positions(cells: list[str], layout: Mapping[str, int | list[int]]) -> frozenset[int]:
    """Return where the first line of examples has text, though never as an entry of a vector.

    Args:
        cells: Of that line.
        layout: What `csv_layout` returned.
    """
    alone = {where for where in layout.values() if isinstance(where, int)}
    return frozenset(position for position, text in enumerate(cells) if position in alone and _is_text(text))


def _is_text(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip()) and not cell.lstrip().startswith("[")
    return False


def _csv_number(text: str, place: str, name: str) -> object:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        pass
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadExamples(f"{place}, column {name!r}: not a JSON list: {error}") from error
    what = "empty" if not text.strip() else f"{_shown(text)}, not a number"
    raise BadExamples(f"{place}, column {name!r}: {what}; write numbers (labels as whole numbers from 0) or JSON lists")
