"""The benchmark runs real sessions: what it reports is checked against what such a session must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulation.secagg_bench import figures_of, main, measure
from simulation.secagg_bench_fleet import CHAINS, SIGNATURES, Meter
from simulation.secagg_bench_run import ENCODING, SESSION, UPLOAD, Measured, Options, graph_for
from sottovoce.errors import ConfigError
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.server import STAGE_NAMES


def options(**changes: Any) -> Options:
    settings: dict[str, Any] = {
        "clients": 12,
        "dimension": 500,
        "dropout": 0.25,
        "drop_stage": "after-keys",
        "mode": "active",
        "corrupt": 0.05,
        "assumed_dropout": 0.25,
        "lane": "uint32",
        "bits": 16,
        "cipher": "aes-128-ctr",
        "workers": 1,
        "seed": 3,
    }
    return Options(**(settings | changes))


@pytest.mark.parametrize("mode", ["active", "curious"])
@pytest.mark.parametrize(
    ("drop_stage", "survivors"),
    [("before-keys", 9), ("after-advertising", 9), ("after-keys", 9), ("after-input", 12)],
)
def test_the_sum_is_exact_whenever_devices_drop_out(mode: str, drop_stage: str, survivors: int) -> None:
    figures = measure(options(mode=mode, drop_stage=drop_stage))
    assert (figures.exact, figures.survivors, figures.abandoned) == (True, survivors, "")
    members = 9 if drop_stage == "before-keys" else 12
    assert figures.neighbours == members - 1
    stages = set(STAGE_NAMES.values()) - ({"consistency_check"} if mode == "curious" else set())
    assert figures.client_ms.keys() == stages | {ENCODING}
    assert figures.server_s.keys() == stages
    assert all(lines[SESSION] > 0 and lines[SIGNATURES] > 0 for lines in figures.server_s.values())
    assert figures.server_s["masked_input"][UPLOAD] > 0
    assert figures.client_ms["share_keys"][CHAINS] > 0
    assert figures.client_cold_chains_ms > figures.client_ms["share_keys"][CHAINS]


@pytest.mark.parametrize("mode", ["active", "curious"])
def test_a_cohort_beyond_the_complete_graph_masks_on_a_ring(mode: str) -> None:
    figures = measure(options(clients=204, dimension=64, mode=mode, dropout=0.05, assumed_dropout=0.05))
    assert (figures.exact, figures.survivors) == (True, 194)
    assert figures.threshold < figures.neighbours < 80


@pytest.mark.parametrize(("lane", "bits"), [("uint16", 8), ("3x21", 16), ("dense", 12)])
def test_every_lane_gives_an_exact_sum_and_fewer_bytes(lane: str, bits: int) -> None:
    narrow, plain = measure(options(lane=lane, bits=bits)), measure(options(bits=bits))
    assert narrow.exact
    assert narrow.up_bytes < plain.up_bytes


@pytest.mark.parametrize("workers", [2, 5, 20])
def test_masks_taken_off_by_several_threads_leave_the_same_sum(workers: int) -> None:
    figures = measure(options(workers=workers, mode="curious"))
    assert (figures.exact, figures.survivors) == (True, 9)


def test_too_many_dropouts_are_reported_with_their_reason() -> None:
    figures = measure(options(dropout=0.5))
    assert (figures.exact, figures.survivors) == (False, 0)
    assert figures.abandoned.startswith("too_few_devices")
    assert figures.client_over_floor == figures.server_over_floor == 0


def test_bytes_are_those_that_a_device_sends() -> None:
    figures = measure(options(dimension=100_000, dropout=0.0))
    assert 4 * 100_000 < figures.up_bytes < 4 * 100_000 + 10_000
    assert figures.expansion_float32 == figures.up_bytes / 400_000
    assert figures.expansion_input == 2 * figures.expansion_float32
    assert figures.expansion_both_ways == (figures.up_bytes + figures.down_bytes) / 200_000


def test_figures_are_medians_per_device_and_sums_for_the_server() -> None:
    measured = Measured(neighbours=10, threshold=6, survivors=3, exact=True)
    for device, seconds in (("a", 0.001), ("b", 0.002), ("c", 0.009)):
        measured.client["share_keys"].append({SESSION: seconds, SIGNATURES: 0.5 * seconds})
        measured.up[device], measured.down[device] = 1000, 100
    measured.client[ENCODING].append({ENCODING: 5.0})
    measured.server["share_keys"].update({SESSION: 0.25, SIGNATURES: 0.5})
    measured.closing["share_keys"] = 0.125
    measured.primitives = {"agreements": 1e-5, "streams": 2e-5, "additions": 1e-6, "tags": 0.0}
    figures = figures_of(options(dimension=100, bits=8), measured, cold_chain_s=0.0001)
    assert (figures.client_session_ms, figures.client_identities_ms) == (2.0, 1.0)
    assert figures.primitives_us["streams"] == pytest.approx(20)
    assert figures.client_floor_ms == pytest.approx(21 * 0.01 + 11 * 0.021)
    assert figures.client_over_floor == pytest.approx(2.0 / figures.client_floor_ms)
    assert figures.server_over_floor == pytest.approx(0.375 / figures.server_floor_s)
    assert figures.client_cold_chains_ms == pytest.approx(1.0)
    assert (figures.server_session_s, figures.server_identities_s) == (0.375, 0.5)
    assert (figures.expansion_float32, figures.expansion_input, figures.expansion_both_ways) == (2.5, 10.0, 11.0)


def test_graphs_can_be_chosen() -> None:
    assert graph_for(options(mode="curious", assumed_dropout=0.05), 1000) == GraphParameters(30, 17)
    assert graph_for(options(mode="curious", assumed_dropout=0.05, graph="complete"), 1000) == GraphParameters(999, 500)
    chosen = graph_for(options(mode="curious", assumed_dropout=0.05, graph="40"), 1000)
    assert chosen.neighbours == 40
    with pytest.raises(ConfigError, match="even"):
        graph_for(options(graph="41"), 1000)
    with pytest.raises(ConfigError, match="too few"):
        graph_for(options(graph="4"), 1000)


def test_an_inner_line_stops_the_outer_one() -> None:
    meter = Meter()
    with meter.line("outer"):
        sum(range(1000))
        with meter.line("inner"):
            sum(range(1_000_000))
    seconds = meter.take()
    assert seconds.keys() == {"outer", "inner"}
    assert 0 < seconds["outer"] < seconds["inner"]
    assert meter.take() == {}


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--clients", "10", "--dim", "100", "--dropout", "0.1", "--mode", "curious", "--json", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the sum is exact" in printed
    assert "total over floor" in printed
    assert "X25519" in printed
    assert "k = 9, t = 5" in printed
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["options"]["assumed_dropout"] == 0.1
    assert document["figures"]["survivors"] == 9
    assert main([*arguments[:-1], "-"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["exact"] is True


def test_what_cannot_be_is_an_error_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clients", "2", "--dim", "10"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["--clients", "8", "--dim", "10", "--dropout", "0.6"]) == 1
    with pytest.raises(SystemExit):
        main(["--graph", "star"])
