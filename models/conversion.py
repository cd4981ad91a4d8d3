"""The quick way from a TensorFlow function to a TFLite flatbuffer, for the many small programs of computations.

`from_saved_model` takes 0.25 s for a program of three operations, most of it in garbage collection and in loading what
was just saved; from the concrete function itself it takes 0.09 s, and what has been converted before takes nothing. The
signature cannot be named in this way: it is always SIGNATURE.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from models.converter_defects import with_rectifiers_kept
from models.ops import Tensor
from sottovoce.errors import BadBundle
from sottovoce.types import TensorType

SIGNATURE = "serving_default"
_ABSENT = re.compile(r"'(tf\.\w+)' op is neither a custom op nor")
_MISSING = re.compile(r"TF Select ops: ([^\n]*)")


def flatbuffer_of(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Sequence[tuple[str, TensorType]],
    *,
    what: str,
) -> bytes:
    """Return `function` as a flatbuffer with the one signature SIGNATURE.

    Args:
        function: From named tensors to named tensors.
        inputs: Name and type of each input; the names are identifiers.
        what: Names the program in errors.

    Raises:
        BadBundle: It needs an operation that is not a TFLite built-in; the text names it.
    """
    specs = {name: tf.TensorSpec(kind.shape, kind.dtype, name=name) for name, kind in inputs}
    recorded = tf.function(lambda **tensors: with_rectifiers_kept(function(tensors)), autograph=False)
    return _converted(_Graph(recorded.get_concrete_function(**specs), what))


class _Graph:
    """A concrete function that is equal to another one of the same operations, inputs and outputs."""

    def __init__(self, traced: Any, what: str) -> None:
        self.traced, self.what = traced, what
        graph = traced.graph.as_graph_def()
        outputs = sorted((name, tensor.name) for name, tensor in traced.structured_outputs.items())
        self._key = (graph.SerializeToString(deterministic=True), tuple(t.name for t in traced.inputs), tuple(outputs))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Graph) and self._key == other._key


@functools.lru_cache(maxsize=256)
def _converted(graph: _Graph) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([graph.traced], tf.Module())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        return bytes(converter.convert())
    except ConverterError as error:
        missing = _MISSING.search(str(error))
        absent = ", ".join(sorted(set(_ABSENT.findall(str(error)))))
        told = f"{missing[1]} of these dtypes" if missing else absent or str(error).splitlines()[0]
        raise BadBundle(
            f"{graph.what}: devices have no {told}. They compute with float32 and int32 (int64 for +, -, *); cast "
            "first, or write it with other operations"
        ) from error
