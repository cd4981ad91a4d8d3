"""The models of the zoo that are ordinary Keras: their sizes, and what is in their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from models.export import export
from models.lint import lint
from models.zoo.character_lstm import character_lstm
from models.zoo.har_gru import har_gru
from models.zoo.keywords import keywords
from models.zoo.mnist_cnn import mnist_cnn
from models.zoo.next_word import next_word
from models.zoo.picture_head import picture_head
from models.zoo.two_nn import two_nn

SIZES: dict[str, tuple[Callable[[], Any], int]] = {
    "two_nn": (two_nn, 199_210),
    "mnist_cnn": (mnist_cnn, 1_663_370),
    "har_gru": (har_gru, 12_678),
    "keywords": (keywords, 24_332),
    "next_word": (next_word, 359_892),
    "character_lstm": (character_lstm, 820_522),
    "picture_head": (picture_head, 219_829),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_the_size_of_its_description(name: str) -> None:
    make, parameters = SIZES[name]
    assert make().count_params() == parameters


def test_nothing_stands_in_the_way_of_training() -> None:
    for make in (two_nn, keywords, next_word):
        assert not [finding for finding in lint(make()) if finding.problem]


@pytest.mark.slow
def test_a_picture_head_learns_over_an_int8_backbone() -> None:
    model = picture_head()
    bundle = export(model, loss=model.loss, optimizer=model.optimizer, int8=True)
    assert bundle.results[0].updates == ("head_kernel", "head_bias")
    assert len(bundle.flatbuffers["infer"]) < 2 * 218_544


@pytest.mark.slow
def test_the_keyword_model_is_proven_as_it_is() -> None:
    model = keywords()
    bundle = export(model, loss=model.loss, optimizer=model.optimizer)  # Raises if LiteRT and Keras disagree.
    assert bundle.self_test.tolerance <= 1e-4
    assert len(bundle.self_test.batches) == 5
