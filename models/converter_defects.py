"""Where the TFLite converter is wrong without saying so, and how a graph is written that it converts rightly.

*A rectifier after a matrix product is lost.* In relu(x k), where k is no constant and nothing but a constant zero is
added (as in a layer without bias, or one whose bias is frozen at zero), the converter fuses the rectifier into a
FULLY_CONNECTED whose weights are k transposed, and then rewrites that as BATCH_MATMUL, which has no activation (pattern
FuseTransposeFCRhsToBatchMatmul of its pass optimize-batch-matmul; TensorFlow 2.21). Every runtime then computes x k.
BatchMatMulV3 stays a BATCH_MATMUL from the beginning, and the rectifier an operation of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeVar

import tensorflow as tf

from models.ops import Tensor

_Outputs = TypeVar("_Outputs")
_RECTIFIERS = frozenset({"Relu", "Relu6", "Maximum", "Minimum", "ClipByValue"})
_REARRANGED = frozenset({"Reshape", "Squeeze", "ExpandDims", "Transpose", "Identity", "IdentityN"})
"""What the converter moves a rectifier over, whatever shape it is given (as in tf.tensordot), so that the two meet."""
_FUSED_BEFORE = frozenset({"BiasAdd", "Add", "AddV2", "Sub", "Mul", "RealDiv"})
"""What the converter folds into the product where the other side is constant."""
_TRANSPOSITIONS = {"MatMul": ("transpose_a", "transpose_b"), "BatchMatMulV2": ("adj_x", "adj_y")}


def with_rectifiers_kept(outputs: _Outputs) -> _Outputs:
    """Return `outputs` of the graph that is being traced, its matrix products before a rectifier made conversion-proof.

    Args:
        outputs: What the traced function returns.
    """
    operations = tf.compat.v1.get_default_graph().get_operations()
    varying = _varying(operations)
    for op in operations:
        if op.type in _TRANSPOSITIONS and op.inputs[1].op.name in varying and _is_rectified(op.outputs[0], varying):
            _read_instead(op.outputs[0], _as_batched(op))
    return outputs


def _varying(operations: Iterable[Any]) -> set[str]:
    """Return the names of the operations that are no constants for the converter; inputs come before readers."""
    found: set[str] = set()
    for op in operations:
        if any(tensor.op.name in found for tensor in op.inputs) or (not op.inputs and op.type != "Const"):
            found.add(op.name)
    return found


def _is_rectified(tensor: Tensor, varying: Collection[str]) -> bool:
    return any(
        op.type in _RECTIFIERS
        or (_may_vanish(op, varying) and any(_is_rectified(output, varying) for output in op.outputs))
        for op in tensor.consumers()
    )


def _may_vanish(op: Any, varying: Collection[str]) -> bool:
    """Say whether a rectifier behind `op` may end up in the product before it; one behind a learned bias does not."""
    computed = [tensor for tensor in op.inputs if tensor.op.name in varying]
    return op.type in _REARRANGED or (op.type in _FUSED_BEFORE and len(computed) == 1)


def _as_batched(op: Any) -> Tensor:
    """Return the same product as a BatchMatMulV3."""
    x, y = op.inputs
    left, right = (op.get_attr(name) for name in _TRANSPOSITIONS[op.type])
    return tf.raw_ops.BatchMatMulV3(x=x, y=y, Tout=x.dtype, adj_x=left, adj_y=right)


def _read_instead(old: Tensor, new: Tensor) -> None:
    for reader in old.consumers():
        for at, tensor in enumerate(reader.inputs):
            if tensor.name == old.name:
                reader._update_input(at, new)
