"""The CA's list of revoked certificates as a file that somebody replaces while the coordinator runs."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from cryptography import x509

from sottovoce.errors import BadCertificate, ConfigError
from sottovoce.identity import load_revoked

_Stamp: TypeAlias = tuple[int, int, int] | None
"""What tells one content of a file from the next without reading it: when written, how long, which file."""


class RevocationList:
    """The list at a path. One thread owns it.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, authority: x509.Certificate) -> None:
        """Look at the list at `path`, which `authority`, the fleet CA, must have signed; nothing is read yet."""
        self.path = path
        self._authority = authority
        self._stamp: _Stamp = None

    def read(self) -> frozenset[int]:
        """Return the serial numbers that are revoked.

        Raises:
            ConfigError: There is no such file, or it is no list of this fleet's CA.
        """
        self._stamp = self._looked()
        try:
            return load_revoked(self.path.read_bytes(), self._authority)
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}; copy revoked.pem from the CA") from error
        except (BadCertificate, ConfigError) as error:
            raise ConfigError(f"{self.path}: {error}") from error

    def changed(self) -> frozenset[int] | None:
        """Return what `read` returns if the file is another one than when it was last read, else None.

        Raises:
            ConfigError: As `read`, once for every change.
        """
        return None if self._looked() == self._stamp else self.read()

    def _looked(self) -> _Stamp:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
