"""What survives a kill: checkpoints and pending results, sealed, keyed by the plan and state they belong to.

Nothing here is precious: a file that is damaged, foreign or too old is discarded with a line that says so, and the work
is done again. Every write replaces the file in one step, so a kill leaves the old content or the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from edge_agent.effects import Contribution, Entry
from edge_agent.home import open_at_rest, seal_at_rest
from sottovoce.errors import ConfigError, CryptoError, MalformedMessage
from sottovoce.identity import Identity
from sottovoce.plan import Document, canonical, digest_of
from sottovoce.tensors import decode_tensors, encode_tensors

Kind: TypeAlias = Literal["checkpoint", "result", "entry"]
_SUFFIX = ".sealed"
_UNFINISHED = ".writing"
_NAME_DIGITS = 32


class _Kept(Document, frozen=True):
    """The content of one file, before sealing."""

    kind: str
    key: bytes
    expires_ms: int
    content: bytes


class _Result(Document, frozen=True):
    weight: int
    tensors: bytes


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
        sealed = seal_at_rest(
            self._identity, _purpose(kind), canonical(_Kept(kind=kind, key=key, expires_ms=expires_ms, content=content))
        )
        path = self._path(kind, key)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(sealed)
            unfinished.replace(path)
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror}); is the disk full?") from error

    def load(self, kind: Kind, key: bytes, *, now_ms: int) -> bytes | None:
        """Return what is kept, None if there is nothing of use."""
        kept = self._read(self._path(kind, key), now_ms)
        return kept.content if kept is not None and (kept.kind, kept.key) == (kind, key) else None

    def erase(self, kind: Kind, key: bytes) -> None:
        """Erase what is kept, if anything; when this returns the erasure outlives a power cut.

        Raises:
            ConfigError: The folder cannot be written.
        """
        path = self._path(kind, key)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                self._make_durable()
        except OSError as error:
            raise ConfigError(f"cannot erase {path} ({error.strerror})") from error

    def sweep(self, *, now_ms: int) -> None:
        """Erase what has expired, what cannot be read and what was never finished."""
        for path in sorted(self._folder.iterdir()):
            if path.suffix == _SUFFIX:
                self._read(path, now_ms)
            else:
                path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return what is kept, by file name, for the owner to see."""
        return sorted(path.stem for path in self._folder.glob(f"*{_SUFFIX}"))

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

    def _path(self, kind: Kind, key: bytes) -> Path:
        return self._folder / f"{kind}-{digest_of(key).hex()[:_NAME_DIGITS]}{_SUFFIX}"

    def _make_durable(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def encode_contribution(contribution: Contribution) -> bytes:
    """Return the bytes of a finished result."""
    tensors = {f"{name}/{i}": array for name, arrays in contribution.values.items() for i, array in enumerate(arrays)}
    return canonical(_Result(weight=contribution.weight, tensors=encode_tensors(tensors)))


def decode_contribution(content: bytes) -> Contribution:
    """Return the finished result in `content`.

    Raises:
        MalformedMessage: The bytes are not one.
    """
    try:
        result = msgspec.msgpack.decode(content, type=_Result)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise MalformedMessage(f"not a pending result: {error}") from error
    contribution = Contribution(values={}, weight=result.weight)
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
