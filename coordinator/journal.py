"""The coordinator's durable record: tasks, rounds, states, announcements, refusals, certificates. Sums only.

Nothing here belongs to a single device but its name, its certificate and how many bytes it exchanged: no update, no
masked vector, no share, and no partial sum. A round is committed in one transaction with the state that came of it, so
a crash leaves either both or neither. SQLite in WAL mode: other processes may read, and submit, at any time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.journal_rows import (
    Answer,
    Ending,
    Opening,
    Phase,
    Result,
    RoundRow,
    TaskRow,
    TaskStatus,
    as_json,
    ending_values,
    round_row,
    task_row,
)
from coordinator.journal_schema import open_journal
from coordinator.requests import Asked, content_digest, decode_sums, run_of, with_blobs, without_blobs
from coordinator.terms import RoundTerms, decode_terms
from sottovoce.blobs import canonical, digest_of
from sottovoce.errors import ConfigError
from sottovoce.language.ports import RoundRequest
from sottovoce.sqlite_transaction import transaction

_RUN_S = 30 * 24 * 3600
"""The rounds of a federated program's run are one plan for so long; then they are a new one."""


class Journal:
    """The journal in one SQLite file; a context manager. One thread owns one Journal."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the journal, making it if it is not there.

        Raises:
            ConfigError: The file cannot be opened, is not a journal, or was written by a later release.
        """
        self._db = open_journal(path, read_only=read_only)

    @classmethod
    def open_read_only(cls, path: Path) -> Journal:
        """Return the journal at `path` for reading, also while a coordinator is running.

        Raises:
            ConfigError: There is none, or it is not a journal of this release.
        """
        return cls(path, read_only=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._db.close()

    def _row(self, query: str, *values: object) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return row

    # --- blobs and states ---------------------------------------------------------------------------------------------

    def blob(self, digest: bytes) -> bytes | None:
        """Return the content of a blob (bundle, plan or state), or None."""
        row = self._row("SELECT content FROM blobs WHERE digest = ?", digest)
        return bytes(row["content"]) if row else None

    def state(self, digest: bytes) -> bytes | None:
        """Return the state with this digest, named tensors, or None."""
        return self.blob(digest)

    def state_at(self, task: int, position: int) -> tuple[bytes, bytes | None] | None:
        """Return what there is after `position` committed rounds of a task, or None.

        Returns:
            The broadcast of the next round (after the last one the trained model), and released sums or None.
        """
        query = "SELECT content, released FROM states JOIN blobs USING (digest) WHERE task = ? AND position = ?"
        row = self._row(query, task, position)
        return (bytes(row["content"]), row["released"]) if row else None

    def server_state_at(self, task: int, position: int) -> bytes | None:
        """Return the server's own state after `position` committed rounds of a task, or None."""
        query = (
            "SELECT content FROM states JOIN blobs ON blobs.digest = COALESCE(states.server, states.digest) "
            "WHERE task = ? AND position = ?"
        )
        row = self._row(query, task, position)
        return bytes(row["content"]) if row else None

    def _keep(self, content: bytes) -> bytes:
        digest = digest_of(content)
        self._db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, content))
        return digest

    # --- tasks --------------------------------------------------------------------------------------------------------

    def submit(self, name: str, toml: str, *, purpose: str, bundle: bytes, moments: bytes | None, now_ms: int) -> int:
        """Put a hosted task into the queue, with its bundles, and return its number.

        Raises:
            ConfigError: A task of this name is queued or running.
        """
        with transaction(self._db):
            busy = self._row(
                "SELECT status FROM tasks WHERE name = ? AND kind = 'hosted' AND status IN ('queued', 'running')", name
            )
            if busy:
                raise ConfigError(
                    f"a task named {name!r} is already {busy['status']}; wait for it or choose another name"
                )
            cursor = self._db.execute(
                "INSERT INTO tasks (kind, name, purpose, toml, bundle, moments, status, submitted_ms) "
                "VALUES ('hosted', ?, ?, ?, ?, ?, 'queued', ?)",
                (name, purpose, toml, self._keep(bundle), self._keep(moments) if moments is not None else None, now_ms),
            )
            return int(cursor.lastrowid or 0)

    def tasks(self) -> list[TaskRow]:
        """Return all tasks in the order of submission."""
        return [task_row(row) for row in self._db.execute("SELECT * FROM tasks ORDER BY id")]

    def task(self, number: int) -> TaskRow | None:
        """Return one task."""
        row = self._row("SELECT * FROM tasks WHERE id = ?", number)
        return task_row(row) if row else None

    def due_tasks(self) -> list[TaskRow]:
        """Return what could have the next round, in the order of preference.

        Hosted tasks run one after the other. Requests are single rounds that somebody waits for: they go first in the
        order they came, but every second round is the hosted task's.
        """
        rows = self._db.execute("SELECT * FROM tasks WHERE status IN ('running', 'queued') ORDER BY id").fetchall()
        due = sorted(map(task_row, rows), key=lambda task: task.status == "queued")
        hosted = [task for task in due if task.kind == "hosted"][:1]
        requests = sorted((task for task in due if task.kind == "request"), key=lambda task: task.id)
        return [*hosted, *requests] if self._last_round_was_a_request() else [*requests, *hosted]

    def _last_round_was_a_request(self) -> bool:
        row = self._row("SELECT kind FROM rounds JOIN tasks ON tasks.id = rounds.task ORDER BY rounds.id DESC LIMIT 1")
        return row is not None and row["kind"] == "request"

    def begin_task(self, number: int, *, state: bytes, broadcast: bytes) -> None:
        """Mark a task as running, with the server's state and the broadcast of its first round."""
        with transaction(self._db):
            self._db.execute("UPDATE tasks SET status = 'running' WHERE id = ?", (number,))
            self._db.execute(
                "INSERT OR IGNORE INTO states (task, position, digest, server) VALUES (?, 0, ?, ?)",
                (number, self._keep(broadcast), self._keep(state) if state != broadcast else None),
            )

    def end_task(self, number: int, status: TaskStatus, reason: str = "") -> None:
        """Mark a task that is queued or running as done, failed or cancelled; others stay as they are."""
        self._db.execute(
            "UPDATE tasks SET status = ?, reason = ? WHERE id = ? AND status IN ('queued', 'running')",
            (status, reason, number),
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    def ask(self, request: RoundRequest, terms: RoundTerms, *, deadline_ms: int, now_ms: int) -> int:
        """Put a round that somebody asks for into the queue and return its number.

        The same key asked again is the same request: it keeps its number, and its sums once it has committed. One that
        ended without sums goes into the queue again.

        Args:
            request: What is asked.
            terms: How many devices, how long.
            deadline_ms: It fails after this time, Unix milliseconds.
            now_ms: Unix milliseconds.

        Raises:
            ConfigError: Something else was asked under this key.
        """
        with transaction(self._db):
            known = self._row("SELECT task, content FROM requests WHERE key = ? AND key != ''", request.key)
            if known is None:
                return self._put_request(request, terms, deadline_ms=deadline_ms, now_ms=now_ms)
            if known["content"] != content_digest(request):
                raise ConfigError(
                    f"{request.name}: something else was asked under the key {request.key!r} before. A federated "
                    "program that is started again must ask the same as before: no clock and no chance may decide what "
                    "it asks; after changing the program, start it in a new folder"
                )
            number = int(known["task"])
            self._db.execute(
                "UPDATE requests SET deadline_ms = ?, terms = ?, expires_unix_s = ? WHERE task = ? AND sums IS NULL",
                (deadline_ms, canonical(terms), self._expiry(request, deadline_ms), number),
            )
            self._db.execute(
                "UPDATE tasks SET status = 'queued', reason = '' WHERE id = ? AND status IN ('failed', 'cancelled')",
                (number,),
            )
            return number

    def _put_request(self, request: RoundRequest, terms: RoundTerms, *, deadline_ms: int, now_ms: int) -> int:
        cursor = self._db.execute(
            "INSERT INTO tasks (kind, name, purpose, toml, bundle, status, submitted_ms) "
            "VALUES ('request', ?, ?, '', ?, 'queued', ?)",
            (request.name, request.purpose, self._keep(request.bundle), now_ms),
        )
        number, key = int(cursor.lastrowid or 0), request.key
        content, expiry = content_digest(request), self._expiry(request, deadline_ms)
        self._db.execute(
            "INSERT INTO requests (task, key, run, content, request, broadcast, terms, deadline_ms, expires_unix_s) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(number, key, run_of(key), content, without_blobs(request)),
                *(self._keep(request.broadcast), canonical(terms), deadline_ms, expiry),
            ),
        )
        return number

    def _expiry(self, request: RoundRequest, deadline_ms: int) -> int:
        """Return after what time devices refuse the plan, Unix seconds: it makes a question asked again a new plan.

        All rounds of one run of a program are one plan, so they share an expiry, for as long as it lasts.
        """
        deadline_s = -(-deadline_ms // 1000)
        if not request.key:
            query = "SELECT MAX(expires_unix_s) FROM requests WHERE content = ?"
            (last,) = self._db.execute(query, (content_digest(request),)).fetchone()
            return max(deadline_s, last + 1) if last is not None else deadline_s
        query = "SELECT MAX(expires_unix_s) FROM requests WHERE run = ?"
        (shared,) = self._db.execute(query, (run_of(request.key),)).fetchone()
        return int(shared) if shared is not None and shared >= deadline_s else deadline_s + _RUN_S

    def request(self, number: int) -> Asked | None:
        """Return a request with its terms, or None.

        Raises:
            ConfigError: Another release wrote it.
        """
        row = self._row("SELECT * FROM requests WHERE task = ?", number)
        task = self.task(number)
        if row is None or task is None:
            return None
        bundle, broadcast = self.blob(task.bundle), self.blob(row["broadcast"])
        if bundle is None or broadcast is None:
            return None
        request = with_blobs(row["request"], bundle=bundle, broadcast=broadcast)
        return Asked(request, decode_terms(row["terms"]), row["expires_unix_s"])

    def deadline_of(self, number: int) -> int | None:
        """Return when a request fails, Unix milliseconds; None for a hosted task."""
        row = self._row("SELECT deadline_ms FROM requests WHERE task = ?", number)
        return int(row["deadline_ms"]) if row else None

    def answer(self, number: int) -> Answer:
        """Return how a request stands, with its sums once it has committed.

        Raises:
            ConfigError: There is no such request, or another release wrote its sums.
        """
        row = self._row(
            "SELECT status, reason, sums FROM requests JOIN tasks ON tasks.id = requests.task WHERE task = ?", number
        )
        if row is None:
            raise ConfigError(f"the journal has no request {number}")
        sums = decode_sums(row["sums"]) if row["sums"] is not None else None
        return Answer(status=row["status"], reason=row["reason"], sums=sums)

    # --- rounds -------------------------------------------------------------------------------------------------------

    def next_number(self) -> tuple[int, int]:
        """Return the (round, attempt) to announce next: only a committed round is followed by a new number."""
        row = self._row("SELECT round, attempt, phase FROM rounds ORDER BY round DESC, attempt DESC LIMIT 1")
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
        with transaction(self._db):
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
        row = self._row("SELECT digest FROM announcements ORDER BY round DESC, attempt DESC LIMIT 1")
        return bytes(row["digest"]) if row else bytes(32)

    def announcement_of(self, number: int, attempt: int) -> bytes:
        """Return the digest of the announcement of a round, zeros if it was never announced."""
        row = self._row("SELECT digest FROM announcements WHERE round = ? AND attempt = ?", number, attempt)
        return bytes(row["digest"]) if row else bytes(32)

    def set_phase(self, row: int, phase: Phase, cohort: Sequence[str]) -> None:
        """Note that a round in flight has moved on."""
        self._db.execute("UPDATE rounds SET phase = ?, cohort = ? WHERE id = ?", (phase, as_json(sorted(cohort)), row))

    def commit_round(self, row: int, ending: Ending, result: Result) -> None:
        """Commit a round, what came of it and the task's progress, all or nothing."""
        with transaction(self._db):
            self._end(row, "committed", "", "", ending, result.metrics)
            task, position = self._db.execute("SELECT task, position FROM rounds WHERE id = ?", (row,)).fetchone()
            server = self._keep(result.state) if result.state != result.broadcast else None
            self._db.execute(
                "INSERT INTO states (task, position, digest, server, released) VALUES (?, ?, ?, ?, ?)",
                (task, position + 1, self._keep(result.broadcast), server, result.released),
            )
            self._db.execute("UPDATE tasks SET position = ? WHERE id = ?", (position + 1, task))
            if result.sums is not None:
                self._db.execute("UPDATE requests SET sums = ? WHERE task = ?", (result.sums, task))
                self._db.execute("UPDATE tasks SET status = 'done', reason = '' WHERE id = ?", (task,))

    def abandon_round(self, row: int, reason: str, ending: Ending, *, detail: str = "") -> None:
        """Note that a round ended without a result: the reason as a short code, the detail in words."""
        with transaction(self._db):
            self._end(row, "abandoned", reason, detail, ending, {})

    def _end(
        self, row: int, phase: Phase, reason: str, detail: str, ending: Ending, metrics: Mapping[str, float]
    ) -> None:
        self._db.execute(
            "UPDATE rounds SET phase = ?, reason = ?, detail = ?, metrics = ?, cohort = ?, survivors = ?, dropped = ?, "
            "bytes_up = ?, bytes_down = ?, broadcast_bytes = ?, ended_ms = ? WHERE id = ?",
            (phase, reason, detail, as_json(metrics), *ending_values(ending), row),
        )

    def open_rounds(self) -> list[RoundRow]:
        """Return the rounds that have not ended: after a crash, those that were in flight."""
        return self._rounds("WHERE ended_ms IS NULL ORDER BY rounds.id", ())

    def rounds(self, *, limit: int | None = None) -> list[RoundRow]:
        """Return the newest `limit` rounds (all by default), the newest last."""
        return self._rounds("ORDER BY rounds.id DESC LIMIT ?", (-1 if limit is None else limit,))[::-1]

    def rounds_of(self, task: int) -> list[RoundRow]:
        """Return the rounds of one task, the newest last."""
        return self._rounds("WHERE rounds.task = ? ORDER BY rounds.id", (task,))

    def committed_rounds(self, task: int, plan_name: str) -> int:
        """Return how many rounds of a task have committed under the plan of this name."""
        query = "SELECT COUNT(*) FROM rounds WHERE task = ? AND plan_name = ? AND phase = 'committed'"
        return int(self._db.execute(query, (task, plan_name)).fetchone()[0])

    def _rounds(self, suffix: str, values: Sequence[Any]) -> list[RoundRow]:
        query = "SELECT rounds.*, tasks.name AS task_name FROM rounds JOIN tasks ON tasks.id = rounds.task "
        return [round_row(row) for row in self._db.execute(query + suffix, values)]

    # --- refusals and certificates ------------------------------------------------------------------------------------

    def count_refusals(self, counts: Mapping[str, int]) -> None:
        """Add refused messages, by reason."""
        with transaction(self._db):
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
