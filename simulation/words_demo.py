"""The demonstration `./scripts/demo words`: what to recommend after "good"? Twenty people's messages, and nobody's.

A real mosquitto, one coordinator process, one agent process for every person, each with that person's messages. First
the fleet finds the words that many people use, although nobody has listed them (two rounds); then it counts which of
them follow which, and gives the table back to everybody (one round). In the end every device suggests what follows a
word after which its owner never wrote anything. Nothing here needs TensorFlow; the sum is compared with what the demo
alone knows: all messages.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from coordinator import connect
from coordinator.terms import CohortTerms
from edge_agent.examples import ExampleStore
from edge_agent.published import PUBLISHED_FOLDER, Published, read_published
from edge_agent.suggestions import newest_table, own_pairs, suggest
from simulation.broker_process import BrokerProcess
from simulation.guarded import GuardedFolder
from simulation.overheard import Eavesdropper
from simulation.process_fleet import ProcessFleet, wait_until
from simulation.report import write_report
from sottovoce.errors import ConfigError
from sottovoce.language.analytics import NextWords, next_words
from sottovoce.language.arguments import DeviceValues
from sottovoce.language.discovery import discover_words
from sottovoce.language.tallies import COUNTS, CountTerms
from sottovoce.secagg.lanes import layout_of
from sottovoce.secagg.segments import segments_of
from sottovoce.text import bigrams
from sottovoce.types import Array

COLLECTION = "messages"
MESSAGES = Path(__file__).resolve().parent / "messages.jsonl"
DEFAULT_DEVICES = 20
SHARE = 0.15
"""A word is found that so many of the people use."""
TERMS = CountTerms(most=5, entries=200, threshold=3, publish=True)
WORD = "good"
_PLAN = "next_words"
_MAX_WORDS = 200
_PUBLISHED_S = 30.0
_SHOWN_DEVICES = 4
_SHOWN_WORDS = 6
_SHOWN_SUGGESTIONS = 3
_KEPT_BYTES = 1 << 18
_CAPTION = (
    f"a single phone's numbers are noise; all masks cancel in the sum; what fewer than {TERMS.threshold} people wrote "
    "is left out; what was really written only this demonstration knows, which made the phones"
)


class Person(msgspec.Struct, frozen=True):
    """Who wrote one message."""

    sender: str
    text: str


class Suggested(msgspec.Struct, frozen=True, kw_only=True):
    """What one device suggests after a word that its owner never wrote anything after.

    Attributes:
        device: Which.
        word: After what.
        suggestions: The best ones first.
    """

    device: str
    word: str
    suggestions: list[str]


class WordsReport(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run; `--report FILE` writes it as JSON.

    Attributes:
        broker: Program and version that carried the messages.
        devices: How many agent processes.
        vocabulary: The words that were found, though nobody had listed them.
        discovery_entries: Entries of a device's masked vectors for that.
        after: What follows the shown word: word -> (times, devices), from the sum.
        plain: The same from all messages, which only the demo knows.
        masked: Device -> what the server saw of it in the places of these words.
        suggested: What devices suggest now.
        seconds: By step.
        seconds_total: From start to report, without installation.
        agent_rss_mb_max: Largest resident memory of any agent at any time, MB.
    """

    broker: str
    devices: int
    vocabulary: list[str]
    discovery_entries: int
    after: dict[str, tuple[int, int]]
    plain: dict[str, tuple[int, int]]
    masked: dict[str, list[int]]
    suggested: list[Suggested]
    seconds: dict[str, float]
    seconds_total: float
    agent_rss_mb_max: float


def main(options: argparse.Namespace, console: Console) -> WordsReport:
    """Run the demonstration and print what it found.

    Raises:
        SottovoceError: No broker, a process that failed, a data file that is none.
    """
    started = time.monotonic()
    people = messages_by_sender(options.data_file or MESSAGES, options.devices or DEFAULT_DEVICES)
    cohort = CohortTerms(goal=len(people), minimum=min(len(people), 10), over_selection=1.0)
    seconds: dict[str, float] = {}
    console.print(f'[bold]what to recommend after "{WORD}"? ask {len(people)} phones, read no message[/bold]')
    with BrokerProcess() as broker, GuardedFolder("sottovoce-demo-") as guarded:
        fleet = ProcessFleet(guarded, broker)
        with console.status("a broker, a coordinator and the devices are made; everybody gets a key and a certificate"):
            _prepare(fleet, people, mode=options.mode)
        console.print(f"broker on {broker.host}:{broker.port} ({broker.description}), {len(people)} agent processes")
        with Eavesdropper(broker, offset=0, keep_bytes=_KEPT_BYTES) as eavesdropper:
            with console.status("the agents start"):
                fleet.start_coordinator(until_done=False)
                fleet.start_agents(list(people), absent=eavesdropper.absent)
            seconds["start"] = time.monotonic() - started
            with connect(fleet.config, cohort=cohort, mode=options.mode):
                vocabulary, entries = _discover(console, seconds)
                eavesdropper.listen()
                eavesdropper.beginnings.clear()
                table = _count(vocabulary, seconds)
            # The coordinator has them all; to this listener the broker may still be delivering them.
            wait_until(lambda: eavesdropper.heard(_SHOWN_DEVICES), deadline_s=_PUBLISHED_S)
        fleet.watch()
        published = _published(fleet, list(people))
        word = shown_word(table)
        masked = _masked(eavesdropper.beginnings, published, table, word, clients=cohort.wanted)
        plain = plain_counts(people, table)
        console.print(_overview(masked, table, word, plain))
        suggested = _suggestions(fleet, people, table, console, seconds)
        fleet.watch()
        fleet.stop()
    result = WordsReport(
        broker=broker.description,
        devices=len(people),
        vocabulary=vocabulary,
        discovery_entries=entries,
        after={each.word: (each.count, each.devices) for each in table.after(word)},
        plain={pair[1]: found for pair, found in plain.items() if pair[0] == word},
        masked=masked,
        suggested=suggested,
        seconds=seconds,
        seconds_total=time.monotonic() - started,
        agent_rss_mb_max=max(fleet.peak_rss_mb.values()),
    )
    console.print(f"\nlargest agent {result.agent_rss_mb_max:.0f} MB, {result.seconds_total:.0f} s in all")
    if options.report:
        write_report(result, options.report)
        console.print(f"report: {options.report}")
    return result


def messages_by_sender(path: Path, devices: int) -> dict[str, list[str]]:
    """Return the messages of the first `devices` senders in a file of JSON lines, {"sender": ..., "text": ...}.

    Raises:
        ConfigError: It is no such file, or has fewer senders than a sum needs to hide them.
    """
    found: dict[str, list[str]] = defaultdict(list)
    try:
        for line in path.read_bytes().splitlines():
            message = msgspec.json.decode(line, type=Person)
            if message.sender in found or len(found) < devices:
                found[message.sender].append(message.text)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f'--data-file {path}: write one JSON object a line, {{"sender": "ada", "text": "Good morning"}}: {error}'
        ) from error
    if len(found) < 3:
        raise ConfigError(f"--data-file {path}: {len(found)} senders; a sum needs at least 3 devices to hide in")
    return {f"phone-{number:02}": messages for number, messages in enumerate(found.values(), 1)}


def shown_word(table: NextWords) -> str:
    """Return WORD, or where these people do not write it, the word after which most is known.

    Raises:
        ConfigError: Nothing follows anything.
    """
    best = WORD if table.after(WORD) else max(table.first, key=lambda word: len(table.after(word)))
    if not table.after(best):
        raise ConfigError(f"no two words follow one another in the messages of {TERMS.threshold} people; add messages")
    return best


def plain_counts(people: Mapping[str, Sequence[str]], table: NextWords) -> dict[tuple[str, str], tuple[int, int]]:
    """Return what the table must say, computed from all messages: pair -> (times, devices), thresholded."""
    counts: Counter[tuple[str, str]] = Counter()
    devices: Counter[tuple[str, str]] = Counter()
    for messages in people.values():
        own = Counter((pair[0], pair[1]) for message in messages for pair in bigrams(message))
        listed = sorted(pair for pair in own if pair[0] in table.first and pair[1] in table.second)
        kept = sorted(listed, key=lambda pair: -own[pair])[: TERMS.entries]
        counts.update({pair: min(own[pair], TERMS.most) for pair in kept})
        devices.update(kept)
    return {pair: (counts[pair], devices[pair]) for pair in counts if devices[pair] >= TERMS.threshold}


def _prepare(fleet: ProcessFleet, people: Mapping[str, Sequence[str]], *, mode: str) -> None:
    fleet.enrol(list(people))
    for device, messages in people.items():
        file = fleet.folder / f"{device}.jsonl"
        file.write_bytes(b"\n".join(msgspec.json.encode({"text": message}) for message in messages))
        with ExampleStore(fleet.home(device).examples) as store:
            store.import_file(COLLECTION, file, now_s=time.time())
        file.unlink()
        # These owners allow the fleet to ask for words that it does not list; by default nobody does.
        fleet.allow(device, modes=f'["{mode}"]', minimum_cohort=min(len(people), 10), discovery="true")


def _discover(console: Console, seconds: dict[str, float]) -> tuple[list[str], int]:
    """Return the words that many use, ascending, and how many entries it took to find them."""
    before = time.monotonic()
    with console.status("which words do many people use?"):
        found = discover_words(DeviceValues("collection", COLLECTION), share=SHARE)
    seconds["discovery"] = time.monotonic() - before
    vocabulary = [each.word for each in found.words][:_MAX_WORDS]
    console.print(
        f"\n{len(found.words)} words are used by at least {SHARE:.0%} of all people, found in {found.rounds} rounds "
        f"though nobody listed them: {', '.join(vocabulary[:12])} …"
    )
    return sorted(vocabulary), found.entries


def _count(vocabulary: list[str], seconds: dict[str, float]) -> NextWords:
    before = time.monotonic()
    table = next_words(DeviceValues("collection", COLLECTION), vocabulary, terms=TERMS, name=_PLAN)
    seconds["next words"] = time.monotonic() - before
    return table


def _published(fleet: ProcessFleet, devices: Sequence[str]) -> Published:
    """Wait until every device has the table, and return it."""

    def found(device: str) -> list[Published]:
        tables = read_published(fleet.home(device).path / PUBLISHED_FOLDER)
        return [each for each in tables if each.plan.name == _PLAN]

    wait_until(lambda: all(found(device) for device in devices), deadline_s=_PUBLISHED_S)
    return found(devices[0])[0]


def _masked(
    vectors: Mapping[str, bytes], published: Published, table: NextWords, word: str, *, clients: int
) -> dict[str, list[int]]:
    """Return what stood in the places of what follows `word` in the vectors of some devices, as the server got them."""
    layout = layout_of(published.plan, maximum_clients=clients)
    assert published.plan.aggregations[0].name == COUNTS, "the counts come first"
    width = segments_of(layout)[0].width
    row = table.first.index(word) * len(table.second)
    places = [row + table.second.index(each.word) for each in table.after(word)[:_SHOWN_WORDS]]
    return {
        device: [int(_entries(vectors[device], width)[place]) for place in places]
        for device in sorted(vectors)[:_SHOWN_DEVICES]
    }


def _entries(vector: bytes, width: int) -> Array:
    """Return the entries at the beginning of a vector whose first segment has entries of `width` bits."""
    bits = np.unpackbits(np.frombuffer(vector, np.uint8), bitorder="little")
    whole = bits[: len(bits) // width * width].reshape(-1, width)
    return whole @ (1 << np.arange(width))


def _overview(
    masked: Mapping[str, Sequence[int]],
    table: NextWords,
    word: str,
    plain: Mapping[tuple[str, str], tuple[int, int]],
) -> Table:
    """Return the table of the talk: rows of single users as the server saw them, then the sum."""
    found = table.after(word)[:_SHOWN_WORDS]
    overview = Table(title="what the server saw", caption=_CAPTION)
    overview.add_column("", no_wrap=True)
    for each in found:
        overview.add_column(f"{word} {each.word}", justify="right")
    for device, entries in masked.items():
        overview.add_row(device, *map(str, entries), style="dim")
    overview.add_row("…", *("…" for _ in found), style="dim", end_section=True)
    overview.add_row("the sum of all", *(str(each.count) for each in found), style="bold")
    overview.add_row("written by", *(f"{each.devices} people" for each in found), end_section=True)
    overview.add_row("really written", *(str(plain.get((word, each.word), (0, 0))[0]) for each in found))
    return overview


def _suggestions(
    fleet: ProcessFleet,
    people: Mapping[str, Sequence[str]],
    table: NextWords,
    console: Console,
    seconds: dict[str, float],
) -> list[Suggested]:
    """Ask every device what follows a word after which its owner never wrote anything; the first by its own command."""
    before = time.monotonic()
    console.print("\n[bold]what devices suggest now, after a word that their owners never wrote anything after[/bold]")
    unknown = {device: word for device, messages in people.items() if (word := unfollowed_word(messages, table))}
    found: list[Suggested] = []
    for device, word in unknown.items():
        home = fleet.home(device)
        if not found:
            printed = fleet.run_command("edge_agent", "suggest", word, "--home", str(home.path), "--plan", _PLAN)
            console.print(f"{device}$ edge-agent suggest {word}\n{printed.rstrip()}", highlight=False)
        published = newest_table(read_published(home.path / PUBLISHED_FOLDER), _PLAN)
        with ExampleStore(home.examples) as store:
            answer = suggest(published, word, own_pairs(store, published), limit=_SHOWN_SUGGESTIONS)
        found.append(Suggested(device=device, word=word, suggestions=[each.word for each in answer]))
        console.print(f"{device}: {word} … [green]{' | '.join(found[-1].suggestions)}[/green]", highlight=False)
    seconds["suggestions"] = time.monotonic() - before
    return found


def unfollowed_word(messages: Sequence[str], table: NextWords) -> str | None:
    """Return the word after which the fleet knows most and the writer of `messages` never wrote; None without any."""
    own = {pair[0] for message in messages for pair in bigrams(message)}
    known = {word: table.after(word) for word in table.first if word not in own}
    best = max(known, key=lambda word: (len(known[word]), sum(each.count for each in known[word])), default=None)
    return best if best is not None and known[best] else None
