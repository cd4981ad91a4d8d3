"""The least that a session could cost: how often it must do what nobody can do faster, times what that costs here.

A machine that others use at the same time is slower, and differently so from second to second. So the primitives are
measured again and again between the devices' turns of the very same session. A total over its floor says more about
the code than a total does: HKDF, shares, parsing and checks are what is above 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from sottovoce.secagg.segments import unpacked_bytes
from sottovoce.secagg.uploads import Aead
from sottovoce.wire.messages import SecAggParameters

_BLOCK_BYTES = 100_000
_REPEATS = 10
_Operation: TypeAlias = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Counts:
    """How often one side must do each primitive.

    Attributes:
        agreements: X25519 exchanges.
        streams: Mask streams as long as the vector.
        additions: Additions of a vector.
        tags: Tags over a vector.
    """

    agreements: float
    streams: float
    additions: float
    tags: float

    def floor_s(self, primitives: Mapping[str, float]) -> float:
        """Return the CPU seconds of so many, given those of one each."""
        numbers: dict[str, float] = asdict(self)
        return sum(number * primitives[name] for name, number in numbers.items())


class Gauge:
    """Measures the primitives on vectors of one session, in the cache, now and then."""

    def __init__(self, parameters: SecAggParameters, *, every: int) -> None:
        """Prepare; `tick` takes a sample at every `every`-th call, beginning with the first."""
        length = unpacked_bytes(parameters)
        block = min(_BLOCK_BYTES, length) // 16 * 16
        self._every, self._ticks, self._repeats = every, 0, length / block
        private = X25519PrivateKey.generate()
        public = X25519PrivateKey.generate().public_key()
        zeros, stream = bytes(block), bytearray(block + 16)
        if parameters.cipher == "aes-128-ctr":  # Its blocks each on its own, which is faster than counting.
            encrypt_into = Cipher(algorithms.AES128(bytes(16)), modes.ECB()).encryptor().update_into  # noqa: S305
            aead: Aead = AESGCM(bytes(32))
        else:
            encrypt_into = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None).encryptor().update_into
            aead = ChaCha20Poly1305(bytes(32))
        total, words = np.zeros(block // 4, np.uint32), np.frombuffer(stream, np.uint32, block // 4)
        self._operations: dict[str, _Operation] = {
            "agreements": lambda: private.exchange(public),
            "streams": lambda: encrypt_into(zeros, stream),
            "additions": lambda: np.add(total, words, total),
            "tags": lambda: aead.encrypt(bytes(12), b"", zeros),
        }
        self._samples: dict[str, list[float]] = {name: [] for name in self._operations}

    def tick(self) -> None:
        """Take a sample, if it is time for one."""
        if self._ticks % self._every == 0:
            for name, operation in self._operations.items():
                self._samples[name].append(_seconds(operation) * (1.0 if name == "agreements" else self._repeats))
        self._ticks += 1

    def medians(self) -> dict[str, float]:
        """Return the median CPU seconds of each primitive, on a whole vector where it is on one."""
        return {name: median(samples) for name, samples in self._samples.items()}


def device_counts(*, neighbours: int, sharers: float) -> Counts:
    """Return what a device must do that stays to the end.

    Args:
        neighbours: k.
        sharers: How many of them shared keys, so that it masks with them.
    """
    return Counts(agreements=neighbours + sharers + 1, streams=sharers + 1, additions=sharers + 1, tags=1)


def server_counts(*, neighbours: int, members: int, sharers: int, survivors: int) -> Counts:
    """Return what the server must do, on the average of all graphs.

    Args:
        neighbours: k.
        members: n, of the roster.
        sharers: Members that shared keys.
        survivors: Members whose vector is in the total.
    """
    left_over = (sharers - survivors) * neighbours * survivors / (members - 1)
    streams = survivors + left_over
    return Counts(survivors + left_over, streams, additions=streams + survivors, tags=survivors)


def _seconds(operation: _Operation) -> float:
    operation()
    started = time.process_time()
    for _ in range(_REPEATS):
        operation()
    return (time.process_time() - started) / _REPEATS
