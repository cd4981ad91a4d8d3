"""Rounds in this process, on lists, without devices and without masks: what a fleet's sums are meant to be.

Extraction, program, bounds and threshold are those of the plan, written down here once more and as plainly as possible:
the tests hold devices and coordinator against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sottovoce import sketches, text
from sottovoce.bundle import decode_bundle
from sottovoce.errors import ConfigError
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, Counted, Extraction, LocalWork
from sottovoce.runtime import Program, open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

_Values = dict[str, Array]


class PlainRounds:
    """Implements `sottovoce.language.ports.Rounds` on lists, for rounds that count."""

    def __init__(self, members: Sequence[Any]) -> None:
        """Take one entry a device: its messages, or its columns of numbers."""
        self._members = members

    def run(self, request: RoundRequest) -> RoundSums:
        """Run the round on all members; real numbers are summed as they are, without rounding.

        Raises:
            ConfigError: There are no members.
            ProgramError: No TFLite runtime is installed, or it refused a value.
        """
        if not self._members:
            raise ConfigError(f"{request.name}: there are no devices; give a list with one entry a device")
        bundle = decode_bundle(request.bundle)
        program = open_program(bundle)
        broadcast = decode_tensors(request.broadcast)
        total: _Values = {}
        clamped = 0
        for member in self._members:
            rows = _rows(request, member)
            columns = {port.name: rows[port.name].astype(port.tensor_type.numpy_dtype) for port in bundle.batch}
            values = _finished(program, broadcast, columns, request.work)
            bounded = _bounded(request.aggregations, values)
            for aggregation in request.aggregations:
                value, outside = _clamped(aggregation, bounded[aggregation.name])
                clamped += outside
                total[aggregation.name] = total.get(aggregation.name, np.zeros(1)) + value
        sums = _thresholded(request, total)
        return RoundSums(
            sums={name: [value] for name, value in sums.items()},
            weight=len(self._members),
            survivors=len(self._members),
            clamped=clamped,
            round=1,
        )


def _rows(request: RoundRequest, member: Any) -> Mapping[str, Array]:
    newest = request.work.max_examples
    if request.extraction is None:
        return {name: column[-newest:] for name, column in member.items()}
    return _extracted(request.extraction, list(member)[-newest:])


def _extracted(extraction: Extraction, messages: Sequence[str]) -> Mapping[str, Array]:
    if extraction.sketch is not None:
        return sketches.sketch_columns(extraction.extractor, extraction.sketch, messages)
    find = text.EXTRACTORS[extraction.extractor]
    places = [{word: at for at, word in enumerate(vocabulary)} for vocabulary in extraction.vocabularies]
    found = [
        [place[word] for place, word in zip(places, words, strict=True)]
        for message in messages
        for words in find(message)
        if all(word in place for place, word in zip(places, words, strict=True))
    ]
    columns = np.array(found, np.int32).reshape(len(found), len(places)).T
    return dict(zip(text.PORTS[extraction.extractor], columns, strict=True))


def _finished(program: Program, broadcast: Mapping[str, Array], rows: Mapping[str, Array], work: LocalWork) -> _Values:
    state = program.begin(broadcast)
    for start in range(0, len(next(iter(rows.values()))), work.batch_size):
        batch = {name: np.ascontiguousarray(column[start : start + work.batch_size]) for name, column in rows.items()}
        state, _ = program.step(state, batch)
    return {name: value.astype(np.float64) for name, value in program.finish(state, broadcast).items()}


def _bounded(aggregations: Sequence[Aggregation], values: _Values) -> _Values:
    """Return the values with all but the `entries` largest at 0, what follows them, and the presence of each."""
    found = dict(values)
    for each in aggregations:
        if each.entries:
            kept = np.argsort(-np.abs(values[each.name]), kind="stable")[: each.entries]
            found[each.name] = np.zeros_like(values[each.name])
            found[each.name][kept] = values[each.name][kept]
    for each in aggregations:
        if each.follows:
            found[each.name] = found[each.name] * (found[each.follows] > 0)
        elif each.presence_of:
            found[each.name] = (found[each.presence_of] > 0).astype(np.float64)
    return found


def _clamped(aggregation: Aggregation, value: Array) -> tuple[Array, int]:
    """Return the value within its encoding's range, and how many entries lay outside."""
    encoding = aggregation.encoding
    low, high = (0, encoding.maximum) if isinstance(encoding, Counted) else (-encoding.half_range, encoding.half_range)
    return np.clip(value, low, high), int(np.count_nonzero((value < low) | (value > high)))


def _thresholded(request: RoundRequest, total: _Values) -> _Values:
    """Return the sums with the entries of too few devices at 0."""
    devices = {each.presence_of: total[each.name] for each in request.aggregations if each.presence_of}
    found = dict(total)
    for each in request.aggregations:
        own = each.encoding == Counted(maximum=1)
        known = devices.get(each.presence_of or each.follows or each.name, total[each.name] if own else None)
        if known is not None:
            found[each.name] = np.where(known >= request.threshold, total[each.name], 0.0)
    return found
