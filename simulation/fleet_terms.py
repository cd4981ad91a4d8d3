"""What rounds of a fleet in memory look like, and what can be made to go wrong in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from coordinator.terms import CohortTerms, RoundTerms, SecAggTerms, Timing
from sottovoce.errors import ConfigError
from sottovoce.secagg.graph import SMALLEST_COHORT

Mode: TypeAlias = Literal["active", "curious"]
Stage: TypeAlias = Literal[
    "selection",
    "training",
    "advertise_keys",
    "share_keys",
    "masked_input",
    "consistency_check",
    "unmasking",
    "outcome",
]
STAGE_OF_EVENT: Mapping[str, Stage] = {
    "announced": "selection",
    "selected": "training",
    "committed": "outcome",
    "abandoned": "outcome",
}
"""The coordinator's events that begin a stage; those of the rendezvous name it themselves."""
_TIMING = Timing(selection_s=60, training_s=120, stage_s=60, retry_delay_s=1)
"""Work takes no time on the clock of the simulation; only devices that are gone are waited for."""


@dataclass(frozen=True, slots=True)
class FleetTerms:
    """What rounds of a fleet look like.

    Attributes:
        mode: Of secure aggregation.
        cohort: Devices of a round, drawn anew for each; None takes all of them.
        minimum: Fewest survivors of a round; None is half of its devices, at least 3.
        attempts: How often a round that was abandoned is tried before `RoundAbandoned` is raised.
    """

    mode: Mode = "curious"
    cohort: int | None = None
    minimum: int | None = None
    attempts: int = 1

    def of_round(self, devices: int) -> RoundTerms:
        """Return the terms of a round of so many devices."""
        minimum = max(SMALLEST_COHORT, math.ceil(devices / 2)) if self.minimum is None else self.minimum
        return RoundTerms(
            cohort=CohortTerms(goal=devices, minimum=minimum), time=_TIMING, secagg=SecAggTerms(mode=self.mode)
        )


@dataclass(frozen=True, slots=True)
class Fault:
    """What is to go wrong: with whom, when, and how."""

    device: str
    stage: Stage
    how: Literal["kill", "drop", "restart"]


def check_fleet(devices: int, terms: FleetTerms) -> None:
    """Refuse a fleet that can hold no round.

    Raises:
        ConfigError: There are too few devices, or a number of the terms is impossible; the text says which.
    """
    if devices < SMALLEST_COHORT:
        raise ConfigError(f"a fleet of {devices} devices hides nobody in a sum; make it at least {SMALLEST_COHORT}")
    if terms.cohort is not None and not SMALLEST_COHORT <= terms.cohort <= devices:
        raise ConfigError(f"cohort={terms.cohort}: a round of {devices} devices has {SMALLEST_COHORT} to {devices}")
    if terms.attempts < 1:
        raise ConfigError(f"attempts={terms.attempts}: a round is tried at least once")
