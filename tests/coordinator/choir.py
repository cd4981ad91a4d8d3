"""The fleet `choir`: a CA, one coordinator, and devices with real keys."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from sottovoce.authority import create_authority, revoke, sign_request
from sottovoce.identity import Identity, Role, TrustAnchor, load_certificate, new_key, signing_request

FLEET, COORDINATOR = "choir", "coordinator"
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)


class Choir:
    """A CA, one coordinator, and as many devices as are asked for."""

    def __init__(self, folder: Path) -> None:
        self.authority = create_authority(folder, fleet=FLEET, at=AT)
        self.anchor = TrustAnchor(self.authority.certificate)
        self.devices: dict[str, Identity] = {}
        self._serials: dict[str, str] = {}
        self.coordinator = self.enrol(COORDINATOR, role="coordinator")

    def names(self, count: int) -> list[str]:
        """The ids of the first `count` devices, enrolled on first use."""
        names = [f"pi-{number:02}" for number in range(count)]
        for name in names:
            if name not in self.devices:
                self.devices[name] = self.enrol(name)
        return names

    def enrol(self, name: str, *, role: Role = "device", at: datetime.datetime = AT, replace: bool = False) -> Identity:
        """Make a key and have it certified, in the place of the certificate before if it is to `replace` that."""
        key = new_key()
        request = signing_request(key, name=name, fleet=FLEET, role=role)
        issued = sign_request(self.authority, request, at=at, role=role, replace=replace)
        self._serials[name] = issued.serial
        der = load_certificate(issued.pem).public_bytes(Encoding.DER)
        return Identity(key, self.anchor.verify(der, at=at, role=role))

    def revoke(self, name: str) -> bytes:
        """Revoke a device in the CA's list, which `anchor` does not know, and return that list, PEM."""
        revoke(self.authority, self._serials[name], at=AT)
        return self.authority.revoked_file.read_bytes()
