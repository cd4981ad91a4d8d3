"""A computation while it is being defined: `Value` stands for what will be known when it runs, `Definition` collects.

An author's function runs once, when it is decorated, on `Value`s: there are types then, and no numbers. Whatever would
need a number (`if`, `float`, `print`, numpy, arithmetic) is refused here, with the author's line and what to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from sottovoce.errors import ConfigError, DefinitionError
from sottovoce.language.constants import constant_type, named_parts
from sottovoce.language.expressions import Body, Operator, Source, Step, pruned
from sottovoce.language.sources import here, line_of
from sottovoce.types import CLIENTS, FederatedType, SequenceType, StructType, Type, contains
from sottovoce.values import Record, flatten, to_value

_current: ContextVar[Definition | None] = ContextVar("definition", default=None)


class Definition:
    """Collects the steps of one body while the author's function runs.

    Attributes:
        name: Of the computation or function.
        placed: Whether federated operators may be used: not inside a function that is mapped over values.
    """

    def __init__(self, name: str, *, placed: bool) -> None:
        self.name = name
        self.placed = placed
        self._parameters: list[tuple[str, Type]] = []
        self._steps: list[Step] = []

    def parameter(self, name: str, kind: Type) -> Value:
        """Return the value of one more parameter; before any other step."""
        self._parameters.append((name, kind))
        return self.add(Step("parameter", (), kind, here(), name=name))

    def add(self, step: Step) -> Value:
        """Append `step` and return its value.

        Raises:
            DefinitionError: A second write to one slot of client state.
        """
        if step.operator == "client_state_write":
            for earlier in self._steps:
                if earlier.operator == step.operator and earlier.slot and step.slot == earlier.slot:
                    text = f"{step.slot.name!r} is written at {earlier.source} already; write it once a round"
                    raise DefinitionError(step.where, text)
        self._steps.append(step)
        return Value(self, len(self._steps) - 1)

    def step(self, index: int) -> Step:
        """Return the step `index`."""
        return self._steps[index]

    def inline(self, body: Body, arguments: Sequence[Value]) -> Value:
        """Copy the steps of `body` in, `arguments` for its parameters, and return its result."""
        at: list[int] = [index_of(argument) for argument in arguments]
        for step in body.steps[len(arguments) :]:
            at.append(index_of(self.add(replace(step, inputs=tuple(at[i] for i in step.inputs)))))
        return Value(self, at[body.result])

    def body(self, result: Value) -> Body:
        """Return everything that `result` needs, and every write of client state."""
        return pruned(Body(tuple(self._parameters), tuple(self._steps), index_of(result)))


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the author's program where an operator is called, inside a definition."""

    definition: Definition
    operator: str
    source: Source

    @property
    def where(self) -> str:
        """File, line and operator, as errors begin."""
        return f"{self.source}, {self.operator}"

    def refuse(self, text: str) -> NoReturn:
        """Raise DefinitionError with the author's line."""
        raise DefinitionError(self.where, text)

    def value(self, given: object, kind: Type | None = None) -> Value:
        """Return `given` as a value: itself, a constant as a literal, mappings and tuples as structs.

        Args:
            given: A value or a constant of the author's.
            kind: The type that is declared for it, if any; a constant is converted to it unless it is placed.

        Raises:
            DefinitionError: It belongs to another definition, or it is nothing that can be a value.
            TypeMismatch: A constant is not of type `kind`.
        """
        if isinstance(given, Value):
            if definition_of(given) is not self.definition:
                self.refuse(_FOREIGN.format(name=described(given)))
            return given
        if _holds_values(given):
            return self._struct(given)
        if kind is None or contains(kind, FederatedType, SequenceType):
            kind = self._constant_type(given)
        leaves = tuple(flatten(kind, to_value(kind, given, what=f"{self.where}: this constant")))
        return self.definition.add(Step("literal", (), kind, self.source, value=leaves))

    def step(self, operator: Operator, inputs: Sequence[Value], kind: Type, **fields: Any) -> Value:
        """Append a step at this place and return its value."""
        return self.definition.add(Step(operator, tuple(map(index_of, inputs)), kind, self.source, **fields))

    def _constant_type(self, constant: object) -> Type:
        try:
            return constant_type(constant)
        except ConfigError as error:
            self.refuse(f"{constant!r} cannot be a value here: {error}")

    def _struct(self, given: Any) -> Value:
        names, parts = named_parts(given)
        values = [self.value(part) for part in parts]
        kind = StructType(tuple((name, value.type_signature) for name, value in zip(names, values, strict=True)))
        return self.step("struct", values, kind)


_FOREIGN = (
    "{name} belongs to another function than the one being defined here. A function that is mapped sees only its own "
    "argument: hand the value in, as in sv.federated_map(function, (value, sv.federated_broadcast(other)))"
)


class Value:
    """What a computation will have at this point: a type now, a number only when it runs.

    Elements of a struct are selected by attribute or index; a struct can be unpacked. Everything that needs a number
    raises DefinitionError with the author's line and what to write instead.
    """

    __slots__ = ("_definition", "_index")
    __hash__ = object.__hash__

    def __init__(self, definition: Definition, index: int) -> None:
        self._definition = definition
        self._index = index

    @property
    def type_signature(self) -> Type:
        """The type, for example `{float32}@CLIENTS`."""
        return self._definition.step(self._index).type

    def __repr__(self) -> str:
        return f"<value of type {self.type_signature}>"

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = _struct_type(self)
        if kind is None or name not in kind.names:
            _refuse_attribute(self, name, kind)
        return _select(self, kind, kind.index(name))

    def __getitem__(self, key: int | str) -> Value:
        kind = _struct_type(self)
        if kind is None or not isinstance(key, int | str):
            _refuse_python(self, f"[{key!r}]" if isinstance(key, int | str | slice) else "[...]")
        if isinstance(key, int) and not -len(kind) <= key < len(kind):
            raise IndexError(f"{self.type_signature} has {len(kind)} elements")
        try:
            return _select(self, kind, key % len(kind) if isinstance(key, int) else kind.index(key))
        except ConfigError as error:
            raise DefinitionError(f"{here()}, [{key!r}]", str(error)) from error

    def __iter__(self) -> Iterator[Value]:
        kind = _struct_type(self)
        if kind is None:
            _refuse_python(self, "a loop over it (for, list, sum)")
        return iter([_select(self, kind, index) for index in range(len(kind))])

    def __len__(self) -> int:
        kind = _struct_type(self)
        if kind is None:
            _refuse_python(self, "len()")
        return len(kind)

    def __array_ufunc__(self, ufunc: Any, *_: object, **__: object) -> NoReturn:
        _refuse_python(self, f"numpy.{ufunc.__name__}")

    def __array_function__(self, function: Any, *_: object) -> NoReturn:
        _refuse_python(self, f"numpy.{function.__name__}")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        _refuse_python(self, "an array of it (numpy, or TensorFlow outside of sv.tf_computation)")


_REFUSED = {
    "__bool__": "a truth value (if, while, and, or, not)",
    "__float__": "float()",
    "__int__": "int()",
    "__index__": "an index or range()",
    "__complex__": "complex()",
    "__round__": "round()",
    "__abs__": "abs()",
    "__neg__": "-",
    "__pos__": "+",
    "__invert__": "~",
    "__str__": "printing it or making text of it",
    "__format__": "printing it or making text of it",
    "__contains__": "in",
    "__lt__": "<",
    "__le__": "<=",
    "__gt__": ">",
    "__ge__": ">=",
    "__eq__": "==",
    "__ne__": "!=",
    **{f"__{side}{name}__": sign for side in ("", "r") for name, sign in (
        ("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/"), ("floordiv", "//"), ("mod", "%"), ("pow", "**"),
        ("matmul", "@"), ("and", "&"), ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>"),
        ("divmod", "divmod()"),
    )},
}  # fmt: skip


def _refusing(what: str) -> Callable[..., NoReturn]:
    def refuse(self: Value, *_: object) -> NoReturn:
        _refuse_python(self, what)

    return refuse


for _name, _what in _REFUSED.items():
    setattr(Value, _name, _refusing(_what))


def current_definition() -> Definition | None:
    """Return the definition that is going on, None outside of one."""
    return _current.get()


@contextlib.contextmanager
def defining(definition: Definition | None) -> Iterator[None]:
    """Make `definition` the one that operators add to; None while another tracer has the floor."""
    token = _current.set(definition)
    try:
        yield
    finally:
        _current.reset(token)


def site(operator: str) -> Site:
    """Return the author's call of `operator` in the definition that is going on.

    Raises:
        DefinitionError: No definition is going on, or `operator` is federated and this one is of a mapped function.
    """
    definition, source = _current.get(), here()
    if definition is None:
        raise DefinitionError(
            f"{source}, {operator}",
            "there is nothing to add to here. Operators describe a computation: call them inside a function decorated "
            "with @sv.federated_computation, and then call that function with numbers",
        )
    found = Site(definition, operator, source)
    if not definition.placed and operator.startswith(("federated_", "client_state")):
        found.refuse(
            f"{definition.name} is mapped over the values of one member, and {operator} speaks of all of them. "
            "Use it in the function decorated with @sv.federated_computation, beside federated_map"
        )
    return found


def define(name: str, function: Callable[..., object], parameters: Sequence[tuple[str, Type]], *, placed: bool) -> Body:
    """Run `function` once on values of the types in `parameters` and return what it described.

    Raises:
        DefinitionError: The function needs a number, or returns nothing.
    """
    definition = Definition(name, placed=placed)
    with defining(definition):
        arguments = [definition.parameter(*parameter) for parameter in parameters]
        returned = function(*arguments)
        if returned is None:
            raise DefinitionError(
                f"{line_of(function)}, {name}", "it returns nothing; end it with `return` and the value it computes"
            )
        return definition.body(Site(definition, name, line_of(function)).value(returned))


def index_of(value: Value) -> int:
    """Return which step of its definition `value` is."""
    index: int = object.__getattribute__(value, "_index")
    return index


def definition_of(value: Value) -> Definition:
    """Return the definition that `value` belongs to."""
    definition: Definition = object.__getattribute__(value, "_definition")
    return definition


def parameter_name(value: Value) -> str:
    """Return the name of the parameter that `value` is, "" if it is none."""
    step = definition_of(value).step(index_of(value))
    return step.name if step.operator == "parameter" else ""


def described(value: Value) -> str:
    """Return a name for `value` in errors: its parameter's name, else what made it, and its type."""
    step = definition_of(value).step(index_of(value))
    match step.operator:
        case "parameter":
            name = step.name
        case "literal":
            name = f"the constant {', '.join(map(str, step.value))}"
        case _:
            name = f"this value, made by {step.operator} at {step.source},"
    return f"{name} ({step.type})"


def _holds_values(given: object) -> bool:
    if isinstance(given, Mapping | Record | tuple | list):
        return any(isinstance(part, Value) or _holds_values(part) for part in named_parts(given)[1])
    return False


def _struct_type(value: Value) -> StructType | None:
    kind = value.type_signature
    member = kind.member if isinstance(kind, FederatedType) else kind
    return member if isinstance(member, StructType) else None


def _select(value: Value, kind: StructType, index: int) -> Value:
    made_by = definition_of(value).step(index_of(value))
    if made_by.operator == "struct":
        return Value(definition_of(value), made_by.inputs[index])
    name, element = kind.elements[index]
    placed = value.type_signature
    result = replace(placed, member=element) if isinstance(placed, FederatedType) else element
    step = Step("select", (index_of(value),), result, here(), name=name or "", index=index)
    return definition_of(value).add(step)


def _refuse_attribute(value: Value, name: str, kind: StructType | None) -> NoReturn:
    if kind is not None:
        known = ", ".join(kind.names) or f"no names; use an index, 0 to {len(kind) - 1}"
        raise DefinitionError(f"{here()}, .{name}", f"{described(value)} has no element {name!r}; it has {known}")
    _refuse_python(value, f".{name}")


def _refuse_python(value: Value, what: str) -> NoReturn:
    raise DefinitionError(f"{here()}, {what}", f"{described(value)} {_WHY} {_cure(value.type_signature)}")


_WHY = (
    "is not a number yet: this line runs once, while the computation is being defined, and never on a device, so "
    "Python cannot compute with it, test it or print it here."
)


def _cure(kind: Type) -> str:
    if not isinstance(kind, FederatedType):
        return (
            "Decorate the function that computes with @sv.tf_computation and write it in TensorFlow (x + y, "
            "tf.sqrt(x), tf.where instead of if): then it travels to the devices."
        )
    if isinstance(kind.member, SequenceType):
        return "Use sv.sequence_map, sv.sequence_reduce or sv.sequence_sum on a sequence."
    where = "on every client" if kind.placement is CLIENTS else "at the server"
    return (
        f"Write the arithmetic in a function decorated with @sv.tf_computation and apply it {where} with "
        "sv.federated_map(function, value)."
    )
