"""How to reach an MQTT broker: one frozen document, checked when it is made, and the TLS context that it means."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sottovoce.blobs import DEFAULT_CHUNK_BYTES
from sottovoce.errors import ConfigError, TransportError
from sottovoce.transport.base import Will

Protocol: TypeAlias = Literal["5", "3.1.1"]

HEADER_ALLOWANCE_BYTES = 1024
"""Room for the header around a chunk: a payload may be a chunk and this, a packet a payload and this."""
_ADDRESS = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")
_IGNORE_VALIDITY_DATES = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which Python's ssl does not name


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS.

    Attributes:
        ca_file: The fleet CA's certificate; the broker's certificate must be under it and name the host.
        cert_file: This client's certificate, or None where the broker asks for none.
        key_file: Its private key, unencrypted, or None with cert_file.
    """

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttSettings:
    """Where the broker is and how to talk to it. The defaults suit a device on a home network.

    Attributes:
        host: Host name or address.
        port: TCP port.
        client_id: Stable and unique: the device id. The broker keeps this client's session under it.
        protocol: "5" or "3.1.1"; the payloads are the same bytes.
        username, password: Where the broker wants them; with client certificates it does not.
        tls: Files for TLS; None is plain TCP, for loopback only.
        will: What the broker publishes when this client vanishes.
        clean_start: Forget the session that the broker kept from an earlier process.
        keepalive_s: A silent link is noticed after about 1.5 times this. Must outlast one chunk on a slow link.
        session_expiry_s: The broker keeps subscriptions and queued messages so long (MQTT 5; under 3.1.1 the broker
            decides). A day covers a device that is switched off at night.
        connect_timeout_s: For the TCP connection, the TLS handshake and the broker's answer, each.
        max_payload_bytes: Largest payload of one message: one chunk and its header. Larger deliveries are dropped.
        receive_maximum: Messages on the way to this client that it has not acknowledged (MQTT 5). Two chunks keep the
            link busy; a thousand stalled readers then cost the broker megabytes, not gigabytes.
        send_maximum: Publishes on the way to the broker, likewise.
        queue_messages, queue_bytes: Bounds of the outgoing queue, which outlives outages of the link.
        backoff_min_s, backoff_max_s: The wait before a reconnect is drawn from 0 to a window that doubles between
            these two.
    """

    host: str
    port: int
    client_id: str
    protocol: Protocol = "5"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles | None = None
    will: Will | None = None
    clean_start: bool = False
    keepalive_s: int = 60
    session_expiry_s: int = 86_400
    connect_timeout_s: float = 10.0
    max_payload_bytes: int = DEFAULT_CHUNK_BYTES + HEADER_ALLOWANCE_BYTES
    receive_maximum: int = 2
    send_maximum: int = 2
    queue_messages: int = 10_000
    queue_bytes: int = 64 * 1024 * 1024
    backoff_min_s: float = 1.0
    backoff_max_s: float = 60.0

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the setting and what it may be, unless all of them are possible."""
        rules = (
            (bool(self.host.strip()), "host must be the name or address of the broker"),
            (1 <= self.port <= 65_535, "port must be 1 to 65535"),
            (bool(self.client_id), "client_id must not be empty: the broker keeps the session under it"),
            (self.protocol in ("5", "3.1.1"), 'protocol must be "5" or "3.1.1"'),
            (self.password is None or self.username is not None, "password needs a username"),
            (1 <= self.keepalive_s <= 65_535, "keepalive_s must be 1 to 65535 seconds"),
            (0 <= self.session_expiry_s < 2**32, "session_expiry_s must be 0 to 4294967295 seconds"),
            (self.connect_timeout_s > 0, "connect_timeout_s must be above 0"),
            (1 <= self.max_payload_bytes < 2**28 - 65_536, "max_payload_bytes must be 1 to 268369919"),
            (1 <= self.receive_maximum <= 65_535, "receive_maximum must be 1 to 65535"),
            (1 <= self.send_maximum <= 65_535, "send_maximum must be 1 to 65535"),
            (self.queue_messages >= 1, "queue_messages must be at least 1"),
            (self.queue_bytes >= self.max_payload_bytes, "queue_bytes must hold at least one max_payload_bytes"),
            (0 < self.backoff_min_s <= self.backoff_max_s, "backoff_min_s must be above 0, at most backoff_max_s"),
        )
        for holds, text in rules:
            if not holds:
                raise ConfigError(f"broker settings: {text}")


def broker_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST[:PORT]`, as both commands take it; 0 where no port is named.

    Raises:
        ConfigError: It is neither; an IPv6 address needs brackets.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ConfigError(f"--broker {text!r}: write HOST or HOST:PORT, such as broker.example:8883")
    return match["host"].strip("[]"), int(match["port"] or 0)


def tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Return the TLS context for `tls`: TLS 1.2 or later, only the given CA, host name checked.

    Validity dates are not checked by OpenSSL, whose clock is the machine's, and a Pi boots in 1970:
    `check_broker_validity` does it with a better clock.

    Raises:
        ConfigError: A file is missing, unreadable, not PEM, or key and certificate do not belong together.
    """
    try:
        context = ssl.create_default_context(cafile=str(tls.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the CA certificate {tls.ca_file} cannot be read: {error}") from error
    context.sslsocket_class = _TidySocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= _IGNORE_VALIDITY_DATES
    if tls.cert_file is not None:
        try:
            # The empty password keeps OpenSSL from asking on the terminal when the key is encrypted.
            context.load_cert_chain(str(tls.cert_file), tls.key_file and str(tls.key_file), password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {tls.cert_file} with the key {tls.key_file} cannot be used: {error}"
            ) from error
    return context


class _TidySocket(ssl.SSLSocket):
    """A TLS connection that is closed when its handshake fails; paho would leave that to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def check_broker_validity(connection: ssl.SSLSocket, now_unix_s: float) -> None:
    """Raise TransportError unless the broker's certificate is valid at `now_unix_s`, Unix seconds."""
    certificate = connection.getpeercert() or {}
    since = ssl.cert_time_to_seconds(str(certificate["notBefore"]))
    until = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    if not since <= now_unix_s <= until:
        raise TransportError(
            f"the broker's certificate is valid from {certificate['notBefore']} to {certificate['notAfter']}, "
            "which is not now: check this device's clock, or renew the certificate"
        )
