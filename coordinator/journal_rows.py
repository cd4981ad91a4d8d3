"""What the journal takes and gives: tasks, rounds, their accounts. Plain frozen data; names and sums only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from sottovoce.language.ports import RoundSums

TaskStatus: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]
TaskKind: TypeAlias = Literal["hosted", "request"]
Phase: TypeAlias = Literal["selection", "configuration", "reporting", "committed", "abandoned"]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as it stands: a task file that the coordinator hosts, or a single round that somebody asked for.

    Attributes:
        id: Row number; tasks run in this order.
        kind: hosted or request.
        name: The task's name; of a request its computation's.
        purpose: In plain words, as device owners read it.
        toml: The task file's text, empty for a request.
        bundle: Digest of the bundle blob.
        moments: Digest of the moments bundle blob, or None.
        status: queued, running, done, failed or cancelled.
        reason: Why it failed, else empty.
        position: How many of its rounds have committed.
    """

    id: int
    kind: TaskKind
    name: str
    purpose: str
    toml: str
    bundle: bytes
    moments: bytes | None
    status: TaskStatus
    reason: str
    position: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes exchanged in a round.

    Attributes:
        up: Per device, what it sent to the coordinator.
        down: Per device, what the coordinator sent to it alone.
        broadcast: What every device of the cohort has to download besides: announcement, outcome and new blobs.
    """

    up: Mapping[str, int] = field(default_factory=dict)
    down: Mapping[str, int] = field(default_factory=dict)
    broadcast: int = 0


@dataclass(frozen=True, slots=True)
class RoundRow:
    """A round as it stands.

    Attributes:
        id: Row number.
        task_id: Row number of its task.
        task: Name of its task.
        position: Which of the task's rounds, from 0.
        round, attempt: As announced.
        plan_name: Name of the plan.
        state: Digest of the state it started from.
        phase: Where it stands.
        reason: Why it was abandoned, as a short code, else empty.
        detail: The same in words.
        cohort, survivors: Device ids.
        dropped: Stage -> device ids.
        metrics: Name -> number.
        traffic: Bytes.
        started_ms, ended_ms: Unix milliseconds; the end is None while it runs.
    """

    id: int
    task_id: int
    task: str
    position: int
    round: int
    attempt: int
    plan_name: str
    state: bytes
    phase: Phase
    reason: str
    detail: str
    cohort: list[str]
    survivors: list[str]
    dropped: dict[str, list[str]]
    metrics: dict[str, float]
    traffic: Traffic
    started_ms: int
    ended_ms: int | None


@dataclass(frozen=True, slots=True)
class Opening:
    """A round that is about to be announced.

    Attributes:
        task: Row number of the task.
        position: Which of the task's rounds.
        round, attempt: Its number.
        plan_name: Name of the plan.
        plan: Content of the plan blob.
        state: Content of the state blob.
        started_ms: Unix milliseconds.
    """

    task: int
    position: int
    round: int
    attempt: int
    plan_name: str
    plan: bytes
    state: bytes
    started_ms: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a round ended, for everybody to see: names and sums.

    Attributes:
        cohort, survivors: Device ids.
        dropped: Stage -> device ids.
        traffic: Bytes.
        ended_ms: Unix milliseconds.
    """

    cohort: Sequence[str]
    survivors: Sequence[str]
    dropped: Mapping[str, Sequence[str]]
    traffic: Traffic
    ended_ms: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a committed round.

    Attributes:
        state: The server's state, named tensors as bytes.
        broadcast: What devices are given next, named tensors as bytes; often the same.
        metrics: Name -> number.
        released: Released sums, named tensors as bytes, or None.
        sums: The answer to a request, as `coordinator.requests` writes it; None for a hosted task.
    """

    state: bytes
    broadcast: bytes
    metrics: Mapping[str, float] = field(default_factory=dict)
    released: bytes | None = None
    sums: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request stands.

    Attributes:
        status: queued, running, done, failed or cancelled.
        reason: Why it failed: a short code, a colon, and words.
        sums: What it brought, once it is done.
    """

    status: TaskStatus
    reason: str
    sums: RoundSums | None


def task_row(row: sqlite3.Row) -> TaskRow:
    """Return a row of the table `tasks`."""
    return TaskRow(
        id=row["id"],
        kind=row["kind"],
        name=row["name"],
        purpose=row["purpose"],
        toml=row["toml"],
        bundle=bytes(row["bundle"]),
        moments=bytes(row["moments"]) if row["moments"] is not None else None,
        status=row["status"],
        reason=row["reason"],
        position=row["position"],
    )


def round_row(row: sqlite3.Row) -> RoundRow:
    """Return a row of the table `rounds`, joined with its task's name as `task_name`."""
    return RoundRow(
        id=row["id"],
        task_id=row["task"],
        task=row["task_name"],
        position=row["position"],
        round=row["round"],
        attempt=row["attempt"],
        plan_name=row["plan_name"],
        state=bytes(row["state"]),
        phase=row["phase"],
        reason=row["reason"],
        detail=row["detail"],
        cohort=json.loads(row["cohort"]),
        survivors=json.loads(row["survivors"]),
        dropped=json.loads(row["dropped"]),
        metrics=json.loads(row["metrics"]),
        traffic=Traffic(json.loads(row["bytes_up"]), json.loads(row["bytes_down"]), row["broadcast_bytes"]),
        started_ms=row["started_ms"],
        ended_ms=row["ended_ms"],
    )


def ending_values(ending: Ending) -> tuple[str | int, ...]:
    """Return the columns cohort, survivors, dropped, bytes_up, bytes_down, broadcast_bytes and ended_ms of a round."""
    traffic = ending.traffic
    named = (sorted(ending.cohort), sorted(ending.survivors), ending.dropped, traffic.up, traffic.down)
    return (*map(as_json, named), traffic.broadcast, ending.ended_ms)


def as_json(value: object) -> str:
    """Return names or numbers as text, for a column that `round_row` reads."""
    return json.dumps(value, sort_keys=True)
