"""SCAFFOLD's client program: SGD whose drift control variates correct (Karimireddy et al. 2020, arXiv 1910.06378).

The paper's names: x the broadcast weights, y the local ones, c the server's control, c_i the device's own (kept in a
slot on the device), K the number of local steps, eta the client's learning rate. Every step is

    y = y - eta * (g(y) - c_i + c)

and at the end the device's control becomes that of Option II, c_i+ = c_i - c + (x - y) / (K * eta). The results are
`delta` = y - x and `control_delta` = c_i+ - c_i; the server's side is `sottovoce.language.scaffold`.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from models.export import (
    DELTA,
    LOCAL,
    Arrays,
    Function,
    Model,
    ProgramSource,
    Tensors,
    export,
    gradients,
    port_of,
    random_batches,
    role_of,
    run_with_tensorflow,
    scalar_ports,
    scores,
    seed_of,
    take,
)
from models.ops import BuiltIns, Operations, Plain
from sottovoce.bundle import NEXT, Bundle, ClientState, Port, Result, RoleName
from sottovoce.tensors import encode_tensors

CONTROL = "control_"
"""Prefix of the broadcast ports that carry the server's control, and of `control_delta`'s ports after DELTA."""
OWN = "own_control_"
"""Prefix of the client-state ports: the device's own control."""
_CORRECTION = LOCAL + "correction_"
_STEPS = LOCAL + "steps"
_SPARE_BYTES = 1024
_TINY = 1e-12


def export_scaffold(model: Model) -> Bundle:
    """Return SCAFFOLD's client program for a classifier, with all five roles.

    Broadcast: weights, constants, `learning_rate` float32[1], and `control_` + each weight. Client state: the slot
    `scaffold-` + the model's name, first all zeros. Results: `delta` and `control_delta`. Metrics: as `export_model`.

    Raises:
        BadBundle: The forward pass uses an operation whose gradient is not a TFLite built-in.
        SelfTestFailed: The runtime's results are not those of TensorFlow.
    """
    rate = {"learning_rate": np.array([model.learning_rate], np.float32)}
    zeros = {name: np.zeros_like(value) for name, value in model.weights.items()}
    broadcast = {**model.weights, **model.constants, **rate, **_named(CONTROL, zeros)}
    test_own = _named(OWN, _some_controls(model, "own"))
    return export(
        ProgramSource(
            name=f"{model.name}_scaffold",
            description=f"{model.description} Trained with SCAFFOLD's control variates.",
            functions=_functions(model, BuiltIns()),
            broadcast=tuple(port_of(name, value) for name, value in broadcast.items()),
            state=_state(model),
            batch=(Port(name="x", type=model.features), Port(name="y", type="int32[?]", low=0, high=model.classes - 1)),
            metrics=scalar_ports("loss", "correct"),
            results=_results(model),
            features=("x",),
            predictions=(Port(name="probabilities", type=f"float32[?,{model.classes}]"),),
            sums=scalar_ports("loss", "correct", "examples"),
            initial=broadcast,
            test_broadcast={**model.test_constants, **_named(CONTROL, _some_controls(model, "server"))},
            test_batches=random_batches(model),
            reference=lambda broadcast, batches: run_with_tensorflow(
                _functions(model, Plain()), broadcast, batches, metrics=("loss", "correct"), client_state=test_own
            ),
            tolerance=1e-4,
            client_state=_slot(model, _named(OWN, zeros)),
            test_client_state=test_own,
        )
    )


def _slot(model: Model, initial: Arrays) -> ClientState:
    content = encode_tensors(initial)
    ports = tuple(port_of(name, value) for name, value in initial.items())
    return ClientState(
        slot=f"scaffold-{model.name}",
        version=1,
        ports=ports,
        initial=content,
        maximum_bytes=len(content) + _SPARE_BYTES,
    )


def _state(model: Model) -> tuple[Port, ...]:
    local = (*model.weights.items(), *model.constants.items())
    corrections = tuple(port_of(_CORRECTION + name, value) for name, value in model.weights.items())
    return (
        *(port_of(LOCAL + name, value) for name, value in local),
        *scalar_ports(LOCAL + "learning_rate", _STEPS),
        *corrections,
    )


def _results(model: Model) -> tuple[Result, ...]:
    deltas = tuple(port_of(DELTA + name, value) for name, value in model.weights.items())
    controls = tuple(port_of(DELTA + CONTROL + name, value) for name, value in model.weights.items())
    return (
        Result(name="delta", ports=deltas, updates=tuple(model.weights)),
        Result(name="control_delta", ports=controls),
    )


def _named(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in arrays.items()}


def _some_controls(model: Model, whose: str) -> Arrays:
    """Draw controls for the self-test, so that it notices one that is not used."""
    random = np.random.default_rng(seed_of(f"{whose} controls of {model.name}"))
    return {name: random.normal(0, 0.01, value.shape).astype(np.float32) for name, value in model.weights.items()}


def _functions(model: Model, operations: Operations) -> dict[RoleName, Function]:
    return {
        "begin": lambda tensors: _begin(model, tensors),
        "step": lambda tensors: _step(model, operations, tensors),
        "finish": lambda tensors: _finish(model, tensors),
        "infer": role_of("infer", model, operations),
        "evaluate": role_of("evaluate", model, operations),
    }


def _begin(model: Model, tensors: Tensors) -> Tensors:
    kept = (*model.weights, *model.constants, "learning_rate")
    return {
        **{LOCAL + name: tf.identity(tensors[name]) for name in kept},
        _STEPS: tf.zeros([1]),
        **{_CORRECTION + name: tensors[CONTROL + name] - tensors[OWN + name] for name in model.weights},
    }


def _step(model: Model, operations: Operations, tensors: Tensors) -> Tensors:
    weights = take(model.weights, tensors, prefix=LOCAL)
    constants = take(model.constants, tensors, prefix=LOCAL)
    rate = tensors[LOCAL + "learning_rate"]
    slopes, logits, losses = gradients(model, operations, weights, constants, tensors)
    corrections = take(model.weights, tensors, prefix=_CORRECTION)
    return {
        **{LOCAL + name: weights[name] - rate * (slopes[name] + corrections[name]) for name in weights},
        **{LOCAL + name: tf.identity(value) for name, value in constants.items()},
        LOCAL + "learning_rate": tf.identity(rate),
        _STEPS: tensors[_STEPS] + 1.0,
        **{_CORRECTION + name: tf.identity(value) for name, value in corrections.items()},
        **scores(logits, losses, tensors["y"]),
    }


def _finish(model: Model, tensors: Tensors) -> Tensors:
    """c_i+ = c_i - c + (x - y) / (K * eta); `correction` is c - c_i, so the slot need not be read again."""
    distance = tf.maximum(tensors[_STEPS] * tensors[LOCAL + "learning_rate"], _TINY)
    delta = {name: tensors[LOCAL + name] - tensors[name] for name in model.weights}
    own = {name: -tensors[_CORRECTION + name] - delta[name] / distance for name in model.weights}
    before = {name: tensors[CONTROL + name] - tensors[_CORRECTION + name] for name in model.weights}
    return {
        **{DELTA + name: value for name, value in delta.items()},
        **{DELTA + CONTROL + name: own[name] - before[name] for name in model.weights},
        **{NEXT + OWN + name: value for name, value in own.items()},
    }
