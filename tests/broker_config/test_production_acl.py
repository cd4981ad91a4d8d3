"""The production broker against devices that misbehave: a real mosquitto with the files of broker_config/production.

That something is *not* delivered is shown without waiting: the broker keeps the order of what one client publishes, so
a message that was allowed, sent afterwards, arrives first and alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import queue
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from simulation.broker_process import HOST, BrokerProcess, BrokerTls
from sottovoce.authority import (
    Authority,
    create_authority,
    revoke,
    sign_request,
)
from sottovoce.identity import key_to_pem, new_key, subject, write_secret_file
from sottovoce.issued import CertifiedRole, issued_certificates

TIMEOUT_S = 10.0
NOT_AUTHORISED = 0x87


@dataclass(frozen=True)
class Enrolled:
    """A fleet's authority and the files of whom it has enrolled, made on demand."""

    authority: Authority

    @classmethod
    def new(cls, folder: Path) -> Enrolled:
        return cls(create_authority(folder, fleet="home", at=now()))

    def issue(self, name: str, role: CertifiedRole | None = None) -> tuple[Path, Path]:
        """Return the certificate and the key of `name`, as files; the same ones every time."""
        certificate, key_file = self.authority.folder / f"{name}.pem", self.authority.folder / f"{name}.key"
        if not certificate.exists():
            role = role or ("coordinator" if name == "coordinator" else "device")
            key = new_key()
            write_secret_file(key_file, key_to_pem(key))
            request = x509.CertificateSigningRequestBuilder().subject_name(subject(name=name, fleet="home", role=role))
            if role == "broker":
                addresses = [x509.IPAddress(ipaddress.ip_address(HOST))]
                request = request.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
            certificate.write_bytes(sign_request(self.authority, pem, at=now(), role=role).pem)
        return certificate, key_file

    def revoke(self, name: str) -> None:
        issued = issued_certificates(self.authority.folder)
        revoke(self.authority, next(each.serial for each in issued if each.name == name), at=now())

    def broker(self) -> BrokerTls:
        certificate, key = self.issue("broker", "broker")
        return BrokerTls(self.authority.certificate_file, certificate, key, self.authority.revoked_file)

    def context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        """Return TLS settings that trust this fleet's broker, and prove who one is with the given files."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate_file))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Party:
    """An MQTT client under the fleet's CA that keeps what it hears; as honest or dishonest as the test wants."""

    def __init__(self, enrolled: Enrolled, name: str, *, client_id: str = "", will: str = "", user: str = "") -> None:
        self.heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.acknowledged: queue.Queue[int] = queue.Queue()
        self.connected: queue.Queue[tuple[int, bool]] = queue.Queue()
        self.subscribed: queue.Queue[None] = queue.Queue()
        self.gone: queue.Queue[int] = queue.Queue()
        version = CallbackAPIVersion.VERSION2
        self.client = mqtt.Client(
            version, client_id=client_id or name, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
        )
        self.client.tls_set_context(enrolled.context(*enrolled.issue(name)))
        if user:
            self.client.username_pw_set(user, "guess")
        if will:
            self.client.will_set(will, b"will", qos=1)
        # The callbacks hold the queues and not this object: a client in a reference cycle closes its sockets late.
        heard, acknowledged, connected = self.heard, self.acknowledged, self.connected
        subscribed, gone = self.subscribed, self.gone
        self.client.on_message = lambda _c, _u, message: heard.put((message.topic, bytes(message.payload)))
        self.client.on_publish = lambda _c, _u, _m, reason, _p: acknowledged.put(reason.value)
        self.client.on_connect = lambda _c, _u, flags, reason, _p: connected.put((reason.value, flags.session_present))
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.on_disconnect = lambda _c, _u, _f, reason, _p: gone.put(reason.value)

    def connect(self, port: int) -> bool:
        """Connect with a session that stays for an hour; return whether the broker already had one."""
        hour = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        hour.SessionExpiryInterval = 3600
        self.client.connect(HOST, port, clean_start=False, properties=hour)
        self.client.loop_start()
        reason, session_present = self.connected.get(timeout=TIMEOUT_S)
        assert reason == 0
        return session_present

    def subscribe(self, *filters: str) -> None:
        self.client.subscribe([(topic_filter, SubscribeOptions(qos=1)) for topic_filter in filters])
        self.subscribed.get(timeout=TIMEOUT_S)

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> int:
        """Publish and return the reason code of the acknowledgement."""
        self.client.publish(topic, payload, qos=1, retain=retain)
        return self.acknowledged.get(timeout=TIMEOUT_S)

    def hear(self) -> tuple[str, bytes]:
        return self.heard.get(timeout=TIMEOUT_S)

    def leave(self, *, with_will: bool = False) -> None:
        if with_will:  # 0x04: disconnect with will message
            self.client.disconnect(reasoncode=ReasonCode(PacketTypes.DISCONNECT, identifier=0x04))
        else:
            self.client.disconnect()
        self.client.loop_stop()


@dataclass(frozen=True)
class Fleet:
    """A broker with the production files, and who has connected to it."""

    enrolled: Enrolled
    port: int
    parties: list[Party] = field(default_factory=list)

    def join(self, name: str, *, client_id: str = "", will: str = "", user: str = "") -> Party:
        party = Party(self.enrolled, name, client_id=client_id, will=will, user=user)
        self.parties.append(party)
        party.connect(self.port)
        return party


def answers_connect(context: ssl.SSLContext, port: int) -> bool:
    """Return whether the broker answers an MQTT 3.1.1 CONNECT over `context` with an accepting CONNACK."""
    with socket.create_connection((HOST, port), timeout=TIMEOUT_S) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=HOST) as link:
                link.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01a")
                return link.recv(4) == b"\x20\x02\x00\x00"
        except (ssl.SSLError, ConnectionError):
            return False


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Enrolled:
    return Enrolled.new(tmp_path_factory.mktemp("enrolled") / "home")


@pytest.fixture
def fleet(enrolled: Enrolled) -> Iterator[Fleet]:
    with BrokerProcess(tls=enrolled.broker()) as broker:
        fleet = Fleet(enrolled, broker.port)
        try:
            yield fleet
        finally:
            for party in fleet.parties:
                party.leave()


def test_the_coordinator_hears_devices_and_they_hear_it(fleet: Fleet) -> None:
    coordinator, device = fleet.join("coordinator"), fleet.join("pi-1")
    coordinator.subscribe("sv1/home/up/#", "sv1/home/st/#")
    device.subscribe("sv1/home/all/#", "sv1/home/dn/pi-1/#")
    assert device.publish("sv1/home/up/pi-1/0/masked", b"chunk") == 0
    assert device.publish("sv1/home/st/pi-1", b"online") == 0
    assert [coordinator.hear(), coordinator.hear()] == [
        ("sv1/home/up/pi-1/0/masked", b"chunk"),
        ("sv1/home/st/pi-1", b"online"),
    ]
    assert coordinator.publish("sv1/home/all/round", b"announcement", retain=True) == 0
    assert coordinator.publish("sv1/home/dn/pi-1/0", b"selection") == 0
    assert [device.hear(), device.hear()] == [
        ("sv1/home/all/round", b"announcement"),
        ("sv1/home/dn/pi-1/0", b"selection"),
    ]


@pytest.mark.parametrize(
    "topic",
    [
        "sv1/home/up/pi-2/0/masked",
        "sv1/home/st/pi-2",
        "sv1/home/dn/pi-2/0",
        "sv1/home/dn/pi-1/0",
        "sv1/home/all/round",
        "sv1/home/st/pi-1/below",
        "elsewhere",
    ],
)
def test_a_device_publishes_nowhere_but_under_its_own_name(fleet: Fleet, topic: str) -> None:
    coordinator, thief = fleet.join("coordinator"), fleet.join("pi-1")
    coordinator.subscribe("sv1/#")
    assert thief.publish(topic, b"forged") == NOT_AUTHORISED
    assert thief.publish("sv1/home/up/pi-1/0/own", b"honest") == 0
    assert coordinator.hear() == ("sv1/home/up/pi-1/0/own", b"honest")


def test_a_device_cannot_read_what_is_said_to_another_or_by_another(fleet: Fleet) -> None:
    coordinator, thief, victim = fleet.join("coordinator"), fleet.join("pi-1"), fleet.join("pi-2")
    thief.subscribe("sv1/home/dn/#", "sv1/home/dn/pi-2/#", "sv1/home/up/#", "sv1/home/st/#", "#", "sv1/home/all/#")
    assert victim.publish("sv1/home/up/pi-2/0/masked", b"secret") == 0
    assert victim.publish("sv1/home/st/pi-2", b"online", retain=True) == 0
    assert coordinator.publish("sv1/home/dn/pi-2/0", b"shares") == 0
    assert coordinator.publish("sv1/home/all/marker", b"for everybody") == 0
    assert thief.hear() == ("sv1/home/all/marker", b"for everybody")


def test_a_device_cannot_take_another_client_id_or_its_queue(fleet: Fleet) -> None:
    coordinator, victim = fleet.join("coordinator"), fleet.join("pi-2")
    victim.subscribe("sv1/home/dn/pi-2/#")
    victim.leave()
    assert coordinator.publish("sv1/home/dn/pi-2/0", b"shares") == 0

    thief = Party(fleet.enrolled, "pi-1", client_id="pi-2")
    fleet.parties.append(thief)
    assert not thief.connect(fleet.port), "the thief must not be given the victim's session"
    thief.subscribe("sv1/home/all/#")
    assert coordinator.publish("sv1/home/all/marker", b"for everybody") == 0
    assert thief.hear() == ("sv1/home/all/marker", b"for everybody")

    returned = Party(fleet.enrolled, "pi-2")
    fleet.parties.append(returned)
    assert returned.connect(fleet.port), "the victim's session is still its own"
    assert returned.hear() == ("sv1/home/dn/pi-2/0", b"shares")


def test_a_device_cannot_disconnect_another_by_its_client_id(fleet: Fleet) -> None:
    coordinator, victim = fleet.join("coordinator"), fleet.join("pi-2")
    victim.subscribe("sv1/home/dn/pi-2/#")
    fleet.join("pi-1", client_id="pi-2")
    assert coordinator.publish("sv1/home/dn/pi-2/0", b"still here") == 0
    assert victim.hear() == ("sv1/home/dn/pi-2/0", b"still here")
    assert victim.gone.empty()


def test_the_user_name_of_connect_counts_for_nothing(fleet: Fleet) -> None:
    thief = fleet.join("pi-1", user="coordinator")
    assert thief.publish("sv1/home/all/round", b"forged", retain=True) == NOT_AUTHORISED


def test_a_last_will_obeys_the_same_rules(fleet: Fleet) -> None:
    coordinator = fleet.join("coordinator")
    coordinator.subscribe("sv1/home/#")
    fleet.join("pi-1", will="sv1/home/st/pi-2").leave(with_will=True)
    fleet.join("pi-3", will="sv1/home/st/pi-3").leave(with_will=True)
    assert coordinator.hear() == ("sv1/home/st/pi-3", b"will")


def test_a_certificate_of_another_ca_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    assert answers_connect(fleet.enrolled.context(*fleet.enrolled.issue("pi-1")), fleet.port)
    stranger = Enrolled.new(tmp_path / "other").issue("pi-1")
    assert not answers_connect(fleet.enrolled.context(*stranger), fleet.port)


def test_without_a_certificate_there_is_no_connection(fleet: Fleet) -> None:
    assert not answers_connect(fleet.enrolled.context(), fleet.port)


def test_a_revoked_device_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    enrolled = Enrolled.new(tmp_path / "home")
    devices = [enrolled.context(*enrolled.issue(name)) for name in ("pi-8", "pi-9")]
    with BrokerProcess(tls=enrolled.broker()) as broker:
        assert [answers_connect(context, broker.port) for context in devices] == [True, True]
        enrolled.revoke("pi-8")
        broker.restart()
        assert [answers_connect(context, broker.port) for context in devices] == [False, True]


def test_the_broker_certificate_is_no_device(fleet: Fleet) -> None:
    broker_files = fleet.enrolled.issue("broker", "broker")
    assert not answers_connect(fleet.enrolled.context(*broker_files), fleet.port)
