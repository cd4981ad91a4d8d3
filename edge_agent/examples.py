"""The example store: the device's own examples, by collection, in one SQLite file that never leaves the device.

A collection has named columns, each of one type and shape; an example is one row of fixed length. An import is whole or
not at all. What is forgotten is overwritten on the disk as well as SQLite can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from edge_agent.database import open_database, transaction
from edge_agent.example_files import Column, Rows, measure, rows_of, rows_of_arrays
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.identity import NAME
from sottovoce.types import Array, TensorType

_VERSION = 1
_SCHEMA = (
    "CREATE TABLE collection (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, columns TEXT NOT NULL)",
    "CREATE TABLE example (id INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL "
    "REFERENCES collection (id), added_unix_s REAL NOT NULL, content BLOB NOT NULL)",
    "CREATE INDEX example_of_collection ON example (collection, id)",
)


class ExampleStore:
    """All collections of one device. Not for sharing between threads; several processes may have it open."""

    def __init__(self, path: Path) -> None:
        """Open the store in the file `path`, making it if missing.

        Raises:
            ConfigError: The file cannot be used.
        """
        self._database = open_database(path, schema=_SCHEMA, version=_VERSION)

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

    def read(self, collection: str) -> dict[str, Array]:
        """Return all examples of a collection, oldest first: column -> array, first dimension the examples.

        Raises:
            BadExamples: There is no such collection, or it is empty.
        """
        found = self._collection(collection)
        if found is None:
            raise BadExamples(
                f"there are no examples in collection {collection!r}: edge-agent import {collection} FILE"
            )
        number, columns = found
        query = "SELECT content FROM example WHERE collection = ? ORDER BY id"
        content = b"".join(row[0] for row in self._database.execute(query, (number,)))
        if not content:
            raise BadExamples(f"collection {collection!r} is empty: edge-agent import {collection} FILE")
        table = np.frombuffer(content, dtype=_record(columns))
        return {name: np.ascontiguousarray(table[name], dtype=c.type.numpy_dtype) for name, c in columns.items()}

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
        with transaction(self._database):
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
        with transaction(self._database):
            removed = self._database.execute("DELETE FROM example WHERE collection = ?", (found[0],)).rowcount
            self._database.execute("DELETE FROM collection WHERE id = ?", (found[0],))
        self._scrub(removed)
        return removed

    def _append(self, collection: str, rows: Callable[[], Rows], now_s: float) -> int:
        if not NAME.fullmatch(collection):
            raise ConfigError(f"the collection {collection!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")
        measured = measure(rows())
        with transaction(self._database):
            number, columns = self._collection(collection) or self._make(collection, measured)
            _check_fit(collection, columns, measured)
            inserted = self._database.executemany(
                "INSERT INTO example (collection, added_unix_s, content) VALUES (?, ?, ?)",
                ((number, now_s, content) for content in _packed(rows(), columns)),
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
        return row[0], {column: Column(TensorType.parse(text)) for column, text in json.loads(row[1]).items()}

    def _scrub(self, removed: int) -> None:
        """Empty the write-ahead log, which still holds what was deleted; another reader may delay that, harmlessly."""
        if removed:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


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
    """Return the layout of one example: every column's value, packed, little-endian."""
    return np.dtype([(n, c.type.numpy_dtype.newbyteorder("<"), c.shape) for n, c in columns.items()])


def _packed(rows: Rows, columns: Mapping[str, Column]) -> Iterator[bytes]:
    record = _record(columns)
    for place, cells in rows:
        example = np.zeros((), dtype=record)
        try:
            for name, column in columns.items():
                example[name] = np.asarray(cells[name], dtype=column.type.numpy_dtype).reshape(column.shape)
        except (KeyError, ValueError, OverflowError) as error:
            raise BadExamples(f"{place}: the file changed while it was read; import it again") from error
        yield example.tobytes()
