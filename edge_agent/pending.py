"""What survives a kill: checkpoints and pending results, sealed, keyed by the plan and state they belong to.

Nothing here is precious: a file that is damaged, foreign or too old is discarded with a line that says so, and the work
is done again. Everything has two files that are written in turn: a kill in the middle of a write leaves the other one.
Replacing one file by rename would be as safe, but file systems flush such a file to the disk at once: for
checkpoints that is slow, and wears out an SD card.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from edge_agent.effects import Contribution, Entry, NextClientState
from edge_agent.home import open_at_rest, seal_at_rest
from sottovoce.blobs import Document, canonical, digest_of
from sottovoce.errors import ConfigError, CryptoError, MalformedMessage
from sottovoce.identity import Identity
from sottovoce.tensors import decode_tensors, encode_tensors

Kind: TypeAlias = Literal["checkpoint", "result", "entry"]
_SUFFIX = ".sealed"
_TURNS = (0, 1)
_NAME_DIGITS = 32


class _Kept(Document, frozen=True):
    """The content of one file, before sealing."""

    kind: str
    key: bytes
    sequence: int
    expires_ms: int
    content: bytes


class _Result(Document, frozen=True):
    weight: int
    tensors: bytes
    client_state: NextClientState | None = None
    newest_example: int = 0


class PendingStore:
    """The folder of sealed files of one device."""

    def __init__(self, folder: Path, identity: Identity, *, discarded: Callable[[str], None]) -> None:
        """Use `folder`, which exists.

        Args:
            folder: The device's `pending/`.
            identity: Whose key seals the files.
            discarded: Told, in words, of every file that had to be thrown away.
        """
        self._folder = folder
        self._identity = identity
        self._discarded = discarded
        self._sequences: dict[tuple[str, bytes], int] = {}

    def save(self, kind: Kind, key: bytes, content: bytes, *, expires_ms: int) -> None:
        """Keep `content`, replacing what was kept under the same kind and key.

        Args:
            kind: What it is.
            key: What it belongs to.
            content: Its bytes.
            expires_ms: After this time it is of no use; Unix milliseconds.

        Raises:
            ConfigError: The folder cannot be written.
        """
        sequence = self._next_sequence(kind, key)
        kept = _Kept(kind=kind, key=key, sequence=sequence, expires_ms=expires_ms, content=content)
        sealed = seal_at_rest(self._identity, _purpose(kind), canonical(kept))
        path = self._path(kind, key, sequence % len(_TURNS))
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(sealed)
                file.truncate()
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror}); is the disk full?") from error
        self._sequences[kind, key] = sequence

    def load(self, kind: Kind, key: bytes, *, now_ms: int) -> bytes | None:
        """Return what is kept, None if there is nothing of use."""
        newest = self._newest(kind, key, now_ms)
        return newest.content if newest is not None else None

    def erase(self, kind: Kind, key: bytes) -> None:
        """Erase what is kept, if anything; when this returns the erasure outlives a power cut.

        Raises:
            ConfigError: The folder cannot be written.
        """
        paths = [path for turn in _TURNS if (path := self._path(kind, key, turn)).exists()]
        try:
            for path in paths:
                path.unlink(missing_ok=True)
            if paths:
                self._make_durable()
        except OSError as error:
            raise ConfigError(f"cannot erase {paths[0]} ({error.strerror})") from error
        self._sequences.pop((kind, key), None)

    def sweep(self, *, now_ms: int) -> None:
        """Erase what has expired and what cannot be read."""
        for path in sorted(self._folder.iterdir()):
            self._read(path, now_ms)

    def _newest(self, kind: Kind, key: bytes, now_ms: int) -> _Kept | None:
        found = [self._read(self._path(kind, key, turn), now_ms) for turn in _TURNS]
        fitting = [kept for kept in found if kept is not None and (kept.kind, kept.key) == (kind, key)]
        return max(fitting, key=lambda kept: kept.sequence, default=None)

    def _next_sequence(self, kind: Kind, key: bytes) -> int:
        last = self._sequences.get((kind, key))
        if last is None:
            newest = self._newest(kind, key, now_ms=0)
            last = newest.sequence if newest is not None else -1
        return last + 1

    def _read(self, path: Path, now_ms: int) -> _Kept | None:
        try:
            kept = msgspec.msgpack.decode(
                open_at_rest(self._identity, _purpose(path.name.partition("-")[0]), path.read_bytes()), type=_Kept
            )
        except FileNotFoundError:
            return None
        except (CryptoError, OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
            self._discard(path, str(error))
            return None
        if now_ms > kept.expires_ms:
            self._discard(path, "it has expired")
            return None
        return kept

    def _discard(self, path: Path, reason: str) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        self._discarded(f"discarded {path.name}: {reason}")

    def _path(self, kind: Kind, key: bytes, turn: int) -> Path:
        return self._folder / f"{kind}-{digest_of(key).hex()[:_NAME_DIGITS]}-{turn}{_SUFFIX}"

    def _make_durable(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def encode_contribution(contribution: Contribution) -> bytes:
    """Return the bytes of a finished result."""
    tensors = {f"{name}/{i}": array for name, arrays in contribution.values.items() for i, array in enumerate(arrays)}
    return canonical(
        _Result(
            weight=contribution.weight,
            tensors=encode_tensors(tensors),
            client_state=contribution.client_state,
            newest_example=contribution.newest_example,
        )
    )


def decode_contribution(content: bytes) -> Contribution:
    """Return the finished result in `content`.

    Raises:
        MalformedMessage: The bytes are not one.
    """
    try:
        result = msgspec.msgpack.decode(content, type=_Result)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise MalformedMessage(f"not a pending result: {error}") from error
    contribution = Contribution({}, result.weight, result.client_state, result.newest_example)
    for place, array in decode_tensors(result.tensors).items():
        contribution.values.setdefault(place.rpartition("/")[0], []).append(array)
    return contribution


def encode_entry(entry: Entry) -> bytes:
    """Return the bytes of an entry."""
    return msgspec.msgpack.encode(entry)


def decode_entry(content: bytes) -> Entry:
    """Return the entry in `content`.

    Raises:
        MalformedMessage: The bytes are not one.
    """
    try:
        return msgspec.msgpack.decode(content, type=Entry)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise MalformedMessage(f"not an entry: {error}") from error


def _purpose(kind: str) -> str:
    return f"pending/{kind}"
