"""Client state: what programs keep on this device from one round to the next, in named slots, sealed on its disk.

A slot has a *kept* value, the one that programs read, and at most one *held* value: what the device computed in a
round whose end it has not heard. Only one thing makes the held value the kept one: the signed outcome of that very
round, committed, with this device among the survivors. Each change is one SQLite transaction, so that a kill at any
instant leaves either the old value or the new one:

    take_up   work begins: the kept value is read, or the program's initial one; what was held is dropped, for a round
              whose outcome has not been heard by now cannot change what this work has read
    hold      the masked update is about to leave: the new value waits for the outcome
    settle    the outcome: of the held value's round, committed and survived -> kept, otherwise dropped;
              of any other round -> nothing

A value is bound to what it was computed from: where the owner has erased a slot meanwhile, or another round has changed
it, the new value is not held.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.database import open_database, writing
from edge_agent.effects import NextClientState, RoundId
from edge_agent.home import open_at_rest, seal_at_rest
from sottovoce.bundle import ClientState
from sottovoce.errors import CryptoError, PolicyRefusal, ProgramError
from sottovoce.identity import Identity
from sottovoce.plan import Plan
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

_VERSION = 1
_VALUE = """slot TEXT NOT NULL UNIQUE, version INTEGER NOT NULL, types TEXT NOT NULL, plan_name TEXT NOT NULL,
    collections TEXT NOT NULL, bytes INTEGER NOT NULL, round INTEGER NOT NULL, sealed BLOB NOT NULL"""
_COLUMNS = "slot, version, types, plan_name, collections, bytes, round, sealed"
_SCHEMA = (
    # AUTOINCREMENT: the id of a kept value is never given again, so that it says which value work has read.
    f"CREATE TABLE kept (id INTEGER PRIMARY KEY AUTOINCREMENT, {_VALUE})",
    f"CREATE TABLE held (id INTEGER PRIMARY KEY, {_VALUE}, announcement BLOB NOT NULL, coordinator TEXT NOT NULL, "
    "attempt INTEGER NOT NULL)",
    "CREATE TABLE erasures (number INTEGER NOT NULL)",
    "INSERT INTO erasures VALUES (0)",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a program reads of its slot.

    Attributes:
        values: One array for each port of the client state.
        base: Says which value this is, for `NextClientState.base`.
    """

    values: Mapping[str, Array] = field(repr=False)
    base: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A slot with a kept value, for its owner to see.

    Attributes:
        slot: Its name.
        version: The version of the programs that share it.
        types: Names and types of what is in it.
        plan_name: The plan that wrote it last.
        collections: The collections of examples that its value was computed from.
        bytes: Its size.
        round: The round that wrote it last.
    """

    slot: str
    version: int
    types: str
    plan_name: str
    collections: tuple[str, ...]
    bytes: int
    round: int


class ClientStates:
    """All slots of one device. Not for sharing between threads; several processes may have it open."""

    def __init__(
        self, path: Path, identity: Identity, *, maximum_bytes: int, entropy: Callable[[int], bytes],
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Open the slots in the file `path`, making it if missing.

        Args:
            path: The device's `client_states.sqlite`.
            identity: Whose key seals the values.
            maximum_bytes: The owner's limit for all slots together.
            entropy: The system's entropy, for the nonces.
            log: Told, in words, of every value that was dropped.

        Raises:
            ConfigError: The file cannot be used.
        """
        self._database = _open(path)
        self._identity = identity
        self._maximum_bytes = maximum_bytes
        self._entropy = entropy
        self._log = log

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def take_up(self, kept: ClientState, plan: Plan) -> Reading:
        """Return what the program of `plan` reads, and drop the value that is held for an earlier round.

        Args:
            kept: The program's client state.
            plan: The plan that the work is for.

        Raises:
            PolicyRefusal: All slots together would be larger than the owner allows.
            ProgramError: Another plan keeps something else in a slot of this name and version.
            ConfigError: The file cannot be written.
        """
        with writing(self._database):
            self._check(kept, plan)
            self._drop_held(kept.slot, "the round that it was computed in has not been heard to end")
            return self._kept(kept) or Reading(decode_tensors(kept.initial), self._base(kept.slot, kept.version))

    def take_up_again(self, value: NextClientState) -> bool:
        """Say whether `value`, computed earlier and never sent, still follows the kept one; drop what is held.

        Raises:
            ConfigError: The file cannot be written.
        """
        with writing(self._database):
            self._drop_held(value.slot, "the round that it was computed in has not been heard to end")
            return self._base(value.slot, value.version) == value.base

    def hold(self, round_: RoundId, value: NextClientState) -> None:
        """Hold `value` until the outcome of `round_` is heard; when this returns it outlives a power cut.

        Raises:
            ConfigError: The file cannot be written.
        """
        with writing(self._database):
            self._drop_held(value.slot, "another round computes it anew")
            if self._base(value.slot, value.version) != value.base:
                self._log(f"client state {value.slot}: it was erased or changed meanwhile; the new value is not kept")
                return
            row = (
                *(value.slot, value.version, value.types, value.plan_name, self._collections(value)),
                *(len(value.content), round_.round, self._seal(value)),
                *(round_.announcement, round_.coordinator, round_.attempt),
            )
            self._database.execute(
                f"INSERT INTO held ({_COLUMNS}, announcement, coordinator, attempt) "  # noqa: S608  a constant
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def settle(self, round_: RoundId, *, survived: bool) -> None:
        """Keep what is held for `round_` if this device's update is in its sum, else drop it; repeats change nothing.

        Args:
            round_: The round whose signed outcome was heard.
            survived: The outcome is committed and names this device among the survivors.

        Raises:
            ConfigError: The file cannot be written.
        """
        of_round = "announcement = ? AND coordinator = ? AND round = ? AND attempt = ?"
        names = (round_.announcement, round_.coordinator, round_.round, round_.attempt)
        found = self._database.execute(f"SELECT id, slot FROM held WHERE {of_round}", names).fetchall()  # noqa: S608
        for number, slot in found:
            with writing(self._database):
                if survived:
                    self._database.execute(
                        f"INSERT OR REPLACE INTO kept ({_COLUMNS}) SELECT {_COLUMNS} FROM held WHERE id = ?",  # noqa: S608
                        (number,),
                    )
                self._database.execute("DELETE FROM held WHERE id = ?", (number,))
            became = "kept: the update is in the sum" if survived else "dropped: the update is not in a committed sum"
            self._log(f"client state {slot}: the new value of round {round_.round} is {became}")

    def _check(self, kept: ClientState, plan: Plan) -> None:
        row = self._database.execute(
            "SELECT types, plan_name FROM kept WHERE slot = ? AND version = ?", (kept.slot, kept.version)
        ).fetchone()
        if row is not None and row[0] != kept.types:
            raise ProgramError(
                f"plans {row[1]!r} and {plan.name!r} both name client state {kept.slot!r}, version {kept.version}, but "
                f"the first keeps {row[0]} and the second {kept.types}: give one of them another name or version"
            )
        others = self._database.execute("SELECT coalesce(sum(bytes), 0) FROM kept WHERE slot != ?", (kept.slot,))
        total = len(kept.initial) + int(others.fetchone()[0])
        if total > self._maximum_bytes:
            raise PolicyRefusal(
                "max_client_state_bytes",
                f"client state {kept.slot!r} takes {len(kept.initial)} bytes, with what is kept already {total}; this "
                f"device allows {self._maximum_bytes} (edge-agent status shows the slots, edge-agent forget "
                "--client-state SLOT frees one)",
            )

    def _kept(self, kept: ClientState) -> Reading | None:
        row = self._database.execute(
            "SELECT sealed FROM kept WHERE slot = ? AND version = ?", (kept.slot, kept.version)
        ).fetchone()
        if row is None:
            return None
        try:
            content = open_at_rest(self._identity, _purpose(kept.slot, kept.version), row[0])
        except CryptoError as error:
            self._log(f"client state {kept.slot}: {error}; it begins anew")
            self._database.execute("DELETE FROM kept WHERE slot = ?", (kept.slot,))
            return None
        return Reading(decode_tensors(content), self._base(kept.slot, kept.version))

    def _base(self, slot: str, version: int) -> str:
        """Return what tells the value that a program reads now from every other: the initial one counts as 0."""
        row = self._database.execute("SELECT id FROM kept WHERE slot = ? AND version = ?", (slot, version)).fetchone()
        erasures = self._database.execute("SELECT number FROM erasures").fetchone()[0]
        return f"{erasures}/{0 if row is None else row[0]}"

    def _collections(self, value: NextClientState) -> str:
        row = self._database.execute(
            "SELECT collections FROM kept WHERE slot = ? AND version = ?", (value.slot, value.version)
        ).fetchone()
        before = [] if row is None else json.loads(row[0])
        return json.dumps(sorted({*before, value.collection}))

    def _drop_held(self, slot: str, reason: str) -> None:
        if self._database.execute("DELETE FROM held WHERE slot = ?", (slot,)).rowcount:
            self._log(f"client state {slot}: the new value that waited is dropped: {reason}")

    def _seal(self, value: NextClientState) -> bytes:
        purpose = _purpose(value.slot, value.version)
        return seal_at_rest(self._identity, purpose, value.content, entropy=self._entropy)


def kept_slots(path: Path) -> list[Slot]:
    """Return the slots in the file `path` that have a kept value, sorted by name; their values stay sealed.

    Raises:
        ConfigError: The file cannot be used.
    """
    database = _open(path)
    try:
        rows = database.execute(
            "SELECT slot, version, types, plan_name, collections, bytes, round FROM kept ORDER BY slot"
        ).fetchall()
    finally:
        database.close()
    return [
        Slot(
            slot=slot,
            version=version,
            types=types,
            plan_name=plan,
            collections=tuple(json.loads(collections)),
            bytes=size,
            round=round_,
        )
        for slot, version, types, plan, collections, size, round_ in rows
    ]


def forget_client_states(path: Path, *, slot: str | None = None, collection: str | None = None) -> list[str]:
    """Erase slots, kept and held values; return their names. What is being computed from them will not be kept.

    Args:
        path: The device's `client_states.sqlite`.
        slot: Only this one; None for all that `collection` selects.
        collection: Only those computed from this collection of examples; None for every one.

    Raises:
        ConfigError: The file cannot be used.
    """
    database = _open(path)
    try:
        with writing(database):
            rows = database.execute("SELECT slot, collections FROM kept UNION SELECT slot, collections FROM held")
            chosen = {
                name
                for name, collections in rows.fetchall()
                if slot in (None, name) and (collection is None or collection in json.loads(collections))
            }
            for name in chosen:
                for table in ("kept", "held"):
                    database.execute(f"DELETE FROM {table} WHERE slot = ?", (name,))  # noqa: S608  a constant
            database.execute("UPDATE erasures SET number = number + 1")
        # What was deleted is overwritten in the file, but copies of it may still be in the write-ahead log.
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        database.close()
    return sorted(chosen)


def _open(path: Path) -> sqlite3.Connection:
    return open_database(path, schema=_SCHEMA, version=_VERSION)


def _purpose(slot: str, version: int) -> str:
    return f"client-state/{slot}/{version}"
