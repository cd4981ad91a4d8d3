"""The coordinator's folder: its key and certificates on disk, and the parts of a running coordinator made from them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from coordinator.revocation import RevocationList
from coordinator.sequence import Setup
from coordinator.settings import SETTINGS_TEMPLATE, BrokerSettings, CoordinatorSettings
from sottovoce.errors import BadCertificate, ConfigError
from sottovoce.identity import (
    Identity,
    TrustAnchor,
    key_to_pem,
    load_certificate,
    load_key,
    new_key,
    read_secret_file,
    signing_request,
    write_secret_file,
)
from sottovoce.transport.mqtt_settings import HEADER_ALLOWANCE_BYTES, MqttSettings, TlsFiles

SETTINGS_FILE = "coordinator.toml"
_BACKOFF_MAX_S = 2.0
"""A whole fleet waits for this one client: it is back at the broker before the devices are."""
_PRIVATE_KEY_MARK = b"PRIVATE KEY"


def make_home(folder: Path, *, fleet: str, name: str, host: str = "127.0.0.1", port: int = 1883) -> Path:
    """Make a key, a signing request and commented settings in `folder`, and return the settings file.

    Raises:
        ConfigError: A name is not possible, or one of the files exists already; nothing is overwritten.
    """
    for file in (SETTINGS_FILE, "key.pem"):
        if (folder / file).exists():
            raise ConfigError(f"{folder / file} exists already and is not overwritten; choose another --home")
    key = new_key()
    request = signing_request(key, name=name, fleet=fleet, role="coordinator")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret_file(folder / "key.pem", key_to_pem(key))
        (folder / "request.csr").write_bytes(request)
        settings = folder / SETTINGS_FILE
        settings.write_text(SETTINGS_TEMPLATE.format(fleet=fleet, name=name, host=host, port=port), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from error
    return settings


def load_setup(settings: CoordinatorSettings, *, at: datetime.datetime, entropy: Callable[[int], bytes]) -> Setup:
    """Return what a coordinator is made of, once its certificate is verified against the fleet CA.

    Raises:
        ConfigError: A file is missing, unreadable or not what it should be; the text says what to do.
    """
    authority = _read(settings.fleet_ca, "ask the fleet's CA for its certificate, fleet-ca.pem")
    if _PRIVATE_KEY_MARK in authority:
        raise ConfigError(
            f"{settings.fleet_ca} holds a private key; the fleet CA's key never belongs on this machine. Keep it "
            "offline, copy only the certificate here"
        )
    certificate = load_certificate(authority)
    revoked = RevocationList(settings.revoked, certificate) if settings.revoked else None
    anchor = TrustAnchor(certificate, revoked_serials=revoked.read() if revoked else ())
    try:
        identity = _identity(settings, anchor, at)
    except BadCertificate as error:
        raise ConfigError(f"{settings.certificate}: {error}; have `fleet-ca sign` make a new one") from error
    return Setup(
        identity=identity,
        anchor=anchor,
        chunk_bytes=settings.broker.chunk_bytes,
        uploads=settings.uploads,
        entropy=entropy,
        revoked=revoked,
    )


def _identity(settings: CoordinatorSettings, anchor: TrustAnchor, at: datetime.datetime) -> Identity:
    key = load_key(read_secret_file(settings.key))
    how = "sign request.csr with `fleet-ca sign request.csr --role coordinator` and copy the result there"
    der = _der(_read(settings.certificate, how))
    certificate = anchor.verify(der, at=at, role="coordinator")
    if (certificate.name, certificate.fleet) != (settings.name, settings.fleet):
        raise ConfigError(
            f"{settings.certificate} is for {certificate.name} of fleet {certificate.fleet}, but {SETTINGS_FILE} says "
            f"{settings.name} of fleet {settings.fleet}"
        )
    return Identity(key, certificate)


def _der(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return load_certificate(pem).public_bytes(Encoding.DER)


def _read(path: Path, how: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {how}") from error


def mqtt_settings(name: str, broker: BrokerSettings) -> MqttSettings:
    """Return the MQTT settings of the coordinator called `name`.

    Raises:
        ConfigError: Impossible settings, or the password file cannot be read.
    """
    tls = TlsFiles(Path(broker.ca_file), Path(broker.cert_file), Path(broker.key_file)) if broker.ca_file else None
    password = read_secret_file(Path(broker.password_file)).decode().strip() if broker.password_file else None
    return MqttSettings(
        host=broker.host,
        port=broker.port,
        client_id=name,
        protocol=broker.protocol,
        username=broker.username or None,
        password=password,
        tls=tls,
        keepalive_s=broker.keepalive_s,
        max_payload_bytes=broker.chunk_bytes + HEADER_ALLOWANCE_BYTES,
        receive_maximum=64,
        send_maximum=32,
        backoff_max_s=_BACKOFF_MAX_S,
    )
