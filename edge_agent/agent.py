"""The shell of a device: transport, clock and disk on one side, the participation on the other; the only loop.

One thread. Between two batches of local work it looks whether a message has come, so that
a device that trains still answers. It may be killed at any point: what must outlive that is on the disk before its
consequence leaves the device.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_agent.appointments import STALLED_MS, Appointment, next_appointment
from edge_agent.config import AgentConfig
from edge_agent.effects import (
    AdoptState,
    AdvanceRound,
    BlobFetched,
    ContributionLoaded,
    Effect,
    Entry,
    Event,
    Fetch,
    FetchPlan,
    ForgetPending,
    KeepTime,
    LoadContribution,
    LocalFacts,
    Log,
    PlanFetched,
    Remember,
    Send,
    SendChunk,
    Settle,
    Spend,
    StartWork,
    StopWork,
    WorkFinished,
)
from edge_agent.examples import ExampleStore
from edge_agent.home import Home
from edge_agent.latest import LATEST_FOLDER, keep_latest
from edge_agent.ledger import Ledger, Release
from edge_agent.library import Library
from edge_agent.participation import Participation
from edge_agent.pending import PendingStore, decode_entry, encode_entry
from edge_agent.steps import Device, Moment
from edge_agent.verification import Verifier
from edge_agent.workbench import Assignment, Workbench
from sottovoce.errors import (
    ConfigError,
    CryptoError,
    LocalProtocolError,
    MalformedMessage,
    RemoteProtocolError,
    SottovoceError,
    TransportError,
)
from sottovoce.identity import Identity, SignedContext, TrustAnchor, latest_time
from sottovoce.plan import DEFAULT_CHUNK_BYTES, BlobRef, decode_plan
from sottovoce.transport.base import Connected, Delivery, Disconnected, Transport, Will
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk, fragments
from sottovoce.wire.codec import ALL, seal
from sottovoce.wire.messages import Status
from sottovoce.wire.topics import Topics

LONGEST_WAIT_S = 1.0
"""The loop looks up at least this often, so that a signal to stop is heard."""
CONNECT_WITHIN_MS = 30_000
_LOG_EVERY_MS = 10_000
_CHUNK_HEADER_BYTES = 128
_GOODBYE_MS = 2_000
_ENTRY_KEPT_MS = 30 * 24 * 3600 * 1000
_ENTRY_KEY = b"current"

log = logging.getLogger("edge-agent")


class Clock:
    """Milliseconds that never go back while the process lives, starting from the machine's wall clock."""

    def __init__(self, *, wall_ms: int | None = None) -> None:
        """Start at `wall_ms`, Unix milliseconds; None reads the machine's clock."""
        self._start_ms = time.time_ns() // 1_000_000 if wall_ms is None else wall_ms
        self._origin_ms = self._elapsed_ms()

    def __call__(self) -> int:
        """Return the time."""
        return self._start_ms + self._elapsed_ms() - self._origin_ms

    @staticmethod
    def _elapsed_ms() -> int:
        # Linux has a clock that goes on while the machine sleeps; a phone sleeps most of the time.
        boot_time = getattr(time, "CLOCK_BOOTTIME", None)
        return (time.monotonic_ns() if boot_time is None else time.clock_gettime_ns(boot_time)) // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What an agent is made of.

    Attributes:
        home: The device's folder.
        config: Its settings.
        identity: Its key and certificate.
        anchor: The pinned fleet CA.
        clock: The time, Unix milliseconds; never goes back.
        resident: True if the agent stays connected until it is stopped.
        entropy: The system's entropy.
    """

    home: Home
    config: AgentConfig
    identity: Identity
    anchor: TrustAnchor
    clock: Callable[[], int]
    resident: bool
    entropy: Callable[[int], bytes] = os.urandom


def last_will(identity: Identity) -> Will:
    """Return what the broker publishes when the device of `identity` vanishes."""
    name, fleet = identity.certificate.name, identity.certificate.fleet
    return Will(Topics(fleet).status(name), _status(identity, online=False))


class Agent:
    """One device at work; make it, then call `run` or `visit`, once.

    Attributes:
        participation: Its part in the current round.
        refused: How many messages were dropped, by reason.
    """

    def __init__(self, setup: Setup, transport: Transport) -> None:
        """Read what the disk remembers; nothing is sent yet.

        Raises:
            ConfigError: The folder's files cannot be used.
        """
        self._setup = setup
        self._transport = transport
        self._clock = setup.clock
        self._topics = Topics(setup.identity.certificate.fleet)
        self._ledger = Ledger(setup.home.ledger)
        self._examples = ExampleStore(setup.home.examples)
        self._pending = PendingStore(setup.home.pending, setup.identity, discarded=log.warning)
        policy = setup.config.policy
        self._bench = Workbench(
            self._pending,
            runtime=setup.config.runtime,
            threads=policy.threads,
            entropy=setup.entropy,
            log=log.info,
        )
        self._library = Library(setup.home.blobs, transport, self._topics)
        name, fleet = setup.identity.certificate.name, setup.identity.certificate.fleet
        self._verifier = Verifier(setup.anchor, device=name, fleet=fleet)
        device = Device(
            identity=setup.identity,
            anchor=setup.anchor,
            policy=policy,
            entropy=setup.entropy,
            fast_aes=has_fast_aes(),
            resident=setup.resident,
        )
        last_signed_ms = self._ledger.last_signed_ms()
        self._pending.sweep(now_ms=max(self._clock(), last_signed_ms))
        self.participation = Participation(device, entry=self._remembered(), last_signed_ms=last_signed_ms)
        self.refused: Counter[str] = Counter()
        self._last_line_ms: dict[str, int] = {}
        self._stopping = False
        self._online = False
        self._link = ""
        self._happened_ms = self._clock()

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Take part in round after round until `stop` is called.

        Raises:
            TransportError: The broker will never let this device in; the text says what to check.
        """
        try:
            self.start()
            while not self._stopping:
                self.turn()
        finally:
            self.close()

    def visit(self) -> Appointment:
        """Do what can be done now and return when to come back.

        Raises:
            TransportError: There was no connection to the broker for 30 seconds.
        """
        try:
            self.start()
            while (appointment := self.visit_over()) is None:
                self.turn()
            return appointment
        finally:
            self.close()

    def visit_over(self) -> Appointment | None:
        """Return when to come back, as soon as a visit can do no more now, else None.

        Raises:
            TransportError: There was no connection to the broker for 30 seconds.
        """
        appointment, quiet_ms = self._appointment(), self._clock() - self._happened_ms
        if self._stopping:
            return appointment
        if not self._online:
            self._give_up_connecting(quiet_ms)
            return None
        patience_ms = appointment.patience_ms
        if patience_ms is not None and (self._library.waiting or self.participation.deciding):
            patience_ms = max(patience_ms, STALLED_MS)
        return appointment if patience_ms is not None and quiet_ms >= patience_ms else None

    def stop(self) -> None:
        """Make `run` or `visit` return soon; may be called from a signal handler."""
        self._stopping = True

    def start(self) -> None:
        """Subscribe; `turn` and `close` are then what `run` and `visit` are made of."""
        name = self._setup.identity.certificate.name
        for topic in (self._topics.down(name), self._topics.outcome(), self._topics.round()):
            self._transport.subscribe(topic)

    def turn(self, longest_wait_s: float = LONGEST_WAIT_S) -> bool:
        """Take one event, run one batch, do what is due; return True if an event came or a batch was run.

        Args:
            longest_wait_s: Wait for an event at most so long; with work to do, not at all.

        Raises:
            TransportError: The broker will never let this device in.
        """
        busy = self._bench.busy
        event = self._transport.receive(min(longest_wait_s, self._timeout_s()))
        match event:
            case Delivery():
                self._happened_ms = self._clock()
                self._guarded(lambda: self._deliver(event))
            case Connected():
                self._connected()
            case Disconnected():
                self._disconnected(event)
            case None:
                pass
        if self._bench.busy:
            self._guarded(self._work)
        self._guarded(self._tick)
        return busy or event is not None

    def close(self) -> None:
        """Leave in an orderly way: say so, let what is queued go out, free everything. Safe to be cut off anywhere."""
        try:
            if self._online:
                self._publish_status(online=False)
                deadline_ms = self._clock() + _GOODBYE_MS
                while self._transport.pending() and self._clock() < deadline_ms:
                    if isinstance(self._transport.receive(0.05), Disconnected):
                        break
        finally:
            self._transport.close()
            self._ledger.close()
            self._examples.close()

    def _tick(self) -> None:
        now_ms = self._clock()
        self._library.retry(now_ms)
        self._perform(self.participation.tick(now_ms))

    def _timeout_s(self) -> float:
        if self._bench.busy or self._stopping:
            return 0.0
        wakeup_ms = self.participation.next_wakeup_ms()
        if wakeup_ms is None:
            return LONGEST_WAIT_S
        return min(LONGEST_WAIT_S, max(0.0, (wakeup_ms - self._clock()) / 1000))

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run one piece of the loop; whatever goes wrong in it ends the part in this round, never the loop."""
        try:
            action()
        except SottovoceError as error:
            self._fail(error)
        except Exception as error:
            log.exception("a bug in this agent: it leaves the round and goes on")
            self._fail(LocalProtocolError(f"{type(error).__name__}: {error}"))

    def _fail(self, error: SottovoceError) -> None:
        self._bench.stop()
        try:
            self._perform(self.participation.fail(error, self._clock()))
        except SottovoceError as second:
            log.warning("%s", second)

    def _refuse(self, reason: str, error: SottovoceError) -> None:
        """Count what was dropped; one line for each reason every ten seconds."""
        self.refused[reason] += 1
        now_ms = self._clock()
        if now_ms - self._last_line_ms.get(reason, now_ms - _LOG_EVERY_MS) >= _LOG_EVERY_MS:
            self._last_line_ms[reason] = now_ms
            log.warning("dropped a message (%s, %d so far): %s", reason, self.refused[reason], error)

    # --- the link -----------------------------------------------------------------------------------------------------

    def _connected(self) -> None:
        self._happened_ms, self._online = self._clock(), True
        chunk_bytes = min(DEFAULT_CHUNK_BYTES, self._transport.max_payload_bytes - _CHUNK_HEADER_BYTES)
        self.participation.device = replace(self.participation.device, chunk_bytes=chunk_bytes)
        self._note_link("connected to the broker")
        self._publish_status(online=True)
        self._guarded(lambda: self._perform(self.participation.connected(self._clock())))

    def _disconnected(self, event: Disconnected) -> None:
        self._online = False
        if event.fatal:
            raise TransportError(event.reason)
        self._note_link(f"no connection to the broker: {event.reason}; trying again for as long as it takes")

    def _note_link(self, text: str) -> None:
        if text != self._link:
            self._link = text
            log.info("%s", text)

    def _publish_status(self, *, online: bool) -> None:
        identity = self._setup.identity
        try:
            self._transport.publish(
                self._topics.status(identity.certificate.name), _status(identity, online=online), retain=True
            )
        except TransportError as error:
            self._refuse("transport", error)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _deliver(self, delivery: Delivery) -> None:
        if self._library.owns(delivery.topic):
            self._library.receive(delivery.topic, delivery.payload, now_ms=self._clock())
            return
        try:
            opened = self._verifier.open(delivery.topic, delivery.payload, at=self._at())
            effects = [] if opened is None else self.participation.receive(opened, self._clock())
        except (RemoteProtocolError, CryptoError) as error:
            self._refuse(error.reason, error)
            return
        self._perform(effects)

    def _report(self, event: Event) -> None:
        self._perform(self.participation.report(event, self._clock()))

    def _work(self) -> None:
        done = self._bench.run_batch()
        self._happened_ms = self._clock()
        if done:
            self._report(WorkFinished())

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _perform(self, effects: list[Effect]) -> None:
        """Perform `effects` in order; an error stops the rest and ends the part in the round."""
        for effect in effects:
            _PERFORM[type(effect)](self, effect)

    def _log(self, effect: Log) -> None:
        log.log(logging.WARNING if effect.warning else logging.INFO, "%s", effect.text)

    def _send(self, effect: Send) -> None:
        identity = self._setup.identity
        name, fleet = identity.certificate.name, identity.certificate.fleet
        context = SignedContext(name, effect.coordinator, fleet, effect.round, effect.attempt, effect.session)
        envelope = seal(effect.message, identity, context)
        topic = self._topics.up_message(name, effect.route)
        try:
            for payload in fragments(envelope, chunk_bytes=self._transport.max_payload_bytes):
                self._transport.publish(topic, payload)
        except TransportError as error:
            # The participation sends it again while an answer is due.
            self._refuse("transport", error)

    def _send_chunk(self, effect: SendChunk) -> None:
        topic = self._topics.up_chunk(self._setup.identity.certificate.name, effect.route)
        chunk = VectorChunk(session=effect.session, index=effect.index, content=effect.content)
        try:
            self._transport.publish(topic, encode_vector_chunk(chunk))
        except TransportError as error:
            self._refuse("transport", error)

    def _fetch_plan(self, effect: FetchPlan) -> None:
        self._library.forget_requests()

        def arrived(content: bytes) -> None:
            self._report(PlanFetched(content, self._facts(content, effect.state)))

        self._fetch_blob(effect.ref, arrived)

    def _fetch(self, effect: Fetch) -> None:
        self._fetch_blob(effect.ref, lambda content: self._report(BlobFetched(effect.ref.digest)))

    def _adopt_state(self, effect: AdoptState) -> None:
        folder = self._setup.home.path / LATEST_FOLDER

        def arrived(content: bytes) -> None:
            keep_latest(folder, effect.program, content, round=effect.round)

        self._fetch_blob(effect.ref, arrived)

    def _start_work(self, effect: StartWork) -> None:
        assignment = Assignment(
            plan=effect.plan, state=effect.state, expires_ms=effect.expires_ms, now_ms=self._coordinator_ms()
        )
        done = self._bench.start(assignment, read_blob=self._library.read, read_examples=self._examples.read)
        if done:
            self._report(WorkFinished())

    def _stop_work(self, effect: StopWork) -> None:
        self._bench.stop()

    def _load_contribution(self, effect: LoadContribution) -> None:
        contribution = self._bench.load(effect.plan, effect.state, now_ms=self._coordinator_ms())
        self._report(ContributionLoaded(contribution))

    def _forget_pending(self, effect: ForgetPending) -> None:
        self._bench.forget(effect.plan, effect.state)

    def _spend(self, effect: Spend) -> None:
        plan, limit = effect.plan, self._setup.config.policy.max_releases_per_state
        release = Release(
            at_unix_s=self._coordinator_ms() / 1000,
            fleet=plan.fleet,
            plan_name=plan.name,
            plan=plan.digest,
            state=effect.state,
            round=effect.round,
            attempt=effect.attempt,
            session=effect.session,
            purpose=plan.privacy.purpose,
            cohort=effect.cohort,
            weight=effect.weight,
            contents=tuple((aggregation.name, aggregation.size) for aggregation in plan.aggregations),
        )
        self._ledger.spend(release, max_releases_per_state=limit)

    def _remember(self, effect: Remember) -> None:
        if effect.entry is None:
            self._pending.erase("entry", _ENTRY_KEY)
        else:
            expires_ms = self._coordinator_ms() + _ENTRY_KEPT_MS
            self._pending.save("entry", _ENTRY_KEY, encode_entry(effect.entry), expires_ms=expires_ms)

    def _settle(self, effect: Settle) -> None:
        try:
            self._ledger.settle(effect.session, effect.outcome)
        except LocalProtocolError as error:
            log.warning("the ledger: %s", error)

    def _advance_round(self, effect: AdvanceRound) -> None:
        fleet = self._setup.identity.certificate.fleet
        self._ledger.advance_round(fleet, effect.plan_name, round=effect.round, attempt=effect.attempt)

    def _keep_time(self, effect: KeepTime) -> None:
        self._ledger.note_signed_ms(effect.signed_ms)

    # --- small things -------------------------------------------------------------------------------------------------

    def _fetch_blob(self, ref: BlobRef, arrived: Callable[[bytes], None]) -> None:
        self._library.request(ref, arrived, now_ms=self._clock())

    def _facts(self, plan_content: bytes, state: bytes) -> LocalFacts:
        """Return what the disk knows about a plan; nothing about bytes that are none, which will be refused."""
        try:
            plan = decode_plan(plan_content)
        except ConfigError:
            return LocalFacts(last_round=None, releases=0, examples=0)
        self._retain(plan.collection)
        return LocalFacts(
            last_round=self._ledger.last_round(plan.fleet, plan.name),
            releases=self._ledger.releases_of_state(plan.digest, state),
            examples=self._examples.count(plan.collection),
        )

    def _retain(self, collection: str) -> None:
        """Forget the examples that the owner does not want to keep any longer."""
        retention = self._setup.config.retention.get(collection)
        if retention is not None:
            now_s = self._coordinator_ms() / 1000
            forgotten = self._examples.retain(
                collection, max_age_s=retention.max_age_s, max_count=retention.max_count, now_s=now_s
            )
            if forgotten:
                log.info("forgot %d examples of %s, as agent.toml says", forgotten, collection)

    def _remembered(self) -> Entry | None:
        content = self._pending.load("entry", _ENTRY_KEY, now_ms=self._clock())
        try:
            return None if content is None else decode_entry(content)
        except MalformedMessage as error:
            log.warning("%s; starting without it", error)
            return None

    def _coordinator_ms(self) -> int:
        return self.participation.coordinator_ms(self._clock())

    def _at(self) -> datetime.datetime:
        return latest_time(self._coordinator_ms() / 1000)

    def _appointment(self) -> Appointment:
        now_ms = self._clock()
        moment = Moment(local_ms=now_ms, coordinator_ms=self.participation.coordinator_ms(now_ms))
        return next_appointment(self.participation.device, self.participation.state, moment)

    def _give_up_connecting(self, quiet_ms: int) -> None:
        if quiet_ms > CONNECT_WITHIN_MS:
            broker = self._setup.config.broker
            raise TransportError(
                f"no connection to the broker {broker.host}:{broker.actual_port} within {CONNECT_WITHIN_MS // 1000} s "
                f"({self._link or 'it does not answer'})"
            )


_PERFORM: Mapping[type[Effect], Callable[[Agent, Any], None]] = {
    Log: Agent._log,
    Send: Agent._send,
    SendChunk: Agent._send_chunk,
    FetchPlan: Agent._fetch_plan,
    Fetch: Agent._fetch,
    AdoptState: Agent._adopt_state,
    StartWork: Agent._start_work,
    StopWork: Agent._stop_work,
    LoadContribution: Agent._load_contribution,
    ForgetPending: Agent._forget_pending,
    Spend: Agent._spend,
    Remember: Agent._remember,
    Settle: Agent._settle,
    AdvanceRound: Agent._advance_round,
    KeepTime: Agent._keep_time,
}


def has_fast_aes(cpu: str | None = None) -> bool:
    """Say whether this machine has AES instructions.

    Args:
        cpu: Text of /proc/cpuinfo; None reads it.
    """
    if cpu is None:
        if sys.platform == "darwin":
            return platform.machine() == "arm64"
        try:
            cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
    lines = (line.partition(":") for line in cpu.splitlines())
    return any(name.strip() in ("flags", "Features") and "aes" in value.split() for name, _, value in lines)


def _status(identity: Identity, *, online: bool) -> bytes:
    name, fleet = identity.certificate.name, identity.certificate.fleet
    return seal(Status(online=online, version=_version()), identity, SignedContext(name, ALL, fleet))


def _version() -> str:
    try:
        return importlib.metadata.version("sottovoce")
    except importlib.metadata.PackageNotFoundError:
        return "0"
