"""Server optimizers: what a round's mean update makes of the model. Each is a pair of pure functions.

    init(weights) -> state
    apply(state, weights, delta) -> (state, weights)

`delta` is the weighted mean of the devices' updates, local minus broadcast weights (McMahan et al. 2017); it plays the
part of a negative gradient, so it is *added*. Weights, deltas and every part of a state are named tensors, float32 or
float64; each tensor is computed in its own dtype, and nothing is changed in place.

The adaptive ones are Algorithm 2 of Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295), with
v_0 = tau^2 and, as there, without the bias correction that Adam has elsewhere:

    m = beta_1 * m + (1 - beta_1) * delta
    v = v + delta^2                                              Adagrad
    v = beta_2 * v + (1 - beta_2) * delta^2                      Adam
    v = v - (1 - beta_2) * delta^2 * sign(v - delta^2)           Yogi
    weights = weights + learning_rate * m / (sqrt(v) + tau)

m is called `first_moment` and v `second_moment` in a state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.types import Array

Tensors: TypeAlias = Mapping[str, Array]
OptimizerState: TypeAlias = Mapping[str, Tensors]
"""Part of the state (such as `first_moment`) -> one tensor for each weight, of that weight's dtype and shape."""

_FLOATS = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class ServerOptimizer:
    """A server optimizer with its rates; made by the functions of this module.

    Attributes:
        name: Name and rates, for people: `adam(learning_rate=0.01, ...)`.
        init: weights -> the state before the first round.
        apply: (state, weights, delta) -> the state and the weights after a round. It raises ConfigError where names,
            shapes or dtypes of the three do not fit together.
    """

    name: str
    init: Callable[[Tensors], OptimizerState]
    apply: Callable[[OptimizerState, Tensors, Tensors], tuple[OptimizerState, dict[str, Array]]]

    def __str__(self) -> str:
        return self.name


def sgd(learning_rate: float = 1.0) -> ServerOptimizer:
    """Return weights + learning_rate * delta; with 1.0, the default, this is federated averaging.

    Args:
        learning_rate: Above 0.

    Raises:
        ConfigError: The rate is not above 0.
    """
    rate = _positive("learning_rate", learning_rate)

    def apply(state: OptimizerState, weights: Tensors, delta: Tensors) -> tuple[OptimizerState, dict[str, Array]]:
        _check(weights, delta)
        return state, {name: weights[name] + rate * delta[name] for name in weights}

    return ServerOptimizer(_named("sgd", learning_rate=rate), lambda weights: {}, apply)


def momentum(learning_rate: float = 1.0, *, momentum: float = 0.9) -> ServerOptimizer:
    """Return SGD with momentum, FedAvgM (Hsu et al. 2019, arXiv 1909.06335).

    velocity = momentum * velocity + delta; weights = weights + learning_rate * velocity. A constant delta is in the
    end worth 1 / (1 - momentum) of itself, so rates are smaller than for `sgd`.

    Args:
        learning_rate: Above 0.
        momentum: 0 or more, below 1.

    Raises:
        ConfigError: A number is out of its range.
    """
    rate, kept = _positive("learning_rate", learning_rate), _decay("momentum", momentum)

    def apply(state: OptimizerState, weights: Tensors, delta: Tensors) -> tuple[OptimizerState, dict[str, Array]]:
        _check(weights, delta, state, "velocity")
        velocity = {name: kept * state["velocity"][name] + delta[name] for name in weights}
        return {"velocity": velocity}, {name: weights[name] + rate * velocity[name] for name in weights}

    return ServerOptimizer(
        _named("momentum", learning_rate=rate, momentum=kept), lambda weights: {"velocity": _full(weights, 0.0)}, apply
    )


def adagrad(learning_rate: float, *, beta_1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """Return FedAdagrad; see the module.

    Args:
        learning_rate: Above 0.
        beta_1: How much of the first moment is kept, 0 or more and below 1; 0, the paper's choice, is no momentum.
        tau: Adaptivity: smaller adapts more. Above 0, in the weights' own units.

    Raises:
        ConfigError: A number is out of its range.
    """
    name = _named("adagrad", learning_rate=learning_rate, beta_1=beta_1, tau=tau)
    return _adaptive(name, learning_rate, beta_1, tau, lambda v, squared: v + squared)


def adam(learning_rate: float, *, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """Return FedAdam; see the module.

    Args:
        learning_rate: Above 0.
        beta_1: How much of the first moment is kept, 0 or more and below 1.
        beta_2: How much of the second moment is kept, 0 or more and below 1.
        tau: Adaptivity: smaller adapts more. Above 0, in the weights' own units.

    Raises:
        ConfigError: A number is out of its range.
    """
    kept = _decay("beta_2", beta_2)
    name = _named("adam", learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, tau=tau)
    return _adaptive(name, learning_rate, beta_1, tau, lambda v, squared: kept * v + (1 - kept) * squared)


def yogi(learning_rate: float, *, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """Return FedYogi, whose second moment forgets a large delta no faster than a small one; see the module.

    Args:
        learning_rate: Above 0.
        beta_1: How much of the first moment is kept, 0 or more and below 1.
        beta_2: The second moment moves by 1 - beta_2 of the squared delta; 0 or more and below 1.
        tau: Adaptivity: smaller adapts more. Above 0, in the weights' own units.

    Raises:
        ConfigError: A number is out of its range.
    """
    kept = _decay("beta_2", beta_2)
    name = _named("yogi", learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, tau=tau)
    return _adaptive(
        name, learning_rate, beta_1, tau, lambda v, squared: v - (1 - kept) * squared * np.sign(v - squared)
    )


_BY_NAME: Mapping[str, Callable[..., ServerOptimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
    "yogi": yogi,
}
NAMES = tuple(_BY_NAME)


def by_name(name: str, options: Mapping[str, float]) -> ServerOptimizer:
    """Return the server optimizer that a file names.

    Args:
        name: One of NAMES.
        options: Its rates by the names of the function's parameters; those left out have the function's defaults.

    Raises:
        ConfigError: No such optimizer, an option it does not have or lacks, or a number out of its range.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"there is no server optimizer {name!r}; choose one of {', '.join(NAMES)}")
    known = inspect.signature(_BY_NAME[name]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"the server optimizer {name!r} has no {unknown[0]!r}; it has {', '.join(known)}")
    missing = [rate for rate, parameter in known.items() if parameter.default is parameter.empty]
    if lacking := [rate for rate in missing if rate not in options]:
        raise ConfigError(f"the server optimizer {name!r} needs {lacking[0]!r}, for example 0.01")
    return _BY_NAME[name](**options)


def _adaptive(
    name: str, learning_rate: float, beta_1: float, tau: float, second: Callable[[Array, Array], Array]
) -> ServerOptimizer:
    """Return Algorithm 2 with the rule `second`: (v, delta^2) -> v."""
    rate, kept, floor = _positive("learning_rate", learning_rate), _decay("beta_1", beta_1), _positive("tau", tau)

    def init(weights: Tensors) -> OptimizerState:
        return {"first_moment": _full(weights, 0.0), "second_moment": _full(weights, floor**2)}

    def apply(state: OptimizerState, weights: Tensors, delta: Tensors) -> tuple[OptimizerState, dict[str, Array]]:
        _check(weights, delta, state, "first_moment", "second_moment")
        m = {n: kept * state["first_moment"][n] + (1 - kept) * delta[n] for n in weights}
        v = {n: second(state["second_moment"][n], delta[n] * delta[n]) for n in weights}
        moved = {n: weights[n] + rate * m[n] / (np.sqrt(v[n]) + floor) for n in weights}
        return {"first_moment": m, "second_moment": v}, moved

    return ServerOptimizer(name, init, apply)


def _full(weights: Tensors, value: float) -> dict[str, Array]:
    _check(weights, weights)
    return {name: np.full_like(weight, value) for name, weight in weights.items()}


def _check(weights: Tensors, delta: Tensors, state: OptimizerState | None = None, *parts: str) -> None:
    for part in parts:
        if state is None or part not in state:
            raise ConfigError(f"this state has no {part!r}: it is of another server optimizer; start from `init`")
    named = {"delta": delta, **{part: state[part] for part in parts if state is not None}}
    for what, tensors in named.items():
        if set(tensors) != set(weights):
            raise ConfigError(f"{what} names {sorted(tensors)}, the weights are {sorted(weights)}; give one for each")
        for name, weight in weights.items():
            if str(weight.dtype) not in _FLOATS:
                raise ConfigError(f"weight {name!r} is {weight.dtype}; a server optimizer needs float32 or float64")
            if (tensors[name].dtype, tensors[name].shape) != (weight.dtype, weight.shape):
                raise ConfigError(
                    f"{what} {name!r} is {tensors[name].dtype}{list(tensors[name].shape)}, "
                    f"its weight {weight.dtype}{list(weight.shape)}; they must be alike"
                )


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value}; write a number above 0")
    return float(value)


def _decay(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}; write a number from 0 up to, but not including, 1")
    return float(value)


def _named(name: str, **rates: float) -> str:
    return f"{name}({', '.join(f'{rate}={value:g}' for rate, value in rates.items())})"
