"""The command `edge-agent`, as its user meets it: what it prints, what it says about mistakes, how it exits."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.__main__ import main
from edge_agent.client_states import ClientStates
from edge_agent.effects import NextClientState, RoundId
from edge_agent.home import Home, load_identity
from edge_agent.latest import keep_latest
from edge_agent.ledger import Ledger, Release
from sottovoce.authority import Authority, create_authority, sign_request
from sottovoce.blobs import blob_ref, digest_of
from sottovoce.bundle import ClientState, Port, decode_bundle, encode_bundle
from sottovoce.plan import LocalWork, Plan, PrivacyTerms
from sottovoce.tensors import decode_tensors, encode_tensors

BUNDLE = Path(__file__).parents[2] / "simulation" / "bundles" / "digits.svp"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "pi-7")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    now = datetime.datetime.now(datetime.UTC)
    return create_authority(tmp_path / "ca", fleet="clinic", at=now - datetime.timedelta(hours=1))


def init(home: Home, *more: str) -> int:
    arguments = ("--device", "pi-7", "--fleet", "clinic", "--broker", "127.0.0.1:1999")
    return main(["init", *arguments, "--home", str(home.path), *more])


def enrolled(home: Home, authority: Authority, tmp_path: Path) -> Home:
    assert init(home) == 0
    signed = tmp_path / "signed.pem"
    signed.write_bytes(sign_request(authority, home.request.read_bytes(), at=datetime.datetime.now(datetime.UTC)).pem)
    arguments = ["--certificate", str(signed), "--ca", str(authority.certificate_file), "--home", str(home.path)]
    assert main(["enrol", *arguments]) == 0
    return home


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for command in ("init", "enrol", "import", "run", "once", "infer", "suggest", "status", "forget"):
        assert f"    {command} " in printed
    assert "fleet-ca sign request.csr" in printed


def test_init_makes_a_home_and_says_what_is_next(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(home) == 0
    printed = capsys.readouterr().out
    assert f"fleet-ca sign {home.request}" in printed
    assert f"edge-agent enrol --certificate CERTIFICATE --ca fleet-ca.pem --home {home.path}" in printed
    assert "tls = false" in home.config.read_text()
    assert home.key.stat().st_mode & 0o077 == 0


def test_a_broker_elsewhere_is_reached_with_tls(home: Home) -> None:
    assert main(["init", "--device", "a", "--fleet", "b", "--broker", "broker.example", "--home", str(home.path)]) == 0
    assert "tls = true" in home.config.read_text()
    assert "port = 8883" in home.config.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["init", "--device", "a b", "--fleet", "f", "--broker", "h"],
            "the device id 'a b' must be 1 to 64 characters",
        ),
        (["init", "--device", "a", "--fleet", "f", "--broker", "h:x"], "write HOST or HOST:PORT"),
        (["init", "--device", "a", "--fleet", "f", "--broker", "far.example", "--no-tls"], "broker.tls is false"),
        (["status"], "edge-agent init --device ID"),
        (["run"], "edge-agent init --device ID"),
        (["once"], "edge-agent init --device ID"),
        (["import", "digits", "x.csv"], "edge-agent init --device ID"),
        (["forget", "digits"], "edge-agent init --device ID"),
        (["infer", "nothing.svp", "x.csv"], "cannot read the bundle nothing.svp"),
    ],
    ids=lambda each: " ".join(each)[:30] if isinstance(each, list) else "",
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    home: Home, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main([*arguments, "--home", str(home.path)]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.startswith("edge-agent: ")
    assert len(captured.err.splitlines()) == 1


def test_run_without_a_certificate_says_how_to_get_one(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    init(home)
    assert main(["run", "--home", str(home.path)]) == 2
    assert "fleet-ca" in capsys.readouterr().err


def test_enrol_keeps_what_the_ca_signed(
    home: Home, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrolled(home, authority, tmp_path)
    assert "pi-7 belongs to fleet clinic now" in capsys.readouterr().out


def test_enrol_keeps_nothing_that_does_not_fit(
    home: Home, authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Home(tmp_path / "other")
    enrolled(other, authority, tmp_path)
    init(home)
    arguments = ["--certificate", str(other.certificate), "--ca", str(authority.certificate_file)]
    assert main(["enrol", *arguments, "--home", str(home.path)]) == 2
    assert "is not for this private key" in capsys.readouterr().err
    assert not home.certificate.exists()
    assert not home.fleet_ca.exists()


def examples_file(tmp_path: Path, count: int = 6) -> Path:
    rng = np.random.default_rng(1)
    path = tmp_path / "digits.npz"
    np.savez(path, x=rng.integers(0, 17, (count, 64)).astype(np.float32), y=np.arange(count) % 10)
    return path


def test_import_status_and_forget(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(home)
    path = examples_file(tmp_path)
    for _ in range(2):
        assert main(["import", "digits", str(path), "--home", str(home.path)]) == 0
    assert "added 6 examples to digits, which now has 12" in capsys.readouterr().out
    assert main(["status", "--json", "--home", str(home.path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["collections"] == {"digits": 12}
    assert report["releases"] == 0
    assert report["policy"]["minimum_cohort"] == 10
    assert main(["forget", "digits", "--home", str(home.path)]) == 0
    assert main(["status", "--home", str(home.path)]) == 0
    printed = capsys.readouterr().out
    assert "forgot 12 examples of digits" in printed
    assert "nothing has left this device" in printed


def test_what_programs_keep_is_shown_and_forgotten(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], authority: Authority
) -> None:
    enrolled(home, authority, tmp_path)
    identity = load_identity(home, datetime.datetime.now(datetime.UTC))
    kept = ClientState(
        slot="control",
        version=2,
        ports=(Port(name="total", type="float32[1]"),),
        initial=encode_tensors({"total": np.zeros(1, np.float32)}),
        maximum_bytes=100,
    )
    plan = Plan(
        fleet="clinic", name="mean", collection="steps", program=blob_ref(b""), work=LocalWork(), aggregations=(),
        privacy=PrivacyTerms(purpose="a test", minimum_cohort=3, weight_cap=1),
    )  # fmt: skip
    round_ = RoundId(b"a" * 32, "coordinator", 7, 0)

    def keep(slot: str, collection: str) -> None:
        store = ClientStates(home.client_states, identity, maximum_bytes=100, entropy=os.urandom, log=print)
        mine = msgspec.structs.replace(kept, slot=slot)
        value = NextClientState(
            slot=slot, version=2, types=kept.types, plan_name="mean", collection=collection,
            base=store.take_up(mine, plan).base, content=kept.initial,
        )  # fmt: skip
        store.hold(round_, value)
        store.settle(round_, survived=True)
        store.close()

    def printed(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "--home", str(home.path)]) == 0
        return capsys.readouterr().out

    keep("control", "steps")
    keep("other", "heart")
    size = len(kept.initial)
    line = f"keeps        control v2: total float32[1] ({size} bytes), computed from steps by mean, round 7"
    assert line in printed("status")
    shown = json.loads(printed("status", "--json"))
    assert [(each["slot"], each["collections"]) for each in shown["client_states"]] == [
        ("control", ["steps"]), ("other", ["heart"]),
    ]  # fmt: skip
    assert shown["policy"]["max_client_state_bytes"] == 1024 * 1024
    assert "forgot client state control" in printed("forget", "steps")
    assert "nothing is kept in client state control" in printed("forget", "--client-state", "control")
    assert "forgot client state other" in printed("forget", "--client-state", "other")
    keep("control", "steps")
    assert "forgot client state control" in printed("forget", "--all")
    assert "keeps" not in printed("status")


def test_forget_needs_to_know_what(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    init(home)
    assert main(["forget", "--home", str(home.path)]) == 2
    assert "say which collection to forget, or --client-state SLOT, or --all" in capsys.readouterr().err


def test_status_shows_what_has_left(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    init(home)
    release = Release(
        at_unix_s=1_790_000_000.0,
        fleet="clinic",
        plan_name="digits",
        plan=bytes(32),
        state=bytes(32),
        round=3,
        attempt=0,
        session=b"s" * 32,
        purpose="to read digits",
        cohort=12,
        weight=100,
        contents=(("delta", 4810),),
    )
    with Ledger(home.ledger) as ledger:
        ledger.spend(release, max_releases_per_state=2)
        ledger.advance_round("clinic", "digits", round=3, attempt=0)
    assert main(["status", "--home", str(home.path)]) == 0
    printed = capsys.readouterr().out
    assert "released     1 masked updates" in printed
    assert "last round   3.0 of digits" in printed
    assert "digits, round 3, attempt 0: spent; masked with 12 devices, 100 examples, delta; to read digits" in printed


def test_bad_examples_are_named_and_nothing_is_kept(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(home)
    path = tmp_path / "bad.csv"
    path.write_text("x,y\n1,2\n3,four\n")
    assert main(["import", "digits", str(path), "--home", str(home.path)]) == 2
    assert "line 3" in capsys.readouterr().err
    main(["status", "--json", "--home", str(home.path)])
    assert json.loads(capsys.readouterr().out)["collections"] == {}


# --- infer ------------------------------------------------------------------------------------------------------------


def infer(capsys: pytest.CaptureFixture[str], home: Home, path: Path, *more: str, bundle: Path = BUNDLE) -> Any:
    capsys.readouterr()
    assert main(["infer", str(bundle), str(path), "--json", "--home", str(home.path), *more]) == 0
    return json.loads(capsys.readouterr().out)


def biased_to(digit: int) -> bytes:
    """A state in which every picture shows `digit`."""
    tensors = decode_tensors(decode_bundle(BUNDLE.read_bytes()).initial)
    tensors["output_bias"][digit] = 1000
    return encode_tensors(tensors)


def test_infer_uses_the_fleets_latest_state(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = examples_file(tmp_path)
    initial = infer(capsys, home, path)
    assert initial["state"] == "the state inside digits.svp"
    assert np.shape([row["prediction"] for row in initial["predictions"]]) == (6, 10)

    home.path.mkdir()
    keep_latest(home.path / "latest", digest_of(BUNDLE.read_bytes()), biased_to(4), round=9)
    latest = infer(capsys, home, path)
    assert latest["state"] == "the fleet's state before round 9"
    assert {int(np.argmax(row["prediction"])) for row in latest["predictions"]} == {4}
    assert infer(capsys, home, path, "--state", "initial") == initial
    assert main(["infer", str(BUNDLE), str(path), "--home", str(home.path)]) == 0
    assert "0: prediction largest at 4 (1)" in capsys.readouterr().out


def test_infer_takes_what_the_coordinator_wrote(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = tmp_path / "trained.svp"
    trained.write_bytes(
        encode_bundle(msgspec.structs.replace(decode_bundle(BUNDLE.read_bytes()), initial=biased_to(7)))
    )
    predictions = infer(capsys, home, examples_file(tmp_path), bundle=trained)["predictions"]
    assert {int(np.argmax(row["prediction"])) for row in predictions} == {7}


def test_infer_needs_no_labels(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "unlabelled.npz"
    np.savez(path, x=np.ones((300, 64), np.float32))
    assert len(infer(capsys, home, path)["predictions"]) == 300


@pytest.mark.parametrize(
    ("columns", "more", "text"),
    [
        ({"x": np.ones((2, 63))}, [], "column 'x' has shape [2,63]; the program needs float32[?,64]"),
        ({"z": np.ones((2, 64))}, [], "column 'x' (float32[?,64]) is missing"),
        ({"x": np.ones((2, 64))}, ["--state", "latest"], "this device has no state of the fleet"),
    ],
    ids=["shape", "column", "state"],
)
def test_infer_says_what_does_not_fit(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: Any, more: list[str], text: str
) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, **columns)
    assert main(["infer", str(BUNDLE), str(path), "--home", str(home.path), *more]) == 2
    assert text in capsys.readouterr().err


def test_what_is_no_model_cannot_infer(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moments = BUNDLE.with_name("moments_har.svp")
    assert main(["infer", str(moments), str(examples_file(tmp_path)), "--home", str(home.path)]) == 2
    assert "has no role `infer`" in capsys.readouterr().err
