"""Every kind of lane: exact sums, sizes on the wire, no carry, the stated error, and a whole session with each."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
from aggregation_plans import plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sottovoce.errors import ConfigError, PolicyRefusal, RemoteProtocolError, RoundAbandoned
from sottovoce.plan import Aggregation, Counted, Encoding, LaneName, Quantised
from sottovoce.secagg import lanes
from sottovoce.secagg.client_stages import InputMasked
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.graph import check_parameters
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.secagg.segments import add_into, add_packed_into, pack, reduce
from sottovoce.secagg.server_stages import CheckingConsistency, CollectingInputs, Unmasked
from sottovoce.secagg.transcript import agree

LANES: tuple[LaneName, ...] = get_args(LaneName)
WIDTHS = {"uint16": 16, "3x21": 21, "uint32": 32, "dense": 32, "uint64": 64}
CLIENTS = 12


def aggregation(lane: LaneName, encoding: Encoding, *, size: int = 1, name: str = "u") -> Aggregation:
    return Aggregation(name=name, tensors=(f"float64[{size}]",), encoding=encoding, lane=lane)


def single(lane: LaneName, encoding: Encoding, *, size: int, clients: int) -> Layout:
    return layout_of(plan_of(aggregation(lane, encoding, size=size)), maximum_clients=clients)


def mixed(lane: LaneName, *, first: int = 7, second: int = 100) -> Layout:
    """Two aggregations of this lane, of several tensors, between others: starts and ends that are not round."""
    tensors = (f"float64[{first}]", "float64[2,1]")
    return layout_of(
        plan_of(
            aggregation("uint64", Counted(maximum=2**40), size=2, name="seen"),
            Aggregation(name="one", tensors=tensors, encoding=Quantised(half_range=1, bits=9), lane=lane),
            aggregation("uint32", Counted(maximum=1000), size=3, name="correct"),
            aggregation(lane, Counted(maximum=5), size=second, name="two"),
            aggregation("dense", Counted(maximum=30), size=1, name="three"),
        ),
        maximum_clients=CLIENTS,
    )


def values_for(layout: Layout, seed: int) -> dict[str, list[Any]]:
    """Values of which some lie outside every range."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, list[tuple[int, ...]]] = {"seen": [(2,)], "correct": [(3,)], "three": [(1,)]}
    one, two = (layout.lanes[index].aggregation for index in (1, 3))
    shapes |= {"one": [(one.size - 2,), (2, 1)], "two": [(two.size,)]}
    scales = {"seen": 2**39, "correct": 600, "three": 20, "one": 1, "two": 4}
    return {name: [rng.normal(0, scales[name], size=shape) for shape in shapes[name]] for name in shapes}


def parameters_for(fleet: Any, layout: Layout, **changes: Any) -> Any:
    sizes = {"vector_bytes": layout.vector_bytes, "wide_bytes": layout.wide_bytes, "packed": layout.packed}
    return fleet.parameters(maximum_clients=layout.maximum_clients, **(sizes | changes))


def exact_sums(layout: Layout, vectors: list[bytes]) -> dict[str, list[int]]:
    """The sums of all entries in Python's integers, which never wrap around."""
    rows = {lane.aggregation.name: [lane.entries(vector) for vector in vectors] for lane in layout.lanes}
    return {name: [sum(int(row[i]) for row in given) for i in range(len(given[0]))] for name, given in rows.items()}


def found_sums(layout: Layout, total: bytes | bytearray) -> dict[str, list[int]]:
    return {lane.aggregation.name: [int(entry) for entry in lane.entries(total)] for lane in layout.lanes}


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=25)
@given(
    devices=st.integers(1, CLIENTS),
    first=st.integers(1, 70),
    second=st.integers(1, 200),
    seed=st.integers(0, 2**20),
)
def test_what_is_packed_and_added_is_the_plain_sum(
    fixed_entropy: Any, lane: LaneName, devices: int, first: int, second: int, seed: int
) -> None:
    layout = mixed(lane, first=first, second=second)
    vectors = [
        encode(layout, values_for(layout, seed + i), weight=1 + i, entropy=fixed_entropy(seed + i))
        for i in range(devices)
    ]
    plain = [bytes(vector) for vector in vectors]
    total, of_plain = bytearray(layout.unpacked_bytes), bytearray(layout.unpacked_bytes)
    for vector in vectors:
        add_into(of_plain, vector, layout)
        pack(vector, layout)
        assert len(vector) == layout.vector_bytes
        add_packed_into(total, vector, layout)
    reduce(total, layout)
    assert total == of_plain
    assert found_sums(layout, total) == exact_sums(layout, plain)
    aggregate = decode(layout, total, survivors=devices)
    assert aggregate.weight == sum(range(1, devices + 1))
    assert aggregate.sums["one"][1].shape == (2, 1)


@pytest.mark.parametrize("width", range(1, 33))
@pytest.mark.parametrize("count", [64, 448, 2**16 + 128])
def test_the_wire_form_is_one_little_endian_number(fleet: Any, fixed_entropy: Any, width: int, count: int) -> None:
    """Bits above the width in memory, which masks leave there, do not get onto the wire."""
    vector_bytes = count * width // 8 + 24
    shape = fleet.parameters(vector_bytes=vector_bytes, wide_bytes=16, packed=((width, count),))
    entry_bytes = 2 if width <= 16 else 4
    vector = bytearray(fixed_entropy(width)(count * entry_bytes + 24))
    before = bytes(vector)
    entries = np.frombuffer(before, f"<u{entry_bytes}", count).astype(np.uint64) % 2**width
    pack(vector, shape)
    bits = ((entries[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8)
    assert bytes(vector[:-24]) == np.packbits(bits.reshape(-1), bitorder="little").tobytes()
    assert vector[-24:] == before[-24:]
    total = bytearray(len(before))
    add_packed_into(total, vector, shape)
    assert (np.frombuffer(total, f"<u{entry_bytes}", count) == entries).all()
    assert total[-24:] == before[-24:]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "cipher"), [("active", "aes-128-ctr"), ("curious", "chacha20")])
def test_a_whole_session_sums_exactly(fleet: Any, fixed_entropy: Any, lane: LaneName, mode: str, cipher: str) -> None:
    layout = mixed(lane)
    parameters = parameters_for(fleet, layout, mode=mode, cipher=cipher)
    rehearsal = fleet.rehearse(CLIENTS, parameters=parameters)
    plain: dict[str, bytes] = {}
    for index, device in enumerate(rehearsal.devices):
        vector = encode(layout, values_for(layout, index), weight=9, entropy=fixed_entropy(index))
        plain[device] = bytes(vector)
        entropy = fixed_entropy(100 + index)
        rehearsal.clients[device] = fleet.client(device, vector, parameters=parameters, entropy=entropy)
    lost = rehearsal.devices[3]
    requests = rehearsal.run_until(CollectingInputs)
    for device in rehearsal.devices:
        if device == lost:
            continue
        rehearsal.answer(device, requests[device])
        assert len(rehearsal.clients[device].masked_vector) == layout.vector_bytes
    rehearsal.close()
    rehearsal.run_until(Unmasked)
    survivors = [plain[device] for device in rehearsal.devices if device != lost]
    assert found_sums(layout, rehearsal.server.result) == exact_sums(layout, survivors)
    assert decode(layout, rehearsal.server.result, survivors=CLIENTS - 1).weight == 9 * (CLIENTS - 1)


@pytest.mark.parametrize(
    ("lane", "bits", "clients", "entry_bytes", "expansion"),
    [
        ("uint16", 8, 256, 2, 0.52),
        ("3x21", 11, 1000, 8 / 3, 0.68),
        ("uint32", 16, 1000, 4, 1.02),
        ("dense", 16, 1024, 26 / 8, 0.83),
        ("dense", 8, 100, 15 / 8, 0.48),
        ("uint64", 40, 1000, 8, 2.02),
    ],
)
def test_bytes_on_the_wire(lane: LaneName, bits: int, clients: int, entry_bytes: float, expansion: float) -> None:
    size = 1_000_000
    layout = single(lane, Quantised(half_range=1, bits=bits), size=size, clients=clients)
    assert layout.vector_bytes == pytest.approx(entry_bytes * size, rel=1e-3)
    assert layout.vector_bytes <= expansion * 4 * size


def test_a_dense_entry_is_as_wide_as_the_sum_and_no_wider() -> None:
    for bits, clients, width in ((16, 1024, 26), (16, 1025, 27), (8, 255, 16), (8, 257, 16), (8, 258, 17), (1, 3, 2)):
        layout = single("dense", Quantised(half_range=1, bits=bits), size=70, clients=clients)
        assert layout.packed == ((width, 128),)
        assert clients * (2**bits - 1) < 2**width <= 2 * clients * (2**bits - 1)


@pytest.mark.parametrize("lane", LANES)
def test_a_sum_that_does_not_fit_is_refused_with_the_aggregation_and_the_cure(lane: LaneName) -> None:
    clients, width = 16, WIDTHS[lane]
    fits = (2**width - 1) // clients
    single(lane, Counted(maximum=fits), size=1, clients=clients)
    with pytest.raises(ConfigError, match=rf"aggregation 'u': .* does not fit a {width}-bit lane; use a smaller max"):
        single(lane, Counted(maximum=fits + 1), size=1, clients=clients)
    too_fine = Quantised(half_range=1, bits=width - 3)
    with pytest.raises(ConfigError, match=rf"aggregation 'u': .*use fewer bits \(at most {width - 4}\)") as caught:
        single(lane, too_fine, size=1, clients=clients)
    wider = {"uint16": "3x21", "3x21": "uint32", "uint32": "uint64", "dense": "uint64"}
    assert (f'lane = "{wider.get(lane)}"' in str(caught.value)) == (lane != "uint64")
    single(lane, Quantised(half_range=1, bits=width - 4), size=1, clients=clients)


@pytest.mark.parametrize("lane", LANES)
def test_no_device_can_carry_into_the_next_lane(fixed_entropy: Any, lane: LaneName) -> None:
    """The largest cohort, every other value far beyond the range: the neighbours of a full lane stay 0."""
    bits, clients, size = 8, 257, 1001
    layout = single(lane, Quantised(half_range=1, bits=bits), size=size, clients=clients)
    extreme = np.tile([1e9, -1e9], size // 2 + 1)[:size]
    vector = encode(layout, {"u": [extreme]}, weight=1, entropy=fixed_entropy(1))
    total = bytearray(layout.unpacked_bytes)
    for _ in range(clients):
        add_into(total, vector, layout)
    full = clients * (2**bits - 1)
    assert full == 2**16 - 1, "the 16-bit lane is filled to its last bit"
    assert layout.lanes[0].entries(total).tolist() == [full * (1 - i % 2) for i in range(size)]
    assert decode(layout, total, survivors=clients).clamped == clients * size


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("entry", [0, 1, 2, 100])
def test_one_entry_too_large_abandons_the_round(fixed_entropy: Any, lane: LaneName, entry: int) -> None:
    layout = single(lane, Counted(maximum=9), size=101, clients=300)
    total = encode(layout, {"u": [np.full(101, 9.0)]}, weight=1, entropy=fixed_entropy(1))
    decode(layout, total, survivors=1)
    one_more = bytearray(layout.unpacked_bytes)
    layout.lanes[0].put(one_more, slice(entry, entry + 1), np.ones(1))
    add_into(total, one_more, layout)
    with pytest.raises(RoundAbandoned, match="u sums to 10, more than 9"):
        decode(layout, total, survivors=1)


@pytest.mark.parametrize(
    ("lane", "byte", "bit", "match"),
    [
        ("3x21", 7, 7, "beside u"),  # bit 63 of the first word
        ("3x21", 13, 2, "beside u"),  # bit 42 of the last word, which has two entries
        ("uint16", 10, 0, "padding"),
        ("uint16", 127, 7, "padding"),
        ("dense", 10, 0, "padding"),
        ("uint32", 20, 0, "padding"),
    ],
)
def test_a_bit_that_belongs_to_no_entry_abandons_the_round(
    fixed_entropy: Any, lane: LaneName, byte: int, bit: int, match: str
) -> None:
    layout = single(lane, Counted(maximum=9), size=5, clients=20)
    total = encode(layout, {"u": [np.zeros(5)]}, weight=1, entropy=fixed_entropy(1))
    decode(layout, total, survivors=1)
    total[byte] |= 1 << bit
    with pytest.raises(RoundAbandoned, match=match) as caught:
        decode(layout, total, survivors=1)
    assert caught.value.reason == "impossible_sum"


@pytest.mark.parametrize(("lane", "bits"), [("uint16", 4), ("uint16", 8), ("3x21", 11), ("dense", 6), ("uint32", 16)])
def test_the_error_is_the_stated_one(fixed_entropy: Any, lane: LaneName, bits: int) -> None:
    """Gaussian values, half_range of 4 sigma that nobody exceeds: the relative L2 error is 3.27 / (2^bits - 1)."""
    devices, size, half_range = 20, 20_000, 4.0
    layout = single(lane, Quantised(half_range=half_range, bits=bits), size=size, clients=256)
    rng = np.random.default_rng(bits)
    expected, total = np.zeros(size), bytearray(layout.unpacked_bytes)
    quantum = 2 * half_range / (2**bits - 1)
    for device in range(devices):
        given = rng.standard_normal(size).clip(-half_range, half_range)
        expected += given
        add_into(total, encode(layout, {"u": [given]}, weight=1, entropy=fixed_entropy(device)), layout)
    error = decode(layout, total, survivors=devices).sums["u"][0] - expected
    assert np.abs(error).max() < devices * quantum
    assert abs(error.mean()) < 5 * quantum * math.sqrt(devices / 6 / size), "it is not biased"
    assert np.square(error).mean() <= 1.05 * devices * quantum**2 / 4
    relative = np.linalg.norm(error) / np.linalg.norm(expected)
    assert relative == pytest.approx(8 / math.sqrt(6) / (2**bits - 1), rel=0.05)


def test_clamping_at_four_sigma_costs_what_is_stated(fixed_entropy: Any) -> None:
    size = 400_000
    layout = single("uint32", Quantised(half_range=4.0, bits=22), size=size, clients=3)
    given = scipy.stats.norm.ppf((np.arange(size) + 0.5) / size)
    vector = encode(layout, {"u": [given]}, weight=1, entropy=fixed_entropy(1))
    error = decode(layout, vector, survivors=1).sums["u"][0] - given
    assert np.linalg.norm(error) / np.linalg.norm(given) == pytest.approx(0.0025, rel=0.1)


def test_the_table_of_lanes_is_right() -> None:
    """So many bits fit for so many devices, and not one more."""
    documented = lanes.__doc__ or ""
    for lane in ("uint16", "3x21", "uint32", "uint64"):
        row = next(line for line in documented.splitlines() if line.startswith(f"| {lane}"))
        for clients, text in zip((256, 1000, 10_000), row.split("|")[4].split(","), strict=True):
            single(lane, Quantised(half_range=1, bits=int(text)), size=1, clients=clients)
            if lane != "uint64":
                with pytest.raises(ConfigError):
                    single(lane, Quantised(half_range=1, bits=int(text) + 1), size=1, clients=clients)


def test_the_segments_are_in_the_parameters_digest_and_checked_by_the_device(fleet: Any) -> None:
    """A server that narrows a dense lane, so that the sum wraps around, finds no device to take part."""
    layout = mixed("dense")
    own = parameters_for(fleet, layout)
    layout.require(own)
    context = fleet.context("pi-000")
    digests = set()
    (width, count), *others = layout.packed
    for packed in (layout.packed, ((width - 1, count), *others), (*others, (width, count)), ()):
        changed = parameters_for(fleet, layout, packed=packed)
        digests_of: dict[str, Any] = {"plan": bytes(32), "state": bytes(32), "upload_key": bytes(32)}
        agreed = agree(context, coordinator="c", parameters=changed, **digests_of)
        digests.add(agreed.parameters_digest)
        if packed != layout.packed:
            with pytest.raises(PolicyRefusal, match="lanes"):
                layout.require(changed)
    assert len(digests) == 4
    vector = bytearray(layout.unpacked_bytes)
    with pytest.raises(RemoteProtocolError, match="the update has"):
        fleet.client("pi-000", vector, parameters=parameters_for(fleet, layout, packed=())).advertise()


@pytest.mark.parametrize(
    "packed", [((0, 64),), ((33, 64),), ((16, 0),), ((16, -64),), ((16, 63),), ((16, 64), (9, 64))]
)
def test_impossible_segments_are_refused_by_both_sides(fleet: Any, packed: Any) -> None:
    fitting = {"vector_bytes": 16 + 128, "wide_bytes": 16}
    check_parameters(fleet.parameters(**fitting, packed=((16, 64),)))
    wrong = fleet.parameters(**fitting, packed=packed)
    with pytest.raises(ConfigError, match="packed segments"):
        fleet.server(["pi-000"], wrong)
    with pytest.raises(RemoteProtocolError, match="packed segments"):
        fleet.client("pi-000", bytearray(144), parameters=wrong).advertise()


def test_a_repeated_request_for_a_dense_vector_gets_the_same_bytes(fleet: Any, fixed_entropy: Any) -> None:
    layout = mixed("dense")
    rehearsal = fleet.rehearse(4, parameters=parameters_for(fleet, layout))
    for index, device in enumerate(rehearsal.devices):
        vector = encode(layout, values_for(layout, index), weight=1, entropy=fixed_entropy(index))
        settings_ = {"parameters": parameters_for(fleet, layout), "entropy": fixed_entropy(50 + index)}
        rehearsal.clients[device] = fleet.client(device, vector, **settings_)
    requests = rehearsal.run_until(CollectingInputs)
    device = rehearsal.devices[0]
    first = rehearsal.answer(device, requests[device])
    client = rehearsal.clients[device]
    sent = bytes(client.masked_vector)
    assert client.receive(requests[device]) == first
    assert client.masked_vector == sent
    assert isinstance(client.stage, InputMasked)
    for other in rehearsal.devices[1:]:
        rehearsal.answer(other, requests[other])
    rehearsal.close()
    assert isinstance(rehearsal.server.stage, CheckingConsistency)
