"""The reader of the type notation: a recursive descent over text that may come from anywhere.

    type    := primary ( "*" | "@" placement )*
    primary := dtype [ "[" dim ("," dim)* "]" ]      float32[?,64]
             | "<" [ element ("," element)* ] ">"    <a=float32,b=int32[3]>
             | "{" type "}" "@" "CLIENTS"            {float32}@CLIENTS
             | "(" [ type ] "->" type ")"            (int32 -> bool)
    element := [ name "=" ] type

Spaces may stand between any two signs. Length and depth are bounded, so that no text costs more than reading it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from sottovoce.errors import ConfigError
from sottovoce.types import (
    CLIENTS,
    HOST_DTYPES,
    MAX_DIMENSION,
    SERVER,
    FederatedType,
    FunctionType,
    Placement,
    SequenceType,
    StructType,
    TensorType,
    Type,
)

MAX_CHARACTERS: Final = 65_536
MAX_DEPTH: Final = 64

_T = TypeVar("_T")
_SIGN = re.compile(r"\s*(->|[A-Za-z_][A-Za-z0-9_]*|[0-9]+|.)", re.ASCII | re.DOTALL)
_EXAMPLE = "write for example float32[10], <a=int32,b=bool>, float32*, (int32 -> bool) or {float32}@CLIENTS"
_OTHER_NAMES = {
    "string": "str",
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "long": "int64",
    "boolean": "bool",
}
"""How dtypes are called elsewhere, and here."""
_SHOWN = 60
"""Characters of a wrong notation shown on either side of the place."""


@functools.lru_cache(maxsize=1024)
def parse(notation: str) -> Type:
    """Return the type that `notation` names.

    Raises:
        ConfigError: It names none; the text shows the place and how types are written.
    """
    if len(notation) > MAX_CHARACTERS:
        raise ConfigError(f"a type of {len(notation)} characters is longer than the {MAX_CHARACTERS} that are read")
    return _Reader(notation).whole()


class _Reader:
    """One pass over one notation; `_sign` is the sign to be read next and `_place` where it stands."""

    def __init__(self, notation: str) -> None:
        self._notation = notation
        self._signs = [(match[1], match.start(1)) for match in _SIGN.finditer(notation.rstrip())]
        self._next = 0
        self._depth = 0

    def whole(self) -> Type:
        """Return the type that the whole text names."""
        kind = self._type()
        if self._sign == "->":
            self._refuse("a function is written in parentheses, as in (int32 -> bool)")
        if self._sign:
            self._refuse(f"the type {kind} ends before this")
        return kind

    @property
    def _sign(self) -> str:
        return self._signs[self._next][0] if self._next < len(self._signs) else ""

    @property
    def _place(self) -> int:
        return self._signs[self._next][1] if self._next < len(self._signs) else len(self._notation.rstrip())

    def _take(self, sign: str) -> bool:
        if self._sign != sign:
            return False
        self._next += 1
        return True

    def _expect(self, sign: str, why: str) -> None:
        if not self._take(sign):
            self._refuse(f"{sign!r} is missing here {why}")

    def _type(self) -> Type:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"types are read to a depth of {MAX_DEPTH}")
        kind = self._primary()
        while self._sign in ("*", "@"):
            place = self._next
            if self._take("*"):
                kind = self._made(place, SequenceType, kind)
            elif self._take("@"):
                kind = self._made(place, FederatedType, kind, self._placement(), True)
        self._depth -= 1
        return kind

    def _primary(self) -> Type:
        if self._take("<"):
            return self._struct()
        if self._take("{"):
            return self._per_client()
        if self._take("("):
            return self._function()
        return self._tensor()

    def _struct(self) -> StructType:
        start = self._next - 1
        elements: list[tuple[str | None, Type]] = []
        while not self._take(">"):
            if elements:
                self._expect(",", "between two elements, or '>' at the end of the struct")
            elements.append((self._name(), self._type()))
        return self._made(start, StructType, tuple(elements))

    def _name(self) -> str | None:
        name = self._sign
        if self._next + 1 >= len(self._signs) or self._signs[self._next + 1][0] != "=":
            return None
        if not (name[0].isalpha() or name[0] == "_"):
            self._refuse("the name of an element is letters, digits and _, and does not begin with a digit")
        self._next += 2
        return name

    def _per_client(self) -> FederatedType:
        start = self._next - 1
        member = self._type()
        self._expect("}", "after the type of one client's value")
        if self._sign != "@":
            self._refuse("braces mean one value per client and are followed by @CLIENTS, as in {float32}@CLIENTS")
        self._next += 1
        return self._made(start, FederatedType, member, self._placement(), False)

    def _placement(self) -> Placement:
        for placement in (CLIENTS, SERVER):
            if self._take(placement.value):
                return placement
        self._refuse("a placement is CLIENTS or SERVER")

    def _function(self) -> FunctionType:
        parameter = None if self._sign == "->" else self._type()
        self._expect("->", "in a function such as (int32 -> bool)")
        result = self._type()
        self._expect(")", "after the result of a function")
        return FunctionType(parameter, result)

    def _tensor(self) -> TensorType:
        if self._sign not in HOST_DTYPES:
            written = _OTHER_NAMES.get(self._sign)
            hint = f"{self._sign!r} is written {written}; " if written else ""
            self._refuse(f"{hint}a dtype is one of {', '.join(HOST_DTYPES)}")
        dtype = self._sign
        self._next += 1
        return TensorType(dtype, self._shape() if self._take("[") else ())

    def _shape(self) -> tuple[int | None, ...]:
        dims = [self._dimension()]
        while self._take(","):
            dims.append(self._dimension())
        self._expect("]", "after a shape")
        return tuple(dims)

    def _dimension(self) -> int | None:
        if self._take("?"):
            return None
        # The length is held against the bound first: int() of a thousand digits is slow, and of more it raises.
        if not self._sign.isdigit() or len(self._sign) > 10 or int(self._sign) > MAX_DIMENSION:
            self._refuse(f"a dimension is a number up to {MAX_DIMENSION}, or ? where it is not known")
        self._next += 1
        return int(self._signs[self._next - 1][0])

    def _made(self, start: int, make: Callable[..., _T], *parts: object) -> _T:
        """Make a type of its parts; what the type itself refuses is told with the place at which it begins."""
        try:
            return make(*parts)
        except ConfigError as error:
            self._next = start
            self._refuse(str(error))

    def _refuse(self, why: str) -> NoReturn:
        place = self._place
        start = max(0, place - _SHOWN)
        excerpt = "".join(c if c.isprintable() else " " for c in self._notation[start : place + _SHOWN])
        found = f"found {self._sign[:_SHOWN]!r}" if self._sign else "found the end"
        raise ConfigError(
            f"cannot read this type at character {place + 1} ({found}): {why}\n"
            f"    {excerpt}\n    {' ' * (place - start)}^\n{_EXAMPLE}"
        )
