"""Identities: what is signed, what is believed, and everything that is refused."""

import copy
import datetime
import io
import pickle
from dataclasses import dataclass

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from sottovoce import identity as module
from sottovoce.errors import BadCertificate, BadSignature, ConfigError
from sottovoce.identity import (
    Identity,
    SignedContext,
    TrustAnchor,
    latest_time,
    load_certificate,
    load_key,
    load_revoked,
    new_key,
    read_secret_file,
    signed_bytes,
    signing_request,
    subject,
    write_secret_file,
)

NOW = datetime.datetime(2027, 1, 10, 12, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass
class Authority:
    """A CA made of the bare library, so that these tests do not rest on `sottovoce.authority`."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def issue(self, key, *, name="pi-1", fleet="clinic", role="device", start=NOW - DAY, end=NOW + DAY, who=None):
        builder = _builder(who or subject(name=name, fleet=fleet, role=role), self.certificate.subject, start, end)
        return builder.public_key(key.public_key()).sign(self.key, hashes.SHA256())

    def identity(self, **what) -> Identity:
        key = new_key()
        return Identity(key, TrustAnchor(self.certificate).verify(der(self.issue(key, **what)), at=NOW))

    def revoked_list(self, *serials: int) -> bytes:
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(NOW).next_update(NOW + DAY)
        for serial in serials:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(who, issuer, start, end):
    return (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def authority(fleet="clinic", *, ca=True, key=None, start=NOW - 30 * DAY, end=NOW + 3000 * DAY) -> Authority:
    key = key or new_key()
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "fleet-ca"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet)]
    )
    builder = _builder(name, name, start, end).public_key(key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA256()))


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


@pytest.fixture(scope="module")
def clinic() -> Authority:
    return authority()


@pytest.fixture(scope="module")
def device(clinic: Authority) -> Identity:
    return clinic.identity()


class TestSignature:
    def test_is_low_s_and_verifies(self, device: Identity) -> None:
        for n in range(20):
            signature = device.sign(b"content %d" % n)
            assert len(signature) == 64
            assert int.from_bytes(signature[32:], "big") <= ORDER // 2
            device.certificate.verify(signature, b"content %d" % n)

    def test_of_other_content_is_refused(self, device: Identity) -> None:
        with pytest.raises(BadSignature, match="not signed by pi-1"):
            device.certificate.verify(device.sign(b"this"), b"that")

    def test_by_another_key_is_refused(self, clinic: Authority, device: Identity) -> None:
        with pytest.raises(BadSignature):
            device.certificate.verify(clinic.identity(name="pi-2").sign(b"this"), b"this")

    def test_high_s_is_refused_although_the_mathematics_hold(self, device: Identity) -> None:
        good = device.sign(b"this")
        s = int.from_bytes(good[32:], "big")
        with pytest.raises(BadSignature, match="low-s"):
            device.certificate.verify(good[:32] + (ORDER - s).to_bytes(32, "big"), b"this")

    @pytest.mark.parametrize(
        ("r", "s"),
        [(0, 1), (1, 0), (0, 0), (ORDER, 1), (1, ORDER), (1, ORDER // 2 + 1), (2**256 - 1, 1), (1, 2**256 - 1)],
    )
    def test_out_of_range_is_refused(self, device: Identity, r: int, s: int) -> None:
        with pytest.raises(BadSignature, match="out of range"):
            device.certificate.verify(r.to_bytes(32, "big") + s.to_bytes(32, "big"), b"this")

    @pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
    def test_of_wrong_length_is_refused(self, device: Identity, length: int) -> None:
        with pytest.raises(BadSignature, match="64 bytes"):
            device.certificate.verify((device.sign(b"this") * 2)[:length], b"this")

    def test_in_der_is_refused(self, device: Identity) -> None:
        raw = device.sign(b"this")
        encoded = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        with pytest.raises(BadSignature, match="64 bytes"):
            device.certificate.verify(encoded, b"this")


NAMES = st.text(max_size=8)
CONTEXTS = st.builds(
    SignedContext,
    sender=NAMES,
    recipient=NAMES,
    fleet=NAMES,
    round=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**32 - 1),
    session=st.binary(max_size=40),
)
SIGNED = st.tuples(NAMES, CONTEXTS, st.binary(max_size=40), st.binary(max_size=40))


class TestSignedBytes:
    @given(SIGNED, SIGNED)
    def test_differ_when_anything_differs(self, first, second) -> None:
        assert (signed_bytes(*first) == signed_bytes(*second)) == (first == second)

    @given(SIGNED, st.data())
    def test_moving_a_boundary_between_two_fields_changes_them(self, signed, data) -> None:
        name, context, fingerprint, digest = signed
        both = context.sender + context.recipient
        cut = data.draw(st.integers(0, len(both)))
        moved = msgspec.structs.replace(context, sender=both[:cut], recipient=both[cut:])
        same = signed_bytes(name, moved, fingerprint, digest) == signed_bytes(name, context, fingerprint, digest)
        assert same == (moved == context)

    def test_are_these_bytes(self) -> None:
        """The layout is the protocol: this vector may never change."""
        context = SignedContext(sender="a", recipient="bc", fleet="f", round=258, attempt=3, session=b"\x07" * 2)
        expected = (
            b"sottovoce/1/"
            b"\x05\x00\x00\x00Ready\x01\x00\x00\x00a\x02\x00\x00\x00bc\x01\x00\x00\x00f"
            b"\x08\x00\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x03\x00\x00\x00"
            b"\x02\x00\x00\x00\x07\x07\x01\x00\x00\x00F\x01\x00\x00\x00D"
        )
        assert signed_bytes("Ready", context, b"F", b"D") == expected


class TestIdentity:
    def test_shows_its_name_and_never_its_key(self, clinic: Authority) -> None:
        key = new_key()
        certificate = TrustAnchor(clinic.certificate).verify(der(clinic.issue(key)), at=NOW)
        identity = Identity(key, certificate)
        secret = key.private_numbers().private_value
        shown = f"{identity} {identity!r} {[identity]} {identity.certificate!r}"
        assert "pi-1" in shown
        for form in (str(secret), f"{secret:x}", repr(identity.storage_secret())):
            assert form not in shown

    def test_cannot_be_pickled_or_copied(self, device: Identity) -> None:
        for how in (
            lambda: pickle.dump(device, io.BytesIO()),
            lambda: copy.copy(device),
            lambda: copy.deepcopy(device),
        ):
            with pytest.raises(TypeError, match="never pickled"):
                how()

    def test_refuses_the_certificate_of_another_key(self, device: Identity) -> None:
        with pytest.raises(ConfigError, match="pi-1 is not for this private key"):
            Identity(new_key(), device.certificate)

    def test_has_a_storage_secret_of_its_own(self, clinic: Authority, device: Identity) -> None:
        assert len(device.storage_secret()) == 32
        assert device.storage_secret() == device.storage_secret()
        assert device.storage_secret() != clinic.identity().storage_secret()


class TestTrustAnchor:
    def test_says_what_a_certificate_says(self, clinic: Authority) -> None:
        issued = clinic.issue(new_key(), name="pi-9")
        certificate = TrustAnchor(clinic.certificate).verify(der(issued), at=NOW, role="device")
        assert (certificate.name, certificate.role, certificate.fleet) == ("pi-9", "device", "clinic")
        assert certificate.fingerprint == issued.fingerprint(hashes.SHA256())
        assert certificate.issued_unix_s == int((NOW - DAY).timestamp())

    def test_refuses_another_role(self, clinic: Authority) -> None:
        issued = der(clinic.issue(new_key(), name="coordinator", role="coordinator"))
        anchor = TrustAnchor(clinic.certificate)
        assert anchor.verify(issued, at=NOW).role == "coordinator"
        with pytest.raises(BadCertificate, match="coordinator is a coordinator, not a device"):
            anchor.verify(issued, at=NOW, role="device")

    @pytest.mark.parametrize(
        "what",
        [
            {"fleet": "other"},
            {"role": "broker"},
            {"role": "Device"},
            {"name": "pi 1"},
            {"name": "pi/1"},
            {"name": "pi+"},
            {"who": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi-1")])},
            {"who": x509.Name([*subject(name="pi-1", fleet="clinic", role="device")] * 2)},
        ],
        ids=str,
    )
    def test_refuses_what_names_nobody_of_this_fleet(self, clinic: Authority, what) -> None:
        with pytest.raises(BadCertificate):
            TrustAnchor(clinic.certificate).verify(der(clinic.issue(new_key(), **what)), at=NOW)

    @pytest.mark.parametrize("offset", [-2 * DAY, 2 * DAY])
    def test_judges_validity_at_every_call(self, clinic: Authority, offset: datetime.timedelta) -> None:
        anchor = TrustAnchor(clinic.certificate)
        issued = der(clinic.issue(new_key()))
        anchor.verify(issued, at=NOW)
        with pytest.raises(BadCertificate, match="is valid 2027-01-09 to 2027-01-11, not on"):
            anchor.verify(issued, at=NOW + offset)
        anchor.verify(issued, at=NOW)

    def test_expires_with_its_authority(self) -> None:
        short = authority(end=NOW + DAY)
        issued = der(short.issue(new_key(), end=NOW + 30 * DAY))
        anchor = TrustAnchor(short.certificate)
        anchor.verify(issued, at=NOW)
        with pytest.raises(BadCertificate, match="not on"):
            anchor.verify(issued, at=NOW + 2 * DAY)

    def test_refuses_a_foreign_authority_of_the_same_name(self, clinic: Authority) -> None:
        impostor = authority()
        assert impostor.certificate.subject == clinic.certificate.subject
        with pytest.raises(BadCertificate, match="not a certificate of this fleet's CA"):
            TrustAnchor(clinic.certificate).verify(der(impostor.issue(new_key())), at=NOW)

    def test_refuses_a_self_signed_certificate(self, clinic: Authority) -> None:
        key = new_key()
        who = subject(name="pi-1", fleet="clinic", role="device")
        for issuer in (who, clinic.certificate.subject):
            made = _builder(who, issuer, NOW - DAY, NOW + DAY).public_key(key.public_key()).sign(key, hashes.SHA256())
            with pytest.raises(BadCertificate):
                TrustAnchor(clinic.certificate).verify(der(made), at=NOW)

    def test_refuses_a_certificate_issued_by_a_device(self, clinic: Authority) -> None:
        key = new_key()
        chain = Authority(key, clinic.issue(key, name="pi-1"))
        with pytest.raises(BadCertificate):
            TrustAnchor(clinic.certificate).verify(der(chain.issue(new_key(), name="pi-2")), at=NOW)

    def test_refuses_its_own_certificate_as_a_holder(self, clinic: Authority) -> None:
        with pytest.raises(BadCertificate):
            TrustAnchor(clinic.certificate).verify(der(clinic.certificate), at=NOW)

    @pytest.mark.parametrize(
        "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["P-384", "RSA"]
    )
    def test_refuses_another_kind_of_key(self, clinic: Authority, key) -> None:
        with pytest.raises(BadCertificate, match="P-256"):
            TrustAnchor(clinic.certificate).verify(der(clinic.issue(key)), at=NOW)

    @pytest.mark.parametrize("garbage", [b"", b"\x30", b"\x30\x80" * 100, bytes(5000), b"certificate"])
    def test_refuses_what_is_no_certificate(self, clinic: Authority, garbage: bytes) -> None:
        with pytest.raises(BadCertificate):
            TrustAnchor(clinic.certificate).verify(garbage, at=NOW)

    def test_refuses_every_truncation(self, clinic: Authority) -> None:
        issued = der(clinic.issue(new_key()))
        anchor = TrustAnchor(clinic.certificate)
        for length in range(0, len(issued), 7):
            with pytest.raises(BadCertificate):
                anchor.verify(issued[:length], at=NOW)
        with pytest.raises(BadCertificate):
            anchor.verify(issued + b"\0", at=NOW)

    def test_refuses_the_revoked(self, clinic: Authority) -> None:
        bad, good = clinic.issue(new_key()), clinic.issue(new_key(), name="pi-2")
        revoked = load_revoked(clinic.revoked_list(bad.serial_number), clinic.certificate)
        anchor = TrustAnchor(clinic.certificate, revoked_serials=revoked)
        assert anchor.verify(der(good), at=NOW).name == "pi-2"
        with pytest.raises(BadCertificate, match="pi-1 is revoked"):
            anchor.verify(der(bad), at=NOW)

    def test_remembers_a_bounded_number_and_still_answers_right(self, clinic: Authority) -> None:
        anchor = TrustAnchor(clinic.certificate, remembered=3)
        issued = [der(clinic.issue(new_key(), name=f"pi-{n}")) for n in range(8)]
        for _ in range(2):
            for n, certificate in enumerate(issued):
                assert anchor.verify(certificate, at=NOW).name == f"pi-{n}"
                assert len(anchor._verified) <= 3
        for n in range(50):
            with pytest.raises(BadCertificate):
                anchor.verify(b"\x30\x03\x02\x01" + bytes([n]), at=NOW)
        assert len(anchor._verified) <= 3

    @pytest.mark.parametrize(
        "pinned",
        [
            lambda: authority(ca=False).certificate,
            lambda: authority(fleet="two words").certificate,
            lambda: authority().issue(new_key()),
        ],
        ids=["not a CA", "impossible fleet", "a device's certificate"],
    )
    def test_pins_only_a_fleet_ca(self, pinned) -> None:
        with pytest.raises(ConfigError, match=r"fleet-ca\.pem"):
            TrustAnchor(pinned())


class TestRevokedList:
    def test_of_a_foreign_authority_is_refused(self, clinic: Authority) -> None:
        with pytest.raises(BadCertificate, match="not signed by this fleet's CA"):
            load_revoked(authority().revoked_list(1), clinic.certificate)
        with pytest.raises(BadCertificate):
            load_revoked(authority("other").revoked_list(1), clinic.certificate)

    def test_that_is_none_is_refused(self, clinic: Authority) -> None:
        with pytest.raises(ConfigError, match=r"copy revoked\.pem"):
            load_revoked(b"nothing", clinic.certificate)

    def test_may_be_empty(self, clinic: Authority) -> None:
        assert load_revoked(clinic.revoked_list(), clinic.certificate) == frozenset()


class TestTime:
    def test_a_clock_in_1970_is_judged_by_build_time(self, clinic: Authority) -> None:
        built = latest_time(0.0)
        assert built == module._BUILD_TIME
        issued = der(clinic.issue(new_key(), start=built - DAY, end=built + 365 * DAY))
        older = replace_start(clinic, built - 2 * DAY)
        assert TrustAnchor(older).verify(issued, at=latest_time(0.0)).name == "pi-1"

    def test_the_latest_signed_time_wins_over_a_slow_clock(self) -> None:
        assert latest_time(0.0, NOW.timestamp()) == NOW
        assert latest_time(NOW.timestamp(), 5.0) == NOW
        assert latest_time((NOW + DAY).timestamp(), NOW.timestamp()) == NOW + DAY

    @pytest.mark.parametrize("absurd", [1e18, 2.0**63, float("inf")])
    def test_an_absurd_clock_is_late_and_no_crash(self, absurd: float) -> None:
        assert latest_time(absurd).year == 9999
        assert latest_time(0.0, absurd).year == 9999


def replace_start(clinic: Authority, start: datetime.datetime) -> x509.Certificate:
    """The same CA key with an earlier beginning."""
    return authority(key=clinic.key, start=start).certificate


class TestFiles:
    def test_a_secret_is_private_from_the_start_and_never_overwritten(self, tmp_path) -> None:
        path = tmp_path / "key.pem"
        write_secret_file(path, b"secret")
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_secret_file(path) == b"secret"
        with pytest.raises(ConfigError, match="is not overwritten"):
            write_secret_file(path, b"other")
        assert path.read_bytes() == b"secret"

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
    def test_a_secret_that_others_can_use_is_refused(self, tmp_path, mode: int) -> None:
        path = tmp_path / "key.pem"
        write_secret_file(path, b"secret")
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_secret_file(path)

    def test_a_missing_file_or_folder_is_named(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"no\.pem"):
            read_secret_file(tmp_path / "no.pem")
        with pytest.raises(ConfigError, match="cannot write"):
            write_secret_file(tmp_path / "no" / "key.pem", b"")

    def test_a_key_must_be_p256_and_unencrypted(self) -> None:
        wrong = ec.generate_private_key(ec.SECP384R1())
        pkcs8, pem = serialization.PrivateFormat.PKCS8, serialization.Encoding.PEM
        with pytest.raises(ConfigError, match="P-256"):
            load_key(wrong.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        with pytest.raises(ConfigError, match="unencrypted"):
            load_key(new_key().private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"word")))
        with pytest.raises(ConfigError, match="unencrypted PEM"):
            load_key(b"nothing")
        with pytest.raises(ConfigError, match="not a PEM certificate"):
            load_certificate(b"nothing")

    @pytest.mark.parametrize("name", ["", "pi 1", "pi/1", "#", "+", "ä", "x" * 65, "pi\n"])
    def test_an_impossible_name_gets_no_request(self, name: str) -> None:
        with pytest.raises(ConfigError, match="A-Z a-z 0-9"):
            signing_request(new_key(), name=name, fleet="clinic", role="device")
        with pytest.raises(ConfigError, match="A-Z a-z 0-9"):
            signing_request(new_key(), name="pi-1", fleet=name, role="device")
