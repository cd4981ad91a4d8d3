"""What a device would be asked, in words that its owner understands."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sottovoce.language.expressions import Body, Builtin, Step
from sottovoce.language.recipes import Recipe
from sottovoce.plan import Aggregation, Counted, Quantised

if TYPE_CHECKING:
    from sottovoce.language.lowered import Lowered

FEWEST = 3
"""No sum of fewer devices is ever unmasked."""
_AGGREGATES = {
    "sum": "the sum",
    "mean": "the average",
    "weighted_mean": "the weighted average",
    "lane_mean": "the average, weighted by the number of examples,",
    "weight": "the total number of examples",
}


def describe(lowered: Lowered, *, collection: str, minimum_cohort: int) -> str:
    """Return the text; see `Lowered.describe`."""
    title = f"{lowered.name}: {lowered.purpose}\n"
    if not lowered.needs_devices:
        return f"{title}\nNo device is asked anything: it is computed where the program runs.\n"
    named = {aggregation.name: aggregation for aggregation in lowered.aggregations}
    how_many = f"at least {minimum_cohort or FEWEST}"
    if not minimum_cohort:
        how_many += "; more where the fleet or this device's own policy asks for more"
    sections = {
        "Reads on this device": [_read(lowered, collection)],
        "Receives": [_received(lowered)],
        "Computes on this device": list(dict.fromkeys(lowered.words)),
        "Sends, masked, for sums over all devices": [
            _sum(recipe, words, named) for recipe, words in zip(lowered.recipes, lowered.words, strict=True)
        ],
        "Devices in every sum": [how_many],
        "Sees this device's own values": ["nobody: only the sum over all devices is ever unmasked"],
    }
    return title + "".join(
        f"\n{heading}:\n" + "".join(textwrap.indent(f"{line}\n", "  ") for line in lines)
        for heading, lines in sections.items()
    )


def words_of(body: Body, at: int) -> str:
    """Return what step `at` computes, in the author's names: `exceeds(readings, threshold)`."""
    step = body.steps[at]
    inputs = [words_of(body, i) for i in step.inputs]
    inside = ", ".join(inputs)
    match step.operator:
        case "parameter":
            return step.name
        case "literal":
            return str(step.value[0]) if len(step.value) == 1 and step.value[0].ndim == 0 else "a constant"
        case "select":
            return f"{inside}.{step.name or step.index}"
        case "federated_map" | "call" | "federated_eval":
            return _applied(step, inside)
        case "sequence_map":
            return f"{_applied(step, 'each')} of {inside}"
        case "sequence_sum":
            return f"sum of all {inside}"
        case "sequence_reduce":
            return f"{inputs[0]} folded by {getattr(step.functions[0], 'name', 'a function')}"
        case "federated_select":
            return f"slices of {inputs[1]} at {inputs[0]}"
        case "client_state_read":
            return f"what this device has kept as {step.slot.name!r}" if step.slot else "client state"
        case _:
            return inside


def _applied(step: Step, inside: str) -> str:
    function = step.functions[0]
    if isinstance(function, Builtin):
        return f"{inside} clipped to {function.bound}" if function.name == "clip" else inside
    return f"{function.name}({inside})"


def _read(lowered: Lowered, collection: str) -> str:
    what = f"the collection {collection!r}" if collection else "one collection of examples"
    columns = ", ".join(f"{name} ({kind})" for name, kind in lowered.columns)
    if lowered.work.max_examples == 1:
        return f"the newest example of {what}: {columns}"
    how_many = f"up to {lowered.work.max_examples} examples" if lowered.work.max_examples else "all examples"
    times = f", {lowered.work.epochs} times" if lowered.work.epochs > 1 else ""
    return f"{how_many} of {what}{times}: {columns}"


def _received(lowered: Lowered) -> str:
    names = [name for at, (name, _) in enumerate(lowered.parameters) if at not in lowered.members]
    size = sum(kind.size * kind.numpy_dtype.itemsize for _, kind in lowered.broadcast)
    program = f"a client program of {len(lowered.bundle) / 1000:.0f} kB, the same in every round"
    if not size:
        return program
    told = f" ({', '.join(names)})" if names else ""
    return f"{program}, and {size} bytes from the server{told}"


def _sum(recipe: Recipe, words: str, named: dict[str, Aggregation]) -> str:
    what = f"{_AGGREGATES[recipe.kind]} of {words}"
    if recipe.kind == "weight":
        return f"{_AGGREGATES[recipe.kind]}, exact"
    terms = []
    for summand in recipe.summands:
        aggregation = named[summand.aggregation]
        match aggregation.encoding:
            case Counted():
                exactness = "exact"
            case Quantised(half_range=half_range, bits=bits):
                quantum = 2 * half_range / (2**bits - 1)
                exactness = f"rounded at random to steps of {quantum:.2g}"
        size = aggregation.size
        numbers = "one number" if size == 1 else f"{size} numbers"
        clip = f", L2 norm clipped to {aggregation.clip_norm:g}" if aggregation.clip_norm is not None else ""
        terms.append(f"{numbers} between {summand.bound.low:g} and {summand.bound.high:g}{clip}, {exactness}")
    return f"{what}: {'; '.join(dict.fromkeys(terms))}"
