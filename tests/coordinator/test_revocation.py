"""The list of revoked certificates on disk: read when it is another one, refused with its path when it is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from choir import AT, Choir
from cryptography import x509

from coordinator.revocation import RevocationList
from sottovoce.authority import create_authority
from sottovoce.errors import ConfigError


@pytest.fixture
def listed(choir: Choir, tmp_path: Path) -> RevocationList:
    path = tmp_path / "revoked.pem"
    path.write_bytes(choir.revoke(choir.names(8)[-1]))
    return RevocationList(path, choir.authority.certificate)


def test_a_list_is_read_again_only_when_it_is_another(listed: RevocationList, choir: Choir) -> None:
    serials = {
        name: x509.load_der_x509_certificate(choir.devices[name].certificate.der).serial_number
        for name in choir.names(8)
    }
    first = listed.read()
    assert serials["pi-07"] in first
    assert serials["pi-06"] not in first
    assert listed.changed() is None
    listed.path.write_bytes(choir.revoke("pi-06"))
    assert listed.changed() == first | {serials["pi-06"]}
    assert listed.changed() is None


def test_what_is_no_list_of_this_fleet_is_named_once(listed: RevocationList, tmp_path: Path) -> None:
    listed.read()
    listed.path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*revoked.pem: No such file .*; copy revoked.pem from the CA"):
        listed.changed()
    assert listed.changed() is None
    stranger = create_authority(tmp_path / "other", fleet="choir", at=AT)
    listed.path.write_bytes(stranger.revoked_file.read_bytes())
    with pytest.raises(ConfigError, match=r"revoked.pem: the revocation list is not signed by this fleet's CA"):
        listed.changed()
    assert listed.changed() is None
