"""From the sums of a round back to the values of the language, and how far off they can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.ports import Bound, RoundSums
from sottovoce.types import Array, TensorType, Type
from sottovoce.values import leaves, unflatten

ROUNDING = 2.0**-22
"""Relative error allowed for arithmetic in float32 on the device: four roundings of 2^-24."""


@dataclass(frozen=True, slots=True)
class Summand:
    """Where one tensor of an aggregated value lies among the sums of a round.

    Attributes:
        aggregation: Which sum.
        index: Which of its tensors.
        offset: What every device subtracted from each coordinate.
        error: The largest error of one device's coordinate: its quantum and float32's rounding; 0 where exact.
        bound: Of one device's coordinate, before the offset was subtracted.
    """

    aggregation: str
    index: int
    offset: float
    error: float
    bound: Bound


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the value of one aggregation step comes from the sums of a round.

    Attributes:
        kind: `sum`; `mean`; `weighted_mean` of two sums; `lane_mean`, weighted by the number of examples; `weight`, the
            sum of those numbers.
        where: Line and operator.
        type: Of the value.
        summands: One for each tensor of it.
        weight: The sum of the weights, of a `weighted_mean`.
        weight_cap: What a weight is divided by before it multiplies the value.
    """

    kind: Literal["sum", "mean", "weighted_mean", "lane_mean", "weight"]
    where: str
    type: Type
    summands: tuple[Summand, ...]
    weight: Summand | None = None
    weight_cap: float = 1.0

    def value(self, sums: RoundSums) -> Any:
        """Return the value that the sums of a round say.

        Raises:
            ConfigError: A sum does not fit its dtype.
        """
        if self.kind == "weight":
            return _fitted(np.asarray(sums.weight), leaves(self.type)[0][1], self.where)
        divisor = self._divisor(sums)
        found = []
        for summand, (_, kind) in zip(self.summands, leaves(self.type), strict=True):
            total = _total(summand, sums) if self.kind != "lane_mean" else sums.sums[summand.aggregation][summand.index]
            found.append(_fitted(total if divisor is None else total / divisor, kind, self.where))
        return unflatten(self.type, found)

    def errors(self, devices: int) -> tuple[float | None, ...]:
        """Return for each tensor the largest absolute error of a coordinate that encoding and float32 can make.

        Args:
            devices: How many are in the sum, at least 1.

        Returns:
            None where it cannot be said beforehand: of a mean whose weights may all be 0.
        """
        match self.kind:
            case "weight":
                return (0.0,)
            case "sum":
                return tuple(self._stored(s.error * devices, devices * size_of(s.bound)) for s in self.summands)
            case "mean":
                return tuple(self._stored(s.error, size_of(s.bound)) for s in self.summands)
            case "weighted_mean":
                return tuple(self._weighted_error(s) for s in self.summands)
            case "lane_mean":
                # Every weight is at least 1, so the weights' sum is at least the number of devices.
                return tuple(self._stored(s.error * self.weight_cap, size_of(s.bound)) for s in self.summands)

    def _divisor(self, sums: RoundSums) -> Array | None:
        match self.kind:
            case "mean":
                return np.asarray(float(sums.survivors))
            case "weighted_mean":
                assert self.weight is not None
                total = np.asarray(_total(self.weight, sums)).reshape(()) / self.weight_cap
                if not total > 0:
                    raise ConfigError(f"{self.where}: all weights are 0, so there is no mean")
                return np.asarray(total)
            case _:
                return None

    def _stored(self, error: float, largest: float) -> float:
        """Return `error` with that of storing the result in its dtype; a whole number is exact."""
        return error and error + largest * ROUNDING

    def _weighted_error(self, summand: Summand) -> float | None:
        """The mean is S / W; S is off by at most e_s a device, W by e_w, and W is at least its low end a device."""
        weight = self.weight
        if weight is None or weight.bound.low - weight.error <= 0:
            return None
        low, error = weight.bound.low / self.weight_cap, weight.error / self.weight_cap
        # |S'/W' - S/W| <= (e_s + |S/W| e_w) / W', and |S/W| is at most the largest product over the least weight.
        largest = size_of(summand.bound) / low
        return (summand.error + largest * error) / (low - error) + largest * ROUNDING


def size_of(bound: Bound) -> float:
    """Return the largest magnitude within `bound`."""
    return max(abs(bound.low), abs(bound.high))


def _total(summand: Summand, sums: RoundSums) -> Array:
    total: Array = np.asarray(sums.sums[summand.aggregation][summand.index], np.float64)
    return total + sums.survivors * summand.offset


def _fitted(total: Array, kind: TensorType, where: str) -> Array:
    """Return `total` in the dtype and shape of `kind`."""
    dtype = kind.numpy_dtype
    shaped = np.asarray(total).reshape([d or 0 for d in kind.shape])
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # a sum beyond the dtype is infinite, as in the reference executor
            return np.asarray(shaped.astype(dtype))[()]
    limits = np.iinfo(dtype)
    if shaped.size and not (limits.min <= shaped.min() and shaped.max() <= limits.max):
        raise ConfigError(
            f"{where}: a sum does not fit {dtype} ({limits.min} to {limits.max}); "
            "sum a wider type: map sv.cast('int64') over the values first"
        )
    return np.asarray(np.rint(shaped).astype(dtype))[()]
