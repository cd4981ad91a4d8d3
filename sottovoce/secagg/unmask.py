"""Rebuilding secrets from shares that may be wrong, and taking masks off the sum.

A rebuilt secret counts only if it passes its owner's check: the commitment for a self seed, the public key for a mask
key. When one fails, other subsets of the shares are tried in an order that is fixed by the session id, a bounded number
of them; so a few wrong shares are survived, and many end the round, never in a garbage sum.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from sottovoce.errors import BadShare
from sottovoce.secagg import shamir
from sottovoce.secagg.shamir import Limbs, Points
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
    """Return every owner's secret, the first t shares of all owners with one batch of matrix products.

    Args:
        given: Evaluation point -> (owners, limbs): limbs[i] is the share there of owners[i].
        owners: Whose secrets are wanted.
        threshold: t.
        verify: Raises BadShare unless the bytes are this owner's secret.
        session: Session id; it fixes the order in which subsets are tried.

    Raises:
        BadShare: Some secret cannot be rebuilt from any subset tried.
    """
    sets = _share_sets(given, owners)
    secrets: dict[int, bytes] = {}
    spoilt: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    fewest = min((len(rows) for _, rows in sets.values()), default=threshold)
    if fewest < threshold:
        raise BadShare(f"{fewest} shares of one secret where {threshold} are needed")
    firsts = _first_subsets(sets, threshold) if sets else []
    for owner, secret in zip(sets, firsts, strict=True):
        try:
            if secret is None:
                raise BadShare("a rebuilt limb or pad bit is out of range")
            verify(owner, secret)
            secrets[owner] = secret
        except BadShare:
            spoilt[tuple(sets[owner][0].tolist())].append(owner)
    for points, members in spoilt.items():
        limbs = np.stack([sets[owner][1] for owner in members], axis=1)
        secrets |= _rebuild_group(points, members, limbs, threshold, verify, session)
    return secrets


def _share_sets(
    given: Mapping[int, tuple[Sequence[int], Limbs]], owners: Sequence[int]
) -> dict[int, tuple[Points, Limbs]]:
    """Return for every owner its points, rising, and the shares there, by one sort of all shares of all members."""
    lengths = [len(row) for row, _ in given.values()]
    point_of = np.repeat(np.fromiter(given, np.int64, len(given)), lengths)
    owner_of = np.fromiter(chain.from_iterable(row for row, _ in given.values()), np.int64, sum(lengths))
    order = np.argsort(owner_of * shamir.PRIME + point_of)  # Points are below p: one number sorts by both.
    limbs = np.concatenate([limbs for _, limbs in given.values()])[order]
    point_of, owner_of = point_of[order], owner_of[order]
    starts, stops = (np.searchsorted(owner_of, np.asarray(owners, np.int64), side) for side in ("left", "right"))
    cuts = zip(owners, starts.tolist(), stops.tolist(), strict=True)
    return {owner: (point_of[start:stop], limbs[start:stop]) for owner, start, stop in cuts}


def _first_subsets(sets: Mapping[int, tuple[Points, Limbs]], threshold: int) -> list[bytes | None]:
    """Return what the first t shares of every owner spell, all of them at once."""
    points = np.stack([points[:threshold] for points, _ in sets.values()])
    limbs = np.stack([limbs[:threshold] for _, limbs in sets.values()])
    return shamir.secrets_of(shamir.interpolate_each(points, limbs))


def _rebuild_group(
    points: Sequence[int],
    owners: Sequence[int],
    shares: Limbs,
    threshold: int,
    verify: Callable[[int, bytes], None],
    session: bytes,
) -> dict[int, bytes]:
    """Rebuild the secrets of `owners`, whose first subset is spoilt; shares[i][j] is at points[i], of owners[j]."""
    found: dict[int, bytes] = {}
    pending = list(range(len(owners)))
    for chosen in islice(_subsets(len(points), threshold, session), 1, None):
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
