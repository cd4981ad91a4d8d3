"""The reporting phase: the stages of secure aggregation within one rendezvous, from the first key to the sum.

`ServerSession` knows the cryptography; here stand the deadlines, the upload slots and who is still waited for. Every
function takes the phase and returns the next one with its effects; an error leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coordinator.aggregation import UploadSlots
from coordinator.graph_parameters import graph_parameters
from coordinator.phases import (
    Abandoned,
    Agenda,
    Committed,
    DevicesDropped,
    Dropped,
    Effect,
    Phase,
    RendezvousOpened,
    Reporting,
    Send,
    StageOpened,
    Terms,
)
from coordinator.presence import Presence
from sottovoce.errors import RemoteProtocolError, RoundAbandoned
from sottovoce.identity import SignedContext
from sottovoce.secagg.encoding import decode
from sottovoce.secagg.graph import BASIS_POINTS, COMPLETE_GRAPH_LIMIT, GraphParameters, degree, threshold
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.mask_removal import Spread
from sottovoce.secagg.server import STAGE_NAMES, Reply, ServerSession
from sottovoce.wire.chunks import VectorChunk
from sottovoce.wire.codec import ALL, Opened
from sottovoce.wire.messages import (
    Ready,
    RoundOver,
    SecAggParameters,
)


class NotInCohort(RemoteProtocolError):
    """A message that only a member of the cohort may send."""

    reason = "not_in_cohort"


class ForeignSession(RemoteProtocolError):
    """A chunk of a masked vector that belongs to another session."""

    reason = "foreign_session"


@dataclass(frozen=True, slots=True)
class Situation:
    """What every step may look at beside its phase.

    Attributes:
        agenda: What the round is about.
        terms: Numbers and deadlines.
        presence: Who is connected.
        entropy: Returns that many random bytes.
        spread: Over how many threads masks are taken off.
        now_ms: The coordinator's time.
    """

    agenda: Agenda
    terms: Terms
    presence: Presence
    entropy: Callable[[int], bytes]
    spread: Spread
    now_ms: int


def parameters_of(terms: Terms, agenda: Agenda, *, fast_aes: bool) -> SecAggParameters:
    """Return the parameters that a session under these terms agrees on."""
    layout = layout_of(agenda.plan, maximum_clients=terms.wanted)
    return SecAggParameters(
        mode=terms.mode,
        cipher="aes-128-ctr" if fast_aes else "chacha20",
        minimum_survivors=terms.minimum,
        maximum_clients=terms.wanted,
        corrupt_share_bp=terms.corrupt_share_bp,
        dropout_share_bp=terms.dropout_share_bp,
        vector_bytes=layout.vector_bytes,
        wide_bytes=layout.wide_bytes,
        packed=layout.packed,
    )


def graph_of(terms: Terms, members: int) -> GraphParameters:
    """Return the graph of a cohort of `members`: who of them masks with whom is then drawn from their roster.

    Raises:
        ConfigError: No graph is both safe and sure to complete under the terms' assumptions.
    """
    if members <= COMPLETE_GRAPH_LIMIT:
        return GraphParameters(degree(members), threshold(terms.mode, members, terms.corrupt_share_bp))
    return graph_parameters(
        clients=members,
        corrupt_share=terms.corrupt_share_bp / BASIS_POINTS,
        dropout_share=terms.dropout_share_bp / BASIS_POINTS,
        mode=terms.mode,
    )


def open_rendezvous(
    situation: Situation, *, cohort: Mapping[str, bool], ready: Mapping[str, bool], withdrawn: frozenset[str]
) -> tuple[Phase, list[Effect]]:
    """Return the reporting phase: the `ready` devices of the cohort are asked for keys; the rest may still come."""
    agenda, terms = situation.agenda, situation.terms
    session = ServerSession(
        context=SignedContext(agenda.coordinator, ALL, agenda.fleet, agenda.round, agenda.attempt),
        plan=agenda.plan.digest,
        state=agenda.state,
        parameters=parameters_of(terms, agenda, fast_aes=all(cohort[device] for device in ready)),
        expected=cohort.keys() - withdrawn,
        entropy=situation.entropy,
        graph_rule=lambda members: graph_of(terms, members),
        spread=situation.spread,
    )
    phase = Reporting(
        cohort=frozenset(cohort),
        invited=dict(ready),
        withdrawn=withdrawn,
        session=session,
        uploads=UploadSlots(limit=terms.slots, idle_ms=terms.slot_idle_ms),
        stage="advertise_keys",
        expected=frozenset(ready),
        stage_opened_ms=situation.now_ms,
        stage_closes_ms=situation.now_ms + terms.stage_ms,
        dropped={},
    )
    invitations = [Send(device, session.invitation) for device in sorted(ready)]
    invited = frozenset(ready)
    return phase, [RendezvousOpened(invited), StageOpened("advertise_keys", invited), *invitations]


def late_ready(situation: Situation, phase: Reporting, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    """Take in a device that is ready only now, as long as keys are being advertised."""
    device, message = opened.certificate.name, opened.message
    assert isinstance(message, Ready)
    if device not in phase.cohort or device in phase.withdrawn:
        raise NotInCohort(f"{device} is not in the cohort")
    if not phase.advertising:
        return phase, [Send(device, RoundOver(reason="late"))]
    invited = {**phase.invited, device: message.present}
    request = Send(device, phase.session.invitation)
    return replace(phase, invited=invited, expected=phase.expected | {device}), [request]


def session_message(situation: Situation, phase: Reporting, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    """Give a message of secure aggregation to the session."""
    if opened.certificate.name in phase.withdrawn:
        raise NotInCohort(f"{opened.certificate.name} has withdrawn")
    return phase, _sends(phase.session.receive(opened))


def masked_input(situation: Situation, phase: Reporting, opened: Opened[Any]) -> tuple[Phase, list[Effect]]:
    """Give a masked input's announcement to the session and its device an upload slot, or a place in the queue."""
    device = opened.certificate.name
    _, effects = session_message(situation, phase, opened)
    expected = phase.session.expected_vector(device)
    if expected is not None:  # Else it is a repeat, and the vector is in the sum.
        phase.uploads.enqueue(device, expected)
    return phase, [*effects, *granted(situation, phase)]


def granted(situation: Situation, phase: Reporting) -> list[Effect]:
    """Give the free slots to the queue and tell who got one."""
    devices = phase.uploads.grant(situation.now_ms, offline=situation.presence.offline)
    return [effect for device in devices for effect in progress(phase, device)]


def progress(phase: Reporting, device: str) -> list[Effect]:
    """Tell a device how far its upload is, if it has a slot."""
    slot = phase.uploads.progress(device)
    return [] if slot is None else [Send(device, slot, phase.session.session_id)]


def receive_chunk(
    situation: Situation, phase: Reporting, device: str, chunk: VectorChunk
) -> tuple[Phase, list[Effect]]:
    """Put a chunk in its place; a vector that is whole and verified is added to the sum, and freed.

    Raises:
        ForeignSession: The chunk belongs to another session.
        NoSlot: The device holds no upload slot.
        BadBlob: The chunk does not match what the device signed.
    """
    if chunk.session != phase.session.session_id:
        raise ForeignSession(f"a chunk of {device} for another session")
    upload = phase.uploads.add_chunk(device, chunk.index, chunk.content, situation.now_ms)
    if upload is None:
        return phase, progress(phase, device)
    phase.session.add_vector(device, upload)
    return phase, [*progress(phase, device), *granted(situation, phase)]


def withdraw(phase: Reporting, device: str) -> Reporting:
    """Wait no longer for a device that gave up."""
    phase.uploads.discard(device)
    return replace(phase, withdrawn=phase.withdrawn | {device})


def advance(situation: Situation, phase: Reporting) -> tuple[Phase, list[Effect]] | None:
    """Close the stage if it is over; else take idle slots back; None when there is nothing to do."""
    if _stage_is_over(situation, phase):
        return _close_stage(situation, phase)
    phase.uploads.reclaim(situation.now_ms, offline=situation.presence.offline)
    effects = granted(situation, phase)
    return (phase, effects) if effects else None


def waiting_for(phase: Reporting) -> Iterator[str]:
    """Yield the devices that the open stage still waits for."""
    return (device for device in phase.session.owing if device in phase.expected and device not in phase.withdrawn)


def _stage_is_over(situation: Situation, phase: Reporting) -> bool:
    if situation.now_ms >= phase.stage_closes_ms:
        return True
    lost = 0
    for device in waiting_for(phase):  # Usually the first one stays: this runs after every message.
        patient = phase.stage == "advertise_keys" and not phase.invited.get(device, True)
        if patient or not situation.presence.gone(device, situation.now_ms):
            return False
        lost += 1
    # When a broker fails, everybody seems gone. Closing early must not be what abandons the round.
    return lost == 0 or len(phase.expected) - lost >= situation.terms.minimum


def _close_stage(situation: Situation, phase: Reporting) -> tuple[Phase, list[Effect]]:
    if phase.collecting:
        phase.uploads.close()
    try:
        replies = phase.session.close_stage()
        dropped = _dropped(phase)
        if phase.stage == "unmasking":
            return _commit(situation, phase, dropped), _newly_dropped(phase, dropped)
    except RoundAbandoned as reason:
        dropped = _dropped(phase)
        ended = Abandoned(reason.reason, reason.detail, phase.cohort, dropped)
        return ended, _newly_dropped(phase, dropped)
    stage, expected = STAGE_NAMES[type(phase.session.stage)], phase.session.waiting_for()
    opened = replace(
        phase,
        stage=stage,
        expected=expected,
        stage_opened_ms=situation.now_ms,
        stage_closes_ms=situation.now_ms + situation.terms.stage_ms,
        dropped=dropped,
    )
    return opened, [*_newly_dropped(phase, dropped), StageOpened(stage, expected), *_sends(replies)]


def _commit(situation: Situation, phase: Reporting, dropped: Dropped) -> Committed:
    layout = layout_of(situation.agenda.plan, maximum_clients=situation.terms.wanted)
    survivors = frozenset(phase.session.survivors)
    aggregate = decode(layout, phase.session.result, survivors=len(survivors))
    return Committed(aggregate, phase.cohort, survivors, dropped)


def _dropped(phase: Reporting) -> Dropped:
    """Return who was lost in which stage; who was never asked for keys was lost in training."""
    never_ready = phase.cohort - phase.invited.keys()
    lost = {stage: tuple(sorted(set(devices) - never_ready)) for stage, devices in phase.session.dropped.items()}
    return {stage: devices for stage, devices in {"training": tuple(sorted(never_ready)), **lost}.items() if devices}


def _newly_dropped(phase: Reporting, dropped: Dropped) -> list[Effect]:
    return [DevicesDropped(stage, devices) for stage, devices in dropped.items() if stage not in phase.dropped]


def _sends(replies: Iterable[Reply]) -> list[Effect]:
    return [Send(reply.device, reply.message, reply.session) for reply in replies]
