"""The command `fleet-ca`: what it prints, writes and answers, and that a user's mistake costs one line."""

from pathlib import Path

import pytest

from sottovoce.fleet_ca import main
from sottovoce.identity import load_certificate, load_revoked, new_key, signing_request


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an authority in ./fleet-ca and a request in ./pi-1.csr."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--fleet", "clinic"]) == 0
    _write_request(tmp_path / "pi-1.csr", "pi-1")
    return tmp_path


def _write_request(path: Path, name: str, role: str = "device") -> None:
    path.write_bytes(signing_request(new_key(), name=name, fleet="clinic", role=role))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must fail with 2 and exactly one line on stderr; return that line."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_from_nothing_to_a_certificate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sign", "pi-1.csr", "--days", "30"]) == 0
    certificate = load_certificate((folder / "pi-1.pem").read_bytes())
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 30
    certificate.verify_directly_issued_by(load_certificate((folder / "fleet-ca/fleet-ca.pem").read_bytes()))
    assert "pi-1.pem   copy it to pi-1, together with fleet-ca/fleet-ca.pem" in capsys.readouterr().out


def test_list_shows_the_state_of_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sign", "pi-1.csr"])
    main(["sign", "pi-1.csr", "--replace"])
    capsys.readouterr()
    assert main(["list"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "revoked" in first
    assert "live" in second
    assert second.endswith("pi-1")


def test_revoke_takes_a_serial_or_a_file(folder: Path) -> None:
    _write_request(folder / "pi-2.csr", "pi-2")
    main(["sign", "pi-1.csr"])
    main(["sign", "pi-2.csr", "--out", "two.pem"])
    serials = {load_certificate((folder / name).read_bytes()).serial_number for name in ("pi-1.pem", "two.pem")}
    assert main(["revoke", "two.pem"]) == 0
    assert main(["revoke", f"{load_certificate((folder / 'pi-1.pem').read_bytes()).serial_number:X}"]) == 0
    ca = load_certificate((folder / "fleet-ca/fleet-ca.pem").read_bytes())
    assert load_revoked((folder / "fleet-ca/revoked.pem").read_bytes(), ca) == serials


def test_another_folder_by_option(folder: Path) -> None:
    assert main(["init", "--fleet", "clinic", "--out", "second"]) == 0
    assert main(["sign", "pi-1.csr", "--ca", "second"]) == 0
    assert main(["sign", "pi-1.csr", "--out", "other.pem"]) == 0  # The first authority knows nothing of it.


def test_mistakes_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sign", "pi-1.csr"])
    _write_request(folder / "boss.csr", "coordinator", "coordinator")
    (folder / "text.csr").write_text("hello")
    assert "fleet-ca revoke" in _refused(capsys, "sign", "pi-1.csr", "--out", "x.pem")
    assert "exists already" in _refused(capsys, "sign", "pi-1.csr")
    assert "--role coordinator" in _refused(capsys, "sign", "boss.csr")
    assert "edge-agent init" in _refused(capsys, "sign", "text.csr")
    assert "no.csr: No such file" in _refused(capsys, "sign", "no.csr")
    assert "fleet-ca init" in _refused(capsys, "sign", "pi-1.csr", "--ca", "nowhere")
    assert "--days is 0" in _refused(capsys, "sign", "boss.csr", "--role", "coordinator", "--days", "0")
    assert "no certificate 'zz'" in _refused(capsys, "revoke", "zz")
    assert "not a PEM certificate" in _refused(capsys, "revoke", "text.csr")
    assert "holds an authority already" in _refused(capsys, "init", "--fleet", "clinic")
    assert not (folder / "x.pem").exists()


@pytest.mark.parametrize("arguments", [[], ["sign"], ["init"], ["unknown"], ["sign", "a", "--days", "many"]])
def test_a_wrong_call_is_2_as_well(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fleet-ca" in capsys.readouterr().err


def test_help_teaches_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for step in ("fleet-ca init", "edge-agent init", "fleet-ca sign", "certificate.pem"):
        assert step in printed
