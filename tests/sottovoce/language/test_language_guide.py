"""The guide to the language: every example in it runs and prints what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "language.md"


def test_every_example_prints_what_the_guide_says() -> None:
    flags = doctest.ELLIPSIS | doctest.REPORT_ONLY_FIRST_FAILURE
    text = GUIDE.read_text().replace("\n```", "\n\n```")
    examples = doctest.DocTestParser().get_doctest(text, {"__name__": "guide"}, GUIDE.name, str(GUIDE), 0)
    said: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=flags).run(examples, out=said.append)
    assert not outcome.failed, "".join(said)
    assert outcome.attempted >= 20
