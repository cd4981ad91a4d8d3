"""The coordinator's durable record: tasks, rounds, states, announcements, refusals, certificates. Sums only.

Nothing here belongs to a single device but its name, its certificate and how many bytes it exchanged: no update, no
masked vector, no share, and no partial sum. A round is committed in one transaction with the state that came of it, so
a crash leaves either both or neither. SQLite in WAL mode: other processes may read, and submit, at any time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator.journal_rows import Ending, Opening, Phase, RoundRow, TaskRow, TaskStatus, round_row, task_row
from sottovoce.errors import ConfigError
from sottovoce.plan import digest_of

_BUSY_TIMEOUT_S = 10.0
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS blobs (digest BLOB PRIMARY KEY, content BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tasks (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, toml TEXT NOT NULL, bundle BLOB NOT NULL, moments BLOB,
    status TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', position INTEGER NOT NULL DEFAULT 0,
    submitted_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS states (
    task INTEGER NOT NULL REFERENCES tasks(id), position INTEGER NOT NULL, digest BLOB NOT NULL, released BLOB,
    PRIMARY KEY (task, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    id INTEGER PRIMARY KEY, task INTEGER NOT NULL REFERENCES tasks(id), position INTEGER NOT NULL,
    round INTEGER NOT NULL, attempt INTEGER NOT NULL, plan_name TEXT NOT NULL, plan BLOB NOT NULL, state BLOB NOT NULL,
    phase TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', cohort TEXT NOT NULL DEFAULT '[]',
    survivors TEXT NOT NULL DEFAULT '[]', dropped TEXT NOT NULL DEFAULT '{}', metrics TEXT NOT NULL DEFAULT '{}',
    bytes_up TEXT NOT NULL DEFAULT '{}', bytes_down TEXT NOT NULL DEFAULT '{}',
    broadcast_bytes INTEGER NOT NULL DEFAULT 0,
    started_ms INTEGER NOT NULL, ended_ms INTEGER, UNIQUE (round, attempt));
CREATE TABLE IF NOT EXISTS announcements (
    digest BLOB PRIMARY KEY, previous BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
    envelope BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS refusals (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS certificates (
    device TEXT PRIMARY KEY, der BLOB NOT NULL, seen_ms INTEGER NOT NULL) WITHOUT ROWID;
"""


class Journal:
    """The journal in one SQLite file; a context manager. One thread owns one Journal."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the journal, making it if it is not there.

        Raises:
            ConfigError: The file cannot be opened, is not a journal, or was written by a later release.
        """
        if read_only and not path.exists():
            raise ConfigError(f"there is no journal {path}; `coordinator submit` or `coordinator run` makes it")
        uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
        try:
            if not read_only:
                path.touch(mode=0o600)  # SQLite gives its -wal and -shm files the same mode.
            self._db = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot open the journal {path}: {error}") from error
        self._db.row_factory = sqlite3.Row
        try:
            self._prepare(path, read_only=read_only)
        except sqlite3.Error as error:
            self._db.close()
            raise ConfigError(f"{path} is not a journal of this release: {error}") from error
        except ConfigError:
            self._db.close()
            raise

    @classmethod
    def open_read_only(cls, path: Path) -> Journal:
        """Return the journal at `path` for reading, also while a coordinator is running.

        Raises:
            ConfigError: There is none, or it is not a journal of this release.
        """
        return cls(path, read_only=True)

    def _prepare(self, path: Path, *, read_only: bool) -> None:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA_VERSION:
            raise ConfigError(f"{path} was written by a later release of Sottovoce; upgrade this one")
        if read_only:
            return
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        if version < _SCHEMA_VERSION:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    # --- blobs and states ---------------------------------------------------------------------------------------------

    def blob(self, digest: bytes) -> bytes | None:
        """Return the content of a blob (bundle, plan or state), or None."""
        row = self._db.execute("SELECT content FROM blobs WHERE digest = ?", (digest,)).fetchone()
        return bytes(row["content"]) if row else None

    def state(self, digest: bytes) -> bytes | None:
        """Return the state with this digest, named tensors, or None."""
        return self.blob(digest)

    def state_at(self, task: int, position: int) -> tuple[bytes, bytes | None] | None:
        """Return (state, released sums or None) after `position` committed rounds of a task, or None."""
        row = self._db.execute(
            "SELECT content, released FROM states JOIN blobs USING (digest) WHERE task = ? AND position = ?",
            (task, position),
        ).fetchone()
        return (bytes(row["content"]), row["released"]) if row else None

    def _keep(self, content: bytes) -> bytes:
        digest = digest_of(content)
        self._db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, content))
        return digest

    # --- tasks --------------------------------------------------------------------------------------------------------

    def submit(self, name: str, toml: str, *, bundle: bytes, moments: bytes | None, now_ms: int) -> int:
        """Put a task into the queue, with its bundles, and return its number.

        Raises:
            ConfigError: A task of this name is queued or running.
        """
        with self._transaction():
            busy = self._db.execute(
                "SELECT status FROM tasks WHERE name = ? AND status IN ('queued', 'running')", (name,)
            ).fetchone()
            if busy:
                raise ConfigError(
                    f"a task named {name!r} is already {busy['status']}; wait for it or choose another name"
                )
            cursor = self._db.execute(
                "INSERT INTO tasks (name, toml, bundle, moments, status, submitted_ms) "
                "VALUES (?, ?, ?, ?, 'queued', ?)",
                (name, toml, self._keep(bundle), self._keep(moments) if moments is not None else None, now_ms),
            )
            return int(cursor.lastrowid or 0)

    def tasks(self) -> list[TaskRow]:
        """Return all tasks in the order of submission."""
        return [task_row(row) for row in self._db.execute("SELECT * FROM tasks ORDER BY id")]

    def task(self, number: int) -> TaskRow | None:
        """Return one task."""
        row = self._db.execute("SELECT * FROM tasks WHERE id = ?", (number,)).fetchone()
        return task_row(row) if row else None

    def next_task(self) -> TaskRow | None:
        """Return the task that is running, else the first one queued, else None."""
        row = self._db.execute(
            "SELECT * FROM tasks WHERE status IN ('running', 'queued') ORDER BY status = 'queued', id LIMIT 1"
        ).fetchone()
        return task_row(row) if row else None

    def begin_task(self, number: int, first_state: bytes) -> None:
        """Mark a task as running, with the state before its first round."""
        with self._transaction():
            self._db.execute("UPDATE tasks SET status = 'running' WHERE id = ?", (number,))
            self._db.execute("INSERT OR IGNORE INTO states VALUES (?, 0, ?, NULL)", (number, self._keep(first_state)))

    def end_task(self, number: int, status: TaskStatus, reason: str = "") -> None:
        """Mark a task that is queued or running as done, failed or cancelled; others stay as they are."""
        self._db.execute(
            "UPDATE tasks SET status = ?, reason = ? WHERE id = ? AND status IN ('queued', 'running')",
            (status, reason, number),
        )

    # --- rounds -------------------------------------------------------------------------------------------------------

    def next_number(self) -> tuple[int, int]:
        """Return the (round, attempt) to announce next: only a committed round is followed by a new number."""
        row = self._db.execute(
            "SELECT round, attempt, phase FROM rounds ORDER BY round DESC, attempt DESC LIMIT 1"
        ).fetchone()
        if row is None:
            return 1, 0
        return (row["round"] + 1, 0) if row["phase"] == "committed" else (row["round"], row["attempt"] + 1)

    def open_round(self, opening: Opening, *, digest: bytes, previous: bytes, envelope: bytes) -> int:
        """Write a round and its announcement down before anybody hears of it, and return the round's row.

        Args:
            opening: The round.
            digest: Digest of the announcement's envelope.
            previous: Digest of the announcement before it: the hash chain.
            envelope: The signed announcement.
        """
        with self._transaction():
            plan, state = self._keep(opening.plan), self._keep(opening.state)
            number = (opening.round, opening.attempt)
            values = (opening.task, opening.position, *number, opening.plan_name, plan, state, opening.started_ms)
            cursor = self._db.execute(
                "INSERT INTO rounds (task, position, round, attempt, plan_name, plan, state, phase, started_ms) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'selection', ?)",
                values,
            )
            self._db.execute("INSERT INTO announcements VALUES (?, ?, ?, ?, ?)", (digest, previous, *number, envelope))
            return int(cursor.lastrowid or 0)

    def last_announcement(self) -> bytes:
        """Return the digest of the newest announcement, zeros if there is none."""
        row = self._db.execute("SELECT digest FROM announcements ORDER BY round DESC, attempt DESC LIMIT 1").fetchone()
        return bytes(row["digest"]) if row else bytes(32)

    def announcement_of(self, number: int, attempt: int) -> bytes:
        """Return the digest of the announcement of a round, zeros if it was never announced."""
        row = self._db.execute(
            "SELECT digest FROM announcements WHERE round = ? AND attempt = ?", (number, attempt)
        ).fetchone()
        return bytes(row["digest"]) if row else bytes(32)

    def set_phase(self, row: int, phase: Phase, cohort: Sequence[str]) -> None:
        """Note that a round in flight has moved on."""
        self._db.execute("UPDATE rounds SET phase = ?, cohort = ? WHERE id = ?", (phase, _json(sorted(cohort)), row))

    def commit_round(
        self, row: int, ending: Ending, *, metrics: Mapping[str, float], state: bytes, released: bytes | None
    ) -> None:
        """Commit a round, the state that came of it and the task's progress, all or nothing."""
        with self._transaction():
            self._end(row, "committed", "", ending, metrics)
            task, position = self._db.execute("SELECT task, position FROM rounds WHERE id = ?", (row,)).fetchone()
            self._db.execute(
                "INSERT INTO states VALUES (?, ?, ?, ?)", (task, position + 1, self._keep(state), released)
            )
            self._db.execute("UPDATE tasks SET position = ? WHERE id = ?", (position + 1, task))

    def abandon_round(self, row: int, reason: str, ending: Ending) -> None:
        """Note that a round ended without a result."""
        with self._transaction():
            self._end(row, "abandoned", reason, ending, {})

    def _end(self, row: int, phase: Phase, reason: str, ending: Ending, metrics: Mapping[str, float]) -> None:
        names = (_json(sorted(ending.cohort)), _json(sorted(ending.survivors)), _json(ending.dropped), _json(metrics))
        traffic = (_json(ending.traffic.up), _json(ending.traffic.down), ending.traffic.broadcast)
        self._db.execute(
            "UPDATE rounds SET phase = ?, reason = ?, cohort = ?, survivors = ?, dropped = ?, metrics = ?, "
            "bytes_up = ?, bytes_down = ?, broadcast_bytes = ?, ended_ms = ? WHERE id = ?",
            (phase, reason, *names, *traffic, ending.ended_ms, row),
        )

    def open_rounds(self) -> list[RoundRow]:
        """Return the rounds that have not ended: after a crash, those that were in flight."""
        return self._rounds("WHERE ended_ms IS NULL ORDER BY rounds.id", ())

    def rounds(self, *, limit: int | None = None) -> list[RoundRow]:
        """Return the newest `limit` rounds (all by default), the newest last."""
        return self._rounds("ORDER BY rounds.id DESC LIMIT ?", (-1 if limit is None else limit,))[::-1]

    def _rounds(self, suffix: str, values: Sequence[Any]) -> list[RoundRow]:
        query = "SELECT rounds.*, tasks.name AS task_name FROM rounds JOIN tasks ON tasks.id = rounds.task "
        return [round_row(row) for row in self._db.execute(query + suffix, values)]

    # --- refusals and certificates ------------------------------------------------------------------------------------

    def count_refusals(self, counts: Mapping[str, int]) -> None:
        """Add refused messages, by reason."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO refusals VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
                list(counts.items()),
            )

    def refusals(self) -> dict[str, int]:
        """Return how many messages were refused, by reason."""
        return {row["reason"]: row["count"] for row in self._db.execute("SELECT * FROM refusals ORDER BY reason")}

    def keep_certificate(self, device: str, der: bytes, *, now_ms: int) -> None:
        """Remember a device's live certificate in place of an older one."""
        self._db.execute("INSERT OR REPLACE INTO certificates VALUES (?, ?, ?)", (device, der, now_ms))

    def certificates(self) -> list[bytes]:
        """Return the remembered certificates, DER."""
        return [bytes(row["der"]) for row in self._db.execute("SELECT der FROM certificates ORDER BY device")]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
