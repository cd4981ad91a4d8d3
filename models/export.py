"""From TensorFlow functions to a bundle that a device can run and check without TensorFlow.

`export` takes the pure functions of a program, converts them with TFLite built-ins only (batch size unknown), adds
self-test vectors computed by TensorFlow itself, runs them on this machine's TFLite runtime, and returns the bundle
only if they agree. `export_model` writes those functions for a classifier: SGD on the mean cross-entropy of a batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from models.ops import BuiltIns, Operations, Plain, Tensor
from sottovoce.bundle import FORMAT, Bundle, Port, Result, Role, RoleName, SelfTest, decode_bundle, encode_bundle
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
_LOCAL = "local_"
_DELTA = "delta_"


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

    def inputs(self, role: RoleName) -> tuple[Port, ...]:
        """The ports that `role` reads, in the order of its signature."""
        features = tuple(port for port in self.batch if port.name in self.features)
        groups: dict[RoleName, tuple[Port, ...]] = {
            "begin": self.broadcast,
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


def export(source: ProgramSource) -> Bundle:
    """Return the bundle of `source`, checked on this machine's TFLite runtime.

    Raises:
        BadBundle: A function needs an operation that is not a TFLite built-in, or ports and functions do not fit.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    expected = source.reference({**source.initial, **source.test_broadcast}, source.test_batches)
    bundle = Bundle(
        format=FORMAT,
        name=source.name,
        description=source.description,
        flatbuffers={role: _convert(source, role) for role in source.functions},
        roles={role: Role(flatbuffer=role, signature=role) for role in source.functions},
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
        ),
        features=source.features,
        predictions=source.predictions,
        sums=source.sums,
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
    broadcast = tuple(_port(name, value) for name, value in initial.items())
    deltas = tuple(_port(_DELTA + name, value) for name, value in model.weights.items())
    return export(
        ProgramSource(
            name=model.name,
            description=model.description,
            functions={role: _role_of(role, model, BuiltIns()) for role in _MODEL_ROLES},
            broadcast=broadcast,
            state=tuple(_port(_LOCAL + name, value) for name, value in initial.items()),
            batch=(Port(name="x", type=model.features), Port(name="y", type="int32[?]", low=0, high=model.classes - 1)),
            metrics=_scalars("loss", "correct"),
            results=(Result(name="delta", ports=deltas, updates=tuple(model.weights)),),
            features=("x",),
            predictions=(Port(name="probabilities", type=f"float32[?,{model.classes}]"),),
            sums=_scalars("loss", "correct", "examples"),
            initial=initial,
            test_broadcast=model.test_constants,
            test_batches=_random_batches(model),
            reference=lambda broadcast, batches: _train_with_tensorflow(model, broadcast, batches),
            tolerance=1e-4,
        )
    )


def seed_of(name: str) -> int:
    """Return the seed for everything drawn in the export of `name`, so that an export can be repeated."""
    return int.from_bytes(digest_of(name.encode())[:8], "big")


def _port(name: str, value: Array) -> Port:
    return Port(name=name, type=str(TensorType(str(value.dtype), value.shape)))


def _scalars(*names: str) -> tuple[Port, ...]:
    return tuple(Port(name=name, type="float32[1]") for name in names)


def _random_batches(model: Model) -> list[dict[str, Array]]:
    """Draw a few random examples once and train on the first ones of them again and again, so that some come right."""
    random = np.random.default_rng(seed_of(f"self-test of {model.name}"))
    shape = [d for d in TensorType.parse(model.features).shape[1:] if d is not None]
    x = random.uniform(*model.feature_range, (max(_SELF_TEST_BATCHES), *shape)).astype(np.float32)
    y = random.integers(model.classes, size=len(x), dtype=np.int32)
    return [{"x": x[:size], "y": y[:size]} for size in _SELF_TEST_BATCHES]


# --- The five roles of a classifier. `take` reads the named tensors of one kind, with or without the local prefix.


def _take(names: Mapping[str, object], tensors: Tensors, *, prefix: str = "") -> dict[str, Tensor]:
    return {name: tensors[prefix + name] for name in names}


def _begin(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    return {_LOCAL + name: tf.identity(value) for name, value in tensors.items()}


def _step(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    weights = _take(model.weights, tensors, prefix=_LOCAL)
    constants = _take(model.constants, tensors, prefix=_LOCAL)
    learning_rate = tensors[_LOCAL + "learning_rate"]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        logits = model.forward(operations, weights, constants, tensors["x"])
        losses = operations.softmax_cross_entropy(logits, tensors["y"])
        mean_loss = tf.reduce_mean(losses)
    gradients = tape.gradient(mean_loss, weights)
    trained = {_LOCAL + name: weights[name] - learning_rate * gradients[name] for name in weights}
    kept = {_LOCAL + name: tf.identity(value) for name, value in constants.items()}
    return {
        **trained,
        **kept,
        _LOCAL + "learning_rate": tf.identity(learning_rate),
        **_scores(logits, losses, tensors["y"]),
    }


def _finish(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    return {_DELTA + name: tensors[_LOCAL + name] - tensors[name] for name in model.weights}


def _infer(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    logits = model.forward(operations, _take(model.weights, tensors), _take(model.constants, tensors), tensors["x"])
    return {"probabilities": tf.nn.softmax(logits)}


def _evaluate(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    logits = model.forward(operations, _take(model.weights, tensors), _take(model.constants, tensors), tensors["x"])
    losses = operations.softmax_cross_entropy(logits, tensors["y"])
    return {**_scores(logits, losses, tensors["y"]), "examples": _sum(tf.ones_like(losses))}


_MODEL_ROLES: Mapping[RoleName, Callable[[Model, Operations, Tensors], Tensors]] = {
    "begin": _begin,
    "step": _step,
    "finish": _finish,
    "infer": _infer,
    "evaluate": _evaluate,
}


def _role_of(role: RoleName, model: Model, operations: Operations) -> Function:
    return lambda tensors: _MODEL_ROLES[role](model, operations, tensors)


def _scores(logits: Tensor, losses: Tensor, labels: Tensor) -> dict[str, Tensor]:
    hits = tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)
    return {"loss": _sum(losses), "correct": _sum(tf.cast(hits, tf.float32))}


def _sum(values: Tensor) -> Tensor:
    return tf.reshape(tf.reduce_sum(values), [1])


def _train_with_tensorflow(model: Model, broadcast: Arrays, batches: Sequence[Arrays]) -> Arrays:
    """Return what `finish` and the metrics must be, from TensorFlow's eager operations and its own gradients."""
    plain = Plain()
    state = _begin(model, plain, {name: tf.constant(value) for name, value in broadcast.items()})
    metrics = {"loss": np.zeros(1, np.float32), "correct": np.zeros(1, np.float32)}
    for batch in batches:
        outputs = _step(model, plain, {**state, **{name: tf.constant(value) for name, value in batch.items()}})
        state = {name: outputs[name] for name in state}
        metrics = {name: total + outputs[name].numpy() for name, total in metrics.items()}
    deltas = _finish(model, plain, {**state, **broadcast})
    return {**{name: delta.numpy() for name, delta in deltas.items()}, **metrics}


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


def _trace(function: Function, ports: Sequence[Port]) -> Tensor:
    types = {port.name: port.tensor_type for port in ports}
    specs = {name: tf.TensorSpec(kind.shape, kind.dtype, name=name) for name, kind in types.items()}
    return tf.function(lambda **tensors: function(tensors), autograph=False).get_concrete_function(**specs)
