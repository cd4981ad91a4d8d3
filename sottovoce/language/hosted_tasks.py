"""The federated programs that a coordinator hosts for task files, built on the language and run without TensorFlow.

`hosted_training` is federated averaging, if need be after one round that standardises the inputs; `hosted_sums` is one
round that releases plain sums. Each lowers the very computations of `learning` and `sums`; a task file may choose the
encoding of every sum itself. Errors begin with the key of the task file that is to be changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from sottovoce.bundle import Bundle, decode_bundle
from sottovoce.errors import ConfigError
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.expressions import Terms
from sottovoce.language.hosted import Advance, SumTerms, Tensors
from sottovoce.language.learning import (
    LEARNING_RATE,
    Averaging,
    ClientOptimizer,
    build_fed_avg,
    checked_metrics,
    initial_model,
    model_type,
)
from sottovoce.language.lowered import Lowered
from sottovoce.language.lowering import lower
from sottovoce.language.ports import Bound, RoundRequest, RoundSums
from sottovoce.language.server_optimizer import ServerOptimizer, by_name
from sottovoce.language.sums import MOMENTS, build_standardisation, build_sums, moment_types
from sottovoce.plan import Counted, Encoding, LaneName, LocalWork, Quantised
from sottovoce.types import Array, TensorType
from sottovoce.values import Record, flatten, leaves, unflatten

UNCAPPED_WEIGHT = 1_000_000
"""Weight cap of plans in which nothing is weighted: the number of examples is only counted."""
_NO_TERMS: Mapping[str, SumTerms] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HostedTraining:
    """Federated averaging that somebody else drives; made by `hosted_training`.

    Attributes:
        averaging: The server's side.
        training: A round of training, lowered.
        standardising: The first round, lowered; None where the inputs are taken as they are.
        rounds: How many rounds of training.
        collection: The collection that all of them read.
    """

    averaging: Averaging
    training: Lowered
    standardising: Lowered | None
    rounds: int
    collection: str

    @property
    def length(self) -> int:
        """How many rounds must commit until it is done."""
        return self.rounds + (self.standardising is not None)

    @property
    def first_state(self) -> Tensors:
        """The server's state before round 0, leaf by leaf: `model.KERNEL`, `optimizer.first_moment.KERNEL`, `round`."""
        return self._tensors(self.averaging.first_state())

    @property
    def model(self) -> Bundle:
        """The bundle whose broadcast is trained."""
        return self.averaging.bundle

    def request_at(self, position: int, state: Tensors) -> RoundRequest:
        """Return the round to run at `position`."""
        examples = DeviceValues("collection", self.collection)
        if self.standardising is not None and position == 0:
            return self.standardising.request({"examples": examples})
        return self.training.request({"state": self._value(state), "examples": examples})

    def broadcast_at(self, position: int, state: Tensors) -> Tensors:
        """Return what devices are given at `position`; after the last round the trained model."""
        if self.standardising is not None and position == 0:
            return {}
        return dict(self.averaging.broadcast(self._value(state)).items())

    def apply(self, position: int, state: Tensors, sums: RoundSums) -> Advance:
        """Return what round `position` makes of `state`.

        Raises:
            RoundAbandoned: A moment of nothing, or a model that would not be finite.
        """
        totals = {"examples": float(sums.weight), "clamped": float(sums.clamped)}
        value = self._value(state)
        if self.standardising is not None and position == 0:
            moments = self.standardising.result({}, sums)
            following = Record({**value, "model": Record({**value.model, **moments})})
            return Advance(self._tensors(following), totals, {})
        found = self.training.result({"state": value}, sums)
        means = {name: float(mean) for name, mean in found.metrics.items()}
        return Advance(self._tensors(found.state), {**means, **totals}, {})

    def _tensors(self, state: Any) -> dict[str, Array]:
        kind = self.averaging.state_type
        return {path: np.asarray(leaf) for (path, _), leaf in zip(leaves(kind), flatten(kind, state), strict=True)}

    def _value(self, state: Tensors) -> Any:
        kind = self.averaging.state_type
        return unflatten(kind, [state[path] for path, _ in leaves(kind)])


@dataclass(frozen=True, slots=True)
class HostedSums:
    """One round that releases plain sums, driven by somebody else; made by `hosted_sums`.

    Attributes:
        bundle: The client program.
        lowered: The round.
        collection: The collection that it reads.
    """

    bundle: Bundle
    lowered: Lowered
    collection: str

    @property
    def length(self) -> int:
        """One round."""
        return 1

    @property
    def first_state(self) -> Tensors:
        """What is broadcast; nothing becomes of it."""
        return self.lowered.prepare({})

    @property
    def model(self) -> None:
        """It trains nothing."""
        return None

    def request_at(self, position: int, state: Tensors) -> RoundRequest:
        """Return the round to run."""
        return self.lowered.request({"examples": DeviceValues("collection", self.collection)})

    def broadcast_at(self, position: int, state: Tensors) -> Tensors:
        """Return what devices are given."""
        return state

    def apply(self, position: int, state: Tensors, sums: RoundSums) -> Advance:
        """Return the sums of the results, port by port, and the metrics divided by the number of examples."""
        released = {
            port.name: value
            for result in self.bundle.results
            for port, value in zip(result.ports, sums.sums[result.name], strict=True)
        }
        names = [port.name for port in self.bundle.metrics if port.name in sums.sums]
        means = {name: float(sums.sums[name][0].sum()) / max(sums.weight, 1) for name in names}
        return Advance(state, {**means, "examples": float(sums.weight), "clamped": float(sums.clamped)}, released)


def hosted_training(
    bundle: bytes,
    *,
    name: str,
    purpose: str,
    collection: str,
    rounds: int,
    work: LocalWork,
    terms: Terms,
    largest_cohort: int,
    learning_rate: float | None,
    learning_rate_decay: float = 1.0,
    server_optimizer: str = "sgd",
    server_options: Mapping[str, float] = MappingProxyType({}),
    metrics: Mapping[str, SumTerms] = _NO_TERMS,
    results: Mapping[str, SumTerms] = _NO_TERMS,
    moments: bytes | None = None,
    moments_results: Mapping[str, SumTerms] = _NO_TERMS,
) -> HostedTraining:
    """Return federated averaging of a model for some rounds, if need be after a round that standardises its inputs.

    Args:
        bundle: Bytes of the model's bundle.
        name: Of the plan; the standardising round's is `NAME-moments`.
        purpose: What this is for, in words that a device's owner understands.
        collection: The collection of local examples.
        rounds: Rounds of training, at least 1.
        work: Epochs, batches and which examples; the standardising round is one epoch.
        terms: How one device's update is clipped, weighted and encoded; nothing is left to lowering.
        largest_cohort: Most devices in a round; decides how wide the lanes of plain sums are.
        learning_rate: The devices' in the first round; None is the bundle's.
        learning_rate_decay: Every round's rate is the one before times this.
        server_optimizer: One of `server_optimizer.NAMES`.
        server_options: Its rates by name.
        metrics: Which of the bundle's metrics are summed, and how they are encoded.
        results: Must be empty: training releases no sums.
        moments: Bytes of a moments bundle; None standardises nothing.
        moments_results: How its results are encoded.

    Raises:
        ConfigError: They do not fit together; the text names the key and says what to write.
        BadBundle: One of the bundles is not one.
    """
    model = _trainable(bundle, learning_rate, results)
    client = ClientOptimizer(learning_rate, learning_rate_decay, work)
    averaging = Averaging(model, client, _server_optimizer(server_optimizer, server_options))
    summed = checked_metrics(model, {metric: _bound(each) for metric, each in metrics.items()})
    process = build_fed_avg(bundle, client, averaging.server, terms=terms, metrics=summed, name=name, purpose=purpose)
    training = _encoded(lower(process.next), purpose, metrics, largest_cohort)
    standardising = None
    if moments is not None:
        first = _standardising(model, moments, moments_results, work=work, name=name, purpose=purpose)
        standardising = _encoded(first, purpose, moments_results, largest_cohort)
    return HostedTraining(averaging, training, standardising, rounds, collection)


def _standardising(
    model: Bundle, moments: bytes, results: Mapping[str, SumTerms], *, work: LocalWork, name: str, purpose: str
) -> Lowered:
    """Return the round that finds mean and spread of the inputs: one epoch, in which nothing is weighted."""
    _check_moments(model, decode_bundle(moments), results)
    computation = build_standardisation(
        moments,
        work=msgspec.structs.replace(work, epochs=1),
        bounds={each: _bound(terms) for each, terms in results.items()},
        name=f"{name}-moments",
        purpose=purpose,
    )
    return dataclasses.replace(lower(computation), weight_cap=UNCAPPED_WEIGHT)


def hosted_sums(
    bundle: bytes,
    *,
    name: str,
    purpose: str,
    collection: str,
    work: LocalWork,
    results: Mapping[str, SumTerms],
    metrics: Mapping[str, SumTerms] = _NO_TERMS,
    largest_cohort: int,
    learning_rate: float | None = None,
) -> HostedSums:
    """Return one round that releases the sums of a client program's results.

    Args:
        bundle: Bytes of the client program's bundle.
        name: Of the plan.
        purpose: What this is for, in words that a device's owner understands.
        collection: The collection of local examples.
        work: Epochs, batches and which examples.
        results: How every result is encoded.
        metrics: Which of the bundle's metrics are summed too, and how they are encoded.
        largest_cohort: Most devices in the round; decides how wide the lanes are.
        learning_rate: Broadcast to the port of that name instead of the bundle's.

    Raises:
        ConfigError: They do not fit together; the text names the key and says what to write.
        BadBundle: It is no bundle.
    """
    program = decode_bundle(bundle)
    if any(result.updates for result in program.results):
        raise ConfigError(
            f"update: bundle {program.name!r} trains a model; add the table [update] with clip_norm, "
            "half_range and weight_cap"
        )
    _check_rate(program, learning_rate)
    _check_encodings("results", results, [result.name for result in program.results], program)
    checked_metrics(program, dict.fromkeys(metrics))
    terms = {**results, **metrics}
    computation = build_sums(
        bundle,
        work=work,
        broadcast={} if learning_rate is None else {LEARNING_RATE: np.array([learning_rate], np.float32)},
        bounds={**{each: _bound(found) for each, found in terms.items()}, "weight": Bound(0, UNCAPPED_WEIGHT)},
        metrics=tuple(port.name for port in program.metrics if port.name in metrics),
        name=name,
        purpose=purpose,
    )
    return HostedSums(program, _encoded(lower(computation), purpose, terms, largest_cohort), collection)


# --- encodings and checks ---------------------------------------------------------------------------------------------


def _encoded(lowered: Lowered, purpose: str, terms: Mapping[str, SumTerms], largest_cohort: int) -> Lowered:
    """Return `lowered` with the encodings that the task file asks for, and all lines of its purpose."""
    aggregations = []
    for aggregation in lowered.aggregations:
        if found := terms.get(aggregation.name):
            lane: LaneName = "uint32" if largest_cohort * found.encoding.maximum < 2**32 else "uint64"
            aggregation = msgspec.structs.replace(
                aggregation, encoding=found.encoding, clip_norm=found.clip_norm, lane=lane
            )
        aggregations.append(aggregation)
    return dataclasses.replace(lowered, purpose=purpose, aggregations=tuple(aggregations))


def _bound(terms: SumTerms) -> Bound:
    encoding: Encoding = terms.encoding
    match encoding:
        case Counted(maximum=maximum):
            return Bound(0, maximum)
        case Quantised(half_range=half_range):
            return Bound(-half_range, half_range)


def _trainable(bundle: bytes, learning_rate: float | None, results: Mapping[str, SumTerms]) -> Bundle:
    """Return the model in `bundle`, which can be trained at that rate and releases nothing."""
    model = decode_bundle(bundle)
    if not any(result.updates for result in model.results):
        raise ConfigError(
            f"bundle {model.name!r} only sums and updates no model; leave out [update] and set rounds = 1"
        )
    _check_rate(model, learning_rate)
    plain = [result.name for result in model.results if not result.updates]
    if unknown := set(results) - set(plain):
        raise ConfigError(_no_such("results", unknown, plain, model))
    if results:
        raise ConfigError(f"results.{sorted(results)[0]}: training releases no sums; remove the table [results]")
    initial_model(model)
    return model


def _server_optimizer(name: str, options: Mapping[str, float]) -> ServerOptimizer:
    try:
        return by_name(name, options)
    except ConfigError as error:
        raise ConfigError(f"optimizer: {error}") from error


def _check_rate(bundle: Bundle, learning_rate: float | None) -> None:
    if learning_rate is not None and LEARNING_RATE not in {port.name for port in bundle.broadcast}:
        raise ConfigError(f"optimizer.learning_rate: bundle {bundle.name!r} has no port {LEARNING_RATE!r}; remove it")


def _check_moments(model: Bundle, moments: Bundle, results: Mapping[str, SumTerms]) -> None:
    try:
        sums = moment_types(moments).elements[1][1]
    except ConfigError as error:
        raise ConfigError(f"standardise.bundle: {error}") from error
    kinds = dict(model_type(model).elements)
    for name in ("mean", "variance"):
        kind = kinds.get(name)
        if not isinstance(kind, TensorType) or not isinstance(sums, TensorType):
            raise ConfigError(f"standardise: the task's bundle has no broadcast port {name!r}; remove the table")
        if sums.shape != kind.shape:
            raise ConfigError(f"standardise.bundle: it sums {sums}, but {name!r} is {kind}")
    _check_encodings("standardise.results", results, MOMENTS, moments)


def _check_encodings(table: str, terms: Mapping[str, SumTerms], known: Iterable[str], bundle: Bundle) -> None:
    names = list(known)
    if unknown := set(terms) - set(names):
        raise ConfigError(_no_such(table, unknown, names, bundle))
    for name in names:
        if name not in terms:
            raise ConfigError(f"{table}.{name}: say how it is encoded: maximum, or half_range and bits")


def _no_such(table: str, unknown: Iterable[str], known: Iterable[str], bundle: Bundle) -> str:
    named = ", ".join(known) or "none"
    return f"{table}.{sorted(unknown)[0]}: bundle {bundle.name!r} has no such name; it has {named}"
