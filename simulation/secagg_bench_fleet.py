"""A fleet made in memory for benchmarks, and a meter that keeps the cost of verifying identities apart.

Nothing of the protocol is replaced: the anchor and the certificates are the real ones, which also note the CPU time
that their verification takes.
"""

from __future__ import annotations

import datetime
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import mean, median
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from sottovoce.identity import Certificate, Identity, Role, TrustAnchor, new_key, subject

FLEET = "bench"
COORDINATOR = "coordinator"
SIGNATURES = "signatures"
CHAINS = "certificate chains"
_CALIBRATIONS = 100
_VALIDITY = datetime.timedelta(days=1)


class Meter:
    """CPU seconds by line. Lines nest: while an inner one runs, the outer one stands still.

    Reading the clock asks the kernel, which takes longer than much of what is measured. So what a line costs that is
    empty, itself and the one around it, is measured once and taken off.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._own_s = self._around_s = 0.0
        self._own_s, self._around_s = self._costs_of_nothing()

    def line(self, name: str) -> Meter:
        """Return a context manager whose block is charged to `name`."""
        self._charge()
        self._open.append(name)
        return self

    def take(self) -> dict[str, float]:
        """Return the seconds of every line since the last call."""
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._charge()
        self._seconds[self._open.pop()] -= self._own_s
        if self._open:
            self._seconds[self._open[-1]] -= self._around_s

    def _costs_of_nothing(self) -> tuple[float, float]:
        """Return what an empty line is charged, and what is charged to the one around it: medians, in CPU seconds."""
        samples: list[dict[str, float]] = []
        for _ in range(_CALIBRATIONS):
            with self.line("around"):
                for _ in range(_CALIBRATIONS):
                    with self.line("own"):
                        pass
            samples.append(self.take())
        own, around = (median(sample[name] for sample in samples) / _CALIBRATIONS for name in ("own", "around"))
        return own, around

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True, slots=True)
class MeteredCertificate(Certificate):
    """A certificate that charges the verification of signatures to a line of its own."""

    meter: Meter = field(default_factory=Meter, repr=False, compare=False)

    def verify(self, signature: bytes, content: bytes) -> None:
        """Raise BadSignature unless `signature` is this holder's over `content`."""
        with self.meter.line(SIGNATURES):
            Certificate.verify(self, signature, content)


class MeteredAnchor(TrustAnchor):
    """A trust anchor that charges the verification of chains to a line of its own."""

    def __init__(self, ca_certificate: x509.Certificate, meter: Meter, *, remembered: int) -> None:
        super().__init__(ca_certificate, remembered=remembered)
        self._meter = meter
        self._metered: dict[bytes, MeteredCertificate] = {}

    def verify(self, der: bytes, *, at: datetime.datetime, role: Role | None = None) -> Certificate:
        """Return what the certificate `der` says; see `TrustAnchor.verify`."""
        with self._meter.line(CHAINS):
            plain = super().verify(der, at=at, role=role)
            metered = self._metered.get(plain.fingerprint)
            if metered is None:
                values = {part.name: getattr(plain, part.name) for part in fields(plain)}
                metered = self._metered[plain.fingerprint] = MeteredCertificate(**values, meter=self._meter)
            return metered


@dataclass(frozen=True, slots=True)
class BenchFleet:
    """Who takes part.

    Attributes:
        authority: The CA's certificate.
        anchor: Pins it; remembers every certificate, so chains count as cached.
        coordinator: The coordinator's identity.
        devices: Identities by device id.
        at: Time to judge certificates by.
    """

    authority: x509.Certificate
    anchor: MeteredAnchor
    coordinator: Identity
    devices: Mapping[str, Identity]
    at: datetime.datetime


def enrol(count: int, meter: Meter, *, at: datetime.datetime) -> BenchFleet:
    """Return a fleet of `count` devices with fresh keys and certificates, all chains verified once."""
    authority_key = new_key()
    name = subject(name="ca", fleet=FLEET, role="ca")
    authority = _certificate(name, authority_key.public_key(), name, authority_key, at, authority=True)
    anchor = MeteredAnchor(authority, meter, remembered=count + 1)

    def issue(device: str, role: Role) -> Identity:
        key = new_key()
        holder = subject(name=device, fleet=FLEET, role=role)
        certificate = _certificate(holder, key.public_key(), name, authority_key, at, authority=False)
        return Identity(key, anchor.verify(certificate.public_bytes(Encoding.DER), at=at))

    digits = len(str(count - 1))
    devices = {device: issue(device, "device") for device in (f"pi-{index:0{digits}}" for index in range(count))}
    fleet = BenchFleet(authority, anchor, issue(COORDINATOR, "coordinator"), devices, at)
    meter.take()
    return fleet


def cold_chain_seconds(fleet: BenchFleet, ders: Sequence[bytes]) -> float:
    """Return the mean CPU seconds of verifying one certificate's chain that was never seen before."""
    anchor = TrustAnchor(fleet.authority)

    def once(der: bytes) -> float:
        started = time.process_time()
        anchor.verify(der, at=fleet.at, role="device")
        return time.process_time() - started

    return mean(once(der) for der in ders)


def _certificate(
    holder: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    at: datetime.datetime,
    *,
    authority: bool,
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    builder = x509.CertificateBuilder().subject_name(holder).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(at - _VALIDITY).not_valid_after(at + _VALIDITY)
    constraints = x509.BasicConstraints(ca=authority, path_length=0 if authority else None)
    builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
    if not authority:  # As long as those of `fleet-ca`, because they count in the bytes that travel.
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(issuer_id, critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
