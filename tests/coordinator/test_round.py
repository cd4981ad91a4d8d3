"""Whole rounds in memory: the real machine, real secure aggregation, scripted devices, a clock the test moves."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from round_bench import Bench, MakeBench

from coordinator.phases import (
    Abandoned,
    CohortSelected,
    Committed,
    Configuration,
    RendezvousOpened,
    Reporting,
    Selection,
    Send,
    StageOpened,
)
from coordinator.round import ADVANCES, STEPS
from sottovoce.errors import UnexpectedMessage
from sottovoce.plan import LaneName, Quantised
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.messages import (
    DEVICE_MESSAGES,
    AdvertiseKeys,
    AdvertiseKeysRequest,
    CheckIn,
    MaskedInput,
    Message,
    Ready,
    Selected,
    ShareKeys,
    Status,
    SurvivorsRequest,
    SurvivorsSignature,
    TaggedVector,
    Unmasking,
    Withdraw,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "coordinator.md"


def test_a_round_ends_with_the_weighted_mean_of_everybody(bench: MakeBench) -> None:
    b = bench(6)
    for number, device in enumerate(b.devices.values()):
        device.weight = 2 * number + 1
    b.check_in()
    assert b.committed.survivors == frozenset(b.devices)
    assert b.committed.aggregate.weight == 1 + 3 + 5 + 7 + 9 + 10
    mean = b.committed.aggregate.mean("delta")[0]
    np.testing.assert_allclose(mean, b.expected_mean(sorted(b.devices)), atol=2e-4)
    assert b.committed.aggregate.sums["correct"][0][0] == 1 + 2 + 3 + 4 + 5 + 6
    assert b.committed.dropped == {}
    assert b.refused == []
    kinds = [type(effect) for effect in b.effects if not isinstance(effect, Send)]
    assert kinds == [CohortSelected, RendezvousOpened, *[StageOpened] * 5, Committed]
    stages = [effect.stage for effect in b.effects if isinstance(effect, StageOpened)]
    assert stages == ["advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking"]


@pytest.mark.parametrize(("lane", "bits"), [("uint16", 13), ("3x21", 18), ("dense", 16)])
def test_a_round_has_the_same_end_in_every_lane(bench: MakeBench, lane: LaneName, bits: int) -> None:
    plan = bench(6).plan
    delta, correct = plan.aggregations
    delta = replace(delta, lane=lane, encoding=Quantised(half_range=1.0, bits=bits))
    b = bench(6, plan=replace(plan, aggregations=(delta, correct)))
    b.check_in()
    assert b.committed.survivors == frozenset(b.devices)
    mean = b.committed.aggregate.mean("delta")[0]
    weight = sum(min(device.weight, 10) for device in b.devices.values())
    np.testing.assert_allclose(mean, b.expected_mean(sorted(b.devices)), atol=2 / (2**bits - 1) * 6 * 10 / weight)
    assert b.committed.aggregate.sums["correct"][0][0] == 1 + 2 + 3 + 4 + 5 + 6


def test_curious_mode_has_no_consistency_check(bench: MakeBench) -> None:
    b = bench(4, mode="curious")
    b.check_in()
    assert len(b.committed.survivors) == 4
    assert b.sent(SurvivorsRequest) == []


# --- the machine ------------------------------------------------------------------------------------------------------

_PHASES = ("selection", "configuration", "reporting", "committed", "abandoned")
_PHASE_TYPES = {
    "selection": Selection,
    "configuration": Configuration,
    "reporting": Reporting,
    "committed": Committed,
    "abandoned": Abandoned,
}
_PHASE_NAMES = {phase.__name__ for phase in _PHASE_TYPES.values()}


def _bench_in(bench: MakeBench, phase: str) -> Bench:
    b = bench(4)
    if phase == "selection":
        return b
    for device in b.devices.values():
        device.silent_at = {"configuration": Selected, "reporting": AdvertiseKeysRequest}.get(phase)
    b.check_in()
    if phase == "abandoned":
        return _abandon(bench(4))
    assert type(b.round.phase) is _PHASE_TYPES[phase]
    return b


def _abandon(b: Bench) -> Bench:
    b.perform(b.round.abandon("test"))
    return b


def _message(b: Bench, kind: type[Message]) -> Message:
    device = b.devices["pi-00"]
    blank = bytes(32)
    certificate = device.identity.certificate.der
    examples: dict[type[Message], Message] = {
        Status: Status(online=True, version="1"),
        CheckIn: device.check_in(),
        Ready: Ready(present=True),
        Withdraw: Withdraw(code="policy"),
        AdvertiseKeys: AdvertiseKeys(certificate, blank, blank, blank, blank, blank, blank),
        ShareKeys: ShareKeys(blank, b""),
        MaskedInput: MaskedInput(vector=TaggedVector(size=8, chunk_bytes=8, tags=bytes(16))),
        SurvivorsSignature: SurvivorsSignature(blank),
        Unmasking: Unmasking(b""),
    }
    return examples[kind]


@pytest.mark.parametrize(("phase", "kind"), list(itertools.product(_PHASES, DEVICE_MESSAGES)))
def test_what_is_not_in_the_table_is_refused_and_changes_nothing(
    bench: MakeBench, phase: str, kind: type[Message]
) -> None:
    b = _bench_in(bench, phase)
    before = b.round.phase
    if (_PHASE_TYPES[phase], kind) in STEPS:
        return
    with pytest.raises(UnexpectedMessage):
        b.round.receive(b.opened("pi-00", _message(b, kind)), b.now_ms)
    assert b.round.phase is before


def test_the_table_covers_every_phase_and_every_running_phase_can_move_on() -> None:
    assert {phase for phase, _ in STEPS} == set(_PHASE_TYPES.values())
    assert set(ADVANCES) == {Selection, Configuration, Reporting}


def test_the_table_in_the_documentation_is_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = {phase: set(re.findall(r"\w+", names)) for phase, names in rows if phase in _PHASE_NAMES}
    assert documented == {
        phase.__name__: {kind.__name__ for each, kind in STEPS if each is phase} for phase in _PHASE_TYPES.values()
    }


def test_chunks_are_refused_outside_a_rendezvous(bench: MakeBench) -> None:
    for phase in ("selection", "configuration", "committed", "abandoned"):
        b = _bench_in(bench, phase)
        with pytest.raises(UnexpectedMessage):
            b.round.receive_chunk("pi-00", VectorChunk(bytes(32), 0, b"x"), b.now_ms)


def test_a_round_can_be_abandoned_from_outside_at_any_time(bench: MakeBench) -> None:
    for phase in ("selection", "configuration", "reporting"):
        b = _abandon(_bench_in(bench, phase))
        assert b.abandoned.reason == "test"
        assert b.round.abandon("again") == []
