"""Under which terms a round runs: how many devices, how long, and what is assumed of the fleet."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from coordinator.graph_parameters import graph_parameters
from coordinator.phases import Terms
from coordinator.settings import Positive, Seconds, Share, UploadSettings
from sottovoce.blobs import Document
from sottovoce.errors import ConfigError
from sottovoce.secagg.graph import BASIS_POINTS, COMPLETE_GRAPH_LIMIT, LARGEST_COHORT, SMALLEST_COHORT, threshold


class CohortTerms(Document, frozen=True):
    """How many devices take part.

    Attributes:
        goal: Devices wanted in a round.
        minimum: Fewest devices whose sum may be unmasked; also the plan's promise to every device.
        over_selection: So many times the goal are asked to train, because some will drop out.
    """

    goal: Positive
    minimum: Annotated[int, msgspec.Meta(ge=SMALLEST_COHORT)]
    over_selection: Annotated[float, msgspec.Meta(ge=1, le=4)] = 1.0

    @property
    def wanted(self) -> int:
        """Devices to select: the goal with over-selection."""
        return math.ceil(self.goal * self.over_selection - 1e-9)


class Timing(Document, frozen=True):
    """How long things may take, in seconds.

    Attributes:
        selection_s: For check-ins.
        training_s: For training, from the announcement's selection to the rendezvous.
        stage_s: For each of the five stages of the rendezvous.
        retry_delay_s: Before an abandoned round is tried again.
    """

    selection_s: Seconds = 60.0
    training_s: Seconds = 3600.0
    stage_s: Seconds = 60.0
    retry_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0


class SecAggTerms(Document, frozen=True):
    """What is assumed of the fleet: the mode, and the shares of corrupt devices and of dropouts."""

    mode: Literal["active", "curious"] = "active"
    corrupt_share: Share = 0.05
    dropout_share: Share = 0.05


class RoundTerms(Document, frozen=True):
    """Everything about a round but what it does; see the parts."""

    cohort: CohortTerms
    time: Timing = Timing()
    secagg: SecAggTerms = SecAggTerms()


def check_terms(terms: RoundTerms, *, where: str) -> None:
    """Check that such a round can be held at all.

    Args:
        terms: The terms.
        where: Where they were written, for the error.

    Raises:
        ConfigError: It cannot; the text names the number to change.
    """
    cohort, mode, needed = terms.cohort, terms.secagg.mode, _answers_needed(terms)
    rules = (
        (
            cohort.minimum <= cohort.goal,
            f"cohort.minimum: {cohort.minimum} is more than cohort.goal, {cohort.goal}; lower it",
        ),
        (
            cohort.wanted <= LARGEST_COHORT,
            f"cohort.goal: {cohort.wanted} devices with over-selection; at most {LARGEST_COHORT} in one round",
        ),
        (
            needed <= cohort.wanted,
            f"cohort.goal: {cohort.wanted} devices are too few in {mode} mode, which needs {needed} of them; "
            'raise it (or, for a try without liars: secagg.mode = "curious")',
        ),
    )
    for holds, text_if_not in rules:
        if not holds:
            raise ConfigError(f"{where}: {text_if_not}")
    if cohort.wanted > COMPLETE_GRAPH_LIMIT:
        graph_parameters(
            clients=cohort.wanted,
            corrupt_share=terms.secagg.corrupt_share,
            dropout_share=terms.secagg.dropout_share,
            mode=mode,
        )


def decode_terms(content: bytes) -> RoundTerms:
    """Return terms from their canonical bytes.

    Raises:
        ConfigError: Another release wrote them.
    """
    try:
        return msgspec.msgpack.decode(content, type=RoundTerms)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"these terms of a round were written by another release: {error}") from error


def terms_at(terms: RoundTerms, uploads: UploadSettings, *, now_ms: int) -> Terms:
    """Return the terms of a round that is announced now, with its deadlines."""
    selection_closes_ms = now_ms + round(1000 * terms.time.selection_s)
    return Terms(
        goal=terms.cohort.goal,
        minimum=terms.cohort.minimum,
        wanted=terms.cohort.wanted,
        selection_closes_ms=selection_closes_ms,
        rendezvous_ms=selection_closes_ms + round(1000 * terms.time.training_s),
        stage_ms=round(1000 * terms.time.stage_s),
        mode=terms.secagg.mode,
        corrupt_share_bp=round(BASIS_POINTS * terms.secagg.corrupt_share),
        dropout_share_bp=round(BASIS_POINTS * terms.secagg.dropout_share),
        slots=uploads.slots,
        slot_idle_ms=round(1000 * uploads.slot_idle_s),
    )


def _answers_needed(terms: RoundTerms) -> int:
    """Return how many of a full cohort must answer; in active mode a device needs the signatures of t others."""
    mode = terms.secagg.mode
    shares = threshold(mode, terms.cohort.wanted, round(BASIS_POINTS * terms.secagg.corrupt_share))
    return shares + (mode == "active")
