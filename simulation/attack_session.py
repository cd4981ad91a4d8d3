"""A whole session of secure aggregation in memory, and what those who attack one of its devices may know of it.

Both sides are the real ones, in active mode; every message is signed, sealed, parsed and verified as on a broker. The
attacker is the coordinator (and the broker), who sees all messages, together with some captured devices. Nothing else
is looked at: the secrets of the other devices are never read.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from sottovoce.authority import Authority, create_authority, sign_request
from sottovoce.errors import BadShare, LocalProtocolError
from sottovoce.identity import Identity, Role, SignedContext, TrustAnchor, load_certificate, new_key, signing_request
from sottovoce.secagg import keys, shamir
from sottovoce.secagg.client import ClientSession, Request
from sottovoce.secagg.client_stages import InputMasked, KeysShared
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.server import Reply, ServerSession
from sottovoce.secagg.server_stages import Cohort, SharingKeys, Unmasked
from sottovoce.wire.chunks import assemble
from sottovoce.wire.codec import Opened, open_envelope, parse, seal
from sottovoce.wire.messages import AdvertiseKeysRequest, Message, SecAggParameters, Unmasking

COORDINATOR = "coordinator"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who takes part, every certificate signed by the fleet's own authority.

    Attributes:
        name: Of the fleet.
        anchor: The pinned CA.
        coordinator: The coordinator's identity.
        devices: Identities by device id.
        at: Time to judge certificates by.
    """

    name: str
    anchor: TrustAnchor
    coordinator: Identity
    devices: Mapping[str, Identity]
    at: datetime.datetime


@dataclass(frozen=True, slots=True)
class Captured:
    """What a captured device gives away.

    Attributes:
        mask: Its mask key pair: with it every pairwise mask between it and any other device can be computed.
        entrusted: Position -> the share of that member's mask key which this device keeps for it.
    """

    mask: keys.KeyPair = field(repr=False)
    entrusted: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """One committed session, as the coordinator saw it, and the captured devices.

    Attributes:
        parameters: Of the session.
        cohort: The members with their public keys, and the graph.
        masked: Device id -> the masked vector that it sent.
        answers: Device id -> the shares that it gave for unmasking.
        captured: Device id -> its secrets.
        total: The unmasked sum.
    """

    parameters: SecAggParameters
    cohort: Cohort
    masked: Mapping[str, bytes]
    answers: Mapping[str, Unmasking]
    captured: Mapping[str, Captured]
    total: bytes


def enrol(names: Collection[str], folder: Path, *, fleet: str, at: datetime.datetime) -> Fleet:
    """Return a fleet of devices `names`, enrolled by an authority whose files are made in `folder`."""
    authority = create_authority(folder, fleet=fleet, at=at)
    anchor = TrustAnchor(authority.certificate)
    devices = {name: _enrolled(authority, anchor, name, "device", at) for name in names}
    return Fleet(fleet, anchor, _enrolled(authority, anchor, COORDINATOR, "coordinator", at), devices, at)


def hold_session(
    fleet: Fleet,
    clients: Mapping[str, ClientSession],
    server: ServerSession,
    *,
    parameters: SecAggParameters,
    captured: Collection[str],
) -> Record:
    """Run the session to its end, nobody missing; return what the coordinator and the `captured` devices know.

    Args:
        fleet: Whose session it is.
        clients: Prepared sessions by device id, in round 0.
        server: Expecting exactly these devices.
        parameters: Of the session.
        captured: Device ids whose secrets the attacker reads.
    """
    masked: dict[str, bytes] = {}
    answers: dict[str, Unmasking] = {}
    masks: dict[str, keys.KeyPair] = {}
    entrusted: dict[str, dict[int, bytes]] = {}
    cohort: Cohort | None = None
    while not isinstance(server.stage, Unmasked):
        if isinstance(server.stage, SharingKeys):
            cohort = server.stage.cohort
        for reply in server.outstanding():
            device, client = reply.device, clients[reply.device]
            answer = _exchange(fleet, client, server, reply)
            vector = client.masked_vector
            announced = server.expected_vector(device)
            if vector is not None and announced is not None:
                masked[device] = bytes(vector)
                server.add_vector(device, assemble(announced, vector))
            if isinstance(answer, Unmasking):
                answers[device] = answer
            if device in captured:
                _read_secrets(client, device, masks, entrusted)
        server.close_stage()
    if cohort is None:
        raise LocalProtocolError("a session without a roster has no sum")
    secrets = {device: Captured(masks[device], entrusted[device]) for device in captured}
    return Record(parameters, cohort, masked, answers, secrets, bytes(server.result))


def without_known_masks(record: Record, victim: str, *, held: Collection[str], pool_shares: bool) -> bytearray:
    """Return the masked vector of `victim` less every mask that the coordinator and the `held` devices can compute.

    The self mask always goes: the coordinator rebuilds its seed from the survivors' answers, as in every round.

    Args:
        record: Of the session.
        victim: Device id.
        held: Captured devices that conspire.
        pool_shares: They also put together the shares of the victim's mask key that were entrusted to them.
    """
    cohort, vector = record.cohort, bytearray(record.masked[victim])
    session, cipher = cohort.shape.session, record.parameters.cipher
    position = cohort.position_of[victim]
    own = cohort.members[position]
    rebuilt = _pooled_mask_key(record, position, held) if pool_shares else None
    expander = MaskExpander(record.parameters)
    self_seed = _revealed_self_seed(record, position)
    expander.subtract(vector, keys.self_mask_key(self_seed, session=session, device=victim, cipher=cipher))
    for other in cohort.shape.neighbours(position):
        peer = cohort.members[other]
        if rebuilt is not None:
            secret = rebuilt.agree(peer.mask_key)
        elif peer.device in held:
            secret = record.captured[peer.device].mask.agree(own.mask_key)
        else:
            continue
        lower, upper = (victim, peer.device) if position < other else (peer.device, victim)
        key = keys.pairwise_mask_key(secret, session=session, lower=lower, upper=upper, cipher=cipher)
        # The member with the lower position has added this stream, the other one has subtracted it.
        (expander.subtract if position < other else expander.add)(vector, key)
    return vector


def _enrolled(authority: Authority, anchor: TrustAnchor, name: str, role: Role, at: datetime.datetime) -> Identity:
    key = new_key()
    request = signing_request(key, name=name, fleet=authority.fleet, role=role)
    issued = sign_request(authority, request, at=at, role=role)
    return Identity(key, anchor.verify(_der(issued.pem), at=at, role=role))


def _der(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return load_certificate(pem).public_bytes(Encoding.DER)


def _exchange(fleet: Fleet, client: ClientSession, server: ServerSession, reply: Reply) -> Message:
    """Carry one request to its device and the answer back, both in signed envelopes; return the answer."""
    device, session = reply.device, reply.session
    request = _carried(fleet, fleet.coordinator, reply.message, to=device, session=session).message
    if isinstance(request, AdvertiseKeysRequest):
        answer: Message = client.advertise()
    else:
        answer = client.receive(cast(Request, request))
        session = client.session_id
    server.receive(_carried(fleet, fleet.devices[device], answer, to=COORDINATOR, session=session))
    return answer


def _carried(fleet: Fleet, sender: Identity, message: Message, *, to: str, session: bytes) -> Opened[Any]:
    """Return what the other end makes of `message`: sealed, sent as bytes, parsed and verified."""
    payload = seal(message, sender, SignedContext(sender.certificate.name, to, fleet.name, session=session))
    certificate = fleet.anchor.verify(sender.certificate.der, at=fleet.at)
    return open_envelope(parse(payload), certificate, payload)


def _read_secrets(
    client: ClientSession, device: str, masks: dict[str, keys.KeyPair], entrusted: dict[str, dict[int, bytes]]
) -> None:
    match client.stage:
        case KeysShared(mask=mask):
            masks[device] = mask
        case InputMasked(held=held):
            entrusted[device] = {position: shares[shamir.SHARE_BYTES :] for position, shares in held.items()}
        case _:
            pass


def _revealed_self_seed(record: Record, position: int) -> bytes:
    given: dict[int, bytes] = {}
    for device, answer in record.answers.items():
        holder = record.cohort.position_of[device]
        owners = record.cohort.shape.share_holders(holder)  # The graph is symmetric, and nobody was missing.
        if position in owners:
            start = shamir.SHARE_BYTES * owners.index(position)
            given[holder] = answer.shares[start : start + shamir.SHARE_BYTES]
    return _interpolated(record, given)


def _pooled_mask_key(record: Record, position: int, held: Collection[str]) -> keys.KeyPair | None:
    """Return the mask key pair of the member at `position`, or None if the pooled shares do not give it."""
    given = {record.cohort.position_of[device]: record.captured[device].entrusted[position] for device in sorted(held)}
    try:
        pair = keys.key_pair(_interpolated(record, given))
    except BadShare:
        return None
    return pair if pair.public == record.cohort.members[position].mask_key else None


def _interpolated(record: Record, given: Mapping[int, bytes]) -> bytes:
    limbs = shamir.parse_shares(b"".join(given.values()))
    return shamir.secret_of(shamir.interpolate(record.cohort.shape.points(tuple(given)), limbs[:, None, :])[0])
