"""A round that somebody asks for: the plan that it becomes, the sums that come of it, and both as bytes.

A request is the smallest federated program: one round, whose sums go back to whoever asked. What is made of them, the
asker's own process decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np

from coordinator.terms import RoundTerms
from sottovoce.agreement import check_aggregations, check_broadcast, check_extraction
from sottovoce.blobs import Document, blob_ref, canonical, digest_of
from sottovoce.bundle import Bundle, decode_bundle
from sottovoce.errors import ConfigError
from sottovoce.language.hosted import Advance, Tensors
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Aggregation, Counted, Plan, PrivacyTerms, check_plan, settled
from sottovoce.secagg.encoding import Aggregate
from sottovoce.secagg.lanes import layout_of
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array

_LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the journal has it.

    Attributes:
        request: What is asked.
        terms: How many devices, how long.
        expires_unix_s: Devices refuse its plan after this time.
    """

    request: RoundRequest
    terms: RoundTerms
    expires_unix_s: int


def plan_of(request: RoundRequest, terms: RoundTerms, *, fleet: str, chunk_bytes: int, expires_unix_s: int = 0) -> Plan:
    """Return the plan that devices are shown for `request`: the same for every round of one program's run.

    Args:
        request: What is asked.
        terms: How many devices.
        fleet: Name of the fleet.
        chunk_bytes: Largest piece of a blob.
        expires_unix_s: Devices refuse it after this time; 0 is never.

    Raises:
        ConfigError: A number in it is impossible, or its sums do not fit into their lanes for so large a cohort.
    """
    asked = Plan(
        fleet=fleet,
        name=request.name,
        collection=request.collection,
        program=blob_ref(request.bundle, chunk_bytes=chunk_bytes),
        work=request.work,
        aggregations=request.aggregations,
        privacy=PrivacyTerms(
            purpose=request.purpose,
            minimum_cohort=terms.cohort.minimum,
            weight_cap=request.weight_cap,
            expires_unix_s=expires_unix_s,
            threshold=request.threshold,
            participation=request.participation,
        ),
        extraction=request.extraction,
        publish=request.publish,
    )
    plan = settled(asked)
    check_plan(plan)
    layout_of(plan, maximum_clients=terms.cohort.wanted)
    return plan


def check_request(request: RoundRequest, terms: RoundTerms, *, fleet: str, chunk_bytes: int) -> None:
    """Refuse what no coordinator could run, before it is asked for.

    Raises:
        ConfigError: Values of devices came with the request, or its plan is impossible.
        BadBundle: Its client program is not one, or does not compute what is summed, or reads other columns than are
            extracted.
        ProgramError: Its broadcast is not what the client program is given.
        MalformedMessage: Its broadcast is not named tensors.
    """
    if request.members:
        raise ConfigError(
            f"{request.name}: these values were given as a list, but on a real fleet the values live on the devices: "
            'name the collection that they are in, as in sv.latest("temperature") or sv.collection("temperature")'
        )
    bundle = decode_bundle(request.bundle)
    plan = plan_of(request, terms, fleet=fleet, chunk_bytes=chunk_bytes)
    check_broadcast(bundle, decode_tensors(request.broadcast))
    check_aggregations(plan, bundle)
    if plan.extraction is not None:
        check_extraction(bundle, plan.extraction)


@dataclass(frozen=True, slots=True)
class SingleRound:
    """A request as a program of one round (`sottovoce.language.hosted.HostedProgram`).

    Attributes:
        request: What was asked.
    """

    request: RoundRequest

    @property
    def length(self) -> int:
        """One round."""
        return 1

    @property
    def first_state(self) -> Tensors:
        """The broadcast: there is nothing else to remember."""
        return decode_tensors(self.request.broadcast)

    @property
    def model(self) -> Bundle | None:
        """None: what the sums mean, only the asker knows."""
        return None

    def request_at(self, position: int, state: Tensors) -> RoundRequest:
        """Return the request."""
        return self.request

    def broadcast_at(self, position: int, state: Tensors) -> Tensors:
        """Return the broadcast; after a round that publishes, its sums."""
        return state

    def apply(self, position: int, state: Tensors, sums: RoundSums) -> Advance:
        """Return how much was summed; the sums themselves are kept beside it, or are for every device."""
        metrics = {"examples": float(sums.weight), "clamped": float(sums.clamped)}
        if self.request.publish:
            return Advance(for_everybody(sums.sums, self.request.aggregations), metrics, {})
        return Advance(state, metrics, {})


# --- sums -------------------------------------------------------------------------------------------------------------


def sums_of(aggregate: Aggregate, *, number: int) -> RoundSums:
    """Return what round `number` brought, in the language's terms: sums, and means where they are weighted."""
    sums = {
        name: aggregate.mean(name) if name in aggregate.weighted else totals for name, totals in aggregate.sums.items()
    }
    return RoundSums(
        sums=sums, weight=aggregate.weight, survivors=aggregate.survivors, clamped=aggregate.clamped, round=number
    )


class _Sums(Document, frozen=True):
    tensors: bytes
    counts: dict[str, int]
    weight: int
    survivors: int
    clamped: int
    round: int


def encode_sums(sums: RoundSums) -> bytes:
    """Return `sums` as bytes."""
    document = _Sums(
        tensors=encode_tensors({str(index): array for index, array in enumerate(chain(*sums.sums.values()))}),
        counts={name: len(arrays) for name, arrays in sums.sums.items()},
        weight=sums.weight,
        survivors=sums.survivors,
        clamped=sums.clamped,
        round=sums.round,
    )
    return canonical(document)


def decode_sums(content: bytes) -> RoundSums:
    """Return the sums that `encode_sums` wrote.

    Raises:
        ConfigError: Another release wrote them.
    """
    try:
        document = msgspec.msgpack.decode(content, type=_Sums)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"the sums in the journal were written by another release: {error}") from error
    values = iter(decode_tensors(document.tensors).values())
    sums = {name: [next(values) for _ in range(count)] for name, count in document.counts.items()}
    return RoundSums(
        sums=sums,
        weight=document.weight,
        survivors=document.survivors,
        clamped=document.clamped,
        round=document.round,
    )


def flat_sums(sums: Mapping[str, list[Array]]) -> dict[str, Array]:
    """Return the arrays under one name each: the aggregation's, numbered where it has several tensors."""
    return {
        name if len(arrays) == 1 else f"{name}.{index}": array
        for name, arrays in sums.items()
        for index, array in enumerate(arrays)
    }


def for_everybody(sums: Mapping[str, list[Array]], aggregations: Iterable[Aggregation]) -> dict[str, Array]:
    """Return sums as the named tensors that every device is given: counts as whole numbers, as narrow as they can be.

    Args:
        sums: Thresholded.
        aggregations: Of their plan.
    """
    counted = {aggregation.name for aggregation in aggregations if isinstance(aggregation.encoding, Counted)}
    return flat_sums(
        {name: [_whole(each) for each in arrays] if name in counted else arrays for name, arrays in sums.items()}
    )


def _whole(array: Array) -> Array:
    return array.astype(np.int32 if array.max(initial=0) <= _LARGEST_INT32 else np.int64)


# --- a request in the journal -----------------------------------------------------------------------------------------


def without_blobs(request: RoundRequest) -> bytes:
    """Return `request` as bytes but for its bundle and broadcast, which the journal keeps as blobs of their own."""
    return canonical(msgspec.structs.replace(request, bundle=b"", broadcast=b""))


def with_blobs(content: bytes, *, bundle: bytes, broadcast: bytes) -> RoundRequest:
    """Return the request that `without_blobs` wrote.

    Raises:
        ConfigError: Another release wrote it.
    """
    try:
        request = msgspec.msgpack.decode(content, type=RoundRequest)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"this request was written by another release; ask again: {error}") from error
    return msgspec.structs.replace(request, bundle=bundle, broadcast=broadcast)


def run_of(key: str) -> str:
    """Return what the keys of one run of a federated program begin with: all but the step and the call."""
    return key.rsplit("/", 2)[0]


def content_digest(request: RoundRequest) -> bytes:
    """Return the digest of everything that is asked, 32 bytes: the same key must always ask the same."""
    return digest_of(without_blobs(request) + digest_of(request.bundle) + digest_of(request.broadcast))
