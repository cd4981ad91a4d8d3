"""Whether a plan, its broadcast and its client program fit together; nothing of it needs a runtime.

The coordinator's side asks before a round is in the queue, so that who asks wrongly reads the reason himself; every
device asks again before it runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sottovoce.bundle import Bundle, Port
from sottovoce.errors import BadBundle, ProgramError
from sottovoce.plan import Extraction, Plan
from sottovoce.sketches import PORTS as SKETCH_PORTS
from sottovoce.text import PORTS as WORD_PORTS
from sottovoce.types import Array

_EXTRACTED = {**WORD_PORTS, **SKETCH_PORTS}


def check_aggregations(plan: Plan, bundle: Bundle) -> None:
    """Refuse a plan that sums what its program does not compute.

    Raises:
        BadBundle: An aggregation names no result and no metric of the program, or one of other types.
    """
    computed = {result.name: tuple(port.type for port in result.ports) for result in bundle.results}
    computed.update({port.name: (port.type,) for port in bundle.metrics})
    for aggregation in plan.aggregations:
        if aggregation.presence_of:
            continue  # The device computes it itself.
        if computed.get(aggregation.name) != aggregation.tensors:
            raise BadBundle(
                f"plan {plan.name!r} sums {aggregation.name!r} of {', '.join(aggregation.tensors)}; program "
                f"{bundle.name!r} computes {', '.join(computed.get(aggregation.name, ('no such thing',)))}"
            )


def check_broadcast(bundle: Bundle, broadcast: Mapping[str, Array]) -> None:
    """Refuse a broadcast that is not exactly what the program is given.

    Args:
        bundle: The program.
        broadcast: One array for each broadcast port.

    Raises:
        ProgramError: A port is missing, its array has the wrong dtype or shape or is out of bounds, or an array is of
            no port.
    """
    check_ports(f"the broadcast of program {bundle.name!r}", bundle.broadcast, broadcast)
    if unknown := sorted(set(broadcast) - {port.name for port in bundle.broadcast}):
        raise ProgramError(f"program {bundle.name!r} takes no {', '.join(map(repr, unknown))} in its broadcast")


def check_extraction(bundle: Bundle, extraction: Extraction) -> None:
    """Refuse an extraction that does not give the columns that the program reads; unknown ones are the devices' to say.

    Raises:
        BadBundle: A batch port is none of the extractor's, is not one number a row, or allows too few words.
    """
    names = _EXTRACTED.get(extraction.extractor)
    if names is None:
        return
    for port in bundle.batch:
        if port.name not in names or port.tensor_type.shape != (None,):
            raise BadBundle(
                f"program {bundle.name!r} reads {port.name!r}, {port.type}; {extraction.extractor} gives "
                f"{', '.join(names)}, one number a row: int32[?]"
            )
        vocabularies = extraction.vocabularies
        largest = len(vocabularies[names.index(port.name)]) - 1 if vocabularies else 0
        if port.high is not None and largest > port.high:
            raise BadBundle(
                f"program {bundle.name!r} reads {port.name!r} up to {port.high}; the plan's vocabulary has "
                f"{largest + 1} words, numbered from 0: give at most {port.high + 1}"
            )


def check_ports(where: str, ports: Sequence[Port], given: Mapping[str, Array]) -> None:
    """Refuse arrays that are not one for each port, of its type and within its bounds; others are not looked at.

    Args:
        where: What they are given to, for the error.
        ports: What is wanted.
        given: The arrays by name.

    Raises:
        ProgramError: A port is missing, or its array has the wrong dtype or shape or is out of bounds.
    """
    for port in ports:
        array = given.get(port.name)
        if array is None:
            raise ProgramError(f"{where}: {port.name!r} is missing; it is a {port.type}")
        if not port.tensor_type.admits(array):
            dims = ",".join(map(str, array.shape))
            raise ProgramError(f"{where}: {port.name!r} is a {port.type}, not a {array.dtype}[{dims}]")
        if array.size and port.low is not None and array.min() < port.low:
            raise ProgramError(f"{where}: {port.name!r} holds {array.min()}, below {port.low}")
        if array.size and port.high is not None and array.max() > port.high:
            raise ProgramError(f"{where}: {port.name!r} holds {array.max()}, above {port.high}")
