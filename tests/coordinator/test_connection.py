"""From an author's process to a running coordinator and back: what is asked, waited for, and said when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_stage import Stage
from tiny_tasks import Ask

import coordinator
from coordinator.connection import FleetConnection, Wishes, connect
from coordinator.journal import Journal
from coordinator.settings import lock_file
from coordinator.terms import CohortTerms, Timing
from sottovoce.errors import BadBundle, ConfigError, ProgramError, RoundAbandoned, TransportError
from sottovoce.file_lock import FileLock
from sottovoce.language.context import current_executor
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.plan import Aggregation, Extraction, Quantised
from sottovoce.wire.messages import Selected

Connect = Callable[..., FleetConnection]
CONFIG = "coordinator.toml"


@pytest.fixture
def running(stage: Stage) -> Iterator[FileLock]:
    """The lock that `coordinator run` holds."""
    lock = FileLock.take(lock_file(stage.folder / "journal.sqlite"))
    assert lock is not None
    with lock:
        yield lock


@pytest.fixture
def connected(stage: Stage, running: FileLock) -> Iterator[Connect]:
    """Connects to the stage's coordinator: whenever the asker waits, time passes on the stage."""
    with Journal(stage.folder / "journal.sqlite") as journal:

        def wait(seconds: float) -> None:
            if stage.service is None:
                stage.now_ms += 1000
            else:
                stage.run(0.25, step_ms=250)

        def make(*, minimum: int = 4, timeout_s: float = 40.0, **wishes: Any) -> FleetConnection:
            return FleetConnection(
                journal,
                lock=lock_file(stage.folder / "journal.sqlite"),
                config=Path(CONFIG),
                fleet="choir",
                chunk_bytes=1024,
                wishes=Wishes(minimum=minimum, timeout_s=timeout_s, **wishes),
                clock=lambda: stage.now_ms,
                wait=wait,
            )

        yield make


def test_a_request_is_answered_with_its_sums(stage: Stage, connected: Connect, request_of: Ask) -> None:
    stage.start()
    connection = connected(goal=5)
    connection.check()
    sums = connection.run(request_of("a/0"))
    np.testing.assert_allclose(sums.sums["count"], [[20]])
    assert (sums.survivors, sums.round) == (5, 1)
    again = connection.run(request_of("a/0"))
    np.testing.assert_array_equal(again.sums["sum"], sums.sums["sum"])
    assert again.round == 1
    assert connection.run(request_of("a/1")).round == 2
    assert [row.phase for row in stage.journal.rounds()] == ["committed", "committed"]


def test_a_committed_request_needs_no_coordinator(
    stage: Stage, connected: Connect, request_of: Ask, running: FileLock
) -> None:
    stage.start()
    connection = connected(goal=5)
    first = connection.run(request_of("a/0"))
    running.release()
    stage.crash()
    np.testing.assert_array_equal(connection.run(request_of("a/0")).sums["sum"], first.sums["sum"])


def test_without_a_goal_all_devices_that_are_known_are_wanted(
    stage: Stage, connected: Connect, request_of: Ask
) -> None:
    stage.start()
    connection = connected()
    assert connection.run(request_of()).survivors == 4, "nobody is known yet, so the minimum is the goal"
    assert connection.run(request_of()).survivors == 5


def test_the_purpose_may_be_said_once_for_all(stage: Stage, connected: Connect, request_of: Ask) -> None:
    stage.start()
    connected(goal=5, purpose="Is the school warm enough?").run(request_of())
    assert stage.journal.tasks()[-1].purpose == "Is the school warm enough?"


@pytest.mark.parametrize("terminal", [True, False])
def test_on_a_terminal_a_line_says_what_is_waited_for(
    stage: Stage,
    connected: Connect,
    request_of: Ask,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes whatever it writes to for a terminal
    for player in stage.players:
        player.silent_at = Selected
    stage.start()
    with pytest.raises(RoundAbandoned, match="too_few_ready"):
        connected(goal=5).run(request_of())
    captured = capsys.readouterr()
    assert captured.out == ""
    if terminal:
        assert "mean_temperature: round 1: 5 devices do the work" in captured.err
    else:
        assert captured.err == ""


def test_too_few_devices_are_reported_with_numbers_and_a_cure(
    stage: Stage, connected: Connect, request_of: Ask
) -> None:
    for player in stage.players[2:]:
        player.silent = True
    stage.start()
    with pytest.raises(
        RoundAbandoned, match=r"too_few_checked_in: 2 devices of at least 4; have more devices"
    ) as caught:
        connected(goal=5).run(request_of())
    assert caught.value.reason == "too_few_checked_in"


def test_who_takes_a_request_out_is_reported(stage: Stage, connected: Connect, request_of: Ask) -> None:
    stage.start()
    stage.players[0].silent_at = Selected
    stage.players[1].note = lambda: stage.journal.end_task(1, "cancelled", "cancelled: by the coordinator's operator")
    with pytest.raises(RoundAbandoned, match=r"cancelled: by the coordinator's operator; somebody has taken it out"):
        connected(goal=5).run(request_of("a/0"))


def test_a_request_that_nobody_can_ask_for_again_is_taken_out_when_the_asker_gives_up(
    stage: Stage, connected: Connect, request_of: Ask
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    connection = connected()
    connection._pause = interrupt
    for key in ("", "a/0"):
        with pytest.raises(KeyboardInterrupt):
            connection.run(request_of(key))
    with Journal(stage.folder / "journal.sqlite") as journal:
        assert [task.status for task in journal.tasks()] == ["cancelled", "queued"]


def test_without_a_coordinator_nothing_begins(
    stage: Stage, connected: Connect, request_of: Ask, running: FileLock
) -> None:
    running.release()
    with pytest.raises(TransportError, match=r"no coordinator is running .* coordinator run --config coordinator.toml"):
        connected().check()


def test_a_coordinator_that_is_restarted_is_waited_for(
    stage: Stage, connected: Connect, request_of: Ask, running: FileLock
) -> None:
    running.release()
    connection = connected(goal=5)
    begun_ms = stage.now_ms
    connection._pause, pause = (
        lambda seconds: start() if stage.now_ms - begun_ms > 10_000 else pause(seconds),
        (connection._pause),
    )
    locks: list[Any] = []

    def start() -> None:
        if stage.service is None:
            locks.append(FileLock.take(lock_file(stage.folder / "journal.sqlite")))
            stage.start()
        pause(0)

    assert connection.run(request_of()).survivors == 5
    locks[0].release()


def test_a_coordinator_that_does_not_come_back_is_not_waited_for(
    stage: Stage, connected: Connect, request_of: Ask, running: FileLock
) -> None:
    running.release()
    begun_ms = stage.now_ms
    with pytest.raises(TransportError, match=r"no coordinator has been running for a while"):
        connected(timeout_s=3600.0).run(request_of())
    assert stage.now_ms - begun_ms < 40_000


def test_a_coordinator_that_says_nothing_is_not_waited_for_for_ever(
    stage: Stage, connected: Connect, request_of: Ask
) -> None:
    with pytest.raises(RoundAbandoned, match="no_answer"):
        connected(timeout_s=5.0).run(request_of())


def test_an_impossible_request_is_refused_before_it_is_asked(stage: Stage, connected: Connect, request_of: Ask) -> None:
    with pytest.raises(ConfigError, match=r"the values live on the devices"):
        connected().run(request_of(members=(b"x",)))
    with pytest.raises(ConfigError, match=r"say in `purpose`"):
        connected(purpose=" ").run(request_of())
    unknown = Aggregation(name="median", tensors=("float32[3]",), encoding=Quantised(half_range=100.0, bits=16))
    with pytest.raises(BadBundle, match=r"'mean_temperature' sums 'median' .*'moments' computes no such thing"):
        connected().run(request_of(aggregations=(unknown,)))
    with pytest.raises(ProgramError, match=r"program 'moments' takes no 'threshold' in its broadcast"):
        connected().run(request_of(broadcast=21.5))
    words = Extraction(extractor="text.words/1", column="text", vocabularies=(("no", "yes"),))
    with pytest.raises(BadBundle, match=r"program 'moments' reads 'x', float32\[\?,3\]; text.words/1 gives word"):
        connected().run(request_of(extraction=words))
    with Journal(stage.folder / "journal.sqlite") as journal:
        assert journal.tasks() == []


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"goal": 3, "minimum": 3}, r"3 devices are too few in active mode, which needs 4"),
        ({"minimum": 2}, r"expected `int` >= 3"),
        ({"goal": 5, "minimum": 10}, r"cohort.minimum: 10 is more than cohort.goal, 5"),
        ({"mode": "trusting"}, r"invalid enum value 'trusting'"),
        ({"timeout_s": 0}, r"timeout_s is 0; write a number of seconds above 0"),
    ],
)
def test_impossible_wishes_are_named(wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Wishes(**wishes).terms(known_devices=0)


def test_the_parts_of_a_round_fit_into_its_time() -> None:
    for timeout_s in (5.0, 60.0, 120.0, 7200.0):
        time = Wishes(timeout_s=timeout_s).terms(known_devices=0).time
        assert time.selection_s + time.training_s <= timeout_s
    timing = Timing(selection_s=1, training_s=2, stage_s=3)
    assert Wishes(timing=timing).terms(known_devices=0).time == timing
    cohort = CohortTerms(goal=12, minimum=11, over_selection=1.5)
    assert Wishes(cohort=cohort).terms(known_devices=99).cohort == cohort


def test_connect_makes_the_fleet_the_place_where_computations_run(
    stage: Stage, connected: Connect, request_of: Ask
) -> None:
    config = stage.folder / "coordinator.toml"
    config.write_text('name = "coordinator"\nfleet = "choir"\n')
    stage.start()
    connected(goal=5).run(request_of("a/0"))
    before = current_executor()
    with connect(str(config), goal=5, minimum=4) as fleet:
        assert isinstance(current_executor(), FleetExecutor)
        assert fleet.run(request_of("a/0")).survivors == 5
    assert current_executor() is before


def test_connect_says_what_is_missing(tmp_path: Path) -> None:
    config = tmp_path / "coordinator.toml"
    with pytest.raises(ConfigError, match="cannot read"), connect(config):
        pass
    config.write_text('name = "coordinator"\nfleet = "choir"\n')
    with pytest.raises(ConfigError, match=r"there is no journal .*; start `coordinator run --config"), connect(config):
        pass
    with Journal(tmp_path / "journal.sqlite"):
        pass
    with pytest.raises(TransportError, match=r"no coordinator is running"), connect(config):
        pass
    assert coordinator.connect is connect
    with pytest.raises(AttributeError):
        _ = coordinator.disconnect
