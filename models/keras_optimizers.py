"""Keras' client optimizers as pure functions: SGD, momentum and Adam, weight decay, clipping.

What an optimizer remembers from step to step (its slots) is part of the program's state and starts at zero in every
round: slots are not averaged over devices. The learning rate is broadcast, so that the coordinator can lower it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from models.gradients import CannotTrain
from models.ops import Tensor

keras = tf.keras
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class ClientOptimizer:
    """What a Keras optimizer says of itself; the names are Keras'.

    Attributes:
        kind: `SGD` or `Adam`.
        keras: Keras' own object, for the reference.
        learning_rate: The first one.
        momentum: Of SGD, in [0, 1).
        nesterov: Of SGD.
        beta_1: Of Adam.
        beta_2: Of Adam.
        epsilon: Of Adam.
        weight_decay: Share of a weight that is taken off at every step, times the learning rate.
        clip_norm: Largest L2 norm of all gradients together, infinity for any.
        clip_each: Largest L2 norm of each weight's gradient.
        clip_value: Largest size of an entry of a gradient.
    """

    kind: str
    keras: Any
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    weight_decay: float = 0.0
    clip_norm: float = math.inf
    clip_each: float = math.inf
    clip_value: float = math.inf

    @property
    def slots(self) -> tuple[str, ...]:
        """Prefixes of the tensors kept for every weight."""
        if self.kind == "Adam":
            return "first_moment_", "second_moment_"
        return ("momentum_",) if self.momentum else ()

    def apply(
        self, weights: Tensors, slopes: Tensors, slots: Tensors, *, rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        """Return the new weights and slots.

        Args:
            weights: Named tensors.
            slopes: The gradient of each.
            slots: Slot prefix + name of a weight -> tensor.
            rate: float32[1].
            step: Steps made before, float32[1].
        """
        slopes = self._clipped(slopes)
        if self.weight_decay:
            weights = {name: value - value * (self.weight_decay * rate) for name, value in weights.items()}
        one = self._adam if self.kind == "Adam" else self._sgd
        found: dict[str, Tensor] = {}
        for name, value in weights.items():
            found |= one(name, value, slopes[name], slots, rate, step + 1.0)
        return found

    def _clipped(self, slopes: Tensors) -> Tensors:
        if math.isfinite(self.clip_value):
            low, high = -self.clip_value, self.clip_value
            return {name: tf.maximum(tf.minimum(value, high), low) for name, value in slopes.items()}
        if math.isfinite(self.clip_each):
            return {name: value * _shrinking([value], self.clip_each) for name, value in slopes.items()}
        if math.isfinite(self.clip_norm):
            factor = _shrinking(list(slopes.values()), self.clip_norm)
            return {name: value * factor for name, value in slopes.items()}
        return slopes

    def _sgd(
        self, name: str, value: Tensor, slope: Tensor, slots: Tensors, rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        if not self.momentum:
            return {name: value - rate * slope}
        velocity = slots["momentum_" + name] * self.momentum - rate * slope
        moved = velocity * self.momentum - rate * slope if self.nesterov else velocity
        return {name: value + moved, "momentum_" + name: velocity}

    def _adam(
        self, name: str, value: Tensor, slope: Tensor, slots: Tensors, rate: Tensor, step: Tensor
    ) -> dict[str, Tensor]:
        first, second = slots["first_moment_" + name], slots["second_moment_" + name]
        first = first + (slope - first) * (1.0 - self.beta_1)
        second = second + (slope * slope - second) * (1.0 - self.beta_2)
        scale = rate * tf.sqrt(1.0 - tf.pow(self.beta_2, step)) / (1.0 - tf.pow(self.beta_1, step))
        moved = value - scale * first / (tf.sqrt(second) + self.epsilon)
        return {name: moved, "first_moment_" + name: first, "second_moment_" + name: second}


def _shrinking(values: Sequence[Tensor], largest: float) -> Tensor:
    """Return the factor that brings the L2 norm of all `values` together down to `largest`, 1 where it is smaller."""
    norm = tf.sqrt(tf.add_n([tf.reduce_sum(value * value) for value in values]))
    return largest / tf.maximum(norm, largest)


def optimizer_of(identifier: Any) -> ClientOptimizer:
    """Return what a Keras optimizer (a name or an object) means.

    Raises:
        CannotTrain: It is neither SGD nor Adam, or has a setting that devices do not follow.
    """
    try:
        found = keras.optimizers.get(identifier)
    except (ValueError, TypeError) as error:
        raise CannotTrain(f"there is no optimizer {identifier!r}; use keras.optimizers.SGD or Adam") from error
    kind = type(found).__name__
    # An author's subclass may do anything, whatever it is called.
    if type(found) not in (keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.AdamW):
        raise CannotTrain(f"the optimizer {kind} does not run on devices; use keras.optimizers.SGD or Adam")
    settings = found.get_config()
    # Keras keeps what `exclude_from_weight_decay` was told, but not in the configuration.
    if getattr(found, "_exclude_from_weight_decay", None) or getattr(found, "_exclude_from_weight_decay_pattern", None):
        raise CannotTrain("the optimizer's exclude_from_weight_decay does not run on devices; decay all, or freeze")
    wrong = [name for name in _REFUSED if settings.get(name)]
    if wrong:
        raise CannotTrain(f"the optimizer's {wrong[0]} does not run on devices; {_REFUSED[wrong[0]]}")
    if not isinstance(settings["learning_rate"], (int, float)):
        raise CannotTrain("a learning rate schedule does not run on devices: the coordinator broadcasts the rate")
    read = {
        name: settings[name] for name in ("momentum", "nesterov", "beta_1", "beta_2", "epsilon") if name in settings
    }
    return ClientOptimizer(
        kind="SGD" if kind == "SGD" else "Adam",
        keras=found,
        learning_rate=float(settings["learning_rate"]),
        weight_decay=float(settings.get("weight_decay") or 0.0),
        clip_norm=float(settings.get("global_clipnorm") or math.inf),
        clip_each=float(settings.get("clipnorm") or math.inf),
        clip_value=float(settings.get("clipvalue") or math.inf),
        **read,
    )


_REFUSED = {
    "use_ema": "leave it out: the coordinator averages",
    "amsgrad": "leave it out",
    "loss_scale_factor": "leave it out: devices compute in float32",
    "gradient_accumulation_steps": "use a larger batch in the plan",
}
"""Settings that change what a step does -> the cure."""
