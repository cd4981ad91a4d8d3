"""What the attack demonstration found, as data: the JSON report, what must hold in it, the table and the picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from rich.table import Table

from sottovoce.errors import SottovoceError

PLAIN_AT_LEAST = 0.99
"""A reconstruction that correlates more than this with the original is the picture."""
Verdict: TypeAlias = Literal["the picture", "noise", "something"]

_INK, _MUTED, _PAPER = "#1f2328", "#656d76", "#ffffff"
_COLOURS = {"original": "#8c959f", "the picture": "#c62828", "noise": "#1b7f4b", "something": "#b26a00"}
_STYLES: Mapping[Verdict, str] = {"the picture": "red", "noise": "green", "something": "yellow"}
_FIGURE_INCHES = (12.0, 7.6)
_LEFT, _PANEL_STEP, _PANEL_WIDTH = 0.045, 0.235, 0.205
_SENTENCE_COLUMNS, _LIMIT_COLUMNS = 122, 150


class ClaimFailed(SottovoceError):
    """What the demonstration says did not come out in this run."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one attacker gets.

    Attributes:
        attacker: What the attacker has, in words.
        picture: The picture that the attack finds, row by row.
        correlation: Of that picture with the one that the victim trained on.
        closest_unit: The largest correlation, of either sign, over what all hidden units show: nobody who does not
            know the original can choose so well.
        whole_update: Correlation of all entries of the update, later layers included, with the plain ones.
    """

    attacker: str
    picture: list[float]
    correlation: float
    closest_unit: float
    whole_update: float


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What noise stays below in each correlation of a Finding, but for once in a million times."""

    correlation: float
    closest_unit: float
    whole_update: float


class AttackReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run; `--report FILE` writes it as JSON.

    Attributes:
        devices: Members of the session.
        threshold: Shares that rebuild a secret in it.
        entries: Entries of the model's update.
        digit: Which digit the original shows.
        original: The picture that the victim trained on, row by row.
        plain: From the plain update.
        masked: From the masked update, as the broker and the coordinator see it.
        one_mask_left: With the self mask and all pairwise masks but one taken off.
        below_threshold: By the coordinator and one device fewer than the threshold, with all that they hold.
        at_threshold: By the coordinator and as many devices as the threshold, with all that they hold: the limit.
        bounds: What noise stays below.
        sum_is_exact: The unmasked sum of this very session is the plain sum of all devices' integers.
        seconds_total: Of the run.
    """

    devices: int
    threshold: int
    entries: int
    digit: int
    original: list[float]
    plain: Finding
    masked: Finding
    one_mask_left: Finding
    below_threshold: Finding
    at_threshold: Finding
    bounds: Bounds
    sum_is_exact: bool
    seconds_total: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, from the attacker who sees a plain update to the limit."""
        return self.plain, self.masked, self.one_mask_left, self.below_threshold, self.at_threshold

    @property
    def sentences(self) -> tuple[str, str, str]:
        """What it means, for people who have never heard of any of this."""
        others = self.devices - 1
        return (
            "What a device sends for training carries its data: from one plain update, anybody who reads it computes "
            "the handwritten digit back, pixel by pixel.",
            "With Sottovoce the update leaves the device only under secret masks that cancel out in the sum of all "
            "devices, and from the masked update the same attack gets nothing but noise.",
            f"Even an attacker who has the mask keys of {others - 1} of the {others} other devices, and so takes off "
            "every mask but one, gets noise: one mask that stays secret hides everything.",
        )

    @property
    def limit(self) -> str:
        """Where the protection ends."""
        return (
            "The limit: devices keep shares of one another's keys, so that one of them may drop out; any "
            f"{self.threshold} of the {self.devices - 1} others who conspire can rebuild this device's mask key and "
            f"see its update, {self.threshold - 1} cannot."
        )

    def verdict(self, finding: Finding) -> Verdict:
        """Return what `finding` shows: the picture, noise as far as any correlation can tell, or something else."""
        if finding.correlation > PLAIN_AT_LEAST:
            return "the picture"
        pairs = (
            (finding.correlation, self.bounds.correlation),
            (finding.closest_unit, self.bounds.closest_unit),
            (finding.whole_update, self.bounds.whole_update),
        )
        return "noise" if all(abs(found) < bound for found, bound in pairs) else "something"

    def check(self) -> None:
        """Check that the plain update gives the picture away, and that all below the limit is noise.

        Raises:
            ClaimFailed: Names what did not come out. True noise fails this about once in a hundred thousand runs.
        """
        verdicts = [self.verdict(finding) for finding in self.findings]
        if verdicts != ["the picture", "noise", "noise", "noise", "the picture"]:
            raise ClaimFailed(f"the attackers should see the picture, three times noise, the picture, not {verdicts}")
        if not self.sum_is_exact:
            raise ClaimFailed("the unmasked sum is not the plain sum of the devices' updates")


def findings_table(report: AttackReport) -> Table:
    """Return each attacker's correlations with the original and the plain update, and what noise stays below."""
    table = Table(box=None, pad_edge=False)
    table.add_column("what the attacker has")
    table.add_column("what he sees")
    for heading in ("picture", "closest", f"all {report.entries:,}"):
        table.add_column(heading, justify="right")
    for finding in report.findings:
        verdict = report.verdict(finding)
        numbers = (finding.correlation, finding.closest_unit, finding.whole_update)
        table.add_row(
            finding.attacker,
            f"[{_STYLES[verdict]}]{verdict}[/{_STYLES[verdict]}]",
            *(f"{value:z.3f}" for value in numbers),
        )
    bounds = report.bounds
    limits = (bounds.correlation, bounds.closest_unit, bounds.whole_update)
    table.add_row("(noise: below, but once in a million)", "", *(f"{value:z.3f}" for value in limits), style="dim")
    return table


def draw(report: AttackReport, path: Path) -> None:
    """Write a PNG: the original beside what three attackers get, each with its number, and the sentences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_FIGURE_INCHES, dpi=150, facecolor=_PAPER)
    FigureCanvasAgg(figure)
    subtitle = (
        f"A device has trained on one handwritten {report.digit}. The same attack, made on what the device sends:"
    )
    figure.text(_LEFT, 0.935, "What one update gives away", fontsize=22, weight="bold", color=_INK)
    figure.text(_LEFT, 0.893, subtitle, fontsize=12.5, color=_MUTED)
    others = report.devices - 1
    panels: tuple[tuple[str, str, Finding | None], ...] = (
        ("The original", "it never leaves the device", None),
        ("From the plain update", "Sottovoce never sends it", report.plain),
        ("From the masked update", "all that server and broker get", report.masked),
        ("All masks off but one", f"with the keys of {others - 1} of {others} others", report.one_mask_left),
    )
    for column, (title, caption, finding) in enumerate(panels):
        _draw_panel(figure, _LEFT + column * _PANEL_STEP, title, caption, finding, report)
    for number, sentence in enumerate(report.sentences):
        wrapped = textwrap.fill(sentence, _SENTENCE_COLUMNS)
        figure.text(_LEFT, 0.375 - number * 0.083, wrapped, fontsize=11.5, color=_INK, va="top", linespacing=1.35)
    limit = textwrap.fill(report.limit, _LIMIT_COLUMNS)
    figure.text(_LEFT, 0.105, limit, fontsize=9.5, color=_MUTED, va="top", linespacing=1.35)
    image = io.BytesIO()
    figure.savefig(image, format="png", facecolor=_PAPER)
    path.write_bytes(image.getvalue())


def _draw_panel(
    figure: Any, left: float, title: str, caption: str, finding: Finding | None, report: AttackReport
) -> None:
    """Draw one picture, its greys running from its own smallest to its own largest value, with its captions."""
    verdict = "original" if finding is None else report.verdict(finding)
    pixels = report.original if finding is None else finding.picture
    width, height = _FIGURE_INCHES
    axes = figure.add_axes((left, 0.463, _PANEL_WIDTH, _PANEL_WIDTH * width / height))
    axes.imshow(_square(pixels), cmap="gray_r", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_COLOURS[verdict], linewidth=2.5)
    figure.text(left, 0.833, title, fontsize=12.5, weight="bold", color=_INK)
    figure.text(left, 0.805, caption, fontsize=10, color=_MUTED)
    if finding is not None:
        words = f"{verdict}, correlation {finding.correlation:z.2f}"
        figure.text(left, 0.428, words, fontsize=11.5, weight="bold", color=_COLOURS[verdict])


def _square(pixels: Sequence[float]) -> Any:
    side = round(len(pixels) ** 0.5)
    return np.reshape(pixels, (side, side))
