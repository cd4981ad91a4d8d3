"""Questions to a running fleet without writing a program: what `sottovoce ask` does. No TensorFlow is needed.

The computations were written in the federated language and saved (`questions/*.svc`); a question gives them numbers
and a collection. One question is one round, a quantile two or three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.lowered import Lowered
from sottovoce.language.ports import Rounds
from sottovoce.language.saved import load_lowered
from sottovoce.types import Array
from sottovoce.values import to_value

QUESTIONS = Path(__file__).parent / "questions"
BINS = 64
"""Bins of the saved histogram program."""
WIDEST = 1e6
"""Readings beyond +-this count as this in a mean unless the asker names a window."""
_PRECISION = 1000
"""A quantile is known to one part in so many of the window."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of the newest readings of so many devices."""

    mean: float
    devices: int


@dataclass(frozen=True, slots=True)
class Fraction:
    """The fraction of so many devices whose newest reading is beyond a threshold."""

    fraction: float
    devices: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many devices' newest readings lie in each bin.

    Attributes:
        edges: float64 [bins + 1], ascending; a reading on an edge belongs to the bin above it.
        counts: int64 [bins].
        devices: How many there are, those outside of all bins included.
    """

    edges: Array
    counts: Array
    devices: int


@dataclass(frozen=True, slots=True)
class Quantile:
    """The reading that a fraction of the devices is below.

    Attributes:
        low, high: It lies between these two; -inf or inf where it is outside of the window.
        devices: How many there are.
    """

    low: float
    high: float
    devices: int


def ask_mean(rounds: Rounds, collection: str, *, low: float = -WIDEST, high: float = WIDEST) -> Mean:
    """Ask for the mean of the newest readings; what lies outside of [low, high] counts as the nearer end.

    Args:
        rounds: The fleet.
        collection: A collection of one column of numbers.
        low, high: The window, in the readings' units; the mean is exact to float32's seven digits.

    Raises:
        ConfigError: Impossible numbers.
        RoundAbandoned: The fleet gave no answer.
    """
    _check_window(low, high)
    found = ask_saved(rounds, _question("mean"), collection, {"window": {"low": low, "high": high}})
    return Mean(float(found.mean), int(found.devices))


def ask_fraction(
    rounds: Rounds, collection: str, *, above: float | None = None, below: float | None = None
) -> Fraction:
    """Ask which fraction of the devices has its newest reading above, or below, a threshold. Raises as `ask_mean`."""
    if (above is None) == (below is None):
        raise ConfigError("a fraction needs one threshold: --above X or --below X")
    threshold, sign = (above, 1.0) if above is not None else (below, -1.0)
    found = ask_saved(rounds, _question("fraction"), collection, {"limit": {"threshold": threshold, "sign": sign}})
    return Fraction(float(found.fraction), int(found.devices))


def ask_histogram(rounds: Rounds, collection: str, *, low: float, high: float, bins: int = 10) -> Histogram:
    """Ask how many devices' newest readings lie in each of `bins` equal parts of [low, high]. Raises as `ask_mean`."""
    _check_window(low, high)
    if not 1 <= bins <= BINS:
        raise ConfigError(f"--bins {bins}: a histogram has 1 to {BINS} bins")
    edges = np.linspace(low, high, bins + 1)
    padded = np.append(edges, np.full(BINS - bins, _LARGEST))
    found = ask_saved(rounds, _question("histogram"), collection, {"edges": padded.astype(np.float32)})
    return Histogram(edges, np.asarray(found.counts[:bins], np.int64), int(found.devices))


def ask_quantile(rounds: Rounds, collection: str, *, low: float, high: float, fraction: float) -> Quantile:
    """Ask for the reading that `fraction` of the devices is below, by histograms of ever narrower windows.

    Args:
        rounds: The fleet.
        collection: A collection of one column of numbers.
        low, high: Where to look; the answer is exact to a thousandth of it.
        fraction: 0 to 1; 0.5 is the median.

    Raises:
        ConfigError: Impossible numbers.
        RoundAbandoned: The fleet gave no answer.
    """
    _check_window(low, high)
    if not 0 <= fraction <= 1:
        raise ConfigError(f"--q {fraction}: write a fraction from 0 to 1; 0.5 is the median")
    width = (high - low) / _PRECISION
    while True:
        # The outermost bins hold what is below and above the window, so that every device is counted somewhere.
        inner = np.linspace(low, high, BINS - 1).astype(np.float32)
        edges = np.concatenate([[-_LARGEST], inner, [_LARGEST]]).astype(np.float32)
        found = ask_saved(rounds, _question("histogram"), collection, {"edges": edges})
        below = np.cumsum(found.counts)
        at = int(np.searchsorted(below, max(1.0, math.ceil(fraction * float(below[-1])))))
        if at in (0, BINS - 1):
            outside = (-math.inf, low) if at == 0 else (high, math.inf)
            return Quantile(*outside, int(found.devices))
        low, high = float(edges[at]), float(edges[at + 1])
        if high - low <= width:
            return Quantile(low, high, int(found.devices))


def _check_window(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"the window --low {low:g} --high {high:g} must be two finite numbers, the lower one first")


def ask_saved(rounds: Rounds, lowered: Lowered, collection: str, given: Mapping[str, object]) -> Any:
    """Return the result of a saved computation over the newest examples of a collection on every device.

    Args:
        rounds: The fleet.
        lowered: What `load_lowered` returned.
        collection: What it reads on the devices.
        given: Its arguments at SERVER by name.

    Raises:
        TypeMismatch: One of them is not of its type.
        RoundAbandoned: The fleet gave no answer.
    """
    arguments = {
        name: DeviceValues("latest", collection) if at in lowered.members else to_value(kind, given[name], what=name)
        for at, (name, kind) in enumerate(lowered.parameters)
    }
    return lowered.result(arguments, rounds.run(lowered.request(arguments)))


@functools.cache
def _question(name: str) -> Lowered:
    """Load a question once: a quantile asks the same one several times."""
    return load_lowered(QUESTIONS / f"{name}.svc")
