"""Training runs for comparisons: processes of the federated language, run in the reference executor on divided data.

Every device takes part in every round, and nothing is masked or rounded: what is compared is how a method learns. All
chance comes from a seed: the first weights, and the order in which a device walks over its examples, drawn anew for
every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import sottovoce as sv
from simulation.baselines import accuracy
from simulation.datasets import DividedData, Examples
from sottovoce.bundle import Bundle, with_initial
from sottovoce.language.learning import IterativeProcess
from sottovoce.language.sums import build_standardisation
from sottovoce.runtime import open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

BUNDLES = Path(__file__).parent / "bundles"


@dataclass(frozen=True, slots=True)
class Method:
    """One line of a table.

    Attributes:
        name: The method, with what was chosen for it.
        build: A bundle, with its first weights -> the process.
    """

    name: str
    build: Callable[[Bundle], IterativeProcess]


def accuracies(method: Method, bundle: Bundle, data: DividedData, *, rounds: int, seed: int) -> Iterator[float]:
    """Yield the accuracy on `data.test` after every round of a run.

    Args:
        method: What is run.
        bundle: The model; its first weights are drawn anew.
        data: The devices and the test set.
        rounds: How many.
        seed: Of the weights and the orders.
    """
    random = np.random.default_rng(seed)
    program, process = open_program(bundle), method.build(redrawn(bundle, random))
    with sv.use(sv.reference_executor()):
        state = process.initialize()
        for _ in range(rounds):
            examples = [_shuffled(mine, random) for mine in data.devices.values()]
            state, _ = process.next(state, examples)
            yield accuracy(program, decode_tensors(process.trained(state).initial), data.test)


def redrawn(bundle: Bundle, random: np.random.Generator) -> Bundle:
    """Return `bundle` with other first weights: Glorot-uniform kernels, as Keras draws them."""
    first = decode_tensors(bundle.initial)
    kernels = {name: value for name, value in first.items() if name.endswith("_kernel") and value.ndim > 1}
    trained = {name for result in bundle.results for name in result.updates}
    drawn = {name: _glorot(value, random) for name, value in kernels.items() if name in trained}
    return with_initial(bundle, drawn)


def with_moments(bundle: Bundle, devices: Mapping[str, Examples]) -> Bundle:
    """Return `bundle` with `mean` and `variance` of the devices' inputs, from the sums of a moments program."""
    standardise = build_standardisation(BUNDLES / f"moments_{bundle.name}.svp")
    moments = standardise([{"x": mine["x"]} for mine in devices.values()])
    return with_initial(bundle, dict(moments))


def _glorot(kernel: Array, random: np.random.Generator) -> Array:
    """Axes before the last two are taps; the last two are inputs and outputs."""
    taps = np.prod(kernel.shape[:-2])
    limit = np.sqrt(6 / (taps * (kernel.shape[-2] + kernel.shape[-1])))
    return random.uniform(-limit, limit, kernel.shape).astype(kernel.dtype)


def _shuffled(mine: Examples, random: np.random.Generator) -> Examples:
    order = random.permutation(len(mine["y"]))
    return {name: column[order] for name, column in mine.items()}
