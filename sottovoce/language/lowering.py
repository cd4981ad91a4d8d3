"""From a computation to one round: server_prepare -> broadcast -> client_work -> aggregations -> server_result.

What is at SERVER and needs no sum is prepared before the round; what is broadcast reaches every device; the steps at
CLIENTS become the client program, unless the author brings one; all aggregations travel in one masked vector; the rest
is computed from their sums. What a fleet cannot do is refused, with the author's line and what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sottovoce.language.arguments import DeviceValues
from sottovoce.language.bounds import Bounds, unknown
from sottovoce.language.client_part import ClientSource
from sottovoce.language.describing import words_of
from sottovoce.language.generated_program import generated_program
from sottovoce.language.given_program import given_program
from sottovoce.language.lowered import Lowered
from sottovoce.language.parts import NO_WORK, ClientWork, Parts, sort_parts
from sottovoce.types import Type

if TYPE_CHECKING:
    from sottovoce.language.computations import Computation

__all__ = ["ClientSource", "lower"]


def lower(computation: Computation, arguments: Mapping[str, object] | None = None) -> Lowered:
    """Return `computation` as one round on a fleet.

    Args:
        computation: A federated computation.
        arguments: Those of the call that is meant, checked; only the bounds of `sv.latest` and `sv.collection` among
            them are used. None where nothing is known of them.

    Raises:
        DefinitionError: It cannot run on a fleet; the text names operator, line and cure.
        ConfigError: TensorFlow is not installed.
    """
    body = computation.body
    purpose = _purpose(computation)
    known = [_bounds_of(kind, (arguments or {}).get(name)) for name, kind in body.parameters]
    parts = sort_parts(computation.name, body, known)
    work = _client_work(parts, purpose)
    return Lowered(
        name=computation.name,
        purpose=purpose,
        signature=computation.type_signature,
        parameters=body.parameters,
        members=parts.members,
        columns=work.columns,
        bundle=work.bundle,
        work=work.work,
        aggregations=work.aggregations,
        weight_cap=work.weight_cap,
        broadcast=work.broadcast,
        before=parts.before(),
        after=parts.after(),
        recipes=work.recipes,
        words=tuple(words_of(body, body.steps[at].inputs[0]) for at in parts.sums),
    )


def _client_work(parts: Parts, description: str) -> ClientWork:
    if not parts.sums and not parts.writes:
        return NO_WORK
    if parts.program() is not None:
        return given_program(parts)
    return generated_program(parts, description=description)


def _purpose(computation: Computation) -> str:
    """Return the first line of the author's docstring, else the computation's name."""
    lines = (computation.__doc__ or "").strip().splitlines()
    return lines[0].strip() if lines else computation.name


def _bounds_of(kind: Type, argument: object) -> Bounds:
    known = unknown(kind)
    return (argument.bound,) * len(known) if isinstance(argument, DeviceValues) else known
