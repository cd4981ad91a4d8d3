"""The hands of the shell: performs what the participation asks for, on the broker and on the device's disk.

Effects are performed in the order given, and an error stops the ones after it: nothing masked is published unless the
update was erased and the ledger has its row.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from edge_agent.client_states import ClientStates
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
    HoldClientState,
    KeepEvidence,
    KeepPublished,
    KeepTime,
    LoadContribution,
    LocalFacts,
    Log,
    PlanFetched,
    Remember,
    Send,
    SendChunk,
    Settle,
    SettleClientState,
    Spend,
    StartWork,
    StopWork,
    WorkFinished,
)
from edge_agent.evidence import keep_evidence
from edge_agent.examples import ExampleStore
from edge_agent.home import Home
from edge_agent.latest import LATEST_FOLDER, keep_latest
from edge_agent.ledger import Ledger, Release
from edge_agent.library import Library
from edge_agent.pending import PendingStore, decode_entry, encode_entry
from edge_agent.published import PUBLISHED_FOLDER, keep_published
from edge_agent.source_settings import SourceConfig
from edge_agent.sources import Sources
from edge_agent.workbench import Assignment, Workbench, newest_used
from sottovoce.errors import ConfigError, LocalProtocolError, MalformedMessage, ProgramError, TransportError
from sottovoce.identity import Identity, SignedContext, TrustAnchor
from sottovoce.plan import Plan, decode_plan
from sottovoce.transport.base import Transport
from sottovoce.wire.chunks import VectorChunk, encode_vector_chunk, fragments
from sottovoce.wire.codec import seal
from sottovoce.wire.topics import Topics

_ENTRY_KEPT_MS = 30 * 24 * 3600 * 1000
_ENTRY_KEY = b"current"

log = logging.getLogger("edge-agent")


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


class Performer:
    """What one device can do.

    Attributes:
        bench: Runs programs.
        library: Gets blobs.
        ledger: What has left this device.
    """

    def __init__(
        self,
        setup: Setup,
        transport: Transport,
        *,
        report: Callable[[Event], None],
        refuse: Callable[[str, TransportError], None],
        coordinator_ms: Callable[[], int],
    ) -> None:
        """Open the device's files.

        Args:
            setup: What the agent is made of.
            transport: The link to the broker.
            report: Takes the events that follow from effects.
            refuse: Takes what the link would not carry.
            coordinator_ms: The best guess of the coordinator's time.

        Raises:
            ConfigError: The folder's files cannot be used.
        """
        self._setup = setup
        self._transport = transport
        self._report = report
        self._refuse = refuse
        self._coordinator_ms = coordinator_ms
        self._topics = Topics(setup.identity.certificate.fleet)
        self.ledger = Ledger(setup.home.ledger)
        self._examples = ExampleStore(setup.home.examples)
        self._pending = PendingStore(setup.home.pending, setup.identity, discarded=log.warning)
        self._pending.sweep(now_ms=max(setup.clock(), self.ledger.last_signed_ms()))
        self._client_states = ClientStates(
            setup.home.client_states,
            setup.identity,
            maximum_bytes=setup.config.policy.max_client_state_bytes,
            entropy=setup.entropy,
            log=log.info,
        )
        self.bench = Workbench(
            self._pending,
            self._client_states,
            runtime=setup.config.runtime,
            threads=setup.config.policy.threads,
            clock=setup.clock,
            checkpoint_ms=round(setup.config.checkpoint_s * 1000),
            entropy=setup.entropy,
            log=log.info,
        )
        self.library = Library(setup.home.blobs, transport, self._topics)
        self._sources = Sources(setup.config.source, self._examples, connect=self._connect_nearby, retain=self._retain)

    def remembered(self) -> Entry | None:
        """Return the round this device was in when it was stopped, if any."""
        content = self._pending.load("entry", _ENTRY_KEY, now_ms=self._setup.clock())
        try:
            return None if content is None else decode_entry(content)
        except MalformedMessage as error:
            log.warning("%s; starting without it", error)
            return None

    def perform(self, effects: Sequence[Effect]) -> None:
        """Perform `effects` in order; an error stops the rest.

        Raises:
            SottovoceError: What went wrong; the part in the round has to end.
        """
        for effect in effects:
            _PERFORM[type(effect)](self, effect)

    def gather(self) -> None:
        """Take in what the owner's sources have for the collections."""
        try:
            self._sources.poll(now_ms=self._setup.clock(), now_s=self._coordinator_ms() / 1000)
        except ConfigError as error:
            log.warning("the examples of this device's sources are not kept: %s", error)

    def close(self) -> None:
        """Keep the work where it is; close the device's files and sources."""
        with ExitStack() as files:
            for opened in (self._client_states, self._examples, self.ledger, self._sources, self.bench):
                files.callback(opened.close)

    def _connect_nearby(self, collection: str, source: SourceConfig) -> Transport:
        from edge_agent.local_broker import connect  # A device without such a source needs no MQTT library for it.

        return connect(source, client_id=f"sottovoce-{self._setup.config.device}-{collection}")

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
        self.library.forget_requests()

        def arrived(content: bytes) -> None:
            self._report(PlanFetched(content, self._facts(content, effect.state)))

        self.library.request(effect.ref, arrived, now_ms=self._setup.clock())

    def _fetch(self, effect: Fetch) -> None:
        def arrived(content: bytes) -> None:
            self._report(BlobFetched(effect.ref.digest))

        self.library.request(effect.ref, arrived, now_ms=self._setup.clock())

    def _adopt_state(self, effect: AdoptState) -> None:
        folder = self._setup.home.path / LATEST_FOLDER

        def arrived(content: bytes) -> None:
            keep_latest(folder, effect.program, content, round=effect.round)

        self.library.request(effect.ref, arrived, now_ms=self._setup.clock(), lasting=True)

    def _keep_published(self, effect: KeepPublished) -> None:
        folder = self._setup.home.path / PUBLISHED_FOLDER

        def arrived(content: bytes) -> None:
            try:
                keep_published(folder, self.library.read(effect.plan), content, round=effect.round)
            except ProgramError as error:
                log.warning("the published sums of round %d cannot be read without their plan: %s", effect.round, error)

        self.library.request(effect.ref, arrived, now_ms=self._setup.clock(), lasting=True)

    def _start_work(self, effect: StartWork) -> None:
        assignment = Assignment(
            plan=effect.plan,
            state=effect.state,
            expires_ms=effect.expires_ms,
            now_ms=self._coordinator_ms(),
            newest_example=self._span(effect.plan)[1],
        )
        done = self.bench.start(
            assignment,
            read_blob=self.library.read,
            read_examples=lambda collection, newest: self._examples.read(collection, newest=newest),
        )
        if done:
            self._report(WorkFinished())

    def _stop_work(self, effect: StopWork) -> None:
        self.bench.stop()

    def _load_contribution(self, effect: LoadContribution) -> None:
        contribution = self.bench.load(effect.plan, effect.state, now_ms=self._coordinator_ms())
        self._report(ContributionLoaded(contribution))

    def _forget_pending(self, effect: ForgetPending) -> None:
        self.bench.forget(effect.plan, effect.state)

    def _spend(self, effect: Spend) -> None:
        plan, limit = effect.plan, self._setup.config.policy.max_releases_per_state
        oldest, newest = self._span(plan)
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
            newest_example=newest,
            contents=tuple((aggregation.name, aggregation.size) for aggregation in plan.aggregations),
        )
        self.ledger.spend(release, max_releases_per_state=limit, oldest_example=oldest, plan=plan)

    def _hold_client_state(self, effect: HoldClientState) -> None:
        self._client_states.hold(effect.round, effect.value)

    def _settle_client_state(self, effect: SettleClientState) -> None:
        self._client_states.settle(effect.round, survived=effect.survived)

    def _remember(self, effect: Remember) -> None:
        if effect.entry is None:
            self._pending.erase("entry", _ENTRY_KEY)
        else:
            expires_ms = self._coordinator_ms() + _ENTRY_KEPT_MS
            self._pending.save("entry", _ENTRY_KEY, encode_entry(effect.entry), expires_ms=expires_ms)

    def _settle(self, effect: Settle) -> None:
        try:
            self.ledger.settle(effect.session, effect.outcome)
        except LocalProtocolError as error:
            log.warning("the ledger: %s", error)

    def _advance_round(self, effect: AdvanceRound) -> None:
        fleet = self._setup.identity.certificate.fleet
        self.ledger.advance_round(fleet, effect.plan_name, round=effect.round, attempt=effect.attempt)

    def _keep_evidence(self, effect: KeepEvidence) -> None:
        paths = keep_evidence(self._setup.home.evidence, effect.envelopes)
        log.warning("kept as evidence, to be shown to the fleet's operator: %s", ", ".join(map(str, paths)))

    def _keep_time(self, effect: KeepTime) -> None:
        self.ledger.note_signed_ms(effect.signed_ms)

    def _facts(self, plan_content: bytes, state: bytes) -> LocalFacts:
        """Return what the disk knows about a plan; nothing about bytes that are none, which will be refused."""
        try:
            plan = decode_plan(plan_content)
        except ConfigError:
            return LocalFacts(last_round=None, releases=0, examples=0)
        self._retain(plan.collection)
        return LocalFacts(
            last_round=self.ledger.last_round(plan.fleet, plan.name),
            releases=self.ledger.releases_of_state(plan.digest, state, oldest_example=self._span(plan)[0]),
            examples=self._examples.count(plan.collection),
            last_release=self.ledger.last_release(plan.fleet, plan.name),
        )

    def _span(self, plan: Plan) -> tuple[int, int]:
        """Return the numbers of the oldest and the newest example that `plan` would use now."""
        return self._examples.span(plan.collection, newest=newest_used(plan.work))

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


_PERFORM: Mapping[type[Effect], Callable[[Performer, Any], None]] = {
    Log: Performer._log,
    Send: Performer._send,
    SendChunk: Performer._send_chunk,
    FetchPlan: Performer._fetch_plan,
    Fetch: Performer._fetch,
    AdoptState: Performer._adopt_state,
    KeepPublished: Performer._keep_published,
    StartWork: Performer._start_work,
    StopWork: Performer._stop_work,
    LoadContribution: Performer._load_contribution,
    ForgetPending: Performer._forget_pending,
    Spend: Performer._spend,
    HoldClientState: Performer._hold_client_state,
    SettleClientState: Performer._settle_client_state,
    Remember: Performer._remember,
    Settle: Performer._settle,
    AdvanceRound: Performer._advance_round,
    KeepEvidence: Performer._keep_evidence,
    KeepTime: Performer._keep_time,
}
