"""What a coordinator hosts: a federated program as data, driven one committed round at a time.

A task file names one. The coordinator asks it for a round, runs that round, and hands it the sums; what comes back is
the server's state for the next round. The program itself keeps nothing: position and state are all that a restart
needs, and the coordinator's journal has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sottovoce.bundle import Bundle
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.plan import Encoding
from sottovoce.types import Array

Tensors: TypeAlias = Mapping[str, Array]
"""Named tensors: a server's state, a broadcast, or released sums."""


@dataclass(frozen=True, slots=True)
class SumTerms:
    """How a plain sum or a metric is bounded and encoded.

    Attributes:
        encoding: How one device's value becomes lane integers.
        clip_norm: L2 bound over all tensors of the sum together, applied first; None leaves them as they are.
    """

    encoding: Encoding
    clip_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """What a committed round gives.

    Attributes:
        state: The server's state before the next round.
        metrics: Numbers for people.
        released: The sums that the program was for, empty for training.
    """

    state: Tensors
    metrics: Mapping[str, float]
    released: Tensors


class HostedProgram(Protocol):
    """A federated program that somebody else drives. Pure: the same arguments always give the same answer."""

    @property
    def length(self) -> int:
        """How many rounds must commit until it is done."""

    @property
    def first_state(self) -> Tensors:
        """The server's state before round 0."""

    @property
    def model(self) -> Bundle | None:
        """The bundle whose broadcast it trains, None if it only releases sums."""

    def request_at(self, position: int, state: Tensors) -> RoundRequest:
        """Return the round to run.

        Args:
            position: How many of its rounds have committed, from 0 and below `length`.
            state: The server's state there.
        """

    def broadcast_at(self, position: int, state: Tensors) -> Tensors:
        """Return what devices are given: the broadcast of round `position`, after the last round the trained model."""

    def apply(self, position: int, state: Tensors, sums: RoundSums) -> Advance:
        """Return what round `position` makes of `state`.

        Raises:
            RoundAbandoned: The sums give no usable state; the round is tried again.
        """
