"""The index of a fleet's certificate authority: what it has issued, to whom, and what of that is void."""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sottovoce.errors import ConfigError

CertifiedRole: TypeAlias = Literal["device", "coordinator", "broker"]
"""Who gets certificates; a broker's is for its TLS listener only and signs nothing in the protocol."""

INDEX_FILE = "issued.sqlite"
_SCHEMA = (
    "CREATE TABLE issued (serial TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, "
    "not_before INTEGER NOT NULL, not_after INTEGER NOT NULL, revoked INTEGER, pem BLOB NOT NULL)",
    "CREATE INDEX issued_name ON issued (name)",
)


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that the authority has issued.

    Attributes:
        serial: Serial number in hexadecimal, as `revoke` takes it.
        name: Device id, `coordinator`, or the broker's name.
        role: Whose it is.
        not_before: Start of validity.
        not_after: End of validity.
        revoked: When it was revoked, or None.
        pem: The certificate.
    """

    serial: str
    name: str
    role: CertifiedRole
    not_before: datetime.datetime
    not_after: datetime.datetime
    revoked: datetime.datetime | None
    pem: bytes = field(repr=False)

    def live(self, at: datetime.datetime) -> bool:
        """Say whether it is neither revoked nor expired at the time `at`."""
        return self.revoked is None and at <= self.not_after


def issued_certificates(folder: Path) -> list[Issued]:
    """Return everything that the authority in `folder` has issued, oldest first; its key is not needed.

    Raises:
        ConfigError: There is no authority.
    """
    with open_index(folder) as index:
        return issued_rows(index)


def make_index(folder: Path) -> None:
    """Make an empty index in `folder`.

    Raises:
        ConfigError: It cannot be written.
    """
    with open_index(folder, must_exist=False) as index:
        for statement in _SCHEMA:
            index.execute(statement)


@contextmanager
def open_index(folder: Path, *, must_exist: bool = True) -> Iterator[sqlite3.Connection]:
    """Open the index of the authority in `folder` in one exclusive transaction.

    It is committed at the end, and rolled back by any error.

    Args:
        folder: The authority's.
        must_exist: False where the authority is only being made.

    Raises:
        ConfigError: There is no authority, or its index cannot be used.
    """
    path = folder / INDEX_FILE
    if must_exist and not path.exists():
        raise ConfigError(f"{folder} holds no authority; make one with: fleet-ca init --fleet NAME --out {folder}")
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigError(f"the index {path} cannot be used: {error}") from error


def issued_rows(index: sqlite3.Connection, *, name: str | None = None, serial: str | None = None) -> list[Issued]:
    """Return what was issued, oldest first: all of it, or for a name, or under a serial number."""
    columns = "serial, name, role, not_before, not_after, revoked, pem"
    wanted = "(:name IS NULL OR name = :name) AND (:serial IS NULL OR serial = :serial)"
    query = f"SELECT {columns} FROM issued WHERE {wanted} ORDER BY rowid"  # noqa: S608  constants
    return [
        Issued(number, who, role, _time(not_before), _time(not_after), None if ended is None else _time(ended), pem)
        for number, who, role, not_before, not_after, ended, pem in index.execute(
            query, {"name": name, "serial": serial}
        )
    ]


def note_issued(index: sqlite3.Connection, issued: Issued) -> None:
    """Write down a new certificate."""
    times = (_unix(issued.not_before), _unix(issued.not_after))
    row = (issued.serial, issued.name, issued.role, *times, None, issued.pem)
    index.execute("INSERT INTO issued VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def note_revoked(index: sqlite3.Connection, serial: str, *, at: datetime.datetime) -> None:
    """Write down that the certificate with the hexadecimal `serial` is void since `at`."""
    index.execute("UPDATE issued SET revoked = ? WHERE serial = ?", (_unix(at), serial))


def _unix(time_: datetime.datetime) -> int:
    return int(time_.timestamp())


def _time(unix_s: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)
