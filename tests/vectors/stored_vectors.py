"""The vector files as they are stored, and what the product makes of their inputs: for the tests that use them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from sottovoce import errors
from sottovoce.identity import SignedContext, TrustAnchor
from sottovoce.secagg import transcript
from sottovoce.wire.messages import SecAggParameters

FOLDER = Path(__file__).parent
WRITTEN_BY_HAND = {"text.json", "sketches.json"}
"""Examples, not computed ones: what people expect of a message's words."""
PATHS = [path for path in FOLDER.glob("*.json") if path.name not in WRITTEN_BY_HAND]
FILES: dict[str, Any] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PATHS}
VECTORS = [vector for file in FILES.values() for vector in file.get("vectors", ())]
TRANSCRIPTS = {name: file for name, file in FILES.items() if name.startswith("transcript-")}
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
ANCHOR = TrustAnchor(x509.load_der_x509_certificate(bytes.fromhex(FILES["keys"]["authority"])))
Inputs = Mapping[str, Any]


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def parameters_of(inputs: Inputs) -> SecAggParameters:
    return msgspec.convert(inputs, SecAggParameters)


def agreement_of(inputs: Inputs) -> transcript.Agreement:
    context = SignedContext("pi-1", inputs["coordinator"], inputs["fleet"], inputs["round"], inputs["attempt"])
    return transcript.agree(
        context,
        coordinator=inputs["coordinator"],
        plan=raw(inputs["plan"]),
        state=raw(inputs["state"]),
        parameters=parameters_of(inputs["parameters"]),
        upload_key=raw(inputs["upload_key"]),
    )


class Replay:
    """Entropy that gives exactly the bytes of a vector, all of them."""

    def __init__(self, content: bytes) -> None:
        self.left = content

    def __call__(self, count: int) -> bytes:
        drawn, self.left = self.left[:count], self.left[count:]
        assert len(drawn) == count
        return drawn


@contextmanager
def refused(vector: Inputs) -> Iterator[pytest.ExceptionInfo[errors.SottovoceError]]:
    """What happens inside ends in exactly the error that `vector` names."""
    refusal = getattr(errors, vector["error"])
    with pytest.raises(refusal) as caught:
        yield caught
    assert type(caught.value) is refusal, vector["comment"]
