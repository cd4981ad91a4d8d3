"""What may follow a word: the fleet's published table of pairs, mixed with what this device's owner writes.

For the word w, the share that a successor s has among everything suggested is

    share(s) = (own(w, s) + PRIOR * fleet(w, s) / fleet(w)) / (own(w) + PRIOR)

where `own` counts the pairs in this device's messages (any words), `fleet` those of the published table (words of its
vocabularies), and fleet(w), own(w) are their sums over all successors. It is the mean of a Dirichlet posterior: the
fleet counts as much as PRIOR own uses of the word, so what the owner always writes soon comes first, and after a word
that the owner never wrote the fleet alone answers. Where one of the two knows nothing, the other answers alone. The own
counts are made for one answer and never leave this device. (Mixed language models of that form: D. MacKay and L. Peto,
"A hierarchical Dirichlet language model", 1995.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.examples import ExampleStore
from edge_agent.extraction import messages_of
from edge_agent.published import Published
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.plan import Aggregation, Counted, Extraction
from sottovoce.text import bigrams, words

EXTRACTOR = "text.bigrams/1"
PRIOR = 5.0
"""Own uses of a word that the fleet's whole table weighs as much as: after a handful the owner's habit leads."""
_LARGEST_COUNT = 2**53


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word that may follow.

    Attributes:
        word: It.
        share: How much of all that may follow, 0 to 1.
        fleet: How often the published table has it after the word asked about.
        own: How often this device's messages have it there.
    """

    word: str
    share: float
    fleet: int
    own: int


def newest_table(published: Sequence[Published], plan_name: str | None = None) -> Published:
    """Return the newest table of pairs among `published`.

    Args:
        published: What the fleet has published, newest first.
        plan_name: Only of the plan of that name; None takes any.

    Raises:
        ConfigError: There is none (yet).
    """
    tables = [each for each in published if _table_of(each) is not None]
    wanted = [each for each in tables if plan_name in (None, each.plan.name)]
    if wanted:
        return wanted[0]
    if tables:
        names = ", ".join(sorted(each.plan.name for each in tables))
        raise ConfigError(f"plan {plan_name!r} has published no table of pairs of words; there is one of {names}")
    raise ConfigError(
        "the fleet has published no table of pairs of words yet: leave `edge-agent run` running until a round of such "
        "a plan is over, then ask again; after that no connection is needed"
    )


def last_word(text: str) -> str:
    """Return the last word of `text`, as messages are read. Raises ConfigError: there is none."""
    found = words(text)
    if not found:
        raise ConfigError(f"there is no word in {text!r}: write one, such as edge-agent suggest hello")
    return found[-1][0]


def own_pairs(examples: ExampleStore, published: Published) -> Counter[tuple[str, ...]]:
    """Count the pairs in the messages that the plan reads; a device without such messages has none."""
    extraction = _extraction(published)
    try:
        messages = messages_of(extraction, examples.read(published.plan.collection))
    except BadExamples:
        return Counter()
    return Counter(pair for message in messages for pair in bigrams(message))


def suggest(published: Published, word: str, own: Counter[tuple[str, ...]], *, limit: int) -> list[Suggestion]:
    """Return the words that may follow `word`, the likeliest first, equal ones by the alphabet.

    Args:
        published: A table of pairs (`newest_table`).
        word: As `last_word` returns it.
        own: Pairs of this device's own.
        limit: At most so many, >= 1.
    """
    fleet = _successors(published, word)
    mine = {second: count for (first, second), count in own.items() if first == word}
    fleet_uses, own_uses = sum(fleet.values()), sum(mine.values())
    prior = PRIOR if fleet_uses else 0.0

    def share(second: str) -> float:
        of_fleet = fleet.get(second, 0) / fleet_uses if fleet_uses else 0.0
        return (mine.get(second, 0) + prior * of_fleet) / (own_uses + prior)

    ranked = sorted(fleet.keys() | mine.keys(), key=lambda second: (-share(second), second))
    return [
        Suggestion(second, share(second), fleet=fleet.get(second, 0), own=mine.get(second, 0))
        for second in ranked[:limit]
    ]


def _successors(published: Published, word: str) -> dict[str, int]:
    """Return what follows `word` in the published table, with its counts; an entry that can be no count is left out."""
    aggregation, (first, second) = _table_of(published), _extraction(published).vocabularies
    if aggregation is None or word not in first:
        return {}
    start = first.index(word) * len(second)
    row = published.sums[aggregation.name].reshape(-1)[start : start + len(second)]
    return {second[index]: int(row[index]) for index in np.flatnonzero((row >= 1) & (row < _LARGEST_COUNT))}


def _extraction(published: Published) -> Extraction:
    extraction = published.plan.extraction
    if extraction is None or extraction.extractor != EXTRACTOR:
        raise ConfigError(f"plan {published.plan.name!r} has published no table of pairs of words")
    return extraction


def _table_of(published: Published) -> Aggregation | None:
    """Return the aggregation that counts every pair of the two vocabularies, None if there is no such.

    Its first entries are the table, the second words running fastest; a counting program may have more of them.
    """
    extraction = published.plan.extraction
    if extraction is None or extraction.extractor != EXTRACTOR:
        return None
    first, second = extraction.vocabularies
    for aggregation in published.plan.aggregations:
        counted = isinstance(aggregation.encoding, Counted) and not aggregation.presence_of and not aggregation.follows
        tensor = published.sums.get(aggregation.name)
        if counted and tensor is not None and tensor.size >= len(first) * len(second):
            return aggregation
    return None
