"""The command `sottovoce ask`: its arguments, and the answers in words; `sottovoce.ask` does the asking."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from sottovoce.language.ports import Rounds

Connect: TypeAlias = "Callable[..., AbstractContextManager[Rounds]]"
_DESCRIPTION = """\
Asks every device of a running fleet one question about its newest reading, and prints the answer. No device tells its
reading: only sums leave, and only their total is ever seen.

  sottovoce ask mean temperature
  sottovoce ask fraction temperature --above 21
  sottovoce ask histogram temperature --low 0 --high 40 --bins 8
  sottovoce ask quantile temperature --q 0.5 --low -20 --high 50     the median

Run it where the coordinator runs: it needs the coordinator's settings (--config) and `coordinator run` at work. The
collection is one column of numbers on each device: `edge-agent import`, or [source.temperature] in its agent.toml."""
_BAR = 40


def add_parser(commands: Any, *, connect: Connect) -> None:
    """Add `ask` to the subcommands of `sottovoce`.

    Args:
        commands: The subcommands.
        connect: `coordinator.connect`, which this package may not import.
    """
    raw = argparse.RawDescriptionHelpFormatter
    text = "ask a running fleet for a mean, a fraction, a histogram or a quantile"
    ask = commands.add_parser("ask", help=text, description=_DESCRIPTION, formatter_class=raw)
    questions = ask.add_subparsers(required=True, metavar="QUESTION")
    mean = _question(questions, connect, "mean", "the mean of the newest readings")
    fraction = _question(questions, connect, "fraction", "the fraction of devices above or below a threshold")
    histogram = _question(questions, connect, "histogram", "how many devices lie in each of some equal parts")
    quantile = _question(questions, connect, "quantile", "the reading that a fraction of the devices is below")
    threshold = fraction.add_mutually_exclusive_group(required=True)
    threshold.add_argument("--above", type=float, metavar="X", help="count devices whose reading is above X")
    threshold.add_argument("--below", type=float, metavar="X", help="... below X")
    mean.add_argument("--low", type=float, metavar="X", help="readings below count as X (default: -1000000)")
    mean.add_argument("--high", type=float, metavar="X", help="readings above count as X (default: 1000000)")
    for each in (histogram, quantile):
        each.add_argument("--low", type=float, required=True, metavar="X", help="the low end of the range")
        each.add_argument("--high", type=float, required=True, metavar="X", help="the high end")
    histogram.add_argument("--bins", type=int, default=10, metavar="N", help="1 to 64 equal parts (%(default)s)")
    quantile.add_argument("--q", type=float, default=0.5, metavar="F", help="0 to 1 (%(default)s, the median)")


def _question(questions: Any, connect: Connect, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = questions.add_parser(name, help=text, description=text)
    parser.add_argument("collection", metavar="COLLECTION", help="one column of numbers on each device")
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("coordinator.toml"),
        metavar="FILE",
        help="the coordinator's settings (./coordinator.toml)",
    )
    parser.add_argument("--minimum", type=int, default=10, metavar="N", help="fewest devices in the sum (%(default)s)")
    parser.add_argument("--mode", choices=("active", "curious"), default="active", help="of secure aggregation")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="give up after S seconds (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=functools.partial(_run, connect), question=name)
    return parser


def _run(connect: Connect, options: argparse.Namespace) -> None:
    import msgspec

    with connect(options.config, minimum=options.minimum, mode=options.mode, timeout_s=options.timeout) as rounds:
        answer = _ask(rounds, options)
    if options.json:
        plain = {name: getattr(answer, name) for name in (field.name for field in dataclasses.fields(answer))}
        print(msgspec.json.encode(plain, enc_hook=lambda array: array.tolist()).decode())
    else:
        print("\n".join(lines(answer, options.collection)))


def _ask(rounds: Any, options: argparse.Namespace) -> Any:
    from sottovoce import ask

    match options.question:
        case "mean":
            window = {name: value for name in ("low", "high") if (value := getattr(options, name)) is not None}
            return ask.ask_mean(rounds, options.collection, **window)
        case "fraction":
            return ask.ask_fraction(rounds, options.collection, above=options.above, below=options.below)
        case "histogram":
            return ask.ask_histogram(rounds, options.collection, low=options.low, high=options.high, bins=options.bins)
        case _:
            return ask.ask_quantile(rounds, options.collection, low=options.low, high=options.high, fraction=options.q)


def lines(answer: Any, collection: str) -> Iterator[str]:
    """Yield the answer for people."""
    from sottovoce import ask

    match answer:
        case ask.Mean(mean=mean, devices=devices):
            yield f"mean {collection}: {mean:.6g} ({devices} devices)"
        case ask.Fraction(fraction=fraction, devices=devices):
            yield f"fraction of devices: {fraction:.1%} ({round(fraction * devices)} of {devices})"
        case ask.Histogram():
            yield from _bars(answer)
        case ask.Quantile(low=low, high=high, devices=devices):
            if math.isinf(low) or math.isinf(high):
                where = f"below {high:.6g}" if math.isinf(low) else f"{low:.6g} or above"
                yield f"the quantile is {where}: outside of the range; ask again with a wider one ({devices} devices)"
            else:
                yield f"between {low:.6g} and {high:.6g} ({devices} devices)"


def _bars(histogram: Any) -> Iterator[str]:
    largest = max(1, int(histogram.counts.max()))
    names = [f"{low:.4g} to {high:.4g}" for low, high in zip(histogram.edges, histogram.edges[1:], strict=False)]
    width = max(map(len, names))
    for name, count in zip(names, histogram.counts, strict=True):
        yield f"{name:>{width}}  {'█' * round(_BAR * count / largest):<{_BAR}} {count}"
    outside = histogram.devices - int(histogram.counts.sum())
    yield f"{histogram.devices} devices" + (f", {outside} of them outside of the range" if outside else "")
