"""All of a block reaches the file, or nothing of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from sottovoce.sqlite_transaction import transaction


@pytest.fixture
def database(tmp_path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(tmp_path / "rows.sqlite", isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    connection.execute(
        "CREATE TABLE child (parent INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED, value INTEGER)"
    )
    return connection


def rows(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT count(*) FROM child").fetchone()[0]


def test_what_a_block_wrote_is_on_the_disk_at_its_end(database: sqlite3.Connection, tmp_path: Path) -> None:
    with transaction(database):
        database.execute("INSERT INTO child VALUES (NULL, 1)")
    assert rows(sqlite3.connect(tmp_path / "rows.sqlite")) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_nothing_and_no_open_transaction(
    database: sqlite3.Connection, error: type[BaseException]
) -> None:
    with pytest.raises(error), transaction(database):
        _insert_and_fail(database, error)
    assert (rows(database), database.in_transaction) == (0, False)


def _insert_and_fail(connection: sqlite3.Connection, error: type[BaseException]) -> None:
    connection.execute("INSERT INTO child VALUES (NULL, 1)")
    raise error


def test_a_refused_commit_leaves_nothing_and_no_open_transaction(database: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), transaction(database):
        database.execute("INSERT INTO child VALUES (7, 1)")
    assert (rows(database), database.in_transaction) == (0, False)


def test_an_error_that_rolled_back_by_itself_is_the_one_that_is_told(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO parent VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"), transaction(database):
        database.execute("INSERT OR ROLLBACK INTO parent VALUES (1)")
    assert not database.in_transaction
