"""Upload slots: bounded memory, fairness, and nothing accepted that its device did not sign."""

from __future__ import annotations

import random

import pytest

from coordinator.aggregation import NoSlot, UploadSlots
from coordinator.cohort import choose_cohort
from sottovoce.errors import BadBlob
from sottovoce.secagg.uploads import expect, tag_vector
from sottovoce.wire.chunks import MAX_ASSEMBLY_BYTES
from sottovoce.wire.messages import TaggedVector

VECTOR = bytes(range(250))
KEY = b"k" * 32
REF = expect(tag_vector(VECTOR, KEY, "chacha20", chunk_bytes=100), KEY, "chacha20")
CHUNKS = [VECTOR[:100], VECTOR[100:200], VECTOR[200:]]


def _nobody(device: str) -> bool:
    return False


def _slots(*devices: str, limit: int = 2) -> UploadSlots:
    slots = UploadSlots(limit=limit, idle_ms=1000)
    for device in devices:
        slots.enqueue(device, REF)
    return slots


def test_first_come_first_served_and_no_more_than_the_limit() -> None:
    slots = _slots("c", "a", "b")
    assert slots.grant(0, offline=_nobody) == ["c", "a"]
    assert slots.grant(0, offline=_nobody) == []
    assert slots.progress("b") is None
    with pytest.raises(NoSlot):
        slots.add_chunk("b", 0, CHUNKS[0], 0)


def test_a_vector_comes_out_whole_in_any_order_of_chunks_and_its_slot_is_free() -> None:
    slots = _slots("a", "b", limit=1)
    slots.grant(0, offline=_nobody)
    assert slots.add_chunk("a", 2, CHUNKS[2], 1) is None
    assert slots.add_chunk("a", 0, CHUNKS[0], 2) is None
    assert slots.add_chunk("a", 0, CHUNKS[0], 2) is None
    progress = slots.progress("a")
    assert progress is not None
    assert (progress.received, progress.complete) == (b"\x05", False)
    upload = slots.add_chunk("a", 1, CHUNKS[1], 3)
    assert upload is not None
    assert upload.ref is REF
    assert b"".join(upload.chunks()) == VECTOR
    progress = slots.progress("a")
    assert progress is not None
    assert (progress.received, progress.complete) == (b"\x07", True)
    assert slots.add_chunk("a", 1, CHUNKS[1], 4) is None, "redelivery of what is done changes nothing"
    assert slots.grant(3, offline=_nobody) == ["b"]


def test_a_chunk_sent_again_and_again_does_not_hold_a_slot() -> None:
    slots = _slots("a", "b", limit=1)
    slots.grant(0, offline=_nobody)
    for now_ms in range(0, 1000, 100):
        slots.add_chunk("a", 0, CHUNKS[0], now_ms)
    assert slots.reclaim(1000, offline=_nobody) == ["a"]


def test_a_chunk_that_does_not_match_is_refused_and_the_right_one_still_fits() -> None:
    slots = _slots("a")
    slots.grant(0, offline=_nobody)
    for index, content in ((0, CHUNKS[1]), (0, CHUNKS[0][:-1]), (3, CHUNKS[0]), (-1, CHUNKS[2])):
        with pytest.raises(BadBlob):
            slots.add_chunk("a", index, content, 0)
    for index, content in enumerate(CHUNKS):
        upload = slots.add_chunk("a", index, content, 0)
    assert upload is not None
    assert b"".join(upload.chunks()) == VECTOR


def test_an_idle_slot_is_taken_back_only_while_others_wait() -> None:
    slots = _slots("a", limit=1)
    slots.grant(0, offline=_nobody)
    assert slots.next_deadline_ms() is None
    assert slots.reclaim(5000, offline=_nobody) == []
    slots.enqueue("b", REF)
    assert slots.next_deadline_ms() == 1000
    slots.add_chunk("a", 0, CHUNKS[0], 900)
    assert slots.reclaim(1000, offline=_nobody) == []
    assert slots.reclaim(1900, offline=_nobody) == ["a"]
    assert slots.grant(1900, offline=_nobody) == ["b"]
    for index, content in enumerate(CHUNKS):
        slots.add_chunk("b", index, content, 1900)
    assert slots.grant(1900, offline=_nobody) == ["a"]
    progress = slots.progress("a")
    assert progress is not None
    assert progress.received == b"\x00", "what it had uploaded was freed"


def test_a_disconnected_device_makes_room_and_connected_ones_go_first() -> None:
    slots = _slots("a", "b", "c", limit=1)
    assert slots.grant(0, offline=lambda device: device == "a") == ["b"]
    assert slots.reclaim(0, offline=lambda device: device == "b") == ["b"]
    assert slots.grant(0, offline=lambda device: device in "ab") == ["c"]


def test_a_long_queue_is_not_searched_for_every_slot() -> None:
    asked: list[str] = []

    def offline(device: str) -> bool:
        asked.append(device)
        return device == "pi-0"

    slots = _slots(*(f"pi-{index}" for index in range(5000)))
    assert slots.grant(0, offline=offline) == ["pi-1", "pi-2"]
    assert slots.grant(0, offline=offline) == []
    assert slots.reclaim(0, offline=offline) == []
    assert slots.reclaim(1000, offline=offline) == ["pi-1", "pi-2"]
    assert len(asked) < 20


def test_a_vector_larger_than_most_blobs_gets_its_slot_as_any_other() -> None:
    size, chunk_bytes = MAX_ASSEMBLY_BYTES + 8, 2**18
    announced = TaggedVector(size=size, chunk_bytes=chunk_bytes, tags=bytes(16 * (-(-size // chunk_bytes))))
    slots = UploadSlots(limit=1, idle_ms=1000)
    slots.enqueue("a", expect(announced, KEY, "chacha20"))
    assert slots.grant(0, offline=_nobody) == ["a"]
    assert slots.progress("a") is not None


def test_no_more_slots_are_taken_back_than_others_can_use() -> None:
    slots = _slots("a", "b")
    slots.grant(0, offline=_nobody)
    slots.enqueue("c", REF)
    assert slots.reclaim(1000, offline=_nobody) == ["a"]


def test_who_left_is_forgotten_and_closing_frees_everything() -> None:
    slots = _slots("a", "b", "c")
    slots.grant(0, offline=_nobody)
    slots.discard("a")
    slots.discard("c")
    assert slots.grant(0, offline=_nobody) == []
    slots.close()
    with pytest.raises(NoSlot):
        slots.add_chunk("b", 0, CHUNKS[0], 0)


def test_every_device_is_chosen_about_equally_often_and_the_order_of_arrival_does_not_matter() -> None:
    entropy = random.Random(5).randbytes
    devices = [f"pi-{number}" for number in range(10)]
    counts = dict.fromkeys(devices, 0)
    for _ in range(2000):
        chosen = choose_cohort(reversed(devices), wanted=3, entropy=entropy)
        assert len(chosen) == 3
        for device in chosen:
            counts[device] += 1
    assert all(500 < count < 700 for count in counts.values()), counts
    assert choose_cohort(devices[:2], wanted=3, entropy=entropy) == set(devices[:2])
