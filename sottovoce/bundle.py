"""Bundles (`.svp`): a client program as data, addressed by its SHA-256.

A client program is a set of TFLite signatures that are pure functions of built-in ops (no state inside):

    begin(broadcast...) -> state...
    step(state..., batch...) -> state..., metrics...        once per local batch
    finish(state..., broadcast...) -> result...
    infer(broadcast..., features...) -> predictions...      a model's program also carries these two
    evaluate(broadcast..., batch...) -> sums...

Every rank-0 value travels as shape [1] (a rank-0 signature input crashes the aarch64 LiteRT wheel).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from sottovoce.errors import BadBundle, ConfigError
from sottovoce.plan import MAX_BLOB_BYTES, Document, canonical, digest_of
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array, TensorType

FORMAT = "sottovoce-program/1"
RoleName: TypeAlias = Literal["begin", "step", "finish", "infer", "evaluate"]


class Port(Document, frozen=True):
    """One input or output of a program: its name in the signature, its type, and bounds of an integer label.

    Attributes:
        name: Identifier, unique within its group.
        type: In the notation; the batch dimension is `?`.
        low: Smallest allowed value, None where any finite value is fine.
        high: Largest allowed value.
    """

    name: str
    type: str
    low: int | None = None
    high: int | None = None

    @property
    def tensor_type(self) -> TensorType:
        """The parsed type."""
        return TensorType.parse(self.type)


class Result(Document, frozen=True):
    """One named result of `finish`: the output ports that make it up, and the broadcast ports that it updates.

    Attributes:
        name: The name an aggregation uses, for a model `delta`.
        ports: Outputs of `finish`, in order.
        updates: Names of the broadcast ports that these are added to, one for one; empty for plain sums.
    """

    name: str
    ports: tuple[Port, ...]
    updates: tuple[str, ...] = ()


class Role(Document, frozen=True):
    """Where a role lives: which flatbuffer, which signature of it."""

    flatbuffer: str
    signature: str


class SelfTest(Document, frozen=True):
    """Inputs and expected results of a few steps; a device runs them on its own runtime before it takes part.

    Attributes:
        broadcast: Named tensors (`sottovoce.tensors`) given to `begin` and `finish`; ports that are not in it take
            their `initial` value, so that weights are stored once.
        batches: One blob of named tensors for each step.
        expected: Named tensors: every port of every result, each metric summed over the steps under its own name;
            large tensors as `sottovoce.runtime.sampled` represents them.
        tolerance: Largest allowed absolute difference.
    """

    broadcast: bytes
    batches: tuple[bytes, ...]
    expected: bytes
    tolerance: float


class Bundle(Document, frozen=True):
    """A client program with everything a device needs to run and test it.

    Attributes:
        format: FORMAT.
        name: For people.
        description: One sentence in plain words.
        flatbuffers: Name -> TFLite flatbuffer.
        roles: Role -> signature; a model has all five, an analytics program the first three.
        broadcast: What the coordinator broadcasts, in order.
        state: What goes from step to step.
        batch: One batch of examples; the first dimension of each is the batch.
        metrics: Sums that every step returns, shape [1] each.
        results: What `finish` returns.
        features: The names among `batch` that `infer` takes.
        predictions: What `infer` returns.
        sums: What `evaluate` returns, shape [1] each.
        initial: Named tensors: the first value of every broadcast port.
        self_test: See SelfTest.
    """

    format: str
    name: str
    description: str
    flatbuffers: Mapping[str, bytes]
    roles: Mapping[RoleName, Role]
    broadcast: tuple[Port, ...]
    state: tuple[Port, ...]
    batch: tuple[Port, ...]
    metrics: tuple[Port, ...]
    results: tuple[Result, ...]
    initial: bytes
    self_test: SelfTest
    features: tuple[str, ...] = ()
    predictions: tuple[Port, ...] = ()
    sums: tuple[Port, ...] = ()

    @property
    def result_ports(self) -> tuple[Port, ...]:
        """All outputs of `finish`, in order."""
        return tuple(port for result in self.results for port in result.ports)


def encode_bundle(bundle: Bundle) -> bytes:
    """Return the canonical bytes of `bundle`; their SHA-256 is its name."""
    return canonical(bundle)


def decode_bundle(content: bytes) -> Bundle:
    """Parse the bytes of a bundle.

    Raises:
        BadBundle: Not a bundle of this version, or its roles, types and names do not fit together.
    """
    if len(content) > MAX_BLOB_BYTES:
        raise BadBundle(f"a bundle of {len(content)} bytes is larger than {MAX_BLOB_BYTES}")
    try:
        bundle = msgspec.msgpack.decode(content, type=Bundle)
        _check(bundle)
    except (msgspec.ValidationError, msgspec.DecodeError, ConfigError) as error:
        raise BadBundle(f"not a bundle of this version: {error}") from error
    return bundle


def with_initial(bundle: Bundle, initial: Mapping[str, Array]) -> Bundle:
    """Return `bundle` with other initial values, for example a trained model; its self-test keeps the old ones.

    Args:
        bundle: A checked bundle.
        initial: New values of some or all broadcast ports.

    Raises:
        BadBundle: A name is not a broadcast port, or its value is not of the port's type.
    """
    ports = {port.name: port.tensor_type for port in bundle.broadcast}
    for name, value in initial.items():
        if name not in ports or not ports[name].admits(value):
            raise BadBundle(f"{name!r} ({value.dtype}{list(value.shape)}) is not a broadcast value of {bundle.name!r}")
    before = decode_tensors(bundle.initial)
    self_test = msgspec.structs.replace(
        bundle.self_test, broadcast=encode_tensors({**before, **decode_tensors(bundle.self_test.broadcast)})
    )
    return msgspec.structs.replace(bundle, initial=encode_tensors({**before, **initial}), self_test=self_test)


def read_bundle(path: Path) -> tuple[Bundle, bytes]:
    """Return the bundle in the file `path` and its digest.

    Raises:
        ConfigError: There is no such file.
        BadBundle: It is not a bundle.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the bundle {path}: {error.strerror}") from error
    return decode_bundle(content), digest_of(content)


def _check(bundle: Bundle) -> None:
    if bundle.format != FORMAT:
        raise BadBundle(f"format {bundle.format!r}; this release reads {FORMAT!r}")
    if missing := {"begin", "step", "finish"} - set(bundle.roles):
        raise BadBundle(f"roles are missing: {', '.join(sorted(missing))}")
    if unknown := {role.flatbuffer for role in bundle.roles.values()} - set(bundle.flatbuffers):
        raise BadBundle(f"roles name flatbuffers that are not there: {', '.join(sorted(unknown))}")
    groups = (
        bundle.broadcast,
        bundle.state,
        bundle.batch,
        bundle.metrics,
        bundle.result_ports,
        bundle.predictions,
        bundle.sums,
    )
    for ports in groups:
        if len({port.name for port in ports}) != len(ports):
            raise BadBundle("two ports of one group have the same name")
        for port in ports:
            if not port.tensor_type.shape:
                raise BadBundle(f"port {port.name!r} has rank 0; every scalar travels as shape [1]")
    if any(port.tensor_type.shape[0] is not None for port in bundle.batch):
        raise BadBundle("the first dimension of every batch port must be unknown (?)")
    for together in (
        (bundle.broadcast, bundle.state),
        (bundle.broadcast, bundle.batch),
        (bundle.state, bundle.batch),
        (bundle.state, bundle.metrics),
    ):
        if len({port.name for ports in together for port in ports}) != sum(map(len, together)):
            raise BadBundle("two ports of one signature have the same name")
    if {port.name for port in bundle.metrics} & {result.name for result in bundle.results}:
        raise BadBundle("a metric and a result have the same name")
    names = {port.name: port.type for port in bundle.broadcast}
    for result in bundle.results:
        if result.updates and [names.get(u) for u in result.updates] != [port.type for port in result.ports]:
            raise BadBundle(f"result {result.name!r} does not match the broadcast ports it updates")
