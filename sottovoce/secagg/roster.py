"""Who is in the cohort: what an advertisement must say, and what a roster must show before anybody trusts it."""

from __future__ import annotations

import datetime
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec

from sottovoce.errors import MalformedMessage, RemoteProtocolError, Replayed
from sottovoce.identity import Certificate, TrustAnchor
from sottovoce.secagg import graph, keys
from sottovoce.secagg.graph import Graph, GraphParameters
from sottovoce.secagg.transcript import (
    DIGEST_BYTES,
    NO_SESSION,
    Agreement,
    graph_seed,
    leaf_of,
    merkle_root,
    session_id,
)
from sottovoce.wire.codec import Opened, parse, parse_body, signed_content
from sottovoce.wire.messages import AdvertiseKeys, Roster, SurvivorsSignature

_LEAF = struct.Struct(f"{DIGEST_BYTES}s")
_MAX_EVIDENCE_BYTES = 16 * 1024
"""Longest signed envelope that one member may make the others read."""


class Member(msgspec.Struct, frozen=True):
    """One member of the cohort, its signature and certificate verified.

    Attributes:
        device: Device id.
        certificate: Verified against the fleet CA.
        channel_key: X25519 public key for share encryption.
        mask_key: X25519 public key for pairwise masks.
        leaf: Its roster leaf.
    """

    device: str
    certificate: Certificate
    channel_key: bytes
    mask_key: bytes
    leaf: bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """The graph of one cohort and the session it belongs to.

    Attributes:
        session: Session id, 32 bytes.
        graph: Who is whose neighbour.
        threshold: t.
        corrupt: c, the most corrupt members that the guarantees allow for.
    """

    session: bytes
    graph: Graph
    threshold: int
    corrupt: int

    @property
    def members(self) -> int:
        """n."""
        return self.graph.members

    @property
    def neighbour_count(self) -> int:
        """k."""
        return self.graph.neighbour_count

    def neighbours(self, position: int) -> tuple[int, ...]:
        """Return the positions of the neighbours of `position`, ascending."""
        return self.graph.neighbours(position)

    def share_holders(self, position: int) -> tuple[int, ...]:
        """Return the positions that hold a share of the self seed of `position`, ascending."""
        return self.graph.share_holders(position)

    def points(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Return the evaluation points of `positions`."""
        return self.graph.evaluation_points(positions)


def shape_of(agreement: Agreement, leaves: Sequence[bytes], figures: GraphParameters) -> Shape:
    """Return the graph and session id that sorted `leaves` give; both sides compute it.

    Args:
        agreement: What the session is about.
        leaves: Of the roster.
        figures: k and t, as the coordinator has chosen them. They count only if they are safe.

    Raises:
        ConfigError: A graph of these figures does not protect this cohort.
    """
    members = len(leaves)
    graph.check_graph(agreement.parameters, members, figures)
    root = merkle_root(leaves)
    session = session_id(
        agreement, members=members, neighbour_count=figures.neighbours, threshold=figures.threshold, root=root
    )  # fmt: skip
    corrupt = graph.corrupt_bound(members, agreement.parameters.corrupt_share_bp)
    return Shape(session, Graph(members, figures.neighbours, graph_seed(root)), figures.threshold, corrupt)


def check_advertisement(agreement: Agreement, opened: Opened[AdvertiseKeys]) -> Member:
    """Return the member that a verified advertisement announces.

    Raises:
        Replayed: It was signed for another round, attempt, coordinator or session.
        RemoteProtocolError: It binds another plan, state or parameters, or carries another certificate.
        MalformedMessage: A key or nonce has the wrong length.
        LowOrderPoint: A key is of low order.
    """
    message, certificate = opened.message, opened.certificate
    if opened.context != agreement.context_of(certificate.name, session=NO_SESSION):
        raise Replayed(f"{certificate.name}'s advertisement was signed for another round or session")
    if (message.plan, message.state, message.parameters) != (
        agreement.plan, agreement.state, agreement.parameters_digest,
    ):  # fmt: skip
        raise RemoteProtocolError(f"{certificate.name} advertised keys for another plan, state or parameters")
    lengths = (len(message.channel_key), len(message.mask_key), len(message.nonce))
    if lengths != (keys.PUBLIC_KEY_BYTES, keys.PUBLIC_KEY_BYTES, keys.NONCE_BYTES):
        raise MalformedMessage(f"{certificate.name} advertised keys or a nonce of the wrong length")
    if message.certificate != certificate.der:
        raise RemoteProtocolError(f"{certificate.name}'s advertisement carries another certificate")
    keys.refuse_low_order(message.channel_key)
    keys.refuse_low_order(message.mask_key)
    leaf = leaf_of(certificate.name, certificate.fingerprint, message)
    return Member(certificate.name, certificate, message.channel_key, message.mask_key, leaf)


def split_leaves(roster: Roster) -> list[bytes]:
    """Return the leaves of `roster`.

    Raises:
        MalformedMessage: They are not whole leaves in strictly rising order: unsorted, or one of them twice.
    """
    whole = bool(roster.leaves) and len(roster.leaves) % DIGEST_BYTES == 0
    leaves = [leaf for (leaf,) in _LEAF.iter_unpack(roster.leaves)] if whole else []
    if not whole or any(map(operator.ge, leaves, islice(leaves, 1, None))):
        raise MalformedMessage("a roster's leaves must be 32 bytes each, sorted, and none of them twice")
    return leaves


def verify_neighbours(
    agreement: Agreement,
    roster: Roster,
    *,
    leaves: Sequence[bytes],
    positions: Sequence[int],
    anchor: TrustAnchor,
    at: datetime.datetime,
) -> dict[int, Member]:
    """Return this device's neighbours by position; one that does not verify is enough to refuse the roster.

    Args:
        agreement: What this device agreed to.
        roster: With one signed advertisement per neighbour, in order of position.
        leaves: Of the roster.
        positions: Of the neighbours, ascending.
        anchor: The fleet CA.
        at: Time to judge certificates by.

    Raises:
        MalformedMessage, BadCertificate, BadSignature: An advertisement is not a device's signed message.
        RemoteProtocolError: An advertisement does not match its leaf, two are of one device, or their number is wrong.
        LowOrderPoint: A key is of low order.
    """
    if len(roster.advertisements) != len(positions):
        raise MalformedMessage(f"{len(roster.advertisements)} advertisements for {len(positions)} neighbours")
    opened = _open_advertisements(roster.advertisements, anchor, at)
    members = {position: check_advertisement(agreement, one) for position, one in zip(positions, opened, strict=True)}
    for position, member in members.items():
        if member.leaf != leaves[position]:
            raise RemoteProtocolError(f"{member.device}'s advertisement is not leaf {position} of the roster")
    if len({member.device for member in members.values()}) != len(members):
        raise RemoteProtocolError("one device is in the roster twice")
    return members


def open_signature(
    agreement: Agreement, payload: bytes, members: Mapping[str, Member], *, session: bytes
) -> Opened[SurvivorsSignature]:
    """Return the verified signature of a member on a survivor set, forwarded by the server.

    Args:
        agreement: What the session is about.
        payload: The signed envelope.
        members: Who may have signed, by device id.
        session: Session id.

    Raises:
        MalformedMessage: It is not a signed SurvivorsSignature, or not of one of `members`.
        Replayed: It was signed in another session.
        BadSignature: The signature is not the member's.
    """
    envelope = parse(payload, max_bytes=_MAX_EVIDENCE_BYTES)
    if envelope.sender not in members:
        raise MalformedMessage(f"a signature of {envelope.sender}, who is not a surviving neighbour")
    claimed = parse_body(envelope, SurvivorsSignature)
    certificate = members[envelope.sender].certificate
    context, body_digest, content = signed_content(envelope, certificate)
    certificate.verify(envelope.signature, content)
    if context != agreement.context_of(envelope.sender, session=session):
        raise Replayed(f"a signature of {envelope.sender} from another session")
    return Opened(claimed, certificate, context, body_digest, payload)


def _open_advertisements(
    payloads: Sequence[bytes], anchor: TrustAnchor, at: datetime.datetime
) -> list[Opened[AdvertiseKeys]]:
    """Return the verified advertisements, one kind of work at a time for the sake of the processor's cache."""
    envelopes = [parse(payload, max_bytes=_MAX_EVIDENCE_BYTES) for payload in payloads]
    claimed = [parse_body(envelope, AdvertiseKeys) for envelope in envelopes]
    certificates = [anchor.verify(message.certificate, at=at, role="device") for message in claimed]
    contents = [signed_content(*pair) for pair in zip(envelopes, certificates, strict=True)]
    for envelope, certificate, (_, _, content) in zip(envelopes, certificates, contents, strict=True):
        certificate.verify(envelope.signature, content)
    return [
        Opened(message, certificate, context, body_digest, payload)
        for message, certificate, (context, body_digest, _), payload in zip(
            claimed, certificates, contents, payloads, strict=True
        )
    ]
