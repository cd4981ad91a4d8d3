"""What of a Keras model will train on a device, layer by layer, before anything is converted.

`lint` traces the model, and for every layer says `trains`, `frozen`, `only infers` or `cannot run`, why, and what to do
about it. It goes by the operations that a layer really makes, not by its class, so a layer that its author wrote counts
like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal, TypeAlias

import tensorflow as tf
from tensorflow.python.framework.ops import get_gradient_function

from models.device_operations import CURES, DRAWS, FLAT, FORWARD, NEVER, THROUGH, UNSUITABLE
from models.gradients import OTHERWISE, RANDOM, CannotTrain, built_in_gradients, layer_of, needed, slopes
from models.gradients_registry import GRADIENTS, SUBSTITUTES, NoGradient, Operation
from models.keras_dropout import uniform_of
from models.keras_inputs import features_of
from models.keras_tracing import Traced, every_layer, trace

keras = tf.keras
Verdict: TypeAlias = Literal["trains", "frozen", "has no weights", "only infers", "cannot run"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What becomes of one layer.

    Attributes:
        layer: Its name.
        kind: Its class.
        verdict: What it does on a device.
        parameters: Number of its weights, those of layers within it included.
        problem: What stands in the way; empty where nothing does.
        cure: What to do about it.
    """

    layer: str
    kind: str
    verdict: Verdict
    parameters: int
    problem: str = ""
    cure: str = ""


def lint(model: Any, batch_spec: Mapping[str, str] | None = None) -> list[Finding]:
    """Return one finding for each layer of a Keras model, in its order.

    Args:
        model: See `models.export.export`.
        batch_spec: Likewise.

    Raises:
        CannotTrain: The model has no weights yet, or cannot be traced with an unknown batch size.
    """
    traced = trace(model, features_of(model, batch_spec))
    found = findings(traced)
    if any(finding.problem for finding in found):
        return found
    try:
        _rehearse(traced)
    except CannotTrain as error:
        if not isinstance(error.__cause__, NoGradient):
            raise
        cause = error.__cause__
        obstacle = _Obstacle("only infers", cause.problem, cause.cure or OTHERWISE)
        return findings(traced, {layer_of(cause.operation): obstacle})
    return found


@dataclass(frozen=True, slots=True)
class _Obstacle:
    verdict: Verdict
    problem: str
    cure: str


def findings(traced: Traced, known: Mapping[str, _Obstacle] | None = None) -> list[Finding]:
    """Return what becomes of each layer of a traced model, in its order, and of operations that belong to none.

    Args:
        traced: The model.
        known: What stands in the way, by layer; None looks for it.
    """
    obstacles = dict(_obstacles(traced) if known is None else known)
    listed = [layer for layer in every_layer(traced.model) if _counts(layer) or layer.name in obstacles]
    found = [_finding(layer, obstacles.pop(layer.name, None)) for layer in listed]
    rest = {name: each for name, each in obstacles.items() if name not in {finding.layer for finding in found}}
    return [*found, *(Finding(n, "operation", each.verdict, 0, each.problem, each.cure) for n, each in rest.items())]


def _counts(layer: Any) -> bool:
    return not isinstance(layer, (keras.layers.InputLayer, keras.Sequential, keras.Model))


def _finding(layer: Any, obstacle: _Obstacle | None) -> Finding:
    parameters = int(layer.count_params()) if layer.built else 0
    if obstacle is not None:
        problem = (obstacle.verdict, parameters, obstacle.problem, obstacle.cure)
        return Finding(layer.name, type(layer).__name__, *problem)
    verdict: Verdict = "has no weights"
    if parameters:
        verdict = "trains" if layer.trainable_variables else "frozen"
    return Finding(layer.name, type(layer).__name__, verdict, parameters)


def _obstacles(traced: Traced) -> dict[str, _Obstacle]:
    """Return what stands in the way, by layer."""
    found = _constraints(traced)
    for training, graph in traced.graphs.items():
        names = (*traced.trained, *traced.statistics, *traced.given, *(port.name for port in traced.features))
        varying = {graph.inputs[name] for name in names}
        learned = {graph.inputs[name] for name in traced.trained} if training else set()
        ends = [*graph.outputs, *graph.statistics.values(), *([] if graph.penalty is None else [graph.penalty])]
        for kind, layers in _unable(needed(ends), varying, learned).items():
            for layer, types in layers.items():
                found.setdefault(layer, _obstacle(kind, types))
    return found


def blocked(operations: Sequence[Operation], *, varying: set[str], learned: set[str]) -> tuple[str, str] | None:
    """Return what stands in the way of running and differentiating `operations` on a device, and the cure, or None.

    Args:
        operations: See `models.gradients.needed`.
        varying: Names of the tensors that differ from call to call.
        learned: Of these, what depends on trained weights.
    """
    found = _unable(operations, varying, learned)
    all_types = {kind: {each for types in layers.values() for each in types} for kind, layers in found.items()}
    reasons = [_obstacle(kind, types) for kind, types in all_types.items() if types]
    return (reasons[0].problem, reasons[0].cure) if reasons else None


def _obstacle(kind: str, types: set[str]) -> _Obstacle:
    verdict, problem = _PROBLEMS[kind]
    cure = next((CURES[each] for each in sorted(types) if each in CURES), OTHERWISE)
    return _Obstacle(verdict, problem.format(", ".join(sorted(types))), cure)


_PROBLEMS: Mapping[str, tuple[Verdict, str]] = {
    "missing": ("cannot run", "{} is not among TFLite's built-ins"),
    "kinds": ("cannot run", "it computes with {}, and devices compute with float32 and int32"),
    "without gradient": ("only infers", "{} cannot be differentiated with TFLite built-ins"),
    "own gradient": ("only infers", "it has a gradient of its own ({}), which devices do not follow"),
}


def _unable(operations: Sequence[Operation], varying: set[str], learned: set[str]) -> dict[str, dict[str, set[str]]]:
    """Return key of _PROBLEMS -> layer -> operations or kinds of numbers that stand in the way.

    A gradient flows only through what depends on a trained weight; what depends on nothing is computed beforehand.

    Args:
        operations: Each after those it reads.
        varying: Names of the tensors that differ from call to call.
        learned: Of these, what depends on trained weights.
    """
    varying, learned = {*varying}, {*learned}
    found: dict[str, dict[str, set[str]]] = {kind: {} for kind in _PROBLEMS}
    differentiable = GRADIENTS.keys() | SUBSTITUTES.keys() | THROUGH | FLAT | RANDOM
    for op in operations:
        layer, names = layer_of(op.name), {tensor.name for tensor in op.inputs}
        varies = bool(names & varying) or DRAWS.search(op.type) is not None
        flows = bool(names & learned) and op.type not in FLAT
        varying |= {tensor.name for tensor in op.outputs if varies}
        learned |= {tensor.name for tensor in op.outputs if flows and tensor.dtype.is_floating}
        if op.type in NEVER or (varies and op.type not in differentiable | FORWARD):
            found["missing"].setdefault(layer, set()).add(op.type)
        elif flows and op.type not in differentiable:
            found["without gradient"].setdefault(layer, set()).add(op.type)
        elif flows and _has_own_gradient(op):
            found["own gradient"].setdefault(layer, set()).add("custom_gradient")
        if "data_format" in op.node_def.attr and op.get_attr("data_format") in (b"NCHW", b"NCDHW"):
            found["missing"].setdefault(layer, set()).add("NCHW")
        kinds = {tensor.dtype.name for tensor in op.outputs if varies} & UNSUITABLE
        if kinds:
            found["kinds"].setdefault(layer, set()).update(kinds)
    return found


def _has_own_gradient(op: Operation) -> bool:
    """Return whether an author, not TensorFlow or Keras, has written the gradient of `op` with tf.custom_gradient."""
    if op.type != "IdentityN" or "_gradient_op_type" not in op.node_def.attr:
        return False
    # TensorFlow registers a function around a function around the author's.
    around = [each for outer in _enclosed(get_gradient_function(op)) for each in (outer, *_enclosed(outer))]
    return any(not str(each.__module__).startswith(("tensorflow.", "keras.")) for each in around)


def _enclosed(function: Any) -> list[Any]:
    """Return the functions that `function` is a closure over."""
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    return [each for each in cells if isinstance(each, FunctionType)]


def _constraints(traced: Traced) -> dict[str, _Obstacle]:
    held = [variable for variable in traced.trained.values() if getattr(variable, "constraint", None) is not None]
    cure = "leave it out; a regularizer keeps weights small as well"
    return {
        (*variable.path.split("/")[:-1], traced.model.name)[-2]: _Obstacle(
            "only infers", f"its {variable.name} has a constraint, which devices do not follow", cure
        )
        for variable in held
    }


def _rehearse(traced: Traced) -> None:
    """Make the gradients of a step, of no matter which loss, in a graph that is thrown away.

    Raises:
        CannotTrain: An operation has no gradient because of how it is used.
    """
    weights = {**traced.trained, **traced.statistics, **traced.given}
    with tf.Graph().as_default():
        fed = tf.compat.v1.placeholder
        values = {name: fed(tf.float32, variable.shape) for name, variable in weights.items()}
        features = {p.name: fed(p.tensor_type.dtype, p.tensor_type.shape) for p in traced.features}
        known = {**values, **features, "learning_rate": fed(tf.float32, [1])}
        with built_in_gradients():
            uniform = uniform_of(list(features.values()), tf.zeros([1]))
            found = traced.run(known, training=True, uniform=uniform)
            parts = [tf.reduce_sum(tf.square(tf.cast(output, tf.float32))) for output in found.outputs]
            total = tf.add_n(parts if found.penalty is None else [*parts, found.penalty])
        slopes(total, [values[name] for name in traced.trained])


def refuse(traced: Traced) -> None:
    """Raise CannotTrain for the first layer that stands in the way of training.

    Raises:
        CannotTrain: The text names the layer, what is wrong and the cure.
    """
    for finding in findings(traced):
        if finding.problem:
            raise CannotTrain(
                f"layer {finding.layer!r} ({finding.kind}) {finding.verdict} on a device: {finding.problem}; "
                f"{finding.cure}"
            )


def table(found: Sequence[Finding]) -> list[str]:
    """Return the lines of a table of `found`, cures below it."""
    heads = ("layer", "class", "parameters", "on a device")
    rows = [(f.layer, f.kind, str(f.parameters), f.verdict) for f in found]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    cures = [f"{f.layer}: {f.problem}; {f.cure}" for f in found if f.problem]
    return [line.rstrip() for line in lines] + (["", *cures] if cures else [])
