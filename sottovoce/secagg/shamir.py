"""Shamir's secret sharing of 256-bit secrets over GF(65521), exact in float64.

A secret is cut into LIMBS limbs of LIMB_BITS bits; each limb is shared on its own, and all limbs of all secrets share
one matrix product. With t shares every product is below t * p^2 < 2^53, so float64 BLAS is exact.

Symbols: p the prime 65521, t the threshold, x an evaluation point (1 to p - 1), V the Vandermonde matrix of the points.
Reference: Shamir 1979; Bonawitz et al. 2017 (eprint 2017/281), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sottovoce.errors import BadShare, LocalProtocolError

PRIME = 65521
LIMBS = 18
LIMB_BITS = 15
SECRET_BYTES = 32
SHARE_BYTES = LIMBS * 2
_PAD_BITS = LIMBS * LIMB_BITS - SECRET_BYTES * 8
_WIRE = np.dtype("<u2")
_EXACT_BOUND = 2**53
_BATCH = 1024  # Secrets whose shares are widened to float64 at a time.

Limbs = npt.NDArray[np.uint16]
Matrix = npt.NDArray[np.float64]
Points = npt.NDArray[np.int64]
Residues = npt.NDArray[np.uint32]


def split(
    secrets: Sequence[bytes], *, points: Sequence[int], threshold: int, entropy: Callable[[int], bytes]
) -> list[bytes]:
    """Return, for every point, one share of every secret.

    Args:
        secrets: 32 bytes each.
        points: Distinct evaluation points, 1 to p - 1.
        threshold: t, shares that rebuild a secret; t - 1 say nothing about it.
        entropy: Source of the polynomials' coefficients.

    Returns:
        At `points[i]` the shares of all secrets one after another, SHARE_BYTES each.

    Raises:
        LocalProtocolError: A secret of another length, or a threshold beyond exact arithmetic.
    """
    if threshold * PRIME**2 >= _EXACT_BOUND:
        raise LocalProtocolError(f"a threshold of {threshold} is too large for exact float64 arithmetic")
    constants = np.concatenate([_limbs_of(secret) for secret in secrets])
    random = _uniform_below_prime((threshold - 1) * constants.size, entropy).reshape(threshold - 1, constants.size)
    coefficients = np.concatenate([constants[None, :], random]).astype(np.float64)
    values = (_vandermonde(tuple(points), threshold) @ coefficients).astype(np.int64) % PRIME
    content = values.astype(_WIRE).tobytes()
    row_bytes = SHARE_BYTES * len(secrets)
    return [content[at : at + row_bytes] for at in range(0, len(content), row_bytes)]


def parse_shares(content: bytes) -> Limbs:
    """Return the limbs of shares that lie one after another, shape (shares, LIMBS).

    Raises:
        BadShare: They are not whole shares of SHARE_BYTES bytes, or a limb is not below p.
    """
    if len(content) % SHARE_BYTES:
        raise BadShare(f"a share has {SHARE_BYTES} bytes, and one has not")
    limbs = np.frombuffer(content, _WIRE)
    if limbs.size and int(np.maximum.reduce(limbs)) >= PRIME:
        raise BadShare(f"a limb of a share is not below {PRIME}")
    return limbs.reshape(-1, LIMBS)


def interpolate(points: Sequence[int], shares: Limbs) -> Limbs:
    """Return the limbs at x = 0 of many secrets whose shares lie at the same points: one matrix product.

    Args:
        points: t distinct evaluation points.
        shares: Limbs of shares, shape (t, secrets, LIMBS), or (t, anything).
    """
    flat = shares.reshape(len(points), -1).astype(np.float64)
    (weights,) = _lagrange_at_zero(np.array([points], np.int64))
    limbs: Limbs = np.mod(weights @ flat, PRIME).astype(np.uint16).reshape(shares.shape[1:])
    return limbs


def interpolate_each(points: Points, shares: Limbs) -> Limbs:
    """Return the limbs at x = 0 of many secrets, each with t points of its own.

    The weights of owners that share a survivor set are computed once.

    Args:
        points: Distinct evaluation points of each secret, shape (secrets, t).
        shares: Limbs of the shares there, shape (secrets, t, LIMBS).

    Returns:
        Shape (secrets, LIMBS).
    """
    rows = [row.tobytes() for row in points]
    index = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    sets = np.frombuffer(b"".join(index), points.dtype).reshape(len(index), -1)
    weights = _lagrange_at_zero(sets)[[index[row] for row in rows]]
    limbs = np.empty((len(points), LIMBS), np.uint16)
    for at in range(0, len(points), _BATCH):
        part = slice(at, at + _BATCH)
        limbs[part] = np.mod((weights[part, None, :] @ shares[part].astype(np.float64))[:, 0, :], PRIME)
    return limbs


def secret_of(limbs: Limbs) -> bytes:
    """Return the secret that rebuilt `limbs` spell, 32 bytes.

    Raises:
        BadShare: A limb has more than LIMB_BITS bits or a pad bit is set: some share was wrong.
    """
    if int(limbs.max()) >> LIMB_BITS:
        raise BadShare("a rebuilt limb is out of range: some share is wrong")
    number = sum(int(limb) << (LIMB_BITS * index) for index, limb in enumerate(limbs))
    if number >> (SECRET_BYTES * 8):
        raise BadShare(f"one of the {_PAD_BITS} pad bits of a rebuilt secret is set: some share is wrong")
    return number.to_bytes(SECRET_BYTES, "little")


def secrets_of(limbs: Limbs) -> list[bytes | None]:
    """Return the secret that each row of rebuilt limbs spells, or None where `secret_of` would raise."""
    whole = limbs.astype(_WIRE).view(np.uint8).reshape(len(limbs), LIMBS, 2)
    bits = np.unpackbits(whole, axis=2, bitorder="little")
    spelled = bits[:, :, :LIMB_BITS].reshape(len(limbs), LIMBS * LIMB_BITS)
    excess = bits[:, :, LIMB_BITS:].sum(axis=(1, 2)) + spelled[:, SECRET_BYTES * 8 :].sum(axis=1)
    rows = np.packbits(spelled[:, : SECRET_BYTES * 8], axis=1, bitorder="little")
    return [None if bad else row.tobytes() for row, bad in zip(rows, excess.tolist(), strict=True)]


def _limbs_of(secret: bytes) -> Limbs:
    if len(secret) != SECRET_BYTES:
        raise LocalProtocolError(f"a shared secret has {SECRET_BYTES} bytes, not {len(secret)}")
    number = int.from_bytes(secret, "little")
    return np.array([number >> (LIMB_BITS * i) & (2**LIMB_BITS - 1) for i in range(LIMBS)], np.uint16)


def _uniform_below_prime(count: int, entropy: Callable[[int], bytes]) -> Limbs:
    """Return `count` uniform values below p, by rejecting 16-bit words that are not."""
    accepted = np.empty(0, np.uint16)
    while accepted.size < count:
        words = np.frombuffer(entropy(2 * (count - accepted.size)), _WIRE)
        accepted = np.concatenate([accepted, words[words < PRIME]])
    return accepted


def _vandermonde(points: tuple[int, ...], threshold: int) -> Matrix:
    """Return the powers 0 to t - 1 of every point, a row each; as many again with every product."""
    matrix = np.ones((threshold, len(points)), np.int64)
    known, factor = 1, np.array(points, np.int64)
    while known < threshold:
        more = min(known, threshold - known)
        matrix[known : known + more] = matrix[:more] * factor % PRIME
        known, factor = known + more, factor * factor % PRIME
    return matrix.T.astype(np.float64)


def _lagrange_at_zero(points: Points) -> Matrix:
    """Return, row by row, the weights w with f(0) = sum of w_j f(x_j) for every f of degree below the row's length.

    w_j is the product of x_m / (x_m - x_j) over all m but j: that of all x, over x_j times the product of differences.
    """
    rising = np.sort(points, axis=1)
    if (np.diff(rising, axis=1) == 0).any() or rising.min() < 1 or rising.max() >= PRIME:
        raise LocalProtocolError("evaluation points must be distinct and from 1 to p - 1")
    residues = points.astype(np.uint32)
    whole, divisor = np.ones((len(residues), 1), np.uint32), residues
    for column in range(residues.shape[1]):
        x = residues[:, column : column + 1]
        differences = _reduced(x + (PRIME - residues))
        differences[:, column] = 1
        divisor = _reduced(divisor * differences)
        whole = _reduced(whole * x)
    return _reduced(whole * _inverse(divisor)).astype(np.float64)


def _inverse(values: Residues) -> Residues:
    """Return the inverses modulo p: by Fermat, the power p - 2."""
    result, power = np.ones_like(values), values
    for bit in reversed(bin(PRIME - 2)[2:]):
        if bit == "1":
            result = _reduced(result * power)
        power = _reduced(power * power)
    return result


def _reduced(values: Residues) -> Residues:
    """Return `values` modulo p; the product of two residues is below 2^32. numpy divides many at once, but takes `%`
    one by one.
    """
    return values - values // PRIME * PRIME
