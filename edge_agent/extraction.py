"""From the messages of a collection to the rows that a client program reads: what a plan's extraction asks for.

The extractors are the device's own (`sottovoce.text`, `sottovoce.sketches`); a plan only names one and brings
vocabularies, or the numbers of a sketch. A row is what an extractor finds whose every word stands in its vocabulary, as
indices, or an entry of the sketch; a message may give many rows or none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sottovoce.errors import BadExamples
from sottovoce.plan import Extraction
from sottovoce.sketches import EXTRACTORS as SKETCHES
from sottovoce.sketches import sketch_columns
from sottovoce.text import EXTRACTORS as WORDS
from sottovoce.text import PORTS
from sottovoce.types import Array

EXTRACTORS = (*WORDS, *sorted(SKETCHES))
"""The extractors that this device has."""


def messages_of(extraction: Extraction, columns: Mapping[str, Array]) -> list[str]:
    """Return the messages that `extraction` reads, in stored order.

    Raises:
        BadExamples: The collection has no such column, or it is not one of text.
    """
    column = columns.get(extraction.column)
    if column is None:
        raise BadExamples(
            f"column {extraction.column!r} (text) is missing; the examples have {', '.join(columns) or 'none'}"
        )
    if column.dtype.kind not in "OU":
        raise BadExamples(f"column {extraction.column!r} is {column.dtype}; {extraction.extractor} reads text")
    return [str(message) for message in column]


def extract(extraction: Extraction, messages: list[str]) -> dict[str, Array]:
    """Return the rows of `messages`, in order: port of the extractor -> int32, equally many for each.

    Args:
        extraction: One whose extractor this device has (`edge_agent.policy` refuses others by name).
        messages: Text.
    """
    if extraction.sketch is not None:
        return sketch_columns(extraction.extractor, extraction.sketch, messages)
    find, ports = WORDS[extraction.extractor], PORTS[extraction.extractor]
    places = [{word: index for index, word in enumerate(words)} for words in extraction.vocabularies]
    rows = [
        [place[word] for place, word in zip(places, found, strict=True)]
        for message in messages
        for found in find(message)
        if all(word in place for place, word in zip(places, found, strict=True))
    ]
    table = np.array(rows, dtype=np.int32).reshape(len(rows), len(ports))
    return {port: np.ascontiguousarray(table[:, index]) for index, port in enumerate(ports)}
