"""The durable record: what is committed is whole, and other processes may read it at any time."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.journal import Journal
from coordinator.journal_rows import Ending, Opening, Result, TaskRow, Traffic
from sottovoce.blobs import digest_of
from sottovoce.errors import ConfigError

TRAFFIC = Traffic(up={"pi-1": 10}, down={"pi-1": 20}, broadcast=7)
ENDING = Ending(
    cohort=["pi-2", "pi-1"], survivors=["pi-1"], dropped={"training": ["pi-2"]}, traffic=TRAFFIC, ended_ms=99
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as opened:
        yield opened


def first_due(journal: Journal) -> TaskRow | None:
    return next(iter(journal.due_tasks()), None)


def _task(journal: Journal, name: str = "digits") -> int:
    number = journal.submit(name, "toml", purpose="", bundle=b"bundle", moments=None, now_ms=1)
    journal.begin_task(number, state=b"state 0", broadcast=b"state 0")
    return number


def _round(journal: Journal, task: int, *, position: int = 0, state: bytes = b"state 0") -> int:
    number, attempt = journal.next_number()
    opening = Opening(task, position, number, attempt, "digits", b"plan", state, started_ms=5)
    digest = digest_of(b"%d.%d" % (number, attempt))
    return journal.open_round(opening, digest=digest, previous=journal.last_announcement(), envelope=b"signed")


def test_tasks_run_one_after_the_other_in_the_order_of_submission(journal: Journal) -> None:
    first, second = (
        journal.submit(name, "toml", purpose="", bundle=b"b", moments=b"m", now_ms=1) for name in ("a", "b")
    )
    assert (task := first_due(journal)) is not None
    assert task.id == first
    assert task.moments == digest_of(b"m")
    journal.begin_task(first, state=b"state", broadcast=b"state")
    assert (task := first_due(journal)) is not None
    assert (task.id, task.status) == (first, "running")
    journal.end_task(first, "done")
    assert (task := first_due(journal)) is not None
    assert task.id == second
    journal.end_task(second, "failed", "because")
    assert first_due(journal) is None
    journal.end_task(second, "done")
    assert [(task.status, task.reason) for task in journal.tasks()] == [("done", ""), ("failed", "because")]


def test_a_name_may_be_used_again_once_its_task_has_ended(journal: Journal) -> None:
    number = _task(journal)
    with pytest.raises(ConfigError, match="a task named 'digits' is already running"):
        journal.submit("digits", "toml", purpose="", bundle=b"b", moments=None, now_ms=1)
    journal.end_task(number, "cancelled")
    assert _task(journal) != number


def test_a_committed_round_brings_its_state_and_the_next_number(journal: Journal) -> None:
    task = _task(journal)
    assert journal.next_number() == (1, 0)
    row = _round(journal, task)
    assert [each.phase for each in journal.open_rounds()] == ["selection"]
    journal.set_phase(row, "configuration", ["pi-2", "pi-1"])
    journal.commit_round(
        row, ENDING, Result(state=b"state 1", broadcast=b"state 1", metrics={"loss": 0.5}, released=None)
    )
    assert journal.open_rounds() == []
    assert journal.next_number() == (2, 0)
    (committed,) = journal.rounds()
    assert (committed.phase, committed.cohort, committed.survivors) == ("committed", ["pi-1", "pi-2"], ["pi-1"])
    assert (committed.dropped, committed.metrics, committed.traffic) == ({"training": ["pi-2"]}, {"loss": 0.5}, TRAFFIC)
    assert journal.state_at(task, 1) == (b"state 1", None)
    assert journal.state_at(task, 2) is None
    assert journal.state(digest_of(b"state 1")) == b"state 1"
    assert (found := journal.task(task)) is not None
    assert found.position == 1


def test_an_abandoned_round_is_tried_again_under_the_same_number(journal: Journal) -> None:
    task = _task(journal)
    journal.abandon_round(_round(journal, task), "too_few_ready", ENDING)
    assert journal.next_number() == (1, 1)
    journal.abandon_round(_round(journal, task), "too_few_ready", ENDING)
    assert journal.next_number() == (1, 2)
    assert (found := journal.task(task)) is not None
    assert found.position == 0
    assert [row.reason for row in journal.rounds()] == ["too_few_ready"] * 2
    assert [row.attempt for row in journal.rounds(limit=1)] == [1]


def test_a_commit_that_fails_half_way_leaves_nothing(journal: Journal) -> None:
    task = _task(journal)
    journal.commit_round(
        _round(journal, task), ENDING, Result(state=b"state 1", broadcast=b"state 1", metrics={}, released=None)
    )
    row = _round(journal, task)  # the same position again: its state exists already, so committing it must fail
    with pytest.raises(sqlite3.IntegrityError):
        journal.commit_round(row, ENDING, Result(state=b"another", broadcast=b"another", metrics={}, released=None))
    assert [each.id for each in journal.open_rounds()] == [row]
    assert journal.state(digest_of(b"another")) is None


def test_announcements_are_a_chain(journal: Journal) -> None:
    task = _task(journal)
    assert journal.last_announcement() == bytes(32)
    _round(journal, task)
    first = journal.last_announcement()
    assert first == journal.announcement_of(1, 0) == digest_of(b"1.0")
    journal.abandon_round(1, "x", ENDING)
    _round(journal, task)
    assert journal.last_announcement() == digest_of(b"1.1")
    assert journal.announcement_of(9, 9) == bytes(32)


def test_refusals_add_up_and_certificates_are_replaced(journal: Journal) -> None:
    journal.count_refusals({"malformed": 2})
    journal.count_refusals({"malformed": 1, "replayed": 4})
    assert journal.refusals() == {"malformed": 3, "replayed": 4}
    journal.keep_certificate("pi-1", b"old", now_ms=1)
    journal.keep_certificate("pi-1", b"new", now_ms=2)
    assert journal.certificates() == [b"new"]


def test_another_process_reads_while_the_coordinator_writes(journal: Journal, tmp_path: Path) -> None:
    task = _task(journal)
    row = _round(journal, task)
    with Journal.open_read_only(tmp_path / "journal.sqlite") as reader:
        assert [each.phase for each in reader.rounds()] == ["selection"]
        journal.commit_round(row, ENDING, Result(state=b"state 1", broadcast=b"state 1", metrics={}, released=b"sums"))
        assert [each.phase for each in reader.rounds()] == ["committed"]
        assert reader.state_at(task, 1) == (b"state 1", b"sums")
        with pytest.raises(sqlite3.OperationalError):
            reader.count_refusals({"x": 1})


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with pytest.raises(ConfigError, match=r"there is no journal"):
        Journal.open_read_only(path)
    path.write_bytes(b"this is not SQLite at all, but it is long enough to look at" * 10)
    with pytest.raises(ConfigError, match=r"is not a journal of this release"):
        Journal(path)
    path.unlink()
    with Journal(path):
        pass
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match=r"later release"):
        Journal(path)


def test_it_survives_being_closed_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as before:
        task = _task(before)
        _round(before, task)
    with Journal(path) as after:
        assert [row.phase for row in after.open_rounds()] == ["selection"]
        assert after.next_number() == (1, 1)


def test_only_its_owner_can_read_the_journal(tmp_path):
    with Journal(tmp_path / "journal.sqlite"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes
