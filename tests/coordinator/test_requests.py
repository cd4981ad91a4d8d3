"""Rounds that somebody asks for: asked once, run once, answered for ever; and what a crash leaves of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from memory_stage import Stage
from tiny_tasks import Ask

from coordinator.journal import Journal
from coordinator.requests import check_request, decode_sums, encode_sums, plan_of
from coordinator.terms import CohortTerms, RoundTerms, Timing
from sottovoce.blobs import canonical
from sottovoce.errors import ConfigError
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, LocalWork, Plan, Quantised, decode_plan
from sottovoce.wire.messages import Selected

TIME = Timing(selection_s=10, training_s=20, stage_s=5, retry_delay_s=1)
TERMS = RoundTerms(cohort=CohortTerms(goal=5, minimum=4), time=TIME)
A_MINUTE_MS = 60_000


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.sqlite") as opened:
        yield opened


def ask(journal: Journal, request: RoundRequest, *, now_ms: int = 0, terms: RoundTerms = TERMS) -> int:
    return journal.ask(request, terms, deadline_ms=now_ms + A_MINUTE_MS, now_ms=now_ms)


def committed(journal: Journal) -> list[str]:
    return [row.task for row in journal.rounds() if row.phase == "committed"]


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_request_and_without_a_key_every_one_is_another(
    journal: Journal, request_of: Ask
) -> None:
    first = ask(journal, request_of("a/0"))
    assert ask(journal, request_of("a/0")) == first
    assert ask(journal, request_of("a/1")) != first
    assert ask(journal, request_of()) != ask(journal, request_of())
    assert len(journal.tasks()) == 4
    assert {task.kind for task in journal.tasks()} == {"request"}
    assert journal.tasks()[0].purpose == "to know how warm it is"


@pytest.mark.parametrize(
    "changed", [{"broadcast": 21.5}, {"name": "other"}, {"weight_cap": 9}, {"work": LocalWork()}, {"purpose": "else"}]
)
def test_something_else_under_a_key_is_refused(journal: Journal, request_of: Ask, changed: dict[str, Any]) -> None:
    number = ask(journal, request_of("a/0"))
    with pytest.raises(
        ConfigError, match=r"something else was asked under the key 'a/0' before.*no clock and no chance"
    ):
        ask(journal, request_of("a/0", **changed))
    assert [task.id for task in journal.tasks()] == [number], "nothing of the other one is kept"


def test_another_client_program_under_a_key_is_refused(journal: Journal, request_of: Ask, model_bundle: bytes) -> None:
    ask(journal, request_of("a/0"))
    with pytest.raises(ConfigError, match="something else was asked"):
        ask(journal, request_of("a/0", bundle=model_bundle))


def test_a_request_comes_back_out_of_the_journal_as_it_went_in(journal: Journal, request_of: Ask) -> None:
    request = request_of("a/0", broadcast=21.5)
    asked = journal.request(ask(journal, request))
    assert asked is not None
    assert (asked.request, asked.terms) == (request, TERMS)
    assert journal.request(99) is None


def test_a_request_that_failed_is_put_into_the_queue_again_when_asked_again(journal: Journal, request_of: Ask) -> None:
    number = ask(journal, request_of("a/0"))
    journal.end_task(number, "failed", "too_few_ready: because")
    assert (journal.answer(number).status, journal.answer(number).reason) == ("failed", "too_few_ready: because")
    terms = msgspec.structs.replace(TERMS, cohort=CohortTerms(goal=9, minimum=4))
    assert ask(journal, request_of("a/0"), now_ms=7, terms=terms) == number
    assert (journal.answer(number).status, journal.answer(number).reason) == ("queued", "")
    assert journal.deadline_of(number) == A_MINUTE_MS + 7
    asked = journal.request(number)
    assert asked is not None
    assert asked.terms.cohort.goal == 9


def test_sums_survive_the_journal() -> None:
    sums = RoundSums(
        sums={"a": [np.array([1.5]), np.zeros((2, 3))], "a.0": [np.array(7.0)], "empty": []},
        weight=12, survivors=4, clamped=1, round=33,
    )  # fmt: skip
    back = decode_sums(encode_sums(sums))
    assert (back.weight, back.survivors, back.clamped, back.round) == (12, 4, 1, 33)
    assert list(back.sums) == ["a", "a.0", "empty"]
    for name, arrays in sums.sums.items():
        for one, other in zip(back.sums[name], arrays, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.shape == other.shape


def _plan(journal: Journal, number: int) -> Plan:
    asked = journal.request(number)
    assert asked is not None
    expiry = asked.expires_unix_s
    return plan_of(asked.request, asked.terms, fleet="choir", chunk_bytes=1024, expires_unix_s=expiry)


def test_the_rounds_of_one_run_are_one_plan(journal: Journal, request_of: Ask) -> None:
    keys = ("mean/1f/start/0", "mean/1f/0/0", "mean/1f/0/1", "mean/1f/end-1/0")
    numbers = [ask(journal, request_of(key, broadcast=value), now_ms=value * 1000) for value, key in enumerate(keys)]
    plans = [_plan(journal, number) for number in numbers]
    assert len({plan.digest for plan in plans}) == 1
    assert (plans[0].privacy.minimum_cohort, plans[0].privacy.purpose) == (4, "to know how warm it is")
    other = _plan(journal, ask(journal, request_of("mean/2e/start/0"), now_ms=1000))
    assert other.digest != plans[0].digest, "another run is another plan"
    assert ask(journal, request_of(keys[0], broadcast=0), now_ms=9000) == numbers[0]
    assert _plan(journal, numbers[0]).digest == plans[0].digest, "asked again by a program that was restarted"
    year_ms = 365 * 24 * 3_600_000
    later = _plan(journal, ask(journal, request_of("mean/1f/1/0"), now_ms=year_ms))
    assert later.privacy.expires_unix_s > year_ms // 1000, "after a year it is not refused as out of date"


def test_a_question_asked_again_is_a_new_plan_that_ends_with_its_deadline(journal: Journal, request_of: Ask) -> None:
    """A device answers one plan and state a few times at most; a new question is a new plan, and says until when."""
    plans = [_plan(journal, ask(journal, request_of(), now_ms=5000)) for _ in range(3)]
    assert [plan.privacy.expires_unix_s for plan in plans] == [65, 66, 67]
    assert len({plan.digest for plan in plans}) == 3


def test_values_that_came_with_a_request_are_refused(request_of: Ask) -> None:
    with pytest.raises(ConfigError, match=r"the values live on the devices: .* sv.latest\(\"temperature\"\)"):
        check_request(request_of(members=(b"x",)), TERMS, fleet="choir", chunk_bytes=1024)


# --- the coordinator runs them ----------------------------------------------------------------------------------------


def answer_of(stage: Stage, number: int) -> RoundSums:
    sums: RoundSums | None = stage.journal.answer(number).sums
    assert sums is not None, stage.journal.answer(number)
    return sums


def ask_on(stage: Stage, request: RoundRequest, **changed: Any) -> int:
    """Ask from another process: by a connection of its own."""
    with Journal(stage.folder / "journal.sqlite") as journal:
        return ask(journal, request, now_ms=stage.now_ms, **changed)


def test_a_request_is_picked_up_answered_and_never_run_again(stage: Stage, request_of: Ask) -> None:
    stage.start()
    stage.settle()
    number = ask_on(stage, request_of("a/0"))
    stage.run(0.2, step_ms=50)
    assert [row.task for row in stage.journal.rounds()] == ["mean_temperature"], "announced within 0.2 s"
    stage.run(30, until=stage.done)
    sums = answer_of(stage, number)
    np.testing.assert_allclose(sums.sums["count"], [[5 * 4]])
    np.testing.assert_allclose(sums.sums["sum"], [[5 * 8.0] * 3], atol=1e-6)
    assert (sums.weight, sums.survivors, sums.clamped, sums.round) == (20, 5, 0, 1)
    assert ask_on(stage, request_of("a/0")) == number
    stage.run(5)
    assert committed(stage.journal) == ["mean_temperature"]
    (row,) = stage.journal.rounds()
    assert row.metrics == {"examples": 20.0, "clamped": 0.0}
    for player in stage.players:
        assert [outcome.committed for outcome in player.outcomes] == [True]
    finished = [event for event in stage.events if event["event"] == "task_finished"]
    assert [(event["task"], event["status"], event["round"]) for event in finished] == [("mean_temperature", "done", 1)]


def test_a_request_waits_for_one_round_of_a_task_and_not_for_all(stage: Stage, request_of: Ask) -> None:
    stage.submit("tiny")
    for key in ("a/0", "a/1"):
        ask_on(stage, request_of(key))
    stage.start()
    stage.run(60, until=stage.done)
    assert [row.plan_name for row in stage.journal.rounds()] == [
        "mean_temperature", "tiny", "mean_temperature", "tiny",
    ]  # fmt: skip


def test_a_task_that_waits_to_be_tried_again_holds_up_no_request(stage: Stage, request_of: Ask) -> None:
    text = (stage.folder / "tiny.toml").read_text().replace("retry_delay_s = 1", "retry_delay_s = 1000")
    (stage.folder / "tiny.toml").write_text(text.replace("minimum = 4", "minimum = 5"))
    stage.submit("tiny")
    stage.start()
    stage.players[0].silent = True
    stage.run(30, until=lambda: any(row.phase == "abandoned" for row in stage.journal.rounds()))
    number = ask_on(stage, request_of())
    stage.run(30, until=lambda: stage.journal.answer(number).status == "done")
    assert answer_of(stage, number).survivors == 4


def test_after_its_deadline_a_request_fails_with_the_reason_that_says_most(stage: Stage, request_of: Ask) -> None:
    for player in stage.players[:3]:
        player.silent = True
    stage.start()
    number = ask_on(stage, request_of())
    stage.run(90, until=stage.done)
    answer = stage.journal.answer(number)
    assert (answer.status, answer.reason) == ("failed", "too_few_checked_in: 2 devices of at least 4")
    reasons = [row.reason for row in stage.journal.rounds()]
    assert reasons.count("too_few_checked_in") >= 4
    assert reasons[-1] in ("too_few_checked_in", "deadline")
    assert stage.events[-1]["status"] == "failed"


def test_a_round_in_flight_ends_when_its_request_is_out_of_time(stage: Stage, request_of: Ask) -> None:
    stage.players[0].silent_at = Selected
    patient = msgspec.structs.replace(TERMS, time=Timing(training_s=10_000), cohort=CohortTerms(goal=5, minimum=4))
    stage.start()
    number = ask_on(stage, request_of(), terms=patient)
    stage.run(70, until=stage.done)
    assert [row.reason for row in stage.journal.rounds()] == ["deadline"]
    assert stage.journal.answer(number).reason.startswith("deadline: it ended in the phase configuration")


def test_a_request_that_never_got_its_turn_says_so(stage: Stage, request_of: Ask) -> None:
    with Journal(stage.folder / "journal.sqlite") as journal:
        number = ask(journal, request_of(), now_ms=stage.now_ms - 2 * A_MINUTE_MS)
    stage.start()
    stage.run(1)
    assert stage.journal.answer(number).reason.startswith("no_round: ")
    assert stage.journal.rounds() == []


def test_a_request_taken_out_ends_its_round(stage: Stage, request_of: Ask) -> None:
    stage.players[0].silent_at = Selected
    stage.start()
    number = ask_on(stage, request_of("a/0"))
    stage.settle()
    stage.journal.end_task(number, "cancelled", "cancelled: by hand")
    stage.run(1)
    assert [row.reason for row in stage.journal.rounds()] == ["cancelled"]
    assert stage.journal.answer(number).status == "cancelled"


# --- crashes ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


def dying_journal(path: Path, method: str, *, before: bool, times: int) -> Journal:
    """Return a journal with which the process dies before or after its `times`-th call of `method`."""
    calls = 0

    def die(self: Journal, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if before and calls == times:
            raise Killed
        result = getattr(Journal, method)(self, *arguments, **named)
        if calls == times:
            raise Killed
        return result

    return type("DyingJournal", (Journal,), {method: die})(path)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "times"),
    [
        *(("begin_task", 1), ("begin_task", 2), ("open_round", 1), ("set_phase", 1), ("set_phase", 2)),
        *(("commit_round", 1), ("open_round", 2), ("commit_round", 2)),
    ],
)
def test_wherever_the_coordinator_dies_every_request_has_one_committed_round(
    stage: Stage, request_of: Ask, method: str, times: int, before: bool
) -> None:
    """Between commit and outcome above all: the sums are there, and the outcome is published by the successor."""
    keys = ["a/0", "a/1"]
    numbers = [ask_on(stage, request_of(key)) for key in keys]
    stage.start(journal=dying_journal(stage.folder / "journal.sqlite", method, before=before, times=times))
    with pytest.raises(Killed):
        stage.run(60, until=stage.done)
    committed_then = committed(stage.journal)
    stage.crash()
    stage.now_ms += 1000
    stage.start()
    assert committed(stage.journal) == committed_then
    if method == "commit_round" and not before:
        answer_of(stage, numbers[times - 1])
    assert [ask_on(stage, request_of(key)) for key in keys] == numbers, "the asker was restarted as well"
    stage.run(60, until=stage.done)
    assert len(committed(stage.journal)) == 2
    rounds = [answer_of(stage, number).round for number in numbers]
    assert rounds == [1, 2]
    for player in stage.players:
        assert player.outcomes[-1].committed
        assert player.announced == sorted(player.announced), "round numbers only grow"


# --- older journals ---------------------------------------------------------------------------------------------------


def test_a_journal_of_the_first_release_is_brought_up_to_date(tmp_path: Path, request_of: Ask) -> None:
    from coordinator.journal_schema import _FIRST

    path = tmp_path / "journal.sqlite"
    database = sqlite3.connect(path)
    database.executescript(f"{_FIRST} PRAGMA user_version = 1;")
    for number, status in enumerate(("done", "running", "queued"), 1):
        database.execute(
            "INSERT INTO tasks (id, name, toml, bundle, status, submitted_ms) VALUES (?, ?, '', x'00', ?, 1)",
            (number, f"task-{status}", status),
        )
    database.execute("INSERT INTO blobs VALUES (x'01', x'02')")
    database.execute("INSERT INTO states VALUES (1, 1, x'01', NULL)")
    database.commit()
    database.close()
    with pytest.raises(ConfigError, match=r"written by an earlier release; `coordinator run` brings it up to date"):
        Journal.open_read_only(path)
    with Journal(path) as journal:
        assert [(task.status, task.kind) for task in journal.tasks()] == [
            ("done", "hosted"), ("failed", "hosted"), ("queued", "hosted"),
        ]  # fmt: skip
        assert "submit it again" in journal.tasks()[1].reason
        assert journal.state_at(1, 1) == (b"\x02", None)
        assert journal.server_state_at(1, 1) == b"\x02"
        ask(journal, request_of())
    with Journal(path) as journal:
        assert len(journal.tasks()) == 4


def test_a_whole_number_where_a_real_one_is_meant_gives_the_plan_that_devices_decode(request_of: Ask) -> None:
    """Authors write bound=(0, 100); the announced digest must be that of the plan as a device reads it."""
    aggregation = Aggregation(name="sum", tensors=("float32[1]",), encoding=Quantised(half_range=100, bits=16))
    request = request_of(aggregations=(aggregation,))
    plan = plan_of(request, TERMS, fleet="home", chunk_bytes=2**18)
    assert decode_plan(canonical(plan)).digest == plan.digest
