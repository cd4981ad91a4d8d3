"""Data divided among devices: scikit-learn's digits, real people's movements (HAR), and MNIST.

No constant of any data set is here; inputs are standardised by a masked round (see `coordinator.task`).

    python -m simulation.datasets --devices 3 --out DIR      writes the digits of three devices as CSV files
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sottovoce.errors import ConfigError
from sottovoce.types import Array

DATA_VARIABLE = "SOTTOVOCE_DATA"
"""Names the folder of the data sets that are too large to come with the project."""
MNIST_FILE = Path("mnist") / "mnist.npz"
_BRIGHTEST = np.float32(255)

Examples = dict[str, Array]


@dataclass(frozen=True, slots=True)
class DividedData:
    """Examples by device, and a test set that no device has.

    Attributes:
        devices: Device id -> columns `x` and `y` with equal first dimension.
        test: The same columns, held out.
    """

    devices: dict[str, Examples]
    test: Examples

    def pooled(self) -> Examples:
        """Return all devices' examples together, for the comparison that a fleet never makes."""
        return {name: np.concatenate([mine[name] for mine in self.devices.values()]) for name in ("x", "y")}


def digits(*, devices: int, seed: int, concentration: float = 0.5, fewest: int = 10) -> DividedData:
    """Return scikit-learn's 1,797 digits: a stratified fifth for the test, the rest divided unevenly.

    Each class is divided over the devices by its own Dirichlet draw, so devices differ in size and in classes.

    Args:
        devices: How many devices, at least 1.
        seed: Of the split and the division; the same seed gives the same devices.
        concentration: Parameter of the Dirichlet distribution; smaller is more uneven.
        fewest: Every device has at least this many examples; the division is drawn anew until it holds.

    Raises:
        ConfigError: There are not enough examples for so many devices.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x, y = bunch.data.astype(np.float32), bunch.target.astype(np.int32)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        parts = _dirichlet_parts(y_train, devices, concentration, rng)
        if min(map(len, parts)) >= fewest:
            names = device_names(devices)
            mine = {name: {"x": x_train[rows], "y": y_train[rows]} for name, rows in zip(names, parts, strict=True)}
            return DividedData(mine, {"x": x_test, "y": y_test})
    raise ConfigError(f"{len(y_train)} examples cannot give {devices} devices {fewest} each; use fewer devices")


def digits_by_label(*, devices: int, seed: int, classes: int = 2) -> DividedData:
    """Return scikit-learn's digits divided by label: a device sees `classes` of the ten digits, or one more.

    The training examples are sorted by label and cut into devices * `classes` shards of equal length, which are dealt
    out (McMahan et al. 2017, section 3). A shard may straddle two labels.

    Args:
        devices: How many devices, at least 1.
        seed: Of the split and of the dealing.
        classes: Shards a device gets, at least 1.
    """
    whole = digits(devices=1, seed=seed)
    x, y = (whole.devices["pi-01"][name] for name in ("x", "y"))
    shards = np.array_split(np.argsort(y, kind="stable"), devices * classes)
    dealt = np.random.default_rng(seed).permutation(len(shards)).reshape(devices, classes)
    hands = [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]
    names = device_names(devices)
    mine = {name: {"x": x[rows], "y": y[rows]} for name, rows in zip(names, hands, strict=True)}
    return DividedData(mine, whole.test)


def people(path: Path) -> DividedData:
    """Return the movements in `har.npz`, one device for every training person, tested on the people held out.

    Args:
        path: An .npz with `x` int16 [n,128,9], `scale` float [9], `y` [n], `subject` [n] and `test` [n] (bool).

    Raises:
        ConfigError: The file is missing, or is not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            x = (stored["x"] * stored["scale"]).astype(np.float32)
            y, subject, held_out = stored["y"].astype(np.int32), stored["subject"], stored["test"].astype(bool)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is not a HAR file with x, scale, y, subject and test: {error}") from error
    training = sorted(set(subject[~held_out].tolist()))
    mine = {f"person-{p:02d}": {"x": x[subject == p], "y": y[subject == p]} for p in training}
    return DividedData(mine, {"x": x[held_out], "y": y[held_out]})


def mnist(path: Path, *, devices: int, examples: int, seed: int) -> DividedData:
    """Return MNIST dealt out at random, the same number of examples to every device.

    Args:
        path: An .npz with `x_train` and `x_test` uint8 [n,28,28], `y_train` and `y_test` [n].
        devices: How many.
        examples: Of each device.
        seed: Of the dealing; the same seed gives the same devices.

    Raises:
        ConfigError: There is no such file, it is not such a file, or it has too few examples.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            x, y, x_test, y_test = (stored[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no {path}: name the file with --data FILE, or in {DATA_VARIABLE} the folder that has "
            f"{MNIST_FILE}; it is the .npz that Keras downloads, with x_train, y_train, x_test and y_test"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is not an .npz with x_train, y_train, x_test and y_test: {error}") from error
    if devices * examples > len(y):
        raise ConfigError(f"{path} has {len(y)} examples, too few for {devices} devices with {examples} each")
    dealt = np.random.default_rng(seed).permutation(len(y))[: devices * examples].reshape(devices, examples)
    mine = {name: _scaled(x[rows], y[rows]) for name, rows in zip(device_names(devices), dealt, strict=True)}
    return DividedData(mine, _scaled(x_test, y_test))


def device_names(count: int) -> list[str]:
    """Return `count` device ids: pi-01, pi-02, ..."""
    return [f"pi-{i:02d}" for i in range(1, count + 1)]


def _scaled(pictures: Array, labels: Array) -> Examples:
    return {"x": (pictures / _BRIGHTEST).astype(np.float32), "y": labels.astype(np.int32)}


def _dirichlet_parts(labels: Array, devices: int, concentration: float, rng: np.random.Generator) -> list[Array]:
    parts: list[list[int]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(devices, concentration))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(chunk.tolist())
    return [np.asarray(sorted(part), dtype=np.int64) for part in parts]


def write_csv(examples: Examples, path: Path) -> None:
    """Write `examples` as a CSV file that `edge-agent import` reads: columns x[0], x[1], ... and y."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"x[{i}]" for i in range(examples["x"].shape[1])), "y"])
        writer.writerows([*x, y] for x, y in zip(examples["x"].tolist(), examples["y"].tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the digits, divided among devices, as one CSV file for each."""
    parser = argparse.ArgumentParser(prog="python -m simulation.datasets", description=main.__doc__)
    parser.add_argument("--devices", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pi-01.csv, pi-02.csv, ...")
    parser.add_argument("--seed", type=int, default=1, help="of the division (default: 1)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for device, examples in digits(devices=options.devices, seed=options.seed).devices.items():
        write_csv(examples, options.out / f"{device}.csv")


if __name__ == "__main__":
    main()
