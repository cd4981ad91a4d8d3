"""What a lying server makes of all that it gets: noise, and where it is more than that, the SPEC says so.

The attacker is the server with corrupt members. It keeps every masked vector, every share that it was given or that a
corrupt member holds, and every secret of a corrupt member, and takes off whatever mask follows from that. Attacks that
the device ends by a named error come first, then what is not prevented (SPEC, section 10).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace as replaced
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce.errors import (
    BadShare,
    ConfigError,
    Equivocation,
    PolicyRefusal,
    RemoteProtocolError,
    RoundAbandoned,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.identity import SignedContext
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, blob_ref
from sottovoce.secagg import keys, server_steps, shamir
from sottovoce.secagg.client import ClientTerms
from sottovoce.secagg.client_stages import Aborted, InputMasked, KeysShared
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.lanes import decode, encode, layout_of
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.segments import add_into
from sottovoce.secagg.server_stages import (
    CheckingConsistency,
    CollectingInputs,
    CollectingShares,
    Unmasked,
)
from sottovoce.secagg.transcript import survivors_digest
from sottovoce.wire.codec import seal
from sottovoce.wire.messages import SurvivorsRequest, SurvivorsSignature, Unmasking, UnmaskingRequest

replace = msgspec.structs.replace
WORDS = 2000
MEMBERS, CORRUPT = 12, 2
SETTINGS: dict[str, Any] = {"vector_bytes": 4 * WORDS + 16, "wide_bytes": 16, "corrupt_share_bp": 1600}
"""With 12 members c = 2; t is 8 in active mode and 6 in curious mode."""


class Attacker:
    """The server, and the corrupt members whose memory it reads."""

    def __init__(self, rehearsal: Any, corrupt: Iterable[str]) -> None:
        self.rehearsal, self.corrupt = rehearsal, set(corrupt)
        self.masked: dict[int, bytes] = {}
        self.pairs: dict[int, keys.KeyPair] = {}
        self.seeds: dict[int, bytes] = {}
        self.seed_shares: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.key_shares: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.tokens: dict[tuple[int, int], bytes] = {}

    def enter(self, *, deliver: bool = True) -> None:
        """Let the members mask their vectors, reading along; without `deliver` no honest server hears of it."""
        self.cohort = self.rehearsal.server.stage.cohort
        self.shape, self.sharers = self.cohort.shape, set(self.rehearsal.server.stage.commitments)
        for device in self.corrupt:
            stage, position = self.rehearsal.clients[device].stage, self.cohort.position_of[device]
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
        client, position = self.rehearsal.clients[device], self.cohort.position_of[device]
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
    sized = replaced(fleet, vector_bytes=settings["vector_bytes"], wide_bytes=settings["wide_bytes"])
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


def infiltrated(fleet: Any, corrupt: int = CORRUPT, **settings: Any) -> Attacker:
    """A session in which everybody has masked, with an attacker who has read along."""
    rehearsal = room(fleet, **settings)
    attacker = Attacker(rehearsal, rehearsal.devices[len(rehearsal.devices) - corrupt :])
    rehearsal.run_until(CollectingInputs)
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


def corrupt_signature(attacker: Attacker, device: str, survivors: Sequence[int]) -> bytes:
    """A corrupt member signs whatever set it is asked to."""
    session = attacker.shape.session
    context = SignedContext(device, "conductor", "choir", 7, 1, session)
    message = SurvivorsSignature(survivors=survivors_digest(survivors, session=session))
    return seal(message, attacker.rehearsal.fleet.identities[device], context)


def honest(attacker: Attacker) -> list[str]:
    return [device for device in attacker.rehearsal.devices if device not in attacker.corrupt]


def signatures(
    attacker: Attacker, answers: dict[str, Any], survivors: Sequence[int], *, beside: str
) -> tuple[bytes, ...]:
    """The honest survivors' signatures and the corrupt members', without that of `beside`."""
    rehearsal = attacker.rehearsal
    session = attacker.shape.session
    real = [
        rehearsal.fleet.envelope(d, answer, session=session)
        for d, answer in answers.items()
        if d != beside and attacker.position(d) in survivors
    ]
    return (*real, *(corrupt_signature(attacker, device, survivors) for device in sorted(attacker.corrupt)))


# --- attacks that end in a named error --------------------------------------------------------------------------------


@pytest.mark.parametrize("told_all", [3, 5, 7, 9])
def test_two_survivor_sets_with_corrupt_members_that_sign_both(fleet: Any, told_all: int) -> None:
    """Some honest members are shown everybody, the others everybody but the victim: one group at most answers."""
    attacker = infiltrated(fleet)
    devices = honest(attacker)
    victim = devices[0]
    everybody = tuple(range(MEMBERS))
    without = tuple(p for p in everybody if p != attacker.position(victim))
    groups = {everybody: devices[:told_all], without: devices[told_all:]}
    for survivors, group in groups.items():
        answers = {device: attacker.ask(device, SurvivorsRequest(survivors=survivors)) for device in group}
        for device in group:
            shown = signatures(attacker, answers, survivors, beside=device)
            request = UnmaskingRequest(survivors=survivors, signatures=shown)
            enough = len(shown) >= attacker.shape.threshold
            attacker.ask(device, request, *(() if enough else (RemoteProtocolError,)))
    both = [shares[attacker.position(victim)] for shares in (attacker.seed_shares, attacker.key_shares)]
    assert min(len(shares) for shares in both) < attacker.shape.threshold
    assert_noise(attacker.best([attacker.position(victim)]), attacker.rehearsal.plain[victim])


def test_the_other_groups_signatures_are_evidence_and_end_the_session_too(fleet: Any) -> None:
    attacker = infiltrated(fleet)
    devices = honest(attacker)
    victim, everybody = devices[0], tuple(range(MEMBERS))
    without = tuple(p for p in everybody if p != attacker.position(victim))
    shown = {d: everybody if index < 5 else without for index, d in enumerate(devices)}
    answers = {
        device: attacker.ask(device, SurvivorsRequest(survivors=survivors)) for device, survivors in shown.items()
    }
    for device, survivors in shown.items():
        request = UnmaskingRequest(
            survivors=survivors, signatures=signatures(attacker, answers, survivors, beside=device)
        )
        attacker.ask(device, request, Equivocation)
    assert_noise(attacker.best([attacker.position(victim)]), attacker.rehearsal.plain[victim])


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_shares_withheld_so_that_only_corrupt_neighbours_masks_remain(fleet: Any, mode: str) -> None:
    """The victim would mask with members whose masks the attacker knows; it does not mask at all."""
    rehearsal = room(fleet, mode=mode)
    requests = rehearsal.run_until(CollectingInputs)
    attacker = Attacker(rehearsal, rehearsal.devices[-CORRUPT:])
    attacker.cohort = rehearsal.server.stage.cohort
    victim = rehearsal.devices[0]
    corrupt = {attacker.position(device) for device in attacker.corrupt}
    vector = rehearsal.clients[victim].stage.vector
    only = [share for share in rehearsal.forwarded(requests[victim]) if share[0] in corrupt]
    attacker.ask(victim, rehearsal.forwarding(only), RemoteProtocolError)
    assert bytes(vector) == bytes(len(vector))


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_shares_withheld_as_far_as_the_device_lets_them(fleet: Any, mode: str) -> None:
    """The victim masks with as few members as it accepts, all corrupt ones among them: honest masks remain."""
    rehearsal = room(fleet, mode=mode)
    requests = rehearsal.run_until(CollectingInputs)
    attacker = Attacker(rehearsal, rehearsal.devices[-CORRUPT:])
    victim = rehearsal.devices[0]
    cohort = rehearsal.server.stage.cohort
    corrupt = {cohort.position_of[device] for device in attacker.corrupt}
    forwarded = rehearsal.forwarded(requests[victim])
    first = [share for share in forwarded if share[0] in corrupt]
    rest = [share for share in forwarded if share[0] not in corrupt]
    fewest = sorted(first + rest[: cohort.shape.threshold - 1 - CORRUPT])
    rehearsal.server._requests[victim] = rehearsal.forwarding(fewest)
    attacker.enter(deliver=False)
    assert_noise(attacker.best([attacker.position(victim)]), rehearsal.plain[victim])


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("spared", ["nobody", "the corrupt"])
def test_a_whole_neighbourhood_listed_as_dropped(fleet: Any, mode: str, spared: str) -> None:
    attacker = infiltrated(fleet, mode=mode)
    victim = honest(attacker)[0]
    left = {attacker.position(victim)}
    left |= {attacker.position(device) for device in attacker.corrupt} if spared == "the corrupt" else set()
    survivors = tuple(sorted(left))
    request: Any = SurvivorsRequest(survivors=survivors)
    if mode == "curious":
        request = UnmaskingRequest(survivors=survivors, signatures=())
    attacker.ask(victim, request, RemoteProtocolError)
    assert_noise(attacker.best([attacker.position(victim)]), attacker.rehearsal.plain[victim])


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("whose", ["the session's", "the owner's"])
def test_survivors_below_the_minimum_though_t_are_left(fleet: Any, mode: str, whose: str) -> None:
    """Ten of twelve are enough to rebuild everything, but not enough to hide in."""
    terms = {"minimum_cohort": 3, "minimum_honest_survivors": 9 if whose == "the owner's" else 2}
    rehearsal = room(fleet, mode=mode, minimum_survivors=11 if whose == "the session's" else 3)
    victim, parameters = rehearsal.devices[0], rehearsal.server._agreement.parameters
    rehearsal.clients[victim] = rehearsal.fleet.client(
        victim, plain_vector(0), parameters=parameters, terms=ClientTerms(**terms, modes=("active", "curious"))
    )
    attacker = Attacker(rehearsal, rehearsal.devices[-CORRUPT:])
    rehearsal.run_until(CollectingInputs)
    attacker.enter()
    left = tuple(p for p in range(MEMBERS) if attacker.cohort.members[p].device not in attacker.corrupt)
    assert len(left) == 10 > attacker.shape.threshold
    request: Any = SurvivorsRequest(survivors=left)
    if mode == "curious":
        request = UnmaskingRequest(survivors=left, signatures=())
    attacker.ask(victim, request, RemoteProtocolError if whose == "the session's" else PolicyRefusal)
    assert_noise(attacker.best([attacker.position(victim)]), rehearsal.plain[victim])


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_second_different_unmasking_request(fleet: Any, mode: str) -> None:
    """First everybody survives and the sum is unmasked, as it should; then the victim is said to have dropped out."""
    attacker = infiltrated(fleet, mode=mode)
    rehearsal, devices = attacker.rehearsal, honest(attacker)
    requests = rehearsal.run_until(CollectingShares)
    for device in devices:
        attacker.ask(device, requests[device])
    everybody = attacker.best(range(MEMBERS))
    assert bytes(everybody) == rehearsal.plain_sum(rehearsal.devices)
    victim = devices[0]
    position = attacker.position(victim)
    for device in devices:
        fewer = tuple(p for p in range(MEMBERS) if p != position)
        attacker.ask(device, replace(requests[device], survivors=fewer), UnexpectedMessage)
    assert len(attacker.seed_shares[position]) >= attacker.shape.threshold
    assert_noise(attacker.best([position]), rehearsal.plain[victim])


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_released_state_is_asked_for_again_after_the_round_was_abandoned(fleet: Any, mode: str) -> None:
    """Both masked vectors are of the same plain one, the worst that can be: their difference is noise as well."""
    first, second = (infiltrated(fleet, mode=mode, seed=seed) for seed in (1, 2))
    victim = honest(first)[0]
    assert first.shape.session != second.shape.session
    assert first.rehearsal.plain[victim] == second.rehearsal.plain[victim]
    one, other = (words_of(attacker.best([attacker.position(victim)])) for attacker in (first, second))
    for found in (one, other, one - other):
        assert_noise(found.tobytes() + bytes(16), first.rehearsal.plain[victim])


def test_another_model_for_one_victim(fleet: Any) -> None:
    """The victim starts from another state than all others; neither it nor they accept the roster."""
    rehearsal = room(fleet)
    victim, other = rehearsal.devices[:2]
    sized = rehearsal.fleet
    parameters = rehearsal.server._agreement.parameters
    vector = plain_vector(0)
    rehearsal.clients[victim] = sized.client(victim, vector, parameters=parameters, state=b"z" * 32)
    rehearsal.advertise(rehearsal.devices[1:])
    with pytest.raises(RemoteProtocolError, match="another plan, state or parameters"):
        rehearsal.advertise([victim])
    requests = rehearsal.close()
    with pytest.raises(RemoteProtocolError, match="not in the roster"):
        rehearsal.clients[victim].receive(requests[other])
    assert bytes(vector) == bytes(len(vector))


def test_a_lowered_modulus_is_not_the_plans(fleet: Any) -> None:
    """Fewer bits for the sum, with the vector as long as it should be: only the plan tells that this is wrong."""
    aggregation = Aggregation(name="update", tensors=("float32[64]",), encoding=Counted(maximum=1023), lane="dense")
    layout = layout_of(counting(aggregation), maximum_clients=100)
    (width, count) = layout.packed[0]
    told = {"vector_bytes": layout.vector_bytes, "wide_bytes": layout.wide_bytes, "packed": layout.packed}
    layout.require(fleet.parameters(**told))
    shorter = {"packed": ((width - 1, count),), "vector_bytes": layout.vector_bytes - count // 8}
    for changes in (shorter, {"wide_bytes": layout.wide_bytes + 8}, {"vector_bytes": layout.vector_bytes + 8}):
        with pytest.raises(PolicyRefusal, match="lanes"):
            layout.require(fleet.parameters(**(told | changes)))


def counting(aggregation: Aggregation, *, weight_cap: int = 50) -> Plan:
    return Plan(
        fleet="choir",
        name="song",
        collection="takes",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=(aggregation,),
        privacy=PrivacyTerms(purpose="to count", minimum_cohort=3, weight_cap=weight_cap),
    )


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_member_whose_shares_do_not_open_ends_sessions_and_learns_nothing(fleet: Any, mode: str) -> None:
    """Refusal of service, which is not prevented; what the attacker has of the others is noise."""
    rehearsal = room(fleet, mode=mode)
    requests = rehearsal.run_until(CollectingInputs)
    attacker = Attacker(rehearsal, rehearsal.devices[-CORRUPT:])
    attacker.cohort = rehearsal.server.stage.cohort
    liar = attacker.position(rehearsal.devices[-1])
    for device in rehearsal.devices[:3]:
        shares = [(p, bytes(88) if p == liar else c) for p, c in rehearsal.forwarded(requests[device])]
        attacker.ask(device, rehearsal.forwarding(shares), BadShare)


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize("stage", ["masked_input", "consistency_check", "unmasking"])
def test_an_abandoned_round_reveals_nothing(fleet: Any, mode: str, stage: str) -> None:
    """Too few stay; the server keeps everything, and has a whole session's worth of masked vectors."""
    if (mode, stage) == ("curious", "consistency_check"):
        stage = "unmasking"
    attacker = infiltrated(fleet, mode=mode)
    rehearsal, devices = attacker.rehearsal, honest(attacker)
    enough = attacker.shape.threshold - CORRUPT - 1
    if stage == "masked_input":
        rehearsal.server.abandon("too_few_devices")
    else:
        with pytest.raises(RoundAbandoned):
            rehearsal.run_until(Unmasked, silent={stage: [*devices[enough:], *attacker.corrupt]})
    for device, given in rehearsal.shares_given():
        attacker.take(device, given, rehearsal.requests[device][-1].message.survivors)
    for chosen in ([attacker.position(devices[0])], range(MEMBERS)):
        names = [attacker.cohort.members[position].device for position in chosen]
        assert_noise(attacker.best(list(chosen)), rehearsal.plain_sum(names))


# --- the ring ---------------------------------------------------------------------------------------------------------

RING, NEIGHBOURS, SHARES = 201, 44, 34


@pytest.fixture(scope="module")
def ring(fleet: Any) -> Attacker:
    """201 members on a ring, ten of them corrupt; everybody has masked. Each test lies to other devices."""
    names = [f"pi-{number:03}" for number in range(RING)]
    identities = {name: fleet.identities.get(name) or fleet.issue(name, "device") for name in names}
    figures = GraphParameters(NEIGHBOURS, SHARES)
    settings: dict[str, Any] = {"maximum_clients": RING, "corrupt_share_bp": 500, "graph_rule": lambda _: figures}
    rehearsal = room(replaced(fleet, identities=identities), RING, **settings)
    attacker = Attacker(rehearsal, names[-10:])
    rehearsal.run_until(CollectingInputs)
    attacker.enter()
    rehearsal.close()
    assert isinstance(rehearsal.server.stage, CheckingConsistency)
    return attacker


def on_the_ring(attacker: Attacker, places: Iterable[int]) -> list[int]:
    order = attacker.shape.graph.order().tolist()
    return [order[place % RING] for place in places]


def test_k_half_gaps_around_an_arc_of_the_ring(ring: Attacker) -> None:
    """The members on both sides of an arc are said to have dropped out, so that the arc's sum stands alone.

    A member at the arc's edge has k/2 neighbours left, fewer than t: it refuses, and so does everybody whom its
    signature was to convince.
    """
    half = NEIGHBOURS // 2
    arc = on_the_ring(ring, range(60, 100))
    gaps = set(on_the_ring(ring, [*range(60 - half, 60), *range(100, 100 + half)]))
    survivors = tuple(position for position in range(RING) if position not in gaps)
    members, answers = ring.cohort.members, dict[str, Any]()
    refused = 0
    for position in arc:
        device = members[position].device
        left = len(set(ring.shape.neighbours(position)) - gaps)
        if device in ring.corrupt:
            continue
        if left < SHARES:
            ring.ask(device, SurvivorsRequest(survivors=survivors), RemoteProtocolError)
            refused += 1
        else:
            answers[device] = ring.ask(device, SurvivorsRequest(survivors=survivors))
    assert refused >= 10
    for device in answers:
        around = {members[p].device for p in ring.shape.neighbours(ring.position(device))}
        near = {other: answer for other, answer in answers.items() if other in around}
        shown = signatures(ring, near, survivors, beside=device)
        shown = tuple(payload for payload in shown if msgspec.msgpack.decode(payload)[2] in around)
        ring.ask(device, UnmaskingRequest(survivors=survivors, signatures=shown), RemoteProtocolError)
    names = [members[position].device for position in arc]
    assert_noise(ring.best(arc), ring.rehearsal.plain_sum(names))


def test_a_whole_neighbourhood_on_the_ring_listed_as_dropped(ring: Attacker) -> None:
    victim = next(p for p in on_the_ring(ring, range(150, 160)) if ring.cohort.members[p].device not in ring.corrupt)
    device = ring.cohort.members[victim].device
    around = {p for p in ring.shape.neighbours(victim) if ring.cohort.members[p].device not in ring.corrupt}
    survivors = tuple(position for position in range(RING) if position not in around)
    ring.ask(device, SurvivorsRequest(survivors=survivors), RemoteProtocolError)
    assert_noise(ring.best([victim]), ring.rehearsal.plain[device])


def test_the_server_gives_up_when_one_neighbourhood_on_the_ring_has_too_few_left(ring: Attacker) -> None:
    """Enough members in all, but k - t + 1 of one member's neighbours are gone, before or after U3 is fixed."""
    checking, agreement = ring.rehearsal.server.stage, ring.rehearsal.server._agreement
    (victim,) = on_the_ring(ring, [5])
    gone = set(ring.shape.neighbours(victim)[: NEIGHBOURS - SHARES + 1])
    staying = set(range(RING)) - gone
    with pytest.raises(RoundAbandoned, match="too_few_shares"):
        server_steps.close_inputs(agreement, replaced(checking.inputs, added=staying))
    answers, asked = dict.fromkeys(staying, shamir.parse_shares(b"")), dict.fromkeys(range(RING), NEIGHBOURS)
    collecting = CollectingShares(checking.inputs, checking.survivors, checking.alive, asked, answers)
    with pytest.raises(RoundAbandoned, match="too_few_shares"):
        server_steps.close_unmasking(agreement, collecting)


def test_not_prevented_t_neighbours_on_the_ring_rebuild_and_t_minus_one_do_not(ring: Attacker) -> None:
    """Also the proof that the two tests before this one would have seen it, had the masks come off."""
    (victim,) = on_the_ring(ring, [5])
    around = [ring.cohort.members[position].device for position in ring.shape.neighbours(victim)]
    device = ring.cohort.members[victim].device
    for count in (SHARES - 1, SHARES):
        reader = Attacker(ring.rehearsal, around[:count])
        reader.cohort, reader.shape = ring.cohort, ring.shape
        for other in reader.corrupt:
            reader.hold(other)
        reader.masked = ring.masked
        if count < SHARES:
            assert_noise(reader.best([victim]), ring.rehearsal.plain[device])
        else:
            assert reader.best([victim]) == ring.rehearsal.plain[device]


def test_the_server_abandons_the_round_when_no_graph_is_safe_for_those_who_came(fleet: Any) -> None:
    def no_graph(members: int) -> GraphParameters:
        raise ConfigError(f"no graph for {members}")

    for rule in (no_graph, lambda members: GraphParameters(members - 1, 2)):
        rehearsal = room(fleet, graph_rule=rule)
        rehearsal.advertise(rehearsal.devices)
        with pytest.raises(RoundAbandoned, match="no_graph"):
            rehearsal.close()


@pytest.mark.parametrize("came", [0, 2])
def test_the_server_asks_for_no_graph_when_too_few_came(fleet: Any, came: int) -> None:
    """A rule need not know what to do with so few: it is not called."""
    asked: list[int] = []
    rehearsal = room(fleet, graph_rule=asked.append)
    rehearsal.advertise(rehearsal.devices[:came])
    with pytest.raises(RoundAbandoned, match="too_few_devices"):
        rehearsal.close()
    assert asked == []


# --- what is not prevented: SPEC, section 10 --------------------------------------------------------------------------


def test_not_prevented_the_sum_itself_with_everybody_else_corrupt(fleet: Any) -> None:
    """A CA that makes everybody else a sybil: the sum of one is that one's update."""
    rehearsal = room(fleet)
    rehearsal.run_until(Unmasked)
    victim, *others = rehearsal.devices
    total = words_of(bytes(rehearsal.server.result)).copy()
    for device in others:
        total -= words_of(rehearsal.plain[device])
    assert total.tobytes() == words_of(rehearsal.plain[victim]).tobytes()


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_not_prevented_t_colluding_members_rebuild_and_t_minus_one_do_not(fleet: Any, mode: str) -> None:
    """More corrupt members than c: with the server they open any other member's vector, before anybody answers."""
    threshold = {"active": 8, "curious": 6}[mode]
    for colluding in (threshold, threshold - 1):
        attacker = infiltrated(fleet, colluding, mode=mode)
        assert attacker.shape.threshold == threshold
        victim = honest(attacker)[0]
        found = attacker.best([attacker.position(victim)])
        if colluding == threshold:
            assert found == attacker.rehearsal.plain[victim]
        else:
            assert_noise(found, attacker.rehearsal.plain[victim])


def test_not_prevented_differencing_two_rounds(fleet: Any) -> None:
    """Two rounds whose survivors differ in one device, which gave the same in both: the difference is its update."""
    sums = []
    for seed, absent in ((1, 0), (2, 1)):
        rehearsal = room(fleet, seed=seed)
        rehearsal.run_until(Unmasked, silent={"advertise_keys": rehearsal.devices[:absent]})
        sums.append(words_of(bytes(rehearsal.server.result)))
    assert (sums[0] - sums[1]).tobytes() == words_of(rehearsal.plain[rehearsal.devices[0]]).tobytes()


def test_not_prevented_a_server_that_lies_in_curious_mode(fleet: Any) -> None:
    """Half the members are told that the victim survived, half that it dropped out: both secrets can be rebuilt."""
    attacker = infiltrated(fleet, mode="curious")
    devices = honest(attacker)
    victim = devices[0]
    position = attacker.position(victim)
    without = tuple(p for p in range(MEMBERS) if p != position)
    for index, device in enumerate(devices):
        survivors = tuple(range(MEMBERS)) if index < 6 else without
        attacker.ask(device, UnmaskingRequest(survivors=survivors, signatures=()))
    assert attacker.best([position]) == attacker.rehearsal.plain[victim]


def test_not_prevented_poisoning_within_the_lanes(fleet: Any) -> None:
    """A member that does not clip moves the sum by its plan's maximum, and no further without being noticed."""
    layout = layout_of(
        counting(Aggregation(name="update", tensors=("int64[4]",), encoding=Counted(maximum=1000))), maximum_clients=100
    )
    honest_vector = encode(layout, {"update": [np.full(4, 10)]}, weight=5, entropy=bytes)
    total = bytearray(layout.unpacked_bytes)
    for _ in range(9):
        add_into(total, honest_vector, layout)
    poison = encode(layout, {"update": [np.full(4, 1000)]}, weight=5, entropy=bytes)
    add_into(total, poison, layout)
    assert decode(layout, total, survivors=10).sums["update"][0].tolist() == [1090] * 4
    beyond = bytearray(poison)
    words_beyond = np.frombuffer(beyond, "<u4", 4)
    words_beyond[:] = 10_000
    add_into(total, beyond, layout)
    with pytest.raises(RoundAbandoned, match="impossible_sum"):
        decode(layout, total, survivors=11)
