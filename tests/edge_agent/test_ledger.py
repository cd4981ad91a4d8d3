"""The ledger: nothing leaves unwritten, nothing goes back, and a killed process forgets nothing."""

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge_agent.ledger import Ledger, Release
from sottovoce.blobs import blob_ref
from sottovoce.errors import ConfigError, LocalProtocolError, PolicyRefusal, Replayed
from sottovoce.plan import LocalWork, ParticipationTerms, Plan, PrivacyTerms

RELEASE = Release(
    at_unix_s=1_800_000_000.5,
    fleet="clinic",
    plan_name="digits",
    plan=b"p" * 32,
    state=b"s" * 32,
    round=4,
    attempt=1,
    session=b"\x01" * 32,
    purpose="read handwriting",
    cohort=12,
    weight=130,
    contents=(("delta", 2410), ("correct", 1)),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path):
    with Ledger(path) as opened:
        yield opened


def session(n: int) -> bytes:
    return n.to_bytes(32, "big")


def test_a_release_is_kept_as_it_was(ledger: Ledger, path: Path) -> None:
    ledger.spend(RELEASE, max_releases_per_state=2)
    with Ledger(path) as again:
        assert again.rows() == [RELEASE]
        assert again.unsettled() == [RELEASE]


def test_what_is_written_survives_sigkill(path: Path) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from edge_agent.ledger import Ledger
from tests.edge_agent.test_ledger import RELEASE
ledger = Ledger(Path({str(path)!r}))
ledger.spend(RELEASE, max_releases_per_state=1)
ledger.advance_round("clinic", "digits", round=4, attempt=1)
ledger.note_signed_ms(77)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    with Ledger(path) as ledger:
        assert ledger.rows() == [RELEASE]
        assert ledger.last_round("clinic", "digits") == (4, 1)
        assert ledger.last_signed_ms() == 77


def test_it_waits_for_the_disk(ledger: Ledger) -> None:
    """synchronous = FULL (2): a commit returns when the write-ahead log is on the disk."""
    assert ledger._database.execute("PRAGMA synchronous").fetchone() == (2,)


def test_is_private(ledger: Ledger, path: Path) -> None:
    ledger.note_signed_ms(1)
    for file in path.parent.glob("ledger.sqlite*"):
        assert file.stat().st_mode & 0o077 == 0, file


class TestSpend:
    def test_counts_per_plan_and_state_whatever_became_of_it(self, ledger: Ledger) -> None:
        ledger.spend(replace(RELEASE, session=session(1)), max_releases_per_state=2)
        ledger.settle(session(1), "abandoned")
        ledger.spend(replace(RELEASE, session=session(2)), max_releases_per_state=2)
        assert ledger.releases_of_state(RELEASE.plan, RELEASE.state) == 2
        with pytest.raises(PolicyRefusal, match="2 times") as refusal:
            ledger.spend(replace(RELEASE, session=session(3)), max_releases_per_state=2)
        assert refusal.value.rule == "max_releases_per_state"
        assert len(ledger.rows()) == 2
        for other in ({"state": b"t" * 32}, {"plan": b"q" * 32}):
            ledger.spend(replace(RELEASE, session=os.urandom(32), **other), max_releases_per_state=2)

    def test_never_twice_in_one_session(self, ledger: Ledger) -> None:
        ledger.spend(RELEASE, max_releases_per_state=9)
        with pytest.raises(Replayed, match="never sent twice"):
            ledger.spend(replace(RELEASE, state=b"t" * 32), max_releases_per_state=9)
        assert ledger.rows() == [RELEASE]

    def test_two_processes_cannot_both_take_the_last_one(self, path: Path) -> None:
        with Ledger(path) as one, Ledger(path) as two:
            one.spend(replace(RELEASE, session=session(1)), max_releases_per_state=1)
            with pytest.raises(PolicyRefusal):
                two.spend(replace(RELEASE, session=session(2)), max_releases_per_state=1)

    def test_counts_only_what_may_have_held_an_example_that_is_still_used(self, ledger: Ledger) -> None:
        for number, newest in ((1, 10), (2, 20)):
            ledger.spend(replace(RELEASE, session=session(number), newest_example=newest), max_releases_per_state=2)
        counted = {
            oldest: ledger.releases_of_state(RELEASE.plan, RELEASE.state, oldest_example=oldest)
            for oldest in (1, 10, 11, 20, 21)
        }
        assert counted == {1: 2, 10: 2, 11: 1, 20: 1, 21: 0}
        third = replace(RELEASE, session=session(3), newest_example=30)
        with pytest.raises(PolicyRefusal):
            ledger.spend(third, max_releases_per_state=2, oldest_example=10)
        ledger.spend(third, max_releases_per_state=2, oldest_example=11)
        assert ledger.rows()[0] == third


class TestParticipation:
    def plan(self, terms: ParticipationTerms, **changes: object) -> Plan:
        privacy = PrivacyTerms(purpose="x", minimum_cohort=3, weight_cap=1, participation=terms)
        made = Plan(
            fleet="clinic",
            name="digits",
            collection="digits",
            program=blob_ref(b""),
            work=LocalWork(),
            aggregations=(),
            privacy=privacy,
        )
        return msgspec.structs.replace(made, **changes)

    def test_the_last_release_of_a_plan_name_is_remembered_across_restarts(self, ledger: Ledger, path: Path) -> None:
        assert ledger.last_release("clinic", "digits") is None
        for n, round_ in enumerate((4, 5)):
            ledger.spend(replace(RELEASE, session=session(n), round=round_), max_releases_per_state=9)
        with Ledger(path) as again:
            assert again.last_release("clinic", "digits") == (5, RELEASE.at_unix_s)
            assert again.last_release("school", "digits") is None
            assert again.last_release("clinic", "steps") is None

    @pytest.mark.parametrize("outcome", ["committed", "abandoned", "unknown", None])
    def test_nothing_leaves_a_second_time_for_another_plan_of_that_name(self, path: Path, outcome) -> None:
        once = ParticipationTerms(once=True)
        with Ledger(path) as ledger:
            ledger.spend(RELEASE, max_releases_per_state=9, plan=self.plan(once))
            if outcome:
                ledger.settle(RELEASE.session, outcome)
        other = replace(RELEASE, plan=b"q" * 32, state=b"t" * 32, round=5, session=session(5), at_unix_s=4e9)
        with Ledger(path) as again:
            with pytest.raises(PolicyRefusal, match="asks once, and was answered in round 4") as refusal:
                again.spend(other, max_releases_per_state=9, plan=self.plan(once, collection="other"))
            assert refusal.value.rule == "participation"
            assert again.rows()[1:] == []

    def test_every_so_many_days(self, ledger: Ledger) -> None:
        plan = self.plan(ParticipationTerms(every_days=2))
        ledger.spend(RELEASE, max_releases_per_state=9, plan=plan)
        later = replace(RELEASE, round=5, session=session(5), at_unix_s=RELEASE.at_unix_s + 2 * 86_400 - 1)
        with pytest.raises(PolicyRefusal, match="too early"):
            ledger.spend(later, max_releases_per_state=9, plan=plan)
        ledger.spend(replace(later, at_unix_s=later.at_unix_s + 1), max_releases_per_state=9, plan=plan)
        assert len(ledger.rows()) == 2


class TestSettle:
    @pytest.mark.parametrize("outcome", ["committed", "abandoned", "unknown"])
    def test_writes_the_outcome_and_may_be_said_again(self, ledger: Ledger, outcome) -> None:
        ledger.spend(RELEASE, max_releases_per_state=2)
        ledger.settle(RELEASE.session, outcome)
        ledger.settle(RELEASE.session, outcome)
        assert ledger.rows() == [replace(RELEASE, status=outcome)]
        assert bool(ledger.unsettled()) == (outcome == "unknown")

    def test_the_unknown_may_become_known(self, ledger: Ledger) -> None:
        ledger.spend(RELEASE, max_releases_per_state=2)
        ledger.settle(RELEASE.session, "unknown")
        ledger.settle(RELEASE.session, "committed")
        assert ledger.rows()[0].status == "committed"

    @pytest.mark.parametrize(("first", "second"), [("committed", "abandoned"), ("abandoned", "unknown")])
    def test_an_outcome_stays(self, ledger: Ledger, first, second) -> None:
        ledger.spend(RELEASE, max_releases_per_state=2)
        ledger.settle(RELEASE.session, first)
        with pytest.raises(LocalProtocolError, match=f"it is {first}"):
            ledger.settle(RELEASE.session, second)
        assert ledger.rows()[0].status == first

    def test_of_nothing_is_a_bug(self, ledger: Ledger) -> None:
        with pytest.raises(LocalProtocolError, match="nothing was spent"):
            ledger.settle(session(5), "committed")


def test_rows_are_newest_first_and_can_be_limited(ledger: Ledger) -> None:
    for n in range(5):
        ledger.spend(replace(RELEASE, session=session(n), round=n), max_releases_per_state=9)
    assert [row.round for row in ledger.rows()] == [4, 3, 2, 1, 0]
    assert [row.round for row in ledger.rows(limit=2)] == [4, 3]
    ledger.settle(session(1), "committed")
    assert [row.round for row in ledger.unsettled()] == [0, 2, 3, 4]


class TestRounds:
    def test_only_grow(self, ledger: Ledger, path: Path) -> None:
        assert ledger.last_round("clinic", "digits") is None
        assert ledger.advance_round("clinic", "digits", round=0, attempt=0)
        assert not ledger.advance_round("clinic", "digits", round=0, attempt=0)
        assert ledger.advance_round("clinic", "digits", round=3, attempt=2)
        for old in ((3, 1), (2, 9), (0, 0)):
            with pytest.raises(Replayed, match="has reached round 3 attempt 2"):
                ledger.advance_round("clinic", "digits", round=old[0], attempt=old[1])
        with Ledger(path) as again:
            assert again.last_round("clinic", "digits") == (3, 2)
        assert ledger.advance_round("clinic", "digits", round=4, attempt=0)

    def test_are_counted_per_fleet_and_plan(self, ledger: Ledger) -> None:
        ledger.advance_round("clinic", "digits", round=9, attempt=0)
        assert ledger.advance_round("clinic", "steps", round=1, attempt=0)
        assert ledger.advance_round("school", "digits", round=1, attempt=0)
        assert ledger.last_round("clinic", "digits") == (9, 0)


def test_signed_time_only_grows(ledger: Ledger, path: Path) -> None:
    assert ledger.last_signed_ms() == 0
    for now_ms in (5_000, 9_000, 7_000):
        ledger.note_signed_ms(now_ms)
    with Ledger(path) as again:
        assert again.last_signed_ms() == 9_000


class TestFile:
    def test_of_another_kind_is_refused_and_kept(self, path: Path) -> None:
        path.write_bytes(b"this is no database at all, but somebody's text" * 100)
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=r"ledger\.sqlite cannot be used"):
            Ledger(path)
        assert path.read_bytes() == before

    def test_of_a_newer_release_is_refused(self, path: Path) -> None:
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        with pytest.raises(ConfigError, match="schema 99, this release knows 2"):
            Ledger(path)

    def test_of_the_release_before_is_taken_over_and_its_rows_count_for_ever(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.spend(RELEASE, max_releases_per_state=2)
        with sqlite3.connect(path) as database:
            database.execute("ALTER TABLE release DROP COLUMN newest_example")
            database.execute("PRAGMA user_version = 1")
        database.close()
        with Ledger(path) as ledger:
            assert ledger.rows() == [RELEASE]
            assert ledger.releases_of_state(RELEASE.plan, RELEASE.state, oldest_example=2**40) == 1

    def test_in_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot open"):
            Ledger(tmp_path / "no" / "ledger.sqlite")

    def test_that_cannot_be_written_says_so(self, ledger: Ledger) -> None:
        ledger._database.execute("PRAGMA query_only = ON")
        with pytest.raises(ConfigError, match="cannot be written"):
            ledger.spend(RELEASE, max_releases_per_state=2)
        assert ledger.rows() == []
