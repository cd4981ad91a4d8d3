"""The server's steps, pure but for the answer they record: what a device's message must be, what a closed stage asks.

A `take_*` function checks one message whole and only then records it, so a bad message changes nothing. A `close_*`
function returns the next stage and what to ask of whom, or raises RoundAbandoned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sottovoce.errors import ConfigError, MalformedMessage, RemoteProtocolError, RoundAbandoned
from sottovoce.identity import Certificate
from sottovoce.secagg import graph, keys, mask_removal, segments, shamir
from sottovoce.secagg.graph import GraphRule
from sottovoce.secagg.roster import Shape, check_advertisement, shape_of
from sottovoce.secagg.server_stages import (
    AdvertisingKeys,
    Candidate,
    CheckingConsistency,
    Cohort,
    CollectingInputs,
    CollectingShares,
    SharingKeys,
    Unmasked,
)
from sottovoce.secagg.transcript import DIGEST_BYTES, Agreement, survivors_digest
from sottovoce.secagg.uploads import ExpectedVector, expect
from sottovoce.wire.chunks import MIN_FRAGMENT_BYTES, Assembly
from sottovoce.wire.codec import Opened
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInput,
    MaskedInputRequest,
    Message,
    Roster,
    SecAggParameters,
    ShareKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmasking,
    UnmaskingRequest,
)

_CIPHERTEXT = np.dtype((np.void, keys.CIPHERTEXT_BYTES))
_WIDEST_WORD_BYTES = 8
_MOST_SMALL_CHUNKS = 64
"""A vector in more chunks has larger ones, of MIN_FRAGMENT_BYTES: nobody makes the coordinator take a message for less.
"""
_MOST_CHUNKS = 10_000
"""Every chunk is answered with a bitmap of all; of so many that are 12 MB for one vector. The largest there may be, cut
for the narrowest brokers (60 KiB), has 8,739."""


def take_advertisement(agreement: Agreement, stage: AdvertisingKeys, opened: Opened[AdvertiseKeys]) -> None:
    """Record a device's fresh keys.

    Raises:
        RemoteProtocolError: The device was not invited, or the advertisement binds something else.
        MalformedMessage, LowOrderPoint: A key is not one.
    """
    if opened.certificate.name not in stage.expected:
        raise RemoteProtocolError(f"{opened.certificate.name} was not invited to this session")
    member = check_advertisement(agreement, opened)
    stage.answers[member.device] = Candidate(member, opened.payload)


def take_shares(agreement: Agreement, stage: SharingKeys, opened: Opened[ShareKeys]) -> None:
    """Record a member's encrypted shares; what is inside them the server cannot see.

    Raises:
        MalformedMessage: Not one ciphertext of the right length for every neighbour, or no commitment.
    """
    message, position = opened.message, _position(stage.cohort, opened.certificate)
    expected = keys.CIPHERTEXT_BYTES * stage.cohort.shape.neighbour_count
    if len(message.ciphertexts) != expected or len(message.commitment) != DIGEST_BYTES:
        raise MalformedMessage(f"{opened.certificate.name} did not send one ciphertext for every neighbour")
    stage.answers[position] = message


def take_announcement(agreement: Agreement, stage: CollectingInputs, opened: Opened[MaskedInput]) -> None:
    """Record which vector a member will upload, and what its chunks will be checked with.

    Raises:
        RemoteProtocolError: The member has not shared keys in time.
        MalformedMessage: The vector does not have the session's length, or is cut into too many small chunks, or not
            one token comes for every neighbour.
    """
    position = _position(stage.cohort, opened.certificate)
    if position not in stage.commitments:
        raise RemoteProtocolError(f"{opened.certificate.name} did not share keys in time")
    vector, member = opened.message.vector, stage.cohort.members[position]
    if vector.size != agreement.parameters.vector_bytes:
        raise MalformedMessage(f"{member.device} announced {vector.size} bytes, not the session's vector")
    small = vector.chunk_count > _MOST_SMALL_CHUNKS and vector.chunk_bytes < MIN_FRAGMENT_BYTES
    if small or vector.chunk_count > _MOST_CHUNKS:
        raise MalformedMessage(f"{member.device} cut its vector into {vector.chunk_count} chunks, each too small")
    tokens = _tokens_by_neighbour(agreement, stage, position, opened.message.inclusions)
    stage.announced[position] = expect(vector, stage.upload_keys[position], agreement.parameters.cipher)
    stage.inclusions[position] = tokens


def take_signature(agreement: Agreement, stage: CheckingConsistency, opened: Opened[SurvivorsSignature]) -> None:
    """Record a survivor's signature on the survivor set.

    Raises:
        RemoteProtocolError: The member is not a survivor, or signed something else.
    """
    position = _position(stage.inputs.cohort, opened.certificate)
    if position not in stage.alive or opened.message.survivors != stage.digest:
        raise RemoteProtocolError(f"{opened.certificate.name} signed what it was not asked to sign")
    stage.answers[position] = opened.payload


def take_unmasking(agreement: Agreement, stage: CollectingShares, opened: Opened[Unmasking]) -> None:
    """Record a survivor's shares.

    Raises:
        RemoteProtocolError: The member was not asked.
        MalformedMessage: Not one share of every neighbour that shared keys.
        BadShare: A limb out of range.
    """
    shares, position = opened.message.shares, _position(stage.inputs.cohort, opened.certificate)
    if position not in stage.asked:
        raise RemoteProtocolError(f"{opened.certificate.name} was not asked for shares")
    if len(shares) != shamir.SHARE_BYTES * stage.asked[position]:
        raise MalformedMessage(f"{opened.certificate.name} did not give exactly the shares asked for")
    stage.answers[position] = shamir.parse_shares(shares)


def add_upload(total: bytearray, upload: Assembly[ExpectedVector], parameters: SecAggParameters) -> None:
    """Add a whole masked vector to `total`, in place; every word wraps around.

    Chunks of whole words are added as they came; else (packed entries, chunks of odd sizes) they are joined first.

    Raises:
        BadBlob: A chunk is missing.
    """
    chunks = upload.chunks()
    runs = _runs(parameters, upload.ref.chunk_bytes)
    if runs is None:
        segments.add_packed_into(total, b"".join(chunks), parameters)
        return
    for run in reversed(runs):  # The chunk that came last is still in the processor's cache.
        target = np.frombuffer(total, run.dtype, run.count, run.start)
        np.add(target, np.frombuffer(chunks[run.chunk], run.dtype, run.count, run.offset), target)


def close_advertising(agreement: Agreement, stage: AdvertisingKeys) -> tuple[SharingKeys, dict[str, Message]]:
    """Fix the roster: every member gets the leaves of all and the signed advertisements of its neighbours.

    Raises:
        RoundAbandoned: Too few devices advertised.
    """
    candidates = sorted(stage.answers.values(), key=lambda candidate: candidate.member.leaf)
    members = tuple(candidate.member for candidate in candidates)
    leaves = [member.leaf for member in members]
    shape = _shape_chosen(agreement, stage.graph_rule, leaves)
    position_of = {member.device: position for position, member in enumerate(members)}
    cohort = Cohort(shape, members, position_of, shape.graph.all_neighbours())
    joined, payloads = b"".join(leaves), [candidate.payload for candidate in candidates]
    rosters: dict[str, Message] = {
        member.device: Roster(
            leaves=joined,
            neighbours=shape.neighbour_count,
            threshold=shape.threshold,
            advertisements=tuple([payloads[neighbour] for neighbour in cohort.neighbours_of(position)]),
        )
        for position, member in enumerate(members)
    }
    return SharingKeys(cohort, stage.upload_keys), rosters


def close_sharing(agreement: Agreement, stage: SharingKeys) -> tuple[CollectingInputs, dict[str, Message]]:
    """Forward the shares among those who shared keys; from here on nobody else's keys count.

    Raises:
        RoundAbandoned: Too few members shared keys.
    """
    cohort, answers = stage.cohort, stage.answers
    _require_enough(agreement, len(answers), cohort.shape.threshold, "shared keys")
    requests = dict(_forwarded(cohort, answers))
    commitments = {position: answer.commitment for position, answer in answers.items()}
    total = bytearray(segments.unpacked_bytes(agreement.parameters))
    return CollectingInputs(cohort, commitments, total, _upload_keys(agreement, stage)), requests


def close_inputs(
    agreement: Agreement, stage: CollectingInputs
) -> tuple[CheckingConsistency | CollectingShares, dict[str, Message]]:
    """Fix the survivor set: those whose whole vector is in the total. Unfinished uploads are out.

    Raises:
        RoundAbandoned: Too few vectors are in the total.
    """
    cohort, survivors, alive = stage.cohort, tuple(sorted(stage.added)), frozenset(stage.added)
    _require_enough(agreement, len(survivors), cohort.shape.threshold, "sent their masked input")
    _require_shares(stage, alive)
    if agreement.parameters.mode == "active":
        digest = survivors_digest(survivors, session=cohort.shape.session)
        request: Message = SurvivorsRequest(survivors=survivors)
        checking = CheckingConsistency(stage, survivors, alive, digest)
        return checking, {cohort.members[position].device: request for position in survivors}
    request = UnmaskingRequest(survivors=survivors, signatures=())
    collecting = CollectingShares(stage, survivors, alive, _shares_owed(stage, survivors))
    return collecting, {cohort.members[position].device: request for position in survivors}


def close_consistency(agreement: Agreement, stage: CheckingConsistency) -> tuple[CollectingShares, dict[str, Message]]:
    """Show every signer the signatures of t of its neighbours, and ask for the shares.

    Raises:
        RoundAbandoned: Fewer than t signers would see t signatures of others.
    """
    cohort, signers = stage.inputs.cohort, frozenset(stage.answers)
    requests: dict[str, Message] = {}
    for position in sorted(signers):
        around = cohort.neighbours_of(position)
        beside = [other for other in around if other in signers][: cohort.shape.threshold]
        if len(beside) == cohort.shape.threshold:
            shown = tuple(stage.answers[other] for other in beside)
            told = [stage.inputs.inclusions[other] for other in around if other in stage.alive]
            requests[cohort.members[position].device] = UnmaskingRequest(
                survivors=stage.survivors, signatures=shown, inclusions=b"".join(tokens[position] for tokens in told)
            )
    if len(requests) < cohort.shape.threshold:
        needed = cohort.shape.threshold + 1
        raise RoundAbandoned("too_few_signatures", f"{len(signers)} survivors signed their set, {needed} are needed")
    asked = _shares_owed(stage.inputs, [cohort.position_of[device] for device in requests])
    return CollectingShares(stage.inputs, stage.survivors, stage.alive, asked), requests


def close_unmasking(
    agreement: Agreement, stage: CollectingShares, spread: mask_removal.Spread = mask_removal.AT_ONCE
) -> tuple[Unmasked, dict[str, Message]]:
    """Rebuild the secrets that the survivor set calls for and take every mask off the total, spread over `spread`.

    Raises:
        RoundAbandoned: Too few shares, or shares that no subset makes right.
    """
    _require_shares(stage.inputs, stage.answers.keys())
    mask_removal.take_masks_off(agreement, stage, mask_removal.rebuild(stage), spread)
    segments.reduce(stage.inputs.total, agreement.parameters)
    return Unmasked(stage.inputs.total), {}


@dataclass(frozen=True, slots=True)
class _Run:
    """Words of one width that lie in one chunk.

    Attributes:
        chunk: Index of the chunk.
        offset: Byte offset in the chunk.
        start: Byte offset in the vector.
        count: Words.
        dtype: Of a word.
    """

    chunk: int
    offset: int
    start: int
    count: int
    dtype: np.dtype[np.unsignedinteger]


@lru_cache(maxsize=8)
def _runs(parameters: SecAggParameters, chunk_bytes: int) -> tuple[_Run, ...] | None:
    """Return the runs of a vector cut into such chunks, or None: it has another form in memory, or chunks cut words."""
    parts = segments.segments_of(parameters)
    if chunk_bytes % _WIDEST_WORD_BYTES or not all(part.is_whole_words for part in parts):
        return None
    found: list[_Run] = []
    for chunk, at in enumerate(range(0, parameters.vector_bytes, chunk_bytes)):
        for part in parts:
            start, stop = max(part.start, at), min(part.stop, at + chunk_bytes)
            if start < stop:
                found.append(_Run(chunk, start - at, start, (stop - start) // part.dtype.itemsize, part.dtype))
    return tuple(found)


def _position(cohort: Cohort, sender: Certificate) -> int:
    position = cohort.position_of.get(sender.name)
    if position is None or cohort.members[position].certificate.fingerprint != sender.fingerprint:
        raise RemoteProtocolError(f"{sender.name} is not in this session's roster with this certificate")
    return position


def _upload_keys(agreement: Agreement, stage: SharingKeys) -> dict[int, bytes]:
    """Return the upload key of everybody who shared keys."""
    session, members, cipher = stage.cohort.shape.session, stage.cohort.members, agreement.parameters.cipher
    agree = stage.upload_keys.agree
    return {
        position: keys.upload_key(
            agree(members[position].channel_key), session=session, device=members[position].device, cipher=cipher
        )
        for position in stage.answers
    }


def _tokens_by_neighbour(
    agreement: Agreement, stage: CollectingInputs, position: int, inclusions: bytes
) -> dict[int, bytes]:
    """Return the inclusion tokens of the member at `position`, by the neighbour that each is for."""
    length, partners = keys.INCLUSION_BYTES, list[int]()
    if agreement.parameters.mode == "active":
        partners = [other for other in stage.cohort.neighbours_of(position) if other in stage.commitments]
    if len(inclusions) != length * len(partners):
        name = stage.cohort.members[position].device
        raise MalformedMessage(f"{name} did not send one inclusion token for every neighbour that shared keys")
    return {other: inclusions[length * i : length * (i + 1)] for i, other in enumerate(partners)}


def _shape_chosen(agreement: Agreement, rule: GraphRule, leaves: Sequence[bytes]) -> Shape:
    """Return the graph of this cohort, if there is one that is safe and enough have advertised for it."""
    _require_enough(agreement, len(leaves), 0, "advertised keys")
    try:
        figures = rule(len(leaves))
        shape = shape_of(agreement, leaves, figures)
    except ConfigError as error:
        raise RoundAbandoned("no_graph", str(error)) from error
    _require_enough(agreement, len(leaves), figures.threshold, "advertised keys")
    return shape


def _require_enough(agreement: Agreement, present: int, shares: int, what: str) -> None:
    needed = graph.survivors_needed(agreement.parameters, shares)
    if present < needed:
        raise RoundAbandoned("too_few_devices", f"{present} devices {what}, {needed} are needed")


def _require_shares(inputs: CollectingInputs, present: Collection[int]) -> None:
    """Give up early if some secret that the sum needs has too few holders left."""
    cohort, staying = inputs.cohort, inputs.cohort.marked(present)
    of_seeds, of_keys = (staying[who].sum(axis=1).tolist() for who in (cohort.holders, cohort.neighbours))
    for owner in inputs.commitments:
        left = of_seeds[owner] if owner in inputs.added else of_keys[owner]
        if left < cohort.shape.threshold:
            name, needed = cohort.members[owner].device, cohort.shape.threshold
            raise RoundAbandoned("too_few_shares", f"{left} devices can give shares for {name}, {needed} are needed")


def _shares_owed(inputs: CollectingInputs, asked: Iterable[int]) -> dict[int, int]:
    """Return how many shares each of `asked` must give: one of every neighbour that shared keys."""
    cohort = inputs.cohort
    owed = cohort.marked(inputs.commitments)[cohort.holders].sum(axis=1).tolist()
    return {position: owed[position] for position in asked}


def _forwarded(cohort: Cohort, answers: Mapping[int, ShareKeys]) -> Iterator[tuple[str, Message]]:
    """Yield what each of those who shared keys gets: the ciphertexts that the others of them made for it."""
    senders = np.array(sorted(answers))
    ciphertexts = np.frombuffer(b"".join(answers[sender].ciphertexts for sender in senders.tolist()), _CIPHERTEXT)
    recipient_of, sender_of = cohort.neighbours[senders].ravel(), np.repeat(senders, cohort.shape.neighbour_count)
    going = np.flatnonzero(cohort.marked(answers)[recipient_of])
    # Stable, so that senders keep rising; numpy sorts 16 bits in linear time.
    going = going[np.argsort(recipient_of[going].astype(np.uint16), kind="stable")]
    told, forwarded = sender_of[going].tolist(), ciphertexts.take(going)
    stops = np.searchsorted(recipient_of[going], senders, "right").tolist()
    for recipient, start, stop in zip(senders.tolist(), [0, *stops], stops, strict=False):
        request = MaskedInputRequest(tuple(told[start:stop]), forwarded[start:stop].tobytes())
        yield cohort.members[recipient].device, request
