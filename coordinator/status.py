"""What the journal says, for people (tables) and for programs (JSON). Works while the coordinator runs and when not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.journal import Journal
from coordinator.journal_rows import RoundRow

if TYPE_CHECKING:
    from rich.console import Console

_ROUNDS_SHOWN = _TASKS_SHOWN = 20


def status_document(journal: Journal) -> dict[str, Any]:
    """Return tasks, rounds, refusals and the number of enrolled devices as plain values, ready for JSON."""
    return {
        "tasks": [
            {
                "number": task.id,
                "kind": task.kind,
                "name": task.name,
                "purpose": task.purpose,
                "status": task.status,
                "reason": task.reason,
                "rounds_committed": task.position,
            }
            for task in journal.tasks()
        ],
        "rounds": [_round_document(row) for row in journal.rounds()],
        "refusals": journal.refusals(),
        "devices_enrolled": len(journal.certificates()),
    }


def print_status(journal: Journal, console: Console) -> None:
    """Print tasks, the last rounds and refusals as tables."""
    from rich.table import Table

    tasks = Table("number", "task", "status", "rounds committed", "purpose", "reason", title="Tasks and requests")
    for task in journal.tasks()[-_TASKS_SHOWN:]:
        name = task.name if task.kind == "hosted" else f"{task.name} (request)"
        tasks.add_row(str(task.id), name, task.status, str(task.position), task.purpose, task.reason)
    rounds = Table("round", "plan", "phase", "cohort", "survivors", "dropped", "seconds", "metrics", title="Rounds")
    for row in journal.rounds(limit=_ROUNDS_SHOWN):
        rounds.add_row(*_cells(row))
    refusals = Table("refused because", "messages", title="Refused messages")
    for reason, count in journal.refusals().items():
        refusals.add_row(reason, str(count))
    for table in (tasks, rounds, refusals):
        if table.row_count:
            console.print(table)
    if not tasks.row_count:
        console.print("No task yet: coordinator submit TASK.toml --config FILE")
    console.print(f"{len(journal.certificates())} devices have shown a valid certificate.")


def _cells(row: RoundRow) -> tuple[str, ...]:
    phase = f"{row.phase}: {row.reason} ({row.detail})" if row.reason else row.phase
    dropped = "; ".join(f"{stage}: {', '.join(devices)}" for stage, devices in row.dropped.items())
    seconds = "" if row.ended_ms is None else f"{(row.ended_ms - row.started_ms) / 1000:.1f}"
    metrics = " ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
    number = f"{row.round}.{row.attempt}"
    return number, row.plan_name, phase, str(len(row.cohort)), str(len(row.survivors)), dropped, seconds, metrics


def _round_document(row: RoundRow) -> dict[str, Any]:
    return {
        "task": row.task,
        "plan": row.plan_name,
        "number": row.round,
        "attempt": row.attempt,
        "phase": row.phase,
        "reason": row.reason,
        "detail": row.detail,
        "cohort": row.cohort,
        "survivors": row.survivors,
        "dropped": row.dropped,
        "metrics": row.metrics,
        "bytes_up": dict(row.traffic.up),
        "bytes_down": dict(row.traffic.down),
        "bytes_broadcast": row.traffic.broadcast,
        "state": row.state.hex(),
        "started_ms": row.started_ms,
        "ended_ms": row.ended_ms,
    }
