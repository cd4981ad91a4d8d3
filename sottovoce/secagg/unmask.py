"""Rebuilding secrets from shares that may be wrong, and taking masks off the sum.

A rebuilt secret counts only if it passes its owner's check: the commitment for a self seed, the public key for a mask
key. When one fails, other subsets of the shares are tried in an order that is fixed by the session id, a bounded number
of them; so a few wrong shares are survived, and many end the round, never in a garbage sum.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sottovoce.errors import BadShare
from sottovoce.secagg import shamir
from sottovoce.secagg.shamir import Limbs
from sottovoce.secagg.transcript import subset_seed

MAX_SUBSETS = 256
"""Most subsets of shares that are tried for one group of owners."""


def rebuild_secrets(
    given: Mapping[int, tuple[Sequence[int], Limbs]],
    *,
    owners: Sequence[int],
    threshold: int,
    verify: Callable[[int, bytes], None],
    session: bytes,
) -> dict[int, bytes]:
    """Return every owner's secret, all owners whose shares lie at the same points with one matrix product.

    Args:
        given: Evaluation point -> (owners, limbs): limbs[i] is the share there of owners[i].
        owners: Whose secrets are wanted.
        threshold: t.
        verify: Raises BadShare unless the bytes are this owner's secret.
        session: Session id; it fixes the order in which subsets are tried.

    Raises:
        BadShare: Some secret cannot be rebuilt from any subset tried.
    """
    row_of = {point: {owner: row for row, owner in enumerate(held)} for point, (held, _) in sorted(given.items())}
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for owner in owners:
        groups[tuple(point for point, rows in row_of.items() if owner in rows)].append(owner)
    secrets: dict[int, bytes] = {}
    for points, members in groups.items():
        if len(points) < threshold:
            raise BadShare(f"{len(points)} shares of one secret where {threshold} are needed")
        limbs = np.stack([given[point][1][[row_of[point][owner] for owner in members]] for point in points])
        secrets |= _rebuild_group(points, members, limbs, threshold, verify, session)
    return secrets


def _rebuild_group(
    points: Sequence[int],
    owners: Sequence[int],
    shares: Limbs,
    threshold: int,
    verify: Callable[[int, bytes], None],
    session: bytes,
) -> dict[int, bytes]:
    """Rebuild the secrets of `owners`; shares[i][j] is the share at points[i] of owners[j]."""
    found: dict[int, bytes] = {}
    pending = list(range(len(owners)))
    for chosen in _subsets(len(points), threshold, session):
        limbs = shamir.interpolate([points[i] for i in chosen], shares[np.ix_(chosen, pending)])
        for column, index in enumerate(tuple(pending)):
            try:
                secret = shamir.secret_of(limbs[column])
                verify(owners[index], secret)
            except BadShare:
                continue
            found[owners[index]] = secret
        pending = [index for index in pending if owners[index] not in found]
        if not pending:
            return found
    raise BadShare(f"the secrets of {len(pending)} members cannot be rebuilt from {len(points)} shares")


def _subsets(count: int, size: int, session: bytes) -> Iterator[list[int]]:
    """Yield subsets of `size` of `count` shares: first every run of neighbours on a circle, then seeded ones."""
    runs = count if count > size else 1
    for start in range(min(runs, MAX_SUBSETS)):
        yield [(start + offset) % count for offset in range(size)]
    if runs == 1:
        return
    for attempt in range(MAX_SUBSETS - runs):
        seed = subset_seed(session, attempt)
        order = sorted(range(count), key=lambda index: hashlib.sha256(seed + index.to_bytes(4, "little")).digest())
        yield order[:size]
