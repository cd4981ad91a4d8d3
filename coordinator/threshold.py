"""The threshold of a plan: entries that too few devices have contributed to are taken out of the sums.

It is done to the sums as soon as they are known, before anything is written into the journal, logged, told or
published. That is hygiene of what is published: the coordinator has seen the whole sum in its memory, and one that is
curious keeps it. Nothing here protects a device from its coordinator; noise that devices add themselves will.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sottovoce.language.ports import RoundSums
from sottovoce.plan import Aggregation, Plan, counts_devices
from sottovoce.types import Array


def thresholded(sums: RoundSums, plan: Plan) -> RoundSums:
    """Return `sums` with 0 in every entry that fewer devices than the plan's threshold have contributed to.

    An entry's devices are counted by the aggregation with `presence_of`; the entries of the aggregation that it counts
    for, of those that follow that one, and the count itself become 0. An aggregation of counts up to 1 counts its own.
    Aggregations without such a count stay.

    Args:
        sums: What a round brought.
        plan: Its plan.
    """
    threshold = plan.privacy.threshold
    if not threshold:
        return sums
    own = {a.name: sums.sums[a.name] for a in plan.aggregations if counts_devices(a)}
    counts = own | {a.presence_of: sums.sums[a.name] for a in plan.aggregations if a.presence_of}
    kept = {
        aggregation.name: _kept(sums.sums[aggregation.name], counts.get(_counted_as(aggregation)), threshold)
        for aggregation in plan.aggregations
    }
    return replace(sums, sums=kept)


def _counted_as(aggregation: Aggregation) -> str:
    """Return the name of the aggregation by whose count of devices this one is thresholded."""
    return aggregation.presence_of or aggregation.follows or aggregation.name


def _kept(tensors: list[Array], devices: list[Array] | None, threshold: int) -> list[Array]:
    if devices is None:
        return tensors
    return [np.where(count >= threshold, tensor, 0) for tensor, count in zip(tensors, devices, strict=True)]
