"""Every vector file, made from `by_the_spec` with fixed entropy: `files()` gives the same text each time.

A file holds `vectors`, each with an id, a comment, flags, the operation and its inputs; `result` is `valid`, with what
comes out, or `invalid`, with the name of the refusal in `sottovoce/errors.py`. Bytes are hex.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import refusals_of_devices
import refusals_of_the_coordinator
import transcript_files
import vectors_of_envelopes
import vectors_of_parts
from fleet_by_the_spec import AUTHORITY
from vector import Vector

Json = Mapping[str, Any]


def files() -> dict[str, str]:
    """Every file's text by its name."""
    modules = (vectors_of_envelopes, vectors_of_parts, refusals_of_devices, refusals_of_the_coordinator)
    parts = {name: part for module in modules for name, part in module.FILES.items()}
    made = {f"{name}.json": _text(_numbered(name, title, vectors())) for name, (title, vectors) in parts.items()}
    sessions = {f"{name}.json": _text(content) for name, content in transcript_files.transcripts().items()}
    return made | sessions


def _numbered(name: str, title: str, vectors: Iterable[Vector]) -> Json:
    rows = [{"id": f"{name}-{index}"} | vector.json() for index, vector in enumerate(vectors, 1)]
    return {"title": title, "made_by": "scripts/make_vectors", "authority": AUTHORITY.hex(), "vectors": rows}


def _text(content: Json) -> str:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return _SHORT_LIST.sub(lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text)


_SHORT_LIST = re.compile(r"\[[^\[\]{}]*\]")
