"""The one registry of labels: every hash and every derived key of a session has its own, and no two are equal.

`docs/SPEC.md` lists the same labels; a test compares the two. A label is never reused with another meaning.
"""

from __future__ import annotations

from typing import Final

LEAF: Final = b"sv1/leaf"
"""Roster leaf: one member's device id, certificate fingerprint, keys and nonce."""
MERKLE_INNER: Final = b"sv1/merkle"
"""Inner hash of the roster's Merkle tree."""
SESSION: Final = b"sv1/session"
"""Session id."""
GRAPH: Final = b"sv1/graph"
"""Seed of the neighbour graph."""
SELF_SEED_COMMITMENT: Final = b"sv1/b"
"""Commitment to a self seed."""
SURVIVORS: Final = b"sv1/survivors"
"""Digest of a survivor set, which the consistency check signs."""
SHARE_SUBSETS: Final = b"sv1/subsets"
"""Order in which the server tries subsets of shares after a bad one."""

SELF_MASK: Final = b"sv1/self-mask"
"""Key of a self mask's stream, from the self seed."""
PAIRWISE_MASK: Final = b"sv1/pairwise-mask"
"""Key of a pairwise mask's stream, from the X25519 secret of two mask keys."""
SHARE_CHANNEL: Final = b"sv1/share-channel"
"""Key that encrypts shares from one member to another, from the X25519 secret of two channel keys."""

INCLUSION: Final = b"sv1/inclusion"
"""Token by which one member tells another that it masked with it, from the X25519 secret of two channel keys."""

UPLOAD: Final = b"sv1/upload"
"""Key that tags the chunks of a masked vector, from the X25519 secret of a member's channel key and the coordinator's
upload key."""

HASH_LABELS: Final = (LEAF, MERKLE_INNER, SESSION, GRAPH, SELF_SEED_COMMITMENT, SURVIVORS, SHARE_SUBSETS)
KEY_LABELS: Final = (SELF_MASK, PAIRWISE_MASK, SHARE_CHANNEL, INCLUSION, UPLOAD)
