"""What of a program's result may go into a sum: the bounds of the plan, enforced by the device and not by the program.

The result of a client program is only a proposal. Before anything is masked, for every aggregation of the plan:

1. *L0*: of one with `entries` = m only the m largest entries stay (of real numbers those of the largest magnitude),
   over all its tensors; equal ones by the lowest index, the first tensor first. All others become 0. Counted values
   are rounded to whole numbers before they are compared, as they are when they are summed.
2. One that `follows` another becomes 0 wherever that one is 0.
3. One with `presence_of` is computed here: 1 where that one is not 0, else 0. Its sum is a count of devices.
4. *Linf*: every entry is clamped to its encoding's range, and counted if it had to be (`sottovoce.secagg.encoding`).

"Is 0" in 2. and 3. means: as it will be summed, after all bounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sottovoce.plan import Aggregation, Counted, Plan
from sottovoce.types import Array, TensorType


def bounded(plan: Plan, values: Mapping[str, Sequence[Array]]) -> dict[str, list[Array]]:
    """Return what this device contributes to every aggregation of `plan`, all but clamped.

    Args:
        plan: As announced.
        values: Results and metrics of the program by name, tensors of the declared shapes; what the plan does not name
            is left out.
    """
    own = {
        aggregation.name: _kept(aggregation, values[aggregation.name])
        for aggregation in plan.aggregations
        if not aggregation.presence_of and aggregation.name in values
    }
    present = {a.name: _present(a, own[a.name]) for a in plan.aggregations if a.name in own}
    for aggregation in plan.aggregations:
        if aggregation.follows in present and aggregation.name in own:
            flat = np.where(present[aggregation.follows], _flat(own[aggregation.name]), 0)
            own[aggregation.name] = _shaped(aggregation, flat)
    counts = {
        aggregation.name: _shaped(aggregation, present[aggregation.presence_of].astype(np.uint8))
        for aggregation in plan.aggregations
        if aggregation.presence_of in present
    }
    return {**own, **counts}


def _kept(aggregation: Aggregation, tensors: Sequence[Array]) -> list[Array]:
    """Return the tensors with all but the `entries` largest entries at 0."""
    if not aggregation.entries:
        return list(tensors)
    flat = _flat(tensors)
    size = np.rint(flat) if isinstance(aggregation.encoding, Counted) else np.abs(flat)
    candidates = np.flatnonzero(size > 0)
    largest = candidates[np.argsort(-size[candidates].astype(np.float64), kind="stable")[: aggregation.entries]]
    kept = np.zeros_like(flat)
    kept[largest] = flat[largest]
    return _shaped(aggregation, kept)


def _present(aggregation: Aggregation, tensors: Sequence[Array]) -> Array:
    """Return for every entry whether it will be other than 0 when it is summed."""
    flat = _flat(tensors)
    return np.rint(flat) > 0 if isinstance(aggregation.encoding, Counted) else flat != 0


def _flat(tensors: Sequence[Array]) -> Array:
    return np.concatenate([np.asarray(tensor).reshape(-1) for tensor in tensors])


def _shaped(aggregation: Aggregation, flat: Array) -> list[Array]:
    types = [TensorType.parse(notation) for notation in aggregation.tensors]
    pieces = np.split(flat, np.cumsum([each.size for each in types])[:-1])
    return [piece.reshape([length or 0 for length in each.shape]) for piece, each in zip(pieces, types, strict=True)]
