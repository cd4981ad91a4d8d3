"""What a newcomer reads when a computation cannot be defined: the line, the reason and the cure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import sottovoce as sv
from sottovoce.errors import ConfigError, DefinitionError, TypeMismatch

FLOATS = "{float32}@CLIENTS"
Defined = Callable[..., Any]


def refusal(function: Defined, *types: Any) -> str:
    """Return the text of the error of defining `function`; it must name the line and the operator."""
    with pytest.raises(ConfigError) as refused:
        sv.federated_computation(function, *types)
    text = str(refused.value)
    assert re.match(r"test_definition_messages\.py:\d+, ", text), text
    return text


def branch(x: Any) -> Any:
    return x if x else 0.0


def print_it(x: Any) -> Any:
    print(x)  # the side effect under test
    return x


NO_NUMBER = (
    "is not a number yet: this line runs once, while the computation is being defined, and never on a device, so "
    "Python cannot compute with it, test it or print it here."
)
PLACED_CURE = (
    "Write the arithmetic in a function decorated with @sv.tf_computation and apply it on every client with "
    "sv.federated_map(function, value)."
)
MAPPED_CURE = (
    "Decorate the function that computes with @sv.tf_computation and write it in TensorFlow (x + y, tf.sqrt(x), "
    "tf.where instead of if): then it travels to the devices."
)
AN_ARRAY = "an array of it (numpy, or TensorFlow outside of sv.tf_computation)"
SIDE_EFFECTS: dict[str, tuple[Defined, str]] = {
    "print": (print_it, "printing it or making text of it"),
    "text": (lambda x: f"{x}", "printing it or making text of it"),
    "if": (branch, "a truth value (if, while, and, or, not)"),
    "float": (lambda x: float(x), "float()"),
    "int": (lambda x: int(x), "int()"),
    "round": (lambda x: round(x), "round()"),
    "numpy function": (lambda x: np.mean(x), "numpy.mean"),
    "numpy ufunc": (lambda x: np.sqrt(x), "numpy.sqrt"),
    "numpy array": (lambda x: np.asarray(x), AN_ARRAY),
    "TensorFlow": (lambda x: tf.sqrt(x), AN_ARRAY),
    "numpy on the left": (lambda x: np.float32(2) * x, "numpy.multiply"),
    "math": (lambda x: math.sqrt(x), "float()"),
    "plus": (lambda x: x + 1, "+"),
    "minus from the right": (lambda x: 1 - x, "-"),
    "power": (lambda x: x**2, "**"),
    "comparison": (lambda x: x > 21.0, ">"),
    "equality": (lambda x: x == 21.0, "=="),
    "method": (lambda x: x.mean(), ".mean"),
    "loop": (lambda x: sum(x), "a loop over it (for, list, sum)"),
    "length": (lambda x: len(x), "len()"),
    "slice": (lambda x: x[0], "[0]"),
}


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_python_on_a_placed_value_is_refused_with_advice(name: str) -> None:
    function, what = SIDE_EFFECTS[name]
    text = refusal(lambda x: function(x), FLOATS)
    assert text.endswith(f", {what}: x ({FLOATS}) {NO_NUMBER} {PLACED_CURE}")


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_python_in_a_plain_function_mapped_at_clients_is_refused_with_advice(name: str) -> None:
    function, what = SIDE_EFFECTS[name]
    text = refusal(lambda x: sv.federated_map(function, x), FLOATS)
    assert text.endswith(f", {what}: argument (float32) {NO_NUMBER} {MAPPED_CURE}")


def test_at_the_server_the_advice_is_for_the_server() -> None:
    text = refusal(lambda x: x * 2, "float32@SERVER")
    assert text.endswith("and apply it at the server with sv.federated_map(function, value).")


def test_a_sequence_has_operators_of_its_own() -> None:
    text = refusal(lambda x: sum(x), "{float32*}@CLIENTS")
    assert text.endswith("Use sv.sequence_map, sv.sequence_reduce or sv.sequence_sum on a sequence.")


def test_federated_collect_is_refused_when_it_is_defined() -> None:
    text = refusal(lambda x: sv.federated_collect(x), FLOATS)
    assert text.endswith(
        ", federated_collect: Sottovoce never collects the values of single devices: whoever runs this would see "
        "everyone's. Say what you want to know of all of them together: sv.federated_sum, sv.federated_mean, or for a "
        "distribution a sum of counts, one for each bucket"
    )


def test_the_line_is_the_authors() -> None:
    def collecting(x: Any) -> Any:
        return sv.federated_collect(x)  # the line that the text must name

    line = collecting.__code__.co_firstlineno + 1
    assert refusal(collecting, FLOATS).startswith(f"test_definition_messages.py:{line}, federated_collect: ")


REFUSED: dict[str, tuple[Defined, tuple[str, ...], str]] = {
    "a SERVER value in a client map": (
        lambda x, t: sv.federated_map(lambda a, b: a, (x, t)),
        (FLOATS, "float32@SERVER"),
        "federated_map: t (float32@SERVER) is at SERVER, and another value is at CLIENTS: "
        "use sv.federated_broadcast(t) to bring it to the clients",
    ),
    "a constant where a placed value is expected": (
        lambda x: sv.federated_sum(3.0),
        (FLOATS,),
        "federated_sum: the constant 3.0 (float32) is not placed, and federated_sum takes a placed value: "
        "use sv.federated_value(value, sv.CLIENTS)",
    ),
    "a parameter without a placement": (
        lambda x: sv.federated_broadcast(x),
        ("float32",),
        "federated_broadcast: x (float32) is not placed, and federated_broadcast takes a placed value: "
        "declare x as float32@SERVER, or use sv.federated_value(x, sv.SERVER)",
    ),
    "a mean of a parameter without a placement": (
        lambda x: sv.federated_mean(x),
        ("float32",),
        "federated_mean: x (float32) is not placed, and federated_mean takes a placed value: "
        "declare x as {float32}@CLIENTS, or use sv.federated_value(x, sv.CLIENTS)",
    ),
    "a bound in the place of the weight": (
        lambda x: sv.federated_mean(x, (0, 10)),
        (FLOATS,),
        "federated_mean: the weight, the constant 0, 10 (<int32,int32>), is not placed; the second argument is the "
        "weight of every member, and whatever else is given by name, as bound=(low, high)",
    ),
    "a bound without a whole number": (
        lambda x: sv.federated_sum(x, bound=(0.4, 0.6)),
        ("{int32}@CLIENTS",),
        "federated_sum: no int32 lies within the bound 0.4..0.6; give one that holds a whole number",
    ),
    "a bound beyond the dtype": (
        lambda x: sv.federated_mean(x, bound=(0, 1e308)),
        (FLOATS,),
        "federated_mean: the bound 0..1e+308 is beyond what a float32 holds; give what the values can really be",
    ),
    "a clip beyond the dtype": (
        lambda x: sv.federated_map(sv.clip(0, 1e308), x),
        (FLOATS,),
        "federated_map: sv.clip(0, 1e+308) cannot take float32: a float32 holds no such limits",
    ),
    "too many bits": (
        lambda x: sv.federated_sum(x, bound=(0, 1), bits=49),
        (FLOATS,),
        "federated_sum: bits is the width of one coordinate before summation, 1 to 48, not 49",
    ),
    "a lane that is none": (
        lambda x: sv.federated_mean(x, lane="uint8"),  # type: ignore[arg-type]
        (FLOATS,),
        "federated_mean: lane is one of uint32, uint16, 3x21, dense, uint64, not 'uint8'",
    ),
    "a norm that is no number": (
        lambda x: sv.federated_mean(x, clip_norm="1"),  # type: ignore[arg-type]
        (FLOATS,),
        "federated_mean: clip_norm must be a number above 0, not '1'",
    ),
    "a largest key that is a value": (
        lambda k: sv.federated_select(k, sv.federated_value(9, sv.SERVER), sv.federated_value(1, sv.SERVER), min),  # type: ignore[arg-type]
        ("{int32[2]}@CLIENTS",),
        "federated_select: max_key is the largest key, a whole number from 0 on, written as a number because devices "
        "check their keys against it: 9 for a table of ten rows, not <value of type int32@SERVER>",
    ),
    "a builtin that is given its value": (
        lambda x: sv.federated_mean(sv.cast(x)),
        (FLOATS,),
        "cast: sv.cast(dtype) is a function, to be mapped over values: sv.federated_map(sv.cast(dtype), value)",
    ),
    "a sum at the server": (
        lambda x: sv.federated_sum(x),
        ("int32@SERVER",),
        "federated_sum: x (int32@SERVER) is at SERVER, and federated_sum takes one value from every client; "
        "at SERVER there is only one",
    ),
    "a broadcast from the clients": (
        lambda x: sv.federated_broadcast(x),
        (FLOATS,),
        f"federated_broadcast: x ({FLOATS}) is at CLIENTS already; only a value at SERVER is broadcast",
    ),
    "a sum of truth values": (
        lambda x: sv.federated_sum(x),
        ("{bool}@CLIENTS",),
        "federated_sum: bool is no number and cannot be added up; map a cast first: "
        "sv.federated_map(sv.cast('int32'), value)",
    ),
    "a mean of whole numbers": (
        lambda x: sv.federated_mean(x),
        ("{<a=float32,b=int32>}@CLIENTS",),
        "federated_mean: the mean of int32, at b is no whole number; map sv.cast('float32') over the value first",
    ),
    "a bound upside down": (
        lambda x: sv.federated_sum(x, bound=(3, 1)),
        (FLOATS,),
        "federated_sum: bound is (low, high), two finite numbers, the lower one first, not (3, 1)",
    ),
    "a secure sum of floats": (
        lambda x: sv.federated_secure_sum(x, 10),
        (FLOATS,),
        "federated_secure_sum: float32 is not of whole numbers; map sv.cast('int32'), or use sv.federated_sum(bound=)",
    ),
    "nothing returned": (
        lambda x: None,
        (FLOATS,),
        "lambda: it returns nothing; end it with `return` and the value it computes",
    ),
    "a federated operator in a mapped function": (
        lambda x: sv.federated_map(lambda v: sv.federated_sum(v), x),
        (FLOATS,),
        "federated_sum: lambda is mapped over the values of one member, and federated_sum speaks of all of them. "
        "Use it in the function decorated with @sv.federated_computation, beside federated_map",
    ),
    "a value of the function outside": (
        lambda x, y: sv.federated_map(lambda v: y, x),
        (FLOATS, FLOATS),
        f"lambda: y ({FLOATS}) belongs to another function than the one being defined here. A function that is mapped "
        "sees only its own argument: hand the value in, as in sv.federated_map(function, (value, "
        "sv.federated_broadcast(other)))",
    ),
    "an element that is not there": (
        lambda x: x.c,
        ("{<a=float32,b=int32>}@CLIENTS",),
        ".c: x ({<a=float32,b=int32>}@CLIENTS) has no element 'c'; it has a, b",
    ),
    "value before function": (
        lambda x: sv.federated_map(x, sv.cast("float32")),
        (FLOATS,),
        "federated_map: the function comes first, then the value: sv.federated_map(function, value)",
    ),
    "no function at all": (
        lambda x: sv.federated_map(3, x),
        (FLOATS,),
        "federated_map: the function comes first, then the value: 3 is no function",
    ),
    "a placement that is none": (
        lambda x: sv.federated_value(1, "SERVER"),  # type: ignore[arg-type]
        (FLOATS,),
        "federated_value: the placement is sv.CLIENTS or sv.SERVER, not 'SERVER'",
    ),
    "keys that are none": (
        lambda x: sv.federated_select(x, 3, sv.federated_value(1, sv.SERVER), lambda table, key: table),
        (FLOATS,),
        f"federated_select: x ({FLOATS}) are no keys; they must be {{int32[n]}}@CLIENTS",
    ),
    "a reduction of no sequence": (
        lambda x: sv.sequence_sum(x),
        (FLOATS,),
        f"sequence_sum: x ({FLOATS}) is no sequence; declare one as T*, for example {{float32*}}@CLIENTS",
    ),
    "a clip of truth values": (
        lambda x: sv.federated_map(sv.clip(0, 1), x),
        ("{bool}@CLIENTS",),
        "federated_map: sv.clip(0, 1) cannot take bool: "
        "a truth value is 0 or 1 anyway; cast it first if you need a number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_how(name: str) -> None:
    function, types, expected = REFUSED[name]
    text = refusal(function, *types)
    assert text.partition(", ")[2] == expected


@sv.server_computation("float32", result="float32")
def doubled(x: Any) -> Any:
    return 2 * x


def test_python_of_this_process_does_not_travel_to_clients() -> None:
    text = refusal(lambda x: sv.federated_map(doubled, x), FLOATS)
    assert text.partition(", ")[2] == (
        "federated_map: doubled is Python code of this process, and no Python travels to the devices. "
        "Write it in TensorFlow and decorate it with @sv.tf_computation, or map it at SERVER"
    )


def test_nor_does_it_inside_another_function() -> None:
    assert "doubled is Python code" in refusal(lambda x: sv.federated_map(lambda v: doubled(v), x), FLOATS)


def test_a_function_of_one_place_is_mapped_not_called() -> None:
    text = refusal(lambda x: doubled(x), FLOATS)
    assert text.partition(", ")[2] == (
        f"doubled: x ({FLOATS}) is placed, and doubled takes values without a placement: "
        "use sv.federated_map(doubled, value), which applies it where the value is"
    )


def test_a_type_that_does_not_fit_shows_both_types() -> None:
    with pytest.raises(TypeMismatch) as refused:
        sv.federated_computation(lambda x: sv.federated_map(doubled, x), "int32@SERVER")
    assert str(refused.value).partition(", ")[2] == (
        "federated_map: the argument of doubled does not fit its type\n"
        "    expected: float32\n"
        "    found:    int32\n"
        'Convert it with sv.cast("float32"), or declare int32.'
    )


def test_an_operator_outside_of_a_definition_says_where_it_belongs() -> None:
    with pytest.raises(DefinitionError) as refused:
        sv.federated_sum([1, 2, 3])
    assert str(refused.value).partition(", ")[2] == (
        "federated_sum: there is nothing to add to here. Operators describe a computation: call them inside a "
        "function decorated with @sv.federated_computation, and then call that function with numbers"
    )


def test_a_value_shows_its_type_to_a_debugger_and_unpacks() -> None:
    seen = []

    def look(x: Any) -> Any:
        seen.append(repr(x))
        a, b = x
        return sv.federated_mean(a, b)

    computation = sv.federated_computation(look, "{<a=float32,b=int32>}@CLIENTS")
    assert seen == ["<value of type {<a=float32,b=int32>}@CLIENTS>"]
    assert computation([(1.0, 1), (4.0, 2)]) == 3.0


def test_an_element_by_position_beyond_the_last_ends_a_loop() -> None:
    with pytest.raises(IndexError, match=r"has 2 elements"):
        sv.federated_computation(lambda x: x[2], "{<float32,int32>}@CLIENTS")


def test_types_and_parameters_must_be_as_many() -> None:
    text = refusal(lambda x: x, FLOATS, FLOATS)
    assert text.endswith(
        "sv.federated_computation declares the types ({float32}@CLIENTS, {float32}@CLIENTS), and the function takes "
        "(x); give one type for each parameter, in order"
    )


def test_local_functions_declare_no_placement() -> None:
    with pytest.raises(DefinitionError, match=r"x is float32@SERVER; a server_computation sees the value of one place"):
        sv.server_computation("float32@SERVER", result="float32")(lambda x: x)
