"""What a Keras model reads: one port for each input, and how its call takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from models.gradients import CannotTrain
from sottovoce.bundle import Port
from sottovoce.errors import BadBundle, ConfigError
from sottovoce.types import TensorType

keras = tf.keras


def features_of(model: Any, batch_spec: Mapping[str, str] | None = None) -> tuple[Port, ...]:
    """Return one port for each input of `model`: those of `batch_spec`, else what the model says.

    Raises:
        CannotTrain: The model has no weights yet, does not say what it reads, or leaves another dimension open than
            the batch.
    """
    if not isinstance(model, keras.Model):
        raise CannotTrain(f"{type(model).__name__} is no Keras model; put it into keras.Sequential")
    if not model.built:
        raise CannotTrain("the model has no weights yet; give it an Input layer, or call it once")
    inputs = getattr(model, "inputs", None)
    if batch_spec is not None:
        if not batch_spec or (inputs and len(batch_spec) != len(inputs)):
            raise CannotTrain(f"batch_spec names {len(batch_spec)} inputs and the model has {len(inputs or '?')}")
        return tuple(_specified(name, kind) for name, kind in batch_spec.items())
    if not inputs:
        raise CannotTrain(
            "the model does not say what it reads; put it behind an input, keras.Sequential([keras.Input((28, 28, 1)), "
            "model]), or in Python pass export batch_spec={'x': 'float32[?,28,28,1]'}"
        )
    names = ["x"] if len(inputs) == 1 else [tensor.name for tensor in inputs]
    return tuple(_feature(model, name, tensor) for name, tensor in zip(names, inputs, strict=True))


def port_type(tensor: Any, dtype: str = "float32") -> str:
    """Return the type of `tensor` in the notation, its first dimension the batch."""
    return f"{dtype}[{','.join('?' if i == 0 else str(length) for i, length in enumerate(tensor.shape))}]"


def packed(model: Any, inputs: Sequence[Any]) -> Any:
    """Return `inputs` as the model's call takes them: one tensor, a list, or the dict that it was built with."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(structure, dict):
        return dict(zip(sorted(structure), inputs, strict=True))
    return inputs[0] if len(inputs) == 1 else list(inputs)


def _specified(name: str, kind: str) -> Port:
    """Return the port of an input whose type the author gives."""
    try:
        parsed = TensorType.parse(kind)
    except (BadBundle, ConfigError) as error:
        raise CannotTrain(f"batch_spec, {name!r}: {error}") from error
    if parsed.dtype not in ("float32", "int32") or parsed.shape[:1] != (None,) or None in parsed.shape[1:]:
        raise CannotTrain(
            f"batch_spec, {name!r}: {kind} is no batch of float32 or int32 whose first dimension alone is open; "
            "write it like float32[?,28,28,1]"
        )
    return Port(name=name, type=kind)


def _feature(model: Any, name: str, tensor: Any) -> Port:
    """Return the port of an input; what an Embedding reads must be a row of its table."""
    if None in tensor.shape[1:]:
        raise CannotTrain(f"input {name!r} has the shape {tensor.shape}; only the batch may be unknown: fix the others")
    if tensor.shape[0] is not None:
        raise CannotTrain(f"input {name!r} has the fixed batch size {tensor.shape[0]}; leave it out (stateful=False)")
    if getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False):
        raise CannotTrain(f"input {name!r} is sparse or ragged; feed dense examples of one length")
    rows = [
        layer.input_dim for layer in model.layers if isinstance(layer, keras.layers.Embedding) and layer.input is tensor
    ]
    high = min(rows) - 1 if rows else None
    if not str(tensor.dtype).startswith(("int", "float")):
        raise CannotTrain(
            f"input {name!r} is of {tensor.dtype}; devices feed float32 and int32: convert when examples are collected"
        )
    dtype = "int32" if str(tensor.dtype).startswith("int") else "float32"
    return Port(name=name, type=port_type(tensor, dtype), low=0 if rows else None, high=high)
