"""The journal's file: how it is opened, its tables, and how a journal of an earlier release becomes one of this."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sottovoce.errors import ConfigError
from sottovoce.sqlite_transaction import transaction

VERSION = 2
_BUSY_TIMEOUT_S = 10.0

_FIRST = """
CREATE TABLE blobs (digest BLOB PRIMARY KEY, content BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, toml TEXT NOT NULL, bundle BLOB NOT NULL, moments BLOB,
    status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', position INTEGER NOT NULL DEFAULT 0,
    submitted_ms INTEGER NOT NULL);
CREATE TABLE states (
    task INTEGER NOT NULL REFERENCES tasks(id), position INTEGER NOT NULL, digest BLOB NOT NULL, released BLOB,
    PRIMARY KEY (task, position)) WITHOUT ROWID;
CREATE TABLE rounds (
    id INTEGER PRIMARY KEY, task INTEGER NOT NULL REFERENCES tasks(id), position INTEGER NOT NULL,
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, plan_name TEXT NOT NULL, plan BLOB NOT NULL, state BLOB NOT NULL,
    phase TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', cohort TEXT NOT NULL DEFAULT '[]',
    survivors TEXT NOT NULL DEFAULT '[]', dropped TEXT NOT NULL DEFAULT '{}', metrics TEXT NOT NULL DEFAULT '{}',
    bytes_up TEXT NOT NULL DEFAULT '{}', bytes_down TEXT NOT NULL DEFAULT '{}',
    broadcast_bytes INTEGER NOT NULL DEFAULT 0,
    started_ms INTEGER NOT NULL, ended_ms INTEGER, UNIQUE (round, attempt));
CREATE TABLE announcements (
    digest BLOB PRIMARY KEY, previous BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    envelope BLOB NOT NULL);
CREATE TABLE refusals (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE certificates (
    device TEXT PRIMARY KEY, der BLOB NOT NULL, seen_ms INTEGER NOT NULL) WITHOUT ROWID;
"""

_SECOND = """
ALTER TABLE tasks ADD COLUMN kind TEXT NOT NULL DEFAULT 'hosted';
ALTER TABLE tasks ADD COLUMN purpose TEXT NOT NULL DEFAULT '';
ALTER TABLE rounds ADD COLUMN detail TEXT NOT NULL DEFAULT '';
ALTER TABLE states ADD COLUMN server BLOB;
CREATE TABLE requests (
    task INTEGER PRIMARY KEY REFERENCES tasks(id), key TEXT NOT NULL, run TEXT NOT NULL, content BLOB NOT NULL,
    request BLOB NOT NULL, broadcast BLOB NOT NULL, terms BLOB NOT NULL, deadline_ms INTEGER NOT NULL,
    expires_unix_s INTEGER NOT NULL, sums BLOB);
CREATE UNIQUE INDEX requests_by_key ON requests (key) WHERE key != '';
CREATE INDEX tasks_by_status ON tasks (status);
CREATE INDEX rounds_by_task ON rounds (task);
CREATE INDEX requests_by_run ON requests (run);
CREATE INDEX requests_by_content ON requests (content);
UPDATE tasks SET status = 'failed',
    reason = 'begun by an earlier release; submit it again (what it has committed stays)' WHERE status = 'running';
"""
"""`tasks.kind` is hosted or request. `states.digest` is what devices are given, `states.server` the server's own state
where that is something else. A server's state of the first version has another form, so what was running ends there."""

_STEPS = {0: _FIRST, 1: _SECOND}


def open_journal(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """Return the connection to a journal with the tables of this release, making the file if it is not there.

    Raises:
        ConfigError: The file cannot be opened, is not a journal, or was written by a later release; or by an earlier
            one, or it is not there, and it is opened for reading only.
    """
    if read_only and not path.exists():
        raise ConfigError(f"there is no journal {path}; `coordinator submit` or `coordinator run` makes it")
    uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    try:
        if not read_only:
            path.touch(mode=0o600)  # SQLite gives its -wal and -shm files the same mode.
        database = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open the journal {path}: {error}") from error
    database.row_factory = sqlite3.Row
    try:
        _prepare(database, path, read_only=read_only)
    except sqlite3.Error as error:
        database.close()
        raise ConfigError(f"{path} is not a journal of this release: {error}") from error
    except ConfigError:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    """Make the tables, or bring those of an earlier release up to date."""
    version = _version(database)
    if version > VERSION:
        raise ConfigError(f"{path} was written by a later release of Sottovoce; upgrade this one")
    if read_only:
        if version < VERSION:
            raise ConfigError(f"{path} was written by an earlier release; `coordinator run` brings it up to date")
        return
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        database.execute(f"PRAGMA {pragma}")
    while (version := _version(database)) < VERSION:
        _step(database, version)


def _step(database: sqlite3.Connection, version: int) -> None:
    """Go one version up, unless another process was quicker."""
    with transaction(database):
        if _version(database) == version:
            for statement in filter(str.strip, _STEPS[version].split(";\n")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {version + 1}")


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])
