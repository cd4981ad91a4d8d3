"""Secret sharing: any t shares give the secret, fewer say nothing, wrong ones are noticed."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.errors import BadShare, LocalProtocolError
from sottovoce.secagg import shamir

SECRETS = st.binary(min_size=32, max_size=32)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 60), st.lists(SECRETS, min_size=1, max_size=4))
def test_any_t_shares_give_the_secrets(
    fixed_entropy: Any, data: st.DataObject, holders: int, secrets: list[bytes]
) -> None:
    threshold = data.draw(st.integers(1, holders))
    points = data.draw(st.permutations(range(1, holders + 1)))
    rows = shamir.split(secrets, points=points, threshold=threshold, entropy=fixed_entropy(holders))
    chosen = data.draw(st.permutations(range(holders)))[:threshold]
    limbs = np.stack([shamir.parse_shares(rows[index]) for index in chosen])
    rebuilt = shamir.interpolate([points[index] for index in chosen], limbs)
    assert [shamir.secret_of(one) for one in rebuilt] == secrets


def test_the_arithmetic_is_exact_where_float64_would_first_fail(fixed_entropy: Any) -> None:
    """Against Python's integers, with the largest coefficients, points and a threshold beyond any cohort here."""
    threshold, points = 400, (65520, 65519, 40000)
    top = (shamir.PRIME - 1).to_bytes(2, "little")
    (row, *_) = shamir.split((b"\xff" * 32,), points=points, threshold=threshold, entropy=lambda n: top * (n // 2))
    limb = int(shamir.parse_shares(row)[0][0])
    expected = (
        2**15 - 1 + sum(65520 * pow(65520, power, shamir.PRIME) for power in range(1, threshold))
    ) % shamir.PRIME
    assert limb == expected
    with pytest.raises(LocalProtocolError, match="too large"):
        shamir.split((bytes(32),), points=(1,), threshold=2_100_000, entropy=fixed_entropy(1))


def test_t_minus_one_shares_are_uniform_whatever_the_secret(fixed_entropy: Any) -> None:
    """Chi-square over 16 bins of the limbs of t - 1 shares, for the two extreme secrets; fixed entropy."""
    for secret in (bytes(32), b"\xff" * 32):
        entropy = fixed_entropy(77)
        counts = np.zeros(16)
        for _ in range(150):
            rows = shamir.split((secret,), points=(1, 2, 3), threshold=4, entropy=entropy)
            limbs = np.concatenate([shamir.parse_shares(row) for row in rows]).ravel()
            counts += np.bincount(limbs.astype(int) * 16 // shamir.PRIME, minlength=16)
        expected = counts.sum() / 16
        assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 15 degrees of freedom, p = 0.001


def test_coefficients_that_are_not_below_the_prime_are_drawn_again() -> None:
    drawn: list[int] = []

    def entropy(count: int) -> bytes:
        drawn.append(count)
        return b"\xff\xff" * (count // 2) if len(drawn) == 1 else b"\1\0" * (count // 2)

    (row,) = shamir.split((bytes(32),), points=(1,), threshold=2, entropy=entropy)
    assert drawn == [36, 36]
    assert shamir.parse_shares(row).tolist() == [[1] * 18]


@pytest.mark.parametrize(
    "content", [b"\0", bytes(35), bytes(37), b"\xf1\xff" + bytes(34), bytes(34) + b"\xff\xff"], ids=len
)
def test_shares_out_of_range_are_refused(content: bytes) -> None:
    with pytest.raises(BadShare):
        shamir.parse_shares(bytes(36) + content)


def test_the_largest_limb_is_accepted() -> None:
    assert shamir.parse_shares(b"\xf0\xff" * 18).tolist() == [[65520] * 18]
    assert shamir.parse_shares(b"").shape == (0, 18)


@pytest.mark.parametrize(("index", "value"), [(0, 2**15), (17, 2**15), (17, 2), (17, 2**14)])
def test_a_rebuilt_limb_or_pad_bit_out_of_range_is_refused(index: int, value: int) -> None:
    limbs = np.zeros(18, np.uint16)
    limbs[index] = value
    with pytest.raises(BadShare):
        shamir.secret_of(limbs)


def test_the_limbs_are_little_endian_and_use_every_bit() -> None:
    limbs = np.full(18, 2**15 - 1, np.uint16)
    limbs[17] = 1
    assert shamir.secret_of(limbs) == b"\xff" * 32
    limbs[:] = 0
    limbs[1] = 1
    assert shamir.secret_of(limbs) == (1 << 15).to_bytes(32, "little")


def test_wrong_shares_do_not_give_the_secret(fixed_entropy: Any) -> None:
    secret = random.Random(5).randbytes(32)
    rows = shamir.split((secret,), points=(1, 2, 3), threshold=3, entropy=fixed_entropy(5))
    limbs = np.stack([shamir.parse_shares(row) for row in rows])
    limbs[1, 0, 4] = (int(limbs[1, 0, 4]) + 1) % shamir.PRIME
    rebuilt = shamir.interpolate((1, 2, 3), limbs)[0]
    right = shamir.interpolate((1, 2, 3), np.stack([shamir.parse_shares(row) for row in rows]))[0]
    assert [index for index in range(18) if rebuilt[index] != right[index]] == [4]


def test_our_own_mistakes_are_named(fixed_entropy: Any) -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes"):
        shamir.split((b"short",), points=(1,), threshold=1, entropy=fixed_entropy(1))
    for points in ((1, 1), (0, 1), (1, 65521)):
        with pytest.raises(LocalProtocolError, match="distinct"):
            shamir.interpolate(points, np.zeros((2, 1, 18), np.uint16))
