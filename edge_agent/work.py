"""Runs a client program over local batches: validated, resumable between two batches, and without any I/O.

`check_examples` holds the examples against the program's ports. A `Work` then carries what does not change (program,
broadcast, examples); a `WorkState` is everything that does, and can be written down after every batch. A run that is
killed and resumed gives bit for bit the result of one that was not.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from edge_agent.extraction import extract, messages_of
from sottovoce.blobs import Document, canonical
from sottovoce.bundle import NEXT, Bundle, Port
from sottovoce.errors import BadExamples, MalformedMessage, NonFiniteUpdate, ProgramError
from sottovoce.plan import Extraction, LocalWork
from sottovoce.runtime import NO_ARRAYS, Program
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array

SEED_BYTES = 32


@dataclass(frozen=True, slots=True)
class WorkState:
    """Where a run stands between two batches.

    Attributes:
        seed: 32 bytes of system entropy, drawn once; fixes which examples are used and their order in every epoch.
        epoch: Epochs that are complete.
        position: Examples of the current epoch that are used up.
        tensors: The program's state.
        metrics: Metric sums, float64 [1], over the current epoch; at its end and until the next batch over that one.
    """

    seed: bytes = field(repr=False)
    epoch: int
    position: int
    tensors: Mapping[str, Array] = field(repr=False)
    metrics: Mapping[str, Array] = field(repr=False)


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a run found out.

    Attributes:
        values: Every result of the program by name, one array for each of its ports; every metric by name, one array
            of shape [1], summed over the last epoch.
        weight: Number of examples used.
        client_state: The new value of every port of the program's client state; nothing without one.
    """

    values: Mapping[str, list[Array]] = field(repr=False)
    weight: int
    client_state: Mapping[str, Array] = field(repr=False)


class _Checkpoint(Document, frozen=True):
    """A WorkState as bytes, with the fingerprint of the work it belongs to."""

    work: bytes
    seed: bytes
    epoch: int
    position: int
    tensors: bytes
    metrics: bytes


@dataclass(frozen=True)
class Work:
    """One run of a client program; make it with `prepare`.

    Attributes:
        program: The opened program.
        bundle: Its ports and names.
        plan: Epochs, batch size and the largest number of examples.
        broadcast: One array for each broadcast port.
        examples: What `check_examples` returned.
        client_state: One array for each port of the program's client state.
        messages: Number of messages that the examples were extracted from, each giving many or none; 0 without.
    """

    program: Program
    bundle: Bundle
    plan: LocalWork
    broadcast: Mapping[str, Array]
    examples: Mapping[str, Array]
    client_state: Mapping[str, Array] = field(default_factory=dict)
    messages: int = 0

    @property
    def rows(self) -> int:
        """Number of rows of the examples that the run uses; only messages can have none."""
        count = _length(self.examples)
        return min(count, self.plan.max_examples) if self.plan.max_examples else count

    @property
    def weight(self) -> int:
        """Number of examples that the run uses: the rows, or the messages that they were extracted from."""
        return self.messages or self.rows

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of everything a checkpoint depends on: program, plan, broadcast, examples and client state."""
        parts = (
            canonical(self.bundle),
            canonical(self.plan),
            encode_tensors(self.broadcast),
            encode_tensors(self.examples),
            encode_tensors(self.client_state),
        )
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()

    def start(self, entropy: Callable[[int], bytes]) -> WorkState:
        """Return the state before the first batch.

        Args:
            entropy: Returns so many bytes of the system's entropy, such as `os.urandom`.

        Raises:
            ProgramError: The broadcast does not fit the program.
        """
        first = self.program.begin(self.broadcast, self.client_state)
        return WorkState(seed=entropy(SEED_BYTES), epoch=0, position=0, tensors=first, metrics={})

    def is_done(self, state: WorkState) -> bool:
        """Say whether every epoch is complete; where there are no rows, all are."""
        return state.epoch >= self.plan.epochs or not self.rows

    def advance(self, state: WorkState) -> WorkState:
        """Return the state after one more batch; the last batch of an epoch may be smaller.

        Raises:
            NonFiniteUpdate: A metric holds NaN or infinity: the training diverged.
            ProgramError: The run is already done, or the runtime failed.
        """
        if self.is_done(state):
            raise ProgramError(f"program {self.bundle.name!r} has already run its {self.plan.epochs} epochs")
        rows = self._order(state)[state.position : state.position + self.plan.batch_size]
        batch = {name: column[rows] for name, column in self.examples.items()}
        tensors, metrics = self.program.step(state.tensors, batch)
        self._check_finite(metrics, f"epoch {state.epoch + 1}")
        before = state.metrics if state.position else {}
        sums = {name: before.get(name, np.zeros(1)) + value for name, value in metrics.items()}
        position = state.position + len(rows)
        complete = position >= self.rows
        return WorkState(
            seed=state.seed,
            epoch=state.epoch + complete,
            position=0 if complete else position,
            tensors=tensors,
            metrics=sums,
        )

    def result(self, state: WorkState) -> WorkResult:
        """Return the results and metrics of a run that is done.

        Raises:
            NonFiniteUpdate: A result holds NaN or infinity: the training diverged.
            ProgramError: The run is not done, or the runtime failed.
        """
        if not self.is_done(state):
            raise ProgramError(
                f"program {self.bundle.name!r} is in epoch {state.epoch + 1} of {self.plan.epochs}, not done"
            )
        finished = self.program.finish(state.tensors, self.broadcast)
        self._check_finite(finished, "its result")
        results = {result.name: [finished[port.name] for port in result.ports] for result in self.bundle.results}
        metrics = {
            port.name: [state.metrics.get(port.name, np.zeros(1)).astype(port.tensor_type.numpy_dtype)]
            for port in self.bundle.metrics
        }
        kept = {port.name: finished[NEXT + port.name] for port in self.bundle.client_state_ports}
        return WorkResult(values={**results, **metrics}, weight=self.weight, client_state=kept)

    def checkpoint(self, state: WorkState) -> bytes:
        """Return `state` as bytes for `resume`; they hold what was learned from the examples: keep them secret."""
        return canonical(
            _Checkpoint(
                work=self.fingerprint,
                seed=state.seed,
                epoch=state.epoch,
                position=state.position,
                tensors=encode_tensors(state.tensors),
                metrics=encode_tensors(state.metrics),
            )
        )

    def resume(self, content: bytes) -> WorkState:
        """Return the state that `checkpoint` wrote.

        Raises:
            ProgramError: The bytes are damaged, or belong to another program, plan, broadcast, set of examples or
                client state: start again.
        """
        try:
            saved = msgspec.msgpack.decode(content, type=_Checkpoint)
            tensors, metrics = decode_tensors(saved.tensors), decode_tensors(saved.metrics)
        except (msgspec.ValidationError, msgspec.DecodeError, MalformedMessage) as error:
            raise ProgramError(f"the checkpoint is damaged, start again: {error}") from error
        if saved.work != self.fingerprint:
            raise ProgramError(
                "the checkpoint is of other work (program, plan, broadcast, examples or client state), start again"
            )
        return WorkState(seed=saved.seed, epoch=saved.epoch, position=saved.position, tensors=tensors, metrics=metrics)

    def _order(self, state: WorkState) -> Array:
        """Return the rows of the epoch that `state` is in, in order."""
        count = _length(self.examples)
        match self.plan.order:
            case "shuffled":
                return _shuffled(state.seed, state.epoch, count=count, used=self.rows)
            case "stored":
                return np.arange(count - self.rows, count)

    def _check_finite(self, values: Mapping[str, Array], where: str) -> None:
        for name, value in values.items():
            if not np.all(np.isfinite(value)):
                raise NonFiniteUpdate(
                    f"program {self.bundle.name!r}: {name!r} holds NaN or infinity in {where}, so nothing is sent; "
                    "where a model is trained, a lower learning rate may help"
                )


def prepare(
    program: Program,
    bundle: Bundle,
    plan: LocalWork,
    *,
    broadcast: Mapping[str, Array],
    examples: Mapping[str, Array],
    client_state: Mapping[str, Array] = NO_ARRAYS,
    extraction: Extraction | None = None,
) -> Work:
    """Return the work, its examples checked; in stored order only those that are used are looked at.

    Messages are extracted here: `plan.max_examples` has chosen among them, and all their rows are used.

    Raises:
        BadExamples: See `check_examples` and `edge_agent.extraction.messages_of`.
    """
    newest = plan.max_examples if plan.order == "stored" else 0
    used = {name: column[-newest:] for name, column in examples.items()}
    if extraction is None:
        return Work(program, bundle, plan, broadcast, check_examples(bundle, used), client_state)
    messages = messages_of(extraction, used)
    rows = check_columns(bundle.batch, extract(extraction, messages), may_be_empty=True)
    every_row = msgspec.structs.replace(plan, max_examples=0)
    return Work(program, bundle, every_row, broadcast, rows, client_state, messages=len(messages))


def check_examples(bundle: Bundle, examples: Mapping[str, Array]) -> dict[str, Array]:
    """Return the columns that the program reads, in its dtypes.

    Columns that the program does not name are left out: it sees nothing that it did not ask for. Casts that keep the
    meaning are made: any integer, boolean or float column to a float port (a float64 is rounded to float32), and to an
    integer port any column whose every value the port's dtype represents exactly. A program of one port reads the one
    column of a collection whatever their names, and of one with text (a time, a note) beside it the one of numbers:
    there is nothing to mix up.

    Args:
        bundle: The program.
        examples: One array for each column, the same number of rows in all.

    Raises:
        BadExamples: A column is missing, of the wrong dtype or shape, or of another length; a value is NaN, infinite
            or outside of its port's bounds; or there are no examples. The text names the column, and row and value.
    """
    numbers = [column for column in examples.values() if np.asarray(column).dtype.kind not in "OU"]
    readable = numbers or list(examples.values())
    if len(bundle.batch) == len(readable) == 1 and bundle.batch[0].name not in examples:
        examples = {bundle.batch[0].name: readable[0]}
    return check_columns(bundle.batch, examples)


def check_columns(
    ports: Sequence[Port], examples: Mapping[str, Array], *, may_be_empty: bool = False
) -> dict[str, Array]:
    """Return the columns that `ports` name, in their dtypes; as `check_examples`, but names always have to agree.

    Args:
        ports: The program's.
        examples: One array for each column.
        may_be_empty: No rows are fine.

    Raises:
        BadExamples: See `check_examples`.
    """
    checked = {port.name: _checked_column(port, examples) for port in ports}
    lengths = {name: len(column) for name, column in checked.items()}
    if len(set(lengths.values())) > 1:
        raise BadExamples(f"the columns have different numbers of rows: {lengths}")
    if not _length(checked) and not may_be_empty:
        raise BadExamples("there are no examples: import some into the collection first")
    return checked


def _checked_column(port: Port, examples: Mapping[str, Array]) -> Array:
    if port.name not in examples:
        raise BadExamples(
            f"column {port.name!r} ({port.type}) is missing; the examples have {', '.join(examples) or 'none'}"
        )
    column = np.asarray(examples[port.name])
    if column.dtype.kind == "U" or (column.dtype.kind == "O" and all(isinstance(each, str) for each in column.flat)):
        raise BadExamples(
            f"column {port.name!r} is text; the program needs {port.type}: write labels as whole numbers from 0, and "
            "let a plan's extraction read messages"
        )
    if column.dtype.kind not in "biuf":
        raise BadExamples(f"column {port.name!r} is {column.dtype}, which is no number; the program needs {port.type}")
    wanted = port.tensor_type
    if not wanted.admits(np.empty(column.shape, wanted.numpy_dtype)):
        shape = ",".join(map(str, column.shape))
        raise BadExamples(f"column {port.name!r} has shape [{shape}]; the program needs {port.type}")
    _refuse_rows(port, column, ~np.isfinite(column), "is not a finite number")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.ascontiguousarray(column.astype(wanted.numpy_dtype))
    wrong = ~np.isfinite(cast) if wanted.numpy_dtype.kind == "f" else cast != column
    _refuse_rows(port, column, wrong, f"does not fit into {wanted.dtype}")
    if port.low is not None:
        _refuse_rows(port, column, cast < port.low, f"is below {port.low}")
    if port.high is not None:
        _refuse_rows(port, column, cast > port.high, f"is above {port.high}")
    return cast


def _refuse_rows(port: Port, column: Array, wrong: Array, why: str) -> None:
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise BadExamples(f"column {port.name!r}, row {where[0]}: the value {column[where]} {why}")


def _length(examples: Mapping[str, Array]) -> int:
    return len(next(iter(examples.values())))


@functools.lru_cache(maxsize=4)
def _shuffled(seed: bytes, epoch: int, *, count: int, used: int) -> Array:
    """Return the rows of one epoch in order: the `used` rows that the seed chooses, shuffled for every epoch anew."""
    chosen = _generator(seed, "examples").permutation(count)[:used]
    return _generator(seed, f"epoch {epoch}").permutation(chosen)


def _generator(seed: bytes, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(seed + purpose.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
