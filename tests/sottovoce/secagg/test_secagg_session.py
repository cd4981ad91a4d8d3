"""Whole sessions: the unmasked sum is the plain sum of the survivors, or nothing is revealed."""

from __future__ import annotations

import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.errors import LocalProtocolError, PolicyRefusal, RoundAbandoned
from sottovoce.secagg.client import ClientTerms
from sottovoce.secagg.client_stages import InputMasked
from sottovoce.secagg.mask_removal import Spread
from sottovoce.secagg.server import STAGE_NAMES
from sottovoce.secagg.server_stages import Abandoned, Unmasked
from sottovoce.wire.messages import MaskedInput, SurvivorsSignature, Unmasking

ORDER = ["advertise_keys", "share_keys", "masked_input", "consistency_check", "unmasking"]

REASONS = {"consistency_check": "too_few_signatures", "unmasking": "too_few_shares"}


def needed_shares(mode: str, members: int) -> int:
    """The threshold by PROTOCOL.md, written down a second time; gamma is 5 % here."""
    corrupt = max(1, math.ceil(members * 0.05 - 1e-9))
    return math.floor((members + corrupt) / 2) + 1 if mode == "active" else max(2, corrupt + 1, math.ceil(members / 2))


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    """A cohort and, per device, the stage in which it vanishes (or none)."""
    members = draw(st.integers(3, 12) | st.integers(3, 40))
    reliable = draw(st.sampled_from([1.0, 0.95, 0.8, 0.5]))
    dice = random.Random(draw(st.integers(0, 2**32)))
    leaves = [dice.choice(ORDER) if dice.random() > reliable else None for _ in range(members)]
    return {
        "leaves": leaves,
        "mode": draw(st.sampled_from(["active", "curious"])),
        "cipher": draw(st.sampled_from(["aes-128-ctr", "chacha20"])),
        "seed": dice.randrange(2**20),
    }


def expected_outcome(mode: str, leaves: list[str | None]) -> tuple[str | None, set[int]]:
    """Which stage must abandon the round (or None), and who is in the sum if it does not."""
    alive = {index for index, stage in enumerate(leaves) if stage != "advertise_keys"}
    members, summed = len(alive), set[int]()
    for stage in ORDER:
        if stage == "consistency_check" and mode == "curious":
            alive = {index for index in alive if leaves[index] != stage}
            continue
        alive = {index for index in alive if leaves[index] != stage}
        threshold = needed_shares(mode, members)
        minimum = threshold if stage == "unmasking" else threshold + (mode == "active")
        if len(alive) < max(minimum, 0 if stage in ORDER[3:] else 3):
            return stage, set()
        if stage == "masked_input":
            summed = set(alive)
    return None, summed


def perform(rehearsal: Any, leaves: list[str | None], dice: random.Random) -> None:
    """Run the session with redelivered, reordered and delayed messages on both sides."""
    late: list[tuple[str, Any, bytes]] = []
    asked: dict[str, list[Any]] = {device: [] for device in rehearsal.devices}
    gone: set[str] = set()
    requests: dict[str, Any] = {}
    while not isinstance(rehearsal.server.stage, Unmasked):
        stage = rehearsal.stage_name
        for device, leaving in zip(rehearsal.devices, leaves, strict=True):
            # In curious mode there is no consistency check: who would vanish there vanishes before unmasking.
            if leaving == stage or (leaving == "consistency_check" and stage == "unmasking"):
                gone.add(device)
        if stage == "advertise_keys":
            pending = [(device, None) for device in rehearsal.devices if device not in gone]
        else:
            pending = [(device, request) for device, request in requests.items() if device not in gone]
        deliveries = pending + dice.sample(pending, len(pending) // 3)
        dice.shuffle(deliveries)
        for device, request in deliveries:
            if request is None:
                rehearsal.advertise([device])
                late.append((device, rehearsal.clients[device].advertise(), bytes(32)))
                continue
            first = rehearsal.answer(device, request)
            assert rehearsal.clients[device].receive(request) is first
            asked[device].append(request)
            late.append((device, first, rehearsal.clients[device].session_id))
            old = dice.choice(asked[device])
            rehearsal.clients[device].receive(old)
        for device, message, session in dice.sample(late, len(late) // 4):
            assert rehearsal.server.receive(rehearsal.opened(device, message, session=session)) == []
        assert rehearsal.server.waiting_for() <= gone
        requests = rehearsal.close()


@settings(max_examples=30)
@given(schedules())
def test_the_sum_is_exact_or_the_round_reveals_nothing(fleet: Any, schedule: dict[str, Any]) -> None:
    leaves, mode = schedule["leaves"], schedule["mode"]
    parameters = fleet.parameters(mode=mode, cipher=schedule["cipher"])
    rehearsal = fleet.rehearse(len(leaves), seed=schedule["seed"], parameters=parameters)
    ending, summed = expected_outcome(mode, leaves)
    dice = random.Random(schedule["seed"])
    if ending is None:
        perform(rehearsal, leaves, dice)
        names = tuple(rehearsal.devices[index] for index in sorted(summed))
        assert rehearsal.server.survivors == names
        assert bytes(rehearsal.server.result) == rehearsal.plain_sum(names)
    else:
        with pytest.raises(RoundAbandoned):
            perform(rehearsal, leaves, dice)
        assert [*rehearsal.server.dropped][-1] == ending
        assert isinstance(rehearsal.server.stage, Abandoned)
        with pytest.raises(LocalProtocolError):
            _ = rehearsal.server.result
    assert_never_both_kinds(rehearsal, abandoned=ending is not None)


def assert_never_both_kinds(rehearsal: Any, *, abandoned: bool) -> None:
    """Nobody's seed and mask key were both asked for; in an abandoned round not even one of them can be rebuilt."""
    seeds: Counter[int] = Counter()
    mask_keys: Counter[int] = Counter()
    given_by = dict(rehearsal.shares_given())
    for device, message in given_by.items():
        kinds = rehearsal.kinds_given(device, message)
        seeds.update(owner for owner, kind in kinds.items() if kind == "self_seed")
        mask_keys.update(owner for owner, kind in kinds.items() if kind == "mask_key")
    assert not seeds.keys() & mask_keys.keys()
    if abandoned and given_by:
        members = len(rehearsal.requests[next(iter(given_by))][0].message.leaves) // 32
        threshold = needed_shares(rehearsal.server._agreement.parameters.mode, members)
        assert max((seeds + mask_keys).values()) < threshold


@pytest.mark.parametrize(
    ("mode", "stage"),
    [("active", stage) for stage in ORDER[1:]] + [("curious", stage) for stage in ORDER[1:] if stage != ORDER[3]],
)
def test_down_to_the_threshold_the_sum_is_exact_and_one_less_abandons(fleet: Any, mode: str, stage: str) -> None:
    """Twelve devices: t is 7 (active; 8 must stay until the last stage) or 6 (curious)."""
    enough = needed_shares(mode, 12) + (mode == "active" and stage != "unmasking")
    for present in (enough, enough - 1, 0):
        rehearsal = fleet.rehearse(12, parameters=fleet.parameters(mode=mode))
        silent = {stage: rehearsal.devices[present:]}
        if present == enough:
            rehearsal.run_until(Unmasked, silent=silent)
            assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.server.survivors)
            continue
        with pytest.raises(RoundAbandoned) as caught:
            rehearsal.run_until(Unmasked, silent=silent)
        assert caught.value.reason == REASONS.get(stage, "too_few_devices")
        assert rehearsal.server.stage == Abandoned(caught.value.reason)
        assert_never_both_kinds(rehearsal, abandoned=True)


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_dropouts_are_named_by_the_stage_they_missed(fleet: Any, mode: str) -> None:
    rehearsal = fleet.rehearse(14, parameters=fleet.parameters(mode=mode))
    silent = {stage: [rehearsal.devices[index]] for index, stage in enumerate(ORDER)}
    rehearsal.run_until(Unmasked, silent=silent)
    expected = {stage: devices for stage, devices in silent.items() if mode == "active" or stage != ORDER[3]}
    if mode == "active":
        expected["unmasking"] = [rehearsal.devices[4]]
    assert rehearsal.server.dropped == expected
    assert rehearsal.server.survivors == tuple(rehearsal.devices[3:])
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[3:])


def test_requests_can_be_asked_for_again_after_a_reconnect(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    assert [reply.device for reply in rehearsal.server.outstanding()] == rehearsal.devices
    rehearsal.advertise(rehearsal.devices)
    assert rehearsal.server.outstanding() == []
    requests = rehearsal.close()
    first = rehearsal.devices[0]
    rehearsal.answer(first, requests[first])
    outstanding = rehearsal.server.outstanding()
    assert [reply.device for reply in outstanding] == rehearsal.devices[1:]
    assert all(reply.message == requests[reply.device] and reply.session == bytes(32) for reply in outstanding)


def test_the_session_id_is_the_same_on_both_sides_and_unknown_before_the_roster(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    client = rehearsal.clients[rehearsal.devices[0]]
    assert rehearsal.server.session_id == client.session_id == bytes(32)
    rehearsal.advertise(rehearsal.devices)
    requests = rehearsal.close()
    rehearsal.answer(rehearsal.devices[0], requests[rehearsal.devices[0]])
    assert rehearsal.server.session_id == client.session_id != bytes(32)


def test_the_plain_vector_is_gone_once_it_is_masked(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    device = rehearsal.devices[0]
    client = rehearsal.clients[device]
    handed_over = client.stage.vector
    for stage_name in ("share_keys", "masked_input"):
        assert client.masked_vector is None
        rehearsal.run_until(next(kind for kind, name in STAGE_NAMES.items() if name == stage_name))
        if stage_name == "share_keys":
            assert bytes(handed_over) == rehearsal.plain[device]
    requests = {reply.device: reply.message for reply in rehearsal.server.outstanding()}
    announced = rehearsal.answer(device, requests[device], upload=False)
    assert isinstance(announced, MaskedInput)
    assert client.masked_vector is handed_over
    assert bytes(handed_over) != rehearsal.plain[device]
    masked = bytes(handed_over)
    rehearsal.upload(device)
    for other in rehearsal.devices[1:]:
        rehearsal.answer(other, requests[other])
    rehearsal.run_until(Unmasked)
    assert client.masked_vector is None
    assert masked != rehearsal.plain[device]


def test_a_client_answers_a_repeated_request_with_the_same_bytes_to_the_end(fleet: Any) -> None:
    rehearsal = fleet.rehearse(6)
    rehearsal.run_until(Unmasked)
    for device in rehearsal.devices:
        client = rehearsal.clients[device]
        for reply, answer in zip(rehearsal.requests[device], rehearsal.answers[device][1:], strict=True):
            assert client.receive(reply.message) is answer
        kinds = [type(answer) for answer in rehearsal.answers[device]]
        assert kinds[-2:] == [SurvivorsSignature, Unmasking]
        assert client.advertise() is rehearsal.answers[device][0]


def test_the_owners_minimum_ends_the_session_before_anything_is_masked(fleet: Any) -> None:
    rehearsal = fleet.rehearse(9)
    device = rehearsal.devices[0]
    vector = bytearray(rehearsal.plain[device])
    rehearsal.clients[device] = fleet.client(
        device, vector, terms=ClientTerms(minimum_honest_survivors=7, minimum_cohort=9)
    )
    rehearsal.advertise(rehearsal.devices)
    requests = rehearsal.close()
    for other in rehearsal.devices[:7]:
        rehearsal.answer(other, requests[other])
    requests = rehearsal.close()
    with pytest.raises(PolicyRefusal, match="minimum_honest_survivors"):
        rehearsal.clients[device].receive(requests[device])
    assert bytes(vector) == bytes(len(vector))


def test_no_secret_shows_in_any_stage(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    device = rehearsal.devices[0]
    client = rehearsal.clients[device]
    seen: list[str] = [repr(client.stage)]
    secrets: list[bytes] = [rehearsal.plain[device]]
    for stage in [*STAGE_NAMES][1:]:
        rehearsal.run_until(stage)
        seen.append(repr(client.stage) + repr(rehearsal.server.stage))
        for name in ("self_seed", "own_share"):
            if hasattr(client.stage, name):
                secrets.append(getattr(client.stage, name))
        if hasattr(client.stage, "mask"):
            secrets.append(client.stage.mask.secret)
        if isinstance(client.stage, InputMasked):
            secrets += [share for both in rehearsal.holdings(device).values() for share in both.values()]
            secrets += client.stage.inclusions.values()
    assert len(secrets) > 4 + 4 * 3
    for secret in secrets:
        assert not any(repr(secret)[2:-1] in text or secret.hex() in text for text in seen)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_masks_taken_off_over_several_threads_leave_the_same_sum(fleet: Any, parts: int) -> None:
    rehearsal = fleet.rehearse(9)
    with ThreadPoolExecutor(parts) as pool:
        rehearsal.server._spread = Spread(parts, pool.map)
        rehearsal.run_until(Unmasked, silent={"masked_input": rehearsal.devices[7:]})
    assert bytes(rehearsal.server.result) == rehearsal.plain_sum(rehearsal.devices[:7])
