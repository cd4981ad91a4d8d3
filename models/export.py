"""From TensorFlow functions to a bundle that a device can run and check without TensorFlow.

`export` takes the pure functions of a program, converts them with TFLite built-ins only (batch size unknown), adds
self-test vectors computed by TensorFlow itself, runs them on this machine's TFLite runtime, and returns the bundle
only if they agree. `export_model` writes those functions for a classifier: SGD on the mean cross-entropy of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from models.conversion import SIGNATURE, flatbuffer_of
from models.ops import BuiltIns, Operations, Plain, Tensor
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
from sottovoce.errors import BadBundle
from sottovoce.plan import digest_of
from sottovoce.runtime import open_program, run_self_test, sampled
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array, TensorType

Tensors: TypeAlias = Mapping[str, Tensor]
Arrays: TypeAlias = Mapping[str, Array]
Function: TypeAlias = Callable[[Tensors], Tensors]
Forward: TypeAlias = Callable[[Operations, Tensors, Tensors, Tensor], Tensor]

_SELF_TEST_BATCHES = (4, 1, 3, 1, 2)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A classifier: what it computes, its first weights, and how its features look.

    Attributes:
        name: For people.
        description: One sentence in plain words.
        features: Type of the features in the notation, first dimension `?`.
        feature_range: Between which values the self-test draws features.
        classes: Labels are 0 to classes - 1.
        weights: First values of what is trained, float32.
        constants: First values of what is broadcast beside them and not trained, float32.
        test_constants: Values of the constants in the self-test, so that it notices a constant that is not used.
        learning_rate: First learning rate of the client optimizer (SGD).
        forward: (operations, weights, constants, features) -> logits [b, classes].
    """

    name: str
    description: str
    features: str
    feature_range: tuple[float, float]
    classes: int
    weights: Arrays
    learning_rate: float
    forward: Forward
    constants: Arrays
    test_constants: Arrays


def export(source: ProgramSource, *, quickly: bool = False) -> Bundle:
    """Return the bundle of `source`, checked on this machine's TFLite runtime.

    Args:
        source: The program.
        quickly: Convert as `models.conversion` does, for the many small programs of computations.

    Raises:
        BadBundle: A function needs an operation that is not a TFLite built-in, or ports and functions do not fit.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    expected = source.reference({**source.initial, **source.test_broadcast}, source.test_batches)
    bundle = Bundle(
        format=FORMAT,
        name=source.name,
        description=source.description,
        flatbuffers={role: (_convert_quickly if quickly else _convert)(source, role) for role in source.functions},
        roles={role: Role(flatbuffer=role, signature=SIGNATURE if quickly else role) for role in source.functions},
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


def export_model(model: Model) -> Bundle:
    """Return the bundle of a classifier with all five roles.

    Broadcast: weights, constants, `learning_rate` float32[1]. Metrics of a step: `loss` and `correct`, summed over the
    batch. Result: `delta`, local minus broadcast weights. Sums of `evaluate`: `loss`, `correct`, `examples`.

    Raises:
        BadBundle: The forward pass uses an operation whose gradient is not a TFLite built-in.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    initial = {**model.weights, **model.constants, "learning_rate": np.array([model.learning_rate], np.float32)}
    broadcast = tuple(port_of(name, value) for name, value in initial.items())
    reference = {role: role_of(role, model, Plain()) for role in _MODEL_ROLES}
    deltas = tuple(port_of(DELTA + name, value) for name, value in model.weights.items())
    return export(
        ProgramSource(
            name=model.name,
            description=model.description,
            functions={role: role_of(role, model, BuiltIns()) for role in _MODEL_ROLES},
            broadcast=broadcast,
            state=tuple(port_of(LOCAL + name, value) for name, value in initial.items()),
            batch=(Port(name="x", type=model.features), Port(name="y", type="int32[?]", low=0, high=model.classes - 1)),
            metrics=scalar_ports("loss", "correct"),
            results=(Result(name="delta", ports=deltas, updates=tuple(model.weights)),),
            features=("x",),
            predictions=(Port(name="probabilities", type=f"float32[?,{model.classes}]"),),
            sums=scalar_ports("loss", "correct", "examples"),
            initial=initial,
            test_broadcast=model.test_constants,
            test_batches=random_batches(model),
            reference=lambda broadcast, batches: run_with_tensorflow(
                reference, broadcast, batches, metrics=("loss", "correct")
            ),
            tolerance=1e-4,
        )
    )


def seed_of(name: str) -> int:
    """Return the seed for everything drawn in the export of `name`, so that an export can be repeated."""
    return int.from_bytes(digest_of(name.encode())[:8], "big")


def port_of(name: str, value: Array) -> Port:
    """Return the port of `value`'s type."""
    return Port(name=name, type=str(TensorType(str(value.dtype), value.shape)))


def scalar_ports(*names: str) -> tuple[Port, ...]:
    """Return one port float32[1] for each name."""
    return tuple(Port(name=name, type="float32[1]") for name in names)


def random_batches(model: Model, *, sizes: Sequence[int] = _SELF_TEST_BATCHES) -> list[dict[str, Array]]:
    """Return batches of `sizes` for a self-test: of the same few random examples, so that some come right."""
    random = np.random.default_rng(seed_of(f"self-test of {model.name}"))
    shape = [d for d in TensorType.parse(model.features).shape[1:] if d is not None]
    x = random.uniform(*model.feature_range, (max(sizes), *shape)).astype(np.float32)
    y = random.integers(model.classes, size=len(x), dtype=np.int32)
    return [{"x": x[:size], "y": y[:size]} for size in sizes]


# --- The five roles of a classifier. `take` reads the named tensors of one kind, with or without the local prefix.


def take(names: Iterable[str], tensors: Tensors, *, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of `names`, which are called `prefix` + name."""
    return {name: tensors[prefix + name] for name in names}


def _begin(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    return {LOCAL + name: tf.identity(value) for name, value in tensors.items()}


def _step(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    weights = take(model.weights, tensors, prefix=LOCAL)
    constants = take(model.constants, tensors, prefix=LOCAL)
    learning_rate = tensors[LOCAL + "learning_rate"]
    slopes, logits, losses = gradients(model, operations, weights, constants, tensors)
    trained = {LOCAL + name: weights[name] - learning_rate * slopes[name] for name in weights}
    kept = {LOCAL + name: tf.identity(value) for name, value in constants.items()}
    return {
        **trained,
        **kept,
        LOCAL + "learning_rate": tf.identity(learning_rate),
        **scores(logits, losses, tensors["y"]),
    }


def _finish(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    return {DELTA + name: tensors[LOCAL + name] - tensors[name] for name in model.weights}


def _infer(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    logits = model.forward(operations, take(model.weights, tensors), take(model.constants, tensors), tensors["x"])
    return {"probabilities": tf.nn.softmax(logits)}


def _evaluate(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    logits = model.forward(operations, take(model.weights, tensors), take(model.constants, tensors), tensors["x"])
    losses = operations.softmax_cross_entropy(logits, tensors["y"])
    return {**scores(logits, losses, tensors["y"]), "examples": _sum(tf.ones_like(losses))}


_MODEL_ROLES: Mapping[RoleName, Callable[[Model, Operations, Tensors], Tensors]] = {
    "begin": _begin,
    "step": _step,
    "finish": _finish,
    "infer": _infer,
    "evaluate": _evaluate,
}


def role_of(role: RoleName, model: Model, operations: Operations) -> Function:
    """Return the function of one of a classifier's five roles, made of `operations`."""
    return lambda tensors: _MODEL_ROLES[role](model, operations, tensors)


def gradients(
    model: Model,
    operations: Operations,
    weights: Tensors,
    constants: Tensors,
    batch: Tensors,
    *,
    rows: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the gradient of the mean loss for every weight, the logits, and the loss of each example.

    Args:
        model: A classifier.
        operations: What its forward pass is made of.
        weights: Named as the model's.
        constants: Named as the model's.
        batch: `x` and `y`.
        rows: Weight of each example in the mean, float32 [b] with the sum 1; None weighs all alike.
    """
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = model.forward(operations, weights, constants, batch["x"])
        losses = operations.softmax_cross_entropy(logits, batch["y"])
        mean_loss = tf.reduce_mean(losses)
    # The gradient of `losses * rows` would need BroadcastGradientArgs, which TFLite does not have.
    found = tape.gradient(mean_loss, weights) if rows is None else tape.gradient(losses, weights, output_gradients=rows)
    return found, logits, losses


def scores(logits: Tensor, losses: Tensor, labels: Tensor, *, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Return `loss` and `correct`, summed over a batch or over `rows` (1.0 or 0.0 for each) of it, shape [1] each."""
    hits = tf.cast(tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels), tf.float32)
    found = {"loss": losses, "correct": hits}
    return {name: _sum(values if rows is None else values * rows) for name, values in found.items()}


def _sum(values: Tensor) -> Tensor:
    return tf.reshape(tf.reduce_sum(values), [1])


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
        functions: `begin`, `step` and `finish`, of `Plain` operations and their own gradients.
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


def _convert(source: ProgramSource, role: RoleName) -> bytes:
    """Return the flatbuffer of one role.

    Each role has its own: where one subgraph only passes its inputs on (as `begin` does), the runtime gives up its
    XNNPACK delegate for the whole file, and a step takes ten times as long.
    """
    traced = _trace(source.functions[role], source.inputs(role))
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(tf.Module(), folder, signatures={role: traced})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[role])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return bytes(converter.convert())
        except ConverterError as error:
            raise BadBundle(f"{source.name}, {role}: TFLite has no built-in for this: {error}") from error


def _convert_quickly(source: ProgramSource, role: RoleName) -> bytes:
    inputs = [(port.name, port.tensor_type) for port in source.inputs(role)]
    return flatbuffer_of(source.functions[role], inputs, what=f"{source.name}, {role}")


def _trace(function: Function, ports: Sequence[Port]) -> Tensor:
    types = {port.name: port.tensor_type for port in ports}
    specs = {name: tf.TensorSpec(kind.shape, kind.dtype, name=name) for name, kind in types.items()}
    return tf.function(lambda **tensors: function(tensors), autograph=False).get_concrete_function(**specs)
