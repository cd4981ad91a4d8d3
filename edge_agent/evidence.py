"""Signed proof that somebody lied in a session: kept on the disk until a person has looked at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sottovoce.blobs import digest_of
from sottovoce.errors import ConfigError
from sottovoce.identity import write_secret_file

MOST_FILES = 100
"""What comes after that is not kept: somebody who lies so often is proven to lie."""
_NAME_DIGITS = 16


def keep_evidence(folder: Path, envelopes: Sequence[bytes]) -> list[Path]:
    """Keep every envelope in a file of its own, named by its digest, and return where they are.

    Args:
        folder: The device's `evidence/`; made if missing.
        envelopes: As they were signed; one that is kept already stays as it is.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        room = MOST_FILES - len(list(folder.iterdir()))
    except OSError as error:
        raise ConfigError(f"cannot write into {folder} ({error.strerror}); is the disk full?") from error
    kept = {folder / f"{digest_of(envelope).hex()[:_NAME_DIGITS]}.envelope": envelope for envelope in envelopes}
    missing = [path for path in kept if not path.exists()]
    for path in missing[: max(0, room)]:
        write_secret_file(path, kept[path])
    return [path for path in kept if path.exists()]
