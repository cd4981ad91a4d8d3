"""The next round of a task, made ready: its plan, its terms, and the blobs that the announcement names."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.hosted import hosted_program
from coordinator.journal import Journal
from coordinator.journal_rows import Result, TaskRow
from coordinator.requests import SingleRound, encode_sums, plan_of
from coordinator.task import read_task
from coordinator.terms import RoundTerms
from sottovoce.blobs import BlobRef, blob_ref, canonical
from sottovoce.errors import ConfigError
from sottovoce.language.hosted import HostedProgram, Tensors
from sottovoce.language.ports import RoundSums
from sottovoce.plan import Plan
from sottovoce.tensors import decode_tensors, encode_tensors


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task out of the journal, ready to run.

    Attributes:
        program: What it does, round by round; a request is a program of one round.
        terms: The terms of its rounds.
        expires_unix_s: Devices refuse its plans after this time; 0 is never.
    """

    program: HostedProgram
    terms: RoundTerms
    expires_unix_s: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """One round of a task, about to be announced.

    Attributes:
        task: The task's row.
        loaded: The task.
        position: Which of its rounds.
        round_of_plan: Which round of its plan this is, from 0; a standardising round has a plan of its own.
        plan: The plan of this round.
        state: The server's state.
        blobs: Reference and content of plan, client program and broadcast, in this order.
    """

    task: TaskRow
    loaded: LoadedTask
    position: int
    round_of_plan: int
    plan: Plan
    state: Tensors
    blobs: tuple[tuple[BlobRef, bytes], tuple[BlobRef, bytes], tuple[BlobRef, bytes]]

    def result(self, sums: RoundSums) -> Result:
        """Return what this round makes of its sums, ready for the journal.

        Raises:
            RoundAbandoned: They give no usable state.
        """
        program = self.loaded.program
        advance = program.apply(self.position, self.state, sums)
        return Result(
            state=encode_tensors(advance.state),
            broadcast=encode_tensors(program.broadcast_at(self.position + 1, advance.state)),
            metrics=advance.metrics,
            released=encode_tensors(advance.released) if advance.released else None,
            sums=encode_sums(sums) if self.task.kind == "request" else None,
        )


def load_task(journal: Journal, task: TaskRow) -> LoadedTask:
    """Return a task out of the journal.

    Raises:
        ConfigError: The journal does not hold what the task needs, or the task does not fit this release any more.
        BadBundle: A bundle was written by another release.
    """
    if task.kind == "request":
        asked = journal.request(task.id)
        if asked is None:
            raise ConfigError(f"the journal has lost what request {task.name!r} asked; ask again")
        return LoadedTask(SingleRound(asked.request), asked.terms, asked.expires_unix_s)
    bundle = journal.blob(task.bundle)
    moments = journal.blob(task.moments) if task.moments is not None else None
    if bundle is None or (task.moments is not None and moments is None):
        raise ConfigError(f"the journal has lost a bundle of task {task.name!r}; submit the task again")
    described = read_task(task.toml, where=task.name)
    return LoadedTask(hosted_program(described, bundle, moments=moments), described.terms)


def begin(journal: Journal, task: TaskRow, program: HostedProgram) -> None:
    """Write down that `task` has begun, with its state before the first round."""
    state = program.first_state
    broadcast = encode_tensors(program.broadcast_at(0, state))
    journal.begin_task(task.id, state=encode_tensors(state), broadcast=broadcast)


def next_assignment(
    journal: Journal, task: TaskRow, loaded: LoadedTask, *, fleet: str, chunk_bytes: int
) -> Assignment | None:
    """Return the next round of `task`, or None when all of them have committed.

    Raises:
        ConfigError: The journal has lost the state, or the round's plan is impossible.
    """
    if task.position >= loaded.program.length:
        return None
    kept = journal.server_state_at(task.id, task.position)
    if kept is None:
        raise ConfigError(f"the journal has lost the state of task {task.name!r}; submit the task again")
    state = decode_tensors(kept)
    try:
        request = loaded.program.request_at(task.position, state)
    except KeyError as error:
        raise ConfigError(f"the state of task {task.name!r} is another release's ({error}); submit it again") from error
    expiry = loaded.expires_unix_s
    plan = plan_of(request, loaded.terms, fleet=fleet, chunk_bytes=chunk_bytes, expires_unix_s=expiry)
    contents = canonical(plan), request.bundle, request.broadcast
    plan_blob, program_blob, state_blob = ((blob_ref(each, chunk_bytes=chunk_bytes), each) for each in contents)
    return Assignment(
        task=task,
        loaded=loaded,
        position=task.position,
        round_of_plan=journal.committed_rounds(task.id, plan.name),
        plan=plan,
        state=state,
        blobs=(plan_blob, program_blob, state_blob),
    )
