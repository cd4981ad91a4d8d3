"""Lowered computations: told in plain words, saved to a file, loaded and run where TensorFlow cannot be imported."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sottovoce as sv
from sottovoce.errors import ConfigError
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.lowered import Lowered
from sottovoce.language.lowering import lower
from sottovoce.language.ports import RoundSums
from sottovoce.language.saved import decode_lowered, encode_lowered, load_lowered
from sottovoce.tensors import decode_tensors

ROOT = Path(__file__).resolve().parents[3]


@sv.tf_computation("float32", "float32")
def exceeds(reading, threshold):
    return reading > threshold


@sv.tf_computation("float32", "float32")
def scaled(x, by):
    return {"value": x * by, "by": by}


@sv.federated_computation("{float32}@CLIENTS", "float32@SERVER")
def fraction_over(readings, threshold):
    """Which part of the devices reads more than twice the threshold.

    More for the author.
    """
    limit = sv.federated_map(scaled, (threshold, sv.federated_value(2.0, sv.SERVER))).value
    above = sv.federated_map(exceeds, (readings, sv.federated_broadcast(limit)))
    mean = sv.federated_mean(sv.federated_map(sv.cast("float32"), above))
    return {"fraction": mean, "scaled": sv.federated_map(scaled, (mean, threshold))}


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return lower(fraction_over)


def test_the_plan_in_the_words_of_a_devices_owner(lowered: Lowered) -> None:
    assert lowered.describe(collection="temperature", minimum_cohort=10) == (
        "fraction_over: Which part of the devices reads more than twice the threshold.\n"
        "\n"
        "Reads on this device:\n"
        "  the newest example of the collection 'temperature': readings (float32)\n"
        "\n"
        "Receives:\n"
        f"  a client program of {len(lowered.bundle) / 1000:.0f} kB, the same in every round, and 4 bytes from the "
        "server (threshold)\n"
        "\n"
        "Computes on this device:\n"
        "  exceeds(readings, scaled(threshold, 2.0).value)\n"
        "\n"
        "Sends, masked, for sums over all devices:\n"
        "  the average of exceeds(readings, scaled(threshold, 2.0).value): one number between 0 and 1, rounded at "
        "random to steps of 4.7e-10\n"
        "\n"
        "Devices in every sum:\n"
        "  at least 10\n"
        "\n"
        "Sees this device's own values:\n"
        "  nobody: only the sum over all devices is ever unmasked\n"
    )


def test_plan_of_a_computation_names_what_every_sum_is() -> None:
    @sv.federated_computation("{<a=float32,b=int32>*}@CLIENTS")
    def totals(rows):
        return sv.federated_sum(sv.sequence_sum(rows), bound=(0, 100))

    told = totals.plan()
    assert "all examples of one collection of examples: a (float32), b (int32)" in told
    assert "the sum of sum of all rows: one number between 0 and 100, rounded at random to steps of 4.7e-08; " in told
    assert "one number between 0 and 100, exact" in told
    assert "at least 3; more where the fleet or this device's own policy asks for more" in told


def test_a_plan_names_the_collection_of_the_call_that_is_meant() -> None:
    told = fraction_over.plan(sv.latest("temperature"), 21.0)
    assert "the newest example of the collection 'temperature': readings (float32)" in told
    two = sv.federated_computation("{float32}@CLIENTS", "{float32}@CLIENTS")(
        lambda x, y: (sv.federated_sum(x, bound=(0, 1)), sv.federated_sum(y, bound=(0, 1)))
    )
    with pytest.raises(ConfigError, match="would read the collections 'indoors' and 'outdoors'; a computation reads"):
        two.plan(sv.latest("indoors"), sv.latest("outdoors"))


def test_a_saved_computation_is_the_same_and_gives_the_same(
    lowered: Lowered, tmp_path: Path, fleet: FleetExecutor, plain_rounds: Any
) -> None:
    lowered.save(tmp_path / "fraction.svc")
    loaded = load_lowered(tmp_path / "fraction.svc")
    assert loaded.describe() == lowered.describe()
    assert str(loaded.signature) == str(fraction_over.type_signature)
    assert encode_lowered(loaded) == encode_lowered(lowered)
    arguments = {"readings": tuple(map(np.float32, (1, 5, 9))), "threshold": np.float32(3)}
    assert loaded.request(arguments) == lowered.request(arguments)
    result = loaded.result(arguments, plain_rounds.run(loaded.request(arguments)))
    assert result.fraction == pytest.approx(1 / 3)
    assert result.scaled.value == pytest.approx(1.0)
    with sv.use(fleet):
        assert fraction_over([1, 5, 9], 3).fraction == pytest.approx(1 / 3)


_WITHOUT_TENSORFLOW = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "models"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refused())
import numpy as np
from sottovoce.language.ports import RoundSums
from sottovoce.language.saved import load_lowered
from sottovoce.tensors import decode_tensors

lowered = load_lowered(sys.argv[1])
arguments = {"readings": (np.float32(1),) * 3, "threshold": np.float32(3)}
request = lowered.request(arguments)
print({name: array.tolist() for name, array in decode_tensors(request.broadcast).items()})
sums = RoundSums(sums={"mean": [np.array([2.0])]}, weight=4, survivors=4, clamped=0, round=1)
print(lowered.result(arguments, sums))
print(lowered.describe().splitlines()[0])
"""


def test_a_saved_computation_runs_where_tensorflow_cannot_be_imported(lowered: Lowered, tmp_path: Path) -> None:
    lowered.save(tmp_path / "fraction.svc")
    command = [sys.executable, "-c", _WITHOUT_TENSORFLOW, str(tmp_path / "fraction.svc")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'broadcast_0_0': [6.0]}",
        "<fraction=np.float32(0.5),scaled=<value=np.float32(1.5),by=np.float32(3.0)>>",
        "fraction_over: Which part of the devices reads more than twice the threshold.",
    ]


_DIGEST = """
import hashlib, sys
import sottovoce as sv
import tensorflow as tf
from sottovoce.language.lowering import lower
from sottovoce.language.saved import encode_lowered

square = sv.tf_computation("float32")(lambda x: x * x)
decayed = sv.tf_computation("float32", "float32")(lambda total, x: total * 0.5 + x)
table = sv.tf_computation("float32")(lambda x: tf.gather(tf.constant([1.0, 2.0]), tf.cast(x > 0, tf.int32)))

@sv.federated_computation("{float32*}@CLIENTS", "float32@SERVER")
def computed(x, first):
    rows = sv.sequence_map(square, x)
    total = sv.federated_sum(sv.sequence_sum(rows), bound=(0, 9))
    fold = sv.federated_map(lambda s, zero: sv.sequence_reduce(s, zero, decayed), (x, sv.federated_broadcast(first)))
    return total, sv.federated_map(square, sv.federated_mean(sv.federated_map(table, fold), bound=(0, 9)))

print(hashlib.sha256(encode_lowered(lower(computed))).hexdigest())
"""


def test_two_processes_lower_to_the_same_bytes() -> None:
    environments = [{**os.environ, "PYTHONHASHSEED": seed, "TF_CPP_MIN_LOG_LEVEL": "3"} for seed in ("1", "2")]
    digests = []
    for environment in environments:
        command = [sys.executable, "-c", _DIGEST]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        digests.append(done.stdout)
    assert digests[0] == digests[1] != ""


def test_python_at_the_server_runs_but_cannot_be_saved(fleet: FleetExecutor, tmp_path: Path) -> None:
    @sv.server_computation("float32", result="float32")
    def doubled(x):
        return x * 2

    @sv.federated_computation("{float32}@CLIENTS")
    def computed(x):
        return sv.federated_map(doubled, sv.federated_mean(x, bound=(0, 10)))

    with sv.use(fleet):
        assert computed([1.0, 2.0, 3.0]) == pytest.approx(4.0)
    advice = r"test_lowered.py:\d+: doubled is Python code of this process .* cannot be saved. Write it in TensorFlow"
    with pytest.raises(ConfigError, match=advice):
        computed.save(tmp_path / "computed.svc")
    assert not (tmp_path / "computed.svc").exists()


def test_no_file_and_a_damaged_file_are_told_apart(tmp_path: Path, lowered: Lowered) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.svc: No such file"):
        load_lowered(tmp_path / "nowhere.svc")
    with pytest.raises(ConfigError, match=r"cannot write .*"):
        lowered.save(tmp_path / "no folder" / "x.svc")
    (tmp_path / "damaged.svc").write_bytes(encode_lowered(lowered)[:-3])
    with pytest.raises(ConfigError, match="not a lowered computation of this version"):
        load_lowered(tmp_path / "damaged.svc")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "sottovoce-computation/0"),
        (["members"], [7]),
        (["words"], []),
        (["recipes", 0, "summands", 0, "index"], 9),
        (["recipes", 0, "summands", 0, "bound", "low"], 7.0),
        (["recipes", 0, "type"], "<float32,float32>"),
        (["broadcast", 0, 1], "float32[2]"),
        (["after", "result"], 99),
        (["after", "steps", 0, "operator"], "literal"),
        (["after", "steps", 2, "inputs"], [5]),
        (["after", "steps", 2, "type"], "float31"),
        (["after", "steps", 2, "operator"], "federated_min"),
        (["after", "steps", -1, "type"], "<float32,float32>"),
        (["before", "steps", 1, "type"], "float32[2]"),
        (["before", "steps", 3, "functions", 0, "parameter"], "float32"),
        (["before", "steps", 4, "index"], 2),
        (["before", "parameters", 0, 1], "int32"),
        (["unheard"], 1),
        (["members"], []),
        (["name"], "\x1b[2J"),
        (["work", "epochs"], 0),
        (["aggregations", 0, "encoding", "bits"], 0),
        (["columns"], []),
        (["parameters", 1, 0], "readings"),
        (["parameters", 0, 1], "float32@SERVER"),
        (["recipes", 0, "weight_cap"], 0.0),
        (["recipes", 0, "kind"], "weighted_mean"),
        (["recipes", 0, "summands", 0, "offset"], math.nan),
        (["recipes", 0, "summands", 0, "error"], -1.0),
        (["aggregations", 0, "tensors"], ["float32[2]"]),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(lowered: Lowered, path: list[Any], value: object) -> None:
    document = msgspec.msgpack.decode(encode_lowered(lowered))
    part = document
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ConfigError, match="not a lowered computation of this version: "):
        decode_lowered(msgspec.msgpack.encode(document))


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_any_bytes_are_a_computation_or_a_clear_error(at: int, byte: int, cut: int) -> None:
    content = bytearray(_CONTENT[: 1 + cut % len(_CONTENT)] if cut % 3 == 0 else _CONTENT)
    content[at % len(content)] = byte
    refusal = _refusal_of(bytes(content))
    assert refusal is None or refusal.startswith("not a lowered computation of this version: ")


def _refusal_of(content: bytes) -> str | None:
    try:
        decode_lowered(content)
    except ConfigError as error:
        return str(error)
    return None


_CONTENT = encode_lowered(
    lower(sv.federated_computation("float32@SERVER")(lambda x: sv.federated_map(sv.clip(0, 1), (x, x))))
)


def test_a_result_that_is_computed_from_sums_has_no_error_bound(lowered: Lowered) -> None:
    fraction, value, by = lowered.errors(20)
    assert fraction is not None
    assert 0 < fraction < 1e-6
    assert (value, by) == (None, None)


def test_a_request_on_devices_carries_no_members(lowered: Lowered) -> None:
    request = lowered.request({"readings": sv.latest("temperature"), "threshold": np.float32(1)}, key="k")
    assert (request.collection, request.members, request.key) == ("temperature", (), "k")
    assert (request.name, request.purpose) == (
        "fraction_over",
        "Which part of the devices reads more than twice the threshold.",
    )
    assert decode_tensors(request.broadcast)["broadcast_0_0"].tolist() == [2.0]


def test_sums_come_back_as_values_of_the_declared_types(lowered: Lowered) -> None:
    sums = RoundSums(sums={"mean": [np.array([3.0])]}, weight=4, survivors=4, clamped=0, round=1)
    result = lowered.result({"threshold": np.float32(1)}, sums)
    assert result.fraction == np.float32(0.75)
    assert result.fraction.dtype == np.float32
