"""The counting programs: they count as numpy does, and what is committed is what this source gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sottovoce
from models.counting import counting_programs
from models.program_export import ProgramSource, export_program
from sottovoce.bundle import decode_bundle, encode_bundle
from sottovoce.language.counting import START, Family, counting_program
from sottovoce.runtime import open_program
from sottovoce.sketches import FIELD
from sottovoce.types import Array

FOLDER = Path(sottovoce.__file__).parent / "counting"
ZERO = {START: np.zeros(1, np.int32)}


def counted(family: Family, broadcast: dict[str, Array], *batches: dict[str, Array]) -> dict[str, Array]:
    """Return what the smallest program of `family` makes of batches."""
    content, _ = counting_program(family, 10)
    program = open_program(decode_bundle(content))
    state = program.begin({**ZERO, **broadcast})
    for batch in batches:
        state, _ = program.step(state, batch)
    return dict(program.finish(state, {**ZERO, **broadcast}))


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def test_every_committed_program_has_a_source_and_none_is_missing() -> None:
    assert {f"{source.name}.svp" for source in counting_programs()} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", ["words_64", "pairs_64", "amounts_4096", "bins_64", "groups_64"])
def test_what_is_committed_is_what_the_source_gives(name: str) -> None:
    source = next(source for source in counting_programs() if source.name == name)
    assert isinstance(source, ProgramSource)
    assert encode_bundle(export_program(source)) == (FOLDER / f"{name}.svp").read_bytes()


def test_words_are_counted_over_batches_and_strangers_left_out() -> None:
    found = counted("words", {}, {"word": ints(0, 3, 3, -1, 64, 9999)}, {"word": ints(63, 3)})["counts"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(np.flatnonzero(found), [0, 3, 63])
    np.testing.assert_array_equal(found[[0, 3, 63]], [1, 3, 1])


def test_a_pair_has_the_place_of_its_row_and_column() -> None:
    batch = {"first": ints(0, 2, 2, -1, 1, 1), "second": ints(4, 1, 1, 2, -1, 5)}
    found = counted("pairs", {"seconds": ints(5)}, batch)["counts"]
    np.testing.assert_array_equal(np.flatnonzero(found), [4, 11])
    np.testing.assert_array_equal(found[[4, 11]], [1, 2])


def test_amounts_are_added_modulo_the_prime() -> None:
    found = counted("amounts", {}, {"index": ints(1, 1, 7), "amount": ints(FIELD - 1, 5, FIELD - 1)})["cells"]
    np.testing.assert_array_equal(found[[0, 1, 7]], [0, 4, FIELD - 1])


def test_a_value_on_an_edge_belongs_to_the_bin_above() -> None:
    edges = np.arange(65).astype(np.float32)
    values = np.array([-0.5, 0.0, 0.5, 1.0, 63.99, 64.0], np.float32)
    found = counted("bins", {"edges": edges}, {"value": values})["counts"]
    np.testing.assert_array_equal(found[[0, 1, 63]], [2, 1, 1])
    assert found.sum() == 4


def test_moments_are_of_fractions_of_the_window() -> None:
    batch = {"group": ints(0, 0, 5, 64), "value": np.array([10, 99, -3, 1], np.float32)}
    found = counted("groups", {"window": np.array([0, 20], np.float32)}, batch)
    np.testing.assert_array_equal(found["count"][[0, 5]], [2, 1])
    np.testing.assert_allclose(found["sum"][[0, 5]], [1.5, 0.0])
    np.testing.assert_allclose(found["squares"][[0, 5]], [1.25, 0.0])
    assert found["count"].sum() == 3
