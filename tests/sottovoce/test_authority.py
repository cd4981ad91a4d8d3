"""The fleet CA: what it issues, what it refuses, what it publishes, and that OpenSSL agrees."""

import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sottovoce.authority import (
    Authority,
    create_authority,
    open_authority,
    revoke,
    sign_request,
)
from sottovoce.errors import BadCertificate, ConfigError
from sottovoce.identity import (
    Identity,
    TrustAnchor,
    key_to_pem,
    load_certificate,
    load_revoked,
    new_key,
    signing_request,
    subject,
)
from sottovoce.issued import issued_certificates

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
"""OpenSSL judges by the machine's clock, so the certificates of these tests are made for today."""
DAY = datetime.timedelta(days=1)


@pytest.fixture
def clinic(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca", fleet="clinic", at=NOW)


def request(name="pi-1", fleet="clinic", role="device", key=None) -> bytes:
    return signing_request(key or new_key(), name=name, fleet=fleet, role=role)


def custom_request(key=None, *, signer=None, who=None, hosts=None) -> bytes:
    key = key or new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        who or subject(name="broker", fleet="clinic", role="broker")
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def der(pem: bytes) -> bytes:
    return load_certificate(pem).public_bytes(serialization.Encoding.DER)


class TestCreate:
    def test_makes_a_private_folder_that_can_be_opened_again(self, clinic: Authority) -> None:
        assert clinic.key_file.stat().st_mode & 0o777 == 0o600
        assert clinic.folder.stat().st_mode & 0o777 == 0o700
        opened = open_authority(clinic.folder)
        assert (opened.fleet, opened.certificate) == ("clinic", clinic.certificate)

    def test_certificate_can_only_sign_holders(self, clinic: Authority) -> None:
        extensions = clinic.certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        assert usage.key_cert_sign
        assert usage.crl_sign
        assert not usage.digital_signature

    @pytest.mark.parametrize("kept", ["ca-key.pem", "fleet-ca.pem", "issued.sqlite"])
    def test_never_overwrites(self, clinic: Authority, kept: str) -> None:
        before = {path.name: path.read_bytes() for path in clinic.folder.iterdir()}
        for path in clinic.folder.iterdir():
            if path.name != kept:
                path.unlink()
        with pytest.raises(ConfigError, match="holds an authority already"):
            create_authority(clinic.folder, fleet="clinic", at=NOW)
        assert (clinic.folder / kept).read_bytes() == before[kept]

    @pytest.mark.parametrize("fleet", ["", "two words", "a/b", "+", "x" * 65])
    def test_refuses_an_impossible_fleet(self, tmp_path: Path, fleet: str) -> None:
        with pytest.raises(ConfigError, match="fleet name"):
            create_authority(tmp_path / "ca", fleet=fleet, at=NOW)
        assert not (tmp_path / "ca").exists()

    def test_never_shows_its_key(self, clinic: Authority) -> None:
        assert "_key=" not in repr(clinic)
        assert "EllipticCurve" not in repr(clinic)


class TestOpen:
    def test_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="fleet-ca init"):
            open_authority(tmp_path)
        with pytest.raises(ConfigError, match="fleet-ca init"):
            issued_certificates(tmp_path)

    def test_refuses_an_open_or_foreign_key(self, clinic: Authority) -> None:
        clinic.key_file.chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            open_authority(clinic.folder)
        clinic.key_file.write_bytes(key_to_pem(new_key()))
        clinic.key_file.chmod(0o600)
        with pytest.raises(ConfigError, match="is not the certificate of"):
            open_authority(clinic.folder)

    def test_without_its_key_it_only_lists(self, clinic: Authority) -> None:
        sign_request(clinic, request(), at=NOW)
        clinic.key_file.unlink()
        with pytest.raises(ConfigError, match=r"cannot read .*ca-key\.pem"):
            open_authority(clinic.folder)
        assert [issued.name for issued in issued_certificates(clinic.folder)] == ["pi-1"]


class TestSign:
    def test_makes_an_identity_that_the_fleet_believes(self, clinic: Authority) -> None:
        key = new_key()
        issued = sign_request(clinic, request(key=key), at=NOW, days=30)
        certificate = TrustAnchor(clinic.certificate).verify(der(issued.pem), at=NOW, role="device")
        identity = Identity(key, certificate)
        certificate.verify(identity.sign(b"x"), b"x")
        assert (certificate.name, certificate.fleet) == ("pi-1", "clinic")
        assert (issued.name, issued.role, issued.not_after) == ("pi-1", "device", NOW + 30 * DAY)
        assert int(issued.serial, 16) == load_certificate(issued.pem).serial_number

    def test_leaves_are_for_clients_and_sign_no_certificates(self, clinic: Authority) -> None:
        extensions = load_certificate(sign_request(clinic, request(), at=NOW).pem).extensions
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]

    def test_one_live_certificate_per_id(self, clinic: Authority) -> None:
        first = sign_request(clinic, request(), at=NOW)
        with pytest.raises(ConfigError, match=f"fleet-ca revoke {first.serial}.*--replace"):
            sign_request(clinic, request(), at=NOW)
        sign_request(clinic, request("pi-2"), at=NOW)
        assert [issued.name for issued in issued_certificates(clinic.folder)] == ["pi-1", "pi-2"]

    def test_replace_revokes_the_old_one_and_the_new_one_is_later(self, clinic: Authority) -> None:
        issued = [sign_request(clinic, request(), at=NOW)]
        issued += [sign_request(clinic, request(), at=NOW, replace=True) for _ in range(3)]
        live = [one.serial for one in issued_certificates(clinic.folder) if one.live(NOW)]
        assert live == [issued[-1].serial]
        anchor = TrustAnchor(
            clinic.certificate, revoked_serials=load_revoked(clinic.revoked_file.read_bytes(), clinic.certificate)
        )
        for old in issued[:-1]:
            with pytest.raises(BadCertificate, match="revoked"):
                anchor.verify(der(old.pem), at=NOW)
        anchor.verify(der(issued[-1].pem), at=NOW)
        starts = [TrustAnchor(clinic.certificate).verify(der(one.pem), at=NOW).issued_unix_s for one in issued]
        assert starts == sorted(set(starts))

    def test_an_expired_or_revoked_certificate_frees_its_id(self, clinic: Authority) -> None:
        sign_request(clinic, request(), at=NOW, days=1)
        second = sign_request(clinic, request(), at=NOW + 2 * DAY, days=1)
        revoke(clinic, second.serial, at=NOW + 2 * DAY)
        third = sign_request(clinic, request(), at=NOW + 2 * DAY, days=1)
        assert third.live(NOW + 2 * DAY)

    def test_refuses_to_sign_with_a_clock_behind_its_own_certificates(self, clinic: Authority) -> None:
        first = sign_request(clinic, request(), at=NOW + 2 * DAY)
        revoke(clinic, first.serial, at=NOW + 2 * DAY)
        with pytest.raises(ConfigError, match="set the clock"):
            sign_request(clinic, request(), at=NOW)

    @pytest.mark.parametrize(
        ("pem", "text"),
        [
            (b"nothing", "not a PEM certificate signing request"),
            (request(fleet="other"), "asks for fleet 'other'"),
            (request("coordinator", role="coordinator"), "--role coordinator"),
            (request("coordinator"), "reserved"),
            (request("all"), "reserved"),
            (custom_request(who=subject(name="pi 1", fleet="clinic", role="device")), "device id 'pi 1'"),
            (custom_request(who=subject(name="pi-1", fleet="clinic", role="admin")), "role 'admin'.*refused"),
            (custom_request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
            (custom_request(who=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi-1")])), "nothing else"),
            (
                custom_request(who=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n) for n in ("a", "b", "c")])),
                "exactly once",
            ),
        ],
    )
    def test_refuses_a_wrong_request_and_issues_nothing(self, clinic: Authority, pem: bytes, text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            sign_request(clinic, pem, at=NOW)
        assert issued_certificates(clinic.folder) == []

    def test_refuses_a_request_that_its_key_has_not_signed(self, clinic: Authority) -> None:
        parsed = x509.load_pem_x509_csr(request("pi-1"))
        forged = parsed.public_bytes(serialization.Encoding.DER).replace(b"pi-1", b"pi-2")
        pem = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM)
        with pytest.raises(ConfigError, match="its signature is not by the key it carries"):
            sign_request(clinic, pem, at=NOW)

    def test_the_coordinator_has_one_name_and_must_be_meant(self, clinic: Authority) -> None:
        with pytest.raises(ConfigError, match="must be `coordinator`"):
            sign_request(clinic, request("boss", role="coordinator"), at=NOW, role="coordinator")
        with pytest.raises(ConfigError, match="asks for the role 'device', and you are signing for a coordinator"):
            sign_request(clinic, request(), at=NOW, role="coordinator")
        issued = sign_request(clinic, request("coordinator", role="coordinator"), at=NOW, role="coordinator")
        assert TrustAnchor(clinic.certificate).verify(der(issued.pem), at=NOW, role="coordinator").name == "coordinator"

    @pytest.mark.parametrize(("days", "text"), [(0, "1 to 36500"), (-1, "1 to"), (10**9, "1 to"), (4000, "until")])
    def test_refuses_impossible_days(self, clinic: Authority, days: int, text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            sign_request(clinic, request(), at=NOW, days=days)

    def test_a_brokers_certificate_names_its_host_and_belongs_to_no_device(self, clinic: Authority) -> None:
        with pytest.raises(ConfigError, match="subjectAltName"):
            sign_request(clinic, custom_request(), at=NOW, role="broker")
        issued = sign_request(clinic, custom_request(hosts=[x509.DNSName("broker.example")]), at=NOW, role="broker")
        with pytest.raises(BadCertificate, match="role 'broker'"):
            TrustAnchor(clinic.certificate).verify(der(issued.pem), at=NOW)


class TestRevoke:
    def test_publishes_a_list_that_the_authority_has_signed(self, clinic: Authority) -> None:
        assert load_revoked(clinic.revoked_file.read_bytes(), clinic.certificate) == frozenset()
        issued = [sign_request(clinic, request(f"pi-{n}"), at=NOW) for n in range(3)]
        revoke(clinic, issued[1].serial, at=NOW)
        revoke(clinic, "0x" + issued[2].serial.upper(), at=NOW)
        revoked = load_revoked(clinic.revoked_file.read_bytes(), clinic.certificate)
        assert revoked == {int(one.serial, 16) for one in issued[1:]}
        assert [one.live(NOW) for one in issued_certificates(clinic.folder)] == [True, False, False]

    def test_twice_keeps_the_first_time_and_repairs_a_lost_list(self, clinic: Authority) -> None:
        issued = sign_request(clinic, request(), at=NOW)
        revoke(clinic, issued.serial, at=NOW)
        clinic.revoked_file.unlink()
        revoke(clinic, issued.serial, at=NOW + DAY)
        assert issued_certificates(clinic.folder)[0].revoked == NOW
        assert len(load_revoked(clinic.revoked_file.read_bytes(), clinic.certificate)) == 1

    @pytest.mark.parametrize("serial", ["abc", "", "0", "'; DROP TABLE issued"])
    def test_of_something_never_issued_is_refused(self, clinic: Authority, serial: str) -> None:
        with pytest.raises(ConfigError, match="fleet-ca list"):
            revoke(clinic, serial, at=NOW)


# --- mutual TLS, as mosquitto does it -----------------------------------------------------------------------------


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, str]:
    """Shake hands in memory; return the client's subject as the server sees it, or raise ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up, server_hostname="broker.example")
    far = server.wrap_bio(up, down, server_side=True)
    waiting = [near, far]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
        if not waiting:
            return {key: value for ((key, value),) in far.getpeercert()["subject"]}
    raise AssertionError("the handshake does not end")


def context(purpose: ssl.Purpose, clinic: Authority, folder: Path, key, pem: bytes) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cafile=str(clinic.certificate_file))
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.verify_mode = ssl.CERT_REQUIRED
    file = folder / "both.pem"
    file.write_bytes(key_to_pem(key) + pem)
    made.load_cert_chain(file)
    return made


def test_the_same_certificates_do_mutual_tls_until_they_are_revoked(clinic: Authority, tmp_path: Path) -> None:
    broker_key, device_key = new_key(), new_key()
    hosts = [x509.DNSName("broker.example"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    broker = sign_request(clinic, custom_request(broker_key, hosts=hosts), at=NOW, role="broker")
    device = sign_request(clinic, request(key=device_key), at=NOW)
    client = context(ssl.Purpose.SERVER_AUTH, clinic, tmp_path, device_key, device.pem)

    def server() -> ssl.SSLContext:
        made = context(ssl.Purpose.CLIENT_AUTH, clinic, tmp_path, broker_key, broker.pem)
        made.load_verify_locations(clinic.revoked_file)
        made.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return made

    seen = handshake(client, server())
    assert seen["commonName"] == "pi-1"
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        handshake(client, context(ssl.Purpose.CLIENT_AUTH, clinic, tmp_path, device_key, device.pem))
    revoke(clinic, device.serial, at=NOW)
    with pytest.raises(ssl.SSLError, match="revoked"):
        handshake(client, server())
