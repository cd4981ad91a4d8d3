"""Runs computations as rounds on a fleet: lowers, prepares, asks for the round, computes the result from its sums."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

from sottovoce.language.arguments import DeviceValues
from sottovoce.language.computations import Computation
from sottovoce.language.lowered import Lowered
from sottovoce.language.lowering import lower
from sottovoce.language.ports import Bound, Rounds
from sottovoce.language.programs import next_key

_Known: TypeAlias = tuple[tuple[str, Bound | None], ...]
"""What a lowering depends on beside the computation: the bounds that the arguments declare."""


class FleetExecutor:
    """An Executor (`sottovoce.language.ports`) on a simulated fleet or on the one behind a running coordinator.

    A computation is lowered once for the bounds that its arguments declare, so that calling it again asks every device
    for the same plan.
    """

    def __init__(self, rounds: Rounds) -> None:
        """Start with nothing lowered.

        Args:
            rounds: The fleet.
        """
        self._rounds = rounds
        self._lowered: weakref.WeakKeyDictionary[Computation, dict[_Known, Lowered]] = weakref.WeakKeyDictionary()

    @property
    def rounds(self) -> Rounds:
        """The fleet, for those who make their rounds themselves."""
        return self._rounds

    def run(self, computation: Computation, arguments: Mapping[str, object]) -> Any:
        """Run `computation` as one round and return its result.

        Inside a federated program the round has a key, so that a program which is started again gets the same answer
        and never asks for a second round.

        Args:
            computation: A federated computation.
            arguments: As `Executor.run` takes them. At CLIENTS: `sv.latest`, `sv.collection`, or in the simulation one
                value for each device.

        Raises:
            DefinitionError: A fleet cannot do it; the text names operator, line and cure.
            ConfigError: The arguments do not fit one round, or a sum does not fit its dtype.
            RoundAbandoned: The round ended without a result.
        """
        lowered = self.lowered(computation, arguments)
        if not lowered.needs_devices:
            return lowered.result(arguments, None)
        return lowered.result(arguments, self._rounds.run(lowered.request(arguments, key=next_key())))

    def lowered(self, computation: Computation, arguments: Mapping[str, object]) -> Lowered:
        """Return what `run` would ask the fleet to do."""
        known = tuple((name, value.bound) for name, value in arguments.items() if isinstance(value, DeviceValues))
        cache = self._lowered.setdefault(computation, {})
        if known not in cache:
            cache[known] = lower(computation, arguments)
        return cache[known]
