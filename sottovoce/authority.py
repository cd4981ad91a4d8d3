"""The fleet's certificate authority: a folder with a private key, its certificate, an index and a revocation list.

It belongs on a machine of its own: neither the coordinator nor the broker ever needs the key. What it guarantees is one
live certificate per name; how many false identities an attacker can have is decided here, by whom its owner signs for.
The time is an argument of every function. The command that people use is `sottovoce.fleet_ca`.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sottovoce.errors import ConfigError
from sottovoce.identity import (
    NAME,
    key_to_pem,
    load_certificate,
    load_key,
    new_key,
    read_secret_file,
    write_secret_file,
)
from sottovoce.issued import (
    INDEX_FILE,
    CertifiedRole,
    Issued,
    issued_rows,
    make_index,
    note_issued,
    note_revoked,
    open_index,
)

KEY_FILE = "ca-key.pem"
CERTIFICATE_FILE = "fleet-ca.pem"
REVOKED_FILE = "revoked.pem"
AUTHORITY_DAYS = 3650
"""Ten years: replacing the pinned CA means a visit to every device."""
CERTIFICATE_DAYS = 365
_BACKDATED = datetime.timedelta(minutes=5)  # A holder whose clock is a little slow can use its certificate at once.
_RESERVED = ("coordinator", "broker", "all")


@dataclass(frozen=True, slots=True)
class Authority:
    """An opened authority.

    Attributes:
        folder: Where it lives.
        certificate: The CA certificate that everybody pins.
        fleet: The fleet it speaks for.
    """

    folder: Path
    certificate: x509.Certificate
    fleet: str
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_file(self) -> Path:
        """The CA certificate as PEM: copy it to every device, the coordinator and the broker."""
        return self.folder / CERTIFICATE_FILE

    @property
    def key_file(self) -> Path:
        """The private key: whoever deletes this file ends the authority's ability to sign."""
        return self.folder / KEY_FILE

    @property
    def revoked_file(self) -> Path:
        """The CA-signed revocation list as PEM."""
        return self.folder / REVOKED_FILE


def create_authority(folder: Path, *, fleet: str, at: datetime.datetime, days: int = AUTHORITY_DAYS) -> Authority:
    """Make a new authority in `folder`: private key (0600), certificate, empty index and empty revocation list.

    Args:
        folder: Made if missing; must not hold an authority yet.
        fleet: The fleet's name, 1 to 64 characters of A-Z a-z 0-9 _ -.
        at: The time now, timezone-aware.
        days: Validity of the CA certificate.

    Raises:
        ConfigError: The name or the number of days is impossible, the folder holds an authority, or cannot be written.
    """
    check_name("fleet name", fleet)
    _check_days(days)
    for name in (KEY_FILE, CERTIFICATE_FILE, INDEX_FILE):
        if (folder / name).exists():
            raise ConfigError(f"{folder} holds an authority already ({name}); choose another folder with --out")
    key = new_key()
    certificate = _authority_certificate(key, fleet=fleet, at=at, days=days)
    authority = Authority(folder, certificate, fleet, key)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret_file(authority.key_file, key_to_pem(key))
        replace_file(authority.certificate_file, certificate.public_bytes(serialization.Encoding.PEM))
        make_index(folder)
    except OSError as error:
        raise ConfigError(f"cannot write the authority to {folder}: {error.strerror}") from error
    _publish_revoked(authority, at=at)
    return authority


def open_authority(folder: Path) -> Authority:
    """Open the authority in `folder`, private key included.

    Raises:
        ConfigError: There is none, its key is gone or readable by others, or key and certificate do not match.
    """
    if not (folder / CERTIFICATE_FILE).exists():
        raise ConfigError(f"{folder} holds no authority; make one with: fleet-ca init --fleet NAME --out {folder}")
    key = load_key(read_secret_file(folder / KEY_FILE))
    certificate = load_certificate((folder / CERTIFICATE_FILE).read_bytes())
    if certificate.public_key() != key.public_key():
        raise ConfigError(f"{folder / CERTIFICATE_FILE} is not the certificate of {folder / KEY_FILE}")
    return Authority(folder, certificate, single_attribute(certificate.subject, NameOID.ORGANIZATION_NAME), key)


def sign_request(
    authority: Authority,
    request_pem: bytes,
    *,
    at: datetime.datetime,
    role: CertifiedRole = "device",
    days: int = CERTIFICATE_DAYS,
    replace: bool = False,
) -> Issued:
    """Issue the certificate that a signing request asks for.

    Args:
        authority: Who signs.
        request_pem: A PKCS#10 request as `edge-agent init` makes it; subject: name (CN), fleet (O), role (OU).
        at: The time now, timezone-aware.
        role: The role its owner means to give; a request for another one is refused.
        days: Validity.
        replace: Revoke a live certificate of the same name first; without this, one live certificate refuses another.

    Raises:
        ConfigError: The request is damaged, forged, of another fleet or role, or its name has a live certificate.
    """
    _check_days(days)
    request = _checked_request(authority, request_pem, role)
    name = single_attribute(request.subject, NameOID.COMMON_NAME)
    if at + datetime.timedelta(days=days) > authority.certificate.not_valid_after_utc:
        raise ConfigError(
            f"{days} days is longer than the CA itself is valid (until {authority.certificate.not_valid_after_utc:%F})"
        )
    with open_index(authority.folder) as index:
        before = issued_rows(index, name=name)
        live = [issued for issued in before if issued.live(at)]
        if live and not replace:
            raise ConfigError(
                f"{name} has a live certificate ({live[-1].serial}, until {live[-1].not_after:%F}): "
                f"`fleet-ca revoke {live[-1].serial}` first, or sign with --replace, which revokes it"
            )
        for old in live:
            note_revoked(index, old.serial, at=at)
        starts = _start_of(authority, before, at)
        issued = _issue(authority, request, role=role, starts=starts, ends=at + datetime.timedelta(days=days))
        note_issued(index, issued)
    if live:
        _publish_revoked(authority, at=at)
    return issued


def revoke(authority: Authority, serial: str, *, at: datetime.datetime) -> Issued:
    """Revoke the certificate with the hexadecimal `serial` and publish the new list; doing so twice is harmless.

    Raises:
        ConfigError: This authority has issued no such certificate.
    """
    with open_index(authority.folder) as index:
        wanted = serial.lower().removeprefix("0x").lstrip("0")
        found = issued_rows(index, serial=wanted)
        if not found:
            raise ConfigError(f"this authority has issued no certificate {serial!r}; see `fleet-ca list`")
        if found[0].revoked is None:
            note_revoked(index, wanted, at=at)
    _publish_revoked(authority, at=at)
    return found[0]


# --- certificates -----------------------------------------------------------------------------------------------------


def _authority_certificate(
    key: ec.EllipticCurvePrivateKey, *, fleet: str, at: datetime.datetime, days: int
) -> x509.Certificate:
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "fleet-ca"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet)]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before((at - _BACKDATED).replace(microsecond=0))
        .not_valid_after(at + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )


def _issue(
    authority: Authority,
    request: x509.CertificateSigningRequest,
    *,
    role: CertifiedRole,
    starts: datetime.datetime,
    ends: datetime.datetime,
) -> Issued:
    server = role == "broker"
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    serial = x509.random_serial_number()
    builder = (
        x509.CertificateBuilder()
        .subject_name(request.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(request.public_key())
        .serial_number(serial)
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(_identifier_of(authority), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key()), critical=False)
    )
    if server:
        builder = builder.add_extension(_host_names(request), critical=False)
    pem = builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    name = single_attribute(request.subject, NameOID.COMMON_NAME)
    return Issued(f"{serial:x}", name, role, starts, ends.replace(microsecond=0), None, pem)


def _start_of(authority: Authority, before: Sequence[Issued], at: datetime.datetime) -> datetime.datetime:
    """Return when a new certificate's validity begins: of two certificates of one name the later one counts."""
    earliest = [(at - _BACKDATED).replace(microsecond=0), authority.certificate.not_valid_before_utc]
    starts = max([*earliest, *(old.not_before + datetime.timedelta(seconds=1) for old in before)])
    if starts > at:
        raise ConfigError(f"this machine's clock says {at:%F %T}, earlier than what was issued before: set the clock")
    return starts


def _publish_revoked(authority: Authority, *, at: datetime.datetime) -> None:
    with open_index(authority.folder) as index:
        revoked = [each for each in issued_rows(index) if each.revoked is not None]
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update((at - _BACKDATED).replace(microsecond=0))
        # The CA is offline and publishes only when something changes: the list never runs out before the CA does.
        .next_update(authority.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(len(revoked)), critical=False)
        .add_extension(_identifier_of(authority), critical=False)
    )
    for issued in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(int(issued.serial, 16))
        builder = builder.add_revoked_certificate(entry.revocation_date(issued.revoked or at).build())
    pem = builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    replace_file(authority.revoked_file, pem)


def _identifier_of(authority: Authority) -> x509.AuthorityKeyIdentifier:
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
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


# --- what is asked for ------------------------------------------------------------------------------------------------


def _checked_request(authority: Authority, pem: bytes, role: CertifiedRole) -> x509.CertificateSigningRequest:
    try:
        request = x509.load_pem_x509_csr(pem)
        key, signed = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("not a PEM certificate signing request; `edge-agent init` writes one") from error
    if not signed:
        raise ConfigError("the signing request is damaged: its signature is not by the key it carries")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError("the signing request's key must be P-256; make a new request with `edge-agent init`")
    if len(request.subject) != 3:
        raise ConfigError("a signing request names its holder (CN), fleet (O) and role (OU), and nothing else")
    name, fleet = (single_attribute(request.subject, oid) for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME))
    asked = single_attribute(request.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
    check_name("device id", name)
    if fleet != authority.fleet:
        raise ConfigError(f"{name} asks for fleet {fleet!r}; this authority is that of {authority.fleet!r}")
    if asked != role:
        hint = f"if that is what you mean, add --role {asked}" if asked in get_args(CertifiedRole) else "refused"
        raise ConfigError(f"{name} asks for the role {asked!r}, and you are signing for a {role}: {hint}")
    _check_role_fits(name, role)
    return request


def _check_role_fits(name: str, role: CertifiedRole) -> None:
    if role == "coordinator" and name != "coordinator":
        raise ConfigError(f"the coordinator's name must be `coordinator` (the broker's rules say so), not {name!r}")
    if role == "device" and name in _RESERVED:
        raise ConfigError(f"{name!r} is reserved and cannot be a device id; choose another one")


def _host_names(request: x509.CertificateSigningRequest) -> x509.SubjectAlternativeName:
    try:
        return request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError) as error:
        raise ConfigError("a broker's request must name its host: -addext subjectAltName=DNS:broker.example") from error


def check_name(what: str, text: str) -> None:
    """Raise ConfigError, naming `what`, unless `text` is a possible device id or fleet name."""
    if not NAME.fullmatch(text):
        raise ConfigError(f"the {what} {text!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")


def _check_days(days: int) -> None:
    if not 1 <= days <= 36500:
        raise ConfigError(f"--days is {days}; it must be 1 to 36500")


def single_attribute(subject: x509.Name, oid: x509.ObjectIdentifier) -> str:
    """Return the one value of `oid` in `subject`, or raise ConfigError."""
    values = subject.get_attributes_for_oid(oid)
    if len(values) != 1:
        raise ConfigError("a signing request names its holder (CN), fleet (O) and role (OU) exactly once each")
    return str(values[0].value)


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` into the public file `path`, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
