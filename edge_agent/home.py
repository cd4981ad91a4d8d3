"""The device's own folder: keys, certificates, settings, databases; and sealing what is kept on its disk.

key.pem           private key, never leaves the device (0600)
request.csr       signing request for the fleet's CA
certificate.pem   what the CA answered            fleet-ca.pem   the CA, pinned        revoked.pem   if the CA has any
agent.toml        settings and policy
examples.sqlite   the example store               ledger.sqlite  what has left this device
client_states.sqlite   what programs keep here from round to round, sealed
evidence/         signed proof of a lie, if there ever was one
published/        sums that the fleet has published for everybody
blobs/            fetched plans, programs, states (public)       pending/   unfinished work, sealed
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_agent.config import AgentConfig, BrokerConfig, default_config, parse_config
from sottovoce.errors import BadCertificate, ConfigError, CryptoError
from sottovoce.identity import (
    NAME,
    Identity,
    TrustAnchor,
    key_to_pem,
    load_certificate,
    load_key,
    load_revoked,
    new_key,
    read_secret_file,
    signing_request,
    write_secret_file,
)

HOME_VARIABLE = "SOTTOVOCE_HOME"
_NONCE_BYTES = 12
_OTHERS = 0o077


@dataclass(frozen=True, slots=True)
class Home:
    """Where everything of one device lies; a folder that only its owner can enter.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def key(self) -> Path:
        """The private key, PEM, mode 0600."""
        return self.path / "key.pem"

    @property
    def request(self) -> Path:
        """The signing request, PEM."""
        return self.path / "request.csr"

    @property
    def certificate(self) -> Path:
        """The device's certificate, PEM."""
        return self.path / "certificate.pem"

    @property
    def fleet_ca(self) -> Path:
        """The pinned CA certificate, PEM."""
        return self.path / "fleet-ca.pem"

    @property
    def revoked(self) -> Path:
        """The CA's revocation list, PEM; may be missing."""
        return self.path / "revoked.pem"

    @property
    def config(self) -> Path:
        """The settings, TOML."""
        return self.path / "agent.toml"

    @property
    def examples(self) -> Path:
        """The example store."""
        return self.path / "examples.sqlite"

    @property
    def ledger(self) -> Path:
        """The ledger."""
        return self.path / "ledger.sqlite"

    @property
    def client_states(self) -> Path:
        """What programs keep from one round to the next, sealed."""
        return self.path / "client_states.sqlite"

    @property
    def blobs(self) -> Path:
        """Folder of fetched blobs."""
        return self.path / "blobs"

    @property
    def evidence(self) -> Path:
        """Folder of signed envelopes that prove a lie; missing until there is one."""
        return self.path / "evidence"

    @property
    def pending(self) -> Path:
        """Folder of sealed checkpoints and pending results."""
        return self.path / "pending"


def default_home(environment: Mapping[str, str]) -> Home:
    """Return the home that `environment` names: $SOTTOVOCE_HOME, else ~/.local/share/sottovoce/agent."""
    named = environment.get(HOME_VARIABLE)
    return Home(Path(named) if named else Path.home() / ".local" / "share" / "sottovoce" / "agent")


def init_home(path: Path, *, device: str, fleet: str, broker: BrokerConfig) -> Home:
    """Make a device's folder: private key, signing request, agent.toml, empty folders.

    What exists is kept: an earlier key is used again and settings are never overwritten, so that an interrupted call
    can be repeated.

    Raises:
        ConfigError: A name is impossible, the folder is for another device, or it cannot be written.
    """
    for what, text in (("device id", device), ("fleet name", fleet)):
        if not NAME.fullmatch(text):
            raise ConfigError(f"the {what} {text!r} must be 1 to 64 characters of A-Z a-z 0-9 _ -")
    home = Home(path)
    try:
        for folder in (home.path, home.blobs, home.pending):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.path.chmod(0o700)
        if not home.config.exists():
            home.config.write_text(default_config(device=device, fleet=fleet, broker=broker), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}") from error
    config = load_config(home)
    if (config.device, config.fleet) != (device, fleet):
        raise ConfigError(
            f"{path} belongs to device {config.device} of fleet {config.fleet}; choose another folder with --home"
        )
    if not home.key.exists():
        write_secret_file(home.key, key_to_pem(new_key()))
    key = load_key(read_secret_file(home.key))
    home.request.write_bytes(signing_request(key, name=device, fleet=fleet, role="device"))
    return home


def load_config(home: Home) -> AgentConfig:
    """Return the settings of `home`.

    Raises:
        ConfigError: There are none, or something in them is impossible; with the key's path.
    """
    return parse_config(_read(home.config, _NO_HOME).decode("utf-8", "replace"), path=home.config)


def load_anchor(home: Home) -> TrustAnchor:
    """Return the pinned fleet CA of `home`, with what it has revoked.

    Raises:
        ConfigError: fleet-ca.pem is missing or not a fleet CA's, or revoked.pem is damaged.
        BadCertificate: revoked.pem is not signed by this CA.
    """
    authority = load_certificate(_read(home.fleet_ca, "copy fleet-ca.pem from the fleet's CA there"))
    revoked = load_revoked(home.revoked.read_bytes(), authority) if home.revoked.exists() else frozenset()
    return TrustAnchor(authority, revoked_serials=revoked)


def load_identity(home: Home, at: datetime.datetime) -> Identity:
    """Return this device's key and certificate, checked against the pinned CA and the settings.

    Args:
        home: The device's folder.
        at: The time to judge validity by (`sottovoce.identity.latest_time`).

    Raises:
        ConfigError: A file is missing, open to others, of another key, or names another device or fleet.
        BadCertificate: The certificate is not this CA's, not valid at `at`, or revoked.
    """
    _refuse_open_folder(home)
    key = load_key(read_secret_file(home.key))
    config, anchor = load_config(home), load_anchor(home)
    parsed = load_certificate(
        _read(home.certificate, f"let the fleet's CA sign {home.request} (`fleet-ca sign`) and copy its answer there")
    )
    try:
        certificate = anchor.verify(parsed.public_bytes(serialization.Encoding.DER), at=at, role="device")
    except BadCertificate as error:
        raise BadCertificate(f"{home.certificate}: {error}; ask the fleet's CA for a new certificate") from error
    if (certificate.name, certificate.fleet) != (config.device, config.fleet):
        raise ConfigError(
            f"{home.certificate} is for {certificate.name} of {certificate.fleet}, "
            f"and {home.config} says {config.device} of {config.fleet}"
        )
    return Identity(key, certificate)


def seal_at_rest(
    identity: Identity, purpose: str, content: bytes, *, entropy: Callable[[int], bytes] = os.urandom
) -> bytes:
    """Return `content` encrypted (AES-256-GCM) for this device's own disk.

    Args:
        identity: Whose key protects it.
        purpose: Every purpose has a key of its own; what is sealed for one cannot be opened for another.
        content: What to keep.
        entropy: Source of the fresh nonce.
    """
    nonce = entropy(_NONCE_BYTES)
    return nonce + _cipher(identity, purpose).encrypt(nonce, content, None)


def open_at_rest(identity: Identity, purpose: str, sealed: bytes) -> bytes:
    """Return the content of `sealed`.

    Raises:
        CryptoError: It was not sealed by this device's key for this purpose, or is damaged.
    """
    try:
        return _cipher(identity, purpose).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
    except (InvalidTag, ValueError) as error:
        raise CryptoError(f"what is stored for {purpose!r} is damaged, or was not sealed by this device") from error


_NO_HOME = "make this device's folder first: edge-agent init --device ID --fleet NAME --broker HOST"


def _cipher(identity: Identity, purpose: str) -> AESGCM:
    label = b"sottovoce/1/at-rest/" + purpose.encode()
    return AESGCM(HKDF(hashes.SHA256(), length=32, salt=None, info=label).derive(identity.storage_secret()))


def _refuse_open_folder(home: Home) -> None:
    try:
        open_to_others = home.path.stat().st_mode & _OTHERS
    except OSError as error:
        raise ConfigError(f"there is no {home.path}; {_NO_HOME}") from error
    if open_to_others:
        raise ConfigError(f"other users of this machine can enter {home.path}: chmod 700 {home.path}")


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): {remedy}") from error
