"""X.509 P-256 identities: who signs, who is believed, and the exact bytes that are signed.

One CA per fleet, pinned by everybody. A certificate names its holder in the common name (the device id), its fleet in
the organisation and its role (`device` or `coordinator`) in the organisational unit. Nobody is believed because of a
connection or a topic: every message is verified against a certificate that chains to the pinned CA.
Verification raises; it never returns False. Time is an argument: a Pi boots in 1970 (see `latest_time`).
"""

from __future__ import annotations

import datetime
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, TypeAlias

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509.oid import NameOID

from sottovoce.errors import BadCertificate, BadSignature, ConfigError

Role: TypeAlias = Literal["device", "coordinator"]
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SIGNATURE_BYTES = 64
MAX_CERTIFICATE_BYTES = 4096
"""Longer certificates are refused before they are parsed; the fleet's own have about 700 bytes."""
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SCALAR_BYTES = 32
_LENGTH = struct.Struct("<I").pack
_NUMBERS = struct.Struct("<IQII").pack
_BUILD_TIME = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)
_END_OF_TIME = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC)
_READABLE_BY_OTHERS = 0o077


class SignedContext(msgspec.Struct, frozen=True):
    """What a signature is bound to beside the message itself. A struct, because thousands are made in a round.

    Attributes:
        sender: Name of the signer.
        recipient: Name of the addressee, or `all`.
        fleet: Name of the fleet.
        round: Round number, 0 outside rounds.
        attempt: Attempt within the round.
        session: Session id, 32 zero bytes before the roster.
    """

    sender: str
    recipient: str
    fleet: str
    round: int = 0
    attempt: int = 0
    session: bytes = bytes(32)


def signed_bytes(message_name: str, context: SignedContext, fingerprint: bytes, body_digest: bytes) -> bytes:
    """Return the bytes that are signed: label and message name, then every field length-prefixed (uint32 LE).

    Args:
        message_name: Name of the message type, ASCII.
        context: Who to whom, in which fleet, round and session.
        fingerprint: SHA-256 of the signer's certificate, 32 bytes.
        body_digest: SHA-256 of the body as received, 32 bytes.
    """
    pieces = [b"sottovoce/1/"]
    for text in (message_name, context.sender, context.recipient, context.fleet):
        part = text.encode()
        pieces += (_LENGTH(len(part)), part)
    pieces.append(_NUMBERS(8, context.round, 4, context.attempt))
    for part in (context.session, fingerprint, body_digest):
        pieces += (_LENGTH(len(part)), part)
    return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that has been verified: its holder's name, role, fleet and public key.

    Attributes:
        name: Device id, or the coordinator's name.
        role: `device` or `coordinator`.
        fleet: The fleet it belongs to.
        fingerprint: SHA-256 of the DER bytes, 32 bytes.
        der: The certificate itself.
        issued_unix_s: Start of validity; of two certificates of one name the later one is live.
    """

    name: str
    role: Role
    fleet: str
    fingerprint: bytes
    der: bytes
    issued_unix_s: int
    _public_key: ec.EllipticCurvePublicKey = field(repr=False, compare=False)

    def verify(self, signature: bytes, content: bytes) -> None:
        """Raise BadSignature unless `signature` (raw r||s, low-s, 64 bytes) is this holder's over `content`."""
        if len(signature) != SIGNATURE_BYTES:
            raise BadSignature(f"a signature has {SIGNATURE_BYTES} bytes, not {len(signature)}")
        r = int.from_bytes(signature[:_SCALAR_BYTES], "big")
        s = int.from_bytes(signature[_SCALAR_BYTES:], "big")
        if not (0 < r < _P256_ORDER and 0 < s <= _P256_ORDER // 2):
            raise BadSignature("a signature out of range or not in low-s form")
        try:
            self._public_key.verify(encode_dss_signature(r, s), content, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise BadSignature(f"not signed by {self.name}") from error


class Identity:
    """A private key and its certificate. The key never appears in a repr, and the whole cannot be pickled."""

    __slots__ = ("_key", "certificate")

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: Certificate) -> None:
        if key.public_key().public_numbers() != certificate._public_key.public_numbers():
            raise ConfigError(f"the certificate of {certificate.name} is not for this private key")
        self._key = key
        self.certificate = certificate

    def __repr__(self) -> str:
        return f"Identity({self.certificate.role} {self.certificate.name} of {self.certificate.fleet})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Identity holds a private key and is never pickled or copied")

    def sign(self, content: bytes) -> bytes:
        """Return the raw r||s signature of `content`, low-s, 64 bytes."""
        r, s = decode_dss_signature(self._key.sign(content, ec.ECDSA(hashes.SHA256())))
        low_s = min(s, _P256_ORDER - s)
        return r.to_bytes(_SCALAR_BYTES, "big") + low_s.to_bytes(_SCALAR_BYTES, "big")

    def storage_secret(self) -> bytes:
        """Return 32 secret bytes bound to this key, from which keys for the local disk are derived."""
        return self._key.private_numbers().private_value.to_bytes(_SCALAR_BYTES, "big")


class TrustAnchor:
    """The pinned fleet CA, with what it has revoked and which certificates were already verified."""

    def __init__(
        self, ca_certificate: x509.Certificate, *, revoked_serials: Iterable[int] = (), remembered: int = 4096
    ) -> None:
        """Pin `ca_certificate`.

        Args:
            ca_certificate: The fleet's own CA.
            revoked_serials: Serial numbers that are no longer believed; see `load_revoked`.
            remembered: Certificates whose chain need not be checked again; the least recently used is forgotten, so
                that no sender can make this grow.

        Raises:
            ConfigError: It is not the certificate of a fleet CA.
        """
        self.fleet = _fleet_of_authority(ca_certificate)
        self._ca = ca_certificate
        self._revoked = frozenset(revoked_serials)
        self._remembered = remembered
        self._verified: OrderedDict[bytes, tuple[Certificate, datetime.datetime, datetime.datetime]] = OrderedDict()

    def revoke(self, serials: Iterable[int]) -> None:
        """Believe no certificate with one of these serial numbers, in the place of those that were named before."""
        self._revoked = frozenset(serials)
        self._verified.clear()

    def verify(self, der: bytes, *, at: datetime.datetime, role: Role | None = None) -> Certificate:
        """Return what the certificate `der` says, once its chain, validity, fleet and role are checked.

        The chain is checked once per certificate; validity (of the CA too) and role every time.

        Args:
            der: X.509 certificate in DER.
            at: The time to judge validity by, timezone-aware.
            role: The role it must have; None accepts both.

        Raises:
            BadCertificate: Any check fails.
        """
        entry = self._verified.get(der)
        if entry is None:
            entry = self._verified[der] = self._parse(der)
            if len(self._verified) > self._remembered:
                self._verified.popitem(last=False)
        else:
            self._verified.move_to_end(der)
        certificate, not_before, not_after = entry
        if not not_before <= at <= not_after:
            raise BadCertificate(
                f"the certificate of {certificate.name} is valid {not_before:%F} to {not_after:%F}, not on {at:%F}"
            )
        if role is not None and certificate.role != role:
            raise BadCertificate(f"{certificate.name} is a {certificate.role}, not a {role}")
        return certificate

    def _parse(self, der: bytes) -> tuple[Certificate, datetime.datetime, datetime.datetime]:
        if len(der) > MAX_CERTIFICATE_BYTES:
            raise BadCertificate(f"a certificate of {len(der)} bytes is longer than {MAX_CERTIFICATE_BYTES}")
        try:
            parsed = x509.load_der_x509_certificate(der)
            parsed.verify_directly_issued_by(self._ca)
            public_key = _p256_key(parsed)
            name, role = _attribute(parsed, NameOID.COMMON_NAME), _attribute(parsed, NameOID.ORGANIZATIONAL_UNIT_NAME)
            fleet = _attribute(parsed, NameOID.ORGANIZATION_NAME)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise BadCertificate(f"not a certificate of this fleet's CA: {type(error).__name__}") from error
        if fleet != self.fleet or not NAME.fullmatch(name) or role not in ("device", "coordinator"):
            raise BadCertificate(f"the certificate names fleet {fleet!r}, role {role!r}, holder {name!r}")
        if parsed.serial_number in self._revoked:
            raise BadCertificate(f"the certificate of {name} is revoked")
        not_before = max(parsed.not_valid_before_utc, self._ca.not_valid_before_utc)
        not_after = min(parsed.not_valid_after_utc, self._ca.not_valid_after_utc)
        certificate = Certificate(
            name=name,
            role="device" if role == "device" else "coordinator",
            fleet=fleet,
            fingerprint=parsed.fingerprint(hashes.SHA256()),
            der=der,
            issued_unix_s=int(parsed.not_valid_before_utc.timestamp()),
            _public_key=public_key,
        )
        return certificate, not_before, not_after


def latest_time(local_unix_s: float, last_signed_unix_s: float = 0.0) -> datetime.datetime:
    """Return the time to judge certificates by: the latest of the local clock, signed `now` values and build time.

    A clock beyond the year 9998 counts as that year: every certificate has then expired, and nothing overflows.
    """
    latest = max(local_unix_s, last_signed_unix_s, _BUILD_TIME.timestamp())
    return datetime.datetime.fromtimestamp(min(latest, _END_OF_TIME.timestamp()), datetime.UTC)


def load_revoked(pem: bytes, ca_certificate: x509.Certificate) -> frozenset[int]:
    """Return the serial numbers in the revocation list `pem` (an X.509 CRL) that `fleet-ca revoke` writes.

    The list is judged by its signature, not by its dates: an offline CA publishes one only when something changes.

    Raises:
        ConfigError: It is not a PEM revocation list, or `ca_certificate` is not a fleet CA.
        BadCertificate: This CA did not sign it.
    """
    _fleet_of_authority(ca_certificate)
    try:
        revoked = x509.load_pem_x509_crl(pem)
    except ValueError as error:
        raise ConfigError("the revocation list is not a PEM X.509 CRL; copy revoked.pem from the CA again") from error
    if revoked.issuer != ca_certificate.subject or not revoked.is_signature_valid(_p256_key(ca_certificate)):
        raise BadCertificate("the revocation list is not signed by this fleet's CA")
    return frozenset(entry.serial_number for entry in revoked)


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Return the P-256 private key in `pem`.

    Raises:
        ConfigError: It is not an unencrypted P-256 private key.
    """
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError("the private key file is not an unencrypted PEM private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("the private key must be P-256")
    return key


def read_secret_file(path: Path) -> bytes:
    """Return the content of the file `path`, which only its owner may read.

    Raises:
        ConfigError: There is no such file, or others than its owner can read or write it.
    """
    try:
        mode = path.stat().st_mode
        if mode & _READABLE_BY_OTHERS:
            raise ConfigError(f"other users of this machine can read or write {path}: chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def write_secret_file(path: Path, content: bytes) -> None:
    """Write `content` to the new file `path`, readable by its owner only from its first moment.

    Raises:
        ConfigError: The file exists already (it is left as it is), or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already and is not overwritten; move it away first") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def load_certificate(pem: bytes) -> x509.Certificate:
    """Return the certificate in `pem`.

    Raises:
        ConfigError: It is not a PEM certificate.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise ConfigError("the certificate file is not a PEM certificate") from error


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh P-256 private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return `key` as unencrypted PKCS#8 PEM, for a file that only its owner can read."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key: ec.EllipticCurvePrivateKey, *, name: str, fleet: str, role: Role) -> bytes:
    """Return a PEM certificate signing request for `name` in `fleet`.

    Raises:
        ConfigError: A name has characters outside A-Z a-z 0-9 _ - or is longer than 64.
    """
    for what, text in (("device id", name), ("fleet name", fleet)):
        if not NAME.fullmatch(text):
            raise ConfigError(f"the {what} {text!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")
    request = x509.CertificateSigningRequestBuilder().subject_name(subject(name=name, fleet=fleet, role=role))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def subject(*, name: str, fleet: str, role: str) -> x509.Name:
    """Return the X.509 subject that says name, fleet and role."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        ]
    )


def _fleet_of_authority(certificate: x509.Certificate) -> str:
    """Return the fleet that the CA `certificate` speaks for, or raise ConfigError when it is not a fleet CA's."""
    not_a_ca = "the pinned certificate is not a fleet CA's; use the fleet-ca.pem that `fleet-ca init` wrote"
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(certificate)
        fleet = _attribute(certificate, NameOID.ORGANIZATION_NAME)
        _p256_key(certificate)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature, BadCertificate) as error:
        raise ConfigError(f"{not_a_ca} ({error or type(error).__name__})") from error
    if not constraints.ca or not NAME.fullmatch(fleet):
        raise ConfigError(not_a_ca)
    return fleet


def _p256_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadCertificate("a certificate's key must be P-256") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadCertificate("a certificate's key must be P-256")
    return key


def _attribute(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    if len(values) != 1:
        raise BadCertificate("a certificate names its holder, fleet and role exactly once each")
    return str(values[0].value)
