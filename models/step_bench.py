"""The command `scripts/bench_step`: a training step as devices run it, held against TensorFlow's own.

All train the same Keras model with the same optimizer on the same batch: `Program.step` of the exported bundle, with
all its checks and copies, and a `tf.function` over Keras' own gradient and optimizer, plain and compiled by XLA. They
run in turn, one step each, so that what else the machine does hits all; what counts is CPU time. The device is held
against TensorFlow's fastest form.

TensorFlow's plain form depends on oneDNN, which it uses by itself on some CPUs only (those with AVX512-VNNI or better);
`scripts/bench_step` turns it on, because it takes half of the time of a convolution's gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import tensorflow as tf

from models.export import export, random_batches
from models.ops import Tensor
from models.step_formulations import QUESTIONS, opened
from models.zoo.mnist_cnn import mnist_cnn
from models.zoo.two_nn import two_nn
from sottovoce.runtime import open_program, runtime_name
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

MODELS: Mapping[str, Callable[[], Any]] = {"two_nn": two_nn, "mnist_cnn": mnist_cnn}
_WARM_UP = 3
Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Timing:
    """CPU time of something that was run many times.

    Attributes:
        median_ms: Milliseconds.
        minimum_ms: Milliseconds.
    """

    median_ms: float
    minimum_ms: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model's step on both sides.

    Attributes:
        model: Its name.
        parameters: How many weights it trains.
        batch_size: Examples of a step.
        device: On the TFLite runtime.
        tensorflow: On TensorFlow, as `tf.function` makes it.
        xla: The same compiled by XLA.
    """

    model: str
    parameters: int
    batch_size: int
    device: Timing
    tensorflow: Timing
    xla: Timing

    @property
    def ratio(self) -> float:
        """The device's median over that of TensorFlow's faster form."""
        return self.device.median_ms / min(self.tensorflow.median_ms, self.xla.median_ms)


def in_turn(runs: Runs, *, repeats: int) -> dict[str, Timing]:
    """Return the CPU time of every run: A, B, A, B, ... `repeats` times, after a few that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(_WARM_UP + repeats):
        for name, run in runs.items():
            before = time.process_time()
            run()
            if at >= _WARM_UP:
                times[name].append(1000 * (time.process_time() - before))
    return {name: Timing(median(found), min(found)) for name, found in times.items()}


def compare(model: Any, *, batch_size: int, repeats: int) -> Comparison:
    """Return the step times of a compiled Keras model; its weights change.

    Args:
        model: Compiled with a loss and an optimizer.
        batch_size: Examples of a step, at least 1.
        repeats: How many steps count.

    Raises:
        CannotTrain: The model cannot be exported.
        SelfTestFailed: The bundle disagrees with Keras.
    """
    bundle = export(model, loss=model.loss, optimizer=model.optimizer)
    batch = random_batches(bundle.batch, bundle.name, (batch_size,))[0]
    features = {port: batch[port] for port in bundle.features}
    labels = [values for port, values in batch.items() if port not in features]
    program = open_program(bundle)
    state = program.begin(decode_tensors(bundle.initial))
    runs = {
        "device": lambda: program.step(state, batch),
        "tensorflow": keras_step(model, [*features.values()], labels),
        "xla": keras_step(model, [*features.values()], labels, xla=True),
    }
    found = in_turn(runs, repeats=repeats)
    parameters = sum(int(tf.size(weight)) for weight in model.trainable_variables)
    return Comparison(model.name, parameters, batch_size, **found)


def keras_step(
    model: Any, features: Sequence[Array], labels: Sequence[Array], *, xla: bool = False
) -> Callable[[], Tensor]:
    """Return a step of TensorFlow on one batch, which returns its loss.

    Args:
        model: Compiled, of one input and one output.
        features: One array.
        labels: One array.
        xla: Compile the step with XLA.
    """
    (x,), (y,) = (list(map(tf.constant, part)) for part in (features, labels))
    loss_of = tf.keras.losses.get(model.loss)
    model.optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=xla or None)  # type: ignore[untyped-decorator]
    def step(x: Tensor, y: Tensor) -> Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(loss_of(y, model(x, training=True)))
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return lambda: step(x, y)


def table(lines: Sequence[Comparison]) -> list[str]:
    """Return the comparisons as text, a line each."""
    columns = ("device, ms", "tf.function, ms", "XLA, ms")
    head = (
        f"{'model':<12} {'parameters':>10} {'batch':>5}  {'  '.join(f'{each:>15}' for each in columns)}  {'ratio':>6}"
    )
    rows = [
        f"{line.model:<12} {line.parameters:>10,} {line.batch_size:>5}  {_both(line.device):>15}  "
        f"{_both(line.tensorflow):>15}  {_both(line.xla):>15}  {line.ratio:>6.2f}"
        for line in lines
    ]
    how = f"median (least) CPU time of a step, one thread, in turn; ratio to the faster of the two; {_versions()}"
    return [head, *rows, how]


def _versions() -> str:
    one_dnn = {"0": "without oneDNN", "1": "with oneDNN"}.get(
        os.environ.get("TF_ENABLE_ONEDNN_OPTS", ""), "as it comes"
    )
    return f"device: {runtime_name()}; TensorFlow {tf.__version__} {one_dnn}"


def _both(timing: Timing) -> str:
    return f"{timing.median_ms:.2f} ({timing.minimum_ms:.2f})"


def formulations(*, repeats: int) -> dict[str, dict[str, Timing]]:
    """Return question -> formulation -> its time on the TFLite runtime, arguments and results copied."""
    found = {}
    for name, question in QUESTIONS.items():
        found[name] = in_turn(opened(question), repeats=repeats)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `scripts/bench_step`; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/bench_step", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", metavar="MODEL", nargs="*", help=f"of {', '.join(MODELS)}; all without any")
    parser.add_argument("--batch-size", type=int, default=10, help="examples of a step (10)")
    parser.add_argument("--repeats", type=int, default=60, help="steps that count (60)")
    parser.add_argument("--formulations", action="store_true", help="measure ways to write a layer's parts instead")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"there is no model {', '.join(unknown)}; choose from {', '.join(MODELS)}")
    if options.batch_size < 1 or options.repeats < 1:
        parser.error("--batch-size and --repeats must be at least 1")
    if options.formulations:
        _print_formulations(formulations(repeats=options.repeats), as_json=options.json)
        return 0
    chosen = options.models or list(MODELS)
    lines = [compare(MODELS[name](), batch_size=options.batch_size, repeats=options.repeats) for name in chosen]
    found = [{**asdict(line), "ratio": line.ratio} for line in lines]
    print(json.dumps(found, indent=2) if options.json else "\n".join(table(lines)))
    return 0


def _print_formulations(found: Mapping[str, Mapping[str, Timing]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: {k: asdict(v) for k, v in runs.items()} for name, runs in found.items()}, indent=2))
        return
    for name, runs in found.items():
        print(f"\n{name}: {QUESTIONS[name].what}")
        for formulation, timing in runs.items():
            print(f"  {formulation:<34} {_both(timing):>15} ms")


if __name__ == "__main__":
    sys.exit(main())
