"""Counting words in whole rounds: bounds held on the device, silence that does not show, results for everybody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.__main__ import main
from edge_agent.published import PUBLISHED_FOLDER, read_published
from sottovoce.blobs import blob_ref
from sottovoce.bundle import decode_bundle
from sottovoce.language.counting import counting_program
from sottovoce.plan import Aggregation, Counted, Extraction, LocalWork, ParticipationTerms, Plan, PrivacyTerms
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array
from sottovoce.wire.messages import CheckIn, Withdraw

MESSAGES = {
    "pi-0": ["ciao bella", "ciao bella! ciao mare"],
    "pi-1": ["ciao bella", "il mare, il sole"],
    "pi-2": ["niente di niente"],
    "pi-3": ["ciao segreto " * 40],
}
DEVICES = list(MESSAGES)
FIRST, SECOND = ("ciao", "il"), ("bella", "mare", "segreto", "sole")
ENTRIES = 64
EVERYBODY = [*DEVICES, "waiting", "late"]
"""Those in the sum, one that was not selected, and one without any message that comes when it is over."""


@pytest.fixture
def talk(world: Any) -> Iterator[Any]:
    """Four devices with messages, and a plan that counts what follows what; two of four are enough for their owners."""
    world.policy = replace(world.policy, minimum_threshold=2)
    content, _ = counting_program("pairs", len(FIRST) * len(SECOND))
    coordinator = world.coordinator
    coordinator.bundle_bytes = content
    coordinator.state_bytes = encode_tensors({"start": np.zeros(1, np.int32), "seconds": np.array([4], np.int32)})
    coordinator.plan = pairs_plan(content)
    for name, messages in MESSAGES.items():
        world.enrol(name, examples={"text": np.array(messages, object)}, collection="messages")
        world.start(name)
    return world


def pairs_plan(content: bytes, **terms: Any) -> Plan:
    tensors = (decode_bundle(content).results[0].ports[0].type,)
    privacy = {"purpose": "to suggest the next word", "minimum_cohort": 3, "weight_cap": 100, "threshold": 2} | terms
    return Plan(
        fleet="choir",
        name="next-word",
        collection="messages",
        program=blob_ref(content, chunk_bytes=4096),
        work=LocalWork(batch_size=16, order="stored"),
        aggregations=(
            Aggregation(name="counts", tensors=tensors, encoding=Counted(maximum=5), entries=2),
            Aggregation(
                name="devices", tensors=tensors, encoding=Counted(maximum=1), presence_of="counts", lane="dense"
            ),
        ),
        privacy=PrivacyTerms(**privacy),
        extraction=Extraction(extractor="text.bigrams/1", column="text", vocabularies=(FIRST, SECOND)),
        publish=True,
    )


def train(world: Any, number: int = 1, devices: list[str] = DEVICES) -> None:
    world.coordinator.announce(number)
    world.settle()
    world.coordinator.select(devices)
    world.settle()


def table(entries: Array) -> dict[tuple[str, str], int]:
    """What is not zero, by the pair of words."""
    assert not entries[len(FIRST) * len(SECOND) :].any()
    return {(FIRST[at // len(SECOND)], SECOND[at % len(SECOND)]): int(entries[at]) for at in np.flatnonzero(entries)}


def test_the_sum_is_that_of_the_bounded_counts_and_silence_does_not_show(talk: Any) -> None:
    train(talk)
    aggregate = talk.run_rendezvous(DEVICES)
    assert aggregate.survivors == 4, "the device that says none of these words takes part like all others"
    # pi-1 has three pairs and may give two, of equal ones those that come first; pi-3 has 40 of one and may give 5.
    assert table(aggregate.sums["counts"][0]) == {("ciao", "bella"): 3, ("ciao", "mare"): 1, ("ciao", "segreto"): 5,
                                                  ("il", "mare"): 1}  # fmt: skip
    assert table(aggregate.sums["devices"][0]) == {("ciao", "bella"): 2, ("ciao", "mare"): 1, ("ciao", "segreto"): 1,
                                                   ("il", "mare"): 1}  # fmt: skip
    assert aggregate.clamped == 1
    assert aggregate.weight == 2 + 2 + 1 + 1, "messages are the examples, also those without a row"


def test_only_the_newest_messages_are_read_where_the_plan_says_so(talk: Any) -> None:
    plan = talk.coordinator.plan
    talk.coordinator.plan = msgspec.structs.replace(plan, work=LocalWork(max_examples=1, order="stored"))
    train(talk)
    aggregate = talk.run_rendezvous(DEVICES)
    assert table(aggregate.sums["counts"][0])[("ciao", "bella")] == 1
    assert aggregate.weight == 4


def publish(world: Any, **counts: int) -> None:
    """Commit the round with what the coordinator would publish of its sums."""
    sums = np.zeros(ENTRIES, np.int32)
    for pair, count in counts.items():
        first, second = pair.split("_")
        sums[FIRST.index(first) * len(SECOND) + SECOND.index(second)] = count
    state = encode_tensors({"counts": sums, "devices": np.minimum(sums, 4)})
    world.coordinator.outcome(committed=True, survivors=DEVICES, state=state)
    world.settle()


def suggest(world: Any, capsys: pytest.CaptureFixture[str], name: str, *more: str) -> tuple[int, str]:
    code = main(["suggest", *more, "--home", str(world.homes[name].path)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_the_result_reaches_everybody_and_every_device_suggests(talk: Any, capsys: Any) -> None:
    assert suggest(talk, capsys, "pi-2", "ciao")[0] == 2
    talk.enrol("waiting", examples={"text": np.array(["ciao"], object)}, collection="messages")
    talk.start("waiting")
    train(talk)
    talk.run_rendezvous(DEVICES)
    publish(talk, ciao_bella=30, ciao_mare=10)
    talk.enrol("late", examples={})
    talk.start("late")
    talk.settle()
    kept = {name: read_published(talk.homes[name].path / PUBLISHED_FOLDER) for name in EVERYBODY}
    assert {name: [(each.plan.name, each.round) for each in found] for name, found in kept.items()} == {
        name: [("next-word", 1)] for name in EVERYBODY
    }
    # pi-2 never wrote the word, so the fleet alone answers; pi-3 wrote what the fleet does not know, very often.
    code, printed = suggest(talk, capsys, "pi-2", "Oh", "CIAO!")
    assert code == 0
    assert printed.splitlines() == [
        "after 'ciao' (plan next-word, round 1):",
        "  bella             75%   30 in the fleet, 0 here",
        "  mare              25%   10 in the fleet, 0 here",
    ]
    assert suggest(talk, capsys, "pi-3", "ciao", "-n", "1")[1].splitlines()[1].startswith("  segreto           89%")
    assert "nothing is known to follow 'niente'" in suggest(talk, capsys, "pi-0", "niente")[1]
    assert "published    next-word (round 1)" in status(talk, capsys, "pi-2")


def status(world: Any, capsys: pytest.CaptureFixture[str], name: str) -> str:
    assert main(["status", "--home", str(world.homes[name].path)]) == 0
    return str(capsys.readouterr().out)


def ask_again(world: Any, number: int) -> None:
    """The same question under the same name, in another plan: its digest is new, and so is the state."""
    plan = world.coordinator.plan
    privacy = msgspec.structs.replace(plan.privacy, expires_unix_s=2**40 + number)
    world.coordinator.plan = msgspec.structs.replace(plan, privacy=privacy)
    world.coordinator.announce(number)
    world.settle()


@pytest.mark.parametrize(("days", "answers"), [(0.0, False), (6.9, False), (7.1, True)])
def test_a_second_question_too_early_is_refused_also_after_a_restart(talk: Any, days: float, answers: bool) -> None:
    weekly = msgspec.structs.replace(talk.coordinator.plan.privacy, participation=ParticipationTerms(every_days=7.0))
    talk.coordinator.plan = msgspec.structs.replace(talk.coordinator.plan, privacy=weekly)
    train(talk)
    talk.run_rendezvous(DEVICES)
    talk.coordinator.outcome(committed=True, survivors=DEVICES)
    talk.settle()
    for name in DEVICES:
        talk.kill(name)
    talk.pass_time(int(days * 86_400_000))
    for name in DEVICES:
        talk.start(name)
    ask_again(talk, 2)
    last = {name: talk.coordinator.last(name) for name in DEVICES}
    if answers:
        assert all(isinstance(message, CheckIn) for message in last.values())
    else:
        assert all(isinstance(message, Withdraw) and message.code == "policy" for message in last.values())


def test_another_attempt_of_an_abandoned_round_is_no_second_participation(talk: Any) -> None:
    once = msgspec.structs.replace(talk.coordinator.plan.privacy, participation=ParticipationTerms(once=True))
    talk.coordinator.plan = msgspec.structs.replace(talk.coordinator.plan, privacy=once)
    train(talk)
    talk.run_rendezvous(DEVICES)
    talk.coordinator.outcome(committed=False, reason="too_few")
    talk.settle()
    talk.coordinator.announce(1, 1)
    talk.settle()
    talk.coordinator.select(DEVICES)
    talk.settle()
    assert talk.run_rendezvous(DEVICES).survivors == 4
    talk.coordinator.outcome(committed=True, survivors=DEVICES)
    talk.settle()
    ask_again(talk, 2)
    assert all(isinstance(talk.coordinator.last(name), Withdraw) for name in DEVICES)


def test_a_collection_of_numbers_has_no_messages(talk: Any) -> None:
    talk.enrol("numbers", examples={"text": np.arange(3.0)}, collection="messages")
    talk.start("numbers")
    talk.coordinator.announce(1)
    talk.settle()
    talk.coordinator.select(["numbers"])
    talk.settle()
    assert talk.coordinator.said("numbers", Withdraw)[0].code == "bad_examples"
