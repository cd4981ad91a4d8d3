"""Relations between types: TFF's rules as a table, and errors that tell a newcomer what to change."""

from __future__ import annotations

import pytest

from sottovoce.errors import ConfigError, TypeMismatch
from sottovoce.language.relations import check_assignable, is_assignable, is_equivalent, is_identical
from sottovoce.types import type_of

ASSIGNABLE = [  # (target, source)
    ("int32", "int32"),
    ("int32[?]", "int32[10]"),
    ("int32[?,3]", "int32[2,3]"),
    ("<a=int32,b=bool>", "<int32,bool>"),
    ("<a=int32,b=bool>", "<a=int32,bool>"),
    ("<a=float32[?]>", "<a=float32[3]>"),
    ("float32[?]*", "float32[3]*"),
    ("{int32}@CLIENTS", "int32@CLIENTS"),
    ("{int32[?]}@CLIENTS", "{int32[2]}@CLIENTS"),
    ("<a=int32>@SERVER", "<int32>@SERVER"),
    ("(int32[2] -> int32[?])", "(int32[?] -> int32[2])"),
    ("(int32@CLIENTS -> int32)", "({int32}@CLIENTS -> int32)"),
    ("( -> int32[?])", "( -> int32[1])"),
]
NOT_ASSIGNABLE = [
    *((source, target) for target, source in ASSIGNABLE if target != source),
    ("int32", "float32"),
    ("int32", "int64"),
    ("int32[2]", "int32[3]"),
    ("int32", "int32[1]"),
    ("<a=int32>", "<b=int32>"),
    ("<a=int32,b=int32>", "<b=int32,a=int32>"),
    ("<int32>", "<int32,int32>"),
    ("<int32>", "int32"),
    ("int32*", "int32"),
    ("int32@SERVER", "int32@CLIENTS"),
    ("{int32}@CLIENTS", "int32@SERVER"),
    ("int32", "int32@SERVER"),
    ("( -> int32)", "(int32 -> int32)"),
    ("(int32 -> int32)", "(float32 -> int32)"),
    ("(int32 -> bool)", "bool"),
]


@pytest.mark.parametrize(("target", "source"), ASSIGNABLE)
def test_assignable(target: str, source: str) -> None:
    assert is_assignable(target=type_of(target), source=type_of(source))
    check_assignable(type_of(target), type_of(source), what="the value")


@pytest.mark.parametrize(("target", "source"), NOT_ASSIGNABLE)
def test_not_assignable(target: str, source: str) -> None:
    assert not is_assignable(target=type_of(target), source=type_of(source))
    with pytest.raises(TypeMismatch) as refused:
        check_assignable(type_of(target), type_of(source), what="the value")
    assert isinstance(refused.value, ConfigError)
    assert (refused.value.expected, refused.value.found) == (type_of(target), type_of(source))
    lines = str(refused.value).splitlines()
    assert lines[1:3] == [f"    expected: {target}", f"    found:    {source}"]
    assert lines[3]


def test_identical_and_equivalent() -> None:
    named, unnamed = (
        type_of("({<a=int32*,b=bool>}@CLIENTS -> <c=int32>)"),
        type_of("({<int32*,bool>}@CLIENTS -> <int32>)"),
    )
    assert is_identical(named, type_of(str(named)))
    assert not is_identical(named, unnamed)
    assert is_equivalent(named, unnamed)
    assert is_equivalent(unnamed, named)
    assert not is_equivalent(type_of("int32[?]"), type_of("int32[3]"))
    assert not is_equivalent(type_of("{int32}@CLIENTS"), type_of("int32@CLIENTS"))


def refusal(target: str, source: str) -> str:
    with pytest.raises(TypeMismatch) as refused:
        check_assignable(type_of(target), type_of(source), what="the argument readings of over")
    return str(refused.value)


def test_the_whole_text() -> None:
    assert refusal("{float32}@CLIENTS", "float32@SERVER") == (
        "the argument readings of over does not fit its type\n"
        "    expected: {float32}@CLIENTS\n"
        "    found:    float32@SERVER\n"
        "A value of the server reaches the clients with sv.federated_broadcast."
    )


@pytest.mark.parametrize(
    ("target", "source", "cure"),
    [
        ("int32", "float32", 'Convert it with sv.cast("int32"), or declare float32.'),
        (
            "<a=<b=int32>>",
            "<a=<b=bool>>",
            'At a.b, int32 is declared and bool is given. Convert it with sv.cast("int32")',
        ),
        ("float32[2]", "float32[3]", "Give it the shape of float32[2], or declare float32[3]"),
        ("int32@SERVER", "{int32}@CLIENTS", "sv.federated_sum or sv.federated_mean"),
        ("int32@SERVER", "int32", "sv.federated_value(..., sv.SERVER)"),
        ("int32@CLIENTS", "{int32}@CLIENTS", "declare {int32}@CLIENTS"),
        ("int32", "{int32}@CLIENTS", "apply the function with sv.federated_map"),
        ("int32*", "int32", "use sv.collection"),
        ("int32", "int32*", "sv.sequence_sum"),
        ("<a=int32,b=bool>", "<b=bool,a=int32>", "Put the elements in the declared order: a, b."),
        ("<a=int32>", "<b=int32>", "Name the elements as they are declared (a)"),
        ("<a=int32>", "<>", "Give 1 elements; there are 0."),
        ("(int32 -> bool)", "int32", "Give a function here"),
        ("int32", "(int32 -> bool)", "Call the function"),
        ("(int32 -> bool)", "(bool -> bool)", "or adapt it with a lambda"),
        ("<int32>", "int32", "Give a <int32>, or declare int32."),
    ],
)
def test_the_cure_is_said(target: str, source: str, cure: str) -> None:
    assert cure in refusal(target, source)
