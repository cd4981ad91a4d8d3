"""Federated programs: plain Python that loops over rounds, keeps its state on disk, and goes on where it was stopped.

    with sv.federated_program("temperature", "runs/temperature") as program:
        state = program.restore(process.initialize())
        for number in program.rounds(5):
            state, metrics = process.next(state, sv.collection("temperature"))
            program.commit(state, release=metrics)

The process may be killed at any point. Started again, the program gets its last committed state back and runs the round
that was interrupted again: every round that it asks of a fleet has a key made of its place in the program, so a round
that the fleet has already committed is not run a second time, its sums are only fetched. That is why a program must ask
the same when it is started again: neither a clock nor chance may decide what it asks.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sottovoce.errors import ConfigError
from sottovoce.file_lock import FileLock
from sottovoce.language.stored_values import decode_value, encode_value
from sottovoce.sqlite_transaction import transaction

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FILE, _LOCK = "program.sqlite", "program.lock"
_VERSION = 1
_SCHEMA = (
    "CREATE TABLE program (name TEXT NOT NULL, run TEXT NOT NULL)",
    "CREATE TABLE state (position INTEGER NOT NULL, content BLOB NOT NULL)",
    "CREATE TABLE releases (number INTEGER PRIMARY KEY, content BLOB NOT NULL)",
)
_BUSY_TIMEOUT_S = 10.0
_RUN_BYTES = 8
_current: ContextVar[FederatedProgram | None] = ContextVar("federated_program", default=None)


@dataclass(frozen=True, slots=True)
class Release:
    """What a program has released with one committed round.

    Attributes:
        number: The round, from 0.
        value: What was released.
    """

    number: int
    value: Any


def federated_program(name: str, folder: str | Path) -> FederatedProgram:
    """Return the program called `name`, whose state and releases are kept in `folder`; use it in a `with`.

    Args:
        name: Letters, digits, _ and -; at most 64.
        folder: Made if it is not there. A new folder is a new run from the beginning.

    Raises:
        ConfigError: The name is not possible.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a program cannot be called {name!r}; use letters, digits, _ and -, as in temperature-2026")
    return FederatedProgram(name, Path(folder))


def next_key() -> str:
    """Return the key of the round that is asked for next, "" outside a federated program; every call is another one."""
    program = _current.get()
    return program.next_key() if program is not None else ""


def read_releases(folder: str | Path) -> list[Release]:
    """Return what the program in `folder` has released so far, also while it is running elsewhere.

    Raises:
        ConfigError: There is no program.
    """
    path = Path(folder) / _FILE
    if not path.exists():
        raise ConfigError(f"there is no federated program in {folder}")
    database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S)
    try:
        return _releases(database)
    except sqlite3.Error as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    finally:
        database.close()


class FederatedProgram:
    """A program with durable state; a context manager, made by `federated_program`. One process at a time runs it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._opened: _Opened | None = None
        self._token: Token[FederatedProgram | None] | None = None
        self._step, self._calls = "start", 0
        self._restored = False
        self._uncommitted: int | None = None

    @property
    def position(self) -> int:
        """How many rounds have been committed."""
        return self._open.position

    def restore(self, initial: object) -> Any:
        """Return the state after the last committed round; `initial` the first time, which is then kept.

        Raises:
            ConfigError: `initial` cannot be stored, or what was stored cannot be read.
        """
        self._restored = True
        return decode_value(self._open.first_state(encode_value(initial, what="the initial state")))

    def rounds(self, count: int) -> Iterator[int]:
        """Yield the numbers of the rounds that are not committed yet, up to `count` in all; commit each.

        Raises:
            ConfigError: The state was not restored, or a round was left without a commit.
        """
        if not self._restored:
            raise ConfigError(
                "restore the state before the first round: state = program.restore(initial). A program that is started "
                "again would otherwise go on with a state that does not belong to the round"
            )
        while self.position < count:
            number = self.position
            self._enter(str(number))
            self._uncommitted = number
            yield number
            if self._uncommitted is not None:
                raise ConfigError(f"round {number} was not committed: end it with program.commit(state)")
        self._enter(f"end-{count}")

    def commit(self, state: object, *, release: object = None) -> None:
        """Write the state after this round, and what is released with it, durably and both at once.

        Args:
            state: What `restore` returns if the program is started again from here on.
            release: What the program gives out with this round, None for nothing. Whatever happens, it is released
                exactly once.

        Raises:
            ConfigError: No round is open, or one of them cannot be stored.
        """
        if self._uncommitted is None:
            raise ConfigError("there is no round to commit; commit once in each `for number in program.rounds(...)`")
        number = self._uncommitted
        released = None if release is None else encode_value(release, what="the release")
        self._open.commit(number, encode_value(state, what="the state"), released)
        self._uncommitted = None

    def releases(self) -> list[Release]:
        """Return everything that has been released, in order."""
        return _releases(self._open.database)

    def next_key(self) -> str:
        """Return the key of the next round that is asked for here: the program's run, the step, and which call."""
        key = f"{self._name}/{self._open.run}/{self._step}/{self._calls}"
        self._calls += 1
        return key

    def _enter(self, step: str) -> None:
        self._step, self._calls = step, 0

    @property
    def _open(self) -> _Opened:
        if self._opened is None:
            raise ConfigError("use a federated program in a `with`: with sv.federated_program(...) as program:")
        return self._opened

    def __enter__(self) -> FederatedProgram:
        if self._opened is not None:
            raise ConfigError("this program has been entered already")
        self._opened = _Opened(self._name, self._folder)
        self._enter("start")
        self._restored, self._uncommitted = False, None
        self._token = _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None and self._opened is not None:
            _current.reset(self._token)
            self._opened.close()
        self._opened = self._token = None


class _Opened:
    """The folder of a running program: its lock and its database.

    Attributes:
        database: One file; every change is one transaction and on the disk when it returns.
        run: Drawn once for this folder, so that a new folder never gets an old run's sums.
        position: Committed rounds.
        close: Lets go of both.
    """

    def __init__(self, name: str, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
        lock = FileLock.take(folder / _LOCK)
        if lock is None:
            raise ConfigError(f"another process is running the program in {folder}; wait for it, or stop it")
        with ExitStack() as undo:
            undo.callback(lock.release)
            self.database = undo.enter_context(closing(_database(folder / _FILE)))
            self.run, self.position = self._begin(name, folder)
            self.close = undo.pop_all().close

    def _begin(self, name: str, folder: Path) -> tuple[str, int]:
        with _writing(self.database):
            row = self.database.execute("SELECT name, run FROM program").fetchone()
            if row is None:
                row = (name, os.urandom(_RUN_BYTES).hex())
                self.database.execute("INSERT INTO program VALUES (?, ?)", row)
        if row[0] != name:
            raise ConfigError(f"{folder} belongs to the program {row[0]!r}, not {name!r}; choose another folder")
        state = self.database.execute("SELECT position FROM state").fetchone()
        return row[1], state[0] if state is not None else 0

    def first_state(self, content: bytes) -> bytes:
        """Return the state as it is; if there is none yet, `content` from now on."""
        with _writing(self.database):
            row = self.database.execute("SELECT content FROM state").fetchone()
            if row is None:
                self.database.execute("INSERT INTO state VALUES (0, ?)", (content,))
        return bytes(row[0]) if row is not None else content

    def commit(self, number: int, state: bytes, release: bytes | None) -> None:
        """Write what came of round `number`, all or nothing."""
        with _writing(self.database):
            self.database.execute("UPDATE state SET position = ?, content = ?", (number + 1, state))
            if release is not None:
                self.database.execute("INSERT INTO releases VALUES (?, ?)", (number, release))
        self.position = number + 1


def _database(path: Path) -> sqlite3.Connection:
    try:
        path.touch(mode=0o600)
        database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot open {path}: {error}") from error
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        with _writing(database):
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in _SCHEMA:
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {_VERSION}")
        if version > _VERSION:
            raise ConfigError(f"{path} was written by a later release of Sottovoce; upgrade this one")
    except (sqlite3.Error, ConfigError) as error:
        database.close()
        raise ConfigError(f"{path} cannot be used: {error}") from error
    return database


@contextmanager
def _writing(database: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction: on the disk at its end, or never."""
    try:
        with transaction(database):
            yield
    except sqlite3.Error as error:
        raise ConfigError(f"the program's state cannot be written: {error}") from error


def _releases(database: sqlite3.Connection) -> list[Release]:
    rows = database.execute("SELECT number, content FROM releases ORDER BY number")
    return [Release(number, decode_value(content)) for number, content in rows]
