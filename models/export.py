"""An unmodified Keras model -> a bundle that trains with TFLite built-ins only, proven equal to Keras.

    bundle = export(model, loss="sparse_categorical_crossentropy", optimizer="sgd", path=Path("model.svp"))

The model is traced, not rewritten by its author: `models.keras_tracing` records its operations, `models.gradients`
makes them again with gradients that devices have. Five self-test steps are computed by Keras itself, eagerly, with its
own optimizer; the bundle is run on this machine's TFLite runtime, and is only written where both agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from models.gradients import OTHERWISE, CannotTrain, layer_of
from models.keras_reference import reference_of
from models.keras_training import Training, functions_of, state_of, training_of
from models.program_export import DELTA, ProgramSource, export_program, port_of, scalar_ports, seed_of
from sottovoce.bundle import Bundle, Port, Result, encode_bundle
from sottovoce.errors import BadBundle, SelfTestFailed
from sottovoce.types import Array

BATCH_SIZES = (4, 1, 3, 1, 2)
"""Batch sizes of the self-test's five steps."""
_TOLERANCE = 1e-4
_DRAWS = tuple((scale, share) for share in (1.0, 0.3, 0.1, 0.03) for scale in (1.0, 1.0, 255.0))
"""Scale of the features, and share of the learning rate, of one draw after the other; see `_telling`."""
_ROUNDING = 3e-6
"""By how much a weight is moved, relatively: ten times what two machines round differently, so that one try tells."""


def export(
    model: Any,
    *,
    loss: Any,
    optimizer: Any = "sgd",
    metrics: Any = None,
    loss_weights: Any = None,
    batch_spec: Mapping[str, str] | None = None,
    path: Path | None = None,
    name: str = "",
    description: str = "",
    proximal: float = 0.0,
    int8: bool = False,
) -> Bundle:
    """Return the bundle of a Keras model with all five roles, and write it to `path` if there is one.

    Broadcast: every trained weight and moving statistic, `learning_rate` float32[1]. Result: `delta`. Metrics: `loss`
    and what `metrics` says, summed over the batch; `evaluate` also counts `examples`. Layers that are not trainable
    are constants of the program: they are never sent, and not part of the update. Moving statistics of
    BatchNormalization are part of it, averaged as weights are. Of a Normalization that has not been adapted `mean` and
    `variance` are broadcast too, for the fleet to find out.

    Args:
        model: Built, with float32 weights; it is not changed.
        loss: As in `model.compile`: name or object, for several outputs a list in their order or a dict by their names.
        optimizer: As in `model.compile`: SGD (momentum, nesterov), Adam or AdamW, weight_decay, clipping.
        metrics: As in `model.compile`, accuracy (`correct`), mean_absolute_error (`absolute_error`) and
            mean_squared_error (`squared_error`); None counts `correct` for every output whose labels are classes.
        loss_weights: As in `model.compile`.
        batch_spec: Types of the features, in the model's order, as `{"x": "float32[?,28,28,1]"}`; None asks the model.
        path: Where the bundle goes.
        name: Of the bundle; None takes the model's.
        description: One sentence in plain words.
        proximal: FedProx's mu, at least 0.
        int8: Keep large weights of frozen layers as int8; what the bundle is held against is Keras with these.

    Raises:
        CannotTrain: The text names the layer and the cure.
        SelfTestFailed: The runtime's results are not those of Keras.
    """
    training = training_of(
        model,
        loss=loss,
        optimizer=optimizer,
        metrics=metrics,
        loss_weights=loss_weights,
        batch_spec=batch_spec,
        proximal=proximal,
        int8=int8,
    )
    bundle = bundle_of(source_of(training, name or model.name, description))
    if path is not None:
        path.write_bytes(encode_bundle(bundle))
    return bundle


def bundle_of(source: ProgramSource) -> Bundle:
    """Return the bundle of a program made of a Keras model.

    Raises:
        CannotTrain: Devices lack an operation; the text names the layer that makes it, and the cure.
        SelfTestFailed: The runtime's results are not those of Keras.
    """
    try:
        return export_program(source)
    except SelfTestFailed as error:
        raise SelfTestFailed(
            f"{source.name}: devices would not learn as Keras does ({error.tensor}, off by {error.difference:.3g}); "
            "a layer or loss acts otherwise outside of a graph, or its numbers are too large",
            tensor=error.tensor,
            difference=error.difference,
            tolerance=error.tolerance,
        ) from error
    except BadBundle as error:
        raise _named(error, source) from error


def _named(error: BadBundle, source: ProgramSource) -> BadBundle:
    """Return `error` with the layers that make the operations it names, or as it is where it names none."""
    missing = set(re.findall(r"\btf\.(\w+)", str(error)))
    kinds = {port.name: port.tensor_type for port in source.inputs("step")}
    specs = {name: tf.TensorSpec(kind.shape, kind.dtype) for name, kind in kinds.items()}
    step = tf.function(lambda **given: source.functions["step"](given), autograph=False)
    operations = step.get_concrete_function(**specs).graph.get_operations() if missing else []
    layers = sorted({layer_of(op.name) for op in operations if op.type in missing})
    if not layers:
        return error
    return CannotTrain(
        f"layer {', '.join(map(repr, layers))}: devices have no {', '.join(sorted(missing))}; {OTHERWISE}"
    )


def source_of(training: Training, name: str, description: str) -> ProgramSource:
    """Return the client program before conversion, with self-test vectors from Keras."""
    initial = training.initial()
    metrics = training.metrics
    deltas = tuple(port_of(DELTA + each, initial[each]) for each in training.learned)
    batch = (*training.traced.features, *training.labels)
    test_broadcast = {**_test_biases(training, initial, name), **_test_moments(training, name)}
    changed, batches = _telling(training, {**initial, **test_broadcast}, batch, name)
    return ProgramSource(
        name=name,
        description=description or f"A Keras model of {sum(initial[n].size for n in training.learned)} parameters.",
        functions=functions_of(training),
        broadcast=tuple(port_of(each, value) for each, value in initial.items()),
        state=state_of(training, initial),
        batch=batch,
        metrics=scalar_ports(*metrics),
        results=(Result(name="delta", ports=deltas, updates=training.learned),),
        features=tuple(port.name for port in training.traced.features),
        predictions=training.outputs,
        sums=scalar_ports(*metrics, "examples"),
        initial=initial,
        test_broadcast={**test_broadcast, **changed},
        test_batches=batches,
        reference=lambda broadcast, given: reference_of(training, broadcast, given),
        tolerance=_TOLERANCE,
    )


def _test_biases(training: Training, initial: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Return values for biases that are still zero, so that the self-test sees them and no two classes score alike.

    A deep backbone with random weights gives every class the same score but for rounding; which one is counted as
    `correct` would then be chance.
    """
    random = np.random.default_rng(seed_of(f"biases of {name}"))
    fresh = [each for each in training.traced.trained if initial[each].ndim == 1 and not initial[each].any()]
    return {each: random.normal(0.0, 0.1, initial[each].shape).astype(np.float32) for each in fresh}


def _test_moments(training: Training, name: str) -> dict[str, Array]:
    """Return other values for what is given: mean 0 and variance 1 would not show that they are used."""
    random = np.random.default_rng(seed_of(f"moments of {name}"))
    return {
        each: random.uniform(0.5, 1.5, variable.shape).astype(np.float32)
        for each, variable in training.traced.given.items()
    }


def _telling(
    training: Training, broadcast: Mapping[str, Array], ports: Sequence[Port], name: str
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """Return what else is broadcast, and the first draw of batches in which rounding does not decide what is learned.

    Behind BatchNormalization of a few examples a rectifier's input may lie so near to its edge that every runtime goes
    another way, and the steps that follow lead further and further apart. Some draws are of 0..255: under a Rescaling
    of pixels, those within +-1 all look alike. Where no draw of a learning rate will do, a lower rate is tried.
    """
    if not any(each.endswith("moving_variance") for each in training.traced.statistics):
        return {}, random_batches(ports, name)
    found: list[tuple[float, dict[str, Array], list[dict[str, Array]]]] = []
    for attempt, (scale, share) in enumerate(_DRAWS):
        batches = random_batches(ports, f"{name} {attempt}" if attempt else name, scale=scale)
        changed = {"learning_rate": broadcast["learning_rate"] * np.float32(share)} if share < 1.0 else {}
        doubt = _doubt(training, {**broadcast, **changed}, batches)
        found.append((doubt, changed, batches))
        if doubt <= _TOLERANCE / 4:
            break
    _, changed, batches = min(found, key=lambda one: one[0])
    return changed, batches


def _doubt(training: Training, broadcast: Mapping[str, Array], batches: Sequence[Mapping[str, Array]]) -> float:
    """Return how far apart Keras comes from weights that differ by rounding, infinite where it meets no numbers."""
    random = np.random.default_rng(0)
    near = {
        n: (v * random.uniform(1 - _ROUNDING, 1 + _ROUNDING, v.shape)).astype(v.dtype) for n, v in broadcast.items()
    }
    here, there = (reference_of(training, each, batches) for each in (broadcast, near))
    furthest = max(float(np.abs(here[each] - there[each]).max(initial=0.0)) for each in here)
    return furthest if np.isfinite(furthest) else float("inf")


def random_batches(
    ports: Sequence[Port], name: str, sizes: Sequence[int] = BATCH_SIZES, *, scale: float = 1.0
) -> list[dict[str, Array]]:
    """Return batches of `sizes` of random examples that fit `ports`; float labels are one class of each row.

    Args:
        ports: Features and labels.
        name: The seed.
        sizes: Number of examples of each batch.
        scale: Features that are no whole numbers are within +-1, or from 0 to `scale` where it is larger.
    """
    random = np.random.default_rng(seed_of(f"batches of {name}"))
    return [{port.name: _draw(random, port, size, scale) for port in ports} for size in sizes]


def _draw(random: np.random.Generator, port: Port, size: int, scale: float) -> Array:
    kind = port.tensor_type
    shape = [size if length is None else length for length in kind.shape]
    if kind.numpy_dtype.kind == "f":
        if port.name.startswith("y") and shape[-1] > 1:
            return np.eye(shape[-1], dtype=np.float32)[random.integers(shape[-1], size=shape[:-1])]
        if port.name.startswith("y"):
            return random.uniform(0.0, 1.0, shape).astype(np.float32)
        return random.uniform(0.0 if scale > 1.0 else -1.0, scale, shape).astype(np.float32)
    high = 1 if port.high is None else port.high
    return random.integers(0, high + 1, shape).astype(kind.numpy_dtype)
