"""What programs keep on a device: a value changes by the outcome of its own round only, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.client_states import ClientStates, Slot, forget_client_states, kept_slots
from edge_agent.effects import NextClientState, RoundId
from sottovoce.bundle import ClientState, Port
from sottovoce.errors import PolicyRefusal, ProgramError
from sottovoce.tensors import encode_tensors

ROOT = Path(__file__).resolve().parents[2]
ROUND = RoundId(announcement=b"a" * 32, coordinator="coordinator", round=3, attempt=1)


def content(number: float) -> bytes:
    return encode_tensors({"total": np.array([number, -number], np.float32)})


def slot(**changes: Any) -> ClientState:
    chosen: dict[str, Any] = {
        "slot": "control",
        "version": 1,
        "ports": (Port(name="total", type="float32[2]"),),
        "initial": content(0),
        "maximum_bytes": 1000,
    }
    return ClientState(**{**chosen, **changes})


def computed(number: float, base: str, **changes: Any) -> NextClientState:
    chosen: dict[str, Any] = {
        "slot": "control",
        "version": 1,
        "types": slot().types,
        "plan_name": "digits",
        "collection": "digits",
        "base": base,
        "content": content(number),
    }
    return NextClientState(**{**chosen, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "client_states.sqlite"


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def open_store(path: Path, motionless_world: Any, lines: list[str]) -> Iterator[Callable[..., ClientStates]]:
    opened: list[ClientStates] = []

    def open_it(*, maximum_bytes: int = 1000, identity: Any = None) -> ClientStates:
        mine = identity or motionless_world.setup("pi-0").identity
        opened.append(ClientStates(path, mine, maximum_bytes=maximum_bytes, entropy=os.urandom, log=lines.append))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., ClientStates]) -> ClientStates:
    return open_store()


@pytest.fixture
def plan(motionless_world: Any) -> Any:
    return motionless_world.coordinator.plan


def total(store: ClientStates, plan: Any, **changes: Any) -> float:
    return float(store.take_up(slot(**changes), plan).values["total"][0])


def commit(store: ClientStates, plan: Any, number: float, round_: RoundId = ROUND, **changes: Any) -> None:
    kept = {name: changes[name] for name in ("slot", "version") if name in changes}
    base = store.take_up(slot(**kept), plan).base
    store.hold(round_, computed(number, base, **changes))
    store.settle(round_, survived=True)


def test_a_slot_begins_with_the_programs_initial_value(store: ClientStates, plan: Any) -> None:
    assert total(store, plan) == 0
    assert total(store, plan, initial=content(9)) == 9


def test_what_is_held_is_read_only_after_the_outcome(open_store: Any, store: ClientStates, plan: Any) -> None:
    store.hold(ROUND, computed(5, store.take_up(slot(), plan).base))
    assert kept_slots(store_path(store)) == []
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 5
    store.close()
    assert total(open_store(), plan) == 5


def store_path(store: ClientStates) -> Path:
    return Path(store._database.execute("PRAGMA database_list").fetchone()[2])


def test_who_is_no_survivor_keeps_the_old_value(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5)
    store.hold(ROUND, computed(7, store.take_up(slot(), plan).base))
    store.settle(ROUND, survived=False)
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 5


@pytest.mark.parametrize(
    "changes",
    [{"announcement": b"b" * 32}, {"coordinator": "another"}, {"round": 4}, {"attempt": 0}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_outcome_of_another_round_changes_nothing(store: ClientStates, plan: Any, changes: dict[str, Any]) -> None:
    store.hold(ROUND, computed(5, store.take_up(slot(), plan).base))
    for survived in (True, False):
        store.settle(dataclasses.replace(ROUND, **changes), survived=survived)
    assert kept_slots(store_path(store)) == []
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 5


def test_an_outcome_that_is_heard_again_changes_nothing(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5)
    later = dataclasses.replace(ROUND, announcement=b"l" * 32, round=4)
    commit(store, plan, 6, later)
    store.settle(ROUND, survived=True)
    store.settle(later, survived=False)
    assert total(store, plan) == 6


def test_work_that_begins_drops_what_was_held_for_a_round_that_was_not_heard_to_end(
    store: ClientStates, plan: Any, lines: list[str]
) -> None:
    store.hold(ROUND, computed(5, store.take_up(slot(), plan).base))
    assert total(store, plan) == 0
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 0
    assert "has not been heard to end" in lines[0]


def test_another_version_begins_anew_and_takes_the_place(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5)
    assert total(store, plan, version=2) == 0
    assert total(store, plan) == 5
    commit(store, plan, 8, version=2)
    assert total(store, plan, version=2) == 8
    assert total(store, plan) == 0


def test_plans_share_a_slot_of_one_name_version_and_type(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5, plan_name="first")
    assert total(store, msgspec.structs.replace(plan, name="second")) == 5


def test_plans_that_disagree_about_a_slot_are_both_named(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5, plan_name="first")
    other = slot(
        ports=(Port(name="total", type="float32[3]"),), initial=encode_tensors({"total": np.zeros(3, np.float32)})
    )
    with pytest.raises(
        ProgramError, match=r"'first' and 'second' both name client state 'control', version 1"
    ) as error:
        store.take_up(other, msgspec.structs.replace(plan, name="second"))
    assert "total float32[2]" in str(error.value)
    assert "total float32[3]" in str(error.value)
    assert total(store, plan) == 5


def test_the_owner_limits_all_slots_together(open_store: Any, plan: Any) -> None:
    size = len(content(0))
    store = open_store(maximum_bytes=2 * size)
    for name in ("one", "two"):
        commit(store, plan, 1, slot=name)
    assert total(store, plan, slot="two") == 1
    with pytest.raises(PolicyRefusal, match=f"takes {size} bytes, with what is kept already {3 * size}") as refusal:
        store.take_up(slot(slot="three"), plan)
    assert refusal.value.rule == "max_client_state_bytes"
    assert total(open_store(maximum_bytes=3 * size), plan, slot="three") == 0
    with pytest.raises(PolicyRefusal):
        open_store(maximum_bytes=0).take_up(slot(slot="one"), plan)


def test_a_value_computed_from_another_one_than_the_kept_is_not_held(
    store: ClientStates, plan: Any, lines: list[str]
) -> None:
    before = store.take_up(slot(), plan).base
    commit(store, plan, 5)
    assert not store.take_up_again(computed(7, before))
    store.hold(ROUND, computed(7, before))
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 5
    assert any("erased or changed meanwhile" in line for line in lines)
    assert store.take_up_again(computed(7, store.take_up(slot(), plan).base))


def test_nothing_on_the_disk_is_readable(store: ClientStates, plan: Any, path: Path) -> None:
    commit(store, plan, 12345.678)
    store.hold(ROUND, computed(12345.678, store.take_up(slot(), plan).base))
    written = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert np.float32(12345.678).tobytes() not in written
    assert b"control" in written
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.parent.iterdir())


def test_a_value_that_cannot_be_opened_begins_anew(
    open_store: Any, store: ClientStates, plan: Any, world: Any, lines: list[str]
) -> None:
    commit(store, plan, 5)
    world.enrol("pi-0", examples={})
    stranger = open_store(identity=world.setup("pi-0").identity)
    assert total(stranger, plan) == 0
    assert any("begins anew" in line for line in lines)
    assert kept_slots(store_path(store)) == []


def test_a_sealed_value_is_not_believed_in_another_slot(store: ClientStates, plan: Any) -> None:
    commit(store, plan, 5)
    commit(store, plan, 6, slot="other")
    store._database.execute("UPDATE kept SET sealed = (SELECT sealed FROM kept WHERE slot = 'other')")
    assert total(store, plan, slot="other") == 6
    assert total(store, plan) == 0


# --- the owner --------------------------------------------------------------------------------------------------------


def test_the_owner_sees_what_is_kept(store: ClientStates, plan: Any, path: Path) -> None:
    commit(store, plan, 5)
    assert kept_slots(path) == [
        Slot(
            slot="control",
            version=1,
            types="total float32[2]",
            plan_name="digits",
            collections=("digits",),
            bytes=len(content(0)),
            round=3,
        )
    ]


def test_a_value_remembers_every_collection_it_was_computed_from(store: ClientStates, plan: Any, path: Path) -> None:
    commit(store, plan, 5, collection="steps")
    commit(store, plan, 6, collection="heart")
    assert kept_slots(path)[0].collections == ("heart", "steps")
    assert forget_client_states(path, collection="digits") == []
    assert forget_client_states(path, collection="steps") == ["control"]
    assert total(store, plan) == 0


def test_forgetting_one_slot_leaves_the_others(store: ClientStates, plan: Any, path: Path) -> None:
    for name in ("one", "two"):
        commit(store, plan, 1, slot=name)
    assert forget_client_states(path, slot="one") == ["one"]
    assert [each.slot for each in kept_slots(path)] == ["two"]
    assert forget_client_states(path) == ["two"]
    assert kept_slots(path) == []


def test_what_was_forgotten_does_not_come_back_from_a_round_that_is_under_way(
    store: ClientStates, plan: Any, path: Path
) -> None:
    base = store.take_up(slot(), plan).base
    forget_client_states(path)
    store.hold(ROUND, computed(5, base))
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 0

    store.hold(ROUND, computed(5, store.take_up(slot(), plan).base))
    assert forget_client_states(path, slot="control") == ["control"]
    store.settle(ROUND, survived=True)
    assert total(store, plan) == 0


# --- kills ------------------------------------------------------------------------------------------------------------

_CHILD = """
import os, signal, sys
from datetime import datetime, UTC
from pathlib import Path
from edge_agent.client_states import ClientStates
from edge_agent.home import Home, load_identity
from test_client_states import ROUND, computed, slot
home, at = Home(Path(sys.argv[1])), datetime.fromisoformat(sys.argv[2])
store = ClientStates(
    home.client_states, load_identity(home, at), maximum_bytes=1000, entropy=os.urandom, log=lambda line: None
)
left = [int(sys.argv[4])]
def count(statement):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
store._database.set_trace_callback(count)
if sys.argv[3] == "hold":
    store.hold(ROUND, computed(8, sys.argv[5]))
else:
    store.settle(ROUND, survived=sys.argv[3] == "keep")
"""


@pytest.mark.parametrize(("step", "after"), [("hold", None), ("keep", 8.0), ("drop", 5.0)])
def test_a_kill_at_any_statement_leaves_the_old_value_or_the_new_one(
    motionless_world: Any, step: str, after: float | None
) -> None:
    """A process is really killed (SIGKILL) before its first, second, ... statement, until one is not killed."""
    world, plan = motionless_world, motionless_world.coordinator.plan
    home, identity = world.homes["pi-0"], world.setup("pi-0").identity
    kills = 0
    while True:
        forget_client_states(home.client_states)
        store = ClientStates(home.client_states, identity, maximum_bytes=1000, entropy=os.urandom, log=print)
        commit(store, plan, 5)
        base = store.take_up(slot(), plan).base
        if step != "hold":
            store.hold(ROUND, computed(8, base))
        store.close()
        killed = run_child(str(home.path), world.at.isoformat(), step, str(kills), base)

        store = ClientStates(home.client_states, identity, maximum_bytes=1000, entropy=os.urandom, log=print)
        held = store._database.execute("SELECT count(*) FROM held").fetchone()[0]
        (kept,) = kept_slots(home.client_states)
        assert kept.round == 3
        if step == "hold":
            # The outcome decides, whatever the kill left behind.
            store.settle(ROUND, survived=True)
            assert total(store, plan) == (8 if held else 5)
        else:
            # The retained outcome is heard again after the restart.
            store.settle(ROUND, survived=step == "keep")
            assert total(store, plan) == after
        store.close()
        if not killed:
            break
        kills += 1
    assert kills >= 3, "BEGIN, at least one change, COMMIT"


def run_child(*arguments: str) -> bool:
    """Return whether the child was killed; anything but that or success fails the test."""
    search = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    child = subprocess.run([sys.executable, "-c", _CHILD, *arguments], env={**os.environ, "PYTHONPATH": search})
    assert child.returncode in (0, -signal.SIGKILL)
    return child.returncode != 0
