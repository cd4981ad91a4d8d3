"""What may happen in each state of a device's part in a round: one table of pure functions, no I/O.

See `edge_agent.states` for the states. A step takes the device, the state, the message or event, and the time; it
returns the next state and the effects, or raises: then nothing has changed, and `edge_agent.participation` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import msgspec

from edge_agent.contributions import bounded
from edge_agent.effects import (
    AdoptState,
    AdvanceRound,
    BlobFetched,
    Contribution,
    ContributionLoaded,
    Effect,
    Entry,
    Event,
    Fetch,
    ForgetPending,
    HoldClientState,
    KeepPublished,
    LoadContribution,
    Log,
    Remember,
    SendChunk,
    Settle,
    Spend,
    StartWork,
    StopWork,
    WorkFinished,
)
from edge_agent.policy import client_terms
from edge_agent.states import (
    TAKING_PART,
    Advertised,
    AwaitingOutcome,
    CheckedIn,
    Device,
    Fetching,
    Idle,
    Moment,
    Opening,
    OpenRound,
    Sharing,
    State,
    Uploaded,
    Uploading,
    Waiting,
    Watching,
    Working,
    entry_of,
    present,
)
from sottovoce.errors import ConfigError, LocalProtocolError, MalformedMessage, PolicyRefusal, RemoteProtocolError
from sottovoce.identity import NAME, SignedContext
from sottovoce.plan import Plan
from sottovoce.secagg.client import ClientSession
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.wire.chunks import missing_in_bitmap
from sottovoce.wire.messages import (
    REASON_CODE,
    AdvertiseKeys,
    AdvertiseKeysRequest,
    MaskedInput,
    MaskedInputRequest,
    Message,
    NotSelected,
    Outcome,
    Ready,
    Roster,
    RoundOver,
    SecAggParameters,
    Selected,
    ShareKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmasking,
    UnmaskingRequest,
    UploadSlot,
)

M = TypeVar("M", bound=Message)
CHUNKS_IN_FLIGHT = 2
_PENDING_KEPT_MS = 24 * 3600 * 1000
_LEAF_BYTES = 32


Step: TypeAlias = tuple[State, tuple[Effect, ...]]
StepFunction: TypeAlias = Callable[[Device, Any, Any, Moment], Step]


def leave(state: State, reason: str) -> Step:
    """Return the state outside the round, dropping every secret, and what has to be tidied up.

    A device that has spent its update goes on waiting for the outcome: it may be in the sum.

    Args:
        state: Any state.
        reason: Why, for people.
    """
    entry = entry_of(state)
    if entry is None:
        return state, ()
    if isinstance(state, AwaitingOutcome):
        return Watching(entry, reason), (Settle(entry.session, "unknown"), Remember(None))
    if isinstance(state, Uploading | Uploaded):
        return AwaitingOutcome(entry, state.round.give_up_ms), ()
    stop = (StopWork(),) if isinstance(state, Working) else ()
    forget = () if isinstance(state, Watching) else (Remember(None),)
    return Watching(entry, reason), (*stop, *forget)


def begin_fetching(round_: OpenRound) -> Step:
    """Return the step that asks for the program and the state."""
    refs = {ref.digest: ref for ref in (round_.plan.program, round_.announcement.state)}
    return Fetching(round_, frozenset(refs)), tuple(Fetch(ref) for ref in refs.values())


# --- training window --------------------------------------------------------------------------------------------------


def _selected(device: Device, state: CheckedIn, message: Selected, now: Moment) -> Step:
    if not NAME.fullmatch(message.route):
        raise MalformedMessage("a route that cannot be a topic level")
    entry = msgspec.structs.replace(state.round.entry, route=message.route)
    next_state, effects = begin_fetching(replace(state.round, entry=entry))
    return next_state, (Log(f"selected for {_title(entry)}"), Remember(entry), *effects)


def _not_selected(device: Device, state: CheckedIn, message: NotSelected, now: Moment) -> Step:
    wait_s = max(0, message.retry_ms - now.coordinator_ms) // 1000
    reason = f"not selected; the next check-in is in about {wait_s} s"
    return Watching(state.round.entry, reason), (Log(f"{_title(state.round.entry)}: {reason}"),)


def _blob_fetched(device: Device, state: Fetching, event: BlobFetched, now: Moment) -> Step:
    missing = state.missing - {event.digest}
    if missing:
        return replace(state, missing=missing), ()
    round_ = state.round
    expires_ms = round_.announcement.rendezvous_closes_ms + _PENDING_KEPT_MS
    return Working(round_), (
        AdoptState(round_.plan.program.digest, round_.announcement.state, round_.entry.round),
        StartWork(round_.plan, round_.state, expires_ms),
    )


def _work_finished(device: Device, state: Working, event: WorkFinished, now: Moment) -> Step:
    ready = Ready(present=present(device, state.round.announcement, now))
    return Waiting(state.round), (
        Log(f"{_title(state.round.entry)}: the work is done, ready for the rendezvous"),
        state.round.send(ready),
    )


# --- rendezvous -------------------------------------------------------------------------------------------------------


def _open(device: Device, state: Waiting, message: AdvertiseKeysRequest, now: Moment) -> Step:
    promised, offered = state.round.plan.privacy.minimum_cohort, message.parameters.minimum_survivors
    if offered < promised:
        # The session enforces its own minimum; without this a coordinator could keep less than its plan has promised.
        raise PolicyRefusal("minimum_cohort", f"a sum of {offered} devices, where the plan promised {promised}")
    return Opening(state.round, message), (LoadContribution(state.round.plan.digest, state.round.state),)


def _advertise(device: Device, state: Opening, event: ContributionLoaded, now: Moment) -> Step:
    round_, contribution, parameters = state.round, event.contribution, state.request.parameters
    session = ClientSession(
        identity=device.identity,
        anchor=device.anchor,
        at=now.at,
        context=_context(device, round_.entry),
        plan=round_.plan.digest,
        state=round_.state,
        parameters=parameters,
        upload_key=state.request.upload_key,
        terms=client_terms(device.policy),
        vector=_quantised(device, round_.plan, parameters, contribution),
        entropy=device.entropy,
        chunk_bytes=device.chunk_bytes,
    )
    reply: AdvertiseKeys = session.advertise()
    return Advertised(round_, session, contribution.weight, contribution.client_state), (
        Log(f"{_title(round_.entry)}: in the rendezvous"),
        round_.send(reply),
    )


def _share(device: Device, state: Advertised, message: Roster, now: Moment) -> Step:
    reply = _expect(state.session.receive(message), ShareKeys)
    cohort = len(message.leaves) // _LEAF_BYTES
    return Sharing(state.round, state.session, state.weight, cohort, state.client_state), (
        state.round.send(reply, state.session.session_id),
    )


def _mask(device: Device, state: Sharing, message: MaskedInputRequest, now: Moment) -> Step:
    session, round_ = state.session, state.round
    reply = _expect(session.receive(message), MaskedInput)
    entry = msgspec.structs.replace(round_.entry, session=session.session_id)
    spent = replace(round_, entry=entry)
    held = () if state.client_state is None else (HoldClientState(round_.id, state.client_state),)
    # The order is the guarantee: the new client state waits for the outcome, the plain result is gone, and the ledger
    # has its row, all before a masked byte can leave.
    return Uploading(spent, session, reply.vector), (
        *held,
        ForgetPending(round_.plan.digest, round_.state),
        Spend(
            round_.plan, round_.state, entry.round, entry.attempt, session.session_id, state.cohort, state.weight
        ),
        AdvanceRound(entry.plan_name, entry.round, entry.attempt),
        Remember(entry),
        spent.send(reply, session.session_id),
    )  # fmt: skip


def _upload(device: Device, state: Uploading, message: UploadSlot, now: Moment) -> Step:
    if message.complete:
        return Uploaded(state.round, state.session), ()
    missing = missing_in_bitmap(message.received, state.vector.chunk_count)
    in_flight = state.in_flight & frozenset(missing)
    fresh = [index for index in missing if index not in in_flight][: CHUNKS_IN_FLIGHT - len(in_flight)]
    masked = state.session.masked_vector
    if masked is None:
        raise LocalProtocolError("the masked vector is gone although it has not arrived")
    vector = memoryview(masked)
    route, session = state.round.entry.route, state.session.session_id
    chunks = [SendChunk(route, session, i, bytes(vector[state.vector.chunk_slice(i)])) for i in fresh]
    return replace(state, in_flight=in_flight.union(fresh)), tuple(chunks)


def _stay(device: Device, state: State, message: Message, now: Moment) -> Step:
    return state, ()


def _sign_survivors(device: Device, state: Uploading | Uploaded, message: SurvivorsRequest, now: Moment) -> Step:
    reply = _expect(state.session.receive(message), SurvivorsSignature)
    return Uploaded(state.round, state.session), (state.round.send(reply, state.session.session_id),)


def _reveal_shares(device: Device, state: Uploading | Uploaded, message: UnmaskingRequest, now: Moment) -> Step:
    reply = _expect(state.session.receive(message), Unmasking)
    return AwaitingOutcome(state.round.entry, state.round.give_up_ms), (
        state.round.send(reply, state.session.session_id),
    )


# --- the end ----------------------------------------------------------------------------------------------------------


def _outcome(device: Device, state: State, message: Outcome, now: Moment) -> Step:
    entry = entry_of(state)
    if entry is None or message.announcement != entry.announcement:
        return state, ()
    mine = device.name in message.survivors
    result = "committed" if message.committed else f"abandoned ({_code(message.reason)})"
    effects: list[Effect] = [Log(f"{_title(entry)} is {result}" + (", with this device's update" if mine else ""))]
    if isinstance(state, Working):
        effects.append(StopWork())
    if entry.session:
        effects.append(Settle(entry.session, "committed" if message.committed and mine else "abandoned"))
    if message.committed and isinstance(state, TAKING_PART):
        # A result computed from a superseded state is of no use to a later round.
        effects.append(ForgetPending(state.round.plan.digest, state.round.state))
    if entry.plan_name:
        effects.append(AdvanceRound(entry.plan_name, entry.round, entry.attempt))
    effects.append(Remember(None))
    if message.committed and entry.publishes:
        effects.append(KeepPublished(entry.publishes, message.state, entry.round))
    elif message.committed and entry.program:
        effects.append(AdoptState(entry.program, message.state, entry.round + 1))
    return Watching(entry, result), tuple(effects)


def _round_over(device: Device, state: State, message: RoundOver, now: Moment) -> Step:
    reason, entry = _code(message.reason), entry_of(state)
    next_state, effects = leave(state, f"the coordinator says it is over ({reason})")
    return next_state, (*effects, Log(f"{_title(entry)} is over for this device ({reason})"))


_ENDINGS: Mapping[tuple[type[State], type[Message | Event]], StepFunction] = {
    **{(state, RoundOver): _round_over for state in TAKING_PART},
    **{(state, Outcome): _outcome for state in (*TAKING_PART, Watching, AwaitingOutcome, Idle)},
    # A selection that is repeated with a fresh time changes nothing: the route stands.
    **{(state, Selected): _stay for state in (Fetching, Working, Waiting)},
    # A coordinator that answers what crossed its own last word on the way.
    (AwaitingOutcome, RoundOver): _stay,
    (AwaitingOutcome, UploadSlot): _stay,
    (Watching, RoundOver): _stay,
}

STEPS: Mapping[tuple[type[State], type[Message | Event]], StepFunction] = {
    (CheckedIn, Selected): _selected,
    (CheckedIn, NotSelected): _not_selected,
    (Fetching, BlobFetched): _blob_fetched,
    (Working, WorkFinished): _work_finished,
    (Waiting, AdvertiseKeysRequest): _open,
    (Opening, ContributionLoaded): _advertise,
    (Advertised, Roster): _share,
    (Sharing, MaskedInputRequest): _mask,
    (Uploading, UploadSlot): _upload,
    (Uploading, SurvivorsRequest): _sign_survivors,
    (Uploading, UnmaskingRequest): _reveal_shares,
    (Uploaded, UploadSlot): _stay,
    (Uploaded, SurvivorsRequest): _sign_survivors,
    (Uploaded, UnmaskingRequest): _reveal_shares,
    **_ENDINGS,
}
"""The whole of what may happen. Announcements are not in it: they open the next round beside the current one."""


# --- small things -----------------------------------------------------------------------------------------------------


def _title(entry: Entry | None) -> str:
    if entry is None:
        return "no round"
    again = f" (attempt {entry.attempt})" if entry.attempt else ""
    return f"round {entry.round}{again} of {entry.plan_name}"


def _code(reason: str) -> str:
    """Return a reason from outside if it is a short code, for the log is no place for anything else."""
    return reason if REASON_CODE.fullmatch(reason) else "no reason that can be read"


def _context(device: Device, entry: Entry) -> SignedContext:
    return SignedContext(device.name, entry.coordinator, device.fleet, entry.round, entry.attempt)


def _quantised(device: Device, plan: Plan, parameters: SecAggParameters, contribution: Contribution) -> bytearray:
    try:
        layout = layout_of(plan, maximum_clients=parameters.maximum_clients)
    except ConfigError as error:
        raise RemoteProtocolError(f"the plan does not fit the session: {error}") from error
    layout.require(parameters)
    values = bounded(plan, contribution.values)
    return encode(layout, values, weight=contribution.weight, entropy=device.entropy)


def _expect(reply: object, kind: type[M]) -> M:
    if not isinstance(reply, kind):
        raise LocalProtocolError(f"the session answered {type(reply).__name__} instead of {kind.__name__}")
    return reply
