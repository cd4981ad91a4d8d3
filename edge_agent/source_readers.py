"""Readers of what fills a collection by itself; each is asked now and then what is new, and never waits.

What comes in is untrusted text: a reading that is no number is an error that names it, a line that is no example is
left to the store, which drops and counts it.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import msgspec

from edge_agent.example_files import Cells, csv_cells, csv_layout, json_object, text_positions
from edge_agent.source_settings import SourceConfig
from sottovoce.errors import BadExamples
from sottovoce.transport.base import Connected, Delivery, Disconnected, Transport

VALUE = "value"
"""The column of a reading."""
_LARGEST_READ = 1 << 20
LARGEST_READING = 1 << 16
"""Bytes of what a program prints, or a broker delivers, that are looked at for a number."""
_MOST_TOPICS = 10_000
_LONGEST_TOPIC = 1000
_NO_READING = frozenset({"unavailable", "unknown", "none", "null", "n/a", "na"})
"""What home automation writes where a number will be: it does not make a column one of text."""
_MOST_DELIVERIES = 1000


@dataclass(frozen=True, slots=True)
class Batch:
    """What is new.

    Attributes:
        rows: Pairs of a place for messages and the cells of one example.
        position: Where to go on reading after a restart; kept together with the rows. None: nothing to keep.
        errors: What was heard and could not be understood, in words.
    """

    rows: Sequence[tuple[str, Cells]] = ()
    position: str | None = None
    errors: Sequence[str] = ()


class Reader(Protocol):
    """One source at work."""

    def read(self, now_ms: int) -> Batch:
        """Return what is new since the last call; returns at once.

        Raises:
            BadExamples: The source cannot be read now; it is asked again later.
        """

    def close(self) -> None:
        """Let go of files, processes and links."""


def reading(text: str, *, member: str, scale: float) -> float:
    """Return the number in `text`: the text itself, or the named member of the JSON object that it is.

    Raises:
        BadExamples: There is no number in it.
    """
    try:
        value = float(text) if not member else json.loads(text)
    except (ValueError, RecursionError) as error:
        cure = 'it is a JSON object; say which member is meant: field = "..."' if text.lstrip()[:1] == "{" else ""
        raise BadExamples(f"{text.strip()[:60]!r} is not a number; {cure or 'it was left out'}") from error
    for name in filter(None, member.split(".")):
        if not isinstance(value, dict) or name not in value:
            raise BadExamples(f"{text.strip()[:60]!r} has no member {member!r}")
        value = value[name]
    try:
        return float(value) * scale
    except (TypeError, ValueError, OverflowError) as error:
        raise BadExamples(f"the member {member!r} is {str(value)[:40]!r}, not a number; it was left out") from error


class NumberFile:
    """A file that always holds one number, as the kernel shows its sensors."""

    def __init__(self, path: str, *, scale: float, every_s: float) -> None:
        """Read `path` every `every_s` seconds."""
        self._path, self._scale = Path(path), scale
        self._due = _Due(every_s)

    def read(self, now_ms: int) -> Batch:
        """See Reader."""
        if not self._due.is_due(now_ms):
            return Batch()
        try:
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadExamples(f"cannot read {self._path}: {error}") from error
        return Batch([(str(self._path), {VALUE: reading(text, member="", scale=self._scale)})])

    def close(self) -> None:
        """See Reader."""


class Command:
    """A program that prints one number, or a JSON object with it, and ends."""

    def __init__(self, command: Sequence[str], *, member: str, scale: float, every_s: float, timeout_s: float) -> None:
        """Start `command` every `every_s` seconds; kill it after `timeout_s`."""
        self._command, self._member, self._scale = list(command), member, scale
        self._timeout_ms = round(1000 * timeout_s)
        self._due = _Due(every_s)
        self._running: tuple[subprocess.Popen[bytes], IO[bytes], int] | None = None

    def read(self, now_ms: int) -> Batch:
        """See Reader."""
        if self._running is None:
            if self._due.is_due(now_ms):
                self._start(now_ms)
            return Batch()
        process, output, started_ms = self._running
        if process.poll() is None:
            if now_ms - started_ms > self._timeout_ms:
                self.close()
                raise BadExamples(f"{self._command[0]} did not end within {self._timeout_ms / 1000:g} s and was killed")
            return Batch()
        self._running = None
        with output:
            output.seek(0)
            text = output.read(LARGEST_READING).decode(errors="replace")
        if process.returncode != 0:
            raise BadExamples(f"{self._command[0]} ended with exit code {process.returncode}")
        return Batch([(self._command[0], {VALUE: reading(text, member=self._member, scale=self._scale)})])

    def close(self) -> None:
        """Kill the program if it runs."""
        if self._running is not None:
            process, output, _ = self._running
            self._running = None
            process.kill()
            process.wait()
            output.close()

    def _start(self, now_ms: int) -> None:
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            output.close()
            raise BadExamples(f"cannot start {self._command[0]}: {error.strerror}") from error
        self._running = process, output, now_ms


class _Position(msgspec.Struct, frozen=True):
    """How far a file has been read.

    Attributes:
        inode: Which file that was.
        offset: Up to this byte of it.
        header: The first line of a CSV.
        texts: The places of its columns of text, as the first line of examples has them; None before that line.
        in_overlong: The line at `offset` is the rest of one that is too long to be read.
    """

    inode: int = 0
    offset: int = 0
    header: str = ""
    texts: tuple[int, ...] | None = None
    in_overlong: bool = False


class GrowingFile:
    """The lines that are added to a .csv or .jsonl file; a file that was replaced or cut is read from its beginning.

    Whole numbers become real ones: the first line says nothing about the later ones. A line is read when its end has
    been written; a cell of a CSV has no line breaks.
    """

    def __init__(self, path: str, *, position: str | None, every_s: float) -> None:
        """Go on reading `path` at `position`, which an earlier Batch named."""
        self._path = Path(path)
        self._is_csv = path.endswith(".csv")
        self._position = msgspec.json.decode(position, type=_Position) if position else _Position()
        self._due = _Due(every_s)

    def read(self, now_ms: int) -> Batch:
        """See Reader."""
        if not self._due.is_due(now_ms):
            return Batch()
        try:
            with self._path.open("rb") as file:
                at = self._start_of_news(os.fstat(file.fileno()))
                file.seek(at.offset)
                content = file.read(_LARGEST_READ)
        except OSError as error:
            raise BadExamples(f"cannot read {self._path}: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            return self._batch(at, whole)
        return self._passed_over(at, content) if len(content) == _LARGEST_READ else Batch()

    def close(self) -> None:
        """See Reader."""

    def _start_of_news(self, stat: os.stat_result) -> _Position:
        same = stat.st_ino == self._position.inode and stat.st_size >= self._position.offset
        return self._position if same else _Position(inode=stat.st_ino)

    def _passed_over(self, at: _Position, content: bytes) -> Batch:
        """Leave out what has no end within the largest read: one such line must not keep the later ones waiting."""
        self._position = msgspec.structs.replace(at, offset=at.offset + len(content), in_overlong=True)
        text = f"{self._path}: a line is longer than {_LARGEST_READ} bytes and was left out; is it a text file?"
        return Batch(position=self._stored_position(), errors=[] if at.in_overlong else [text])

    def _batch(self, at: _Position, whole: bytes) -> Batch:
        # Only these ends: others, such as U+2028, may stand in a message, and JSON leaves them as they are.
        lines = [line.rstrip("\r") for line in whole.decode("utf-8-sig", errors="replace").split("\n")]
        self._position = msgspec.structs.replace(at, offset=at.offset + len(whole), in_overlong=False)
        rows, errors = [], []
        for number, line in enumerate(lines[1:] if at.in_overlong else lines, start=1):
            place = f"{self._path.name}, byte {at.offset} onwards, line {number}"
            try:
                if line.strip() and not self._is_header(line):
                    rows.append((place, self._cells(line, place)))
            except BadExamples as error:
                errors.append(str(error))
        return Batch(rows, self._stored_position(), errors)

    def _is_header(self, line: str) -> bool:
        """Say whether `line` is the first one of a CSV, and note it."""
        if not self._is_csv or self._position.header:
            return False
        self._position = msgspec.structs.replace(self._position, header=line)
        return True

    def _cells(self, line: str, place: str) -> Cells:
        try:
            cells = self._csv_cells(line, place) if self._is_csv else json_object(line, place)
            return {name: _real(value) for name, value in cells.items()}
        except RecursionError as error:
            raise BadExamples(f"{place}: lists in lists in lists, too many to be read") from error

    def _csv_cells(self, line: str, place: str) -> Cells:
        names = [name.strip() for name in _csv_line(self._position.header, place)]
        cells, layout = _csv_line(line, place), csv_layout(names)
        texts = self._position.texts
        if texts is None:
            missing = [cell for cell in cells if cell.strip().lower() in _NO_READING]
            if missing:
                raise BadExamples(f"{place}: {missing[0]!r} is no reading; it was left out")
            texts = tuple(sorted(text_positions(cells, layout)))
        found = csv_cells(cells, names, layout, place, texts=frozenset(texts))
        self._position = msgspec.structs.replace(self._position, texts=texts)
        return found

    def _stored_position(self) -> str:
        return msgspec.json.encode(self._position).decode()


class Topic:
    """What is published on a broker nearby, the way home automation does it: one number a message."""

    def __init__(self, transport: Transport, topic: str, *, member: str, scale: float, every_s: float) -> None:
        """Subscribe to `topic` on `transport`, which this reader owns from now on."""
        self._transport, self._member, self._scale = transport, member, scale
        self._every_ms = round(1000 * every_s)
        self._heard_ms: dict[str, int] = {}
        transport.subscribe(topic)

    def read(self, now_ms: int) -> Batch:
        """See Reader. A retained message counts once: after a reconnect the broker sends the same one again."""
        rows: list[tuple[str, Cells]] = []
        errors: list[str] = []
        for _ in range(_MOST_DELIVERIES):
            match self._transport.receive(0.0):
                case Delivery() as delivery if self._wanted(delivery, now_ms):
                    try:
                        text = delivery.payload[:LARGEST_READING].decode(errors="replace")
                        value = reading(text, member=self._member, scale=self._scale)
                        rows.append((delivery.topic, {VALUE: value}))
                        self._note(delivery.topic, now_ms)
                    except BadExamples as error:
                        errors.append(f"{delivery.topic[:100]!r}: {error}")
                case Disconnected(reason=reason):
                    errors.append(f"no connection to the local broker: {reason}; trying again")
                case None:
                    break
                case Delivery() | Connected():
                    pass
        return Batch(rows, errors=errors)

    def close(self) -> None:
        """Leave the broker."""
        self._transport.close()

    def _wanted(self, delivery: Delivery, now_ms: int) -> bool:
        if len(delivery.topic) > _LONGEST_TOPIC:
            return False
        heard_ms = self._heard_ms.get(delivery.topic)
        return heard_ms is None or (not delivery.retained and now_ms - heard_ms >= self._every_ms)

    def _note(self, topic: str, now_ms: int) -> None:
        if len(self._heard_ms) >= _MOST_TOPICS:
            self._heard_ms.clear()  # Whoever floods the local broker with names shall not fill this device's memory.
        self._heard_ms[topic] = now_ms


def open_reader(config: SourceConfig, *, position: str | None, connect: Callable[[SourceConfig], Transport]) -> Reader:
    """Return the reader that `config` describes.

    Args:
        config: One source.
        position: Where an earlier process stopped reading.
        connect: Makes the link to the broker that a source of kind `mqtt` names.
    """
    every_s, scale, member = config.every_s, config.scale, config.member
    match config.kind:
        case "thermal":
            path, scale = config.number_file
            return NumberFile(path, scale=scale, every_s=every_s)
        case "command" | "termux-battery":
            return Command(config.program, member=member, scale=scale, every_s=every_s, timeout_s=config.timeout_s)
        case "file":
            return GrowingFile(config.path, position=position, every_s=every_s)
        case "mqtt":
            return Topic(connect(config), config.topic, member=member, scale=scale, every_s=every_s)


class _Due:
    """Says when a time has come again; at once at first."""

    def __init__(self, every_s: float) -> None:
        self._every_ms = round(1000 * every_s)
        self._next_ms: int | None = None

    def is_due(self, now_ms: int) -> bool:
        if self._next_ms is not None and now_ms < self._next_ms:
            return False
        self._next_ms = now_ms + self._every_ms
        return True


def _csv_line(line: str, place: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise BadExamples(f"{place}: {error}") from error


def _real(value: object) -> object:
    """Return whole numbers, also in lists, as real ones, everything else as it is."""
    if isinstance(value, list):
        return [_real(each) for each in value]
    try:
        return float(value) if isinstance(value, int) else value
    except OverflowError:
        return value  # The store says that it is too large.
