"""A fleet without a fleet: runs a round's client program on every member and sums the encoded vectors plainly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from edge_agent.work import prepare
from sottovoce.blobs import blob_ref
from sottovoce.bundle import decode_bundle
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Plan, PrivacyTerms, check_plan
from sottovoce.runtime import open_program, run_self_test
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array


@dataclass
class PlainRounds:
    """The port `Rounds` with the devices' own code for the work and the lanes, and no masks.

    Attributes:
        collections: Name -> every device's examples, for arguments that live on devices.
        requests: What was asked for.
        kept: Client state by slot, device by device, committed after every round.
    """

    collections: Mapping[str, Sequence[Mapping[str, Array]]] = field(default_factory=dict)
    requests: list[RoundRequest] = field(default_factory=list)
    kept: dict[tuple[str, int], Mapping[str, Array]] = field(default_factory=dict)

    def run(self, request: RoundRequest) -> RoundSums:
        self.requests.append(request)
        plan = Plan(
            fleet="plain",
            name=request.name,
            collection=request.collection,
            program=blob_ref(request.bundle),
            work=request.work,
            aggregations=request.aggregations,
            privacy=PrivacyTerms(purpose=request.purpose, minimum_cohort=3, weight_cap=request.weight_cap),
        )
        check_plan(plan)
        members = list(map(decode_tensors, request.members)) or self.collections[request.collection]
        layout = layout_of(plan, maximum_clients=max(len(members), 3))
        total: Array | None = None
        for number, examples in enumerate(members):
            vector = _words(layout, self._work(request, layout, number, examples))
            total = vector if total is None else _added(layout, total, vector)
        assert total is not None
        learned = decode(layout, total.tobytes(), survivors=len(members))
        return RoundSums(
            sums={
                name: learned.mean(name) if name in learned.weighted else tensors
                for name, tensors in learned.sums.items()
            },
            weight=learned.weight,
            survivors=learned.survivors,
            clamped=learned.clamped,
            round=len(self.requests),
        )

    def _work(self, request: RoundRequest, layout: Layout, number: int, examples: Mapping[str, Array]) -> bytearray:
        bundle = decode_bundle(request.bundle)
        program = open_program(bundle)
        run_self_test(bundle, program)
        broadcast = decode_tensors(request.broadcast)
        kept: Mapping[str, Array] = {}
        if bundle.client_state is not None:
            slot = (bundle.client_state.slot, number)
            kept = self.kept.get(slot, decode_tensors(bundle.client_state.initial))
        work = prepare(program, bundle, request.work, broadcast=broadcast, examples=examples, client_state=kept)
        state = work.start(os.urandom)
        while not work.is_done(state):
            state = work.advance(state)
        result = work.result(state)
        if bundle.client_state is not None:
            self.kept[bundle.client_state.slot, number] = result.client_state
        names = [aggregation.name for aggregation in request.aggregations]
        values = {name: result.values[name] for name in names}
        return encode(layout, values, weight=result.weight, entropy=os.urandom)


def _words(layout: Layout, vector: bytearray) -> Array:
    return np.frombuffer(bytes(vector), np.uint8)


def _added(layout: Layout, a: Array, b: Array) -> Array:
    """Add word by word; the wide words are at the end."""
    narrow = len(a) - layout.wide_bytes
    parts = ((slice(0, narrow), np.uint32), (slice(narrow, None), np.uint64))
    return np.concatenate([(a[at].view(kind) + b[at].view(kind)).view(np.uint8) for at, kind in parts])


@pytest.fixture
def plain_rounds() -> PlainRounds:
    return PlainRounds()


@pytest.fixture
def fleet(plain_rounds: PlainRounds) -> FleetExecutor:
    return FleetExecutor(plain_rounds)
