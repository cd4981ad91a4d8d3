"""Rebuilding secrets from shares that may be wrong, and taking masks off the sum.

A rebuilt secret counts only if it passes its owner's check: the commitment for a self seed, the public key for a mask
key. When one fails, other subsets of the shares are tried: first without those who gave wrong shares of other secrets,
then a bounded number in an order that is fixed by the session id; so a few wrong shares are survived, and many end the
round, never in a garbage sum.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from sottovoce.errors import BadShare
from sottovoce.secagg import shamir
from sottovoce.secagg.graph import Positions
from sottovoce.secagg.shamir import Limbs, Points
from sottovoce.secagg.transcript import subset_seed

MAX_SUBSETS = 256
"""Most subsets of shares that are tried for one group of owners, beside the one that avoids who was caught before."""


def rebuild_secrets(
    *,
    owner_of: Positions,
    point_of: Points,
    limbs: Limbs,
    owners: Sequence[int],
    threshold: int,
    verify: Callable[[int, bytes], None],
    session: bytes,
) -> dict[int, bytes]:
    """Return every owner's secret, the first t shares of all owners with one batch of matrix products.

    Args:
        owner_of: Whose share each is, by roster position; shape (shares,).
        point_of: At which evaluation point each lies, shape (shares,). The shares of one owner are tried in the order
            in which they stand here.
        limbs: What each says, shape (shares, LIMBS).
        owners: Whose secrets are wanted.
        threshold: t.
        verify: Raises BadShare unless the bytes are this owner's secret.
        session: Session id; it fixes the order in which subsets are tried once nobody is left to avoid.

    Raises:
        BadShare: Some secret cannot be rebuilt from any subset tried.
    """
    # Stable, so that the shares of one owner keep their order; numpy sorts 16 bits in linear time.
    order = np.argsort(owner_of.astype(np.uint16), kind="stable")
    owner_of, point_of, limbs = owner_of[order], point_of[order], limbs[order]
    starts, stops = (np.searchsorted(owner_of, np.asarray(owners, np.int64), side) for side in ("left", "right"))
    fewest = int((stops - starts).min())
    if fewest < threshold:
        raise BadShare(f"{fewest} shares of one secret where {threshold} are needed")
    first = starts[:, None] + np.arange(threshold)
    rebuilt = shamir.secrets_of(shamir.interpolate_each(point_of[first], limbs[first]))
    secrets: dict[int, bytes] = {}
    spoilt: defaultdict[tuple[int, ...], dict[int, Limbs]] = defaultdict(dict)
    for owner, secret, start, stop in zip(owners, rebuilt, starts.tolist(), stops.tolist(), strict=True):
        try:
            if secret is None:
                raise BadShare("a rebuilt limb or pad bit is out of range")
            verify(owner, secret)
            secrets[owner] = secret
        except BadShare:
            spoilt[tuple(point_of[start:stop].tolist())][owner] = limbs[start:stop]
    wrong: Counter[int] = Counter()
    for points, sets in spoilt.items():
        shares = np.stack(tuple(sets.values()), axis=1)
        secrets |= _rebuild_group(points, tuple(sets), shares, threshold, verify, session, wrong)
    return secrets


def _rebuild_group(
    points: Sequence[int],
    owners: Sequence[int],
    shares: Limbs,
    threshold: int,
    verify: Callable[[int, bytes], None],
    session: bytes,
    wrong: Counter[int],
) -> dict[int, bytes]:
    """Rebuild the secrets of `owners`, whose first subset is spoilt; shares[i][j] is at points[i], of owners[j]."""
    found: dict[int, bytes] = {}
    pending = list(range(len(owners)))
    # Whoever was caught with a wrong share before comes last: a liar may cost one search, not one for every neighbour.
    cleanest = sorted(range(len(points)), key=lambda index: wrong[points[index]])[:threshold]
    for chosen in chain([cleanest], islice(_subsets(len(points), threshold, session), 1, None)):
        limbs = shamir.interpolate([points[i] for i in chosen], shares[np.ix_(chosen, pending)])
        for column, index in enumerate(tuple(pending)):
            try:
                secret = shamir.secret_of(limbs[column])
                verify(owners[index], secret)
            except BadShare:
                continue
            found[owners[index]] = secret
            wrong.update(_wrong_points(points, shares[:, index], chosen))
        pending = [index for index in pending if owners[index] not in found]
        if not pending:
            return found
    raise BadShare(f"the secrets of {len(pending)} members cannot be rebuilt from {len(points)} shares")


def _wrong_points(points: Sequence[int], shares: Limbs, right: Sequence[int]) -> list[int]:
    """Return at which points the share is not on the polynomial through the `right` ones.

    A share in the place of one of them leaves the value at 0 as it is exactly if it is on the polynomial, too.
    """
    others = sorted({*range(len(points))} - {*right})
    rows = np.array([[*right[1:], other] for other in (right[0], *others)])
    values = shamir.interpolate_each(np.array(points)[rows], shares[rows])
    return [points[other] for other, value in zip(others, values[1:], strict=True) if (value != values[0]).any()]


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
