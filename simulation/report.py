"""What a demo run found, as data: the JSON report, the plot, and the tables people read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


class RoundReport(msgspec.Struct, frozen=True, kw_only=True):
    """One committed round.

    Attributes:
        round: Round number, from 0.
        cohort: How many devices were selected.
        survivors: How many are in the sum.
        dropped: Stage -> device ids lost in it.
        accuracy: Of the republished global model on the test set, by TFLite; 0 to 1.
        bytes_up_per_device, bytes_down_per_device: MQTT payload bytes, mean over the cohort.
        seconds: From announcement to commitment.
    """

    round: int
    cohort: int
    survivors: int
    dropped: dict[str, list[str]]
    accuracy: float
    bytes_up_per_device: float
    bytes_down_per_device: float
    seconds: float


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run; `--report FILE` writes it as JSON.

    Attributes:
        broker: Program and version that carried the messages.
        rounds: The committed rounds, in order.
        abandoned: Reasons of rounds that were abandoned and tried again.
        accuracy_alone_mean: Mean over the devices of a model trained on that device alone.
        accuracy_together: Of the last global model.
        accuracy_pooled: Of a model trained on all data in one place.
        agent_rss_mb_max: Largest resident memory of any agent at any time, MB.
        agent_ready_seconds_max: Longest time from the start of an agent process to its first connection.
        seconds_total: From start to report, without installation.
    """

    broker: str
    rounds: list[RoundReport]
    abandoned: list[str]
    accuracy_alone_mean: float
    accuracy_together: float
    accuracy_pooled: float
    agent_rss_mb_max: float
    agent_ready_seconds_max: float
    seconds_total: float


def write_report(report: msgspec.Struct, path: Path) -> None:
    """Write the report of any demonstration as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def rounds_table(rounds: Sequence[RoundReport], *, running: str) -> RenderableType:
    """Return the live table: one line a round, and what is going on now."""
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "cohort", "in sum", "dropped", "up/dev", "down/dev", "secs", "accuracy"):
        table.add_column(
            heading, justify="left" if heading in ("dropped", "accuracy") else "right", no_wrap=heading != "dropped"
        )
    for entry in rounds:
        dropped = ", ".join(
            f"{' '.join(ids)} ({stage.replace('_', ' ')})" for stage, ids in entry.dropped.items() if ids
        )
        table.add_row(
            str(entry.round + 1),
            str(entry.cohort),
            str(entry.survivors),
            dropped or "-",
            kilobytes(entry.bytes_up_per_device),
            kilobytes(entry.bytes_down_per_device),
            f"{entry.seconds:.1f}",
            f"{entry.accuracy:.3f} " + "█" * round(entry.accuracy * 10),
        )
    return Group(table, Text(running, style="dim")) if running else table


def comparison_table(report: DemoReport) -> Table:
    """Return the last table: alone, together, pooled."""
    table = Table(box=None, pad_edge=False)
    table.add_column("same model, same passes over the data")
    table.add_column("test accuracy", justify="right")
    table.add_row("each device alone (mean)", f"{report.accuracy_alone_mean:.3f}")
    table.add_row("together, nobody's data or update seen", f"[bold]{report.accuracy_together:.3f}[/bold]")
    table.add_row("all data pooled in one place", f"{report.accuracy_pooled:.3f}")
    return table


def overheard_table(device: str, masked: Sequence[int], learned: Sequence[float]) -> Table:
    """Return what one device sent, as anybody on the way saw it, beside what the sum taught.

    Args:
        device: Whose masked update it was.
        masked: The first entries of its masked vector, uint32.
        learned: The same coordinates of the mean update of all.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(f"what was heard of {device}", justify="right")
    table.add_column("what was learned from all", justify="right")
    for word, value in zip(masked, learned, strict=True):
        table.add_row(f"{word:>10d}", f"{value:+.6f}")
    return table


def plot_accuracy(report: DemoReport, path: Path, *, title: str) -> None:
    """Write a PNG: accuracy of the global model by round, between the two lines it is compared with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    numbers = [entry.round + 1 for entry in report.rounds]
    axes.plot(numbers, [entry.accuracy for entry in report.rounds], marker="o", label="together (masked)")
    axes.axhline(report.accuracy_pooled, linestyle="--", color="tab:green", label="all data pooled")
    axes.axhline(report.accuracy_alone_mean, linestyle=":", color="tab:red", label="each device alone (mean)")
    axes.set(xlabel="round", ylabel="accuracy on the test set", title=title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path.write_bytes(image.getvalue())


def kilobytes(count: float) -> str:
    """Return `count` bytes as people read it: `199 kB`."""
    return f"{count / 1000:.0f} kB"
