"""SCAFFOLD's client program: SGD whose drift control variates correct (Karimireddy et al. 2020, arXiv 1910.06378).

The paper's names: x the broadcast weights, y the local ones, c the server's control, c_i the device's own (kept in a
slot on the device), K the number of local steps, eta the client's learning rate. Every step is

    y = y - eta * (g(y) - c_i + c)

and at the end the device's control becomes that of Option II, c_i+ = c_i - c + (x - y) / (K * eta). The results are
`delta` = y - x and `control_delta` = c_i+ - c_i; the server's side is `sottovoce.language.scaffold`. The first part of
a step, y - eta * g(y), is the step of `models.keras_training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from models.export import bundle_of, source_of
from models.gradients import CannotTrain
from models.keras_reference import reference_of
from models.keras_training import STEPS, Training, functions_of, training_of
from models.program_export import DELTA, LOCAL, Arrays, Function, ProgramSource, Tensors, port_of, seed_of
from sottovoce.bundle import NEXT, Bundle, ClientState, Result, RoleName
from sottovoce.tensors import encode_tensors
from sottovoce.types import Array

CONTROL = "control_"
"""Prefix of the broadcast ports that carry the server's control, and of `control_delta`'s ports after DELTA."""
OWN = "own_control_"
"""Prefix of the client-state ports: the device's own control."""
_CORRECTION = LOCAL + "correction_"
_SPARE_BYTES = 1024
_TINY = 1e-12


def export_scaffold(
    model: Any,
    *,
    loss: Any,
    optimizer: Any,
    metrics: Any = None,
    batch_spec: Mapping[str, str] | None = None,
    description: str = "",
) -> Bundle:
    """Return SCAFFOLD's client program for a Keras model, with all five roles.

    Ports are those of `models.export.export`, and more: in the broadcast `control_` + each weight, in the results
    `control_delta`, and as client state the slot `scaffold-` + the model's name, first all zeros.

    Args:
        model: As in `models.export.export`, and so are the arguments that follow.
        loss: As there.
        optimizer: SGD without momentum.
        metrics: As there.
        batch_spec: As there.
        description: As there.

    Raises:
        CannotTrain: The text names the layer and the cure; or the optimizer is another one, or BatchNormalization moves
            statistics, for which there is no control.
        SelfTestFailed: The runtime's results are not those of Keras.
    """
    training = training_of(model, loss=loss, optimizer=optimizer, metrics=metrics, batch_spec=batch_spec)
    if training.optimizer.slots:
        raise CannotTrain("SCAFFOLD corrects the steps of plain SGD; use keras.optimizers.SGD without momentum")
    if training.traced.statistics:
        raise CannotTrain(
            f"SCAFFOLD has no control for the moving statistics {', '.join(training.traced.statistics)}; freeze "
            "BatchNormalization (layer.trainable = False), or use LayerNormalization"
        )
    return bundle_of(_source(training, model.name, description))


def _source(training: Training, name: str, description: str) -> ProgramSource:
    plain = source_of(training, name, description)
    weights = {each: plain.initial[each] for each in training.learned}
    zeros = {each: np.zeros_like(value) for each, value in weights.items()}
    controls, own = _named(CONTROL, zeros), _named(OWN, zeros)
    test_own = _named(OWN, _some_controls(weights, f"own controls of {name}"))
    changes = tuple(port_of(DELTA + each, value) for each, value in controls.items())
    return dataclasses.replace(
        plain,
        name=f"{name}_scaffold",
        description=f"{plain.description} Trained with SCAFFOLD's control variates.",
        functions=_functions(training),
        broadcast=(*plain.broadcast, *(port_of(each, value) for each, value in controls.items())),
        state=(*plain.state, *(port_of(_CORRECTION + each, value) for each, value in weights.items())),
        results=(*plain.results, Result(name="control_delta", ports=changes)),
        initial={**plain.initial, **controls},
        test_broadcast={
            **plain.test_broadcast,
            **_named(CONTROL, _some_controls(weights, f"server controls of {name}")),
        },
        reference=lambda broadcast, batches: _reference(training, broadcast, batches, test_own),
        client_state=_slot(name, own),
        test_client_state=test_own,
    )


def _slot(name: str, initial: Arrays) -> ClientState:
    content = encode_tensors(initial)
    ports = tuple(port_of(each, value) for each, value in initial.items())
    return ClientState(
        slot=f"scaffold-{name}", version=1, ports=ports, initial=content, maximum_bytes=len(content) + _SPARE_BYTES
    )


def _named(prefix: str, arrays: Arrays) -> dict[str, Array]:
    return {prefix + name: value for name, value in arrays.items()}


def _some_controls(weights: Arrays, what: str) -> dict[str, Array]:
    """Draw controls for the self-test, so that it notices one that is not used."""
    random = np.random.default_rng(seed_of(what))
    return {name: random.normal(0, 0.01, value.shape).astype(np.float32) for name, value in weights.items()}


def _functions(training: Training) -> dict[RoleName, Function]:
    plain = functions_of(training)
    return {
        **plain,
        "begin": lambda tensors: _begin(training, plain["begin"], tensors),
        "step": lambda tensors: _step(training, plain["step"], tensors),
        "finish": lambda tensors: _finish(training, plain["finish"], tensors),
    }


def _begin(training: Training, begin: Function, tensors: Tensors) -> Tensors:
    controls = {name for each in training.learned for name in (CONTROL + each, OWN + each)}
    state = begin({name: value for name, value in tensors.items() if name not in controls})
    return {**state, **{_CORRECTION + n: tensors[CONTROL + n] - tensors[OWN + n] for n in training.learned}}


def _step(training: Training, step: Function, tensors: Tensors) -> Tensors:
    corrections = {name: tensors[_CORRECTION + name] for name in training.learned}
    rate, found = tensors[LOCAL + "learning_rate"], step(tensors)
    return {
        **found,
        **{LOCAL + name: found[LOCAL + name] - rate * value for name, value in corrections.items()},
        **{_CORRECTION + name: tf.identity(value) for name, value in corrections.items()},
    }


def _finish(training: Training, finish: Function, tensors: Tensors) -> Tensors:
    """c_i+ = c_i - c + (x - y) / (K * eta); `correction` is c - c_i, so the slot need not be read again."""
    delta = finish(tensors)
    distance = tf.maximum(tensors[LOCAL + STEPS] * tensors[LOCAL + "learning_rate"], _TINY)
    own = {name: -tensors[_CORRECTION + name] - delta[DELTA + name] / distance for name in training.learned}
    before = {name: tensors[CONTROL + name] - tensors[_CORRECTION + name] for name in training.learned}
    return {
        **delta,
        **{DELTA + CONTROL + name: own[name] - before[name] for name in training.learned},
        **{NEXT + OWN + name: value for name, value in own.items()},
    }


def _reference(training: Training, broadcast: Arrays, batches: Sequence[Arrays], own: Arrays) -> dict[str, Array]:
    """Return what Keras' optimizer makes of the corrected gradients, and the controls after it."""
    server = {name: broadcast[CONTROL + name] for name in training.learned}
    corrections = {name: server[name] - own[OWN + name] for name in training.learned}
    found = reference_of(training, broadcast, batches, corrections=corrections)
    distance = len(batches) * broadcast["learning_rate"][0]
    changes = {name: -server[name] - found[DELTA + name] / distance for name in training.learned}
    return {
        **found,
        **{DELTA + CONTROL + name: change for name, change in changes.items()},
        **{NEXT + OWN + name: own[OWN + name] + change for name, change in changes.items()},
    }
