"""The server with corrupt members, and what it makes of all that it gets: noise, or else the SPEC says so.

It keeps every masked vector, every share that it was given or that a corrupt member holds, and every secret of a
corrupt member, and takes off whatever mask follows from that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce.errors import SottovoceError
from sottovoce.secagg import keys, shamir
from sottovoce.secagg.client_stages import Aborted, InputMasked, KeysShared
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.segments import add_into
from sottovoce.secagg.server_stages import CollectingInputs
from sottovoce.wire.messages import SurvivorsRequest, Unmasking, UnmaskingRequest

WORDS = 2000
MEMBERS, CORRUPT = 12, 2
SETTINGS: dict[str, Any] = {"vector_bytes": 4 * WORDS + 16, "wide_bytes": 16, "corrupt_share_bp": 1600}
"""With 12 members c = 2; t is 8 in active mode and 6 in curious mode."""


class Attacker:
    """The server, and the corrupt members whose memory it reads."""

    def __init__(self, rehearsal: Any, corrupt: Iterable[str]) -> None:
        self.rehearsal, self.corrupt = rehearsal, set(corrupt)
        self.cohort, self.shape = rehearsal.cohort, rehearsal.cohort.shape
        self.masked: dict[int, bytes] = {}
        self.pairs: dict[int, keys.KeyPair] = {}
        self.seeds: dict[int, bytes] = {}
        self.seed_shares: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.key_shares: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.tokens: dict[tuple[int, int], bytes] = {}

    def enter(self, *, deliver: bool = True) -> None:
        """Let the members mask their vectors, reading along; without `deliver` no honest server hears of it."""
        self.sharers = set(self.rehearsal.server.stage.commitments)
        for device in self.corrupt:
            stage, position = self.rehearsal.clients[device].stage, self.position(device)
            assert isinstance(stage, KeysShared)
            self.pairs[position], self.seeds[position] = stage.mask, stage.self_seed
        requests = {reply.device: reply.message for reply in self.rehearsal.server.outstanding()}
        for device, request in requests.items():
            if deliver:
                self.rehearsal.answer(device, request)
            answer = self.rehearsal.clients[device].receive(request)
            for at, partner in zip(range(0, len(answer.inclusions), 16), request.senders, strict=False):
                self.tokens[self.position(device), partner] = answer.inclusions[at : at + 16]
            self.hold(device)

    def hold(self, device: str) -> None:
        """Keep a masked vector, and the shares that a corrupt member holds."""
        client, position = self.rehearsal.clients[device], self.position(device)
        self.masked[position] = bytes(client.masked_vector)
        if device in self.corrupt:
            assert isinstance(client.stage, InputMasked)
            (point,) = self.shape.points((position,))
            for owner, held in client.stage.held.items():
                self.seed_shares[owner][point] = held[: shamir.SHARE_BYTES]
                self.key_shares[owner][point] = held[shamir.SHARE_BYTES :]

    def take(self, device: str, given: Unmasking, survivors: Collection[int]) -> None:
        """Keep the shares in an honest member's answer to who asked it about `survivors`."""
        position = self.position(device)
        (point,) = self.shape.points((position,))
        owners = [owner for owner in self.shape.share_holders(position) if owner in self.sharers]  # Mutual.
        for owner, share in zip(owners, self.rehearsal.cut(given.shares, shamir.SHARE_BYTES), strict=True):
            (self.seed_shares if owner in survivors else self.key_shares)[owner][point] = share

    def ask(self, device: str, request: Any, *errors: type[SottovoceError]) -> Any:
        """Send `request`; keep the answer, or check that the device ends the session by one of `errors`."""
        client = self.rehearsal.clients[device]
        if isinstance(request, UnmaskingRequest) and not request.inclusions:
            pairs = ((survivor, self.position(device)) for survivor in request.survivors)
            told = b"".join(self.tokens.get(pair, b"") for pair in pairs)
            request = msgspec.structs.replace(request, inclusions=told)
        if not errors:
            answer = client.receive(request)
            if isinstance(answer, Unmasking):
                self.take(device, answer, request.survivors)
            return answer
        with pytest.raises(errors) as caught:
            client.receive(request)
        assert client.stage == Aborted(caught.value)
        assert client.masked_vector is None
        return None

    def announce(self, device: str, survivors: Sequence[int], *errors: type[SottovoceError]) -> Any:
        """Tell a device who survived: to sign it in active mode, to give shares in curious mode."""
        if self.rehearsal.server._agreement.parameters.mode == "active":
            return self.ask(device, SurvivorsRequest(survivors=tuple(survivors)), *errors)
        return self.ask(device, UnmaskingRequest(survivors=tuple(survivors), signatures=()), *errors)

    def best(self, positions: Collection[int]) -> bytes:
        """The sum of the vectors of `positions`, with every mask taken off that the attacker can compute."""
        rehearsal, cipher = self.rehearsal, self.rehearsal.server._agreement.parameters.cipher
        parameters, session = rehearsal.server._agreement.parameters, self.shape.session
        members, total = self.cohort.members, bytearray(parameters.vector_bytes)
        for position in positions:
            add_into(total, self.masked[position], parameters)
        expander = MaskExpander(parameters)
        for position in positions:
            seed = self.seeds.get(position) or self._rebuilt(self.seed_shares[position])
            if seed is not None:
                name = members[position].device
                expander.subtract(total, keys.self_mask_key(seed, session=session, device=name, cipher=cipher))
            for other in set(self.shape.neighbours(position)) & self.masked.keys() - set(positions):
                secret = self._agreed(position, other)
                if secret is not None:
                    low, high = sorted((position, other))
                    lower, upper = members[low].device, members[high].device
                    key = keys.pairwise_mask_key(secret, session=session, lower=lower, upper=upper, cipher=cipher)
                    (expander.subtract if position == low else expander.add)(total, key)
        return bytes(total)

    def assert_hidden(self, *devices: str) -> None:
        """All that the attacker can make of the sum over `devices` is noise."""
        assert_noise(self.best([*map(self.position, devices)]), self.rehearsal.plain_sum(devices))

    @property
    def honest(self) -> list[str]:
        return [device for device in self.rehearsal.devices if device not in self.corrupt]

    def signatures(self, answers: Mapping[str, Any], survivors: Sequence[int], *, beside: str) -> tuple[bytes, ...]:
        """The honest survivors' signatures and the corrupt members', without that of `beside`."""
        rehearsal = self.rehearsal
        real = [
            rehearsal.fleet.envelope(device, answer, session=self.shape.session)
            for device, answer in answers.items()
            if device != beside and self.position(device) in survivors
        ]
        return (*real, *(rehearsal.signed(device, survivors) for device in sorted(self.corrupt)))

    def position(self, device: str) -> int:
        return int(self.cohort.position_of[device])

    def _agreed(self, one: int, other: int) -> bytes | None:
        for holder, peer in ((one, other), (other, one)):
            pair = self.pairs.get(holder)
            secret = None if pair else self._rebuilt(self.key_shares[holder])
            pair = keys.key_pair(secret) if secret else pair
            if pair is not None:
                return pair.agree(self.cohort.members[peer].mask_key)
        return None

    def _rebuilt(self, shares: dict[int, bytes]) -> bytes | None:
        if len(shares) < self.shape.threshold:
            return None
        points = sorted(shares)[: self.shape.threshold]
        return shamir.secret_of(shamir.interpolate(points, shamir.parse_shares(b"".join(shares[x] for x in points))))


def room(
    fleet: Any, members: int = MEMBERS, *, seed: int = 0, mode: str = "active", graph_rule: Any = None, **changes: Any
) -> Any:
    """A rehearsal of devices whose plain vectors are small numbers, which noise is not; the largest members corrupt."""
    settings = SETTINGS | changes
    sized = replace(fleet, vector_bytes=settings["vector_bytes"], wide_bytes=settings["wide_bytes"])
    parameters = sized.parameters(mode=mode, **settings)
    rehearsal = sized.rehearse(members, seed=seed, parameters=parameters, graph_rule=graph_rule)
    for index, device in enumerate(rehearsal.devices):
        entropy = rehearsal.clients[device]._setting.entropy
        vector = plain_vector(index)
        rehearsal.plain[device] = bytes(vector)
        rehearsal.clients[device] = sized.client(device, vector, parameters=parameters, entropy=entropy)
    return rehearsal


def plain_vector(index: int) -> bytearray:
    rng = np.random.default_rng(index)
    words = rng.normal(30_000, 8_000, WORDS).clip(0, 65_535).astype("<u4")
    return bytearray(words.tobytes() + (10).to_bytes(8, "little") + bytes(8))


def reading_along(rehearsal: Any, corrupt: int = CORRUPT) -> Attacker:
    """An attacker in a session in which everybody has shared keys; the last members are corrupt."""
    rehearsal.run_until(CollectingInputs)
    return Attacker(rehearsal, rehearsal.devices[len(rehearsal.devices) - corrupt :])


def infiltrated(rehearsal: Any, corrupt: int = CORRUPT) -> Attacker:
    """An attacker who has read along until everybody had masked."""
    attacker = reading_along(rehearsal, corrupt)
    attacker.enter()
    rehearsal.close()
    return attacker


def words_of(vector: bytes) -> Any:
    return np.frombuffer(vector, "<u4", WORDS)


def assert_noise(found: bytes, plain: bytes) -> None:
    """`found` is uniform, and says nothing about `plain`: chi-square over 16 bins, and no correlation."""
    words, truth = words_of(found), words_of(plain)
    counts = np.bincount(words >> np.uint32(28), minlength=16)
    assert ((counts - WORDS / 16) ** 2 / (WORDS / 16)).sum() < 44.3  # p = 0.0001 at 15 degrees of freedom
    assert abs(np.corrcoef(words.astype(float), truth.astype(float))[0, 1]) < 4 / np.sqrt(WORDS)
    assert np.count_nonzero(words == truth) == 0
