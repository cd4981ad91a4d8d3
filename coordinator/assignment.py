"""The next round of a task, made ready: its plan, its state, and the blobs that the announcement names."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.journal import Journal
from coordinator.journal_rows import TaskRow
from coordinator.phases import Terms
from coordinator.program import FederatedProgram, Tensors, build_program
from coordinator.settings import UploadSettings
from coordinator.task import read_task
from sottovoce.errors import ConfigError
from sottovoce.plan import BlobRef, Plan, blob_ref, canonical
from sottovoce.tensors import decode_tensors, encode_tensors

_BASIS_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Assignment:
    """One round of a task, about to be announced.

    Attributes:
        task: The task's row.
        program: The federated program.
        position: Which of its rounds.
        plan: The plan of this round.
        state: The broadcast, named tensors.
        blobs: Reference and content of plan, client program and state, in this order.
    """

    task: TaskRow
    program: FederatedProgram
    position: int
    plan: Plan
    state: Tensors
    blobs: tuple[tuple[BlobRef, bytes], tuple[BlobRef, bytes], tuple[BlobRef, bytes]]

    @property
    def round_of_plan(self) -> int:
        """Which round of its plan this is, from 0; the standardising round has a plan of its own."""
        return self.position - (self.plan is self.program.plan and self.program.moments_plan is not None)


def load_program(journal: Journal, task: TaskRow, *, fleet: str, chunk_bytes: int) -> FederatedProgram:
    """Return the federated program of a task in the journal.

    Raises:
        ConfigError: The journal does not hold what the task needs, or the task does not fit this release any more.
        BadBundle: A bundle was written by another release.
    """
    bundle = journal.blob(task.bundle)
    moments = journal.blob(task.moments) if task.moments is not None else None
    if bundle is None or (task.moments is not None and moments is None):
        raise ConfigError(f"the journal has lost a bundle of task {task.name!r}; submit the task again")
    return build_program(
        read_task(task.toml, where=task.name), bundle, fleet=fleet, moments=moments, chunk_bytes=chunk_bytes
    )


def next_assignment(
    journal: Journal, task: TaskRow, program: FederatedProgram, *, chunk_bytes: int
) -> Assignment | None:
    """Return the next round of `task`, or None when all of them have committed.

    Raises:
        ConfigError: The journal has lost the state.
    """
    if task.position >= program.length:
        return None
    plan = program.plan_at(task.position)
    kept = journal.state_at(task.id, task.position)
    bundle = journal.blob(plan.program.digest)
    if kept is None or bundle is None:
        raise ConfigError(f"the journal has lost the state or a bundle of task {task.name!r}; submit the task again")
    contents = canonical(plan), bundle, kept[0]
    plan_blob, program_blob, state_blob = ((blob_ref(each, chunk_bytes=chunk_bytes), each) for each in contents)
    return Assignment(
        task=task,
        program=program,
        position=task.position,
        plan=plan,
        state=decode_tensors(kept[0]),
        blobs=(plan_blob, program_blob, state_blob),
    )


def first_state(program: FederatedProgram) -> bytes:
    """Return the state blob before a task's first round."""
    return encode_tensors(program.first_state)


def terms_of(program: FederatedProgram, uploads: UploadSettings, *, now_ms: int) -> Terms:
    """Return the terms of a round of this task that is announced now."""
    task = program.task
    selection_closes_ms = now_ms + round(1000 * task.time.selection_s)
    return Terms(
        goal=task.cohort.goal,
        minimum=task.cohort.minimum,
        wanted=task.cohort.wanted,
        selection_closes_ms=selection_closes_ms,
        rendezvous_ms=selection_closes_ms + round(1000 * task.time.training_s),
        stage_ms=round(1000 * task.time.stage_s),
        mode=task.secagg.mode,
        corrupt_share_bp=round(_BASIS_POINTS * task.secagg.corrupt_share),
        dropout_share_bp=round(_BASIS_POINTS * task.secagg.dropout_share),
        slots=uploads.slots,
        slot_idle_ms=round(1000 * uploads.slot_idle_s),
    )
