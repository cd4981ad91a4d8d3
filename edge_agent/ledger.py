"""The ledger: what has left this device, how often, for whom and why; and how far rounds and time have come.

A row is on the disk before the first masked byte leaves, so that no crash can make the device forget a release: an
update whose row exists is spent, whatever happened next. The owner reads the rows; nothing ever deletes one.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from edge_agent.database import open_database, writing
from edge_agent.policy import check_participation
from sottovoce.errors import LocalProtocolError, PolicyRefusal, Replayed
from sottovoce.plan import Plan

Outcome: TypeAlias = Literal["committed", "abandoned", "unknown"]
ReleaseState: TypeAlias = Literal["spent", "committed", "abandoned", "unknown"]

_VERSION = 2
_FOR_EVER = 2**63 - 1
_SCHEMA = (
    """CREATE TABLE release (
        id INTEGER PRIMARY KEY, at_unix_s REAL NOT NULL, fleet TEXT NOT NULL, plan_name TEXT NOT NULL,
        plan BLOB NOT NULL, state BLOB NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
        session BLOB NOT NULL UNIQUE, purpose TEXT NOT NULL, cohort INTEGER NOT NULL, weight INTEGER NOT NULL,
        contents TEXT NOT NULL, status TEXT NOT NULL, newest_example INTEGER NOT NULL)""",
    "CREATE INDEX release_of_state ON release (plan, state)",
    """CREATE TABLE round_reached (
        fleet TEXT NOT NULL, plan_name TEXT NOT NULL, round INTEGER NOT NULL, attempt INTEGER NOT NULL,
        PRIMARY KEY (fleet, plan_name))""",
    "CREATE TABLE clock (only INTEGER PRIMARY KEY CHECK (only = 1), last_signed_ms INTEGER NOT NULL)",
    "INSERT INTO clock VALUES (1, 0)",
)
# A release that was written down before examples were numbered counts for ever.
_UPGRADES = {1: (f"ALTER TABLE release ADD COLUMN newest_example INTEGER NOT NULL DEFAULT {_FOR_EVER}",)}
_COLUMNS = (
    "at_unix_s, fleet, plan_name, plan, state, round, attempt, session, purpose, cohort, weight, newest_example, "
    "contents"
)
# What a release can become: the first answer stays, but an outcome that was unknown may still become known.
_SETTLES: dict[ReleaseState, frozenset[ReleaseState]] = {
    "spent": frozenset({"committed", "abandoned", "unknown"}),
    "unknown": frozenset({"unknown", "committed", "abandoned"}),
    "committed": frozenset({"committed"}),
    "abandoned": frozenset({"abandoned"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One masked update that may have left this device.

    Attributes:
        at_unix_s: When, by the latest time this device knows.
        fleet: To which fleet.
        plan_name: The plan's name.
        plan: Plan digest, 32 bytes.
        state: State digest, 32 bytes.
        round: Round number.
        attempt: Attempt within the round.
        session: Session id, 32 bytes.
        purpose: The plan's purpose, in plain words.
        cohort: Devices in the roster, this one included.
        weight: Number of local examples that went into it.
        newest_example: Number of the newest example that may have gone into it (`ExampleStore.span`).
        contents: Name and number of values of each aggregation.
        status: `spent` until the outcome is known.
    """

    at_unix_s: float
    fleet: str
    plan_name: str
    plan: bytes
    state: bytes
    round: int
    attempt: int
    session: bytes
    purpose: str
    cohort: int
    weight: int
    contents: tuple[tuple[str, int], ...]
    status: ReleaseState = "spent"
    newest_example: int = _FOR_EVER


class Ledger:
    """The ledger in one SQLite file; every method that writes returns only when the write is on the disk."""

    def __init__(self, path: Path) -> None:
        """Open the ledger, making it if missing.

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

    def spend(
        self, release: Release, *, max_releases_per_state: int, oldest_example: int = 0, plan: Plan | None = None
    ) -> None:
        """Write down that `release` is about to leave; only after this returns may a masked byte be sent.

        Args:
            release: What leaves, status `spent`.
            max_releases_per_state: The owner's limit of releases for one plan, state and set of examples.
            oldest_example: As for `releases_of_state`.
            plan: The plan, whose terms of participation are held against earlier releases; None has none.

        Raises:
            PolicyRefusal: The limit is reached, or it is too early for this plan; nothing was written.
            Replayed: Something was already released in this session; nothing was written.
        """
        row = (
            *(release.at_unix_s, release.fleet, release.plan_name, release.plan, release.state, release.round),
            *(release.attempt, release.session, release.purpose, release.cohort, release.weight),
            *(release.newest_example, json.dumps(release.contents), release.status),
        )
        with writing(self._database):
            already = self.releases_of_state(release.plan, release.state, oldest_example=oldest_example)
            if already >= max_releases_per_state:
                raise PolicyRefusal(
                    "max_releases_per_state",
                    f"an update for this state of plan {release.plan_name!r} has left {already} times already",
                )
            if plan is not None:
                last = self.last_release(release.fleet, release.plan_name)
                check_participation(plan, round=release.round, last=last, now_s=release.at_unix_s)
            try:
                self._database.execute(
                    f"INSERT INTO release ({_COLUMNS}, status) VALUES ({', '.join('?' * len(row))})",  # noqa: S608
                    row,
                )
            except sqlite3.IntegrityError as error:
                raise Replayed(
                    f"an update was already released in session {release.session.hex()[:12]}; it is never sent twice"
                ) from error

    def settle(self, session: bytes, outcome: Outcome) -> None:
        """Write down how the session ended; saying the same again is harmless.

        Args:
            session: Session id, 32 bytes.
            outcome: `unknown` when this device cannot tell; a better answer may follow.

        Raises:
            LocalProtocolError: Nothing was spent in this session, or it has already ended otherwise.
        """
        with writing(self._database):
            row = self._database.execute("SELECT status FROM release WHERE session = ?", (session,)).fetchone()
            if row is None or outcome not in _SETTLES[row[0]]:
                known = "nothing was spent in it" if row is None else f"it is {row[0]}"
                raise LocalProtocolError(f"session {session.hex()[:12]} cannot become {outcome}: {known}")
            self._database.execute("UPDATE release SET status = ? WHERE session = ?", (outcome, session))

    def releases_of_state(self, plan: bytes, state: bytes, *, oldest_example: int = 0) -> int:
        """Return how many updates may have left for this plan and state digest, whatever became of them.

        Args:
            plan: Plan digest.
            state: State digest.
            oldest_example: Number of the oldest example that the plan would use now. Releases that only older examples
                have gone into are not counted: what this device would say today, it has never said.
        """
        row = self._database.execute(
            "SELECT count(*) FROM release WHERE plan = ? AND state = ? AND newest_example >= ?",
            (plan, state, oldest_example),
        )
        return int(row.fetchone()[0])

    def last_release(self, fleet: str, plan_name: str) -> tuple[int, float] | None:
        """Return round and time (Unix seconds) of the last release for plans of that name, None before the first.

        Whatever became of it: what may have left counts.
        """
        row = self._database.execute(
            "SELECT round, at_unix_s FROM release WHERE fleet = ? AND plan_name = ? ORDER BY id DESC LIMIT 1",
            (fleet, plan_name),
        ).fetchone()
        return None if row is None else (int(row[0]), float(row[1]))

    def rows(self, *, limit: int = -1) -> list[Release]:
        """Return the releases, newest first, at most `limit` of them (-1: all)."""
        return self._select("TRUE ORDER BY id DESC LIMIT ?", limit)

    def unsettled(self) -> list[Release]:
        """Return the releases whose outcome is not known yet, oldest first."""
        return self._select("status IN ('spent', 'unknown') ORDER BY id")

    def last_round(self, fleet: str, plan_name: str) -> tuple[int, int] | None:
        """Return the highest (round, attempt) this device has reached in plans of that name, None before the first."""
        row = self._database.execute(
            "SELECT round, attempt FROM round_reached WHERE fleet = ? AND plan_name = ?", (fleet, plan_name)
        ).fetchone()
        return None if row is None else (int(row[0]), int(row[1]))

    def rounds_reached(self) -> dict[str, tuple[int, int]]:
        """Return the highest (round, attempt) this device has reached, by plan name; for its owner to see."""
        rows = self._database.execute("SELECT plan_name, round, attempt FROM round_reached ORDER BY plan_name")
        return {str(name): (int(round_), int(attempt)) for name, round_, attempt in rows}

    def advance_round(self, fleet: str, plan_name: str, *, round: int, attempt: int) -> bool:
        """Go to a round; return True if it is a new one, False if it is the one this device is in already.

        Raises:
            Replayed: It lies before what this device has reached; nothing was written.
        """
        with writing(self._database):
            last = self.last_round(fleet, plan_name)
            if last is not None and (round, attempt) < last:
                raise Replayed(
                    f"round {round} attempt {attempt} of plan {plan_name!r} is over: this device has reached "
                    f"round {last[0]} attempt {last[1]}"
                )
            self._database.execute(
                "INSERT INTO round_reached VALUES (?, ?, ?, ?) ON CONFLICT (fleet, plan_name) "
                "DO UPDATE SET round = excluded.round, attempt = excluded.attempt",
                (fleet, plan_name, round, attempt),
            )
        return last is None or (round, attempt) > last

    def last_signed_ms(self) -> int:
        """Return the latest coordinator's time in a verified message, Unix milliseconds; 0 before the first."""
        return int(self._database.execute("SELECT last_signed_ms FROM clock").fetchone()[0])

    def note_signed_ms(self, now_ms: int) -> None:
        """Remember the coordinator's time `now_ms`, if it is later than what is remembered.

        The message must have been verified, and its certificate must be valid *at that very time*: then no coordinator
        can push this device's idea of the time beyond the end of its own certificate.
        """
        with writing(self._database):
            self._database.execute("UPDATE clock SET last_signed_ms = max(last_signed_ms, ?)", (now_ms,))

    def _select(self, condition: str, *values: int) -> list[Release]:
        """Return the releases for which `condition`, a constant of this module, holds."""
        query = f"SELECT {_COLUMNS}, status FROM release WHERE {condition}"  # noqa: S608  see above
        return [_release(row) for row in self._database.execute(query, values)]


def _release(row: sqlite3.Row) -> Release:
    names = (*_COLUMNS.split(", "), "status")
    values = dict(zip(names, row, strict=True))
    contents = tuple((str(name), int(size)) for name, size in json.loads(values.pop("contents")))
    return Release(contents=contents, **values)
