"""Who masks with whom, and how many shares rebuild a secret.

Up to COMPLETE_GRAPH_LIMIT members the graph is complete: everybody is everybody's neighbour, and each member also keeps
one share of its own self seed. Larger cohorts may have a k-regular Harary ring instead (Bell et al. 2020, eprint
2020/704, section 3): members stand on a circle in an order that nobody chooses, and each masks with the k/2 next ones
on either side. The coordinator looks for the cheapest (k, t); both sides check here that it is safe.

Symbols: n members, k neighbours each, t shares rebuild a secret, c corrupt members at most, gamma their assumed share,
d assumed dropouts, Hyp(n, m, k) = how many of m marked members are among k drawn without replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, lgamma
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from sottovoce.errors import ConfigError
from sottovoce.secagg import segments
from sottovoce.wire.messages import Mode, SecAggParameters

COMPLETE_GRAPH_LIMIT = 200
"""Up to this cohort the graph is always complete."""
LARGEST_COHORT = 65520
"""Evaluation points are the non-zero elements of GF(65521)."""
LARGEST_THRESHOLD = 2098
"""Shamir's scheme stays exact in float64 up to here."""
SMALLEST_COHORT = 3
"""Below this a sum hides nobody, whatever the policy says."""
BASIS_POINTS = 10_000
SECURITY_BITS: dict[Mode, int] = {"curious": 40, "active": 80}
"""sigma of the ring's conditions: an active server grinds rosters, for which 40 bits are set aside."""
_SMALLEST_ASSUMPTION_BP = 500
_SMALLEST_THRESHOLD = 2
_LARGEST_VECTOR_BYTES = 512 * 1024 * 1024
_WIDE_WORD_BYTES = 8
_SMALLEST_WIDE_BYTES = 2 * _WIDE_WORD_BYTES
_ROUNDING = 1 + 1e-6  # Two sides that sum the same tail in another order agree to nine digits.

Positions: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GraphParameters:
    """The shape of a cohort's graph.

    Attributes:
        neighbours: k, the degree of every member; members - 1 is the complete graph, else it is even.
        threshold: t, the shares that rebuild a secret.
    """

    neighbours: int
    threshold: int


GraphRule: TypeAlias = Callable[[int], GraphParameters]
"""Returns the graph of a cohort of that many members, or raises ConfigError."""


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one cohort, its figures checked. It holds no order: that is drawn again whenever it is asked for.

    Attributes:
        members: n.
        neighbour_count: k; members - 1 is the complete graph.
        seed: 32 bytes that follow from the roster.
    """

    members: int
    neighbour_count: int
    seed: bytes

    @property
    def complete(self) -> bool:
        """True if everybody is everybody's neighbour."""
        return self.neighbour_count == self.members - 1

    def order(self) -> Positions:
        """Return the roster positions in their order on the ring; rising in a complete graph.

        Members stand in the order of the little-endian 64-bit words of the ChaCha20 stream under the seed (counter and
        nonce zero), one for each position; the lower position first among equals.
        """
        if self.complete:
            return np.arange(self.members)
        stream = Cipher(algorithms.ChaCha20(self.seed, bytes(16)), mode=None).encryptor()
        words = stream.update(bytes(8 * self.members))
        return np.argsort(np.frombuffer(words, "<u8"), kind="stable")

    def neighbours(self, position: int) -> tuple[int, ...]:
        """Return the roster positions of the neighbours of `position`, ascending."""
        if self.complete:
            return (*range(position), *range(position + 1, self.members))
        order = self.order()
        (place,) = np.flatnonzero(order == position)
        return tuple(np.sort(order[(place + _offsets(self.neighbour_count)) % self.members]).tolist())

    def all_neighbours(self) -> Positions:
        """Return the neighbours of every position, ascending, in one go: shape (members, neighbour_count)."""
        if self.complete:
            others = np.broadcast_to(np.arange(self.neighbour_count), (self.members, self.neighbour_count))
            return others + (others >= np.arange(self.members)[:, None])
        order = self.order()
        around = (_places(order)[:, None] + _offsets(self.neighbour_count)) % self.members
        return np.sort(order[around], axis=1)

    def share_holders(self, position: int) -> tuple[int, ...]:
        """Return the positions that hold a share of the self seed of `position`, ascending: in a complete graph, all.

        Shares of the mask key are held by the neighbours only.
        """
        return tuple(range(self.members)) if self.complete else self.neighbours(position)

    def evaluation_points(self, positions: Sequence[int]) -> tuple[int, ...]:
        """Return x, where the polynomials are evaluated for each of `positions`: its place on the ring plus one."""
        return tuple((_places(self.order())[list(positions)] + 1).tolist())


def degree(members: int) -> int:
    """Return k of the complete graph, the number of neighbours of every member of a cohort.

    Raises:
        ConfigError: The cohort is too small to hide anybody, or too large to be always complete.
    """
    if members < SMALLEST_COHORT:
        raise ConfigError(f"{members} devices are too few to hide in: at least {SMALLEST_COHORT} are needed")
    if members > COMPLETE_GRAPH_LIMIT:
        raise ConfigError(
            f"a cohort of {members} needs a k-regular graph, and nobody has said which: "
            f"give its rule, or lower maximum_clients to {COMPLETE_GRAPH_LIMIT}"
        )
    return members - 1


def corrupt_bound(members: int, corrupt_share_bp: int) -> int:
    """Return c = max(1, ceil(gamma n)), the most corrupt members that the guarantees allow for."""
    return max(1, -(-members * corrupt_share_bp // BASIS_POINTS))


def threshold(mode: Mode, members: int, corrupt_share_bp: int) -> int:
    """Return t, the number of shares that rebuild a secret in a complete graph.

    Curious: max(2, c + 1, ceil(n / 2)). Active: floor((n + c) / 2) + 1, so that no two sets of t members, c of them
    answering both ways, can rebuild both secrets of one member.
    """
    corrupt = corrupt_bound(members, corrupt_share_bp)
    if mode == "active":
        return (members + corrupt) // 2 + 1
    return max(_SMALLEST_THRESHOLD, corrupt + 1, -(-members // 2))


def complete_graph(parameters: SecAggParameters, members: int) -> GraphParameters:
    """Return the figures of the complete graph.

    Raises:
        ConfigError: The cohort is too small, or larger than COMPLETE_GRAPH_LIMIT.
    """
    return GraphParameters(degree(members), threshold(parameters.mode, members, parameters.corrupt_share_bp))


def survivors_needed(parameters: SecAggParameters, shares: int) -> int:
    """Return how many members must stay so that the sum can be unmasked when `shares` rebuild a secret.

    In active mode every survivor wants `shares` signatures from *others*, so one more must stay.
    """
    return max(shares + (parameters.mode == "active"), parameters.minimum_survivors, SMALLEST_COHORT)


def check_graph(parameters: SecAggParameters, members: int, told: GraphParameters) -> None:
    """Raise ConfigError unless a graph of these figures protects `members` under the session's assumptions.

    A complete graph has exactly its own threshold. A ring is checked against the conditions that
    `coordinator.graph_parameters` explains; whether it is likely to complete is the coordinator's concern alone.
    """
    if members <= COMPLETE_GRAPH_LIMIT or told.neighbours == members - 1:
        expected = GraphParameters(members - 1, threshold(parameters.mode, members, parameters.corrupt_share_bp))
        if members < SMALLEST_COHORT or told != expected or told.threshold > LARGEST_THRESHOLD:
            raise ConfigError(
                f"{told.neighbours} neighbours and threshold {told.threshold} for {members} members, where the rules "
                f"give {expected.neighbours} and {expected.threshold}"
            )
    elif not _is_possible(members, told):
        raise ConfigError(f"a ring of {members} with {told.neighbours} neighbours and threshold {told.threshold}")
    elif not _is_safe(parameters, members, told):
        raise ConfigError(
            f"{told.neighbours} neighbours and threshold {told.threshold} do not protect {members} members in "
            f"{parameters.mode} mode against {parameters.corrupt_share_bp / 100:g} % corrupt ones"
        )


def hypergeometric_tail(smallest: int, *, members: int, marked: int, drawn: int) -> float:
    """Return Pr[Hyp(members, marked, drawn) >= smallest], to about nine digits, however small."""
    largest = min(marked, drawn)
    smallest = max(smallest, drawn + marked - members, 0)
    if smallest > largest:
        return 0.0
    term = exp(
        _log_choose(marked, smallest) + _log_choose(members - marked, drawn - smallest) - _log_choose(members, drawn)
    )
    total = 0.0
    for x in range(smallest, largest + 1):
        total += term
        term *= (marked - x) * (drawn - x) / ((x + 1) * (members - marked - drawn + x + 1))
    return total


def check_parameters(parameters: SecAggParameters) -> None:
    """Raise ConfigError, saying what to change, unless every number in `parameters` is possible."""
    largest = parameters.maximum_clients
    rules = (
        (largest >= SMALLEST_COHORT, f"maximum_clients is {largest}; at least {SMALLEST_COHORT} are needed"),
        (largest <= LARGEST_COHORT, f"maximum_clients is {largest}; at most {LARGEST_COHORT} have a share each"),
        (
            SMALLEST_COHORT <= parameters.minimum_survivors <= largest,
            f"minimum_survivors must be from {SMALLEST_COHORT} to maximum_clients",
        ),
        (
            _SMALLEST_ASSUMPTION_BP <= parameters.corrupt_share_bp < BASIS_POINTS // 2,
            f"corrupt_share_bp must be at least {_SMALLEST_ASSUMPTION_BP} (5 %) and below {BASIS_POINTS // 2}",
        ),
        (
            _SMALLEST_ASSUMPTION_BP <= parameters.dropout_share_bp < BASIS_POINTS,
            f"dropout_share_bp must be at least {_SMALLEST_ASSUMPTION_BP} (5 %) and below {BASIS_POINTS}",
        ),
        (
            _SMALLEST_WIDE_BYTES <= parameters.wide_bytes <= parameters.vector_bytes <= _LARGEST_VECTOR_BYTES
            and parameters.vector_bytes % _WIDE_WORD_BYTES == 0
            and parameters.wide_bytes % _WIDE_WORD_BYTES == 0,
            "vector_bytes and wide_bytes must be multiples of 8, take them from the Layout of the plan",
        ),
        (
            segments.is_possible(parameters.packed)
            and segments.packed_bytes(parameters.packed) <= parameters.vector_bytes - parameters.wide_bytes,
            "packed segments have widths from 1 to 32 and whole groups of 64; take them from the Layout of the plan",
        ),
    )
    for holds, text in rules:
        if not holds:
            raise ConfigError(f"secure aggregation: {text}")


def _places(order: Positions) -> Positions:
    """Return where on the ring each roster position stands."""
    places = np.empty_like(order)
    places[order] = np.arange(order.size)
    return places


def _offsets(neighbour_count: int) -> Positions:
    half = neighbour_count // 2
    return np.concatenate([np.arange(-half, 0), np.arange(1, half + 1)])


def _is_possible(members: int, told: GraphParameters) -> bool:
    even = told.neighbours % 2 == 0
    return (
        members <= LARGEST_COHORT
        and even
        and _SMALLEST_THRESHOLD <= told.threshold <= min(told.neighbours, LARGEST_THRESHOLD)
        and told.neighbours < members - 1
    )


def _is_safe(parameters: SecAggParameters, members: int, told: GraphParameters) -> bool:
    neighbours, shares = told.neighbours, told.threshold
    corrupt = corrupt_bound(members, parameters.corrupt_share_bp)
    rare = _ROUNDING * 2.0 ** -(SECURITY_BITS[parameters.mode] + 1)

    def tail(smallest: int, marked: int, drawn: int) -> float:
        return hypergeometric_tail(smallest, members=members, marked=marked, drawn=drawn)

    if parameters.mode == "active":
        one_answer = members * tail(2 * shares - neighbours, corrupt, neighbours) <= rare
        in_gap = tail(shares - neighbours // 2, corrupt, neighbours // 2)
        return one_answer and members**2 / 2 * in_gap**2 <= rare
    absent = min(members, corrupt + members * parameters.dropout_share_bp // BASIS_POINTS)
    secret = members * tail(shares, corrupt, neighbours) <= rare
    return secret and members * (members - neighbours - 1) / 2 * tail(neighbours, absent, neighbours) <= rare


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
