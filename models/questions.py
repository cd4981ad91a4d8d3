"""What `sottovoce ask` asks, written in the federated language: mean, fraction and histogram of newest readings.

`scripts/export_bundles` lowers and saves these (`sottovoce/questions/*.svc`), so that asking needs no TensorFlow. The
devices' values are one column of real numbers. Bounds come with the question: a reading is first cut off at the ends of
the window that the asker names, and divided by the larger of them; so the most that one device can move an answer is
known whatever is measured, and a small reading keeps all of its digits.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

import sottovoce as sv

BINS = 64
"""A histogram has so many bins or fewer."""
_WINDOW = "<low=float32,high=float32>"


def _scale(window: Any) -> Any:
    return tf.maximum(tf.abs(window.low), tf.abs(window.high))


@sv.tf_computation("float32", _WINDOW)
def scaled(reading: Any, window: Any) -> Any:
    """The reading, cut off at the window's ends, as a fraction of the larger of them."""
    return tf.minimum(tf.maximum(reading, window.low), window.high) / _scale(window)


@sv.tf_computation("float32", _WINDOW)
def in_units(fraction: Any, window: Any) -> Any:
    """The inverse of `scaled`."""
    return fraction * _scale(window)


@sv.tf_computation("float32", "<threshold=float32,sign=float32>")
def beyond(reading: Any, limit: Any) -> Any:
    """Whether a reading is above the threshold (sign 1) or below it (sign -1)."""
    return limit.sign * reading > limit.sign * limit.threshold


@sv.tf_computation("float32", f"float32[{BINS + 1}]")
def bin_of(reading: Any, edges: Any) -> Any:
    """One at the bin that holds the reading, edges[i] <= reading < edges[i + 1]; zeros outside of all bins."""
    reached = tf.cast(reading >= edges, tf.int32)
    return reached[:-1] - reached[1:]


def _devices() -> Any:
    return sv.federated_sum(sv.federated_value(1, sv.CLIENTS), bound=(0, 1))


@sv.federated_computation("{float32}@CLIENTS", f"{_WINDOW}@SERVER")
def mean(readings: Any, window: Any) -> Any:
    """The mean of the devices' newest readings."""
    fractions = sv.federated_map(scaled, (readings, sv.federated_broadcast(window)))
    average = sv.federated_mean(fractions, bound=(-1.0, 1.0), bits=40)
    return {"mean": sv.federated_map(in_units, (average, window)), "devices": _devices()}


@sv.federated_computation("{float32}@CLIENTS", "<threshold=float32,sign=float32>@SERVER")
def fraction(readings: Any, limit: Any) -> Any:
    """The fraction of devices whose newest reading is beyond a threshold."""
    found = sv.federated_map(beyond, (readings, sv.federated_broadcast(limit)))
    return {"fraction": sv.federated_mean(sv.federated_map(sv.cast("float32"), found)), "devices": _devices()}


@sv.federated_computation("{float32}@CLIENTS", f"float32[{BINS + 1}]@SERVER")
def histogram(readings: Any, edges: Any) -> Any:
    """How many devices' newest readings lie in each bin."""
    binned = sv.federated_map(bin_of, (readings, sv.federated_broadcast(edges)))
    return {"counts": sv.federated_sum(binned, bound=(0, 1)), "devices": _devices()}


QUESTIONS = (mean, fraction, histogram)
"""Everything that is saved."""
