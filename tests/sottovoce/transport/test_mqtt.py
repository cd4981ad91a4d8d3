"""What only the network and a real mosquitto can show: outages, refusals, limits, TLS."""

from __future__ import annotations

import contextlib
import datetime
import random
import socket
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from simulation.broker_process import BrokerProcess, BrokerTls
from sottovoce.errors import ConfigError, TransportError
from sottovoce.transport.base import Connected, Delivery, Disconnected
from sottovoce.transport.mqtt import MqttSettings, MqttTransport, TlsFiles
from sottovoce.transport.reconnection import TAKEOVERS_A_MINUTE, UNANSWERED_BEFORE_GIVING_UP

NOW = datetime.datetime.now(datetime.UTC)
QUICK = {"backoff_min_s": 0.02, "backoff_max_s": 0.1}


@contextlib.contextmanager
def linked(settings, **options):
    transport = MqttTransport(settings, rng=random.Random(1), **options)
    with contextlib.closing(transport):
        yield transport


def settings_for(broker, **changes):
    return MqttSettings(**{"host": "127.0.0.1", "port": broker.port, "client_id": "pi-1", **QUICK, **changes})


def fatal_end(expect, transport) -> str:
    """Wait until the transport gives up and return its reason."""
    event = expect.that(transport, lambda event: isinstance(event, Disconnected) and event.fatal)
    with pytest.raises(TransportError, match="closed"):
        transport.publish("sv1/f/st/pi-1", b"")
    return event.reason


def test_a_broker_that_is_away_at_the_start_is_waited_for(expect):
    with BrokerProcess() as broker:
        broker.kill()
        with linked(settings_for(broker)) as transport:
            away = expect.event(transport, Disconnected)
            assert (away.fatal, "cannot be reached" in away.reason) == (False, True)
            transport.publish("sv1/f/st/pi-1", b"queued")
            broker.restart()
            expect.connected(transport)
            expect.nothing_pending(transport)


def test_a_frozen_broker_is_noticed_and_outlived(expect):
    with BrokerProcess() as broker, linked(settings_for(broker, keepalive_s=1, connect_timeout_s=0.3)) as transport:
        transport.subscribe("sv1/f/dn/pi-1/m")
        expect.connected(transport)
        broker.pause()
        noticed = expect.event(transport, Disconnected)
        again = expect.event(transport, Disconnected)
        broker.resume()
        assert (noticed.fatal, again.fatal) == (False, False)
        assert "does not answer" in again.reason
        assert expect.connected(transport).resumed is True


def test_two_clients_of_one_id_stop_fighting(any_mqtt_harness, expect):
    settings = any_mqtt_harness.settings("twin")
    with linked(settings) as one, linked(settings) as other:
        kicked = []
        while not kicked or not kicked[-1].fatal:
            kicked += [event for twin in (one, other) if isinstance(event := twin.receive(0.02), Disconnected)]
        assert "client" in kicked[-1].reason
        assert settings.client_id in kicked[-1].reason
        assert len(kicked) <= 2 * TAKEOVERS_A_MINUTE + 1


def test_credentials_that_the_broker_refuses_end_the_attempts(expect):
    with BrokerProcess(settings={"allow_anonymous": "false"}) as broker:
        for protocol in ("5", "3.1.1"):
            settings = settings_for(broker, protocol=protocol, username="pi-1", password="wrong")  # noqa: S106  # a wrong one, on purpose
            with linked(settings) as transport:
                assert "not authorised" in fatal_end(expect, transport)
            assert "wrong" not in repr(settings)


class Impostor:
    """A TCP server that is no broker: it says `words` to everybody and hangs up."""

    def __init__(self, words: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._words = words
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self.connections += 1
                    connection.recv(4096)
                    connection.sendall(self._words)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.mark.parametrize(
    "words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x01\x00", b"\x20\x06\x00\x00\x03\x7f\x01\x02"]
)
def test_whatever_answers_without_being_a_broker_ends_the_attempts(expect, words):
    with contextlib.closing(Impostor(words)) as impostor, linked(settings_for(impostor)) as transport:
        assert "without an answer" in fatal_end(expect, transport)
        assert impostor.connections == UNANSWERED_BEFORE_GIVING_UP


def test_a_broker_that_hangs_up_later_does_not_end_the_attempts(any_mqtt_harness, expect):
    """The relay of an absent broker accepts connections and closes them, as load balancers do."""
    transport = any_mqtt_harness.connect("pi-1")
    expect.connected(transport)
    any_mqtt_harness.unplug("pi-1")
    for _ in range(UNANSWERED_BEFORE_GIVING_UP + 2):
        assert expect.event(transport, Disconnected).fatal is False
    any_mqtt_harness.plug("pi-1")
    assert expect.connected(transport).resumed is True


def test_the_brokers_maximum_packet_size_is_respected(expect):
    with BrokerProcess(settings={"max_packet_size": "20000"}) as broker, linked(settings_for(broker)) as transport:
        before = transport.max_payload_bytes
        transport.publish("sv1/f/st/pi-1", bytes(20_000))  # Queued before the broker has said what it takes.
        transport.publish("sv1/f/st/pi-1", b"small", retain=True)
        seen = expect.nothing_pending(transport)
        assert not [event for event in seen if isinstance(event, Disconnected)]  # It never tried.
        assert sum(transport.refused.values()) == 1
        assert transport.max_payload_bytes < 20_000 < before
        with pytest.raises(TransportError, match="smaller chunks"):
            transport.publish("sv1/f/st/pi-1", bytes(20_000))
        transport.subscribe("sv1/f/st/pi-1")
        assert expect.delivery(transport, "sv1/f/st/pi-1").payload == b"small"


def test_what_a_new_broker_does_not_take_is_not_resent_for_ever(mqtt_harness, expect):
    transport = mqtt_harness.connect("pi-1")
    expect.connected(transport)
    mqtt_harness.broker.pause()
    transport.publish("sv1/f/st/pi-1", bytes(20_000))  # On its way: it must be sent again.
    transport.publish("sv1/f/st/pi-1", b"small")
    with BrokerProcess(settings={"max_packet_size": "15000"}) as smaller:
        mqtt_harness.move("pi-1", smaller)
        mqtt_harness.broker.resume()
        seen = expect.nothing_pending(transport)
        assert len([event for event in seen if isinstance(event, Disconnected)]) == 1
        assert sum(transport.refused.values()) == 1


class PickyBroker:
    """A broker that takes publishes of less than 10,000 bytes and says so only when it gets a larger one."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.oversize = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rb") as stream:
                    while self._answer(connection, *self._packet(stream)):
                        pass

    def _packet(self, stream) -> tuple[int, bytes]:
        kind, length, shift = (stream.read(1) or b"\0")[0], 0, 0
        while kind:
            digit = stream.read(1)[0]
            length, shift = length | (digit & 127) << shift, shift + 7
            if digit < 128:
                break
        return kind & 0xF0, stream.read(length)

    def _answer(self, connection: socket.socket, kind: int, body: bytes) -> bool:
        if kind == 0x10:
            connection.sendall(b"\x20\x03\x00\x00\x00")
        elif kind == 0x30 and len(body) < 10_000:
            topic_bytes = int.from_bytes(body[:2], "big")
            connection.sendall(b"\x40\x02" + body[2 + topic_bytes : 4 + topic_bytes])
        elif kind == 0x30:
            self.oversize += 1
            connection.sendall(b"\xe0\x01\x95")
            return False
        return kind != 0

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def test_what_a_broker_hangs_up_for_is_sent_once(expect):
    with contextlib.closing(PickyBroker()) as picky, linked(settings_for(picky)) as transport:
        for size in (10, 20_000, 20):
            transport.publish("sv1/f/st/pi-1", bytes(size))
        seen = expect.nothing_pending(transport)
        assert ["Packet too large" in event.reason for event in seen if isinstance(event, Disconnected)] == [True]
        assert (picky.oversize, sum(transport.refused.values())) == (1, 1)


def test_an_oversize_message_over_3_1_1_is_not_resent_for_ever(expect):
    with (
        BrokerProcess(settings={"max_packet_size": "20000"}) as broker,
        linked(settings_for(broker, protocol="3.1.1")) as transport,
    ):
        transport.publish("sv1/f/st/pi-1", bytes(20_000))
        assert "max_packet_size" in fatal_end(expect, transport)


def test_the_outgoing_queue_is_bounded(expect):
    with BrokerProcess() as broker:
        broker.kill()
        small = settings_for(broker, queue_messages=3, queue_bytes=1000, max_payload_bytes=1000)
        with linked(small) as transport:
            for _ in range(3):
                transport.publish("sv1/f/st/pi-1", b"x")
            with pytest.raises(TransportError, match="full"):
                transport.publish("sv1/f/st/pi-1", b"x")
        with linked(small) as transport:
            transport.publish("sv1/f/st/pi-1", bytes(600))
            with pytest.raises(TransportError, match="full"):
                transport.publish("sv1/f/st/pi-1", bytes(600))
            transport.publish("sv1/f/st/pi-1", bytes(10), qos=0)  # Telemetry is lost while the link is down.
            assert transport.pending() == 1


def test_no_more_than_the_receive_maximum_is_on_its_way(mqtt_harness, expect):
    """A device that is busy costs the broker two messages, not its whole queue."""
    coordinator, device = mqtt_harness.connect("coordinator"), mqtt_harness.connect("pi-1")
    topic = mqtt_harness.topics.down("pi-1")
    device.subscribe(topic)
    expect.connected(device)
    for index in range(10):
        coordinator.publish(topic, bytes([index]) * 10_000)
    expect.nothing_pending(coordinator)
    # The device has answered pings and nothing else: the broker has been silent since the second message.
    marker = mqtt_harness.connect("pi-2")
    marker.subscribe(mqtt_harness.topics.round())
    expect.connected(marker)
    coordinator.publish(mqtt_harness.topics.round(), b"marker")
    expect.delivery(marker, mqtt_harness.topics.round())
    assert mqtt_harness.bytes_down("pi-1") < 3 * 10_000
    assert [expect.delivery(device, topic).payload[0] for _ in range(10)] == list(range(10))


@pytest.mark.parametrize("qos", [0, 1])
def test_what_is_too_large_for_this_client_is_dropped_and_acknowledged(expect, qos):
    """Over 3.1.1 nothing tells the broker what is too large, and mosquitto waits for the first 20 receipts."""
    with BrokerProcess() as broker:
        settings = settings_for(broker, protocol="3.1.1", max_payload_bytes=100)
        other = settings_for(broker, client_id="home")
        with linked(settings) as transport, linked(other) as home:
            transport.subscribe("home/#")
            expect.connected(transport)
            home.subscribe("home/none")
            expect.connected(home)
            for _ in range(25):
                home.publish("home/camera", bytes(101), qos=qos)
            home.publish("home/camera", bytes(100))
            assert expect.event(transport, Delivery).payload == bytes(100)
            assert transport.refused == {"a delivery larger than max_payload_bytes": 25}


def test_what_was_not_acknowledged_comes_once_after_many_outages(mqtt_harness, expect):
    coordinator, device = mqtt_harness.connect("coordinator"), mqtt_harness.connect("pi-1")
    topic = mqtt_harness.topics.down("pi-1")
    device.subscribe(topic)
    expect.connected(device)
    coordinator.publish(topic, b"one")
    coordinator.publish(topic, b"two")
    expect.nothing_pending(coordinator)
    for _ in range(3):
        mqtt_harness.cut("pi-1")
        mqtt_harness.wait_for_link("pi-1")
    coordinator.publish(topic, b"three")
    events = [expect.that(device, lambda event: True)]
    while not (isinstance(events[-1], Delivery) and events[-1].payload == b"three"):
        events.append(expect.that(device, lambda event: True))
    # The relay hears of a new link before the client does; what was taken out of the old one until then comes again.
    newest = max(at for at, event in enumerate(events) if isinstance(event, Connected))
    assert [event.payload for event in events[newest:] if isinstance(event, Delivery)] == [b"one", b"two", b"three"]


def test_a_publish_that_the_broker_denies_is_counted(expect, tmp_path):
    rights = tmp_path / "acl"
    rights.write_text("topic read #\n")
    with BrokerProcess(settings={"acl_file": str(rights)}) as broker, linked(settings_for(broker)) as transport:
        transport.publish("sv1/f/st/pi-1", b"x")
        expect.nothing_pending(transport)
        assert transport.refused == {"Not authorized": 1}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"host": " "}, "host"),
        ({"port": 0}, "port"),
        ({"client_id": ""}, "client_id"),
        ({"protocol": "4"}, "protocol"),
        ({"password": "x"}, "username"),
        ({"keepalive_s": 0}, "keepalive_s"),
        ({"queue_bytes": 10}, "queue_bytes"),
        ({"backoff_min_s": 9.0, "backoff_max_s": 1.0}, "backoff_min_s"),
    ],
)
def test_impossible_settings_are_refused_by_name(changes, names):
    with pytest.raises(ConfigError, match=names):
        MqttSettings(**{"host": "broker", "port": 1883, "client_id": "pi-1", **changes})


class Authority:
    """A CA of its own that writes PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        certificate = (
            self._builder(self._name, self._key, NOW - datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.revoked = folder / f"{name}.crl"
        nobody = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        nobody = nobody.last_update(NOW).next_update(NOW + datetime.timedelta(days=30))
        signed = nobody.sign(self._key, hashes.SHA256())
        self.revoked.write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, since: datetime.datetime = NOW - datetime.timedelta(days=1)) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        certificate = self._builder(subject, key, since).add_extension(names, critical=False)
        cert_file, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        signed = certificate.sign(self._key, hashes.SHA256())
        cert_file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, since: datetime.datetime):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(NOW + datetime.timedelta(days=30))
        )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("fleet"), "fleet-ca")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger-ca")


@pytest.fixture(scope="module")
def tls_broker(fleet):
    certificate, key = fleet.issue("broker")
    with BrokerProcess(tls=BrokerTls(fleet.file, certificate, key, fleet.revoked)) as broker:
        yield broker


def tls_settings(broker, tls, **changes):
    return settings_for(broker, **{"host": "localhost", "tls": tls, **changes})


def test_mutual_tls_lets_a_device_in(tls_broker, fleet, expect):
    with linked(tls_settings(tls_broker, TlsFiles(fleet.file, *fleet.issue("pi-1")))) as transport:
        transport.subscribe("sv1/f/all/round")
        expect.connected(transport)
        payload = bytes(transport.max_payload_bytes)
        transport.publish("sv1/f/up/pi-1/0/m", payload)
        expect.nothing_pending(transport)
        assert transport.refused == {}


def test_a_large_message_comes_through_tls_whole(tls_broker, fleet, expect):
    own = tls_settings(tls_broker, TlsFiles(fleet.file, *fleet.issue("coordinator")), client_id="coordinator")
    with linked(own) as transport:
        transport.subscribe("sv1/f/all/round")
        expect.connected(transport)
        payload = random.Random(7).randbytes(transport.max_payload_bytes)
        transport.publish("sv1/f/all/round", payload)
        assert expect.delivery(transport, "sv1/f/all/round").payload == payload


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_device_without_a_certificate_of_the_fleet_gives_up(tls_broker, fleet, stranger, expect, protocol):
    for files in (TlsFiles(fleet.file), TlsFiles(fleet.file, *stranger.issue("pi-1"))):
        with linked(tls_settings(tls_broker, files, protocol=protocol)) as transport:
            assert "certificate" in fatal_end(expect, transport)


def test_a_broker_under_another_ca_is_not_trusted(tls_broker, fleet, stranger, expect):
    with linked(tls_settings(tls_broker, TlsFiles(stranger.file, *fleet.issue("pi-1")))) as transport:
        assert "does not fit ca_file" in fatal_end(expect, transport)


def test_a_broker_of_another_name_is_not_trusted(tls_broker, fleet, expect):
    with linked(tls_settings(tls_broker, TlsFiles(fleet.file, *fleet.issue("pi-1")), host="127.0.0.1")) as transport:
        assert "does not fit ca_file and host" in fatal_end(expect, transport)


def test_tls_where_the_broker_has_none_gives_up(mosquitto, fleet, expect):
    with linked(tls_settings(mosquitto, TlsFiles(fleet.file))) as transport:
        assert "port" in fatal_end(expect, transport)


def test_no_tls_where_the_broker_wants_it_gives_up(tls_broker, expect):
    with linked(settings_for(tls_broker)) as transport:
        assert "TLS" in fatal_end(expect, transport)


def test_a_wrong_clock_is_waited_out_and_the_better_clock_decides(tls_broker, fleet, expect):
    best_known = [0.0]  # 1970: no network time, no signed time yet.
    settings = tls_settings(tls_broker, TlsFiles(fleet.file, *fleet.issue("pi-1")))
    with linked(settings, now_unix_s=lambda: best_known[0]) as transport:
        refused = expect.event(transport, Disconnected)
        assert (refused.fatal, "clock" in refused.reason) == (False, True)
        best_known[0] = NOW.timestamp()
        expect.connected(transport)


def test_unusable_tls_files_are_a_config_error(fleet, stranger, tmp_path):
    certificate, _ = fleet.issue("pi-1")
    _, other_key = stranger.issue("pi-1")
    for files in (
        TlsFiles(tmp_path / "missing.pem"),
        TlsFiles(fleet.file, certificate, other_key),
        TlsFiles(fleet.file, tmp_path / "missing.pem", other_key),
    ):
        with pytest.raises(ConfigError):
            MqttTransport(MqttSettings(host="b", port=1, client_id="c", tls=files), rng=random.Random(1))


def test_close_leaves_no_thread_behind(mosquitto, expect):
    before = set(threading.enumerate())
    transport = MqttTransport(settings_for(mosquitto), rng=random.Random(1))
    expect.connected(transport)
    never_used = MqttTransport(settings_for(mosquitto), rng=random.Random(1))
    assert set(threading.enumerate()) - before
    for each in (transport, never_used):
        each.close()
        each.close()
    assert set(threading.enumerate()) == before
