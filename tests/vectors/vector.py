"""One vector: an operation, its inputs, and what must come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Vector:
    """What `vector_files` numbers and writes; `error` is None where the result is valid."""

    operation: str
    comment: str
    inputs: Inputs
    expected: Any = None
    error: str | None = None
    flags: tuple[str, ...] = ()
    also: Inputs = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"operation": self.operation, "comment": self.comment, "flags": list(self.flags)}
        made |= {"inputs": plain(self.inputs)}
        if self.error is not None:
            return made | {"result": "invalid", "error": self.error}
        return (
            made
            | {"result": "valid", "expected": plain(self.expected)}
            | ({"intermediate": plain(self.also)} if self.also else {})
        )


def plain(value: Any) -> Any:
    """`value` with every bytes as hex."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
