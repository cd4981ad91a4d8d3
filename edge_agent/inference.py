"""Uses what the fleet has learned: a bundle's `infer` role over a file of the device's own examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from edge_agent.example_files import measure, rows_of
from edge_agent.latest import read_latest
from edge_agent.work import check_columns
from sottovoce.bundle import Bundle, read_bundle
from sottovoce.errors import BadExamples, ConfigError
from sottovoce.runtime import RuntimeName, open_program
from sottovoce.tensors import decode_tensors
from sottovoce.types import Array

StateChoice: TypeAlias = Literal["auto", "latest", "initial"]
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Model:
    """A program with the weights that it will use.

    Attributes:
        bundle: The program.
        broadcast: One array for each broadcast port.
        origin: Where the weights come from, in words.
    """

    bundle: Bundle
    broadcast: Mapping[str, Array]
    origin: str


def load_model(path: Path, *, latest_folder: Path, choice: StateChoice = "auto") -> Model:
    """Return the model in the bundle file `path`.

    Args:
        path: A `.svp` file: the fleet's bundle, or what `coordinator model get` wrote.
        latest_folder: The device's folder of states.
        choice: `latest` is the state that the fleet has published last for this very bundle, `initial` the one inside
            the file; `auto` takes the latest if there is one.

    Raises:
        ConfigError: No such file, the program cannot infer, or no state of the fleet has arrived for it yet.
        BadBundle: It is not a bundle.
    """
    bundle, digest = read_bundle(path)
    if "infer" not in bundle.roles:
        raise ConfigError(f"{path} is no model: program {bundle.name!r} has no role `infer`")
    latest = read_latest(latest_folder, digest) if choice != "initial" else None
    if latest is not None:
        return Model(bundle, decode_tensors(latest.content), f"the fleet's state before round {latest.round}")
    if choice == "latest":
        raise ConfigError(
            f"this device has no state of the fleet for {path} yet; take part in a round, or use --state initial"
        )
    return Model(bundle, decode_tensors(bundle.initial), f"the state inside {path.name}")


def read_features(bundle: Bundle, path: Path) -> dict[str, Array]:
    """Return the columns of the file `path` that `infer` takes, checked.

    Raises:
        ConfigError: No such file, or an unknown ending.
        BadExamples: The file does not fit the program; the text names column and row.
    """
    rows = rows_of(path)
    try:
        columns = measure(rows())
        cells = [each for _, each in rows()]
        arrays = {
            name: np.array([np.asarray(each[name]) for each in cells], dtype=column.type.numpy_dtype)
            for name, column in columns.items()
        }
        features = tuple(port for port in bundle.batch if port.name in bundle.features)
        return check_columns(features, arrays)
    except BadExamples as error:
        raise BadExamples(f"{path}: {error}") from error


def predict(model: Model, features: Mapping[str, Array], *, runtime: RuntimeName) -> Iterator[dict[str, Array]]:
    """Yield the predictions of one example after the other: prediction port -> its value.

    Raises:
        ProgramError: No runtime is installed, or it cannot run the program.
    """
    program = open_program(model.bundle, runtime=runtime)
    count = len(next(iter(features.values())))
    for start in range(0, count, _BATCH):
        batch = {name: column[start : start + _BATCH] for name, column in features.items()}
        predictions = program.infer(model.broadcast, batch)
        for row in range(len(next(iter(batch.values())))):
            yield {name: values[row] for name, values in predictions.items()}
