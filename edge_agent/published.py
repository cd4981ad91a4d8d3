"""What the fleet has published for everybody: the newest thresholded sums of every such plan, by its name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from sottovoce.blobs import Document, canonical, digest_of
from sottovoce.errors import ConfigError, MalformedMessage
from sottovoce.plan import Plan, decode_plan
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

PUBLISHED_FOLDER = "published"
_SUFFIX = ".sums"
MOST_PLANS = 100
"""So many plans' sums are kept, those that came last: names cost whoever publishes nothing, and disks are small."""


class _File(Document, frozen=True):
    plan: bytes
    round: int
    digest: bytes
    sums: bytes


@dataclass(frozen=True, slots=True)
class Published:
    """Sums that every device has been given.

    Attributes:
        plan: What was asked: its vocabularies say what the entries are.
        round: The round that brought them.
        sums: Named tensors, as `Plan.publish` says.
    """

    plan: Plan
    round: int
    sums: Mapping[str, Array]


def keep_published(folder: Path, plan: bytes, sums: bytes, *, round: int) -> None:
    """Keep `sums` as what the plan of that name has brought last, in one step, and drop those of too many plans.

    Args:
        folder: The device's folder of published sums; made if missing.
        plan: The plan's bytes, already verified against its digest.
        sums: Named tensors, already verified against the digest that the coordinator signed.
        round: The round that brought them.

    Raises:
        ConfigError: The plan is none, or the folder cannot be written.
    """
    # A plan's name is any text; its digest is a file name everywhere.
    path = folder / f"{digest_of(decode_plan(plan).name.encode()).hex()}{_SUFFIX}"
    unfinished = path.with_suffix(".writing")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished.write_bytes(canonical(_File(plan=plan, round=round, digest=digest_of(sums), sums=sums)))
        os.replace(unfinished, path)
        by_age = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda kept: kept.stat().st_mtime_ns)
        for old in by_age[:-MOST_PLANS]:
            old.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); is the disk full?") from error


def read_published(folder: Path) -> list[Published]:
    """Return what is kept, newest round first; damaged files are left out."""
    found = [_read(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))]
    return sorted((each for each in found if each is not None), key=lambda each: -each.round)


def _read(path: Path) -> Published | None:
    try:
        file = msgspec.msgpack.decode(path.read_bytes(), type=_File)
        if digest_of(file.sums) != file.digest:
            return None
        return Published(decode_plan(file.plan), file.round, decode_tensors(file.sums))
    except (OSError, msgspec.ValidationError, msgspec.DecodeError, ConfigError, MalformedMessage):
        return None
