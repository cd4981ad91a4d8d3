"""The shell of a device: transport, clock and disk on one side, the participation on the other; the only loop.

One thread. Between two batches of local work it looks whether a message has come, so that
a device that trains still answers. It may be killed at any point: what must outlive that is on the disk before its
consequence leaves the device.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from edge_agent.appointments import STALLED_MS, Appointment, next_appointment
from edge_agent.effects import (
    Event,
    WorkFinished,
)
from edge_agent.hardware import has_fast_aes
from edge_agent.participation import Participation
from edge_agent.performer import Performer, Setup
from edge_agent.presence import sealed_status
from edge_agent.states import (
    Device,
    Moment,
)
from edge_agent.verification import Verifier
from sottovoce.blobs import DEFAULT_CHUNK_BYTES
from sottovoce.errors import (
    CryptoError,
    LocalProtocolError,
    MalformedMessage,
    RemoteProtocolError,
    SottovoceError,
    TransportError,
)
from sottovoce.identity import latest_time
from sottovoce.transport.base import Connected, Delivery, Disconnected, Transport
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
        self._hands = Performer(
            setup, transport, report=self._report, refuse=self._refuse, coordinator_ms=self._coordinator_ms
        )
        self._bench, self._library = self._hands.bench, self._hands.library
        name, fleet = setup.identity.certificate.name, setup.identity.certificate.fleet
        self._verifier = Verifier(setup.anchor, device=name, fleet=fleet)
        device = Device(
            identity=setup.identity,
            anchor=setup.anchor,
            policy=setup.config.policy,
            entropy=setup.entropy,
            fast_aes=has_fast_aes(),
            resident=setup.resident,
        )
        self.participation = Participation(
            device, entry=self._hands.remembered(), last_signed_ms=self._hands.ledger.last_signed_ms()
        )
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
        self._hands.gather()
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
            self._hands.close()

    def _tick(self) -> None:
        now_ms = self._clock()
        self._library.retry(now_ms)
        self._hands.perform(self.participation.tick(now_ms))

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
            self._hands.perform(self.participation.fail(error, self._clock()))
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
        self._guarded(lambda: self._hands.perform(self.participation.connected(self._clock())))

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
                self._topics.status(identity.certificate.name), sealed_status(identity, online=online), retain=True
            )
        except TransportError as error:
            self._refuse("transport", error)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _deliver(self, delivery: Delivery) -> None:
        if self._library.owns(delivery.topic):
            self._take_chunk(delivery)
            return
        try:
            opened = self._verifier.open(delivery.topic, delivery.payload, at=self._at())
            effects = [] if opened is None else self.participation.receive(opened, self._clock())
        except (RemoteProtocolError, CryptoError) as error:
            self._refuse(error.reason, error)
            return
        self._hands.perform(effects)

    def _take_chunk(self, delivery: Delivery) -> None:
        try:
            self._topics.split_blob_chunk(delivery.topic)
        except MalformedMessage as error:
            # Anybody may have published it. What the library raises below is about blobs that a coordinator has signed.
            self._refuse(error.reason, error)
            return
        self._library.receive(delivery.topic, delivery.payload, now_ms=self._clock())

    def _report(self, event: Event) -> None:
        self._hands.perform(self.participation.report(event, self._clock()))

    def _work(self) -> None:
        done = self._bench.run_batch()
        self._happened_ms = self._clock()
        if done:
            self._report(WorkFinished())

    # --- small things -------------------------------------------------------------------------------------------------

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
