"""A value comes back as it went in: of the same kind, dtype and shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sottovoce.errors import ConfigError
from sottovoce.language.stored_values import decode_value, encode_value
from sottovoce.values import Record

DTYPES = st.sampled_from(["float32", "float64", "int8", "int32", "int64", "uint8", "uint32", "uint64", "bool"])
ARRAYS = DTYPES.flatmap(lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | ARRAYS
    | DTYPES.flatmap(lambda name: hnp.arrays(name, ())).map(lambda array: array[()])
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=3)
        | st.dictionaries(NAMES, inner, max_size=3).map(Record)
    )


def assert_same(back: Any, given_: Any) -> None:
    assert type(back) is type(given_)
    if isinstance(given_, np.ndarray | np.generic):
        assert (back.dtype, back.shape) == (given_.dtype, given_.shape)
        np.testing.assert_array_equal(back, given_)
    elif isinstance(given_, Record):
        assert [name for name, _ in back.elements()] == [name for name, _ in given_.elements()]
        assert_same(back.values(), given_.values())
    elif isinstance(given_, dict):
        assert list(back) == list(given_)
        assert_same(list(back.values()), list(given_.values()))
    elif isinstance(given_, list | tuple):
        assert len(back) == len(given_)
        for one, other in zip(back, given_, strict=True):
            assert_same(one, other)
    else:
        assert back == given_


@given(st.recursive(LEAVES, _nested, max_leaves=12))
def test_what_comes_back_is_what_went_in(value: Any) -> None:
    assert_same(decode_value(encode_value(value)), value)


@given(st.recursive(LEAVES, _nested, max_leaves=6))
def test_the_same_value_is_always_the_same_bytes(value: Any) -> None:
    assert encode_value(decode_value(encode_value(value))) == encode_value(value)


def test_text_in_arrays_and_records_without_names_survive() -> None:
    value = Record([("label", np.array(["walking", "lying"])), (None, np.str_("x"))])
    back = decode_value(encode_value(value))
    assert_same(back, value)
    assert isinstance(back[1], np.str_)


def test_a_named_tuple_comes_back_as_a_record() -> None:
    class Metrics(NamedTuple):
        loss: float
        count: int

    back = decode_value(encode_value(Metrics(0.5, 3)))
    assert isinstance(back, Record)
    assert (back.loss, back[1]) == (0.5, 3)


def test_arrays_that_come_back_may_be_written_to() -> None:
    array = decode_value(encode_value(np.zeros(3, np.float32)))
    array += 1
    assert list(array) == [1, 1, 1]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"model": [object()]}, r"the state\['model'\]\[0\] is a object, which cannot be stored"),
        (Record({"when": {1, 2}}), r"the state.when is a set"),
        ((np.zeros(2, np.complex64),), r"the state\[0\] cannot be stored: unknown dtype 'complex64'"),
    ],
)
def test_what_cannot_be_stored_is_named_by_its_place(value: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        encode_value(value, what="the state")


@pytest.mark.parametrize(
    "content", [b"", b"\x92\xa1x\x01", encode_value([1, 2])[:-1], b"\x91\xa4list", b"\x91" * 5000 + b"\xc0"]
)
def test_damaged_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="damaged"):
        decode_value(content)
