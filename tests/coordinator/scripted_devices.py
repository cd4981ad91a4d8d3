"""Devices that say what good devices say, with real secure aggregation and no loop of their own."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np
from choir import AT, COORDINATOR, FLEET, Choir

from sottovoce.blobs import blob_ref
from sottovoce.identity import Identity, SignedContext
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, Quantised
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.lanes import layout_of
from sottovoce.types import Array, TensorType
from sottovoce.wire.chunks import VectorChunk, missing_in_bitmap
from sottovoce.wire.messages import (
    AdvertiseKeysRequest,
    CheckIn,
    MaskedInputRequest,
    Message,
    NotSelected,
    Ready,
    Roster,
    RoundOver,
    Selected,
    SurvivorsRequest,
    UnmaskingRequest,
    UploadSlot,
)

ANNOUNCEMENT, STATE = b"a" * 32, b"s" * 32
LENIENT = ClientTerms(minimum_cohort=3, minimum_honest_survivors=2, modes=("active", "curious"))
ENTRIES = 50


def make_plan() -> Plan:
    """A plan with an update, a whole-number sum and a cap of 10 on weights."""
    delta = Aggregation(
        name="delta",
        tensors=(f"float32[{ENTRIES}]",),
        encoding=Quantised(half_range=1.0, bits=16),
        weighted=True,
        clip_norm=100.0,
    )
    correct = Aggregation(name="correct", tensors=("float32[1]",), encoding=Counted(maximum=100))
    return Plan(
        fleet=FLEET,
        name="digits",
        collection="digits",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=(delta, correct),
        privacy=PrivacyTerms(purpose="to test", minimum_cohort=3, weight_cap=10),
    )


@dataclass
class ScriptedDevice:
    """One device: says what a good device says, unless the test tells it to be silent.

    Attributes:
        silent_at: It dies when it is sent a message of this type.
        present: What its Ready says.
        refused: Errors that its session raised.
        heard: Everything it was sent.
    """

    identity: Identity
    choir: Choir
    plan: Plan
    values: dict[str, list[Array]]
    weight: int = 10
    chunk_bytes: int = 64
    state: bytes = STATE
    silent_at: type[Message] | None = None
    present: bool = True
    heard: list[Message] = field(default_factory=list)
    handled: list[Message] = field(default_factory=list)
    said: list[tuple[Message, bytes]] = field(default_factory=list)
    session: ClientSession | None = None
    in_flight: list[int] = field(default_factory=list)
    dead: bool = False

    @property
    def name(self) -> str:
        return self.identity.certificate.name

    def check_in(self, announcement: bytes = ANNOUNCEMENT) -> CheckIn:
        return CheckIn(certificate=self.identity.certificate.der, announcement=announcement, fast_aes=True)

    def receive(self, message: Message, context: SignedContext) -> Iterable[tuple[Message | VectorChunk, bytes]]:
        """Yield the answers to `message`, each with the session it belongs to."""
        self.heard.append(message)
        if self.silent_at is not None and isinstance(message, self.silent_at):
            self.dead = True
        if self.dead or (message in self.handled and not isinstance(message, UploadSlot)):
            return  # A device answers a repeat only when its own timer says so: see `docs/SPEC.md`, redelivery.
        self.handled.append(message)
        match message:
            case Selected():
                yield Ready(present=self.present), bytes(32)
            case AdvertiseKeysRequest():
                yield self._open_session(message, context).advertise(), bytes(32)
            case Roster() | MaskedInputRequest() | SurvivorsRequest() | UnmaskingRequest():
                assert self.session is not None
                yield self.session.receive(message), self.session.session_id
            case UploadSlot(received=received, complete=False):
                assert self.session is not None
                vector = self.session.masked_vector
                assert vector is not None
                missing = missing_in_bitmap(received, -(-len(vector) // self.chunk_bytes))
                self.in_flight = [index for index in self.in_flight if index in missing] if any(received) else []
                fresh = [index for index in missing if index not in self.in_flight][: 2 - len(self.in_flight)]
                self.in_flight += fresh
                for index in fresh:
                    content = bytes(vector[index * self.chunk_bytes : (index + 1) * self.chunk_bytes])
                    yield VectorChunk(self.session.session_id, index, content), self.session.session_id
            case UploadSlot() | NotSelected() | RoundOver():
                return
            case _:
                raise AssertionError(f"a device does not understand {type(message).__name__}")

    def _open_session(self, request: AdvertiseKeysRequest, context: SignedContext) -> ClientSession:
        if self.session is None:
            layout = layout_of(self.plan, maximum_clients=request.parameters.maximum_clients)
            entropy = random.Random(self.name).randbytes
            vector = encode(layout, self.values, weight=self.weight, entropy=entropy)
            self.session = ClientSession(
                identity=self.identity,
                anchor=self.choir.anchor,
                at=AT,
                context=msgspec.structs.replace(context, sender=self.name, recipient=COORDINATOR, session=bytes(32)),
                plan=self.plan.digest,
                state=self.state,
                parameters=request.parameters,
                upload_key=request.upload_key,
                terms=LENIENT,
                vector=vector,
                entropy=entropy,
                chunk_bytes=self.chunk_bytes,
            )
        return self.session


def values_of(number: int) -> dict[str, list[Array]]:
    """What device `number` contributes."""
    rng = np.random.default_rng(number)
    return {
        "delta": [rng.uniform(-0.5, 0.5, ENTRIES).astype(np.float32)],
        "correct": [np.array([number + 1], np.float32)],
    }


def device_for(choir: Choir, name: str, plan: Plan, state_digest: bytes) -> ScriptedDevice:
    """The device that takes part in any plan: its update is 0.125 everywhere, its sums are small whole numbers."""
    fixed = {"delta": 0.125, "correct": 3.0, "count": 4.0, "sum": 8.0, "sum_of_squares": 24.0}
    values: dict[str, list[Array]] = {
        each.name: [np.full(TensorType.parse(kind).shape, fixed[each.name], np.float32) for kind in each.tensors]  # type: ignore[arg-type]
        for each in plan.aggregations
    }
    return ScriptedDevice(choir.devices[name], choir, plan, values, weight=4, state=state_digest)
