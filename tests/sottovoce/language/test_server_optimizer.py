"""Server optimizers against numbers worked out by hand, and against what they must always do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sottovoce.errors import ConfigError
from sottovoce.language.server_optimizer import ServerOptimizer, adagrad, adam, momentum, sgd, yogi
from sottovoce.types import Array

ALL = [sgd(0.5), momentum(0.5), adagrad(0.1), adam(0.1), yogi(0.1)]
ADAPTIVE = [adagrad(0.1), adam(0.1), yogi(0.1)]


def run(optimizer: ServerOptimizer, deltas: list[float], *, start: float = 1.0) -> list[float]:
    """Return the weight after each of `deltas`."""
    weights: Mapping[str, Array] = {"w": np.array([start])}
    state, seen = optimizer.init(weights), []
    for delta in deltas:
        state, weights = optimizer.apply(state, weights, {"w": np.array([delta])})
        seen.append(float(weights["w"][0]))
    return seen


def test_sgd_with_rate_one_is_federated_averaging() -> None:
    assert run(sgd(), [0.25, -0.5]) == [1.25, 0.75]
    assert run(sgd(0.5), [0.25, -0.5]) == [1.125, 0.875]


def test_momentum_by_hand() -> None:
    # velocity: 1, then 0.5 * 1 + 0 = 0.5, then 0.5 * 0.5 - 1 = -0.75; each moves the weight by 0.1 of it.
    assert run(momentum(0.1, momentum=0.5), [1.0, 0.0, -1.0]) == pytest.approx([1.1, 1.15, 1.075])


def test_adagrad_by_hand() -> None:
    # tau = 3: v = 9 + 16 = 25, then 25 + 144 = 169; moves of 4 / (5 + 3) and 12 / (13 + 3).
    assert run(adagrad(1.0, tau=3.0), [4.0, 12.0]) == pytest.approx([1.5, 2.25])
    # With beta_1 = 0.5 the first moment is 2, then 1 + 6 = 7.
    assert run(adagrad(1.0, beta_1=0.5, tau=3.0), [4.0, 12.0]) == pytest.approx([1.25, 1.25 + 7 / 16])


def test_adam_by_hand() -> None:
    # tau = 1, both betas 0.5: m = 1, v = 0.5 + 0.5 * 4 = 2.5; then m = 0.5 - 0.5 = 0, v = 1.25 + 0.5 = 1.75.
    first = 1.0 + 1 / (math.sqrt(2.5) + 1)
    assert run(adam(1.0, beta_1=0.5, beta_2=0.5, tau=1.0), [2.0, -1.0]) == pytest.approx([first, first])


def test_yogi_by_hand() -> None:
    # tau = 2, v = 4: delta^2 = 1 is below it, so v = 4 - 0.5 * 1; then 16 is above, so v = 3.5 + 0.5 * 16.
    first = 1.0 + 1 / (math.sqrt(3.5) + 2)
    second = first + 4 / (math.sqrt(11.5) + 2)
    assert run(yogi(1.0, beta_1=0.0, beta_2=0.5, tau=2.0), [1.0, 4.0]) == pytest.approx([first, second])


def test_yogi_keeps_its_second_moment_where_the_squared_delta_equals_it() -> None:
    optimizer = yogi(1.0, tau=2.0)
    state, _ = optimizer.apply(optimizer.init({"w": np.zeros(1)}), {"w": np.zeros(1)}, {"w": np.array([2.0])})
    assert state["second_moment"]["w"].tolist() == [4.0]


def test_after_a_large_delta_yogi_forgets_more_slowly_than_adam() -> None:
    seconds = {}
    for name, optimizer in (("adam", adam(0.1)), ("yogi", yogi(0.1))):
        weights: Mapping[str, Array] = {"w": np.zeros(1)}
        state = optimizer.init(weights)
        for delta in [10.0, *[0.01] * 50]:
            state, weights = optimizer.apply(state, weights, {"w": np.array([delta])})
        seconds[name] = float(state["second_moment"]["w"][0])
    # The step of 10 leaves v = 1. Fifty small ones: Adam keeps 0.99^50 of it, Yogi loses 0.01 * 0.0001 a step.
    assert seconds["adam"] == pytest.approx(0.99**50, rel=1e-3)
    assert seconds["yogi"] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("optimizer", ADAPTIVE, ids=str)
def test_there_is_no_bias_correction_and_v_starts_at_tau_squared(optimizer: ServerOptimizer) -> None:
    state = optimizer.init({"w": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(state["first_moment"]["w"], np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(state["second_moment"]["w"], np.full((2, 3), 1e-6, np.float32))


def test_without_bias_correction_the_first_step_of_adam_is_a_tenth_of_its_delta() -> None:
    # With delta = tau, v stays tau^2 and the move is learning_rate * 0.1 * tau / (tau + tau).
    assert run(adam(1.0, tau=0.25), [0.25], start=0.0) == pytest.approx([0.05])


@pytest.mark.parametrize("optimizer", ALL, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_tensor_keeps_its_dtype_and_shape_and_nothing_is_changed_in_place(
    optimizer: ServerOptimizer, dtype: str
) -> None:
    weights = {"kernel": np.ones((3, 2), dtype), "bias": np.zeros(2, dtype)}
    delta = {"kernel": np.full((3, 2), 0.5, dtype), "bias": np.ones(2, dtype)}
    state = optimizer.init(weights)
    before = {part: {name: value.copy() for name, value in named.items()} for part, named in state.items()}
    after, moved = optimizer.apply(state, weights, delta)
    for named in (moved, *after.values()):
        assert {name: (str(v.dtype), v.shape) for name, v in named.items()} == {
            "kernel": (dtype, (3, 2)),
            "bias": (dtype, (2,)),
        }
    assert (weights["kernel"] == 1).all()
    assert (delta["kernel"] == 0.5).all()
    for part, named in before.items():
        for name, value in named.items():
            np.testing.assert_array_equal(state[part][name], value)


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_each_coordinate_is_on_its_own(optimizer: ServerOptimizer) -> None:
    deltas = np.array([[0.5, -2.0], [1e-3, 0.0]])
    together = {"w": np.ones(2)}
    state = optimizer.init(together)
    for delta in deltas:
        state, together = optimizer.apply(state, together, {"w": delta})
    alone = [run(optimizer, list(deltas[:, i]))[-1] for i in range(2)]
    np.testing.assert_array_equal(together["w"], alone)


@pytest.mark.parametrize("optimizer", ALL, ids=str)
@given(deltas=st.lists(st.floats(-10, 10), min_size=1, max_size=5))
def test_deltas_of_the_other_sign_move_the_other_way(optimizer: ServerOptimizer, deltas: list[float]) -> None:
    there, back = run(optimizer, deltas, start=0.0), run(optimizer, [-d for d in deltas], start=0.0)
    assert there == [-value for value in back]


@pytest.mark.parametrize("make", [adagrad, adam, yogi])
@given(
    scale=st.floats(1e-3, 1e3),
    deltas=st.lists(st.floats(-1, 1).filter(lambda d: abs(d) > 1e-3), min_size=1, max_size=5),
)
def test_an_adaptive_optimizer_does_not_see_the_scale_of_its_deltas(
    make: Callable[..., ServerOptimizer], scale: float, deltas: list[float]
) -> None:
    """Deltas and tau in other units give the same weights."""
    plain = run(make(0.1, tau=1e-2), deltas)
    assert run(make(0.1, tau=1e-2 * scale), [d * scale for d in deltas]) == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("optimizer", [sgd(0.5), momentum(0.05), adagrad(0.5), adam(0.1), yogi(0.1)], ids=str)
def test_a_valley_is_found(optimizer: ServerOptimizer) -> None:
    weights: Mapping[str, Array] = {"w": np.array([2.0, -3.0])}
    state = optimizer.init(weights)
    for _ in range(300):
        state, weights = optimizer.apply(state, weights, {"w": 0.5 * (np.array([0.25, 1.0]) - weights["w"])})
    np.testing.assert_allclose(weights["w"], [0.25, 1.0], atol=0.02)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: sgd(0.0), "learning_rate is 0.0; write a number above 0"),
        (lambda: sgd(float("nan")), "learning_rate is nan"),
        (lambda: momentum(momentum=1.0), "momentum is 1.0"),
        (lambda: adagrad(0.1, tau=0.0), "tau is 0.0"),
        (lambda: adam(0.1, beta_1=-0.1), "beta_1 is -0.1"),
        (lambda: yogi(0.1, beta_2=1.0), "beta_2 is 1.0"),
    ],
)
def test_impossible_rates_are_refused(make: Callable[[], ServerOptimizer], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_what_does_not_fit_together_is_refused() -> None:
    weights = {"w": np.ones(2, np.float32)}
    with pytest.raises(ConfigError, match=r"delta names \['v'\], the weights are \['w'\]"):
        sgd().apply({}, weights, {"v": np.ones(2, np.float32)})
    with pytest.raises(ConfigError, match=r"delta 'w' is float64\[2\], its weight float32\[2\]"):
        sgd().apply({}, weights, {"w": np.ones(2)})
    with pytest.raises(ConfigError, match="no 'velocity': it is of another server optimizer"):
        momentum().apply(sgd().init(weights), weights, weights)
    with pytest.raises(ConfigError, match="weight 'w' is int32"):
        adam(0.1).init({"w": np.ones(2, np.int32)})
