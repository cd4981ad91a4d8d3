"""The secret sharing of docs/SPEC.md, section 5, as slow and as free of sottovoce as `by_the_spec.py`."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from by_the_spec import Entropy, Refused, words

PRIME, LIMBS = 65521, 18


def limbs(secret: bytes) -> list[int]:
    number = int.from_bytes(secret, "little")
    return [number >> 15 * index & 0x7FFF for index in range(LIMBS)]


def from_limbs(values: Sequence[int]) -> bytes:
    number = sum(value << 15 * index for index, value in enumerate(values))
    if any(value >= 2**15 for value in values) or number >= 2**256:
        raise Refused("a rebuilt limb or pad bit is out of range")
    return number.to_bytes(32, "little")


def coefficients(count: int, entropy: Entropy) -> list[int]:
    """Uniform values below the prime: 16-bit words, those too large drawn again, all missing ones at once."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += [word for word in words(entropy(2 * (count - len(drawn))), 2) if word < PRIME]
    return drawn


def split(secrets: Sequence[bytes], *, points: Sequence[int], t: int, entropy: Entropy) -> list[list[bytes]]:
    """Shares[point][secret]. Coefficients are drawn power by power, within one power secret by secret, limb by limb."""
    constants = [limb for secret in secrets for limb in limbs(secret)]
    higher = coefficients((t - 1) * len(constants), entropy)
    rows = [constants, *(higher[at : at + len(constants)] for at in range(0, len(higher), len(constants)))]
    shares = []
    for x in points:
        values = [
            sum(row[column] * pow(x, power, PRIME) for power, row in enumerate(rows)) % PRIME
            for column in range(len(constants))
        ]
        content = [struct.pack(f"<{LIMBS}H", *values[at : at + LIMBS]) for at in range(0, len(values), LIMBS)]
        shares.append(content)
    return shares


def rebuild(shares: Mapping[int, bytes]) -> bytes:
    """The secret from exactly t shares by point."""
    return from_limbs(interpolated(shares))


def interpolated(shares: Mapping[int, bytes]) -> list[int]:
    values = [0] * LIMBS
    for x, content in shares.items():
        weight = 1
        for other in shares:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        for index, value in enumerate(words(content, 2)):
            values[index] = (values[index] + weight * value) % PRIME
    return values
