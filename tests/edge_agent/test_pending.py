"""What survives a kill, and what is thrown away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.effects import Contribution, Entry
from edge_agent.pending import (
    PendingStore,
    decode_contribution,
    decode_entry,
    encode_contribution,
    encode_entry,
)
from sottovoce.errors import MalformedMessage

NOW = 1_000_000


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pending"
    made.mkdir()
    return made


@pytest.fixture
def store(folder: Path, motionless_world: Any, lines: list[str]) -> PendingStore:
    return PendingStore(folder, motionless_world.setup("pi-0").identity, discarded=lines.append)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def test_the_newest_content_is_returned(store: PendingStore) -> None:
    for number in range(5):
        store.save("checkpoint", b"key", b"batch %d" % number, expires_ms=NOW)
        assert store.load("checkpoint", b"key", now_ms=NOW) == b"batch %d" % number


def test_a_shorter_content_replaces_a_longer_one(store: PendingStore) -> None:
    for content in (b"long" * 1000, b"long" * 1000, b"short"):
        store.save("checkpoint", b"key", content, expires_ms=NOW)
    assert store.load("checkpoint", b"key", now_ms=NOW) == b"short"


def test_another_process_goes_on_where_the_first_was(
    store: PendingStore, folder: Path, motionless_world: Any, lines: list[str]
) -> None:
    for content in (b"1", b"2", b"3"):
        store.save("checkpoint", b"key", content, expires_ms=NOW)
    second = PendingStore(folder, motionless_world.setup("pi-0").identity, discarded=lines.append)
    second.save("checkpoint", b"key", b"4", expires_ms=NOW)
    assert second.load("checkpoint", b"key", now_ms=NOW) == b"4"
    assert len(files(folder)) == 2


@pytest.mark.parametrize("keep", [0, 1, 11, 40])
def test_a_kill_in_the_middle_of_a_write_leaves_the_one_before(
    store: PendingStore, folder: Path, lines: list[str], keep: int
) -> None:
    store.save("checkpoint", b"key", b"batch 1", expires_ms=NOW)
    before = set(files(folder))
    store.save("checkpoint", b"key", b"batch 2", expires_ms=NOW)
    (newest,) = set(files(folder)) - before
    newest.write_bytes(newest.read_bytes()[:keep])
    assert store.load("checkpoint", b"key", now_ms=NOW) == b"batch 1"
    assert any("damaged" in line for line in lines)


def test_kinds_and_keys_are_apart(store: PendingStore) -> None:
    store.save("checkpoint", b"key", b"content", expires_ms=NOW)
    assert store.load("result", b"key", now_ms=NOW) is None
    assert store.load("checkpoint", b"other", now_ms=NOW) is None


def test_a_file_put_under_another_name_is_not_believed(store: PendingStore, folder: Path) -> None:
    store.save("checkpoint", b"mine", b"content", expires_ms=NOW)
    (mine,) = files(folder)
    store.save("checkpoint", b"other", b"content", expires_ms=NOW)
    (other,) = set(files(folder)) - {mine}
    other.write_bytes(mine.read_bytes())
    assert store.load("checkpoint", b"other", now_ms=NOW) is None


def test_another_devices_file_is_discarded(store: PendingStore, folder: Path, world: Any, lines: list[str]) -> None:
    world.enrol("pi-0", examples={})
    stranger = PendingStore(folder, world.setup("pi-0").identity, discarded=lines.append)
    stranger.save("checkpoint", b"key", b"content", expires_ms=NOW)
    assert store.load("checkpoint", b"key", now_ms=NOW) is None
    assert files(folder) == []


def test_what_has_expired_is_discarded(store: PendingStore, folder: Path, lines: list[str]) -> None:
    store.save("result", b"key", b"content", expires_ms=NOW)
    store.sweep(now_ms=NOW)
    assert store.load("result", b"key", now_ms=NOW) == b"content"
    store.sweep(now_ms=NOW + 1)
    assert files(folder) == []
    assert "expired" in lines[0]


def test_junk_in_the_folder_is_swept(store: PendingStore, folder: Path, lines: list[str]) -> None:
    (folder / "checkpoint-junk.sealed").write_bytes(b"junk")
    (folder / "half.writing").write_bytes(b"junk")
    store.sweep(now_ms=NOW)
    assert files(folder) == []
    assert len(lines) == 2


def test_erasing_leaves_nothing(store: PendingStore, folder: Path) -> None:
    for content in (b"1", b"2"):
        store.save("result", b"key", content, expires_ms=NOW)
    store.erase("result", b"key")
    store.erase("result", b"key")
    assert files(folder) == []
    assert store.load("result", b"key", now_ms=NOW) is None


def test_nothing_on_the_disk_is_readable(store: PendingStore, folder: Path) -> None:
    store.save("result", b"key", b"what was learned" * 10, expires_ms=NOW)
    assert all(b"learned" not in path.read_bytes() for path in files(folder))
    assert all(path.stat().st_mode & 0o077 == 0 for path in files(folder))


def test_contributions_come_back_as_they_were() -> None:
    values = {"delta": [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(1, np.float32)], "count": [np.array([3])]}
    again = decode_contribution(encode_contribution(Contribution(values, 17)))
    assert again.weight == 17
    assert list(again.values) == ["delta", "count"]
    for name, arrays in values.items():
        for before, after in zip(arrays, again.values[name], strict=True):
            np.testing.assert_array_equal(before, after)
            assert before.dtype == after.dtype


def test_entries_come_back_as_they_were() -> None:
    entry = Entry(b"a" * 32, "coordinator", "digits", b"p" * 32, 3, 1, "r7", b"s" * 32)
    assert decode_entry(encode_entry(entry)) == entry


@pytest.mark.parametrize("decode", [decode_contribution, decode_entry])
def test_junk_is_malformed(decode: Any) -> None:
    with pytest.raises(MalformedMessage):
        decode(b"\x93junk")
