"""Rebuilding secrets when some shares are wrong: other subsets, in a fixed order, and an end to it."""

from __future__ import annotations

import hashlib
import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from sottovoce.errors import BadShare
from sottovoce.secagg import shamir, unmask

SESSION = b"S" * 32
SECRETS = {3: b"three" + bytes(27), 8: b"eight" + bytes(27)}


class Case:
    """Shares of two owners' secrets at nine points; the owners check what comes out."""

    def __init__(self, entropy: Any, threshold: int = 5, holders: int = 9) -> None:
        self.threshold = threshold
        points = tuple(range(1, holders + 1))
        rows = shamir.split(tuple(SECRETS.values()), points=points, threshold=threshold, entropy=entropy)
        self.given = {
            point: ([*SECRETS], shamir.parse_shares(row).copy()) for point, row in zip(points, rows, strict=True)
        }
        self.order: list[int] | None = None
        self.tried = 0

    def verify(self, owner: int, secret: bytes) -> None:
        self.tried += 1
        if secret != SECRETS[owner]:
            raise BadShare("not it")

    def spoil(self, point: int, owner: int | None = None) -> None:
        for row, name in enumerate(SECRETS):
            if owner in (None, name):
                error = int.from_bytes(hashlib.sha256(bytes([point])).digest()[:2], "little")
                self.given[point][1][row] = (self.given[point][1][row].astype(int) + 1 + error) % shamir.PRIME

    def rebuild(self, owners: tuple[int, ...] = tuple(SECRETS)) -> dict[int, bytes]:
        owner_of = np.array([owner for given, _ in self.given.values() for owner in given])
        point_of = np.array([point for point, (given, _) in self.given.items() for _ in given])
        limbs = np.concatenate([limbs for _, limbs in self.given.values()])
        order = self.order or [*range(len(limbs))]
        return unmask.rebuild_secrets(
            owner_of=owner_of[order],
            point_of=point_of[order],
            limbs=limbs[order],
            owners=owners,
            threshold=self.threshold,
            verify=self.verify,
            session=SESSION,
        )


def test_good_shares_need_one_try_each(fixed_entropy: Any) -> None:
    case = Case(fixed_entropy(1))
    assert case.rebuild() == SECRETS
    assert case.tried == 2


@pytest.mark.parametrize("seed", range(5))
def test_shares_may_come_in_any_order(fixed_entropy: Any, seed: int) -> None:
    case = Case(fixed_entropy(7))
    case.spoil(2, owner=3)
    case.order = random.Random(seed).sample(range(18), 18)
    assert case.rebuild() == SECRETS


@pytest.mark.parametrize("liars", [*combinations(range(1, 10), 1), *combinations(range(1, 10), 2)])
def test_one_or_two_liars_are_always_survived(fixed_entropy: Any, liars: tuple[int, ...]) -> None:
    case = Case(fixed_entropy(2))
    for liar in liars:
        case.spoil(liar)
    assert case.rebuild() == SECRETS


def test_a_liar_about_one_owner_only_delays_that_one(fixed_entropy: Any) -> None:
    case = Case(fixed_entropy(3))
    case.spoil(1, owner=8)
    assert case.rebuild() == SECRETS
    assert case.tried <= 3


def test_the_search_ends_and_repeats_itself(fixed_entropy: Any) -> None:
    tried = []
    for _ in range(2):
        case = Case(fixed_entropy(4))
        for liar in range(1, 6):
            case.spoil(liar)
        with pytest.raises(BadShare, match="2 members"):
            case.rebuild()
        tried.append(case.tried)
    assert tried[0] == tried[1] <= 2 * unmask.MAX_SUBSETS


def test_subsets_are_distinct_members_first_runs_then_seeded() -> None:
    subsets = list(unmask._subsets(9, 5, SESSION))
    assert len(subsets) == unmask.MAX_SUBSETS
    assert subsets[0] == [0, 1, 2, 3, 4]
    assert subsets[8] == [8, 0, 1, 2, 3]
    assert all(len(set(subset)) == 5 and max(subset) < 9 for subset in subsets)
    assert len({tuple(sorted(subset)) for subset in subsets}) > 100
    assert list(unmask._subsets(5, 5, SESSION)) == [[0, 1, 2, 3, 4]]
    assert len(list(unmask._subsets(1000, 5, SESSION))) == unmask.MAX_SUBSETS


def test_too_few_shares_or_none_are_noticed(fixed_entropy: Any) -> None:
    with pytest.raises(BadShare, match="4 shares"):
        Case(fixed_entropy(5), threshold=5, holders=4).rebuild()
    with pytest.raises(BadShare, match="0 shares"):
        Case(fixed_entropy(5)).rebuild(owners=(3, 99))


def test_owners_with_different_holders_are_rebuilt_in_groups(fixed_entropy: Any) -> None:
    case = Case(fixed_entropy(6))
    for point in (1, 2):
        owners, limbs = case.given[point]
        case.given[point] = owners[:1], limbs[:1]
    del case.given[9]
    assert case.rebuild() == SECRETS
    assert all(isinstance(limbs, np.ndarray) for _, limbs in case.given.values())


def test_a_liar_on_a_ring_costs_few_searches_not_one_for_every_neighbour(
    fixed_entropy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three liars, 60 owners with other holders each: whoever was caught before is asked last."""
    entropy, threshold, liars = fixed_entropy(3), 10, (1, 6, 11)
    secrets = {owner: entropy(32) for owner in range(60)}
    owner_of, point_of, limbs = [], [], []
    for owner, secret in secrets.items():
        points = [*range(1, 16), 30 + owner]
        for point, row in zip(
            points, shamir.split((secret,), points=points, threshold=threshold, entropy=entropy), strict=True
        ):
            error = (1 + owner * point * point) * (point in liars)
            owner_of.append(owner)
            point_of.append(point)
            limbs.append((shamir.parse_shares(row)[0].astype(int) + error) % shamir.PRIME)
    tried = 0
    interpolate = shamir.interpolate

    def counted(*given: Any) -> Any:
        nonlocal tried
        tried += 1
        return interpolate(*given)

    def verify(owner: int, secret: bytes) -> None:
        if secret != secrets[owner]:
            raise BadShare("not it")

    monkeypatch.setattr(shamir, "interpolate", counted)
    found = unmask.rebuild_secrets(
        owner_of=np.array(owner_of),
        point_of=np.array(point_of),
        limbs=np.array(limbs, np.uint16),
        owners=[*secrets],
        threshold=threshold,
        verify=verify,
        session=SESSION,
    )
    assert found == secrets
    assert tried < 60 + unmask.MAX_SUBSETS, "one search, then one try for each of the others"
