"""One session of secure aggregation with every device in this process: the real sessions of both sides, no network.

Every message is sealed, parsed and verified as on a broker, masked vectors travel in chunks. In each stage the devices
answer one after another, and the coordinator takes their answers in a row, because its processor is not theirs; vectors
it takes a few at a time, and the vector of a device is in memory only from its quantisation to its upload.
"""

from __future__ import annotations

import gc
import os
import random
import resource
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from coordinator.aggregation import UploadSlots
from coordinator.graph_parameters import graph_parameters
from simulation.secagg_bench_fleet import COORDINATOR, FLEET, SIGNATURES, BenchFleet, Meter
from simulation.secagg_bench_floor import Gauge
from sottovoce.blobs import DEFAULT_CHUNK_BYTES, blob_ref
from sottovoce.errors import RoundAbandoned
from sottovoce.identity import SignedContext
from sottovoce.plan import Aggregation, LaneName, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.graph import BASIS_POINTS, COMPLETE_GRAPH_LIMIT, SMALLEST_COHORT, GraphParameters, threshold
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.secagg.mask_removal import AT_ONCE, Spread
from sottovoce.secagg.segments import add_into, reduce
from sottovoce.secagg.server import STAGE_NAMES, Reply, ServerSession
from sottovoce.secagg.server_stages import Unmasked
from sottovoce.types import Array
from sottovoce.wire.chunks import VectorChunk, decode_vector_chunk, encode_vector_chunk
from sottovoce.wire.codec import ALL, Opened, open_envelope, parse, seal
from sottovoce.wire.messages import AdvertiseKeysRequest, Cipher, Message, Mode, Roster, SecAggParameters

DropStage: TypeAlias = Literal["before-keys", "after-advertising", "after-keys", "after-input"]
LAST_STAGES: Mapping[DropStage, int] = {"before-keys": 0, "after-advertising": 1, "after-keys": 2, "after-input": 3}
"""How many stages a device that drops out still answers."""
SESSION = "session"
ENCODING = "quantisation"
UPLOAD = "upload"
STATE = b"state".ljust(32, b"\0")
WEIGHT = 10
_CLIP_NORM = 4.0
_DISTINCT_UPDATES = 8
_SAMPLES_A_STAGE = 20
UPLOADS_AT_ONCE = 20
"""Vectors that are in memory together, for the coordinator to take in a row: its processor is not that of the devices.
"""

Seconds: TypeAlias = dict[str, float]


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; shares are from 0 to 1.

    Attributes:
        clients: Devices that are invited.
        dimension: Entries of the update.
        dropout: Share of the devices that drop out.
        drop_stage: When they do.
        mode: Of the session.
        corrupt: Assumed share of corrupt devices.
        assumed_dropout: Assumed share of dropouts.
        lane: Of one entry.
        bits: Width of one entry before summation.
        cipher: Mask expansion.
        workers: Threads that take masks off.
        seed: Of who drops out, and of the updates.
        graph: `auto`, `complete`, or the number of neighbours on a ring.
        uploads_at_once: Masked vectors that wait until the coordinator takes them one after another.
    """

    clients: int
    dimension: int
    dropout: float
    drop_stage: DropStage
    mode: Mode
    corrupt: float
    assumed_dropout: float
    lane: LaneName
    bits: int
    cipher: Cipher
    workers: int
    seed: int
    graph: str = "auto"
    uploads_at_once: int = UPLOADS_AT_ONCE

    @property
    def dropouts(self) -> int:
        """How many devices drop out."""
        return round(self.clients * self.dropout)

    @property
    def members(self) -> int:
        """How many devices are in the roster."""
        return self.clients - (self.dropouts if self.drop_stage == "before-keys" else 0)

    @property
    def sharers(self) -> int:
        """How many of them share keys."""
        return self.members - (self.dropouts if self.drop_stage == "after-advertising" else 0)


@dataclass(slots=True)
class Measured:
    """What one session cost. Times are CPU seconds, sizes are bytes.

    Attributes:
        client: Stage -> one entry per device that answered in it: seconds by line.
        server: Stage -> seconds by line, over all devices.
        closing: Stage -> seconds of closing it.
        up, down: Device id -> bytes sent and received.
        neighbours: k.
        threshold: t.
        survivors: Devices in the sum.
        exact: Whether the unmasked sum is the plain sum of the survivors.
        abandoned: Why there is no sum, or empty.
        peak_bytes: Largest resident size of the process.
        primitives: CPU seconds of each, as `Gauge` measured them meanwhile.
    """

    client: defaultdict[str, list[Seconds]] = field(default_factory=lambda: defaultdict(list))
    server: defaultdict[str, defaultdict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    closing: dict[str, float] = field(default_factory=dict)
    up: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    down: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    neighbours: int = 0
    threshold: int = 0
    survivors: int = 0
    exact: bool = False
    abandoned: str = ""
    peak_bytes: int = 0
    primitives: Seconds = field(default_factory=dict)


def plan_of(options: Options) -> Plan:
    """Return a plan that sums one update of the given dimension."""
    update = Aggregation(
        name="update",
        tensors=(f"float32[{options.dimension}]",),
        encoding=Quantised(half_range=0.05, bits=options.bits),
        weighted=True,
        clip_norm=_CLIP_NORM,
        lane=options.lane,
    )
    return Plan(
        fleet=FLEET,
        name="bench",
        collection="bench",
        program=blob_ref(b"none"),
        work=LocalWork(),
        aggregations=(update,),
        privacy=PrivacyTerms(purpose="measuring", minimum_cohort=SMALLEST_COHORT, weight_cap=2 * WEIGHT),
    )


def parameters_of(options: Options, layout: Layout) -> SecAggParameters:
    """Return the parameters of the session."""
    return SecAggParameters(
        mode=options.mode,
        cipher=options.cipher,
        minimum_survivors=SMALLEST_COHORT,
        maximum_clients=options.clients,
        corrupt_share_bp=round(options.corrupt * BASIS_POINTS),
        dropout_share_bp=round(options.assumed_dropout * BASIS_POINTS),
        vector_bytes=layout.vector_bytes,
        wide_bytes=layout.wide_bytes,
        packed=layout.packed,
    )


def graph_for(options: Options, members: int) -> GraphParameters:
    """Return the graph of a cohort of `members`.

    Raises:
        ConfigError: No such graph is safe and likely to complete.
    """
    if options.graph == "complete" or (options.graph == "auto" and members <= COMPLETE_GRAPH_LIMIT):
        return GraphParameters(members - 1, threshold(options.mode, members, round(options.corrupt * BASIS_POINTS)))
    return graph_parameters(
        clients=members,
        corrupt_share=options.corrupt,
        dropout_share=options.assumed_dropout,
        mode=options.mode,
        neighbours=None if options.graph == "auto" else int(options.graph),
    )


class Bench:
    """A session being run and measured."""

    def __init__(self, options: Options, fleet: BenchFleet, meter: Meter, spread: Spread = AT_ONCE) -> None:
        """Prepare the server and every device's session."""
        plan = plan_of(options)
        self._options, self._fleet, self._meter = options, fleet, meter
        self._layout = layout_of(plan, maximum_clients=options.clients)
        self._parameters = parameters_of(options, self._layout)
        self._terms = ClientTerms(minimum_cohort=3, minimum_honest_survivors=2, modes=(options.mode,))
        self._plan = plan.digest
        self._values = _Updates(options)
        self._dropouts = frozenset(random.Random(options.seed).sample(sorted(fleet.devices), options.dropouts))
        self._server = ServerSession(
            context=self._context(COORDINATOR, ALL, bytes(32)),
            plan=self._plan,
            state=STATE,
            parameters=self._parameters,
            expected=fleet.devices,
            entropy=os.urandom,
            graph_rule=partial(graph_for, options),
            spread=spread,
        )
        self._clients: dict[str, ClientSession] = {}
        self._uploads = UploadSlots(limit=1, idle_ms=1)
        self._vectors: dict[str, bytearray] = {}
        self._expected = bytearray(self._layout.unpacked_bytes)
        self._gauge = Gauge(self._parameters, every=-(-options.clients // _SAMPLES_A_STAGE))
        self.measured = Measured()

    def run(self) -> Measured:
        """Run the session to its end; return what it cost."""
        try:
            for stage in range(len(STAGE_NAMES)):
                if isinstance(self._server.stage, Unmasked):
                    break
                self._run_stage(stage)
            reduce(self._expected, self._layout)
            self.measured.exact = self._server.result == self._expected
        except RoundAbandoned as abandoned:
            self.measured.abandoned = f"{abandoned.reason}: {abandoned.detail}"
        finally:
            gc.unfreeze()
        self.measured.survivors = len(self._server.survivors)
        self.measured.primitives = self._gauge.medians()
        self.measured.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self.measured

    def _run_stage(self, number: int) -> None:
        _set_aside_what_lives()
        name = STAGE_NAMES[type(self._server.stage)]
        staying = number < LAST_STAGES[self._options.drop_stage]
        replies = [one for one in self._server.outstanding() if staying or one.device not in self._dropouts]
        at_once = self._options.uploads_at_once if name == "masked_input" else self._options.clients
        for start in range(0, len(replies), at_once):
            answers = [self._let_answer(name, reply) for reply in replies[start : start + at_once]]
            # One kind of work after another: what signatures do to the processor's cache is theirs, too.
            opened = [self._open(device, payload) for device, payload, _ in answers]
            with self._meter.line(SESSION):
                for message in opened:
                    self._server.receive(message)
            for device, _, chunks in answers:
                self._take_upload(device, chunks)
            self._charge_server(name)
        gc.freeze()  # Not collected: going through the objects of all devices would leave the cache full of them.
        self._meter.take()
        with self._meter.line(SESSION):
            self._server.close_stage()
        self.measured.closing[name] = self._meter.take()[SESSION]

    def _let_answer(self, stage: str, reply: Reply) -> tuple[str, bytes, list[bytes]]:
        """Let the coordinator ask one device; return its id, its answer, and the chunks of its vector if it has one."""
        self._gauge.tick()
        device = reply.device
        context = self._context(COORDINATOR, device, reply.session)
        with self._meter.line(SIGNATURES):
            request = seal(reply.message, self._fleet.coordinator, context)
        self._charge_server(stage)
        if stage == "masked_input":
            self._vectors[device][:] = self._encode(device)
            add_into(self._expected, self._vectors[device], self._layout)
            self._meter.take()
        if isinstance(reply.message, AdvertiseKeysRequest):
            self._vectors[device] = bytearray(self._layout.unpacked_bytes)
            with self._meter.line(SESSION):
                self._clients[device] = self._new_client(device)
        if isinstance(reply.message, Roster):
            self.measured.neighbours, self.measured.threshold = reply.message.neighbours, reply.message.threshold
        answer = self._ask(self._clients[device], device, request)
        self.measured.client[stage].append(self._meter.take())
        masked = self._clients[device].masked_vector
        chunks = _chunks(self._clients[device].session_id, masked) if masked else []
        self.measured.down[device] += len(request)
        self.measured.up[device] += len(answer) + sum(map(len, chunks))
        # A device that waits keeps its vector on its own memory, not on that of the other devices.
        self._vectors[device].clear()
        self._meter.take()
        return device, answer, chunks

    def _new_client(self, device: str) -> ClientSession:
        return ClientSession(
            identity=self._fleet.devices[device],
            anchor=self._fleet.anchor,
            at=self._fleet.at,
            context=self._context(device, COORDINATOR, bytes(32)),
            plan=self._plan,
            state=STATE,
            parameters=self._parameters,
            upload_key=self._server.invitation.upload_key,
            terms=self._terms,
            vector=self._vectors[device],
            entropy=os.urandom,
        )

    def _encode(self, device: str) -> bytearray:
        values = self._values.of(device)
        self._meter.take()
        with self._meter.line(ENCODING):
            vector = encode(self._layout, {"update": [values]}, weight=WEIGHT, entropy=os.urandom)
        self.measured.client[ENCODING].append(self._meter.take())
        return vector

    def _ask(self, client: ClientSession, device: str, payload: bytes) -> bytes:
        """Return the sealed answer of `device` to the coordinator's sealed request."""
        meter, coordinator = self._meter, self._fleet.coordinator.certificate
        with meter.line(SIGNATURES):
            message: Any = open_envelope(parse(payload), coordinator, payload).message
        with meter.line(SESSION):
            asked = isinstance(message, AdvertiseKeysRequest)
            answer: Message = client.advertise() if asked else client.receive(message)
        with meter.line(SIGNATURES):
            session = bytes(32) if asked else client.session_id
            return seal(answer, self._fleet.devices[device], self._context(device, COORDINATOR, session))

    def _open(self, device: str, payload: bytes) -> Opened[Any]:
        with self._meter.line(SIGNATURES):
            return open_envelope(parse(payload), self._fleet.devices[device].certificate, payload)

    def _take_upload(self, device: str, payloads: Iterable[bytes]) -> None:
        """Do what the coordinator does with the chunks of a masked vector, if `device` has announced one."""
        announced = self._server.expected_vector(device)
        if announced is None:
            return
        with self._meter.line(UPLOAD):
            self._uploads.enqueue(device, announced)
            self._uploads.grant(0, offline=lambda _: False)
            for payload in payloads:
                chunk = decode_vector_chunk(payload)
                upload = self._uploads.add_chunk(device, chunk.index, chunk.content, 0)
                if upload is not None:
                    self._server.add_vector(device, upload)

    def _charge_server(self, stage: str) -> None:
        for line, seconds in self._meter.take().items():
            self.measured.server[stage][line] += seconds

    def _context(self, sender: str, recipient: str, session: bytes) -> SignedContext:
        return SignedContext(sender, recipient, FLEET, 1, 0, session)


class _Updates:
    """A few distinct updates, dealt out in turn: what they are does not change what they cost."""

    def __init__(self, options: Options) -> None:
        rng = np.random.default_rng(options.seed)
        scale = _CLIP_NORM / options.dimension**0.5
        self._values = [
            (scale * rng.standard_normal(options.dimension)).astype(np.float32) for _ in range(_DISTINCT_UPDATES)
        ]

    def of(self, device: str) -> Array:
        values: Array = self._values[int(device.rpartition("-")[2]) % _DISTINCT_UPDATES]
        return values


def _set_aside_what_lives() -> None:
    """Keep what is on the heap by now out of the garbage collector's passes.

    The objects of a thousand devices are on it; on a coordinator's, or a device's, there are none of them. What is made
    from here on is collected, and paid for, as everywhere.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _chunks(session: bytes, vector: bytearray) -> list[bytes]:
    """Return the payloads that a masked vector travels in."""
    view, size = memoryview(vector), DEFAULT_CHUNK_BYTES
    chunks = (VectorChunk(session, at // size, bytes(view[at : at + size])) for at in range(0, len(view), size))
    return [encode_vector_chunk(chunk) for chunk in chunks]
