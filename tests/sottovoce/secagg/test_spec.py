"""docs/SPEC.md says what the code does: its tables and registries are rendered from the code and compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sottovoce.blobs import BlobRef
from sottovoce.secagg import keys, labels, shamir, unmask
from sottovoce.secagg.client import STEPS as CLIENT_STEPS
from sottovoce.secagg.graph import COMPLETE_GRAPH_LIMIT, LARGEST_COHORT, LARGEST_THRESHOLD
from sottovoce.secagg.server import CLOSINGS, STAGE_NAMES
from sottovoce.secagg.server import STEPS as SERVER_STEPS
from sottovoce.secagg.transcript import DIGEST_BYTES
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk
from sottovoce.wire.messages import COORDINATOR_MESSAGES, DEVICE_MESSAGES, SecAggParameters, TaggedVector

SPEC = (Path(__file__).parents[3] / "docs" / "SPEC.md").read_text(encoding="utf-8")


def table(*rows: tuple[str, ...]) -> str:
    header, *body = rows
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(step: Callable[..., Any]) -> tuple[Any, Any]:
    """The next stage and the reply in a step's annotated result."""
    following, reply = get_args(get_type_hints(step)["return"])
    return following, reply


def device_table(steps: Mapping[tuple[type, type], Callable[..., Any]]) -> str:
    rows = [("stage", "request", "reply", "next stage"), ("`Prepared`", "", "`AdvertiseKeys`", "`Advertised`")]
    for (stage, request), step in steps.items():
        following, reply = results(step)
        rows.append(tuple(f"`{kind.__name__}`" for kind in (stage, request, reply, following)))  # type: ignore[arg-type]
    return table(*rows)


def server_table() -> str:
    rows = [("stage", "its name in reports", "answer", "when closed")]
    for (stage, message), _ in SERVER_STEPS.items():
        following = results(CLOSINGS[stage])[0]
        kinds = get_args(following) or (following,)
        nexts = " or ".join(f"`{kind.__name__}`" for kind in kinds)
        rows.append((f"`{stage.__name__}`", f"`{STAGE_NAMES[stage]}`", f"`{message.__name__}`", nexts))
    return table(*rows)


def type_of(hint: Any) -> str:
    """How the SPEC writes the type of a field."""
    arguments = get_args(hint)
    if not arguments:
        return _TYPES[hint]
    if arguments[-1] is Ellipsis:
        return f"[{type_of(arguments[0])} …]"
    return "[" + ", ".join(type_of(argument) for argument in arguments) + "]"


_TYPES: dict[Any, str] = {bytes: "bytes", int: "int", str: "text", bool: "bool", BlobRef: "blob"} | {
    SecAggParameters: "parameters",
    TaggedVector: "vector",
}


def message_table() -> str:
    rows = [("message", "from", "body")]
    for sender, kinds in (("device", DEVICE_MESSAGES), ("coordinator", COORDINATOR_MESSAGES)):
        for kind in kinds:
            hints = get_type_hints(kind)
            body = ", ".join(f"{name}: {type_of(hints[name])}" for name in kind.__struct_fields__)
            rows.append((f"`{kind.__name__}`", sender, body))
    return table(*rows)


RENDERED = {
    "messages": message_table(),
    "device active": device_table(CLIENT_STEPS["active"]),
    "device curious": device_table(CLIENT_STEPS["curious"]),
    "server": server_table(),
    "hash labels": " · ".join(f"`{label.decode()}`" for label in labels.HASH_LABELS),
    "key labels": " · ".join(f"`{label.decode()}`" for label in labels.KEY_LABELS),
}


@pytest.mark.parametrize("name", RENDERED)
def test_the_spec_shows_what_the_code_does(name: str) -> None:
    shown = re.search(rf"<!-- begin {name} -->\n(.*?)\n?<!-- end {name} -->", SPEC, re.DOTALL)
    assert shown is not None
    assert shown[1] == RENDERED[name]


def test_the_spec_states_the_codes_numbers() -> None:
    for text in (
        f"GF({shamir.PRIME})",
        f"cut into {shamir.LIMBS} limbs of {shamir.LIMB_BITS} bits",
        f"{shamir.SHARE_BYTES} + {shamir.SHARE_BYTES} bytes",
        f"`leaves` ({DIGEST_BYTES} bytes each)",
        f"`ciphertexts` ({keys.CIPHERTEXT_BYTES})",
        f"`shares` ({shamir.SHARE_BYTES})",
        f"`inclusions` ({keys.INCLUSION_BYTES})",
        f"from byte {len(encode_vector_chunk(VectorChunk(bytes(DIGEST_BYTES), 0, b'')))} to the end",
        f"at most {unmask.MAX_SUBSETS} in all",
        f"A cohort of up to {COMPLETE_GRAPH_LIMIT} members has it always",
        f"3 to {LARGEST_COHORT} |",
        f"t at most {LARGEST_THRESHOLD}",
    ):
        assert text in " ".join(SPEC.split()), text
