"""Runs the program of a plan one batch at a time, so that the agent's loop stays awake, and keeps checkpoints.

The TFLite runtime is imported when there is work for the first time, and the last program stays open. What is kept on
disk is sealed (`edge_agent.pending`): after a kill the work goes on from the last checkpoint, which is at most as many
seconds old as the owner has set; after an orderly stop with the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_agent.client_states import ClientStates, Reading
from edge_agent.effects import Contribution, NextClientState
from edge_agent.pending import PendingStore, decode_contribution, encode_contribution
from edge_agent.work import Work, WorkResult, WorkState, prepare
from sottovoce.agreement import check_aggregations
from sottovoce.bundle import Bundle, decode_bundle
from sottovoce.errors import MalformedMessage, ProgramError
from sottovoce.plan import LocalWork, Plan
from sottovoce.runtime import NO_ARRAYS, Program, RuntimeName, open_program, run_self_test
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What is to be done.

    Attributes:
        plan: The plan.
        state: Digest of the state blob.
        expires_ms: When the result loses its use.
        now_ms: The time by which kept files are judged.
        newest_example: Number of the newest example in the plan's collection.
    """

    plan: Plan
    state: bytes
    expires_ms: int
    now_ms: int
    newest_example: int = 0

    @property
    def key(self) -> bytes:
        """What checkpoint and result are kept under."""
        return pending_key(self.plan.digest, self.state)


@dataclass(slots=True)
class _Running:
    assignment: Assignment
    work: Work
    state: WorkState
    base: str
    kept_ms: int


@dataclass(frozen=True, slots=True)
class _Opened:
    digest: bytes
    bundle: Bundle
    program: Program


_NOTHING_KEPT = Reading(values=NO_ARRAYS, base="")


class Workbench:
    """At most one piece of work at a time.

    Attributes:
        batches: Batches run since the work was started or taken up.
    """

    def __init__(
        self,
        pending: PendingStore,
        client_states: ClientStates,
        *,
        runtime: RuntimeName,
        threads: int,
        clock: Callable[[], int],
        checkpoint_ms: int,
        entropy: Callable[[int], bytes],
        log: Callable[[str], None],
    ) -> None:
        """Make an empty bench.

        Args:
            pending: Where checkpoints and results are kept.
            client_states: What the programs keep on this device.
            runtime: Which TFLite runtime.
            threads: Processor threads of one invocation.
            clock: The time, milliseconds; never goes back.
            checkpoint_ms: Least time between two checkpoints; 0 keeps one after every batch.
            entropy: The system's entropy; every new piece of work draws a fresh seed from it.
            log: Told, in words, what happens.
        """
        self._pending = pending
        self._client_states = client_states
        self._runtime: RuntimeName = runtime
        self._threads = threads
        self._clock = clock
        self._checkpoint_ms = checkpoint_ms
        self._entropy = entropy
        self._log = log
        self._opened: _Opened | None = None
        self._running: _Running | None = None
        self.batches = 0

    @property
    def busy(self) -> bool:
        """True while there is a batch to run."""
        return self._running is not None

    def start(
        self,
        assignment: Assignment,
        *,
        read_blob: Callable[[bytes], bytes],
        read_examples: Callable[[str, int], Mapping[str, Array]],
    ) -> bool:
        """Begin, or take up, the assigned work; return True if its result is on disk already.

        Args:
            assignment: What to do.
            read_blob: Digest -> the verified blob.
            read_examples: Collection, how many of the newest examples (0: all) -> their columns.

        Raises:
            ProgramError: The program, its self-test, the examples or its client state do not fit; nothing was run.
            PolicyRefusal: The program would keep more than the owner allows.
            MalformedMessage: The state is not one.
        """
        self.stop()
        if self._has_result(assignment):
            self._log("the result of an earlier run is still unspent: it is used again")
            return True
        plan = assignment.plan
        opened = self._open(plan.program.digest, read_blob)
        check_aggregations(plan, opened.bundle)
        kept = opened.bundle.client_state
        reading = _NOTHING_KEPT if kept is None else self._client_states.take_up(kept, plan)
        work = prepare(
            opened.program,
            opened.bundle,
            plan.work,
            broadcast=decode_tensors(read_blob(assignment.state)),
            examples=read_examples(plan.collection, newest_used(plan.work)),
            client_state=reading.values,
            extraction=plan.extraction,
        )
        self._running = _Running(assignment, work, self._first_state(assignment, work), reading.base, self._clock())
        self.batches = 0
        return False

    def run_batch(self) -> bool:
        """Run one batch; keep a checkpoint when it is time, the result after the last one; return True if that is done.

        Raises:
            ProgramError: The runtime failed or the training diverged; the work is dropped.
            ConfigError: The disk cannot be written.
        """
        running = self._running
        if running is None:
            return False
        try:
            if not running.work.is_done(running.state):  # Messages may give no row at all.
                running.state = running.work.advance(running.state)
                self.batches += 1
            if running.work.is_done(running.state):
                self._keep_result(running)
                self.stop()
                return True
        except ProgramError:
            self._pending.erase("checkpoint", running.assignment.key)
            self.stop()
            raise
        if self._clock() - running.kept_ms >= self._checkpoint_ms:
            self._keep_checkpoint(running)
        return False

    def stop(self) -> None:
        """Leave the work where it is; its last checkpoint stays."""
        self._running = None

    def close(self) -> None:
        """Leave the work where it is, with a checkpoint of just that.

        Raises:
            ConfigError: The disk cannot be written.
        """
        if self._running is not None:
            self._keep_checkpoint(self._running)
        self.stop()

    def load(self, plan: bytes, state: bytes, *, now_ms: int) -> Contribution:
        """Return the finished result.

        Raises:
            ProgramError: There is none, or it is damaged: the work has to be done again.
        """
        content = self._pending.load("result", pending_key(plan, state), now_ms=now_ms)
        try:
            if content is not None:
                return decode_contribution(content)
        except MalformedMessage as error:
            self._pending.erase("result", pending_key(plan, state))
            raise ProgramError(f"the pending result is damaged: {error}") from error
        raise ProgramError("the pending result is gone: the work has to be done again")

    def forget(self, plan: bytes, state: bytes) -> None:
        """Erase checkpoint and result, durably."""
        for kind in ("checkpoint", "result"):
            self._pending.erase(kind, pending_key(plan, state))

    def _has_result(self, assignment: Assignment) -> bool:
        """Say whether an earlier run's result can be used; one from what has changed since is erased.

        Which of many examples a random order has chosen does not matter, and they go on being true; but who asks for
        the newest examples means those of now.
        """
        content = self._pending.load("result", assignment.key, now_ms=assignment.now_ms)
        if content is None:
            return False
        try:
            earlier = decode_contribution(content)
        except MalformedMessage:
            return True  # `load` says what is wrong with it.
        newest_first = assignment.plan.work.order == "stored"
        if newest_first and earlier.newest_example != assignment.newest_example:
            changed = "there are newer examples"
        elif earlier.client_state is not None and not self._client_states.take_up_again(earlier.client_state):
            changed = f"client state {earlier.client_state.slot} has changed"
        else:
            return True
        self._pending.erase("result", assignment.key)
        self._log(f"{changed} since an earlier run: the work is done again")
        return False

    def _open(self, digest: bytes, read_blob: Callable[[bytes], bytes]) -> _Opened:
        if self._opened is None or self._opened.digest != digest:
            self._opened = None
            bundle = decode_bundle(read_blob(digest))
            program = open_program(bundle, runtime=self._runtime, threads=self._threads)
            run_self_test(bundle, program)
            self._log(f"program {bundle.name!r} passed its self-test on this device")
            self._opened = _Opened(digest, bundle, program)
        return self._opened

    def _first_state(self, assignment: Assignment, work: Work) -> WorkState:
        kept = self._pending.load("checkpoint", assignment.key, now_ms=assignment.now_ms)
        if kept is not None:
            try:
                state = work.resume(kept)
                self._log(f"resumed in epoch {state.epoch + 1} after {state.position} of {work.rows} examples")
                return state
            except ProgramError as error:
                self._log(str(error))
        return work.start(self._entropy)

    def _keep_result(self, running: _Running) -> None:
        result = running.work.result(running.state)
        contribution = Contribution(
            values=dict(result.values),
            weight=result.weight,
            client_state=_next_client_state(running, result),
            newest_example=running.assignment.newest_example,
        )
        self._save(running, "result", encode_contribution(contribution))
        self._pending.erase("checkpoint", running.assignment.key)
        self._log(f"ran {self.batches} batches over {result.weight} examples")

    def _keep_checkpoint(self, running: _Running) -> None:
        self._save(running, "checkpoint", running.work.checkpoint(running.state))
        running.kept_ms = self._clock()

    def _save(self, running: _Running, kind: str, content: bytes) -> None:
        assignment = running.assignment
        self._pending.save(
            "result" if kind == "result" else "checkpoint",
            assignment.key,
            content,
            expires_ms=assignment.expires_ms,
        )


def newest_used(work: LocalWork) -> int:
    """Return how many of the newest examples `work` looks at, 0 for all: what is not looked at is not even read."""
    return work.max_examples if work.order == "stored" else 0


def _next_client_state(running: _Running, result: WorkResult) -> NextClientState | None:
    kept, plan = running.work.bundle.client_state, running.assignment.plan
    if kept is None:
        return None
    return NextClientState(
        slot=kept.slot,
        version=kept.version,
        types=kept.types,
        plan_name=plan.name,
        collection=plan.collection,
        base=running.base,
        content=encode_tensors(result.client_state),
    )


def pending_key(plan: bytes, state: bytes) -> bytes:
    """Return what the work on this plan and state is kept under."""
    return plan + state
