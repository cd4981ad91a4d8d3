"""A bundle is decoded whole and consistent, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce.blobs import digest_of
from sottovoce.bundle import (
    MAX_CLIENT_STATE_BYTES,
    Bundle,
    ClientState,
    Port,
    Result,
    Role,
    decode_bundle,
    encode_bundle,
    read_bundle,
)
from sottovoce.errors import BadBundle, ConfigError
from sottovoce.tensors import encode_tensors

DIGITS = Path(__file__).resolve().parents[2] / "simulation" / "bundles" / "digits.svp"


@pytest.fixture(scope="module")
def digits() -> Bundle:
    return read_bundle(DIGITS)[0]


def scalar(name: str) -> Port:
    return Port(name=name, type="float32[1]")


def test_a_bundle_is_named_by_the_digest_of_its_bytes(digits: Bundle) -> None:
    content = DIGITS.read_bytes()
    assert encode_bundle(digits) == content
    assert read_bundle(DIGITS) == (digits, digest_of(content))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "sottovoce-program/0"}, "this release reads"),
        ({"roles": {"begin": Role(flatbuffer="begin", signature="begin")}}, "roles are missing: finish, step"),
        ({"flatbuffers": {}}, "flatbuffers that are not there: begin, evaluate, finish, infer, step"),
        ({"metrics": (scalar("loss"), scalar("loss"))}, "two ports of one group"),
        ({"metrics": (scalar("local_output_bias"),)}, "two ports of one signature"),
        ({"state": (scalar("output_bias"),)}, "two ports of one signature"),
        ({"batch": (Port(name="learning_rate", type="float32[?]"),)}, "two ports of one signature"),
        ({"state": (Port(name="x", type="float32[1]"),)}, "two ports of one signature"),
        ({"metrics": (scalar("delta"),)}, "a metric and a result have the same name"),
        ({"metrics": (Port(name="loss", type="float32"),)}, "'loss' has rank 0"),
        ({"metrics": (Port(name="loss", type="complex64[1]"),)}, "unknown dtype 'complex64'"),
        ({"batch": (Port(name="x", type="float32[8,64]"),)}, r"unknown \(\?\)"),
        ({"results": (Result(name="delta", ports=(scalar("d"),), updates=("output_bias",)),)}, "does not match"),
    ],
)
def test_a_bundle_whose_parts_do_not_fit_is_refused(digits: Bundle, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadBundle, match=text):
        decode_bundle(encode_bundle(msgspec.structs.replace(digits, **changes)))


def kept(**changes: Any) -> ClientState:
    chosen: dict[str, Any] = {
        "slot": "control",
        "version": 1,
        "ports": (scalar("control"), Port(name="count", type="int32[2,3]")),
        "initial": encode_tensors({"control": np.zeros(1, np.float32), "count": np.zeros((2, 3), np.int32)}),
        "maximum_bytes": 1000,
    }
    return ClientState(**{**chosen, **changes})


def test_client_state_comes_back_as_it_was(digits: Bundle) -> None:
    assert digits.client_state_ports == digits.next_client_state_ports == ()
    stateful = decode_bundle(encode_bundle(msgspec.structs.replace(digits, client_state=kept())))
    assert stateful.client_state == kept()
    assert [port.name for port in stateful.client_state_ports] == ["control", "count"]
    assert [(port.name, port.type) for port in stateful.next_client_state_ports] == [
        ("next_control", "float32[1]"),
        ("next_count", "int32[2,3]"),
    ]
    assert kept().types == "control float32[1], count int32[2,3]"


ZERO = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slot": "a/b"}, "1 to 64 characters"),
        ({"slot": ""}, "1 to 64 characters"),
        ({"version": 0}, "version must be at least 1"),
        ({"ports": ()}, "at least one port"),
        ({"ports": (Port(name="control", type="float32[?]"),)}, "every shape fully known"),
        ({"ports": (Port(name="control", type="float32"),)}, "'control' has rank 0"),
        ({"ports": (scalar("control"), scalar("control"))}, "two ports of one group"),
        ({"ports": (scalar("learning_rate"),)}, "two ports of one signature"),
        ({"maximum_bytes": 10}, "maximum_bytes must be from there"),
        ({"maximum_bytes": MAX_CLIENT_STATE_BYTES + 1}, "maximum_bytes must be from there"),
        ({"initial": b"junk"}, "its initial value: not named tensors"),
        ({"initial": encode_tensors({"control": ZERO})}, "keeps control, count, not control"),
        ({"initial": encode_tensors({"control": ZERO, "count": ZERO})}, r"'count' must be a finite int32\[2,3\]"),
        (
            {"ports": (scalar("control"),), "initial": encode_tensors({"control": ZERO * np.nan})},
            r"'control' must be a finite float32\[1\]",
        ),
    ],
)
def test_client_state_that_cannot_be_kept_is_refused(digits: Bundle, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadBundle, match=text):
        decode_bundle(encode_bundle(msgspec.structs.replace(digits, client_state=kept(**changes))))


def test_a_result_may_not_have_the_name_of_a_new_value(digits: Bundle) -> None:
    results = (Result(name="delta", ports=(scalar("next_control"),)),)
    with pytest.raises(BadBundle, match="two ports of one group"):
        decode_bundle(encode_bundle(msgspec.structs.replace(digits, client_state=kept(), results=results)))


@pytest.mark.parametrize("content", [b"", b"\x80", DIGITS.read_bytes()[:-1], DIGITS.read_bytes() + b"\x00"])
def test_bytes_that_are_no_bundle_are_refused(content: bytes) -> None:
    with pytest.raises(BadBundle, match="not a bundle of this version"):
        decode_bundle(content)


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the bundle"):
        read_bundle(tmp_path / "none.svp")
