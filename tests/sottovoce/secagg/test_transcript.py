"""What both sides hash: fixed vectors by hand, and every field that must matter does."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from sottovoce.secagg import labels, transcript
from sottovoce.secagg.transcript import agree, commitment_to, leaf_of, merkle_root, session_id, survivors_digest
from sottovoce.wire.messages import AdvertiseKeys

ADVERTISEMENT = AdvertiseKeys(b"c", b"p", b"s", b"d", b"C" * 32, b"M" * 32, b"N" * 32)


def prefixed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def test_a_leaf_is_the_specs_hash() -> None:
    content = prefixed(b"sv1/leaf", b"pi-1", b"F" * 32, b"C" * 32, b"M" * 32, b"N" * 32)
    assert leaf_of("pi-1", b"F" * 32, ADVERTISEMENT) == hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    "changes", [{"channel_key": b"x" * 32}, {"mask_key": b"x" * 32}, {"nonce": b"x" * 32}], ids=lambda c: next(iter(c))
)
def test_a_leaf_depends_on_keys_and_nonce(changes: dict[str, bytes]) -> None:
    other = msgspec.structs.replace(ADVERTISEMENT, **changes)
    assert leaf_of("pi-1", b"F" * 32, ADVERTISEMENT) != leaf_of("pi-1", b"F" * 32, other)
    assert leaf_of("pi-1", b"F" * 32, other) != leaf_of("pi-2", b"F" * 32, other) != leaf_of("pi-2", b"G" * 32, other)


def test_the_merkle_root_pairs_level_by_level_and_an_odd_one_moves_up() -> None:
    def inner(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(prefixed(b"sv1/merkle", left, right)).digest()

    a, b, c, d, e = (bytes([index]) * 32 for index in range(5))
    assert merkle_root([a]) == a
    assert merkle_root([a, b, c]) == inner(inner(a, b), c)
    assert merkle_root([a, b, c, d, e]) == inner(inner(inner(a, b), inner(c, d)), e)


def agreement(fleet: Any, **changes: Any) -> Any:
    made = agree(
        fleet.context("pi-1"),
        coordinator="conductor",
        plan=b"p" * 32,
        state=b"s" * 32,
        parameters=fleet.parameters(),
        upload_key=b"U" * 32,
    )
    return replace(made, **changes)


SHAPE: dict[str, Any] = {"members": 6, "neighbour_count": 5, "threshold": 4, "root": b"R" * 32}


def test_the_session_id_is_the_specs_hash(fleet: Any) -> None:
    parameters = hashlib.sha256(msgspec.msgpack.encode(fleet.parameters())).digest()
    content = prefixed(
        b"sv1/session",
        struct.pack("<IB", 1, 1),
        b"choir",
        b"conductor",
        struct.pack("<QI", 7, 1),
        b"p" * 32,
        b"s" * 32,
        parameters,
        b"U" * 32,
        struct.pack("<III", 6, 5, 4),
        b"R" * 32,
    )
    assert session_id(agreement(fleet), **SHAPE) == hashlib.sha256(content).digest()


def test_the_session_id_depends_on_everything_agreed(fleet: Any) -> None:
    one = agreement(fleet)
    curious = fleet.parameters(mode="curious")
    changes: list[dict[str, Any]] = [
        {"fleet": "other"}, {"coordinator": "other"}, {"round": 8}, {"attempt": 2}, {"plan": b"q" * 32},
        {"state": b"t" * 32}, {"parameters_digest": b"d" * 32}, {"parameters": curious},
        {"upload_key": b"V" * 32},
        {"fleet": "choirc", "coordinator": "onductor"},
    ]  # fmt: skip
    ids = {session_id(replace(one, **change), **SHAPE) for change in changes}
    ids |= {session_id(one, **(SHAPE | {name: 3})) for name in ("members", "neighbour_count", "threshold")}
    ids |= {session_id(one, **(SHAPE | {"root": b"S" * 32})), session_id(one, **SHAPE)}
    assert len(ids) == len(changes) + 5


def test_commitments_and_survivor_sets_are_bound_to_session_and_member() -> None:
    content = prefixed(b"sv1/b", b"S" * 32, struct.pack("<I", 3), b"b" * 32)
    assert commitment_to(b"b" * 32, session=b"S" * 32, position=3) == hashlib.sha256(content).digest()
    content = prefixed(b"sv1/survivors", b"S" * 32, struct.pack("<III", 0, 2, 5))
    assert survivors_digest([0, 2, 5], session=b"S" * 32) == hashlib.sha256(content).digest()
    digests = {
        survivors_digest(survivors, session=session)
        for survivors in ([0, 2, 5], [0, 2], [])
        for session in (b"S" * 32, b"T" * 32)
    }
    assert len(digests) == 6


def test_no_two_labels_are_equal_and_each_is_used_once() -> None:
    every = (*labels.HASH_LABELS, *labels.KEY_LABELS)
    assert len(set(every)) == len(every)
    assert all(label.startswith(b"sv1/") for label in every)
    assert {value for name, value in vars(labels).items() if name.isupper() and isinstance(value, bytes)} == set(every)
    assert transcript.graph_seed(b"R" * 32) == hashlib.sha256(prefixed(b"sv1/graph", b"R" * 32)).digest()
