"""From a message to its words: the vetted, versioned extractors that a plan may name and a device has.

A plan never ships code for text; it names an extractor and a vocabulary. Version 1, in this order:

1. The message is normalised: Unicode NFKC, case folding, NFKC again; the typographic apostrophe becomes `'`.
2. It is cut into sentences at `.`, `!`, `?`, `…`, `;`, `:`, line breaks, and everything of Unicode category Cc.
3. In a sentence a token is a longest run of letters, marks and digits (categories L*, M*, N*), with single apostrophes
   inside. A token is a word if it starts with a letter, holds no digit, and has at most 32 characters. Numbers are no
   words on purpose: codes and telephone numbers do not belong into a vocabulary.
4. `text.words/1` gives all words. `text.bigrams/1` gives every pair of tokens that follow one another in a sentence
   where both are words: what is between them (spaces, commas, emoji) does not matter, but a token that is no word does.

`docs/SPEC.md` has the same in words, `tests/vectors/text.json` in examples.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Final, TypeAlias

MAX_WORD_CHARACTERS: Final = 32
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'"})
_SENTENCE_END = re.compile(r"[.!?;:\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # NFKC has made three dots of the ellipsis.

Words: TypeAlias = tuple[str, ...]
"""What an extractor finds: one word, or two that follow one another."""
Extractor: TypeAlias = Callable[[str], list[Words]]


def words(message: str) -> list[Words]:
    """Return the words of `message` in order: the extractor `text.words/1`."""
    return [(token,) for sentence in _sentences(message) for token in sentence if _is_word(token)]


def bigrams(message: str) -> list[Words]:
    """Return the pairs of words that follow one another in `message`, in order: the extractor `text.bigrams/1`."""
    pairs = (pair for sentence in _sentences(message) for pair in pairwise(sentence))
    return [pair for pair in pairs if _is_word(pair[0]) and _is_word(pair[1])]


EXTRACTORS: Final[Mapping[str, Extractor]] = {"text.words/1": words, "text.bigrams/1": bigrams}
"""The extractors of this release, by the names that plans use."""
PORTS: Final[Mapping[str, tuple[str, ...]]] = {"text.words/1": ("word",), "text.bigrams/1": ("first", "second")}
"""The batch ports that each extractor fills: one for each word of what it finds."""


def is_word(text: str) -> bool:
    """Say whether `text` is exactly one word in its normalised form, as a vocabulary must list it."""
    if text.isascii() and text.isalpha() and text.islower():
        return len(text) <= MAX_WORD_CHARACTERS  # The same answer, at once: a vocabulary may have thousands of words.
    # Long ones are refused unread: a vocabulary comes from others.
    return len(text) <= MAX_WORD_CHARACTERS and words(text) == [(text,)]


def normalised(message: str) -> str:
    """Return `message` as the extractors read it."""
    folded = unicodedata.normalize("NFKC", message).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_APOSTROPHES)


def _sentences(message: str) -> list[list[str]]:
    return [_tokens(part) for part in _SENTENCE_END.split(normalised(message))]


def _tokens(sentence: str) -> list[str]:
    tokens: list[str] = []
    start: int | None = None
    for at, character in enumerate(sentence):
        inside = _belongs(character) or (
            character == "'"
            and start is not None
            and _belongs(sentence[at - 1])
            and _belongs(sentence[at + 1 : at + 2])
        )
        if inside and start is None:
            start = at
        elif not inside and start is not None:
            tokens.append(sentence[start:at])
            start = None
    return tokens if start is None else [*tokens, sentence[start:]]


def _belongs(character: str) -> bool:
    return bool(character) and unicodedata.category(character)[0] in "LMN"


def _is_word(token: str) -> bool:
    categories = [unicodedata.category(character)[0] for character in token]
    return len(token) <= MAX_WORD_CHARACTERS and categories[0] == "L" and "N" not in categories
