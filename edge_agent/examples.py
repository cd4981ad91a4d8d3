"""The example store: the device's own examples, by collection, in one SQLite file that never leaves the device.

A collection has named columns, each of one type and shape; an example is one row. Rows of numbers alone are packed to a
fixed length; rows with text are MessagePack. An import is whole or not at all. What is forgotten is overwritten on the
disk as well as SQLite can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from edge_agent.database import open_database, writing
from edge_agent.example_files import TEXT, Cells, Column, Rows, measure, rows_of, rows_of_arrays
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.identity import NAME
from sottovoce.types import Array, TensorType

_VERSION = 2
_SOURCE = "CREATE TABLE source (collection TEXT PRIMARY KEY, position TEXT NOT NULL)"
_SCHEMA = (
    "CREATE TABLE collection (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, columns TEXT NOT NULL)",
    "CREATE TABLE example (id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL "
    "REFERENCES collection (id), added_unix_s REAL NOT NULL, content BLOB NOT NULL)",
    "CREATE INDEX example_of_collection ON example (collection, id)",
    _SOURCE,
)
_UPGRADES = {1: (_SOURCE,)}


class _TextRow(msgspec.Struct, array_like=True, frozen=True):
    """An example with text: its numbers, packed, and its texts, both in the order of the columns."""

    numbers: bytes
    texts: list[str]


_ROWS = msgspec.msgpack.Encoder()
_READ_ROW = msgspec.msgpack.Decoder(_TextRow)


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of rows: how many are examples now, and for each of the others what was wrong with it."""

    added: int
    errors: tuple[str, ...]


class ExampleStore:
    """All collections of one device. Not for sharing between threads; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        """Open the store in the file `path`, making it if missing.

        Raises:
            ConfigError: The file cannot be used.
        """
        self._database = open_database(path, schema=_SCHEMA, version=_VERSION, upgrades=_UPGRADES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def import_file(self, collection: str, path: Path, *, now_s: float) -> int:
        """Append the examples in a .npz, .csv or .jsonl file (see `edge_agent.example_files`); return how many.

        Args:
            collection: Made if missing; 1 to 64 characters of A-Z a-z 0-9 _ -.
            path: The file; it is read twice, row by row, first to check it and then to store it.
            now_s: The time the examples count as added, Unix seconds: the latest time the device knows, because with
                the 1970 of a Pi without a clock they would be too old at once.

        Raises:
            ConfigError: No such file, an unknown ending, or an impossible collection name.
            BadExamples: With file, line and column; nothing was stored.
        """
        rows = rows_of(path)
        try:
            return self._append(collection, rows, now_s)
        except BadExamples as error:
            raise BadExamples(f"{path}: {error}; nothing was imported") from error
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error

    def add(self, collection: str, examples: Mapping[str, Array], *, now_s: float) -> int:
        """Append `examples` (arrays with equal first dimension, the name is the column); return how many.

        Args and Raises as for `import_file`.
        """
        return self._append(collection, lambda: rows_of_arrays(examples), now_s)

    def append(
        self, collection: str, rows: Sequence[tuple[str, Cells]], *, now_s: float, position: str | None = None
    ) -> Appended:
        """Append those of `rows` that are examples of the collection, and keep the source's position with them.

        Args:
            collection: Made of the first good row if missing.
            rows: Pairs of a place for messages and the cells by column.
            now_s: As for `import_file`.
            position: Where its source goes on reading; None leaves the position as it is.

        Raises:
            ConfigError: An impossible collection name, or the file cannot be written; nothing was changed.
        """
        _check_name(collection)
        errors: list[str] = []
        with writing(self._database):
            found = self._collection(collection)
            for place, cells in rows:
                try:
                    measured = measure(iter([(place, cells)]))
                    found = found or self._make(collection, measured)
                    _check_fit(collection, found[1], measured)
                except BadExamples as error:
                    errors.append(str(error))
                    continue
                self._insert(found, iter([(place, cells)]), now_s)
            if position is not None:
                self._database.execute("INSERT OR REPLACE INTO source VALUES (?, ?)", (collection, position))
        return Appended(len(rows) - len(errors), tuple(errors))

    def position(self, collection: str) -> str | None:
        """Return where the source of a collection goes on reading; None if it has not begun."""
        row = self._database.execute("SELECT position FROM source WHERE collection = ?", (collection,)).fetchone()
        return None if row is None else str(row[0])

    def read(self, collection: str, *, newest: int = 0) -> dict[str, Array]:
        """Return the examples of a collection, oldest first: column -> array, first dimension the examples.

        A column of text is an array of `str` objects.

        Args:
            collection: Its name.
            newest: Return only so many, the last ones stored; 0 returns all.

        Raises:
            BadExamples: There is no such collection, or it is empty.
        """
        found = self._collection(collection)
        if found is None:
            raise BadExamples(
                f"there are no examples in collection {collection!r}: edge-agent import {collection} FILE"
            )
        number, columns = found
        query = "SELECT content FROM example WHERE collection = ? ORDER BY id DESC LIMIT ?"
        contents = [row[0] for row in self._database.execute(query, (number, newest or -1))]
        if not contents:
            raise BadExamples(f"collection {collection!r} is empty: edge-agent import {collection} FILE")
        return _unpacked(contents[::-1], columns)

    def span(self, collection: str, *, newest: int = 0) -> tuple[int, int]:
        """Return the numbers of the oldest and the newest of these examples; (1, 0) if there are none.

        Numbers grow in stored order over all collections, and none is given twice.

        Args and the order as for `read`.
        """
        query = """SELECT coalesce(min(id), 1), coalesce(max(id), 0) FROM (
            SELECT example.id FROM example JOIN collection ON example.collection = collection.id
            WHERE collection.name = ? ORDER BY example.id DESC LIMIT ?)"""
        oldest, last = self._database.execute(query, (collection, newest or -1)).fetchone()
        return int(oldest), int(last)

    def count(self, collection: str) -> int:
        """Return the number of examples in a collection, 0 if there is none of that name."""
        return self.collections().get(collection, 0)

    def collections(self) -> dict[str, int]:
        """Return the name and number of examples of every collection, sorted by name."""
        query = "SELECT name, count(example.id) FROM collection LEFT JOIN example ON example.collection = collection.id"
        return dict(self._database.execute(f"{query} GROUP BY name ORDER BY name").fetchall())

    def columns(self, collection: str) -> dict[str, TensorType]:
        """Return the type of one example's value in every column of a collection; nothing if there is none."""
        found = self._collection(collection)
        return {} if found is None else {name: column.type for name, column in found[1].items()}

    def retain(self, collection: str, *, max_age_s: float = 0.0, max_count: int = 0, now_s: float) -> int:
        """Forget what is older than `max_age_s` seconds, then all but the newest `max_count`; return how many.

        Args:
            collection: Its name; nothing happens if there is none.
            max_age_s: 0 keeps every age.
            max_count: 0 keeps all.
            now_s: The latest time the device knows, Unix seconds.
        """
        found = self._collection(collection)
        if found is None:
            return 0
        oldest = now_s - max_age_s if max_age_s else -math.inf
        newest = "SELECT id FROM example WHERE collection = ? ORDER BY id DESC LIMIT ?"
        with writing(self._database):
            aged = self._database.execute(
                "DELETE FROM example WHERE collection = ? AND added_unix_s < ?", (found[0], oldest)
            )
            over = self._database.execute(
                f"DELETE FROM example WHERE collection = ? AND id NOT IN ({newest})",  # noqa: S608  a constant
                (found[0], found[0], max_count or -1),
            )
            removed = aged.rowcount + over.rowcount
        self._scrub(removed)
        return removed

    def forget(self, collection: str) -> int:
        """Erase a collection; return how many examples it had."""
        found = self._collection(collection)
        if found is None:
            return 0
        with writing(self._database):
            removed = self._database.execute("DELETE FROM example WHERE collection = ?", (found[0],)).rowcount
            self._database.execute("DELETE FROM collection WHERE id = ?", (found[0],))
        self._scrub(removed)
        return removed

    def _append(self, collection: str, rows: Callable[[], Rows], now_s: float) -> int:
        _check_name(collection)
        measured = measure(rows())
        with writing(self._database):
            found = self._collection(collection) or self._make(collection, measured)
            _check_fit(collection, found[1], measured)
            return self._insert(found, rows(), now_s)

    def _insert(self, collection: tuple[int, Mapping[str, Column]], rows: Rows, now_s: float) -> int:
        number, columns = collection
        inserted = self._database.executemany(
            "INSERT INTO example (collection, added_unix_s, content) VALUES (?, ?, ?)",
            ((number, now_s, content) for content in _packed(rows, columns)),
        )
        return inserted.rowcount

    def _make(self, name: str, columns: Mapping[str, Column]) -> tuple[int, dict[str, Column]]:
        types = json.dumps({column: str(measured.type) for column, measured in columns.items()})
        made = self._database.execute("INSERT INTO collection (name, columns) VALUES (?, ?)", (name, types))
        return int(made.lastrowid or 0), dict(columns)

    def _collection(self, name: str) -> tuple[int, dict[str, Column]] | None:
        row = self._database.execute("SELECT id, columns FROM collection WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        return row[0], {column: Column(_column_type(notation)) for column, notation in json.loads(row[1]).items()}

    def _scrub(self, removed: int) -> None:
        """Empty the write-ahead log, which still holds what was deleted; another reader may delay that, harmlessly."""
        if removed:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _check_name(collection: str) -> None:
    if not NAME.fullmatch(collection):
        raise ConfigError(f"the collection {collection!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")


def _column_type(notation: str) -> TensorType:
    return TensorType(TEXT, ()) if notation == TEXT else TensorType.parse(notation)  # Text is no type that travels.


def _check_fit(collection: str, columns: Mapping[str, Column], measured: Mapping[str, Column]) -> None:
    if columns.keys() != measured.keys():
        raise BadExamples(
            f"it has columns {', '.join(sorted(measured))}, and collection {collection!r} has "
            f"{', '.join(sorted(columns))}; import it under another name, or forget the collection first"
        )
    for name, column in columns.items():
        if not column.accepts(measured[name]):
            raise BadExamples(
                f"{measured[name].since}, column {name!r}: {measured[name].type} does not fit the {column.type} of "
                f"collection {collection!r}; import it under another name, or forget the collection first"
            )


def _record(columns: Mapping[str, Column]) -> np.dtype[np.void]:
    """Return the layout of the numbers of one example: every column's value, packed, little-endian."""
    numbers = {name: column for name, column in columns.items() if not column.is_text}
    return np.dtype([(n, c.type.numpy_dtype.newbyteorder("<"), c.shape) for n, c in numbers.items()])


def _packed(rows: Rows, columns: Mapping[str, Column]) -> Iterator[bytes]:
    record, texts = _record(columns), [name for name, column in columns.items() if column.is_text]
    for place, cells in rows:
        example = np.zeros((), dtype=record)
        try:
            for name in record.names or ():
                column = columns[name]
                example[name] = np.asarray(cells[name], dtype=column.type.numpy_dtype).reshape(column.shape)
            numbers = example.tobytes()
            yield _ROWS.encode(_TextRow(numbers, [str(cells[name]) for name in texts])) if texts else numbers
        except (KeyError, ValueError, OverflowError) as error:
            raise BadExamples(f"{place}: the file changed while it was read; import it again") from error


def _unpacked(contents: Sequence[bytes], columns: Mapping[str, Column]) -> dict[str, Array]:
    """Return the columns of examples that `_packed` wrote."""
    texts = [name for name, column in columns.items() if column.is_text]
    rows = [_READ_ROW.decode(content) for content in contents] if texts else []
    record = _record(columns)
    numbers = b"".join([row.numbers for row in rows] if texts else contents)
    table = np.frombuffer(numbers, dtype=record) if record.names else None
    arrays: dict[str, Array] = {}
    for name, column in columns.items():
        if table is not None and not column.is_text:
            arrays[name] = np.ascontiguousarray(table[name], dtype=column.type.numpy_dtype)
        else:
            arrays[name] = np.array([row.texts[texts.index(name)] for row in rows], dtype=object)
    return arrays
