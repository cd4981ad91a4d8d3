"""A client program over local batches: what is refused, what a run is made of, and that a killed run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.work import Work, WorkResult, WorkState, check_examples, prepare
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.errors import BadExamples, NonFiniteUpdate, ProgramError
from sottovoce.plan import LocalWork
from sottovoce.runtime import Program, open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
Arrays = dict[str, Array]


@pytest.fixture(scope="module")
def digits() -> tuple[Bundle, Program]:
    bundle = read_bundle(BUNDLES / "digits.svp")[0]
    return bundle, open_program(bundle)


@pytest.fixture(scope="module")
def moments() -> tuple[Bundle, Program]:
    bundle = read_bundle(BUNDLES / "moments_har.svp")[0]
    return bundle, open_program(bundle)


@pytest.fixture(scope="module")
def visits() -> tuple[Bundle, Program]:
    bundle = read_bundle(Path(__file__).parent / "visits.svp")[0]
    return bundle, open_program(bundle)


def examples_of(count: int) -> Arrays:
    random = np.random.default_rng(count)
    return {
        "x": random.uniform(0, 16, (count, 64)).astype(np.float32),
        "y": random.integers(10, size=count, dtype=np.int32),
    }


def entropy_from(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def training(digits: tuple[Bundle, Program], plan: LocalWork, *, count: int = 23, learning_rate: float = 0.2) -> Work:
    bundle, program = digits
    broadcast = {**decode_tensors(bundle.initial), "learning_rate": np.array([learning_rate], np.float32)}
    return prepare(program, bundle, plan, broadcast=broadcast, examples=examples_of(count))


def run(work: Work, state: WorkState) -> WorkResult:
    while not work.is_done(state):
        state = work.advance(state)
    return work.result(state)


def flat(result: WorkResult) -> list[bytes]:
    return [array.tobytes() for name in sorted(result.values) for array in result.values[name]]


# --- examples ---------------------------------------------------------------------------------------------------------


def replaced(examples: Arrays, name: str, where: tuple[int, ...], value: float) -> Arrays:
    column = examples[name].copy()
    column[where] = value
    return {**examples, name: column}


GOOD = examples_of(7)


@pytest.mark.parametrize(
    ("examples", "text"),
    [
        ({"x": GOOD["x"]}, r"column 'y' \(int32\[\?\]\) is missing; the examples have x"),
        ({}, "column 'x' .* the examples have none"),
        ({**GOOD, "x": GOOD["x"][:, :63]}, r"column 'x' has shape \[7,63\]; the program needs float32\[\?,64\]"),
        ({**GOOD, "x": GOOD["x"].reshape(7, 8, 8)}, r"column 'x' has shape \[7,8,8\]"),
        ({**GOOD, "y": GOOD["y"][:, None]}, r"column 'y' has shape \[7,1\]"),
        ({**GOOD, "y": GOOD["y"][:6]}, "different numbers of rows: {'x': 7, 'y': 6}"),
        ({name: column[:0] for name, column in GOOD.items()}, "no examples"),
        (replaced(GOOD, "x", (4, 9), np.nan), "column 'x', row 4: the value nan is not a finite number"),
        (replaced(GOOD, "x", (6, 0), -np.inf), "column 'x', row 6: the value -inf is not a finite number"),
        (replaced(GOOD, "y", (2,), 10), "column 'y', row 2: the value 10 is above 9"),
        (replaced(GOOD, "y", (5,), -1), "column 'y', row 5: the value -1 is below 0"),
        ({**GOOD, "y": GOOD["y"] + 0.5}, "column 'y', row 0: the value .*5 does not fit into int32"),
        ({**GOOD, "y": GOOD["y"].astype(np.int64) + 2**40}, "column 'y', row 0: .* does not fit into int32"),
        ({**GOOD, "y": np.full(7, np.nan)}, "column 'y', row 0: the value nan is not a finite number"),
        ({**GOOD, "x": GOOD["x"].astype(np.float64) + 1e300}, "column 'x', row 0: .* does not fit into float32"),
        ({**GOOD, "y": np.array(list("abcdefg"))}, "column 'y' is text; the program needs int32"),
        ({**GOOD, "x": GOOD["x"].astype(object)}, "column 'x' is object, which is no number"),
    ],
)
def test_examples_that_do_not_fit_are_refused_by_name(
    digits: tuple[Bundle, Program], examples: Arrays, text: str
) -> None:
    with pytest.raises(BadExamples, match=text) as refusal:
        check_examples(digits[0], examples)
    assert refusal.value.code == "bad_examples"


@pytest.mark.parametrize("x_dtype", [np.float64, np.float16, np.uint8, np.int64])
@pytest.mark.parametrize("y_dtype", [np.uint8, np.int64, np.float32])
def test_casts_that_keep_the_meaning_are_made(
    digits: tuple[Bundle, Program], x_dtype: type[np.generic], y_dtype: type[np.generic]
) -> None:
    whole = {"x": np.floor(GOOD["x"]), "y": GOOD["y"]}
    checked = check_examples(digits[0], {"x": whole["x"].astype(x_dtype), "y": whole["y"].astype(y_dtype)})
    assert {name: column.dtype for name, column in checked.items()} == {"x": np.float32, "y": np.int32}
    for name, column in checked.items():
        np.testing.assert_array_equal(column, whole[name])


def test_a_program_of_one_column_reads_the_one_column_of_a_collection(moments: tuple[Bundle, Program]) -> None:
    windows = np.ones((3, 128, 9), np.float32)
    (checked,) = check_examples(moments[0], {"acceleration": windows}).values()
    np.testing.assert_array_equal(checked, windows)
    with pytest.raises(BadExamples, match=r"column 'x' .* is missing; the examples have acceleration, gyroscope"):
        check_examples(moments[0], {"acceleration": windows, "gyroscope": windows})
    assert list(check_examples(moments[0], {"gyroscope": windows * 2, "x": windows})) == ["x"]
    times = np.array(["10:00", "10:01", "10:02"], object)
    (checked,) = check_examples(moments[0], {"when": times, "acceleration": windows}).values()
    np.testing.assert_array_equal(checked, windows)
    with pytest.raises(BadExamples, match="column 'x'"):
        check_examples(moments[0], {"when": times})
    with pytest.raises(BadExamples, match="column 'x'"):
        check_examples(moments[0], {"x": times, "acceleration": windows})


def test_the_program_sees_only_the_columns_that_it_names(digits: tuple[Bundle, Program]) -> None:
    diary = np.array(["private"] * 7)
    assert set(check_examples(digits[0], {**GOOD, "diary": diary})) == {"x", "y"}


# --- what a run is made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (7, 3), (6, 3), (5, 1), (5, 32)])
def test_every_example_is_used_once_in_an_epoch(moments: tuple[Bundle, Program], count: int, batch_size: int) -> None:
    bundle, program = moments
    x = np.zeros((count, 128, 9), np.float32)
    x[:, 0, 0] = 2.0 ** np.arange(count)
    work = prepare(program, bundle, LocalWork(batch_size=batch_size), broadcast={}, examples={"x": x})
    result = run(work, work.start(os.urandom))
    assert result.weight == count
    assert result.values["count"][0].tolist() == [count * 128]
    assert result.values["sum"][0][0] == 2.0**count - 1


@pytest.mark.parametrize(("count", "batch_size", "epochs"), [(23, 8, 3), (24, 8, 1), (5, 32, 2)])
def test_the_last_batch_of_an_epoch_is_smaller(
    digits: tuple[Bundle, Program], count: int, batch_size: int, epochs: int
) -> None:
    work = training(digits, LocalWork(epochs=epochs, batch_size=batch_size), count=count)
    state, steps = work.start(os.urandom), 0
    while not work.is_done(state):
        state, steps = work.advance(state), steps + 1
    assert steps == epochs * -(-count // batch_size)
    with pytest.raises(ProgramError, match="already run"):
        work.advance(state)


def test_max_examples_uses_so_many_chosen_at_random_the_same_in_every_epoch(moments: tuple[Bundle, Program]) -> None:
    bundle, program = moments
    x = np.zeros((10, 128, 9), np.float32)
    x[:, 0, 0] = 2.0 ** np.arange(10)
    plan = LocalWork(epochs=3, batch_size=2, max_examples=4)
    work = prepare(program, bundle, plan, broadcast={}, examples={"x": x})
    chosen = set()
    for seed in range(8):
        result = run(work, work.start(entropy_from(seed)))
        total, rest = divmod(int(result.values["sum"][0][0]), 3)
        assert (result.weight, rest, total.bit_count()) == (4, 0, 4)
        chosen.add(total)
    assert len(chosen) > 4


@pytest.mark.parametrize(("max_examples", "first"), [(0, 0), (3, 7), (1, 9), (99, 0)])
def test_stored_order_takes_the_newest_oldest_first_in_every_epoch(
    visits: tuple[Bundle, Program], max_examples: int, first: int
) -> None:
    bundle, program = visits
    plan = LocalWork(epochs=3, batch_size=2, max_examples=max_examples, order="stored")
    work = prepare(program, bundle, plan, broadcast={}, examples={"x": np.arange(10)}, client_state=decode_kept(bundle))
    seen: list[list[float]] = []
    state = work.start(os.urandom)
    while not work.is_done(state):
        rows = work._order(state)[state.position : state.position + 2]
        seen.append(work.examples["x"][rows].tolist())
        state = work.advance(state)
    epoch = list(range(first, 10))
    batches = [epoch[start : start + 2] for start in range(0, len(epoch), 2)]
    assert seen == batches * 3
    assert work.result(state).values["now"][0].tolist() == [3 * sum(epoch)]
    assert work.result(state).weight == len(epoch)


def test_in_stored_order_what_is_not_used_may_be_damaged(visits: tuple[Bundle, Program]) -> None:
    bundle, program = visits
    readings = {"temperature": np.array([np.nan, 20.5, 21.0])}
    newest = LocalWork(batch_size=1, max_examples=1, order="stored")
    work = prepare(program, bundle, newest, broadcast={}, examples=readings, client_state=decode_kept(bundle))
    assert run(work, work.start(os.urandom)).values["now"][0].tolist() == [21.0]
    with pytest.raises(BadExamples, match="row 0"):
        prepare(program, bundle, LocalWork(order="stored"), broadcast={}, examples=readings)


# --- client state -----------------------------------------------------------------------------------------------------


def decode_kept(bundle: Bundle) -> Arrays:
    assert bundle.client_state is not None
    return decode_tensors(bundle.client_state.initial)


def test_client_state_goes_into_begin_and_comes_out_of_finish(visits: tuple[Bundle, Program]) -> None:
    bundle, program = visits
    kept = {"total": np.array([40.0], np.float32), "rounds": np.array([3], np.int32)}
    examples = {"x": np.array([1.0, 2.0])}
    work = prepare(program, bundle, LocalWork(), broadcast={}, examples=examples, client_state=kept)
    result = run(work, work.start(os.urandom))
    assert set(result.values) == {"now", "before"}, "what is kept is no result: it cannot be summed by mistake"
    assert result.values["before"][0].tolist() == [40.0]
    assert {name: value.tolist() for name, value in result.client_state.items()} == {"total": [43.0], "rounds": [4]}


def test_a_checkpoint_of_other_client_state_is_refused(visits: tuple[Bundle, Program]) -> None:
    bundle, program = visits
    plan, examples = LocalWork(epochs=2), {"x": np.array([1.0, 2.0])}
    before = prepare(program, bundle, plan, broadcast={}, examples=examples, client_state=decode_kept(bundle))
    saved = before.checkpoint(before.advance(before.start(os.urandom)))
    changed = {**decode_kept(bundle), "total": np.ones(1, np.float32)}
    after = prepare(program, bundle, plan, broadcast={}, examples=examples, client_state=changed)
    assert before.resume(saved).epoch == 1
    with pytest.raises(ProgramError, match="client state"):
        after.resume(saved)


def test_fewer_examples_than_max_examples_are_all_used(digits: tuple[Bundle, Program]) -> None:
    assert training(digits, LocalWork(max_examples=100), count=23).weight == 23


def test_the_order_comes_from_the_systems_entropy_and_changes_with_the_epoch(digits: tuple[Bundle, Program]) -> None:
    once = training(digits, LocalWork(epochs=1, batch_size=4))
    again = [flat(run(once, once.start(entropy_from(seed)))) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    twice = training(digits, LocalWork(epochs=2, batch_size=1), count=10, learning_rate=0.0)
    state, losses = twice.start(os.urandom), []
    while not twice.is_done(state):
        state = twice.advance(state)
        losses.append(float(state.metrics["loss"][0]))
    first, second = np.diff(losses[:10], prepend=0), np.diff(losses[10:], prepend=0)
    assert not np.allclose(first, second)
    np.testing.assert_allclose(np.sort(first), np.sort(second), atol=1e-5)


def test_results_are_named_and_the_weight_is_the_number_of_examples(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=2, batch_size=8))
    result = run(work, work.start(os.urandom))
    assert list(result.values) == ["delta", "loss", "correct"]
    assert [array.shape for array in result.values["delta"]] == [(64, 64), (64,), (64, 10), (10,)]
    assert {array.dtype.name for array in result.values["delta"]} == {"float32"}
    assert [result.values[name][0].shape for name in ("loss", "correct")] == [(1,), (1,)]
    assert result.values["loss"][0].dtype == np.float32
    assert result.weight == 23


def test_training_lowers_the_loss_and_the_delta_is_what_lowered_it(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=40, batch_size=8))
    result = run(work, work.start(os.urandom))
    program = work.program
    before = program.evaluate(work.broadcast, work.examples)
    names = work.bundle.results[0].updates
    moved = {name: work.broadcast[name] + delta for name, delta in zip(names, result.values["delta"], strict=True)}
    after = program.evaluate({**work.broadcast, **moved}, work.examples)
    assert after["loss"][0] < before["loss"][0] / 3
    assert after["correct"][0] > before["correct"][0]


def test_metrics_are_those_of_the_last_epoch_alone(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=3, batch_size=8), learning_rate=0.0)
    result = run(work, work.start(os.urandom))
    sums = work.program.evaluate(work.broadcast, work.examples)
    np.testing.assert_allclose(result.values["loss"][0], sums["loss"], rtol=1e-5)
    assert result.values["correct"][0] == sums["correct"]


def test_a_run_that_diverges_says_so(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=30, batch_size=8), learning_rate=1e20)
    with pytest.raises(NonFiniteUpdate, match=r"holds NaN or infinity in .* a lower learning rate may help"):
        run(work, work.start(os.urandom))


def test_a_result_that_is_not_finite_is_refused_even_if_every_metric_was(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=1, batch_size=32), learning_rate=np.inf)
    state = work.advance(work.start(os.urandom))
    assert np.isfinite(state.metrics["loss"]).all()
    with pytest.raises(ProgramError, match=r"'delta_.*' holds NaN or infinity in its result"):
        work.result(state)


def test_no_result_before_the_run_is_done(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=2, batch_size=8))
    state = work.advance(work.start(os.urandom))
    with pytest.raises(ProgramError, match="epoch 1 of 2, not done"):
        work.result(state)


# --- a killed run goes on ---------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_after_any_batch_gives_the_same_result_bit_for_bit(digits: tuple[Bundle, Program]) -> None:
    plan = LocalWork(epochs=2, batch_size=8, max_examples=20)
    work = training(digits, plan)
    state = work.start(entropy_from(5))
    checkpoints = [work.checkpoint(state)]
    while not work.is_done(state):
        state = work.advance(state)
        checkpoints.append(work.checkpoint(state))
    assert len(checkpoints) == 7
    for content in checkpoints:
        bundle = read_bundle(BUNDLES / "digits.svp")[0]
        reborn = training((bundle, open_program(bundle)), plan)
        assert flat(run(reborn, reborn.resume(content))) == flat(work.result(state))


def test_a_checkpoint_goes_on_where_it_was_written(digits: tuple[Bundle, Program]) -> None:
    work = training(digits, LocalWork(epochs=2, batch_size=8))
    state = work.start(os.urandom)
    for _ in range(4):
        state = work.advance(state)
    resumed = work.resume(work.checkpoint(state))
    assert (resumed.seed, resumed.epoch, resumed.position) == (state.seed, 1, 8)
    assert work.checkpoint(resumed) == work.checkpoint(state)


def test_a_checkpoint_of_other_work_is_refused(digits: tuple[Bundle, Program]) -> None:
    plan = LocalWork(epochs=2, batch_size=8)
    work = training(digits, plan)
    content = work.checkpoint(work.start(os.urandom))
    others = [
        training(digits, LocalWork(epochs=3, batch_size=8)),
        training(digits, plan, count=24),
        training(digits, plan, learning_rate=0.1),
        training((msgspec.structs.replace(digits[0], name="other"), digits[1]), plan),
    ]
    for other in others:
        with pytest.raises(ProgramError, match="other work"):
            other.resume(content)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: b"\xc1" + c, lambda c: c + b"\x00"])
def test_a_damaged_checkpoint_is_refused(digits: tuple[Bundle, Program], damage: Callable[[bytes], bytes]) -> None:
    work = training(digits, LocalWork())
    with pytest.raises(ProgramError, match="damaged"):
        work.resume(damage(work.checkpoint(work.start(os.urandom))))


def test_a_broadcast_that_does_not_fit_is_refused_at_the_start(digits: tuple[Bundle, Program]) -> None:
    bundle, program = digits
    work = prepare(program, bundle, LocalWork(), broadcast={}, examples=GOOD)
    with pytest.raises(ProgramError, match="'hidden_kernel' is missing"):
        work.start(os.urandom)
