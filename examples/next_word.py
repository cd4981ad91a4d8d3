"""What word to recommend after "hello"? Nobody's messages are read; everybody's phone knows.

Every device has its owner's messages in its collection `messages` (`edge-agent import messages FILE.jsonl`). Three
rounds are asked of all devices at once, and only sums leave them: two find the words that many people use, although
nobody has listed them; one counts which of these follow which, and gives the table to every device. From then on
`edge-agent suggest hello` answers on each of them, also offline. No TensorFlow is needed. Real devices let themselves
be asked for unlisted words only where their owners have set `discovery = true` in agent.toml.

    python examples/next_word.py                                      on a few messages, in this process
    python examples/next_word.py --fleet 20                           on 20 devices simulated here
    python examples/next_word.py --config coordinator.toml            on the fleet of a running coordinator
"""

from __future__ import annotations

import argparse

import sottovoce as sv
from sottovoce.language.analytics import CountTerms, NextWords, next_words
from sottovoce.language.discovery import discover_words
from sottovoce.language.tallies import Examples

TERMS = CountTerms(most=5, entries=200, threshold=3, publish=True)
"""One device moves a count by at most 5 and at most 200 counts; what fewer than 3 devices wrote is not published."""
MESSAGES = [
    ["Hello there", "Good morning", "See you soon"],
    ["Hello there!", "good morning, all", "See you at nine"],
    ["Hello you", "Good morning", "Good luck", "my secret recipe"],
    ["hello there", "Good luck!", "See you tomorrow"],
    ["Good luck", "See you soon"],
]


def learn(messages: Examples, share: float) -> NextWords:
    """Return what follows what, of words that at least `share` of the devices use."""
    vocabulary = [found.word for found in discover_words(messages, share=share).words]
    return next_words(messages, vocabulary[:200], terms=TERMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["hello", "good", "see"], help="after which to suggest")
    parser.add_argument("--share", type=float, default=0.5, help="words that so many devices use (default: 0.5)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--fleet", type=int, metavar="N", help="simulate N devices")
    where.add_argument("--config", help="coordinator.toml of a running coordinator")
    options = parser.parse_args()
    if options.config:
        from coordinator import connect

        with connect(options.config):
            table = learn(sv.collection("messages"), options.share)
    elif options.fleet:
        import simulation

        texts = [{"text": MESSAGES[at % len(MESSAGES)]} for at in range(options.fleet)]
        with simulation.fleet(options.fleet, collections={"messages": texts}):
            table = learn(sv.collection("messages"), options.share)
    else:
        table = learn(MESSAGES, options.share)
    for word in options.words:
        found = ", ".join(f"{each.word} ({each.count} times, {each.devices} devices)" for each in table.after(word))
        print(f"{word} … {found or 'nothing that enough devices wrote'}")


if __name__ == "__main__":
    main()
