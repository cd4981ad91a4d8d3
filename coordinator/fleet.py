"""The roster of enrolled devices: whose certificate is live, and who is said to be connected.

The roster holds certificates only. The fleet CA's private key is never here: the coordinator verifies, it cannot enrol.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable

from sottovoce.errors import BadCertificate, RemoteProtocolError
from sottovoce.identity import Certificate, TrustAnchor

_MOST_HINTS = 20_000
"""Status hints of devices that never checked in are not kept beyond this: anybody may invent ids."""


class UnknownDevice(RemoteProtocolError):
    """A message from a device that has not shown its certificate yet, or with another certificate."""

    reason = "unknown_device"


class Fleet:
    """Which certificate of each device is live, and the last status hint of each."""

    def __init__(self, anchor: TrustAnchor) -> None:
        """Start with nobody."""
        self._anchor = anchor
        self._live: dict[str, Certificate] = {}
        self._online: dict[str, bool] = {}
        self._out: set[str] = set()

    def restore(self, known: Iterable[bytes], *, at: datetime.datetime) -> None:
        """Admit the certificates (DER) that the journal remembers; what is expired or revoked by now stays out."""
        for der in known:
            with contextlib.suppress(BadCertificate):
                self.admit(self.verify(der, at=at))

    def revoke(self, serials: Iterable[int], *, at: datetime.datetime) -> list[str]:
        """Believe no certificate with one of these serial numbers any more; return the devices that are out by it.

        Args:
            serials: All that are revoked.
            at: The time to judge certificates by.
        """
        self._anchor.revoke(serials)
        live = list(self._live.values())
        self._live.clear()
        self.restore([certificate.der for certificate in live], at=at)
        out = {certificate.name for certificate in live} - self._live.keys()
        for device in out:
            self._online.pop(device, None)  # Nobody waits for what it says of itself.
        self._out |= out
        return sorted(out)

    def verify(self, der: bytes, *, at: datetime.datetime) -> Certificate:
        """Return the verified certificate `der` of a device, unless a newer one of the same device is known.

        Raises:
            BadCertificate: It does not verify, or it is not the newest.
        """
        certificate = self._anchor.verify(der, at=at, role="device")
        live = self._live.get(certificate.name)
        other = live is not None and live.fingerprint != certificate.fingerprint
        if live is not None and other and certificate.issued_unix_s <= live.issued_unix_s:
            raise BadCertificate(f"{certificate.name} has a newer certificate than this one")
        return certificate

    def admit(self, certificate: Certificate) -> None:
        """Make `certificate` the live one of its device; call it once its holder has proved to have the key."""
        self._live[certificate.name] = certificate
        self._out.discard(certificate.name)

    def certificate(self, device: str, *, fingerprint: bytes, at: datetime.datetime) -> Certificate:
        """Return the live certificate of `device`, still valid at `at`.

        Raises:
            UnknownDevice: The device never showed one, or the live one has another fingerprint.
            BadCertificate: It has expired.
        """
        live = self._live.get(device)
        if live is None or live.fingerprint != fingerprint:
            raise UnknownDevice(f"{device} has not checked in with the certificate {fingerprint.hex()[:12]}")
        return self._anchor.verify(live.der, at=at, role="device")

    def knows(self, device: str) -> bool:
        """Say whether the device has ever shown a valid certificate."""
        return device in self._live

    def note_status(self, device: str, *, online: bool) -> bool:
        """Keep a status hint; return whether it changed. Hints shorten waiting and decide nothing else."""
        if device not in self._live and device not in self._online and len(self._online) >= _MOST_HINTS:
            return False
        if device in self._out:
            return False
        changed = self._online.get(device) != online
        self._online[device] = online
        return changed

    @property
    def online(self) -> frozenset[str]:
        """Devices whose last hint says connected."""
        return frozenset(device for device, online in self._online.items() if online)

    @property
    def offline(self) -> frozenset[str]:
        """Devices whose last hint says not connected."""
        return frozenset(device for device, online in self._online.items() if not online)

    @property
    def enrolled(self) -> frozenset[str]:
        """Devices with a live certificate."""
        return frozenset(self._live)
