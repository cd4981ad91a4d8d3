"""Runs client programs on a TFLite runtime: bundle in, roles out. The only module that imports such a runtime.

ai-edge-litert is preferred, tflite-runtime (32-bit Pis) also works; both are imported on first use. TFLite checks no
shapes and no dtypes of its inputs (a wrong batch gives a wrong loss and no error), so every input is held against its
port first. A `Program` is not thread-safe: one for each thread.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

from sottovoce.agreement import check_ports
from sottovoce.bundle import Bundle, Port, RoleName
from sottovoce.errors import BadBundle, MalformedMessage, ProgramError, SelfTestFailed
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

RuntimeName: TypeAlias = Literal["auto", "litert", "tflite"]
Arrays: TypeAlias = Mapping[str, Array]
NO_ARRAYS: Arrays = MappingProxyType({})

SAMPLED_ENTRIES = 1024
"""A tensor of more entries than this is represented in self-test vectors by so many, evenly spread."""

_INSTALL: Mapping[RuntimeName, str] = {
    "auto": "pip install 'sottovoce[agent]'",
    "litert": "pip install 'sottovoce[agent]'",
    "tflite": "pip install 'sottovoce[agent-tflite]'",
}


class _Flatbuffer:
    """A flatbuffer and the interpreter that runs it, made anew before any of its inputs changes its shape.

    XNNPACK now and then keeps what it has set up for the shape before, it seems when the memory of the new one begins
    at the same address: a step after the batch grew was wrong, without an error (seen with ai-edge-litert 2.3). Without
    XNNPACK it never was, nor with an interpreter that has run no other shape; `test_normalization.py` shows it.
    """

    def __init__(self, content: bytes, new_interpreter: Callable[..., Any]) -> None:
        """Open it.

        Raises:
            RuntimeError, ValueError: The runtime cannot read it.
        """
        self._content, self._new_interpreter = content, new_interpreter
        self._interpreter: Any = None
        self._open()

    @property
    def signatures(self) -> list[str]:
        """Names of what it can run."""
        return list(self._interpreter.get_signature_list())

    def runner(self, signature: str) -> Any:
        """Return the runtime's own runner of `signature`, to ask it what it reads and returns."""
        if signature not in self._runners:
            self._runners[signature] = self._interpreter.get_signature_runner(signature)
        return self._runners[signature]

    def run(self, signature: str, given: Arrays) -> Arrays:
        """Return what `signature` makes of `given`: copies, not views of the runtime's memory.

        Raises:
            RuntimeError, ValueError: The runtime refuses it.
        """
        shapes = {name: array.shape for name, array in given.items()}
        if self._shapes.get(signature, shapes) != shapes:
            self._open()
        self._shapes[signature] = shapes
        returned: Arrays = self.runner(signature)(**given)
        return returned

    def _open(self) -> None:
        self._runners: dict[str, Any] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._interpreter = None  # Its memory goes before there is another.
        self._interpreter = self._new_interpreter(model_content=self._content)


class Program:
    """A client program, opened: its five roles as functions of named arrays."""

    def __init__(self, bundle: Bundle, flatbuffers: Mapping[str, _Flatbuffer]) -> None:
        """Made by `open_program`."""
        self._bundle = bundle
        self._flatbuffers = flatbuffers
        self._features = tuple(port for port in bundle.batch if port.name in bundle.features)
        # The runtime reads these from the flatbuffer anew at every call, which takes as long as a small model's layer.
        self._read = {role: self._checked_inputs(role) for role in bundle.roles}

    def begin(self, broadcast: Arrays, client_state: Arrays = NO_ARRAYS) -> dict[str, Array]:
        """Return the first state.

        Args:
            broadcast: One array for each broadcast port.
            client_state: One array for each port of the client state, if the program has any.

        Raises:
            ProgramError: A port is missing or its array has the wrong dtype or shape; so for every role.
        """
        return self._run("begin", {**broadcast, **client_state})

    def step(self, state: Arrays, batch: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the state after one batch, and the batch's metrics (sums, shape [1] each)."""
        _check_batch(batch)
        outputs = self._run("step", {**state, **batch})
        metrics = {port.name: outputs.pop(port.name) for port in self._bundle.metrics}
        return outputs, metrics

    def finish(self, state: Arrays, broadcast: Arrays) -> dict[str, Array]:
        """Return every port of every result, and the client state's new values under the names `next_...`."""
        return self._run("finish", {**state, **broadcast})

    def infer(self, broadcast: Arrays, features: Arrays) -> dict[str, Array]:
        """Return the predictions for a batch of features."""
        _check_batch(features)
        return self._run("infer", {**broadcast, **features})

    def evaluate(self, broadcast: Arrays, batch: Arrays) -> dict[str, Array]:
        """Return the sums over a batch."""
        _check_batch(batch)
        return self._run("evaluate", {**broadcast, **batch})

    def _ports(self, role: RoleName) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """Return the inputs and the outputs of `role`."""
        b = self._bundle
        match role:
            case "begin":
                return b.broadcast + b.client_state_ports, b.state
            case "step":
                return b.state + b.batch, b.state + b.metrics
            case "finish":
                return b.state + b.broadcast, b.result_ports + b.next_client_state_ports
            case "infer":
                return b.broadcast + self._features, b.predictions
            case "evaluate":
                return b.broadcast + b.batch, b.sums

    def _checked_inputs(self, role: RoleName) -> tuple[str, ...]:
        """Return what the flatbuffer reads in `role`, once it is clear that it reads and returns the bundle's ports."""
        inputs, outputs = self._ports(role)
        where = self._bundle.roles[role]
        runner = self._flatbuffers[where.flatbuffer].runner(where.signature)
        declared = runner.get_input_details(), runner.get_output_details()
        for kind, ports, details in zip(("input", "output"), (inputs, outputs), declared, strict=True):
            known = {port.name: port.tensor_type.numpy_dtype for port in ports}
            for name, detail in details.items():
                if known.get(name) != detail["dtype"]:
                    raise BadBundle(
                        f"{role}: the flatbuffer's {kind} {name!r} ({detail['dtype'].__name__}) is not a port"
                    )
        if missing := {port.name for port in outputs} - set(declared[1]):
            raise BadBundle(f"{role}: the flatbuffer does not return {', '.join(sorted(missing))}")
        return tuple(declared[0])

    def _run(self, role: RoleName, given: Arrays) -> dict[str, Array]:
        where = self._bundle.roles.get(role)
        if where is None:
            raise ProgramError(f"program {self._bundle.name!r} has no role {role!r}")
        inputs, outputs = self._ports(role)
        check_ports(role, inputs, given)
        # A signature may leave out ports that it does not need; the converter drops unused inputs.
        fed = {name: np.ascontiguousarray(given[name]) for name in self._read[role]}
        try:
            returned = self._flatbuffers[where.flatbuffer].run(where.signature, fed)
        except (RuntimeError, ValueError) as error:
            raise ProgramError(
                f"program {self._bundle.name!r}, role {role!r}: the runtime refused it: {error}"
            ) from error
        results = {port.name: np.asarray(returned[port.name]) for port in outputs}
        check_ports(role, outputs, results)
        return results


def open_program(bundle: Bundle, *, runtime: RuntimeName = "auto", threads: int = 1) -> Program:
    """Return `bundle` ready to run.

    Args:
        bundle: A bundle that `decode_bundle` has checked.
        runtime: Which TFLite runtime; `auto` takes ai-edge-litert if it is installed, else tflite-runtime.
        threads: Threads of one invocation, >= 1.

    Raises:
        ProgramError: No such runtime is installed; the text says which command installs it.
        BadBundle: The runtime cannot read a flatbuffer, or its signatures do not have the bundle's ports.
    """
    _, interpreter_class = _choose(runtime)
    new_interpreter = functools.partial(interpreter_class, num_threads=threads)
    try:
        opened = {name: _Flatbuffer(content, new_interpreter) for name, content in bundle.flatbuffers.items()}
        return Program(bundle, opened)
    except (RuntimeError, ValueError) as error:
        raise BadBundle(f"program {bundle.name!r}: the runtime cannot read it: {error}") from error


@functools.lru_cache(maxsize=32)
def open_function(flatbuffer: bytes) -> Callable[[Arrays], dict[str, Array]]:
    """Return the only signature of a flatbuffer as a function of named arrays; it is not thread-safe.

    Args:
        flatbuffer: A function that was saved with a computation.

    Raises:
        ProgramError: No TFLite runtime is installed; so does the function, if an input does not fit.
        BadBundle: The runtime cannot read it, or it has not one signature.
    """
    _, interpreter_class = _choose("auto")
    try:
        opened = _Flatbuffer(flatbuffer, interpreter_class)
        (name,) = opened.signatures
        inputs = opened.runner(name).get_input_details()
    except (RuntimeError, ValueError) as error:
        raise BadBundle(f"the runtime cannot read this function: {error}") from error

    def run(given: Arrays) -> dict[str, Array]:
        for port, detail in inputs.items():
            array = given.get(port)
            shape = tuple(detail["shape_signature"])
            if array is None or array.dtype != detail["dtype"] or not _has_shape(array, shape):
                raise ProgramError(f"input {port!r} must be {detail['dtype'].__name__}{list(shape)}")
        try:
            returned = opened.run(name, {port: np.ascontiguousarray(given[port]) for port in inputs})
        except (RuntimeError, ValueError) as error:
            raise ProgramError(f"the runtime refused it: {error}") from error
        return {port: np.array(array) for port, array in returned.items()}

    return run


def _has_shape(array: Array, shape: tuple[int, ...]) -> bool:
    """Say whether `array` has `shape`, where -1 stands for any length."""
    return array.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=True))


def runtime_name(runtime: RuntimeName = "auto") -> str:
    """Return the name and version of the runtime that `open_program` would use, such as `ai-edge-litert 2.3.0`.

    Raises:
        ProgramError: No such runtime is installed.
    """
    distribution, _ = _choose(runtime)
    return f"{distribution} {importlib.metadata.version(distribution)}"


def run_self_test(bundle: Bundle, program: Program) -> None:
    """Run the bundle's self-test vectors on this device's runtime.

    Raises:
        SelfTestFailed: A tensor differs by more than the tolerance, or a tensor is missing; carries `tensor`,
            `difference` and `tolerance`.
        BadBundle: The vectors are not named tensors.
    """
    test = bundle.self_test
    try:
        broadcast = {**decode_tensors(bundle.initial), **decode_tensors(test.broadcast)}
        kept = {**_initial_client_state(bundle), **decode_tensors(test.client_state)}
        batches = [decode_tensors(batch) for batch in test.batches]
        expected = decode_tensors(test.expected)
    except MalformedMessage as error:
        raise BadBundle(f"program {bundle.name!r}: {error}") from error
    actual = _self_test_results(bundle, program, broadcast, kept, batches)
    if missing := set(actual) - set(expected):
        raise BadBundle(f"program {bundle.name!r}: its self-test expects nothing of {', '.join(sorted(missing))}")
    for name, wanted in expected.items():
        difference = _difference(wanted, sampled(actual[name])) if name in actual else np.inf
        if not difference <= test.tolerance:
            raise SelfTestFailed(
                f"program {bundle.name!r} computes {name!r} wrongly on this device's runtime: "
                f"off by {difference:.3g}, allowed {test.tolerance:.3g}; this device must not take part with it",
                tensor=name,
                difference=difference,
                tolerance=test.tolerance,
            )


def sampled(tensor: Array) -> Array:
    """Return the entries by which self-test vectors represent `tensor`: all of it, or SAMPLED_ENTRIES spread evenly."""
    if tensor.size <= SAMPLED_ENTRIES:
        return tensor
    return tensor.reshape(-1)[np.linspace(0, tensor.size - 1, SAMPLED_ENTRIES).astype(np.int64)]


def _self_test_results(
    bundle: Bundle, program: Program, broadcast: Arrays, client_state: Arrays, batches: Sequence[Arrays]
) -> dict[str, Array]:
    totals: dict[str, Array] = {port.name: np.zeros(1) for port in bundle.metrics}
    state = program.begin(broadcast, client_state)
    for batch in batches:
        state, metrics = program.step(state, batch)
        totals = {name: total + metrics[name] for name, total in totals.items()}
    return {**program.finish(state, broadcast), **totals}


def _initial_client_state(bundle: Bundle) -> dict[str, Array]:
    return decode_tensors(bundle.client_state.initial) if bundle.client_state else {}


def _difference(wanted: Array, found: Array) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    return float(np.max(np.abs(found.astype(np.float64) - wanted.astype(np.float64)), initial=0.0))


def _check_batch(batch: Arrays) -> None:
    sizes = {name: len(column) if column.ndim else 0 for name, column in batch.items()}
    if not sizes or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ProgramError(f"a batch needs columns of one length, at least 1; these have {sizes}")


def _choose(runtime: RuntimeName) -> tuple[str, Any]:
    """Return the distribution's name and the Interpreter class of the first runtime that can be imported."""
    reasons = []
    for distribution, load in _CANDIDATES[runtime].items():
        try:
            return distribution, load()
        except ImportError as error:
            reasons.append(f"{distribution}: {error}")
    raise ProgramError(f"no TFLite runtime works here: {_INSTALL[runtime]} ({'; '.join(reasons)})")


def _load_litert() -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter


def _load_tflite() -> Any:
    # tflite-runtime 2.14 also imports beside numpy 2, and fails later, in its first Interpreter.
    if int(np.__version__.split(".")[0]) >= 2:
        raise ImportError(f"it needs numpy below 2, not {np.__version__}")
    from tflite_runtime.interpreter import Interpreter

    return Interpreter


_LITERT = {"ai-edge-litert": _load_litert}
_TFLITE = {"tflite-runtime": _load_tflite}
_CANDIDATES: Mapping[RuntimeName, Mapping[str, Callable[[], Any]]] = {
    "auto": _LITERT | _TFLITE,
    "litert": _LITERT,
    "tflite": _TFLITE,
}
