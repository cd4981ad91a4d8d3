"""How many neighbours a client needs, and how many of them rebuild a secret: (k, t) from what is assumed of the fleet.

Up to COMPLETE_GRAPH_LIMIT clients the graph is complete and `sottovoce.secagg.graph` has its threshold. Beyond, each of
n clients masks with k neighbours on a Harary ring in random order, k even, and t of them rebuild a secret (Bell et al.
2020, eprint 2020/704, section 3). With c = the most corrupt clients, d = the most dropouts, and Hyp(n, m, k) = how many
of m marked clients are among k drawn without replacement, every mode needs

    completes    n * Pr[Hyp(n, d, k) > k - t] <= 2^-eta                 every client keeps t neighbours; eta = 20

A *curious* server follows the protocol, so who drops does not depend on the ring. sigma = 40, and

    connected    n(n-k-1)/2 * Pr[Hyp(n, c+d, k) = k] <= 2^-(sigma+1)    no two gaps of k/2 cut the survivors apart
    secret       n * Pr[Hyp(n, c, k) >= t] <= 2^-(sigma+1)              no client has t corrupt neighbours

These are the conditions of Google's production finder (google-parfait/federated-compute, fcp/secagg/server/
graph_parameter_finder.cc); like it, this takes the smallest k, and then the smallest t, which is the cheapest.

An *active* server sees the ring before it chooses who drops, and may try many rosters: 40 bits more, sigma = 80, and

    one answer   2t > k + a, where n * Pr[Hyp(n, c, k) > a] <= 2^-(sigma+1)
    connected    n^2/2 * Pr[Hyp(n, c, k/2) >= t - k/2]^2 <= 2^-(sigma+1)

One answer: t shares of the self seed and t of the mask key of one client need 2t answers from k neighbours, of whom
only the at most a corrupt ones answer both ways. Connected: a survivor beside a gap of k/2 is unmasked only by the at
most k/2 neighbours on its other side and the corrupt ones in the gap, so t - k/2 of those are needed; a cut takes two
gaps, and corrupt clients in disjoint windows of the ring are negatively associated, hence the square. This holds
because a neighbour answers only for survivors that masked with it: the inclusion tokens of active mode (docs/SPEC.md,
stage 4). Otherwise the server could tell the two banks of a gap different lists of who shared keys, the far bank would
answer too, and fewer corrupt clients would be enough. The second
condition has implied the first wherever it was tried; the proof needs both. Both are easier with a larger t, so t is
the largest that completes.

The union bounds lose nothing: a random client's neighbours are a uniform k-subset of all n, so n * Pr[Hyp(n, m, k) > x]
is exactly the expected number of clients with more than x marked neighbours. Tails are summed by `hypergeom.sf`;
`isf` subtracts from one and underflows at these probabilities.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from sottovoce.errors import ConfigError
from sottovoce.secagg.graph import (
    BASIS_POINTS,
    COMPLETE_GRAPH_LIMIT,
    SECURITY_BITS,
    SMALLEST_COHORT,
    GraphParameters,
    corrupt_bound,
    degree,
    threshold,
)
from sottovoce.secagg.shamir import PRIME
from sottovoce.wire.messages import Mode

SMALLEST_SHARE = 0.05
"""Neither assumption is ever taken lower: a fleet that looks better than this today will not always."""
CORRECTNESS_BITS = 20
"""eta: under the assumed dropouts one round in a million is abandoned for want of shares."""
_LARGEST_BITS = 128
_LARGEST_COHORT = PRIME - 1
_SMALLEST_THRESHOLD = 2
_PERCENT = BASIS_POINTS // 100
_SMALLEST_SHARE_BP = round(SMALLEST_SHARE * BASIS_POINTS)
_FLOAT_NOISE_BP = 1e-6


@dataclass(frozen=True, slots=True)
class _Assumptions:
    """What the search starts from; shares in basis points."""

    clients: int
    corrupt_bp: int
    dropout_bp: int
    mode: Mode
    security_bits: int
    correctness_bits: int

    @property
    def corrupt(self) -> int:
        return corrupt_bound(self.clients, self.corrupt_bp)

    @property
    def dropouts(self) -> int:
        return self.clients * self.dropout_bp // BASIS_POINTS


def graph_parameters(
    *,
    clients: int,
    corrupt_share: float,
    dropout_share: float,
    mode: Mode,
    security_bits: int | None = None,
    correctness_bits: int = CORRECTNESS_BITS,
    neighbours: int | None = None,
) -> GraphParameters:
    """Return the smallest graph that is safe and completes under these assumptions. Results are cached.

    Shares below SMALLEST_SHARE are taken as SMALLEST_SHARE, and fractions of a basis point are rounded up. Both are
    security assumptions in curious mode, where dropouts cut the graph as corrupt clients do; in active mode a low
    `dropout_share` would be safe, but it pushes t towards k, and one dropout too many would abandon the round.

    Args:
        clients: n, the members of the roster, SMALLEST_COHORT to 65,520 (evaluation points in GF(65521)).
        corrupt_share: gamma, the assumed share of clients that collude with the server, below 0.5; taken as
            max(1, ceil(gamma n)) clients.
        dropout_share: delta, the assumed share of clients that drop out after keys are advertised, below 1; taken as
            floor(delta n) clients.
        mode: What the server may do: `curious` follows the protocol, `active` need not.
        security_bits: sigma, 1 to 128; SECURITY_BITS of the mode if None. Not used by a complete graph.
        correctness_bits: eta, 1 to 128. Not used by a complete graph.
        neighbours: k of a ring, even, if it is to be this one and not the smallest.

    Raises:
        ConfigError: An argument is out of range, or no graph satisfies all conditions; the text says which assumption
            to relax, and how far.
    """
    bits = SECURITY_BITS[mode] if security_bits is None else security_bits
    _check(clients, corrupt_share, dropout_share, bits, correctness_bits)
    corrupt_bp, dropout_bp = _basis_points(corrupt_share), _basis_points(dropout_share)
    assumptions = _Assumptions(clients, corrupt_bp, dropout_bp, mode, bits, correctness_bits)
    if neighbours is not None and (neighbours % 2 or not 2 <= neighbours <= clients - 2):
        raise ConfigError(f"secure aggregation: a ring of {clients} has an even number of neighbours, not {neighbours}")
    found = _find(assumptions) if neighbours is None else _search(assumptions, neighbours // 2, neighbours // 2)
    if found is None and neighbours is not None:
        raise ConfigError(
            f"secure aggregation: {neighbours} neighbours are too few, or too many, for {clients} clients"
        )
    if found is None:
        raise ConfigError(_infeasible(assumptions))
    return found


def _check(clients: int, corrupt_share: float, dropout_share: float, security_bits: int, correctness_bits: int) -> None:
    rules = (
        (
            SMALLEST_COHORT <= clients <= _LARGEST_COHORT,
            f"clients is {clients}; it must be from {SMALLEST_COHORT} to {_LARGEST_COHORT}",
        ),
        (0 <= corrupt_share < 0.5, f"corrupt_share is {corrupt_share}; it must be at least 0 and below 0.5"),
        (0 <= dropout_share < 1, f"dropout_share is {dropout_share}; it must be at least 0 and below 1"),
        (1 <= security_bits <= _LARGEST_BITS, f"security_bits is {security_bits}; write 1 to {_LARGEST_BITS}"),
        (1 <= correctness_bits <= _LARGEST_BITS, f"correctness_bits is {correctness_bits}; write 1 to {_LARGEST_BITS}"),
    )
    for holds, text in rules:
        if not holds:
            raise ConfigError(f"secure aggregation: {text}")


def _basis_points(share: float) -> int:
    return max(_SMALLEST_SHARE_BP, ceil(share * BASIS_POINTS - _FLOAT_NOISE_BP))


@lru_cache(maxsize=1024)
def _find(assumptions: _Assumptions) -> GraphParameters | None:
    """Return the parameters, or None where no graph satisfies the assumptions."""
    if assumptions.clients <= COMPLETE_GRAPH_LIMIT:
        return _complete(assumptions)
    return _search(assumptions, 1, (assumptions.clients - 2) // 2)


def _complete(assumptions: _Assumptions) -> GraphParameters | None:
    """Return the complete graph, if enough members stay: in active mode each wants t signatures beside its own."""
    shares = threshold(assumptions.mode, assumptions.clients, assumptions.corrupt_bp)
    needed = shares + (assumptions.mode == "active")
    if assumptions.clients - assumptions.dropouts < needed:
        return None
    return GraphParameters(neighbours=degree(assumptions.clients), threshold=shares)


def _search(assumptions: _Assumptions, low: int, high: int) -> GraphParameters | None:
    """Return the smallest ring whose half degree k/2 is in [low, high], leaving out intervals that cannot hold one."""
    shares = _threshold(assumptions, 2 * low, 2 * high)
    if shares is None:
        return None
    if low == high:
        return GraphParameters(neighbours=2 * low, threshold=shares)
    middle = (low + high) // 2
    return _search(assumptions, low, middle) or _search(assumptions, middle + 1, high)


def _threshold(assumptions: _Assumptions, low: int, high: int) -> int | None:
    """Return t for k = low = high; for an interval, None only if no k in it satisfies the conditions.

    More neighbours are more corrupt neighbours, more surviving ones, and wider gaps. So over an interval each condition
    is taken at the end where it is easiest, which is exact when both ends meet.
    """
    match assumptions.mode:
        case "curious":
            return _curious_threshold(assumptions, low, high)
        case "active":
            return _active_threshold(assumptions, low, high)


def _curious_threshold(assumptions: _Assumptions, low: int, high: int) -> int | None:
    clients, bits = assumptions.clients, assumptions.security_bits + 1
    gap_pairs = clients * (clients - high - 1) / 2
    if gap_pairs * _tail(high - 1, clients, assumptions.corrupt + assumptions.dropouts, high) > 2.0**-bits:
        return None
    smallest = max(_SMALLEST_THRESHOLD, 1 + _most_marked(clients, assumptions.corrupt, low, bits))
    return smallest if smallest <= _most_shares(assumptions, high) else None


def _active_threshold(assumptions: _Assumptions, low: int, high: int) -> int | None:
    clients, bits = assumptions.clients, assumptions.security_bits + 1
    largest = _most_shares(assumptions, high)
    if 2 * largest <= low + _most_marked(clients, assumptions.corrupt, low, bits):
        return None
    gap = low // 2
    in_gap = _tail(largest - gap - 1, clients, assumptions.corrupt, gap)
    return largest if clients**2 / 2 * in_gap**2 <= 2.0**-bits else None


def _most_shares(assumptions: _Assumptions, neighbours: int) -> int:
    """Return the largest t that completes: but for 2^-eta, every client keeps t of its neighbours."""
    dropped = _most_marked(assumptions.clients, assumptions.dropouts, neighbours, assumptions.correctness_bits)
    return neighbours - dropped


@lru_cache(maxsize=4096)
def _most_marked(clients: int, marked: int, neighbours: int, bits: int) -> int:
    """Return the smallest x with clients * Pr[Hyp(clients, marked, neighbours) > x] <= 2^-bits."""

    def rare(x: int) -> bool:
        return clients * _tail(x, clients, marked, neighbours) <= 2.0**-bits

    return bisect_left(range(neighbours), True, key=rare)


def _tail(x: int, clients: int, marked: int, drawn: int) -> float:
    """Return Pr[Hyp(clients, marked, drawn) > x]."""
    from scipy.stats import hypergeom  # Takes two seconds to import, and only cohorts beyond the limit need it.

    return float(hypergeom.sf(x, clients, marked, drawn))


def _infeasible(assumptions: _Assumptions) -> str:
    corrupt, dropout = assumptions.corrupt_bp / BASIS_POINTS, assumptions.dropout_bp / BASIS_POINTS
    cures = ", or ".join(_cures(assumptions)) or "lower both corrupt_share and dropout_share, or gather more clients"
    return (
        f"secure aggregation: no graph of {assumptions.clients} clients is both safe ({assumptions.mode} mode, "
        f"corrupt_share {corrupt:g}) and sure to complete (dropout_share {dropout:g}): {cures}"
    )


def _cures(assumptions: _Assumptions) -> Iterator[str]:
    """Yield what is enough by itself. A weaker mode is never among them."""
    dropout = _largest_percent(assumptions.dropout_bp, lambda bp: replace(assumptions, dropout_bp=bp))
    corrupt = _largest_percent(assumptions.corrupt_bp, lambda bp: replace(assumptions, corrupt_bp=bp))
    if dropout is not None:
        yield f"lower dropout_share to {dropout / 100:g}"
    if corrupt is not None:
        yield f"lower corrupt_share to {corrupt / 100:g}"
    if assumptions.clients > COMPLETE_GRAPH_LIMIT and _find(replace(assumptions, clients=COMPLETE_GRAPH_LIMIT)):
        yield f"lower the cohort to {COMPLETE_GRAPH_LIMIT} clients, whose graph is complete"


def _largest_percent(present_bp: int, assume: Callable[[int], _Assumptions]) -> int | None:
    """Return the largest whole percentage below the present share for which there is a graph; None if none is."""
    percents = range(_SMALLEST_SHARE_BP // _PERCENT, ceil(present_bp / _PERCENT))
    failing = bisect_left(percents, True, key=lambda percent: _find(assume(percent * _PERCENT)) is None)
    return percents[failing - 1] if failing else None
