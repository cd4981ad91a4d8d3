"""From TensorFlow functions to a bundle that a device can run and check without TensorFlow.

`export_program` takes the pure functions of a program, converts them with TFLite built-ins only (batch size unknown),
adds self-test vectors computed by TensorFlow itself, runs them on this machine's TFLite runtime, and returns the bundle
only if they agree. Keras models (`models.export`), computations, moments and counting all become bundles here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from models.conversion import SIGNATURE, flatbuffer_of
from models.ops import Tensor
from sottovoce.blobs import digest_of
from sottovoce.bundle import (
    FORMAT,
    Bundle,
    ClientState,
    Port,
    Result,
    Role,
    RoleName,
    SelfTest,
    decode_bundle,
    encode_bundle,
)
from sottovoce.runtime import open_program, run_self_test, sampled
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array, TensorType

Tensors: TypeAlias = Mapping[str, Tensor]
Arrays: TypeAlias = Mapping[str, Array]
Function: TypeAlias = Callable[[Tensors], Tensors]

LOCAL = "local_"
"""The state's ports are the broadcast's with this prefix."""
DELTA = "delta_"
"""The ports of the result `delta` are the trained broadcast ports with this prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSource:
    """A client program before conversion: everything of a `Bundle`, with functions where it has flatbuffers.

    Attributes:
        name: For people.
        description: One sentence in plain words.
        functions: Role -> pure function of named tensors, in TFLite built-ins.
        broadcast: As in Bundle; so are the ports, results and names that follow.
        initial: The first value of every broadcast port.
        test_broadcast: Values the self-test uses instead of `initial`, by port.
        test_batches: What `step` is fed in the self-test.
        reference: TensorFlow's own answer: (broadcast, batches) -> every result port, every metric summed.
        tolerance: Largest allowed absolute difference from `reference`.
        client_state: The slot that the program reads in `begin` and whose `next_` ports `finish` returns, if any.
        test_client_state: Values the self-test uses instead of the slot's `initial`, by port.
    """

    name: str
    description: str
    functions: Mapping[RoleName, Function]
    broadcast: tuple[Port, ...]
    state: tuple[Port, ...]
    batch: tuple[Port, ...]
    results: tuple[Result, ...]
    initial: Arrays
    test_batches: Sequence[Arrays]
    reference: Callable[[Arrays, Sequence[Arrays]], Arrays]
    tolerance: float
    test_broadcast: Arrays
    metrics: tuple[Port, ...] = ()
    features: tuple[str, ...] = ()
    predictions: tuple[Port, ...] = ()
    sums: tuple[Port, ...] = ()
    client_state: ClientState | None = None
    test_client_state: Arrays = field(default_factory=dict)

    def inputs(self, role: RoleName) -> tuple[Port, ...]:
        """The ports that `role` reads, in the order of its signature."""
        features = tuple(port for port in self.batch if port.name in self.features)
        kept = self.client_state.ports if self.client_state else ()
        groups: dict[RoleName, tuple[Port, ...]] = {
            "begin": self.broadcast + kept,
            "step": self.state + self.batch,
            "finish": self.state + self.broadcast,
            "infer": self.broadcast + features,
            "evaluate": self.broadcast + self.batch,
        }
        return groups[role]


def export_program(source: ProgramSource) -> Bundle:
    """Return the bundle of `source`, checked on this machine's TFLite runtime.

    Each role has a flatbuffer of its own: where one subgraph only passes its inputs on (as `begin` does), the runtime
    gives up its XNNPACK delegate for the whole file, and a step takes ten times as long.

    Raises:
        BadBundle: A function needs an operation that is not a TFLite built-in, or ports and functions do not fit.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    expected = source.reference({**source.initial, **source.test_broadcast}, source.test_batches)
    bundle = Bundle(
        format=FORMAT,
        name=source.name,
        description=source.description,
        flatbuffers={role: _converted(source, role) for role in source.functions},
        roles={role: Role(flatbuffer=role, signature=SIGNATURE) for role in source.functions},
        broadcast=source.broadcast,
        state=source.state,
        batch=source.batch,
        metrics=source.metrics,
        results=source.results,
        initial=encode_tensors(source.initial),
        self_test=SelfTest(
            broadcast=encode_tensors(source.test_broadcast),
            batches=tuple(encode_tensors(batch) for batch in source.test_batches),
            expected=encode_tensors({name: sampled(value) for name, value in expected.items()}),
            tolerance=source.tolerance,
            client_state=encode_tensors(source.test_client_state),
        ),
        features=source.features,
        predictions=source.predictions,
        sums=source.sums,
        client_state=source.client_state,
    )
    bundle = decode_bundle(encode_bundle(bundle))
    run_self_test(bundle, open_program(bundle))
    return bundle


def seed_of(name: str) -> int:
    """Return the seed for everything drawn in the export of `name`, so that an export can be repeated."""
    return int.from_bytes(digest_of(name.encode())[:8], "big")


def port_of(name: str, value: Array) -> Port:
    """Return the port of `value`'s type."""
    return Port(name=name, type=str(TensorType(str(value.dtype), value.shape)))


def scalar_ports(*names: str) -> tuple[Port, ...]:
    """Return one port float32[1] for each name."""
    return tuple(Port(name=name, type="float32[1]") for name in names)


def take(names: Iterable[str], tensors: Tensors, *, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of `names`, which are called `prefix` + name."""
    return {name: tensors[prefix + name] for name in names}


def run_with_tensorflow(
    functions: Mapping[RoleName, Function],
    broadcast: Arrays,
    batches: Sequence[Arrays],
    *,
    metrics: Sequence[str] = (),
    client_state: Arrays = MappingProxyType({}),
) -> Arrays:
    """Return what `finish` and the summed metrics must be, by TensorFlow's eager operations.

    Args:
        functions: `begin`, `step` and `finish`, with their own gradients.
        broadcast: One array for each broadcast port.
        batches: What `step` is fed.
        metrics: Names of the outputs of `step` that are summed rather than passed on.
        client_state: One array for each client-state port.
    """
    state = functions["begin"](_constants({**broadcast, **client_state}))
    totals = {name: np.zeros(1, np.float32) for name in metrics}
    for batch in batches:
        outputs = functions["step"]({**state, **_constants(batch)})
        state = {name: outputs[name] for name in state}
        totals = {name: total + outputs[name].numpy() for name, total in totals.items()}
    finished = functions["finish"]({**state, **broadcast})
    return {**{name: value.numpy() for name, value in finished.items()}, **totals}


def _constants(arrays: Arrays) -> dict[str, Tensor]:
    return {name: tf.constant(value) for name, value in arrays.items()}


def _converted(source: ProgramSource, role: RoleName) -> bytes:
    inputs = [(port.name, port.tensor_type) for port in source.inputs(role)]
    return flatbuffer_of(source.functions[role], inputs, what=f"{source.name}, {role}")
