"""The latest state that the fleet has learned, one for each program: what this device's own applications use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sottovoce.blobs import Document, canonical, digest_of
from sottovoce.errors import ConfigError

LATEST_FOLDER = "latest"
_SUFFIX = ".state"


class _File(Document, frozen=True):
    round: int
    digest: bytes
    state: bytes


@dataclass(frozen=True, slots=True)
class LatestState:
    """A state as the fleet published it.

    Attributes:
        round: The round that starts from it.
        content: Named tensors, one for every broadcast port of the program.
    """

    round: int
    content: bytes


def keep_latest(folder: Path, program: bytes, state: bytes, *, round: int) -> None:
    """Keep `state` as the latest one of `program`, in one step.

    Args:
        folder: The device's folder of states; made if missing.
        program: Digest of the bundle.
        state: Its bytes, already verified against the digest that the coordinator signed.
        round: The round that starts from it.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = _path(folder, program)
    unfinished = path.with_suffix(".writing")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished.write_bytes(canonical(_File(round=round, digest=digest_of(state), state=state)))
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); is the disk full?") from error


def read_latest(folder: Path, program: bytes) -> LatestState | None:
    """Return the latest state of `program`, None if there is none or the file is damaged."""
    try:
        file = msgspec.msgpack.decode(_path(folder, program).read_bytes(), type=_File)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError):
        return None
    return LatestState(file.round, file.state) if digest_of(file.state) == file.digest else None


def _path(folder: Path, program: bytes) -> Path:
    return folder / f"{program.hex()}{_SUFFIX}"
