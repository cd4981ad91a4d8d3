"""Opens the device's SQLite files: private to their owner, durable, usable by two processes at once."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sottovoce.errors import ConfigError
from sottovoce.sqlite_transaction import transaction

_BUSY_TIMEOUT_S = 30.0


def open_database(
    path: Path, *, schema: Sequence[str], version: int, upgrades: Mapping[int, Sequence[str]] | None = None
) -> sqlite3.Connection:
    """Open the database in the file `path` (made with mode 0600 if missing) in autocommit mode.

    Write-ahead logging lets one process read while another imports; `synchronous = FULL` makes a commit outlive a power
    cut; `secure_delete` overwrites what is deleted.

    Args:
        path: The file.
        schema: The statements that make an empty database one of this `version`.
        version: Version of the schema, >= 1.
        upgrades: Version -> the statements that make it the next one.

    Raises:
        ConfigError: The file cannot be opened, is not a database, or was made by another release.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_TIMEOUT_S)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open {path}: {error}") from error
    try:
        _prepare(connection, schema, version, upgrades or {})
    except (sqlite3.Error, ConfigError) as error:
        connection.close()
        raise ConfigError(f"{path} cannot be used: {error}") from error
    return connection


def _prepare(
    connection: sqlite3.Connection, schema: Sequence[str], version: int, upgrades: Mapping[int, Sequence[str]]
) -> None:
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")
    with writing(connection):
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        statements = list(schema) if found == 0 else []
        while 0 < found < version and found in upgrades:
            statements += upgrades[found]
            found += 1
        if found not in (0, version):
            raise ConfigError(f"it has schema {found}, this release knows {version}; install the matching release")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version:d}")


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one write transaction: committed (and on the disk) at its end, rolled back by any error.

    Raises:
        ConfigError: The file cannot be written, for example because the disk is full; nothing was changed.
    """
    try:
        with transaction(connection):
            yield
    except sqlite3.Error as error:
        raise ConfigError(f"a database of this device cannot be written: {error}; is the disk full?") from error
