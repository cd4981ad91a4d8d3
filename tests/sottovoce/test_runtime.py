"""The bundles that are committed run on this machine's TFLite runtime, and nothing that does not fit reaches it."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sottovoce import runtime
from sottovoce.bundle import Bundle, Port, Role, read_bundle, with_initial
from sottovoce.errors import BadBundle, ProgramError, SelfTestFailed
from sottovoce.runtime import SAMPLED_ENTRIES, Program, open_program, run_self_test, runtime_name, sampled
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).resolve().parents[2] / "simulation" / "bundles"
NAMES = ("digits", "har", "moments_har")
Arrays = dict[str, Array]


def bundle_named(name: str) -> Bundle:
    return read_bundle(BUNDLES / f"{name}.svp")[0]


@pytest.fixture(scope="module")
def digits() -> Bundle:
    return bundle_named("digits")


@pytest.fixture(scope="module")
def program(digits: Bundle) -> Program:
    return open_program(digits)


@pytest.fixture
def broadcast(digits: Bundle) -> Arrays:
    return {**decode_tensors(digits.initial), "learning_rate": np.array([0.5], np.float32)}


def batch_of(size: int, *, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    x = random.uniform(0, 16, (size, 64)).astype(np.float32)
    return {"x": x, "y": random.integers(10, size=size, dtype=np.int32)}


class NumpyPerceptron:
    """The digits model by hand, in float64: what the program must compute."""

    def __init__(self, broadcast: Arrays) -> None:
        self.learning_rate = float(broadcast["learning_rate"][0])
        self.weights = {name: value.astype(np.float64) for name, value in broadcast.items() if name != "learning_rate"}

    def forward(self, x: Array) -> tuple[Array, Array]:
        hidden = np.maximum(x / 16.0 @ self.weights["hidden_kernel"] + self.weights["hidden_bias"], 0)
        logits = hidden @ self.weights["output_kernel"] + self.weights["output_bias"]
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)

    def scores(self, batch: Arrays) -> tuple[float, float]:
        _, probabilities = self.forward(batch["x"])
        rows = np.arange(len(batch["y"]))
        return -np.log(probabilities[rows, batch["y"]]).sum(), (probabilities.argmax(axis=1) == batch["y"]).sum()

    def step(self, batch: Arrays) -> None:
        hidden, probabilities = self.forward(batch["x"])
        at_logits = (probabilities - np.eye(10)[batch["y"]]) / len(batch["y"])
        at_hidden = (at_logits @ self.weights["output_kernel"].T) * (hidden > 0)
        gradients = {
            "hidden_kernel": (batch["x"] / 16.0).T @ at_hidden,
            "hidden_bias": at_hidden.sum(axis=0),
            "output_kernel": hidden.T @ at_logits,
            "output_bias": at_logits.sum(axis=0),
        }
        for name, gradient in gradients.items():
            self.weights[name] = self.weights[name] - self.learning_rate * gradient


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_bundles_pass_their_self_test(name: str) -> None:
    bundle = bundle_named(name)
    run_self_test(bundle, open_program(bundle))


def test_training_is_that_of_numpy_for_batches_of_changing_size(program: Program, broadcast: Arrays) -> None:
    by_hand = NumpyPerceptron(broadcast)
    state = program.begin(broadcast)
    for seed, size in enumerate((16, 5, 1, 16, 33, 2)):
        batch = batch_of(size, seed=seed)
        loss, correct = by_hand.scores(batch)
        by_hand.step(batch)
        state, metrics = program.step(state, batch)
        np.testing.assert_allclose(metrics["loss"], [loss], rtol=1e-5)
        np.testing.assert_array_equal(metrics["correct"], [correct])
    deltas = program.finish(state, broadcast)
    for name, weights in by_hand.weights.items():
        np.testing.assert_allclose(deltas[f"delta_{name}"], weights - broadcast[name], atol=2e-6)
        assert np.abs(deltas[f"delta_{name}"]).max() > 0.01


def test_infer_and_evaluate_are_those_of_numpy(program: Program, broadcast: Arrays) -> None:
    batch = batch_of(21)
    by_hand = NumpyPerceptron(broadcast)
    loss, correct = by_hand.scores(batch)
    predictions = program.infer(broadcast, {"x": batch["x"]})
    np.testing.assert_allclose(predictions["prediction"], by_hand.forward(batch["x"])[1], atol=1e-6)
    sums = program.evaluate(broadcast, batch)
    np.testing.assert_allclose(
        [sums["loss"][0], sums["correct"][0], sums["examples"][0]], [loss, correct, 21], rtol=1e-5
    )


def test_a_result_outlives_the_next_call(program: Program, broadcast: Arrays) -> None:
    first = program.evaluate(broadcast, batch_of(4, seed=1))
    state, metrics = program.step(program.begin(broadcast), batch_of(4, seed=1))
    kept = {name: value.copy() for name, value in {**state, **metrics, **first}.items()}
    program.step(state, batch_of(4, seed=2))
    program.evaluate(broadcast, batch_of(4, seed=2))
    for name, value in {**state, **metrics, **first}.items():
        np.testing.assert_array_equal(value, kept[name])
        assert value.flags.writeable


@pytest.mark.parametrize(
    ("changed", "value", "text"),
    [
        ("x", np.zeros((3, 63), np.float32), r"'x' is a float32\[\?,64\], not a float32\[3,63\]"),
        ("x", np.zeros((3, 8, 8), np.float32), r"'x' is a float32\[\?,64\], not a float32\[3,8,8\]"),
        ("x", np.zeros((3, 64), np.float64), r"'x' is a float32\[\?,64\], not a float64\[3,64\]"),
        ("x", np.zeros((4, 64), np.float32), "columns of one length"),
        ("y", np.zeros(3, np.int64), r"'y' is a int32\[\?\], not a int64\[3\]"),
        ("y", np.array([0, 10, 1], np.int32), "'y' holds 10, above 9"),
        ("y", np.array([0, -1, 1], np.int32), "'y' holds -1, below 0"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    program: Program, broadcast: Arrays, changed: str, value: Array, text: str
) -> None:
    batch = {**batch_of(3), changed: value}
    with pytest.raises(ProgramError, match=text):
        program.step(program.begin(broadcast), batch)
    with pytest.raises(ProgramError, match=text):
        program.evaluate(broadcast, batch)


def test_missing_columns_and_empty_batches_are_refused(program: Program, broadcast: Arrays) -> None:
    with pytest.raises(ProgramError, match="'y' is missing"):
        program.evaluate(broadcast, {"x": batch_of(3)["x"]})
    with pytest.raises(ProgramError, match="at least 1"):
        program.evaluate(broadcast, batch_of(0))
    with pytest.raises(ProgramError, match="at least 1"):
        program.evaluate(broadcast, {"x": batch_of(3)["x"], "y": np.array(1, np.int32)})
    with pytest.raises(ProgramError, match="at least 1"):
        program.infer(broadcast, {})


@pytest.mark.parametrize("role", ["begin", "finish", "infer", "evaluate"])
def test_every_role_checks_the_broadcast(program: Program, broadcast: Arrays, role: str) -> None:
    batch, state = batch_of(3), program.begin(broadcast)
    wrong = {**broadcast, "hidden_bias": np.zeros(63, np.float32)}
    calls = {
        "begin": lambda: program.begin(wrong),
        "finish": lambda: program.finish(state, wrong),
        "infer": lambda: program.infer(wrong, {"x": batch["x"]}),
        "evaluate": lambda: program.evaluate(wrong, batch),
    }
    with pytest.raises(ProgramError, match=rf"{role}: 'hidden_bias' is a float32\[64\], not a float32\[63\]"):
        calls[role]()


def test_a_state_of_another_program_is_refused(program: Program, broadcast: Arrays) -> None:
    state = program.begin(broadcast)
    state["local_output_bias"] = np.zeros(6, np.float32)
    with pytest.raises(ProgramError, match="'local_output_bias'"):
        program.step(state, batch_of(3))
    with pytest.raises(ProgramError, match="'local_output_bias'"):
        program.finish(state, broadcast)


def test_a_role_that_a_program_does_not_have_is_named() -> None:
    moments = open_program(bundle_named("moments_har"))
    with pytest.raises(ProgramError, match="'moments_har' has no role 'infer'"):
        moments.infer({}, {"x": np.zeros((1, 128, 9), np.float32)})


@pytest.mark.parametrize("name", ["digits", "moments_har"])
def test_a_self_test_that_comes_out_differently_fails_for_every_tensor(name: str) -> None:
    bundle = bundle_named(name)
    program = open_program(bundle)
    expected = decode_tensors(bundle.self_test.expected)
    for tensor, value in expected.items():
        off = np.array(value)
        off.flat[-1] += 1 if off.dtype.kind == "i" else 10 * bundle.self_test.tolerance
        test = msgspec.structs.replace(bundle.self_test, expected=encode_tensors({**expected, tensor: off}))
        with pytest.raises(SelfTestFailed, match=f"'{tensor}' wrongly") as failure:
            run_self_test(msgspec.structs.replace(bundle, self_test=test), program)
        assert failure.value.tensor == tensor
        assert failure.value.tolerance == bundle.self_test.tolerance < failure.value.difference


@pytest.mark.parametrize("wrong", [np.full(10, np.nan, np.float32), np.zeros(9, np.float32)])
def test_a_self_test_fails_on_nan_and_on_another_shape(digits: Bundle, program: Program, wrong: Array) -> None:
    expected = {**decode_tensors(digits.self_test.expected), "delta_output_bias": wrong}
    test = msgspec.structs.replace(digits.self_test, expected=encode_tensors(expected))
    with pytest.raises(SelfTestFailed, match="delta_output_bias"):
        run_self_test(msgspec.structs.replace(digits, self_test=test), program)


def test_a_self_test_must_expect_every_result(digits: Bundle, program: Program) -> None:
    expected = decode_tensors(digits.self_test.expected)
    del expected["delta_output_bias"]
    test = msgspec.structs.replace(digits.self_test, expected=encode_tensors(expected))
    with pytest.raises(BadBundle, match="delta_output_bias"):
        run_self_test(msgspec.structs.replace(digits, self_test=test), program)
    test = msgspec.structs.replace(digits.self_test, expected=b"\xc1")
    with pytest.raises(BadBundle, match="not named tensors"):
        run_self_test(msgspec.structs.replace(digits, self_test=test), program)


def test_a_trained_bundle_keeps_its_self_test(digits: Bundle, broadcast: Arrays) -> None:
    trained = with_initial(digits, {"hidden_kernel": np.full((64, 64), 0.01, np.float32)})
    run_self_test(trained, open_program(trained))
    again = with_initial(trained, {"output_bias": np.ones(10, np.float32)})
    run_self_test(again, open_program(again))
    assert decode_tensors(again.initial)["hidden_kernel"][0, 0] == np.float32(0.01)
    forgotten = msgspec.structs.replace(digits, initial=trained.initial)
    with pytest.raises(SelfTestFailed):
        run_self_test(forgotten, open_program(forgotten))


@pytest.mark.parametrize("wrong", [{"hidden_bias": np.zeros(63, np.float32)}, {"bias": np.zeros(64, np.float32)}])
def test_initial_values_must_be_of_the_ports(digits: Bundle, wrong: Arrays) -> None:
    with pytest.raises(BadBundle, match="is not a broadcast value"):
        with_initial(digits, wrong)


def test_a_flatbuffer_that_is_none_is_refused(digits: Bundle) -> None:
    broken = msgspec.structs.replace(digits, flatbuffers={**digits.flatbuffers, "step": b"no flatbuffer at all"})
    with pytest.raises(BadBundle, match="cannot read it"):
        open_program(broken)


def test_signatures_must_have_the_bundles_ports(digits: Bundle) -> None:
    roles = {**digits.roles, "begin": Role(flatbuffer="begin", signature="start")}
    with pytest.raises(BadBundle, match="cannot read it"):
        open_program(msgspec.structs.replace(digits, roles=roles))
    with pytest.raises(BadBundle, match="finish: the flatbuffer's input"):
        open_program(msgspec.structs.replace(digits, roles={**digits.roles, "finish": digits.roles["step"]}))
    labels = Port(name="y", type="int64[?]")
    with pytest.raises(BadBundle, match=r"'y' \(int32\) is not a port"):
        open_program(msgspec.structs.replace(digits, batch=(digits.batch[0], labels)))
    sums = (*digits.sums, Port(name="entropy", type="float32[1]"))
    with pytest.raises(BadBundle, match="evaluate: the flatbuffer does not return entropy"):
        open_program(msgspec.structs.replace(digits, sums=sums))


def test_large_tensors_are_represented_by_entries_from_end_to_end() -> None:
    large = np.arange(3 * 5000).reshape(3, 5000)
    small = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(sampled(small), small)
    found = sampled(large)
    assert (found.shape, found[0], found[-1]) == ((SAMPLED_ENTRIES,), 0, large.size - 1)
    assert set(np.diff(found)) == {14, 15}


def test_the_runtime_has_a_name_and_a_version() -> None:
    assert runtime_name("litert").startswith("ai-edge-litert ")


def test_a_missing_runtime_is_told_with_the_command_that_installs_it(digits: Bundle) -> None:
    with pytest.raises(ProgramError, match=r"pip install 'sottovoce\[agent-tflite\]'"):
        open_program(digits, runtime="tflite")
    without = (
        "import sys\n"
        "sys.modules['ai_edge_litert'] = sys.modules['tflite_runtime'] = None\n"
        "from sottovoce.errors import ProgramError\n"
        "from sottovoce.runtime import runtime_name\n"
        "try: runtime_name()\n"
        "except ProgramError as error: print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", without], cwd=root, capture_output=True, text=True, check=True)
    assert "pip install 'sottovoce[agent]'" in done.stdout


# --- client state -----------------------------------------------------------------------------------------------------

VISITS = Path(__file__).resolve().parents[1] / "edge_agent" / "visits.svp"


@pytest.fixture(scope="module")
def visits() -> Bundle:
    return read_bundle(VISITS)[0]


def test_begin_reads_the_client_state_and_finish_returns_the_new_one(visits: Bundle) -> None:
    program = open_program(visits)
    run_self_test(visits, program)
    kept = {"total": np.array([5.0], np.float32), "rounds": np.array([2], np.int32)}
    state, _ = program.step(program.begin({}, kept), {"x": np.array([1.0, 2.5], np.float32)})
    finished = program.finish(state, {})
    assert {name: value.tolist() for name, value in finished.items()} == {
        "sum_now": [3.5],
        "sum_before": [5.0],
        "next_total": [8.5],
        "next_rounds": [3],
    }


def test_client_state_that_does_not_fit_is_refused(visits: Bundle) -> None:
    program = open_program(visits)
    with pytest.raises(ProgramError, match="begin: 'total' is missing"):
        program.begin({})
    with pytest.raises(ProgramError, match="begin: 'rounds' is a int32"):
        program.begin({}, {"total": np.zeros(1, np.float32), "rounds": np.zeros(1, np.float32)})


def with_expected(bundle: Bundle, **changes: Array | None) -> Bundle:
    expected = {**decode_tensors(bundle.self_test.expected), **changes}
    kept = {name: value for name, value in expected.items() if value is not None}
    return msgspec.structs.replace(
        bundle, self_test=msgspec.structs.replace(bundle.self_test, expected=encode_tensors(kept))
    )


def test_the_self_test_covers_the_client_state(visits: Bundle) -> None:
    program = open_program(visits)
    with pytest.raises(SelfTestFailed) as failure:
        run_self_test(with_expected(visits, next_rounds=np.array([9], np.int32)), program)
    assert failure.value.tensor == "next_rounds"
    with pytest.raises(BadBundle, match="expects nothing of next_total"):
        run_self_test(with_expected(visits, next_total=None), program)
    forgetful = msgspec.structs.replace(visits.self_test, client_state=encode_tensors({}))
    with pytest.raises(SelfTestFailed):
        run_self_test(msgspec.structs.replace(visits, self_test=forgetful), program)


def test_no_interpreter_ever_runs_a_second_shape(
    digits: Bundle, broadcast: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNNPACK now and then kept the set-up of the shape before and computed something else, without an error."""
    seen: defaultdict[tuple[int, str], set[tuple[int, ...]]] = defaultdict(set)
    opened: list[object] = []
    name, load = next(iter(runtime._CANDIDATES["auto"].items()))

    class Watched(load()):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            opened.append(self)  # Kept, so that no two have the same id.

        def get_signature_runner(self, signature: str) -> Any:
            runner, key = super().get_signature_runner(signature), (id(self), signature)

            class Runner:
                get_input_details, get_output_details = runner.get_input_details, runner.get_output_details

                def __call__(self, **given: Array) -> Any:
                    seen[key].add(given["x"].shape if "x" in given else ())
                    return runner(**given)

            return Runner()

    monkeypatch.setitem(runtime._CANDIDATES, "auto", {name: lambda: Watched})  # type: ignore[index]
    program = open_program(digits)
    state = program.begin(broadcast)
    for size in (3, 3, 8, 8, 3):
        expected = open_program(digits, runtime="litert").step(state, batch_of(size))
        state, metrics = program.step(state, batch_of(size))
        for found, wanted in zip((state, metrics), expected, strict=True):
            assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
    assert len(opened) == len(digits.flatbuffers) + 2, "another interpreter for 8 rows, and for 3 again"
    assert all(len(shapes) == 1 for shapes in seen.values())
