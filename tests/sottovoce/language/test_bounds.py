"""Bounds are inferred step by step: from literals, truth values, casts, clips, means and TensorFlow functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import sottovoce as sv
from sottovoce.errors import ConfigError
from sottovoce.language.bounds import applied, infer, unknown, within
from sottovoce.language.builtins import identity
from sottovoce.language.expressions import Builtin
from sottovoce.language.ports import Bound


def bounds_of(function: Callable[..., Any], *types: str, known: tuple[Bound | None, ...] | None = None) -> Any:
    """Return the bounds of what is aggregated first in `function` of values of `types`."""
    computation = sv.federated_computation(*types)(function)
    body = computation.body
    found = infer(body, [known or unknown(kind) for _, kind in body.parameters])
    at = next(at for at, step in enumerate(body.steps) if step.operator in ("federated_sum", "federated_mean"))
    return found[body.steps[at].inputs[0]]


over = sv.tf_computation("float32")(lambda x: x > 3)
pair = sv.tf_computation("float32")(lambda x: {"a": tf.sigmoid(x), "b": x})
least = sv.tf_computation("float32", "float32")(lambda a, b: tf.minimum(tf.maximum(a + b, 0.0), 5.0))

FOLLOWS: dict[str, tuple[Callable[..., Any], str, tuple[Bound | None, ...]]] = {
    "nothing": (lambda x: sv.federated_sum(x), "{float32}@CLIENTS", (None,)),
    "a narrow dtype": (lambda x: sv.federated_sum(x), "{uint8}@CLIENTS", (Bound(0, 255),)),
    "a cast of a truth value": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("int32"), x)), "{bool}@CLIENTS", (Bound(0, 1),),
    ),
    "a cast of what TensorFlow compares": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("float32"), sv.federated_map(over, x))),
        "{float32}@CLIENTS", (Bound(0, 1),),
    ),
    "a clip": (lambda x: sv.federated_sum(sv.federated_map(sv.clip(-2, 4), x)), "{float32}@CLIENTS", (Bound(-2, 4),)),
    "a clip of a clip": (
        lambda x: sv.federated_sum(sv.federated_map(sv.clip(-2, 4), sv.federated_map(sv.clip(0, 9), x))),
        "{float32}@CLIENTS", (Bound(0, 4),),
    ),
    "a cast to whole numbers cuts towards zero": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("int32"), sv.federated_map(sv.clip(-2.5, 4.5), x))),
        "{float32}@CLIENTS", (Bound(-2, 4),),
    ),
    "what a cast cannot hold wraps around": (
        lambda x: sv.federated_sum(sv.federated_map(sv.cast("uint8"), sv.federated_map(sv.clip(0, 300), x))),
        "{int32}@CLIENTS", (Bound(0, 255),),
    ),
    "a constant": (
        lambda x: sv.federated_sum(sv.federated_value([1, 7], sv.CLIENTS)), "{int32}@CLIENTS",
        (Bound(1, 1), Bound(7, 7)),
    ),
    "an element of a struct": (
        lambda x: sv.federated_sum(sv.federated_map(pair, x).a), "{float32}@CLIENTS", (Bound(0, 1),),
    ),
    "a struct, element by element": (
        lambda x: sv.federated_sum(sv.federated_map(pair, x)), "{float32}@CLIENTS", (Bound(0, 1), None),
    ),
    "values that are zipped": (
        lambda x: sv.federated_sum((sv.federated_map(sv.clip(0, 1), x), x)), "{float32}@CLIENTS", (Bound(0, 1), None),
    ),
    "a plain function over values": (
        lambda x: sv.federated_sum(sv.federated_map(lambda v: (sv.clip(0, 1)(v), identity(v)), x)),
        "{float32}@CLIENTS", (Bound(0, 1), None),
    ),
    "a reduction by a bounded function, and its zero": (
        lambda x: sv.federated_sum(sv.federated_map(lambda s: sv.sequence_reduce(s, -1.0, least), x)),
        "{float32*}@CLIENTS", (Bound(-1, 5),),
    ),
    "a sum of an unknown number of elements": (
        lambda x: sv.federated_sum(sv.sequence_sum(sv.sequence_map(sv.clip(0, 1), x))), "{float32*}@CLIENTS", (None,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_follows(name: str) -> None:
    function, kind, expected = FOLLOWS[name]
    assert bounds_of(function, kind) == expected


def test_the_bound_of_a_mean_is_that_of_its_values_and_what_is_declared() -> None:
    computation = sv.federated_computation("{float32}@CLIENTS")(
        lambda x: sv.federated_mean(sv.federated_map(sv.clip(0, 10), x), bound=(-5, 5))
    )
    assert infer(computation.body, [(None,)])[computation.body.result] == (Bound(0, 5),)


def test_the_bound_of_a_collection_reaches_what_is_computed_from_it() -> None:
    doubled = sv.tf_computation("float32")(lambda x: x * 2 + 1)
    found = bounds_of(
        lambda x: sv.federated_sum(sv.federated_map(doubled, x)), "{float32}@CLIENTS", known=(Bound(-20, 60),)
    )
    assert found == (Bound(-39, 121),)


def test_a_declared_bound_wins_where_nothing_is_inferred() -> None:
    assert within((None, Bound(0, 9), Bound(20, 30)), Bound(5, 10)) == (Bound(5, 10), Bound(5, 9), Bound(10, 10))
    assert within((None,), None) == (None,)


def test_a_bound_needs_two_finite_numbers_in_order() -> None:
    for low, high in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match="a bound needs finite numbers, the lower one first"):
            Bound(low, high)


@given(st.floats(-100, 100), st.floats(0, 50), st.floats(-100, 100), st.floats(0, 50), st.floats(0, 1))
def test_a_clip_keeps_every_value_within_the_inferred_bound(
    low: float, width: float, first: float, span: float, at: float
) -> None:
    builtin = Builtin("clip", sv.type_of("float32"), sv.type_of("float32"), Bound(low, low + width))
    (found,) = applied(builtin, (Bound(first, first + span),))
    value = np.clip(first + at * span, low, low + width)
    assert found is not None
    assert found.low <= value <= found.high
