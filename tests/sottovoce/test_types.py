"""The type notation: TensorFlow Federated's, printed and read, and every mistake told with its place."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import ConfigError
from sottovoce.types import (
    CLIENTS,
    DTYPES,
    SERVER,
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
    TensorType,
    Type,
    at_clients,
    at_server,
    contains,
    type_of,
)

F32, I32, BOOL, STR = TensorType("float32"), TensorType("int32"), TensorType("bool"), TensorType("str")


def struct(*unnamed: Type, **named: Type) -> StructType:
    return StructType((*((None, t) for t in unnamed), *named.items()))


PREDICATE = FunctionType(I32, BOOL)
MODEL = struct(weights=TensorType("float32", (784, 10)), bias=TensorType("float32", (10,)))
BATCH = struct(x=TensorType("float32", (None, 784)), y=TensorType("int32", (None, 1)))

# What TFF prints for these types (computation_types_test.py, the documentation of the federated core and of learning).
TABLE: dict[str, Type] = {
    "int32": I32,
    "bool": BOOL,
    "str": STR,
    "float64": TensorType("float64"),
    "uint8[28,28]": TensorType("uint8", (28, 28)),
    "int32[10]": TensorType("int32", (10,)),
    "int32[?]": TensorType("int32", (None,)),
    "float32[?,3]": TensorType("float32", (None, 3)),
    "float32[?,28,28,1]": TensorType("float32", (None, 28, 28, 1)),
    "str[2]": TensorType("str", (2,)),
    "<>": struct(),
    "<int32>": struct(I32),
    "<a=int32>": struct(a=I32),
    "<int32,bool>": struct(I32, BOOL),
    "<float32,int32>": struct(F32, I32),
    "<a=int32,b=bool>": struct(a=I32, b=BOOL),
    "<a=float32,b=int32[3]>": struct(a=F32, b=TensorType("int32", (3,))),
    "<int32,b=bool>": struct(I32, b=BOOL),
    "<a=int32,b=<x=bool,y=float32>>": struct(a=I32, b=struct(x=BOOL, y=F32)),
    "<<int32,bool>,<float32>>": struct(struct(I32, BOOL), struct(F32)),
    "<weights=float32[784,10],bias=float32[10]>": MODEL,
    "float32*": SequenceType(F32),
    "float32[?,3]*": SequenceType(TensorType("float32", (None, 3))),
    "<int32,bool>*": SequenceType(struct(I32, BOOL)),
    "<x=float32[?,784],y=int32[?,1]>*": SequenceType(BATCH),
    "<int32*,bool*>": struct(SequenceType(I32), SequenceType(BOOL)),
    "(int32 -> bool)": PREDICATE,
    "( -> int32)": FunctionType(None, I32),
    "(<> -> int32)": FunctionType(struct(), I32),
    "(<int32,int32> -> bool)": FunctionType(struct(I32, I32), BOOL),
    "(<x=int32,y=int32> -> int32)": FunctionType(struct(x=I32, y=I32), I32),
    "(int32* -> int32)": FunctionType(SequenceType(I32), I32),
    "((int32 -> bool) -> int32)": FunctionType(PREDICATE, I32),
    "(int32 -> (int32 -> bool))": FunctionType(I32, PREDICATE),
    "( -> ( -> int32))": FunctionType(None, FunctionType(None, I32)),
    "(<f=(int32 -> bool),x=int32> -> bool)": FunctionType(struct(f=PREDICATE, x=I32), BOOL),
    "<(int32 -> bool),int32>": struct(PREDICATE, I32),
    "int32@SERVER": FederatedType(I32, SERVER),
    "int32@CLIENTS": FederatedType(I32, CLIENTS, all_equal=True),
    "{int32}@CLIENTS": FederatedType(I32, CLIENTS),
    "{float32*}@CLIENTS": FederatedType(SequenceType(F32), CLIENTS),
    "{<int32,bool>}@CLIENTS": FederatedType(struct(I32, BOOL), CLIENTS),
    "<weights=float32[784,10],bias=float32[10]>@SERVER": FederatedType(MODEL, SERVER),
    "<{int32}@CLIENTS,float32@SERVER>": struct(at_clients(I32), at_server(F32)),
    "({int32}@CLIENTS -> int32@SERVER)": FunctionType(at_clients(I32), at_server(I32)),
    "({float32}@CLIENTS -> float32@SERVER)": FunctionType(at_clients(F32), at_server(F32)),
    "(int32@SERVER -> int32@CLIENTS)": FunctionType(at_server(I32), at_clients(I32, all_equal=True)),
    "( -> <>@SERVER)": FunctionType(None, at_server(struct())),
    "(<{int32}@CLIENTS,(int32 -> bool)> -> {bool}@CLIENTS)": FunctionType(
        struct(at_clients(I32), PREDICATE), at_clients(BOOL)
    ),
    "(<readings={float32}@CLIENTS,threshold=float32@SERVER> -> float32@SERVER)": FunctionType(
        struct(readings=at_clients(F32), threshold=at_server(F32)), at_server(F32)
    ),
    "(<state=<weights=float32[784,10],bias=float32[10]>@SERVER,"
    "data={<x=float32[?,784],y=int32[?,1]>*}@CLIENTS> -> <weights=float32[784,10],bias=float32[10]>@SERVER)": (
        FunctionType(struct(state=at_server(MODEL), data=at_clients(SequenceType(BATCH))), at_server(MODEL))
    ),
}


@pytest.mark.parametrize("notation", TABLE)
def test_a_type_is_printed_and_read_in_tffs_notation(notation: str) -> None:
    assert str(TABLE[notation]) == notation
    assert type_of(notation) == TABLE[notation]
    assert len(TABLE) >= 45


def test_spaces_may_stand_anywhere() -> None:
    assert type_of(" (< a = int32 , b = float32 [ ? , 3 ] * > -> { bool } @ CLIENTS ) ") == FunctionType(
        struct(a=I32, b=SequenceType(TensorType("float32", (None, 3)))), at_clients(BOOL)
    )


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
tensors = st.builds(
    TensorType,
    st.sampled_from([*DTYPES, "str"]),
    st.lists(st.none() | st.integers(0, 2**31 - 1), max_size=3).map(tuple),
)


def structs(parts: st.SearchStrategy[Type]) -> st.SearchStrategy[Type]:
    named = st.lists(st.tuples(st.none() | names, parts), max_size=4, unique_by=lambda e: e[0] or object())
    return named.map(lambda elements: StructType(tuple(elements)))


members = st.recursive(tensors, structs, max_leaves=8)
placed = st.builds(at_server, members | members.map(SequenceType)) | st.builds(
    at_clients, members | members.map(SequenceType), all_equal=st.booleans()
)
types = st.recursive(
    members | members.map(SequenceType) | placed,
    lambda parts: structs(parts) | st.builds(FunctionType, st.none() | parts, parts),
    max_leaves=6,
)


@given(types)
def test_what_is_printed_is_read_back(kind: Type) -> None:
    assert type_of(str(kind)) == kind


@given(st.text(alphabet="<>{}()[]*@?=,-> aint32float_CLIENTSR0123", max_size=60) | st.text(max_size=40))
def test_any_text_is_a_type_or_a_config_error(text: str) -> None:
    try:
        kind = type_of(text)
    except ConfigError:
        return
    assert type_of(str(kind)) == kind


def wrong(notation: str) -> str:
    with pytest.raises(ConfigError) as refused:
        type_of(notation)
    return str(refused.value)


def test_a_mistake_is_shown_where_it_stands() -> None:
    assert wrong("<a=int32,b=flaot32>") == (
        "cannot read this type at character 12 (found 'flaot32'): "
        "a dtype is one of float32, float64, int8, int32, int64, uint8, uint32, uint64, bool, str\n"
        "    <a=int32,b=flaot32>\n"
        "               ^\n"
        "write for example float32[10], <a=int32,b=bool>, float32*, (int32 -> bool) or {float32}@CLIENTS"
    )


@pytest.mark.parametrize(
    ("notation", "place", "advice"),
    [
        ("", 1, "found the end"),
        ("string", 1, "'string' is written str"),
        ("<a=float>", 4, "'float' is written float32"),
        ("int32 -> bool", 7, "a function is written in parentheses, as in (int32 -> bool)"),
        ("(int32)", 7, "'->' is missing here"),
        ("(int32 -> bool", 15, "')' is missing here"),
        ("<a=int32", 9, "',' is missing here"),
        ("<int32 bool>", 8, "',' is missing here"),
        ("<1a=int32>", 2, "a dtype is one of"),
        ("<1=int32>", 2, "does not begin with a digit"),
        ("<a=int32,a=bool>", 1, "two elements of a struct are called 'a'"),
        ("{float32}", 10, "followed by @CLIENTS, as in {float32}@CLIENTS"),
        ("{float32@CLIENTS", 17, "'}' is missing here"),
        ("float32@CLIENT", 9, "a placement is CLIENTS or SERVER"),
        ("{float32}@SERVER", 1, "write float32@SERVER"),
        ("{int32@SERVER}@CLIENTS", 1, "int32@SERVER cannot stand inside a placed type"),
        ("(int32 -> bool)*", 16, "(int32 -> bool) cannot stand inside a sequence"),
        ("int32**", 7, "int32* cannot stand inside a sequence"),
        ("int32[]", 7, "a dimension is a number"),
        ("int32[-1]", 7, "a dimension is a number"),
        ("int32[2147483648]", 7, "a dimension is a number up to 2147483647"),
        ("int32 int32", 7, "the type int32 ends before this"),
    ],
)
def test_every_mistake_names_its_place_and_cure(notation: str, place: int, advice: str) -> None:
    text = wrong(notation)
    assert text.startswith(f"cannot read this type at character {place} ")
    assert advice in text


def test_hostile_text_is_bounded() -> None:
    assert "read to a depth of 64" in wrong("<" * 5000)
    assert "longer than the 65536" in wrong("int32" + " " * 70_000)
    assert "a dimension is a number" in wrong("int32[" + "9" * 10_000 + "]")
    assert max(map(len, wrong("<" + "a=int32,\x1b[2J" * 1000).splitlines())) < 250
    assert "\x1b" not in wrong("\x1b[2J")


def test_descriptions_other_than_the_notation() -> None:
    assert type_of(np.float32) == type_of(np.dtype("float32")) == type_of(float) == F32
    assert (type_of(int), type_of(bool), type_of(str)) == (I32, BOOL, STR)
    assert type_of((np.float32, (None, 3))) == TensorType("float32", (None, 3))
    assert type_of({"a": "int32", "b": {"c": bool}}) == struct(a=I32, b=struct(c=BOOL))
    assert type_of(("float32", np.int32)) == type_of(["float32", int]) == struct(F32, I32)
    assert type_of(namedtuple("Point", "x y")(float, "int32")) == struct(x=F32, y=I32)
    assert type_of(PREDICATE) is PREDICATE
    assert type_of([("a", np.int32), ("b", "bool")]) == struct(a=I32, b=BOOL)


class TensorFlowLike:
    """What a TensorFlow dtype has; here nothing imports TensorFlow."""

    as_numpy_dtype = np.float32


def test_the_classes_take_descriptions_as_tffs_do() -> None:
    dtype: Any = TensorFlowLike()
    assert type_of(dtype) == TensorType(dtype) == F32
    assert TensorType(np.float32, [None, 3]) == TensorType("float32", (None, 3))  # type: ignore[arg-type]
    assert str(FederatedType(float, CLIENTS)) == "{float32}@CLIENTS"  # type: ignore[arg-type]
    assert str(SequenceType({"x": np.int32, "y": bool})) == "<x=int32,y=bool>*"  # type: ignore[arg-type]
    assert StructType([("a", np.int32), (None, "bool")]) == StructType((("a", I32), (None, BOOL)))  # type: ignore[arg-type]
    assert StructType({"a": int}) == struct(a=I32)  # type: ignore[arg-type]
    assert FunctionType(np.int32, np.bool_) == PREDICATE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: TensorType("float32", 3), r"a shape is a tuple of dimensions, such as \(10,\) or \(None, 3\), not 3"),
        (lambda: TensorType("float32", (-1,)), "a dimension is a number from 0 to 2147483647, or None .*, not -1"),
        (lambda: type_of((np.float32, (True,))), "a dimension is a number from 0 to 2147483647, or None .*, not True"),
        (lambda: type_of((np.float32, (2**31,))), "a dimension is a number"),
        (lambda: StructType((I32, BOOL)), "a struct is made of pairs of a name"),
        (lambda: FederatedType(F32, "CLIENTS"), r"a placement is sv.CLIENTS or sv.SERVER, not 'CLIENTS'"),
        (lambda: SequenceType(3), "3 does not name a type"),
    ],
)
def test_the_classes_refuse_what_is_no_type(make: Callable[[], Type], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        make()


@pytest.mark.parametrize("description", [3, None, object(), np.complex64, {"a": 1}, ("int32", (2, "x")), {"1a": int}])
def test_what_names_no_type_is_refused(description: object) -> None:
    with pytest.raises(ConfigError):
        type_of(description)


def test_types_that_cannot_be_are_refused_when_made() -> None:
    with pytest.raises(ConfigError, match="cannot stand inside a sequence"):
        SequenceType(struct(a=SequenceType(I32)))
    with pytest.raises(ConfigError, match="cannot stand inside a placed type"):
        at_clients(struct(f=PREDICATE))
    with pytest.raises(ConfigError, match="the server holds one value"):
        FederatedType(I32, SERVER, all_equal=False)


def test_a_string_never_travels() -> None:
    with pytest.raises(ConfigError, match="a str cannot travel"):
        TensorType.parse("str")


def test_parts_of_a_type_are_found() -> None:
    assert contains(TABLE["(<{int32}@CLIENTS,(int32 -> bool)> -> {bool}@CLIENTS)"], FederatedType) == at_clients(I32)
    assert contains(MODEL, SequenceType, FunctionType) is None


def test_elements_of_a_struct_are_found_by_name_and_position() -> None:
    kind = struct(I32, b=BOOL)
    assert (kind.index("b"), kind.index(0), len(kind), kind.names) == (1, 0, 2, ("b",))
    with pytest.raises(ConfigError, match=r"<int32,b=bool> has no element 'c'; it has b"):
        kind.index("c")
