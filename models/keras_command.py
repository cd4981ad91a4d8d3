"""What `sottovoce lint` and `sottovoce export` do: a model from a file, a table, a bundle and what it costs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from models.export import export, random_batches
from models.keras_training import Training, functions_of, source_inputs, training_of
from models.lint import lint, table
from models.program_export import Function
from sottovoce.bundle import Bundle
from sottovoce.errors import ConfigError
from sottovoce.runtime import open_program, runtime_name
from sottovoce.tensors import decode_tensors

keras = tf.keras
_TIMED_STEPS = 20
_LONGEST = 300
"""Of what Keras says about a file; the rest prints the layer's whole configuration."""
_RAISED = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError, SyntaxError),
    *(TypeError, ValueError, tf.errors.OpError),
)
"""What a model's own code raises; whatever else is no mistake in a model."""
_OWN = "if it has Lambda layers or layers of your own, name a function that makes the model: file.py:function"
_MEGABYTE = 1e6


def load(name: str) -> Any:
    """Return the Keras model that `name` means.

    Args:
        name: A `.keras` file, or `file.py:function` or `package.module:function`, a function that returns a model.

    Raises:
        ConfigError: There is no such file, module or function, or what it returns is no Keras model.
    """
    if name.endswith((".keras", ".h5")):
        if not Path(name).is_file():
            raise ConfigError(f"there is no file {name}")
        try:
            return keras.models.load_model(name)
        except (ValueError, OSError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
            told = " ".join(str(error).split()).split("Enable unsafe")[0]
            raise ConfigError(f"Keras cannot load {name}: {told[:_LONGEST]}; {_OWN}") from error
    source, _, function = name.partition(":")
    if not function:
        raise ConfigError(f"{name!r} is neither a .keras file nor file.py:function nor package.module:function")
    model = getattr(_module(source), function, None)
    if model is None:
        raise ConfigError(f"{source} has no {function!r}")
    if callable(model) and not isinstance(model, keras.Model):
        with _authors_errors(source):
            model = model()
    if not isinstance(model, keras.Model):
        raise ConfigError(f"{name} is a {type(model).__name__}, not a Keras model")
    return model


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ImportError as error:
            raise ConfigError(f"cannot import {source}: {error}") from error
    specification = importlib.util.spec_from_file_location(Path(source).stem, source)
    if specification is None or specification.loader is None or not Path(source).is_file():
        raise ConfigError(f"there is no file {source}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    with _authors_errors(source):
        specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _authors_errors(source: str) -> Iterator[None]:
    """Turn what the author's own code raises into one line that names the last line of it."""
    try:
        yield
    except _RAISED as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if source in (frame.filename, Path(frame.filename).stem)] or frames
        told = " ".join(str(error).split())[:_LONGEST]
        raise ConfigError(
            f"{Path(own[-1].filename).name}, line {own[-1].lineno}: {type(error).__name__}: {told}"
        ) from error


def lint_report(name: str) -> list[str]:
    """Return the table of `sottovoce lint`.

    Raises:
        ConfigError: See `load`.
        CannotTrain: The model cannot even be traced.
    """
    return table(lint(load(name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the author asks for beside the model; None takes what the model was compiled with.

    Attributes:
        loss: Keras' name of it.
        optimizer: Keras' name of it.
        metrics: Keras' names of them.
        int8: See `models.export.export`.
        batch_size: For the time and the memory of a step.
    """

    loss: str | None = None
    optimizer: str | None = None
    metrics: Sequence[str] | None = None
    int8: bool = False
    batch_size: int = 10


def export_report(name: str, out: Path, choice: Choice) -> list[str]:
    """Write the bundle of the model that `name` means to `out`; return what is worth saying about it.

    Args:
        name: See `load`.
        out: A `.svp` file.
        choice: What else was asked for.

    Raises:
        ConfigError: See `load`; or there is no loss, the batch size is not positive, or `out` cannot be written.
        CannotTrain: The text names the layer and the cure.
        SelfTestFailed: The runtime's results are not those of Keras.
    """
    if choice.batch_size < 1:
        raise ConfigError(f"--batch-size {choice.batch_size}: a batch has at least one example")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}")
    model = load(name)
    settings = _settings(model, choice)
    training = training_of(model, **settings)
    print(f"{name}: every layer trains; now converting, and proving it equal to Keras (10 to 60 s)", file=sys.stderr)
    bundle = export(model, **settings, path=out)
    parameters = sum(value.size for name, value in training.initial().items() if name in training.learned)
    frozen = model.count_params() - parameters
    peak, size = peak_bytes(training, choice.batch_size), choice.batch_size
    return [
        f"{out}: {out.stat().st_size} bytes, of which {len(bundle.initial)} are the first weights",
        f"parameters     {parameters} learned, {frozen} frozen or not sent",
        f"peak memory    at least {peak / _MEGABYTE:.1f} MB for a step of {size}, beside the runtime's own",
        f"time           {step_ms(bundle, size):.2f} ms for a step of {size} on {runtime_name()}",
        f"self-test      {len(bundle.self_test.batches)} steps agree with Keras to {bundle.self_test.tolerance:g}",
    ]


def _settings(model: Any, choice: Choice) -> dict[str, Any]:
    """Return how `model` is trained: what `choice` says, else what the model was compiled with."""
    loss = choice.loss or getattr(model, "loss", None)
    if loss is None:
        raise ConfigError("the model was not compiled: name its loss, as in --loss sparse_categorical_crossentropy")
    # Keras keeps what `compile` was given, but has no public name for it.
    compiled = getattr(model, "_compile_metrics", None), getattr(model, "_compile_loss", None)
    return {
        "loss": loss,
        "optimizer": choice.optimizer or getattr(model, "optimizer", None) or "sgd",
        "metrics": getattr(compiled[0], "_user_metrics", None) if choice.metrics is None else list(choice.metrics),
        "loss_weights": None if choice.loss else getattr(compiled[1], "_user_loss_weights", None),
        "int8": choice.int8,
    }


def step_ms(bundle: Bundle, batch_size: int) -> float:
    """Return the median time of a training step on this machine, in milliseconds."""
    program, batch = open_program(bundle), random_batches(bundle.batch, bundle.name, (batch_size,))[0]
    state = program.begin(decode_tensors(bundle.initial))
    times = []
    for _ in range(_TIMED_STEPS):
        before = time.perf_counter()
        state, _ = program.step(state, batch)
        times.append(time.perf_counter() - before)
    return 1000 * statistics.median(times)


def peak_bytes(training: Training, batch_size: int) -> int:
    """Return how much the tensors of a step need at once if each is freed after its last use: an estimate.

    Inputs and outputs (the state) live throughout, as the runtime keeps them.
    """
    step: Function = functions_of(training)["step"]
    specs = {p.name: tf.TensorSpec(p.tensor_type.shape, p.tensor_type.dtype) for p in source_inputs(training)}
    graph = tf.function(lambda **given: step(given), autograph=False).get_concrete_function(**specs).graph
    size: Callable[[Any], int] = lambda tensor: _bytes(tensor, batch_size)  # noqa: E731
    operations = graph.get_operations()
    last = {tensor.name: at for at, op in enumerate(operations) for tensor in op.inputs}
    last |= {tensor.name: len(operations) for tensor in (*graph.inputs, *graph.outputs)}
    freed: dict[int, int] = {}
    live = peak = 0
    for at, op in enumerate(operations):
        for tensor in op.outputs:
            live += size(tensor)
            freed[last.get(tensor.name, at)] = freed.get(last.get(tensor.name, at), 0) + size(tensor)
        peak = max(peak, live)
        live -= freed.get(at, 0)
    return peak


def _bytes(tensor: Any, batch_size: int) -> int:
    if tensor.shape.rank is None or tensor.dtype.size == 0:
        return 0
    entries = 1
    for length in tensor.shape.as_list():
        entries *= batch_size if length is None else length
    return entries * int(tensor.dtype.size)
