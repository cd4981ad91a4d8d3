"""The quick conversion: the same program is converted once, and what devices do not have is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from models import conversion
from models.conversion import flatbuffer_of
from sottovoce.errors import BadBundle
from sottovoce.runtime import open_function
from sottovoce.types import type_of


def _doubled(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": tensors["x"] * 2}


def test_it_computes_and_the_same_program_is_converted_once() -> None:
    inputs = [("x", type_of("float32[?]"))]
    first = flatbuffer_of(_doubled, inputs, what="doubled")
    converted = conversion._converted.cache_info().misses
    assert flatbuffer_of(lambda tensors: {"y": tensors["x"] * 2}, inputs, what="again") == first
    assert conversion._converted.cache_info().misses == converted
    assert flatbuffer_of(lambda tensors: {"y": tensors["x"] * 3}, inputs, what="tripled") != first
    assert conversion._converted.cache_info().misses == converted + 1
    run = open_function(first)
    assert run({"x": np.array([1, 2, 3], np.float32)})["y"].tolist() == [2, 4, 6]


def test_an_operation_that_devices_do_not_have_is_named() -> None:
    inputs = [("x", type_of("float32[2,2]"))]
    message = r"area, finish: devices have no MatrixDeterminant of these dtypes. They compute with float32 and int32"
    with pytest.raises(BadBundle, match=message):
        flatbuffer_of(lambda tensors: {"y": tf.linalg.det(tensors["x"])}, inputs, what="area, finish")
