"""The command: what it prints, what it refuses, and a real process that runs without the CA's key."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tasks import Ask

from coordinator.__main__ import main
from coordinator.journal import Journal
from coordinator.journal_rows import Ending, Opening, Result, Traffic
from coordinator.requests import encode_sums
from coordinator.settings import lock_file, read_settings
from coordinator.terms import CohortTerms, RoundTerms
from sottovoce.authority import create_authority, sign_request
from sottovoce.blobs import digest_of
from sottovoce.bundle import decode_bundle
from sottovoce.file_lock import FileLock, is_held
from sottovoce.language.ports import RoundSums
from sottovoce.tensors import decode_tensors, encode_tensors

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, what it printed, what it complained about."""

    def command(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def home(tmp_path: Path, run: Run) -> Path:
    """The folder of an enrolled coordinator; the CA's key is gone."""
    import datetime

    folder = tmp_path / "home"
    run("init", "--home", folder, "--fleet", "choir")
    now = datetime.datetime.now(datetime.UTC)
    authority = create_authority(tmp_path / "ca", fleet="choir", at=now)
    issued = sign_request(authority, (folder / "request.csr").read_bytes(), at=now, role="coordinator")
    (folder / "certificate.pem").write_bytes(issued.pem)
    (folder / "fleet-ca.pem").write_bytes(authority.certificate_file.read_bytes())
    authority.key_file.unlink()
    return folder


def test_init_makes_a_home_and_says_what_comes_next(tmp_path: Path, run: Run) -> None:
    code, out, _ = run("init", "--home", tmp_path / "c", "--fleet", "choir")
    assert code == 0
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"key.pem", "request.csr", "coordinator.toml"}
    assert (tmp_path / "c" / "key.pem").stat().st_mode & 0o077 == 0
    assert f"fleet-ca sign {tmp_path}/c/request.csr --role coordinator" in out
    assert f"coordinator run --config {tmp_path}/c/coordinator.toml" in out
    code, _, err = run("init", "--home", tmp_path / "c", "--fleet", "choir")
    assert code == 2
    assert "exists already and is not overwritten" in err


@pytest.mark.parametrize(
    ("broker", "host", "port"),
    [("b.example", "b.example", 8883), ("b.example:1883", "b.example", 1883), ("[::1]:1884", "::1", 1884)],
)
def test_init_writes_down_the_broker(tmp_path: Path, run: Run, broker: str, host: str, port: int) -> None:
    assert run("init", "--home", str(tmp_path / "home"), "--fleet", "clinic", "--broker", broker)[0] == 0
    settings = read_settings(tmp_path / "home" / "coordinator.toml")
    assert (settings.broker.host, settings.broker.port) == (host, port)


def test_init_refuses_what_is_no_broker(tmp_path: Path, run: Run) -> None:
    code, _, error = run("init", "--home", str(tmp_path / "home"), "--fleet", "clinic", "--broker", "h:x")
    assert code == 2
    assert "write HOST or HOST:PORT" in error
    assert not (tmp_path / "home").exists()


def test_init_refuses_an_impossible_name(tmp_path: Path, run: Run) -> None:
    code, _, err = run("init", "--home", tmp_path / "c", "--fleet", "no spaces")
    assert code == 2
    assert "the fleet name 'no spaces' must be 1 to 64 characters" in err
    assert not (tmp_path / "c").exists()


def test_a_task_goes_into_the_queue_with_its_bundle(home: Path, task_folder: Path, run: Run) -> None:
    config = home / "coordinator.toml"
    code, out, _ = run("submit", task_folder / "tiny.toml", "--config", config)
    assert code == 0
    assert "Task 'tiny' is in the queue: 2 rounds" in out
    content = (task_folder / "tiny.svp").read_bytes()
    (task_folder / "tiny.svp").unlink()
    with Journal.open_read_only(home / "journal.sqlite") as journal:
        (task,) = journal.tasks()
        assert journal.blob(task.bundle) == content, "the file may move away"
    code, _, err = run("submit", task_folder / "moments.toml", "--config", config)
    assert (code, err) == (0, "")
    code, out, _ = run("status", "--config", config)
    assert code == 0
    assert "tiny" in out
    assert "queued" in out
    code, out, _ = run("cancel", "tiny", "--config", config)
    assert code == 0
    assert "cancelled" in out
    assert run("cancel", "tiny", "--config", config)[0] == 2
    code, out, _ = run("status", "--json", "--config", config)
    assert [task["status"] for task in json.loads(out)["tasks"]] == ["cancelled", "queued"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("goal = 5", "gaol = 5", "tiny.toml: cohort.gaol: unknown key"),
        ("tiny.svp", "missing.svp", "bundle: cannot read"),
        ("tiny.svp", "tiny.toml", "tiny.toml: not a bundle of this version"),
        ("[update]", "[update]\nnoise_multiplier = 0.5", "update.noise_multiplier: this release cannot add noise yet"),
    ],
)
def test_a_wrong_task_is_refused_with_one_line(
    home: Path, task_folder: Path, run: Run, old: str, new: str, says: str
) -> None:
    path = task_folder / "tiny.toml"
    path.write_text(path.read_text().replace(old, new))
    code, out, err = run("submit", path, "--config", home / "coordinator.toml")
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert err.startswith("coordinator: ")
    assert not (home / "journal.sqlite").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "--config", "missing.toml"), "cannot read missing.toml"),
        (("status", "--config", "{home}/coordinator.toml"), "there is no journal"),
        (("model", "get", "--out", "m.svp", "--config", "{home}/coordinator.toml"), "there is no journal"),
        (("submit", "missing.toml", "--config", "{home}/coordinator.toml"), "cannot read missing.toml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(home: Path, run: Run, arguments: tuple[str, ...], says: str) -> None:
    code, _, err = run(*(argument.format(home=home) for argument in arguments))
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda home: (home / "certificate.pem").unlink(), "sign request.csr with `fleet-ca sign"),
        (lambda home: (home / "fleet-ca.pem").unlink(), "ask the fleet's CA for its certificate"),
        (lambda home: (home / "key.pem").chmod(0o644), "chmod 600"),
        (lambda home: (home / "fleet-ca.pem").write_bytes((home / "key.pem").read_bytes()), "holds a private key"),
        (
            lambda home: (home / "coordinator.toml").write_text('name = "other"\nfleet = "choir"\n'),
            "is for coordinator of fleet choir, but coordinator.toml says other",
        ),
        (lambda home: (home / "certificate.pem").write_bytes((home / "fleet-ca.pem").read_bytes()), "fleet-ca sign"),
    ],
)
def test_what_is_missing_for_a_run_is_named(home: Path, run: Run, damage: Callable[[Path], object], says: str) -> None:
    damage(home)
    code, _, err = run("run", "--config", home / "coordinator.toml", "--once")
    assert code == 2, err
    assert says in err


# --- results ----------------------------------------------------------------------------------------------------------


def _commit(home: Path, *, rounds: int, released: dict[str, Any] | None = None) -> None:
    """Write committed rounds into the journal as a run would."""
    with Journal(home / "journal.sqlite") as journal:
        (task,) = journal.tasks()
        bundle = journal.blob(task.bundle)
        assert bundle is not None
        initial = decode_tensors(decode_bundle(bundle).initial)
        journal.begin_task(task.id, state=encode_tensors(initial), broadcast=encode_tensors(initial))
        for position in range(rounds):
            trained = {**initial, **({"kernel": initial["kernel"] + position + 1} if initial else {})}
            opening = Opening(task.id, position, position + 1, 0, task.name, b"plan", b"state", started_ms=1)
            digest = digest_of(b"%d" % position)
            row = journal.open_round(opening, digest=digest, previous=bytes(32), envelope=b"")
            ending = Ending(["pi-1"], ["pi-1"], {"training": ["pi-2"]}, Traffic(), 2)
            sums = encode_tensors(released) if released else None
            model = encode_tensors(trained)
            result = Result(state=model + b"moments", broadcast=model, metrics={"loss": 0.25}, released=sums)
            journal.commit_round(row, ending, result)


def test_the_model_of_any_round_comes_out_as_a_bundle(home: Path, task_folder: Path, run: Run, tmp_path: Path) -> None:
    config, out = home / "coordinator.toml", tmp_path / "model.svp"
    run("submit", task_folder / "tiny.toml", "--config", config)
    code, _, err = run("model", "get", "--out", out, "--config", config)
    assert code == 2
    assert "no round of task 'tiny' has committed yet" in err
    _commit(home, rounds=2)
    start = np.arange(6, dtype=np.float32).reshape(3, 2)
    for arguments, added in (((), 2), (("--round", "1"), 1), (("--round", "0"), 0), (("--task", "tiny"), 2)):
        code, printed, _ = run("model", "get", "--out", out, "--config", config, *arguments)
        assert code == 0
        assert f"edge-agent infer {out}" in printed
        bundle = decode_bundle(out.read_bytes())
        np.testing.assert_array_equal(decode_tensors(bundle.initial)["kernel"], start + added)
        np.testing.assert_array_equal(decode_tensors(bundle.self_test.broadcast)["kernel"], start)
    for arguments, says in ((("--round", "3"), "has committed 2 rounds"), (("--task", "x"), "there is no task 'x'")):
        code, _, err = run("model", "get", "--out", out, "--config", config, *arguments)
        assert code == 2
        assert says in err
    code, printed, _ = run("status", "--config", config)
    assert code == 0
    assert "committed" in printed
    assert "1 devices" not in printed


def test_released_sums_come_out_as_npz(home: Path, task_folder: Path, run: Run, tmp_path: Path) -> None:
    config, out = home / "coordinator.toml", tmp_path / "sums.npz"
    run("submit", task_folder / "moments.toml", "--config", config)
    _commit(home, rounds=1, released={"count": np.array([7.0]), "sum": np.array([1.0, 2.0, 3.0])})
    code, printed, _ = run("model", "get", "--out", out, "--config", config)
    assert code == 0
    assert "Wrote the sums of task 'moments'" in printed
    with np.load(out, allow_pickle=False) as sums:
        assert list(sums["count"]) == [7.0]
        assert list(sums["sum"]) == [1.0, 2.0, 3.0]


def test_a_request_is_shown_given_out_and_taken_out_like_a_task(
    home: Path, run: Run, request_of: Ask, tmp_path: Path
) -> None:
    config, out = home / "coordinator.toml", tmp_path / "sums.npz"
    terms = RoundTerms(cohort=CohortTerms(goal=5, minimum=4))
    with Journal(home / "journal.sqlite") as journal:
        first, second = (journal.ask(request_of(), terms, deadline_ms=10**15, now_ms=1) for _ in range(2))
        request = request_of()
        journal.begin_task(first, state=request.broadcast, broadcast=request.broadcast)
        opening = Opening(first, 0, 1, 0, request.name, b"plan", b"state", started_ms=1)
        row = journal.open_round(opening, digest=bytes(32), previous=bytes(32), envelope=b"")
        sums = RoundSums(
            sums={"count": [np.array([7.0])], "two": [np.zeros(2), np.ones(1)]},
            weight=9,
            survivors=4,
            clamped=0,
            round=1,
        )
        result = Result(state=b"state", broadcast=b"state", sums=encode_sums(sums))
        journal.commit_round(row, Ending(["pi-1"], ["pi-1"], {}, Traffic(), 2), result)
    code, printed, _ = run("status", "--json", "--config", config)
    assert [
        (task["kind"], task["name"], task["purpose"], task["status"], task["number"])
        for task in json.loads(printed)["tasks"]
    ] == [
        ("request", "mean_temperature", "to know how warm it is", "done", first),
        ("request", "mean_temperature", "to know how warm it is", "queued", second),
    ]
    code, printed, _ = run("status", "--config", config)
    assert code == 0
    assert "mean_temp" in printed
    assert run("model", "get", "--out", out, "--task", first, "--config", config)[0] == 0
    with np.load(out, allow_pickle=False) as written:
        assert {name: list(written[name]) for name in written} == {"count": [7.0], "two.0": [0, 0], "two.1": [1]}
    code, printed, _ = run("cancel", second, "--config", config)
    assert f"Request {second} (mean_temperature) is cancelled" in printed
    with Journal(home / "journal.sqlite") as journal:
        assert journal.answer(second).reason == "cancelled: by the coordinator's operator"
    assert run("cancel", second, "--config", config)[0] == 2


# --- a real process ---------------------------------------------------------------------------------------------------


def _wait_for(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_it_runs_without_the_ca_key_and_without_a_broker_and_stops_in_order(
    home: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    assert not list(tmp_path.rglob("*ca*key*")), "the CA's key is nowhere"
    log = tmp_path / "log"
    command = [sys.executable, "-m", "coordinator", "run", "--config", str(home / "coordinator.toml")]
    settings = home / "coordinator.toml"
    settings.write_text(settings.read_text().replace("port = 1883", "port = 1"))
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        _wait_for(lambda: b"not connected to the broker" in log.read_bytes())
        process.send_signal(signal_number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "the coordinator has stopped" in text
    assert "Traceback" not in text


def test_a_journal_has_one_coordinator(home: Path, run: Run) -> None:
    lock = FileLock.take(lock_file(home / "journal.sqlite"))
    assert lock is not None
    with lock:
        code, _, err = run("run", "--config", home / "coordinator.toml", "--once")
    assert code == 2
    assert "a coordinator is running on" in err


def test_who_looks_whether_a_coordinator_is_running_does_not_keep_one_from_starting(home: Path) -> None:
    settings, lock = home / "coordinator.toml", lock_file(home / "journal.sqlite")
    settings.write_text(settings.read_text().replace("port = 1883", "port = 1"))
    lock.touch()
    command = [sys.executable, "-m", "coordinator", "run", "--config", str(settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: is_held(lock))  # Looking holds the lock itself, again and again.
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert not is_held(lock), "however a process ends, its lock ends with it"


def test_once_ends_by_itself_when_there_is_nothing_to_do(home: Path) -> None:
    settings = home / "coordinator.toml"
    settings.write_text(settings.read_text().replace("port = 1883", "port = 1"))
    command = [sys.executable, "-m", "coordinator", "run", "--config", str(settings), "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_help_shows_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "coordinator init --home DIR" in out
    assert "fleet-ca sign" in out
