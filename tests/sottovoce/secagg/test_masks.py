"""Mask streams: what is added comes off again, word by word; every lane of a masked input is uniform."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from aggregation_plans import plan_of
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from sottovoce.plan import Aggregation, Counted, Quantised
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.segments import add_packed_into, pack, reduce, unpacked_bytes
from sottovoce.secagg.server_stages import CollectingInputs

# Narrow parts that end before, at and after the expander's block of 128 KiB, and none at all.
SHAPES = [(40, 16), (2**17 + 16, 16), (2**17, 2**17), (3 * 2**17 + 8, 2**17 + 24), (24, 24)]


def stream(cipher: str, key: bytes, length: int) -> bytes:
    """The stream by its definition, in one piece."""
    if cipher == "chacha20":
        return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(length))
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(length))


@pytest.mark.parametrize(("cipher", "key_bytes"), [("aes-128-ctr", 16), ("chacha20", 32)])
@pytest.mark.parametrize(("vector_bytes", "wide_bytes"), SHAPES)
def test_a_mask_is_one_stream_over_the_whole_vector_added_word_by_word(
    fleet: Any, fixed_entropy: Any, cipher: str, key_bytes: int, vector_bytes: int, wide_bytes: int
) -> None:
    entropy = fixed_entropy(vector_bytes)
    expander = MaskExpander(fleet.parameters(cipher=cipher, vector_bytes=vector_bytes, wide_bytes=wide_bytes))
    plain, keys = entropy(vector_bytes), [entropy(key_bytes), entropy(key_bytes)]
    vector = bytearray(plain)
    expander.add(vector, keys[0])
    expander.subtract(vector, keys[1])
    split = vector_bytes - wide_bytes
    for start, stop, dtype in ((0, split, "<u4"), (split, vector_bytes, "<u8")):
        words = [np.frombuffer(stream(cipher, key, vector_bytes)[start:stop], dtype) for key in keys]
        expected = np.frombuffer(plain[start:stop], dtype) + words[0] - words[1]
        assert bytes(vector[start:stop]) == expected.tobytes()
    expander.subtract(vector, keys[0])
    expander.add(vector, keys[1])
    assert bytes(vector) == plain


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
@pytest.mark.parametrize(("vector_bytes", "wide_bytes"), SHAPES)
def test_many_masks_in_one_pass_are_the_same_as_one_after_another(
    fleet: Any, fixed_entropy: Any, cipher: str, vector_bytes: int, wide_bytes: int
) -> None:
    entropy = fixed_entropy(vector_bytes)
    parameters = fleet.parameters(cipher=cipher, vector_bytes=vector_bytes, wide_bytes=wide_bytes)
    added, subtracted = ([entropy(16 if cipher == "aes-128-ctr" else 32) for _ in range(3)] for _ in range(2))
    together = bytearray(entropy(vector_bytes))
    singly = bytearray(together)
    MaskExpander(parameters).apply(together, added=added, subtracted=subtracted)
    for key in added:
        MaskExpander(parameters).add(singly, key)
    for key in subtracted:
        MaskExpander(parameters).subtract(singly, key)
    assert together == singly
    MaskExpander(parameters).apply(together)
    assert together == singly


@pytest.mark.parametrize("wide_bytes", [16, 24, 2**17 + 24])
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_an_aes_stream_over_several_blocks_is_the_librarys_counter_mode(
    fleet: Any, fixed_entropy: Any, blocks: int, wide_bytes: int
) -> None:
    """Lengths that end in the middle of a counter too: multiples of 8 and not of 16."""
    entropy = fixed_entropy(blocks)
    for odd in (-16, -8, 0, 8, 16, 24):
        length = blocks * 2**17 + wide_bytes + odd
        expander = MaskExpander(fleet.parameters(vector_bytes=length, wide_bytes=wide_bytes))
        for _ in range(2):  # The second stream of one expander starts at zero again.
            key, vector = entropy(16), bytearray(length)
            expander.add(vector, key)
            assert vector == stream("aes-128-ctr", key, length)


@pytest.mark.parametrize(("width", "word"), [(9, "<u2"), (16, "<u2"), (17, "<u4"), (26, "<u4"), (32, "<u4")])
def test_a_packed_entry_is_masked_modulo_two_to_its_width(
    fleet: Any, fixed_entropy: Any, width: int, word: str
) -> None:
    """The stream runs over the vector as it lies in memory; on the wire the mask is its words modulo 2^width."""
    count, entropy = 3 * 2**16 + 64, fixed_entropy(width)
    sizes = {"vector_bytes": count * width // 8 + 8 + 16, "wide_bytes": 16, "packed": ((width, count),)}
    parameters = fleet.parameters(**sizes)
    entry_bytes = np.dtype(word).itemsize
    plain = np.frombuffer(entropy(count * entry_bytes), word) & np.uint32(2**width - 1)
    vector = bytearray(plain.astype(word).tobytes() + bytes(24))
    key = entropy(16)
    MaskExpander(parameters).subtract(vector, key)
    pack(vector, parameters)
    received = bytearray(count * entry_bytes + 24)
    add_packed_into(received, vector, parameters)
    mask = stream("aes-128-ctr", key, len(received))
    words = np.frombuffer(mask, word, count).astype(object)
    assert (np.frombuffer(received, word, count) == (plain.astype(object) - words) % 2**width).all()
    MaskExpander(parameters).add(received, key)
    reduce(received, parameters)
    assert (np.frombuffer(received, word, count) == plain).all()
    assert received[-24:] == bytes(24)


def peak_of(step: Callable[[], object]) -> int:
    """The most bytes that `step` has taken at any one time."""
    tracemalloc.start()
    kept = step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return peak


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
@pytest.mark.parametrize("width", [0, 16, 26])
def test_no_temporary_grows_with_the_vector(fleet: Any, width: int, cipher: str) -> None:
    """Beside a vector of millions of bytes masking, packing and adding need as much as beside one four times as long.

    Masking needs the expander's three blocks, and for a moment the numbers of one block's counters (64 kB).
    """
    lengths, peaks = [], []
    for count in (2**20, 2**22):
        packed = ((width, count),) if width else ()
        wire_bytes = (width or 32) * count // 8
        parameters = fleet.parameters(vector_bytes=wire_bytes + 16, wide_bytes=16, packed=packed, cipher=cipher)
        vector, total = bytearray(unpacked_bytes(parameters)), bytearray(unpacked_bytes(parameters))
        key = bytes(16 if cipher == "aes-128-ctr" else 32)
        expander = MaskExpander(parameters)
        lengths.append(len(vector))
        made = peak_of(partial(MaskExpander, parameters))
        assert made < 2**19 + len(vector) // 64, "beside its blocks, only where each of them belongs"
        masked = peak_of(partial(expander.apply, vector, added=[key] * 3, subtracted=[key] * 3))
        wire = peak_of(partial(pack, vector, parameters)), peak_of(partial(add_packed_into, total, vector, parameters))
        assert masked < 2**17
        assert max(wire) < (2**21 if width == 26 else 2**14)
        peaks.append((masked, *wire))
    assert lengths[1] > 3.9 * lengths[0] > 2**22
    for shorter, longer in zip(*peaks, strict=True):
        assert longer < shorter + 2**14


def test_the_last_stream_can_be_erased(fleet: Any) -> None:
    expander = MaskExpander(fleet.parameters())
    expander.add(bytearray(fleet.vector_bytes), bytes(16))
    assert any(expander._stream)
    expander.erase()
    assert not any(expander._stream)


def chi_square(words: np.ndarray[Any, Any], bits: int) -> float:
    """Chi-square statistic of the top 4 bits of `words` against uniform: 15 degrees of freedom."""
    counts = np.bincount((words >> np.uint64(bits - 4)).astype(int), minlength=16)
    expected = words.size / 16
    return float(((counts - expected) ** 2 / expected).sum())


def kolmogorov_smirnov(words: np.ndarray[Any, Any], bits: int) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and the uniform one."""
    sample = np.sort(words.astype(np.float64) / 2.0**bits)
    steps = np.arange(sample.size) / sample.size
    return float(np.sqrt(sample.size) * max(np.max(steps + 1 / sample.size - sample), np.max(sample - steps)))


@pytest.mark.parametrize("cipher", ["aes-128-ctr", "chacha20"])
def test_every_lane_of_a_masked_input_is_uniform(fleet: Any, fixed_entropy: Any, cipher: str) -> None:
    """The plainest input there is, all zeros but the weight, over many sessions; each lane by itself."""
    plan = plan_of(
        Aggregation(name="update", tensors=("float32[3]",), encoding=Quantised(half_range=1, bits=8)),
        Aggregation(name="count", tensors=("int32[1]",), encoding=Counted(maximum=9), lane="uint64"),
        weight_cap=4,
    )
    layout = layout_of(plan, maximum_clients=100)
    zeros: dict[str, list[Any]] = {"update": [np.zeros(3, np.float32)], "count": [np.zeros(1, np.int32)]}
    sizes = {"vector_bytes": layout.vector_bytes, "wide_bytes": layout.wide_bytes}
    parameters = fleet.parameters(cipher=cipher, mode="curious", **sizes)
    masked = bytearray()
    for seed in range(60):
        rehearsal = fleet.rehearse(4, seed=seed, parameters=parameters)
        for index, device in enumerate(rehearsal.devices):
            plain = encode(layout, zeros, weight=1, entropy=fixed_entropy(index))
            entropy = fixed_entropy(1000 * seed + index)
            rehearsal.clients[device] = fleet.client(device, plain, parameters=parameters, entropy=entropy)
        requests = rehearsal.run_until(CollectingInputs)
        for device in rehearsal.devices:
            rehearsal.clients[device].receive(requests[device])
            masked += rehearsal.clients[device].masked_vector
    rows = np.frombuffer(masked, np.uint8).reshape(-1, layout.vector_bytes)
    lanes = [(start, 4, "<u4") for start in range(0, 16, 4)] + [(start, 8, "<u8") for start in range(16, 40, 8)]
    assert len(rows) == 240
    for start, width, dtype in lanes:
        words = np.ascontiguousarray(rows[:, start : start + width]).view(dtype).ravel().astype(np.uint64)
        assert chi_square(words, 8 * width) < 44.3, start  # p = 0.0001
        assert kolmogorov_smirnov(words, 8 * width) < 2.23, start  # p = 0.0001
        assert np.unique(words).size == words.size
