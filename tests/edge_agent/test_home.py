"""The device's folder: made once, private, checked as a whole; and what is sealed on its disk."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509

from edge_agent.config import BrokerConfig
from edge_agent.home import (
    Home,
    default_home,
    init_home,
    load_anchor,
    load_config,
    load_identity,
    open_at_rest,
    seal_at_rest,
)
from sottovoce.authority import Authority, create_authority, revoke, sign_request
from sottovoce.errors import BadCertificate, ConfigError, CryptoError
from sottovoce.identity import key_to_pem, latest_time, new_key, signing_request

AT = datetime.datetime(2027, 1, 10, 12, tzinfo=datetime.UTC)
BROKER = BrokerConfig(host="broker.example")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return init_home(tmp_path / "agent", device="pi-1", fleet="clinic", broker=BROKER)


@pytest.fixture
def clinic(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca", fleet="clinic", at=AT)


@pytest.fixture
def enrolled(home: Home, clinic: Authority) -> Home:
    home.certificate.write_bytes(sign_request(clinic, home.request.read_bytes(), at=AT).pem)
    home.fleet_ca.write_bytes(clinic.certificate_file.read_bytes())
    return home


class TestInit:
    def test_makes_a_private_folder_with_everything_in_it(self, home: Home) -> None:
        for folder in (home.path, home.blobs, home.pending):
            assert folder.stat().st_mode & 0o777 == 0o700
        assert home.key.stat().st_mode & 0o777 == 0o600
        config = load_config(home)
        assert (config.device, config.fleet, config.broker) == (
            "pi-1",
            "clinic",
            BrokerConfig(host=BROKER.host, port=8883),
        )

    def test_again_keeps_key_and_settings(self, home: Home) -> None:
        key = home.key.read_bytes()
        home.config.write_text(home.config.read_text() + "\n# mine\n")
        settings = home.config.read_text()
        home.request.unlink()
        init_home(home.path, device="pi-1", fleet="clinic", broker=BrokerConfig(host="other.example"))
        assert (home.key.read_bytes(), home.config.read_text()) == (key, settings)
        assert home.request.exists()

    def test_for_another_device_is_refused(self, home: Home) -> None:
        key = home.key.read_bytes()
        for device, fleet in (("pi-2", "clinic"), ("pi-1", "school")):
            with pytest.raises(ConfigError, match="belongs to device pi-1 of fleet clinic"):
                init_home(home.path, device=device, fleet=fleet, broker=BROKER)
        assert home.key.read_bytes() == key

    @pytest.mark.parametrize(("device", "fleet"), [("pi 1", "clinic"), ("pi-1", "a/b"), ("", "clinic")])
    def test_with_an_impossible_name_makes_nothing(self, tmp_path: Path, device: str, fleet: str) -> None:
        with pytest.raises(ConfigError, match="A-Z a-z 0-9"):
            init_home(tmp_path / "agent", device=device, fleet=fleet, broker=BROKER)
        assert not (tmp_path / "agent").exists()

    def test_where_no_folder_can_be_made_says_so(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot make the folder"):
            init_home(tmp_path / "file", device="pi-1", fleet="clinic", broker=BROKER)


def test_where_it_is_by_default() -> None:
    assert default_home({"SOTTOVOCE_HOME": "/somewhere/else"}).path == Path("/somewhere/else")
    assert default_home({}).path == Path.home() / ".local/share/sottovoce/agent"
    assert default_home({"SOTTOVOCE_HOME": ""}) == default_home({})


class TestIdentity:
    def test_of_an_enrolled_device(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        assert (identity.certificate.name, identity.certificate.role) == ("pi-1", "device")
        identity.certificate.verify(identity.sign(b"x"), b"x")

    def test_in_1970_it_works_by_the_time_it_was_told(self, enrolled: Home) -> None:
        assert load_identity(enrolled, latest_time(0.0, AT.timestamp())).certificate.name == "pi-1"
        with pytest.raises(BadCertificate, match="not on 1970-01-01"):
            load_identity(enrolled, datetime.datetime.fromtimestamp(0, datetime.UTC))

    def test_expired_says_what_to_do(self, enrolled: Home) -> None:
        with pytest.raises(BadCertificate, match=r"certificate\.pem: .*not on 2030-.*ask the fleet's CA for a new"):
            load_identity(enrolled, AT.replace(year=2030))

    def test_revoked_is_refused_by_the_device_itself(self, enrolled: Home, clinic: Authority) -> None:
        serial = load_identity(enrolled, AT).certificate
        revoke(clinic, f"{_serial(serial.der):x}", at=AT)
        enrolled.revoked.write_bytes(clinic.revoked_file.read_bytes())
        with pytest.raises(BadCertificate, match="pi-1 is revoked"):
            load_identity(enrolled, AT)

    @pytest.mark.parametrize(
        ("missing", "remedy"),
        [
            ("key.pem", "cannot read"),
            ("certificate.pem", "fleet-ca sign"),
            ("fleet-ca.pem", "copy fleet-ca.pem"),
            ("agent.toml", "edge-agent init"),
        ],
    )
    def test_what_is_missing_is_named_with_its_remedy(self, enrolled: Home, missing: str, remedy: str) -> None:
        (enrolled.path / missing).unlink()
        with pytest.raises(ConfigError, match=rf"{missing}.*{remedy}|cannot read .*{missing}"):
            load_identity(enrolled, AT)

    def test_no_folder_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="edge-agent init"):
            load_identity(Home(tmp_path / "nowhere"), AT)

    @pytest.mark.parametrize(("what", "mode"), [("", 0o750), ("", 0o705), ("key.pem", 0o640), ("key.pem", 0o604)])
    def test_open_to_others_is_refused(self, enrolled: Home, what: str, mode: int) -> None:
        (enrolled.path / what).chmod(mode)
        with pytest.raises(ConfigError, match=r"chmod [67]00"):
            load_identity(enrolled, AT)
        (enrolled.path / what).chmod(0o700)

    def test_another_key_is_refused(self, enrolled: Home) -> None:
        enrolled.key.write_bytes(key_to_pem(new_key()))
        with pytest.raises(ConfigError, match="not for this private key"):
            load_identity(enrolled, AT)

    def test_another_devices_certificate_is_refused(self, enrolled: Home, clinic: Authority) -> None:
        other = sign_request(clinic, signing_request(new_key(), name="pi-2", fleet="clinic", role="device"), at=AT)
        enrolled.certificate.write_bytes(other.pem)
        with pytest.raises(ConfigError, match=r"is for pi-2 of clinic, and .*agent\.toml says pi-1"):
            load_identity(enrolled, AT)

    def test_a_foreign_authority_is_refused(self, enrolled: Home, tmp_path: Path) -> None:
        foreign = create_authority(tmp_path / "foreign", fleet="clinic", at=AT)
        enrolled.fleet_ca.write_bytes(foreign.certificate_file.read_bytes())
        with pytest.raises(BadCertificate, match="not a certificate of this fleet's CA"):
            load_identity(enrolled, AT)

    def test_a_revoked_list_of_a_foreign_authority_is_refused(self, enrolled: Home, tmp_path: Path) -> None:
        foreign = create_authority(tmp_path / "foreign", fleet="clinic", at=AT)
        enrolled.revoked.write_bytes(foreign.revoked_file.read_bytes())
        with pytest.raises(BadCertificate, match="revocation list is not signed"):
            load_anchor(enrolled)


def _serial(der: bytes) -> int:
    return x509.load_der_x509_certificate(der).serial_number


class TestAtRest:
    def test_opens_what_it_sealed(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        for content in (b"", b"x", bytes(10_000)):
            sealed = seal_at_rest(identity, "pending", content)
            assert open_at_rest(identity, "pending", sealed) == content
            assert len(sealed) == len(content) + 28

    def test_says_nothing_about_the_content_and_never_the_same(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        first, second = (seal_at_rest(identity, "pending", b"recognisable" * 9) for _ in range(2))
        assert b"recognisable" not in first
        assert first[:12] != second[:12]
        assert first[12:] != second[12:]

    def test_opens_for_its_own_purpose_only(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        with pytest.raises(CryptoError, match="'checkpoint'"):
            open_at_rest(identity, "checkpoint", seal_at_rest(identity, "pending", b"x"))

    def test_opens_on_its_own_device_only(self, enrolled: Home, clinic: Authority, tmp_path: Path) -> None:
        other = init_home(tmp_path / "second", device="pi-2", fleet="clinic", broker=BROKER)
        other.certificate.write_bytes(sign_request(clinic, other.request.read_bytes(), at=AT).pem)
        other.fleet_ca.write_bytes(clinic.certificate_file.read_bytes())
        with pytest.raises(CryptoError):
            open_at_rest(
                load_identity(other, AT), "pending", seal_at_rest(load_identity(enrolled, AT), "pending", b"x")
            )

    def test_damage_is_noticed(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        sealed = seal_at_rest(identity, "pending", b"content")
        for index in range(len(sealed)):
            damaged = bytearray(sealed)
            damaged[index] ^= 1
            with pytest.raises(CryptoError):
                open_at_rest(identity, "pending", bytes(damaged))
        for length in range(len(sealed)):
            with pytest.raises(CryptoError):
                open_at_rest(identity, "pending", sealed[:length])

    def test_takes_its_nonce_from_the_given_entropy(self, enrolled: Home) -> None:
        identity = load_identity(enrolled, AT)
        asked: list[int] = []

        def entropy(count: int) -> bytes:
            asked.append(count)
            return b"\x07" * count

        assert seal_at_rest(identity, "pending", b"x", entropy=entropy)[:12] == b"\x07" * 12
        assert asked == [12]
