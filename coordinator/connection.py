"""Runs an author's computations on the fleet of a running coordinator: a round is asked for in its journal.

The author's process and the coordinator share the journal and nothing else. A round that has been asked for goes on
whatever becomes of the asker; asked again under the same key it is the same round, and its sums are there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from coordinator.clock import pause, steady_clock
from coordinator.journal import Journal
from coordinator.requests import check_request
from coordinator.settings import lock_file, read_settings, read_tables
from coordinator.terms import CohortTerms, RoundTerms, SecAggTerms, Timing, check_terms
from sottovoce.errors import ConfigError, RoundAbandoned, TransportError
from sottovoce.file_lock import is_held
from sottovoce.language.context import use
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.wire.messages import Mode

if TYPE_CHECKING:
    from rich.status import Status

DEFAULT_MINIMUM = 10
"""What a device's owner demands unless told otherwise."""
_POLL_S = 0.05
_QUIET_S = 2.0
"""A round that is answered sooner needs no progress line."""
_STARTING_S = 3.0
"""A coordinator that is being started takes so long at most until it holds its lock."""
_ABSENCE_S = 30.0
"""A coordinator that is restarted is waited for so long."""
_GRACE_S = 30.0
"""After its deadline a request is the coordinator's to fail; one that says nothing is not waited for for ever."""
_WHERE = "coordinator.connect"
_CODE = re.compile(r"[a-z_]+")
_MORE_DEVICES = (
    "have more devices switched on and connected, wait longer (timeout_s), or ask for fewer (minimum; the devices' "
    "owners have the last word: the log of an agent that refuses names the rule, such as minimum_cohort or discovery)"
)
_CURES = {
    "too_few_checked_in": _MORE_DEVICES,
    "too_few_ready": "devices gave up or were too slow: `edge-agent status` on one of them says why; " + _MORE_DEVICES,
    "too_few_devices": "devices left while the sum was made; ask again",
    "too_few_signatures": "devices left while the sum was made; ask again",
    "too_few_shares": "devices left while the sum was made; ask again",
    "bad_shares": "a device sent a share that does not fit; `coordinator status` lists what was refused",
    "impossible_sum": "the sum is larger than its bounds allow: a device did not keep to them",
    "deadline": "allow it more time (timeout_s)",
    "no_round": "`coordinator status` shows what it is doing; allow it more time (timeout_s)",
    "cancelled": "somebody has taken it out with `coordinator cancel`; ask again if that was a mistake",
}


@contextmanager
def connect(
    config: str | Path,
    *,
    goal: int | None = None,
    minimum: int = DEFAULT_MINIMUM,
    cohort: CohortTerms | None = None,
    mode: Mode = "active",
    timing: Timing | None = None,
    purpose: str | None = None,
    timeout_s: float = 120.0,
) -> Iterator[FleetConnection]:
    """Run every computation that is called inside the `with` on the fleet of a running coordinator.

    Args:
        config: The coordinator's settings, `coordinator.toml`.
        goal: Devices wanted in a round; all that the coordinator knows by default.
        minimum: Fewest devices whose sum may be seen; also the plan's promise to every device.
        cohort: In place of `goal` and `minimum`, with over-selection.
        mode: Of secure aggregation; devices refuse "curious" unless their owners allow it.
        timing: How long the parts of a round may take; by default they follow from `timeout_s`.
        purpose: In plain words, what the rounds are for: device owners read it. By default each computation's own.
        timeout_s: A round that is not committed after so many seconds fails with the reason.

    Raises:
        ConfigError: The settings are wrong, or there is no journal.
        TransportError: No coordinator is running.
    """
    settings = read_settings(Path(config))
    wishes = Wishes(
        goal=goal, minimum=minimum, cohort=cohort, mode=mode, timing=timing, purpose=purpose, timeout_s=timeout_s
    )
    if not settings.journal.exists():
        raise ConfigError(f"there is no journal {settings.journal} yet; start `coordinator run --config {config}`")
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(settings.journal))
        connection = FleetConnection(
            journal,
            lock=lock_file(settings.journal),
            config=Path(config),
            fleet=settings.fleet,
            chunk_bytes=settings.broker.chunk_bytes,
            wishes=wishes,
            clock=steady_clock(),
        )
        connection.check()
        stack.enter_context(use(FleetExecutor(connection)))
        yield connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What an author wants of every round; see `connect`."""

    goal: int | None = None
    minimum: int = DEFAULT_MINIMUM
    cohort: CohortTerms | None = None
    mode: Mode = "active"
    timing: Timing | None = None
    purpose: str | None = None
    timeout_s: float = 120.0

    def terms(self, *, known_devices: int) -> RoundTerms:
        """Return the terms of a round.

        Args:
            known_devices: How many devices have shown the coordinator a valid certificate.

        Raises:
            ConfigError: No round can be held under such terms.
        """
        if not 0 < self.timeout_s < float("inf"):
            raise ConfigError(f"timeout_s is {self.timeout_s}; write a number of seconds above 0")
        goal = max(self.minimum, known_devices) if self.goal is None else self.goal
        cohort = self.cohort or read_tables({"goal": goal, "minimum": self.minimum}, CohortTerms, where=_WHERE)
        secagg = read_tables({"mode": self.mode}, SecAggTerms, where=_WHERE)
        terms = RoundTerms(cohort=cohort, time=self.timing or _timing(self.timeout_s), secagg=secagg)
        check_terms(terms, where=_WHERE)
        return terms


def _timing(timeout_s: float) -> Timing:
    """Return the parts of a round that may take `timeout_s` seconds in all, with time for a second attempt if many."""
    return Timing(
        selection_s=min(60.0, timeout_s / 4),
        training_s=timeout_s / 2,
        stage_s=min(60.0, timeout_s / 12),
        retry_delay_s=min(2.0, timeout_s / 20),
    )


class FleetConnection:
    """A fleet behind a running coordinator (`sottovoce.language.ports.Rounds`). One thread owns it.

    Args:
        journal: The coordinator's journal, open for writing.
        lock: The file that a running coordinator holds a lock on.
        config: The coordinator's settings, named in errors.
        fleet: Its name.
        chunk_bytes: Largest piece of a blob.
        wishes: What is wanted of every round.
        clock: Unix milliseconds, never jumping.
        wait: Waits for so many seconds.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        lock: Path,
        config: Path,
        fleet: str,
        chunk_bytes: int,
        wishes: Wishes,
        clock: Callable[[], int],
        wait: Callable[[float], None] = pause,
    ) -> None:
        self._journal = journal
        self._lock = lock
        self._config = config
        self._fleet = fleet
        self._chunk_bytes = chunk_bytes
        self._wishes = wishes
        self._clock = clock
        self._pause = wait

    def check(self) -> None:
        """Refuse to begin without a coordinator; one that is starting is waited for.

        Raises:
            TransportError: None is running.
            ConfigError: No round can be held under the wishes.
        """
        self._terms()
        begun_ms = self._clock()
        while not is_held(self._lock):
            if self._clock() - begun_ms > 1000 * _STARTING_S:
                raise TransportError(self._absent("is running"))
            self._pause(_POLL_S)

    def run(self, request: RoundRequest) -> RoundSums:
        """Have the coordinator run the round that `request` asks for and return its sums.

        Raises:
            ConfigError: The request cannot be run at all, or something else was asked under its key.
            ProgramError: Its client program does not fit what is asked; nothing was asked.
            RoundAbandoned: It did not commit in time; the text gives the last reason and what to do.
            TransportError: The coordinator has gone and does not come back.
        """
        if self._wishes.purpose is not None:
            request = msgspec.structs.replace(request, purpose=self._wishes.purpose)
        terms = self._terms()
        check_request(request, terms, fleet=self._fleet, chunk_bytes=self._chunk_bytes)
        now_ms = self._clock()
        deadline_ms = now_ms + round(1000 * self._wishes.timeout_s)
        number = self._journal.ask(request, terms, deadline_ms=deadline_ms, now_ms=now_ms)
        answered = False
        try:
            sums = self._wait(number, request.name)
            answered = True
        finally:
            if not answered and not request.key:
                # Without a key nobody can ever ask for these sums again.
                self._journal.end_task(number, "cancelled", "cancelled: whoever asked has given up")
        return sums

    def _terms(self) -> RoundTerms:
        return self._wishes.terms(known_devices=len(self._journal.certificates()))

    def _wait(self, number: int, name: str) -> RoundSums:
        begun_ms = seen_ms = self._clock()
        with _ProgressLine() as progress:
            while True:
                answer = self._journal.answer(number)
                if answer.sums is not None:
                    return answer.sums
                if answer.status in ("failed", "cancelled"):
                    raise _abandoned(answer.reason)
                now_ms = self._clock()
                running = is_held(self._lock)
                seen_ms = now_ms if running else seen_ms
                if now_ms - seen_ms > 1000 * _ABSENCE_S:
                    raise TransportError(self._absent("has been running for a while"))
                waited_s = (now_ms - begun_ms) / 1000
                if waited_s > self._wishes.timeout_s + _GRACE_S:
                    raise _abandoned("no_answer: the coordinator is running, but does not answer")
                if waited_s > _QUIET_S:
                    situation = self._situation(number) if running else self._absent("is running")
                    progress.tell(f"{name}: {situation} ({waited_s:.0f} s)")
                self._pause(_POLL_S)

    def _absent(self, what: str) -> str:
        return f"no coordinator {what} on this journal; start it: coordinator run --config {self._config}"

    def _situation(self, number: int) -> str:
        """Return in words how the request stands."""
        mine = self._journal.rounds_of(number)
        for row in mine[-1:]:
            if row.phase == "selection":
                return f"round {row.round}: devices are asked to take part"
            if row.phase == "configuration":
                return f"round {row.round}: {len(row.cohort)} devices do the work"
            if row.phase == "reporting":
                return f"round {row.round}: {len(row.cohort)} devices make the sum"
            return f"round {row.round} was abandoned ({row.reason}: {row.detail}); it is tried again"
        for row in self._journal.rounds(limit=1):
            if row.ended_ms is None:
                return f"waiting for the round of {row.task} that is running"
        return "waiting for the coordinator"


def _abandoned(reason: str) -> RoundAbandoned:
    code, _, words = reason.partition(": ")
    if not _CODE.fullmatch(code):
        return RoundAbandoned("failed", reason)
    cure = _CURES.get(code, "`coordinator status` says more")
    return RoundAbandoned(code, f"{words}; {cure}" if words else cure)


class _ProgressLine:
    """One line on a terminal that says what is waited for; a context manager."""

    def __init__(self) -> None:
        self._line: Status | None = None

    def tell(self, text: str) -> None:
        if self._line is None:
            from rich.console import Console

            console = Console(stderr=True)
            self._line = console.status(text)
            if console.is_terminal:
                self._line.start()
        self._line.update(text)

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.stop()
