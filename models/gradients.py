"""A graph that Keras made, made again so that it and its gradients need nothing but TFLite built-ins.

`replay` copies the operations of a traced function one by one into the current graph. An operation that TFLite lacks is
written with others (`gradients_substitutes`). Within `built_in_gradients` every copy is told which gradient to use:
those of the families `gradients_elementwise`, `gradients_shapes` and `gradients_windows`, which need nothing that
TFLite does not have, and no known batch size. `slopes` then takes them with `tf.gradients`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import tensorflow as tf

import models.convolutions
import models.gradients_elementwise
import models.gradients_shapes
import models.gradients_substitutes
import models.gradients_windows  # noqa: F401  each registers its operations
from models.gradients_registry import GRADIENTS, SUBSTITUTES, NoGradient, Operation, Substitute
from models.ops import Tensor
from sottovoce.errors import BadBundle

Uniform: TypeAlias = Callable[[Tensor, Sequence[int | None], int], Tensor]
"""(shape as a tensor, as far as it is known, how many were made before) -> uniform in [0, 1)."""
RANDOM = frozenset({"StatelessRandomUniformV2", "StatelessRandomUniform"})
LOOPS = frozenset({"While", "StatelessWhile", "If", "StatelessIf", "PartitionedCall", "StatefulPartitionedCall"})
OTHERWISE = "replace the layer by ones of the list in docs/authoring-models.md, or freeze it and all before it"
"""The cure where none is known."""
_DROPPED = ("_gradient_op_type", "_output_shapes", "_class")
_SCOPE = re.compile(r"layer\.([^/.]+)\.(?:_\d+)?/")


class CannotTrain(BadBundle):
    """A model cannot be turned into a client program; the text names the layer and the cure."""

    code = "cannot_train"


def replay(
    outputs: Sequence[Tensor], feeds: Mapping[str, Tensor], *, uniform: Uniform, as_it_is: bool = False
) -> list[Tensor]:
    """Return `outputs` of a traced graph, made again in the current graph.

    Args:
        outputs: Tensors of the traced graph.
        feeds: Name of a placeholder's tensor -> what stands for it here; so for every tensor read from outside.
        uniform: Makes what a random operation would.
        as_it_is: Keep TensorFlow's own operations; only random operations are replaced.

    Raises:
        CannotTrain: The model needs something that TFLite does not have.
    """
    made: dict[str, Tensor] = {**feeds}
    randoms = 0
    for op in needed(outputs, made):
        if op.type in RANDOM:
            lengths = op.outputs[0].shape.as_list()
            made[op.outputs[0].name] = uniform(made[op.inputs[0].name], lengths, randoms)
            randoms += 1
        else:
            inputs = [made[tensor.name] for tensor in op.inputs]
            made.update(
                zip(
                    (tensor.name for tensor in op.outputs),
                    _again(op, inputs, {} if as_it_is else SUBSTITUTES),
                    strict=True,
                )
            )
    return [made[tensor.name] for tensor in outputs]


def built_in_gradients() -> contextlib.AbstractContextManager[None]:
    """Return a context in which operations are made with gradients of TFLite built-ins."""
    context: contextlib.AbstractContextManager[None]
    context = tf.compat.v1.get_default_graph().gradient_override_map(GRADIENTS)
    return context


def needed(outputs: Sequence[Tensor], known: Mapping[str, Tensor] = MappingProxyType({})) -> list[Operation]:
    """Return the operations that `outputs` follow from, each after those it reads.

    Args:
        outputs: Tensors of one graph.
        known: By their names, the tensors that need not be followed any further.
    """
    graph = outputs[0].graph
    wanted, waiting = set(), [tensor for tensor in outputs if tensor.name not in known]
    while waiting:
        op = waiting.pop().op
        if op.name not in wanted:
            wanted.add(op.name)
            # What only seeds a random operation is not made again.
            inputs = op.inputs[:1] if op.type in RANDOM else op.inputs
            waiting += [tensor for tensor in inputs if tensor.name not in known]
    return [op for op in graph.get_operations() if op.name in wanted]


def _again(op: Operation, inputs: Sequence[Tensor], substitutes: Mapping[str, Substitute]) -> list[Tensor]:
    if op.type == "Placeholder" or op.type in LOOPS or op.type == "ReadVariableOp":
        raise CannotTrain(f"layer {layer_of(op.name)!r} {_WHY.get(op.type, _LOOP)}")
    if op.type in substitutes:
        found = substitutes[op.type](op, inputs)
        return found if isinstance(found, list) else [found]
    attributes = {key: value for key, value in op.node_def.attr.items() if key not in _DROPPED}
    kinds = [tensor.dtype for tensor in op.outputs]
    graph = tf.compat.v1.get_default_graph()
    copy = graph.create_op(op.type, list(inputs), kinds, name=op.name, attrs=attributes)
    for tensor, original in zip(copy.outputs, op.outputs, strict=True):
        tensor.set_shape(original.shape)
    return list(copy.outputs)


_LOOP = "runs a loop or a condition whose length is not known; unroll it, or replace the layer by ordinary ones"
_WHY = {
    "Placeholder": "reads something that is neither a weight nor an input of the model; make it a weight (add_weight)",
    "ReadVariableOp": "reads a tf.Variable that Keras does not know; make it a weight (add_weight)",
}


def scope_of(layer: str) -> str:
    """Return the name scope in which the operations of `layer` are made."""
    return "layer." + re.sub(r"[^A-Za-z0-9_-]", "_", layer) + "."


def layer_of(name: str) -> str:
    """Return the layer that made the operation called `name`, the innermost one; the operation where there is none."""
    found = _SCOPE.findall(name)
    return str(found[-1]) if found else name


def slopes(total: Tensor, weights: Sequence[Tensor], *, upstream: Tensor | None = None) -> list[Tensor]:
    """Return the gradient of the sum of `total` for every weight; zeros where it does not depend on one.

    Args:
        total: Any shape.
        weights: What it depends on.
        upstream: Factors of the entries of `total` in the sum, its shape; None for ones.

    Raises:
        CannotTrain: An operation on the way has no gradient here.
    """
    graph = tf.compat.v1.get_default_graph()
    try:
        with built_in_gradients():
            found = tf.gradients(total, list(weights), upstream, unconnected_gradients="zero")
    except NoGradient as error:
        problem, cure = error.problem, error.cure or OTHERWISE
        raise CannotTrain(f"layer {layer_of(error.operation)!r} only infers on a device: {problem}; {cure}") from error
    except LookupError as error:  # TensorFlow's words: No gradient defined for operation 'NAME' (op type: TYPE).
        layer = layer_of(str(error))
        raise CannotTrain(f"layer {layer!r} only infers on a device: {error}; {OTHERWISE}") from error
    _forget(graph.get_operations())
    return list(found)


def _forget(operations: Iterable[Operation]) -> None:
    """Take the names of gradients off: who saves or converts the graph would look for them."""
    for op in operations:
        if any(key == "_gradient_op_type" for key in op.node_def.attr):
            op._clear_attr("_gradient_op_type")
