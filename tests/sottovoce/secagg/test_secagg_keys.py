"""Keys: every purpose, direction, session and party gives another one; low-order points give none."""

from __future__ import annotations

from itertools import combinations

import pytest

from sottovoce.errors import BadShare, CryptoError, LowOrderPoint
from sottovoce.secagg import keys

SESSION, OTHER = b"s" * 32, b"t" * 32
P = 2**255 - 19
LOW_ORDER = [
    0, 1, P - 1, P, P + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
]  # fmt: skip


def test_both_sides_agree_on_one_secret() -> None:
    one, two = keys.key_pair(b"1" * 32), keys.key_pair(b"2" * 32)
    assert one.agree(two.public) == two.agree(one.public)
    assert one.public != two.public


@pytest.mark.parametrize("high_bit", [0, 2**255])
@pytest.mark.parametrize("u", LOW_ORDER)
def test_points_of_low_order_are_refused_in_every_encoding(u: int, high_bit: int) -> None:
    encoded = (u % 2**255 | high_bit).to_bytes(32, "little")
    with pytest.raises(LowOrderPoint):
        keys.key_pair(b"1" * 32).agree(encoded)
    with pytest.raises(LowOrderPoint):
        keys.refuse_low_order(encoded)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(CryptoError):
        keys.key_pair(b"1" * 32).agree(b"\5" * length)
    with pytest.raises(CryptoError, match="32 bytes"):
        keys.refuse_low_order(b"\5" * length)


def test_every_derived_key_is_another_one() -> None:
    secret = b"k" * 32
    channel = keys.channel(secret, session=SESSION)
    made = [
        keys.self_mask_key(secret, session=SESSION, device="a", cipher="chacha20"),
        keys.self_mask_key(secret, session=SESSION, device="b", cipher="chacha20"),
        keys.self_mask_key(secret, session=OTHER, device="a", cipher="chacha20"),
        keys.self_mask_key(secret, session=SESSION, device="a", cipher="aes-128-ctr"),
        keys.pairwise_mask_key(secret, session=SESSION, lower="a", upper="b", cipher="chacha20"),
        keys.pairwise_mask_key(secret, session=SESSION, lower="b", upper="a", cipher="chacha20"),
        keys.pairwise_mask_key(secret, session=SESSION, lower="ab", upper="", cipher="chacha20"),
        keys.share_channel_key(channel, sender="a", recipient="b"),
        keys.share_channel_key(channel, sender="b", recipient="a"),
    ]
    assert [len(key) for key in made] == [32, 32, 32, 16, 32, 32, 32, 32, 32]
    assert all(one[:16] != two[:16] for one, two in combinations(made, 2))


def test_shares_open_only_with_their_key_in_their_session() -> None:
    ciphertext = keys.encrypt_shares(b"k" * 32, b"shares", session=SESSION)
    assert keys.decrypt_shares(b"k" * 32, ciphertext, session=SESSION) == b"shares"
    assert len(ciphertext) == len(b"shares") + keys.TAG_BYTES
    for key, content, session in [
        (b"l" * 32, ciphertext, SESSION),
        (b"k" * 32, ciphertext, OTHER),
        (b"k" * 32, ciphertext[:-1] + bytes([ciphertext[-1] ^ 1]), SESSION),
        (b"k" * 32, b"", SESSION),
    ]:
        with pytest.raises(BadShare):
            keys.decrypt_shares(key, content, session=session)


def test_secrets_do_not_show() -> None:
    pair = keys.key_pair(b"1" * 32)
    assert "1111" not in repr(pair)
    assert "secret" not in repr(pair)
