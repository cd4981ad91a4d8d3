"""What `./scripts/demo` understands: every demonstration has its own options, and none that mean nothing to it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

DEFAULT_KIND = "digits"
_PROGRAM = "./scripts/demo"


@dataclass(frozen=True, slots=True)
class _Kind:
    """One demonstration on the command line.

    Attributes:
        sentence: What it shows.
        options: Option -> its help text, in the order in which they are listed.
        required: Those without which it cannot begin.
    """

    sentence: str
    options: Mapping[str, str]
    required: tuple[str, ...] = ()


_REPORT = {"--report": "write everything measured as JSON to this file"}
_MODE = {
    "--mode": "against whom the masks protect: a coordinator that lies to devices (active, the default), or one that "
    "only listens (curious)"
}
_TRAINED = {
    **_MODE,
    "--no-kill": "let every agent live; otherwise one is killed in the middle of a round",
    **_REPORT,
}
_KINDS: Mapping[str, _Kind] = {
    "digits": _Kind(
        "Train a small network on handwritten digits: a real broker, real processes, one of them killed on the way.",
        {
            "--devices": "how many devices (default: 12)",
            "--rounds": "how many rounds (default: 15)",
            "--seed": "of the division of the digits among the devices (default: 1)",
            **_TRAINED,
            "--plot": "where the plot goes (default: demo-digits.png)",
        },
    ),
    "har": _Kind(
        "Train a network on the movements of real people, one device a person: is it walking, or sitting?",
        {
            "--data-file": "the .npz with the movements",
            "--devices": "how many devices (default: one for every person)",
            "--rounds": "how many rounds (default: 20)",
            **_TRAINED,
            "--plot": "where the plot goes (default: demo-har.png)",
        },
        required=("--data-file",),
    ),
    "attack": _Kind(
        "Show, in seconds and without a broker, what one plain update gives away and a masked one does not.",
        {
            "--devices": "how many devices (default: 12)",
            "--seed": "of the division of the digits and the choice of the picture (default: 1)",
            **_REPORT,
            "--plot": "where the picture goes (default: demo-attack.png)",
        },
    ),
    "temperature": _Kind(
        "Ask twenty thermometers two questions; none of them tells its reading.",
        {
            "--devices": "how many devices (default: 20)",
            "--seed": "of the readings, where they are drawn (default: 1)",
            "--data-file": "a CSV with one column of readings a device, in place of drawn ones",
            **_MODE,
            **_REPORT,
        },
    ),
    "words": _Kind(
        "Find out what twenty people write after a word, and tell all of them; nobody's message is read.",
        {
            "--devices": "how many devices (default: 20)",
            "--data-file": 'JSON lines, {"sender": ..., "text": ...}, in place of the messages that come with the demo',
            **_MODE,
            **_REPORT,
        },
    ),
}
KINDS = tuple(_KINDS)
"""The demonstrations by name."""


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options on the command line; its attribute `kind` names the demonstration.

    Args:
        arguments: Those of this process if None. Where they begin with an option, the demonstration is DEFAULT_KIND.

    Raises:
        SystemExit: With 2 after a line on stderr that says what is wrong; with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Many devices learn together, and never show their data or their updates.",
        epilog=f"{_PROGRAM} KIND --help lists the options of one of them. Without a KIND it is {DEFAULT_KIND}.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    parsers = {
        name: kinds.add_parser(name, help=kind.sentence, description=kind.sentence) for name, kind in _KINDS.items()
    }
    for name, kind in _KINDS.items():
        for option, text in kind.options.items():
            parsers[name].add_argument(option, help=text, **_SHAPES[option], required=option in kind.required)
    given = sys.argv[1:] if arguments is None else list(arguments)
    is_option = bool(given) and given[0].startswith("-") and given[0] not in ("-h", "--help")
    options, unknown = parser.parse_known_args([DEFAULT_KIND, *given] if is_option or not given else given)
    if unknown:
        parsers[options.kind].error(_refusal(options.kind, unknown[0].partition("=")[0]))
    return options


def _refusal(kind: str, unknown: str) -> str:
    if unknown in _KINDS:
        return f"the demonstration comes first, then its options: {_PROGRAM} {unknown} ..."
    others = [name for name, other in _KINDS.items() if unknown in other.options]
    if not others:
        return f"{unknown!r} is not understood; {_PROGRAM} {kind} --help lists what is"
    return f"{unknown} means nothing to {kind!r}, only to {', '.join(others)}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


_SHAPES: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "--devices": {"type": _positive, "metavar": "N"},
        "--rounds": {"type": _positive, "metavar": "N"},
        "--seed": {"type": int, "default": 1, "metavar": "N"},
        "--data-file": {"type": Path, "metavar": "FILE"},
        "--mode": {"choices": ("active", "curious"), "default": "active"},
        "--no-kill": {"action": "store_true"},
        "--report": {"type": Path, "metavar": "FILE"},
        "--plot": {"type": Path, "metavar": "FILE"},
    }
)
