"""What both sides hash: leaves, the roster's Merkle root, the session id, commitments and survivor sets.

Every layout is fixed: a label, then each field with its length in front (uint32 little-endian), never re-encoded
MessagePack. Integers are little-endian. `docs/SPEC.md` states the same layouts.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from sottovoce.blobs import canonical, digest_of
from sottovoce.identity import SignedContext
from sottovoce.secagg import labels
from sottovoce.wire.messages import AdvertiseKeys, SecAggParameters

VERSION = 1
DIGEST_BYTES = 32
NO_SESSION = bytes(DIGEST_BYTES)
"""Session id in the context of everything that is sent before the roster is known, and of the roster itself."""
_MODES = {"active": 1, "curious": 2}
_LENGTH = struct.Struct("<I").pack


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a session is about, known to both sides before it starts and bound into everything that follows.

    Attributes:
        fleet: Name of the fleet.
        coordinator: Name of the coordinator.
        round: Round number.
        attempt: Attempt within the round.
        plan: Plan digest, 32 bytes.
        state: State digest, 32 bytes.
        parameters: Of the session.
        parameters_digest: SHA-256 of their canonical encoding.
        upload_key: The coordinator's X25519 public key of this session, 32 bytes.
    """

    fleet: str
    coordinator: str
    round: int
    attempt: int
    plan: bytes
    state: bytes
    parameters: SecAggParameters
    parameters_digest: bytes
    upload_key: bytes

    def context_of(self, sender: str, *, session: bytes) -> SignedContext:
        """Return the context that a message of device `sender` to the coordinator must be signed in."""
        return SignedContext(sender, self.coordinator, self.fleet, self.round, self.attempt, session)


def agree(
    context: SignedContext,
    *,
    coordinator: str,
    plan: bytes,
    state: bytes,
    parameters: SecAggParameters,
    upload_key: bytes,
) -> Agreement:
    """Return the agreement on one session; fleet, round and attempt come from `context`."""
    digest = digest_of(canonical(parameters))
    when = (context.round, context.attempt)
    return Agreement(context.fleet, coordinator, *when, plan, state, parameters, digest, upload_key)


def leaf_of(device: str, fingerprint: bytes, advertisement: AdvertiseKeys) -> bytes:
    """Return a member's roster leaf, 32 bytes: device id, certificate fingerprint, both keys and the nonce, hashed."""
    keys = (advertisement.channel_key, advertisement.mask_key, advertisement.nonce)
    return _hash(labels.LEAF, device.encode(), fingerprint, *keys)


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Return the root over sorted leaves: neighbours are hashed pairwise, level by level; an odd last one moves up.

    The session id also holds the number of leaves, so no two rosters share a root and a session.
    """
    level = list(leaves)
    # No label_prefixed and no other call per pair: a large roster has thousands of them.
    sha256 = hashlib.sha256
    before, between = label_prefixed(labels.MERKLE_INNER) + _LENGTH(DIGEST_BYTES), _LENGTH(DIGEST_BYTES)
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=False)
        paired = [sha256(before + left + between + right).digest() for left, right in pairs]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def graph_seed(root: bytes) -> bytes:
    """Return the seed of the neighbour graph, 32 bytes."""
    return _hash(labels.GRAPH, root)


def session_id(agreement: Agreement, *, members: int, neighbour_count: int, threshold: int, root: bytes) -> bytes:
    """Return the session id, 32 bytes: everything agreed on, the roster, and the shape of the graph."""
    return _hash(
        labels.SESSION,
        struct.pack("<IB", VERSION, _MODES[agreement.parameters.mode]),
        agreement.fleet.encode(),
        agreement.coordinator.encode(),
        struct.pack("<QI", agreement.round, agreement.attempt),
        agreement.plan,
        agreement.state,
        agreement.parameters_digest,
        agreement.upload_key,
        struct.pack("<III", members, neighbour_count, threshold),
        root,
    )


def commitment_to(self_seed: bytes, *, session: bytes, position: int) -> bytes:
    """Return the commitment of the member at `position` to its self seed, 32 bytes."""
    return _hash(labels.SELF_SEED_COMMITMENT, session, struct.pack("<I", position), self_seed)


def survivors_digest(survivors: Sequence[int], *, session: bytes) -> bytes:
    """Return the digest that stands for a sorted survivor set in the consistency check, 32 bytes."""
    return _hash(labels.SURVIVORS, session, struct.pack(f"<{len(survivors)}I", *survivors))


def subset_seed(session: bytes, attempt: int) -> bytes:
    """Return the seed for the `attempt`-th subset of shares, 32 bytes; public, only its being fixed matters."""
    return _hash(labels.SHARE_SUBSETS, session, struct.pack("<I", attempt))


def _hash(label: bytes, *fields: bytes) -> bytes:
    return digest_of(label_prefixed(label, *fields))


def label_prefixed(label: bytes, *fields: bytes) -> bytes:
    """Return `label` and `fields`, each with its length in front as uint32 little-endian: one reading only."""
    pieces: list[bytes] = []
    for part in (label, *fields):
        pieces += (_LENGTH(len(part)), part)
    return b"".join(pieces)
