"""Bundles (`.svp`): a client program as data, addressed by its SHA-256.

A client program is a set of TFLite signatures that are pure functions of built-in ops (no state inside):

    begin(broadcast...) -> state...
    step(state..., batch...) -> state..., metrics...        once per local batch
    finish(state..., broadcast...) -> result...
    infer(broadcast..., features...) -> predictions...      a model's program also carries these two
    evaluate(broadcast..., batch...) -> sums...

A program with client state keeps values on the device from one round to the next; they never leave it as they are:

    begin(broadcast..., client_state...) -> state...
    finish(state..., broadcast...) -> result..., next_client_state...

Every rank-0 value travels as shape [1] (a rank-0 signature input crashes the aarch64 LiteRT wheel).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from sottovoce.blobs import MAX_BLOB_BYTES, Document, canonical, digest_of
from sottovoce.errors import BadBundle, ConfigError, MalformedMessage
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array, TensorType

FORMAT = "sottovoce-program/1"
RoleName: TypeAlias = Literal["begin", "step", "finish", "infer", "evaluate"]
NEXT = "next_"
"""`finish` returns the new value of the client-state port `p` as `next_p`."""
MAX_CLIENT_STATE_BYTES = 16 * 1024 * 1024
"""No slot is larger; what a device really keeps is for its owner's policy to say."""
_SLOT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOTHING = encode_tensors({})


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
        return _parsed(self.type)


@functools.lru_cache(maxsize=1024)
def _parsed(notation: str) -> TensorType:
    """Return the type; kept, because every step holds every port against it."""
    return TensorType.parse(notation)


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


class ClientState(Document, frozen=True):
    """A named slot in which the program keeps values on the device from one round to the next.

    Attributes:
        slot: Its name, 1 to 64 characters of A-Z a-z 0-9 _ -; programs that name the same slot share it.
        version: At least 1. A value that another version has kept is not read: the program starts from `initial`.
        ports: What is kept, fully known shapes: inputs of `begin`, and with the prefix `next_` outputs of `finish`.
        initial: Named tensors: the value of every port before the first committed one.
        maximum_bytes: What the author lets the slot grow to, `initial` included; the owner's policy has the last word.
    """

    slot: str
    version: int
    ports: tuple[Port, ...]
    initial: bytes
    maximum_bytes: int

    @property
    def next_ports(self) -> tuple[Port, ...]:
        """The outputs of `finish` that carry the new values, in the order of `ports`."""
        return tuple(msgspec.structs.replace(port, name=NEXT + port.name) for port in self.ports)

    @property
    def types(self) -> str:
        """Names and types of the ports, in order: programs share a slot only where these agree."""
        return ", ".join(f"{port.name} {port.type}" for port in self.ports)


class SelfTest(Document, frozen=True):
    """Inputs and expected results of a few steps; a device runs them on its own runtime before it takes part.

    Attributes:
        broadcast: Named tensors (`sottovoce.tensors`) given to `begin` and `finish`; ports that are not in it take
            their `initial` value, so that weights are stored once.
        batches: One blob of named tensors for each step.
        expected: Named tensors: every port of every result, each metric summed over the steps under its own name;
            large tensors as `sottovoce.runtime.sampled` represents them.
        tolerance: Largest allowed absolute difference.
        client_state: Named tensors given to `begin`; ports that are not in it take their `initial` value. The new
            values are expected under the names of `ClientState.next_ports`.
    """

    broadcast: bytes
    batches: tuple[bytes, ...]
    expected: bytes
    tolerance: float
    client_state: bytes = _NOTHING


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
        client_state: The slot that the program reads and writes, None for most.
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
    client_state: ClientState | None = None

    @property
    def result_ports(self) -> tuple[Port, ...]:
        """The outputs of `finish` that are results, in order."""
        return tuple(port for result in self.results for port in result.ports)

    @property
    def client_state_ports(self) -> tuple[Port, ...]:
        """What `begin` reads of the slot; nothing without one."""
        return self.client_state.ports if self.client_state else ()

    @property
    def next_client_state_ports(self) -> tuple[Port, ...]:
        """What `finish` returns for the slot; nothing without one."""
        return self.client_state.next_ports if self.client_state else ()


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


def check_client_state(kept: ClientState, values: Mapping[str, Array]) -> None:
    """Raise BadBundle unless `values` are one array for each port of `kept`, of its type, finite, and no more."""
    ports = {port.name: port.tensor_type for port in kept.ports}
    if set(values) != set(ports):
        raise BadBundle(f"client state {kept.slot!r} keeps {', '.join(ports)}, not {', '.join(values) or 'nothing'}")
    for name, value in values.items():
        if not ports[name].admits(value) or not np.all(np.isfinite(value)):
            raise BadBundle(f"client state {kept.slot!r}: {name!r} must be a finite {ports[name]}")


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
    _check_ports(bundle)
    if {port.name for port in bundle.metrics} & {result.name for result in bundle.results}:
        raise BadBundle("a metric and a result have the same name")
    names = {port.name: port.type for port in bundle.broadcast}
    for result in bundle.results:
        if result.updates and [names.get(u) for u in result.updates] != [port.type for port in result.ports]:
            raise BadBundle(f"result {result.name!r} does not match the broadcast ports it updates")
    if bundle.client_state is not None:
        _check_client_state(bundle.client_state)


def _check_ports(bundle: Bundle) -> None:
    finished = bundle.result_ports + bundle.next_client_state_ports
    groups = (
        bundle.broadcast,
        bundle.state,
        bundle.batch,
        bundle.metrics,
        bundle.client_state_ports,
        finished,
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
        (bundle.broadcast, bundle.client_state_ports),
    ):
        if len({port.name for ports in together for port in ports}) != sum(map(len, together)):
            raise BadBundle("two ports of one signature have the same name")


def _check_client_state(kept: ClientState) -> None:
    where = f"client state {kept.slot!r}"
    if not _SLOT.fullmatch(kept.slot):
        raise BadBundle(f"{where}: a slot's name must be 1 to 64 characters of A-Z a-z 0-9 _ -")
    if kept.version < 1:
        raise BadBundle(f"{where}: its version must be at least 1, not {kept.version}")
    if not kept.ports or any(None in port.tensor_type.shape for port in kept.ports):
        raise BadBundle(f"{where}: it needs at least one port, and every shape fully known")
    if not len(kept.initial) <= kept.maximum_bytes <= MAX_CLIENT_STATE_BYTES:
        raise BadBundle(
            f"{where}: it takes {len(kept.initial)} bytes, so maximum_bytes must be from there to "
            f"{MAX_CLIENT_STATE_BYTES}, not {kept.maximum_bytes}"
        )
    try:
        initial = decode_tensors(kept.initial)
    except MalformedMessage as error:
        raise BadBundle(f"{where}: its initial value: {error}") from error
    check_client_state(kept, initial)
