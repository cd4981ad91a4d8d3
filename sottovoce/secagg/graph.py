"""Who masks with whom, and how many shares rebuild a secret.

Up to COMPLETE_GRAPH_LIMIT members the graph is complete: everybody is everybody's neighbour, and each member also keeps
one share of its own self seed. Larger cohorts need the k-regular ring of Bell et al. 2020 (eprint 2020/704, section 3);
every function already takes what that ring needs.

Symbols: n members, k neighbours each, t shares rebuild a secret, c corrupt members at most, gamma their assumed share.
"""

from __future__ import annotations

from sottovoce.errors import ConfigError
from sottovoce.wire.messages import Mode, SecAggParameters

COMPLETE_GRAPH_LIMIT = 200
"""Largest cohort whose graph is complete."""
SMALLEST_COHORT = 3
"""Below this a sum hides nobody, whatever the policy says."""
BASIS_POINTS = 10_000
_SMALLEST_ASSUMPTION_BP = 500
_LARGEST_VECTOR_BYTES = 512 * 1024 * 1024
_WIDE_WORD_BYTES = 8
_SMALLEST_WIDE_BYTES = 2 * _WIDE_WORD_BYTES


def degree(members: int) -> int:
    """Return k, the number of neighbours of every member of a cohort.

    Raises:
        ConfigError: The cohort is too small to hide anybody, or too large for the complete graph.
    """
    if members < SMALLEST_COHORT:
        raise ConfigError(f"{members} devices are too few to hide in: at least {SMALLEST_COHORT} are needed")
    if members > COMPLETE_GRAPH_LIMIT:
        raise ConfigError(
            f"a cohort of {members} needs the k-regular graph, which this release does not have: "
            f"lower maximum_clients to {COMPLETE_GRAPH_LIMIT}"
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
    return max(2, corrupt + 1, -(-members // 2))


def survivors_needed(parameters: SecAggParameters, members: int) -> int:
    """Return how many members must stay so that the sum can be unmasked.

    In active mode every survivor wants t signatures from *others*, so one more than t must stay.
    """
    needed = threshold(parameters.mode, members, parameters.corrupt_share_bp) + (parameters.mode == "active")
    return max(needed, parameters.minimum_survivors, SMALLEST_COHORT)


def neighbours(position: int, members: int, neighbour_count: int, seed: bytes) -> tuple[int, ...]:
    """Return the roster positions of the neighbours of `position`, ascending.

    Args:
        position: Roster position, 0 to members - 1.
        members: n.
        neighbour_count: k; members - 1 is the complete graph.
        seed: SHA-256 of the graph label and the Merkle root, 32 bytes; it permutes the ring of larger cohorts.

    Raises:
        ConfigError: The graph is not complete.
    """
    _require_complete(members, neighbour_count)
    return (*range(position), *range(position + 1, members))


def share_holders(position: int, members: int, neighbour_count: int, seed: bytes) -> tuple[int, ...]:
    """Return the positions that hold a share of the self seed of `position`, ascending: in a complete graph, all.

    Shares of the mask key are held by the neighbours only.

    Raises:
        ConfigError: The graph is not complete.
    """
    _require_complete(members, neighbour_count)
    return tuple(range(members))


def evaluation_point(position: int, members: int, neighbour_count: int, seed: bytes) -> int:
    """Return x, where the polynomials are evaluated for the member at `position`: its ring position plus one.

    Raises:
        ConfigError: The graph is not complete.
    """
    _require_complete(members, neighbour_count)
    return position + 1


def check_parameters(parameters: SecAggParameters) -> None:
    """Raise ConfigError, saying what to change, unless every number in `parameters` is possible."""
    largest = parameters.maximum_clients
    rules = (
        (largest >= SMALLEST_COHORT, f"maximum_clients is {largest}; at least {SMALLEST_COHORT} are needed"),
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
    )
    for holds, text in rules:
        if not holds:
            raise ConfigError(f"secure aggregation: {text}")


def _require_complete(members: int, neighbour_count: int) -> None:
    if neighbour_count != degree(members):
        raise ConfigError(f"a cohort of {members} has {degree(members)} neighbours each, not {neighbour_count}")
