"""The device's cache of blobs: a folder of files named by their digest, so that a program is fetched once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sottovoce.blobs import digest_of
from sottovoce.errors import BadBlob

DEFAULT_CACHE_BYTES = 256 * 1024 * 1024
"""Programs are 10 kB, states up to some megabytes: enough for every round in sight on a small SD card."""
_PARTIAL = ".partial"


class BlobCache:
    """Content-addressed files under a size cap; the longest unused ones go first.

    Every read is verified, so a file that a power cut has torn is a miss and is removed, never an error.
    """

    def __init__(self, folder: Path, *, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Open the cache in `folder`, made if missing, and remove what an interrupted write has left.

        Args:
            folder: For this cache alone.
            max_bytes: Sum of the files' sizes, at most.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in folder.glob(f"*{_PARTIAL}"):
            leftover.unlink(missing_ok=True)

    def put(self, digest: bytes, content: bytes) -> None:
        """Keep `content`, if it is not larger than the whole cache; older files make room for it.

        Raises:
            BadBlob: `content` does not have this digest.
        """
        if digest_of(content) != digest:
            raise BadBlob(f"what was to be kept as blob {digest.hex()[:12]} does not match its digest")
        if len(content) > self._max_bytes:
            return
        self._make_room(len(content), keeping=self._path(digest))
        descriptor, partial = tempfile.mkstemp(dir=self._folder, suffix=_PARTIAL)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, self._path(digest))

    def get(self, digest: bytes) -> bytes | None:
        """Return the blob and note that it was used, or None if it is not here or damaged."""
        path = self._path(digest)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        if digest_of(content) != digest:
            path.unlink(missing_ok=True)
            return None
        return content

    def size_bytes(self) -> int:
        """Return the sum of the sizes of all files."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def _path(self, digest: bytes) -> Path:
        return self._folder / digest.hex()

    def _make_room(self, needed_bytes: int, *, keeping: Path) -> None:
        """Remove the longest unused files until `needed_bytes` fit beside the rest."""
        files = [(path.stat(), path) for path in self._folder.iterdir() if path != keeping]
        held_bytes = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda entry: entry[0].st_mtime_ns):
            if held_bytes + needed_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            held_bytes -= stat.st_size
