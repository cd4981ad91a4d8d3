"""What is let in, and what is refused for which reason; the roster behind it; settings."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from choir import AT, Choir

from coordinator.admission import Admission, DeviceChunk, StatusHint
from coordinator.fleet import Fleet
from coordinator.settings import read_settings
from sottovoce.errors import BadCertificate, ConfigError, CryptoError, RemoteProtocolError
from sottovoce.identity import SignedContext, TrustAnchor, load_revoked
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk, fragments
from sottovoce.wire.codec import Opened, seal
from sottovoce.wire.messages import CheckIn, Message, NotSelected, Ready, Status, Withdraw
from sottovoce.wire.topics import Topics


@pytest.fixture
def admission(choir: Choir) -> Admission:
    choir.names(2)
    return Admission(Topics("choir"), coordinator="coordinator", fleet=Fleet(choir.anchor))


def _sealed(choir: Choir, message: Message, *, sender: str = "pi-00", to: str = "coordinator", **context: Any) -> bytes:
    return seal(message, choir.devices[sender], SignedContext(sender, to, "choir", **context))


def _check_in(choir: Choir, device: str = "pi-00") -> CheckIn:
    return CheckIn(choir.devices[device].certificate.der, bytes(32), fast_aes=True)


def _up(device: str = "pi-00") -> str:
    return f"sv1/choir/up/{device}/0/m"


def test_after_a_check_in_a_devices_other_messages_are_opened(choir: Choir, admission: Admission) -> None:
    opened = admission.open(_up(), _sealed(choir, _check_in(choir)), at=AT)
    assert isinstance(opened, Opened)
    assert opened.certificate.name == "pi-00"
    opened = admission.open(_up(), _sealed(choir, Ready(present=True), round=3), at=AT)
    assert isinstance(opened, Opened)
    assert opened.message == Ready(present=True)
    assert opened.context.round == 3


def test_an_envelope_in_fragments_is_put_together(choir: Choir, admission: Admission) -> None:
    big = CheckIn(choir.devices["pi-00"].certificate.der, bytes(5000), fast_aes=True)
    parts = fragments(_sealed(choir, big), chunk_bytes=2048)
    assert len(parts) > 2
    *first, last = [admission.open(_up(), part, at=AT) for part in reversed(parts)]
    assert first == [None] * (len(parts) - 1)
    assert isinstance(last, Opened)
    assert last.message == big


def test_strangers_that_begin_and_never_finish_crowd_out_no_device(choir: Choir, admission: Admission) -> None:
    admission.open(_up(), _sealed(choir, _check_in(choir)), at=AT)
    big = CheckIn(choir.devices["pi-00"].certificate.der, bytes(200_000), fast_aes=True)
    *parts, last = fragments(_sealed(choir, big), chunk_bytes=65_536)
    for part in parts:
        assert admission.open(_up(), part, at=AT) is None
    begun = fragments(bytes(10_000), chunk_bytes=2048)[0]
    for number in range(200):
        assert admission.open(_up(f"stranger-{number}"), begun, at=AT) is None
    assert isinstance(admission.open(_up(), last, at=AT), Opened)
    with pytest.raises(RemoteProtocolError, match="where a whole may have"):
        admission.open(_up("stranger"), parts[0], at=AT)


def _tampered(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("malformed", lambda c: (_up(), b"nonsense")),
        ("malformed", lambda c: (_up(), _sealed(c, _check_in(c))[:-10])),
        ("malformed", lambda c: (_up(), b"x" * 2_000_000)),
        ("malformed", lambda c: ("sv1/another/up/pi-00/0/m", _sealed(c, _check_in(c)))),
        ("malformed", lambda c: ("sv1/choir/dn/pi-00/m", _sealed(c, _check_in(c)))),
        ("malformed", lambda c: ("sv1/choir/up/pi-00/1/c", b"not a chunk")),
        ("malformed", lambda c: (_up("pi-01"), _sealed(c, _check_in(c, "pi-00"), sender="pi-01"))),
        ("wrong_address", lambda c: (_up("pi-01"), _sealed(c, _check_in(c)))),
        ("wrong_address", lambda c: (_up(), _sealed(c, _check_in(c), to="another"))),
        ("wrong_address", lambda c: (_up(), _sealed(c, _check_in(c), to="all"))),
        ("unknown_device", lambda c: (_up(), _sealed(c, Ready(present=True)))),
        ("bad_signature", lambda c: (_up(), _tampered(_sealed(c, _check_in(c))))),
        ("bad_certificate", lambda c: (_up(), _sealed(c, CheckIn(b"not DER", bytes(32), fast_aes=True)))),
        ("bad_certificate", lambda c: (_up(), _sealed(c, CheckIn(c.coordinator.certificate.der, bytes(32), True)))),
        ("malformed", lambda c: ("sv1/choir/st/pi-00", _sealed(c, Ready(present=True), to="all"))),
    ],
)
def test_what_is_wrong_is_refused_for_its_reason(
    choir: Choir, admission: Admission, reason: str, make: Callable[[Any], tuple[str, bytes]]
) -> None:
    topic, payload = make(choir)
    with pytest.raises((RemoteProtocolError, CryptoError)) as caught:
        admission.open(topic, payload, at=AT)
    assert isinstance(caught.value, RemoteProtocolError | CryptoError)
    assert caught.value.reason == reason


def test_a_check_in_that_is_not_signed_by_its_holder_makes_nobody_known(choir: Choir, admission: Admission) -> None:
    with pytest.raises(CryptoError):
        admission.open(_up(), _tampered(_sealed(choir, _check_in(choir))), at=AT)
    with pytest.raises(RemoteProtocolError, match="has not checked in"):
        admission.open(_up(), _sealed(choir, Ready(present=True)), at=AT)


def test_a_status_is_a_hint_and_of_a_known_device_it_must_be_signed(choir: Choir, admission: Admission) -> None:
    topic, online = "sv1/choir/st/pi-00", _sealed(choir, Status(online=True, version="1"), to="all")
    assert admission.open(topic, online, at=AT) == StatusHint("pi-00", online=True)
    assert admission.open(topic, _tampered(online), at=AT) == StatusHint("pi-00", online=True)
    assert admission.open(topic, b"", at=AT) is None
    admission.open(_up(), _sealed(choir, _check_in(choir)), at=AT)
    assert admission.open(topic, online, at=AT) == StatusHint("pi-00", online=True)
    with pytest.raises(CryptoError):
        admission.open(topic, _tampered(online), at=AT)


def test_who_never_checked_in_and_withdraws_is_only_not_waited_for(choir: Choir, admission: Admission) -> None:
    withdrawn = _sealed(choir, Withdraw(code="policy"), round=3)
    assert admission.open(_up(), withdrawn, at=AT) == StatusHint("pi-00", online=False)


def test_who_withdraws_instead_of_checking_in_shows_its_certificate(choir: Choir, admission: Admission) -> None:
    shown = Withdraw(code="policy", certificate=choir.devices["pi-00"].certificate.der)
    opened = admission.open(_up(), _sealed(choir, shown, round=3), at=AT)
    assert isinstance(opened, Opened)
    assert (opened.message, opened.certificate.name) == (shown, "pi-00")
    with pytest.raises(CryptoError):
        admission.open(_up(), _tampered(_sealed(choir, shown, round=3)), at=AT)


def test_a_chunk_is_passed_on_with_the_device_of_its_topic(admission: Admission) -> None:
    chunk = VectorChunk(b"s" * 32, 3, b"content")
    assert admission.open("sv1/choir/up/pi-01/1/c", encode_vector_chunk(chunk), at=AT) == DeviceChunk("pi-01", chunk)


def test_a_device_may_not_say_what_only_a_coordinator_says(choir: Choir, admission: Admission) -> None:
    admission.open(_up(), _sealed(choir, _check_in(choir)), at=AT)
    with pytest.raises(RemoteProtocolError, match="a device may not send NotSelected"):
        admission.open(_up(), _sealed(choir, NotSelected(retry_ms=1)), at=AT)


# --- the roster -------------------------------------------------------------------------------------------------------


def test_the_newest_certificate_of_a_device_is_live(tmp_path: Path) -> None:
    other = Choir(tmp_path / "ca")
    later = AT + datetime.timedelta(days=10)
    old = other.enrol("pi-1")
    new = other.enrol("pi-1", at=later, replace=True)
    fleet = Fleet(other.anchor)
    fleet.admit(fleet.verify(old.certificate.der, at=later))
    fleet.admit(fleet.verify(new.certificate.der, at=later))
    with pytest.raises(BadCertificate, match="newer certificate"):
        fleet.verify(old.certificate.der, at=later)
    with pytest.raises(RemoteProtocolError, match="has not checked in with the certificate"):
        fleet.certificate("pi-1", fingerprint=old.certificate.fingerprint, at=later)
    assert fleet.certificate("pi-1", fingerprint=new.certificate.fingerprint, at=later) == new.certificate


def test_a_revoked_certificate_is_refused_also_when_the_journal_remembers_it(tmp_path: Path) -> None:
    other = Choir(tmp_path / "ca")
    identity = other.enrol("pi-1")
    certificate = other.authority.certificate
    serials = load_revoked(other.revoke("pi-1"), certificate)
    fleet = Fleet(TrustAnchor(certificate, revoked_serials=tuple(serials)))
    with pytest.raises(BadCertificate, match="revoked"):
        fleet.verify(identity.certificate.der, at=AT)
    fleet.restore([identity.certificate.der], at=AT)
    assert not fleet.knows("pi-1")


def test_a_certificate_expires(choir: Choir) -> None:
    fleet = Fleet(choir.anchor)
    choir.names(1)
    certificate = choir.devices["pi-00"].certificate
    fleet.restore([certificate.der], at=AT)
    assert fleet.certificate("pi-00", fingerprint=certificate.fingerprint, at=AT) == certificate
    with pytest.raises(BadCertificate, match="valid"):
        fleet.certificate("pi-00", fingerprint=certificate.fingerprint, at=AT + datetime.timedelta(days=5000))


def test_hints_of_devices_nobody_knows_are_bounded(choir: Choir) -> None:
    fleet = Fleet(choir.anchor)
    for number in range(20_100):
        fleet.note_status(f"invented-{number}", online=True)
    assert len(fleet.online) == 20_000
    assert fleet.note_status("invented-1", online=False)
    assert not fleet.note_status("invented-1", online=False)
    assert fleet.offline == {"invented-1"}


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings(folder: Path, text: str) -> Path:
    path = folder / "coordinator.toml"
    path.write_text('name = "coordinator"\nfleet = "choir"\n' + text)
    return path


def test_file_names_are_relative_to_the_settings_file(tmp_path: Path) -> None:
    settings = read_settings(_settings(tmp_path, 'revoked = "r.pem"\n[broker]\nport = 8883\n'))
    assert settings.journal == tmp_path / "journal.sqlite"
    assert settings.revoked == tmp_path / "r.pem"
    assert (settings.broker.port, settings.uploads.slots) == (8883, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[broker]\nhots = 'x'", r"broker.hots: unknown key; the keys here are ca_file, .*host"),
        ("[broker]\nport = 0", r"broker.port: expected `int` >= 1"),
        ("[broker]\nprotocol = '4'", r"broker.protocol: invalid enum value '4'"),
        (
            "[broker]\nca_file = 'ca.pem'",
            r"TLS needs ca_file, .* together; missing: broker.cert_file",
        ),
        ("[uploads]\nslots = 0", r"uploads.slots: expected `int` >= 1"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_settings(_settings(tmp_path, text))
