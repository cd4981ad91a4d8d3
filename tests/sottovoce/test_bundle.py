"""A bundle is decoded whole and consistent, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sottovoce.bundle import Bundle, Port, Result, Role, decode_bundle, encode_bundle, read_bundle
from sottovoce.errors import BadBundle, ConfigError
from sottovoce.plan import digest_of

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


@pytest.mark.parametrize("content", [b"", b"\x80", DIGITS.read_bytes()[:-1], DIGITS.read_bytes() + b"\x00"])
def test_bytes_that_are_no_bundle_are_refused(content: bytes) -> None:
    with pytest.raises(BadBundle, match="not a bundle of this version"):
        decode_bundle(content)


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the bundle"):
        read_bundle(tmp_path / "none.svp")
