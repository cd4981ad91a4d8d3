"""Computations: how they are called, composed, named and printed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sottovoce as sv
from sottovoce.errors import ConfigError, DefinitionError, TypeMismatch

INTS = "{int32}@CLIENTS"


@sv.federated_computation(INTS, "int32@SERVER")
def total_and_offset(values: Any, offset: Any) -> Any:
    """Sums the values.

    More about it.
    """
    return sv.federated_sum(values), offset


@sv.server_computation("int32", "int32", result="int32")
def plus(a: Any, b: Any) -> Any:
    return a + b


def test_positional_and_keyword_arguments() -> None:
    assert total_and_offset([1, 2, 3], 4) == (6, 4)
    assert total_and_offset([1, 2, 3], offset=4) == (6, 4)
    assert total_and_offset(offset=4, values=[1, 2, 3]) == (6, 4)
    assert plus(b=1, a=2) == 3


WRONG_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (([1],), {}, "missing: offset"),
    ((), {}, "missing: values, offset"),
    (([1], 2, 3), {}, "3 arguments are given, 2 are declared"),
    (([1], 2), {"offset": 3}, "given twice: offset"),
    (([1], 2), {"other": 3}, "unknown: other"),
]


@pytest.mark.parametrize(("given", "named", "problem"), WRONG_CALLS)
def test_a_wrong_number_of_arguments_shows_what_it_takes(
    given: tuple[Any, ...], named: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DefinitionError) as refused:
        total_and_offset(*given, **named)
    assert str(refused.value).endswith(
        f", total_and_offset: {problem}. It takes (values: {{int32}}@CLIENTS, offset: int32@SERVER)"
    )


def test_a_float_where_an_int_is_declared() -> None:
    with pytest.raises(TypeMismatch) as refused:
        total_and_offset([1, 2.5, 3], 0)
    assert str(refused.value) == (
        "client 1 of argument values of total_and_offset does not fit its type\n"
        "    expected: int32\n"
        "    found:    the float 2.5\n"
        "A float is not turned into an int32 by itself: give int(...) or round(...), or declare float32."
    )


def test_one_value_where_one_for_each_client_is_declared() -> None:
    with pytest.raises(TypeMismatch, match=r"Give a list, one value of type int32 for each client"):
        total_and_offset(3, 0)


def test_a_computation_is_no_argument() -> None:
    with pytest.raises(TypeMismatch, match=r"Call the computation, and give what it returns"):
        total_and_offset([1], plus)


def test_names_types_and_docstring_are_kept() -> None:
    signature = "(<values={int32}@CLIENTS,offset=int32@SERVER> -> <int32@SERVER,int32@SERVER>)"
    assert str(total_and_offset.type_signature) == signature
    assert repr(total_and_offset) == f"<federated_computation total_and_offset {signature}>"
    assert total_and_offset.__name__ == "total_and_offset"
    assert (total_and_offset.__doc__ or "").startswith("Sums the values.")
    assert repr(plus) == "<server_computation plus (<a=int32,b=int32> -> int32)>"


def test_a_single_parameter_stands_for_itself_and_none_for_nothing() -> None:
    single = sv.federated_computation(lambda x: sv.federated_sum(x), INTS)
    nothing = sv.federated_computation(lambda: sv.federated_value(1, sv.SERVER))
    assert str(single.type_signature) == "({int32}@CLIENTS -> int32@SERVER)"
    assert str(nothing.type_signature) == "( -> int32@SERVER)"
    assert nothing() == 1


def test_types_as_objects_and_as_notation_are_the_same() -> None:
    as_object = sv.federated_computation(lambda x: sv.federated_sum(x), sv.at_clients(np.int32))
    as_text = sv.federated_computation(lambda x: sv.federated_sum(x), "{int32}@CLIENTS")
    assert as_object.type_signature == as_text.type_signature


def test_composition_copies_the_steps_in() -> None:
    @sv.federated_computation(INTS)
    def doubled_total(values: Any) -> Any:
        total, offset = total_and_offset(values, sv.federated_value(3, sv.SERVER))
        return sv.federated_map(plus, (total, offset))

    assert doubled_total([1, 2]) == 6
    assert [step.operator for step in doubled_total.body.steps].count("federated_sum") == 1


def test_reuse_twice_in_one_computation() -> None:
    @sv.federated_computation(INTS, INTS)
    def both(first: Any, second: Any) -> Any:
        zero = sv.federated_value(0, sv.SERVER)
        return {"first": total_and_offset(first, zero)[0], "second": total_and_offset(second, zero)[0]}

    assert str(both.type_signature.result) == "<first=int32@SERVER,second=int32@SERVER>"
    assert dict(both([1, 2], [3, 4])) == {"first": 3, "second": 7}


def test_what_is_not_used_is_left_out() -> None:
    @sv.federated_computation(INTS)
    def wasteful(values: Any) -> Any:
        sv.federated_max(values)
        return sv.federated_sum(values)

    assert [step.operator for step in wasteful.body.steps] == ["parameter", "federated_sum"]


def test_all_equal_and_known_dimensions_fit_what_is_wider() -> None:
    inner = sv.federated_computation(lambda x: sv.federated_sum(sv.federated_map(lambda v: v.n, x)),
                                     "{<n=int32,v=float32[?]>}@CLIENTS")  # fmt: skip

    @sv.federated_computation("<n=int32,v=float32[2]>@SERVER", INTS)
    def outer(x: Any, others: Any) -> Any:
        return inner(sv.federated_broadcast(x)), sv.federated_sum(others)

    assert outer({"n": 3, "v": [1, 2]}, [1, 1, 1, 1]) == (12, 4)


def test_an_argument_of_another_placement_is_refused_at_definition() -> None:
    with pytest.raises(TypeMismatch, match=r"argument offset") as refused:
        sv.federated_computation(lambda x: total_and_offset(x, x), INTS)
    assert "expected: int32@SERVER" in str(refused.value)
    assert "found:    {int32}@CLIENTS" in str(refused.value)


def test_a_constant_needs_a_placement_inside() -> None:
    with pytest.raises(DefinitionError) as refused:
        sv.federated_computation(lambda x: total_and_offset(x, 3), INTS)
    assert str(refused.value).endswith(
        "total_and_offset: the constant 3 (int32) is not placed, and total_and_offset takes int32@SERVER: "
        "use sv.federated_value(value, sv.SERVER)"
    )


def test_closures_over_constants() -> None:
    offset, weights = 5, np.array([1, 2, 3], np.int32)
    add_offset = sv.server_computation("int32", result="int32")(lambda x: x + offset)

    @sv.federated_computation(INTS)
    def closed(values: Any) -> Any:
        pair = sv.federated_map(lambda v: {"value": v, "weights": weights}, values)
        return sv.federated_map(add_offset, sv.federated_sum(values)), sv.federated_sum(pair)

    shifted, pairs = closed([1, 2])
    assert shifted == 8
    assert dict(pairs) == {"value": 3, "weights": pytest.approx([2, 4, 6])}


def test_a_local_federated_computation_can_be_mapped() -> None:
    swap = sv.federated_computation(lambda a, b: (b, a), "int32", "float32")
    assert swap(1, 2.5) == (2.5, 1)
    mapped = sv.federated_computation(lambda x: sv.federated_map(swap, x), "{<int32,float32>}@CLIENTS")
    assert str(mapped.type_signature.result) == "{<float32,int32>}@CLIENTS"
    assert mapped([(1, 0.5), (2, 1.5)]) == ((0.5, 1), (1.5, 2))


def test_lambdas_partials_and_defaults() -> None:
    def scaled(x: Any, y: Any, factor: int = 10) -> Any:
        return (x + y) * factor

    partial = sv.server_computation("int32", result="int32")(functools.partial(scaled, 1))
    default = sv.server_computation("int32", "int32", result="int32")(scaled)
    assert partial(2) == 30
    assert partial.name == "scaled"
    assert default(1, 2) == 30


def test_the_result_of_server_python_is_checked() -> None:
    broken = sv.server_computation("int32", result="int32")(lambda x: x / 2)
    with pytest.raises(TypeMismatch, match=r"the result of lambda"):
        broken(3)


def test_a_computation_is_not_decorated_again() -> None:
    with pytest.raises(ConfigError, match=r"is a computation already"):
        sv.federated_computation(plus)


def test_a_value_that_outlived_its_definition_is_no_number() -> None:
    kept = []
    sv.federated_computation(lambda x: kept.append(x) or sv.federated_sum(x), INTS)
    with pytest.raises(DefinitionError, match=r"is of a definition that is over; give a number"):
        total_and_offset(kept[0], 3)


def test_an_executor_is_used_inside_its_with_only() -> None:
    class Recording:
        def __init__(self) -> None:
            self.calls: list[dict[str, object]] = []

        def run(self, computation: Any, arguments: Any) -> object:
            self.calls.append(dict(arguments))
            return computation.name

    with sv.use(Recording()) as executor:
        assert total_and_offset(sv.latest("ages", 0, 120), 3) == "total_and_offset"
        assert plus(1, 2) == 3
    assert executor.calls == [{"values": sv.latest("ages", 0, 120), "offset": 3}]  # type: ignore[attr-defined]
    assert total_and_offset([1], 3) == (1, 3)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: sv.latest(5), "sv.latest takes the name of a collection of the devices, .*, not 5"),  # type: ignore[arg-type]
        (lambda: sv.collection("my readings"), "1 to 64 characters of A-Z a-z 0-9 _ -, .*, not 'my readings'"),
        (lambda: sv.latest("t", low=5), r"give both low= and high=, .* not \(5, None\)"),
        (lambda: sv.latest("t", 5, 1), r"the lower one first, or neither, not \(5, 1\)"),
        (lambda: sv.latest("t", "a", "b"), r"finite numbers, .* not \('a', 'b'\)"),  # type: ignore[arg-type]
        (lambda: sv.clip("a", 1), r"clip takes two finite numbers, the lower one first, not \('a', 1\)"),  # type: ignore[arg-type]
        (lambda: sv.clip(3, 1), "the lower one first"),
        (lambda: sv.cast("float16"), "cast: 'float16' is no dtype of numbers; use one of float32"),
    ],
)
def test_arguments_of_builtins_and_collections_that_cannot_be(make: Callable[[], object], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make()


def test_a_cast_takes_dtypes_as_types_do() -> None:
    assert repr(sv.cast(np.float32)) == repr(sv.cast(float)) == repr(sv.cast("float32")) == "sv.cast('float32')"
