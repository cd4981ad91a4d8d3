"""The command `scripts/bench_secagg`: what one session of secure aggregation costs, in CPU time, memory and bytes.

The real sessions of both sides run in one process, device after device, without a network. CPU time is that of this
process; the session's own work and the verification of identities (signatures and certificates) are separate lines.
Certificate chains count as cached, as on every device but in its first round; the cold figure stands beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import get_args

from rich.console import Console
from rich.table import Table

from simulation.secagg_bench_fleet import CHAINS, SIGNATURES, Meter, cold_chain_seconds, enrol
from simulation.secagg_bench_floor import device_counts, server_counts
from simulation.secagg_bench_run import (
    ENCODING,
    SESSION,
    UPLOAD,
    UPLOADS_AT_ONCE,
    Bench,
    DropStage,
    Measured,
    Options,
    Seconds,
    graph_for,
)
from sottovoce.errors import ConfigError
from sottovoce.plan import LaneName
from sottovoce.secagg.mask_removal import AT_ONCE, Spread
from sottovoce.secagg.server import STAGE_NAMES
from sottovoce.wire.messages import Cipher, Mode

_SMALLEST_ASSUMPTION = 0.05
_COLD_SAMPLE = 50
_FLOAT32_BYTES = 4
_MEGABYTE = 1e6
_WIDTH = 110
_AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Figures:
    """What is reported of one session: CPU time in ms per device and in s for the server, sizes in bytes.

    Attributes:
        neighbours, threshold: k and t.
        survivors: Devices in the sum.
        exact: Whether the unmasked sum is the plain sum.
        abandoned: Why there is no sum, or empty.
        client_ms: Stage -> line -> median over the devices that answered.
        client_session_ms: Sum of the stages' medians, without identities and quantisation.
        client_identities_ms: The same for signatures and cached certificate chains.
        client_cold_chains_ms: What the neighbours' chains cost a device that sees all of them for the first time.
        server_s: Stage -> line -> sum; `closing` holds the reconstruction and the masks.
        server_session_s: All of it without identities.
        server_identities_s: Signing and verifying messages.
        primitives_us: What one X25519 agreement, and one stream, addition and tag of a whole vector cost meanwhile.
        client_floor_ms, server_floor_s: The primitives that each side cannot do without, at those costs.
        client_over_floor, server_over_floor: The totals as multiples of them; 0 for a session without a sum.
        peak_bytes: Largest resident size of the process, all devices included.
        up_bytes, down_bytes: Median per surviving device, without the model itself.
        expansion_float32: Bytes up over the update as float32.
        expansion_input: Bytes up over the update with `bits` bits an entry.
        expansion_both_ways: Bytes up and down over the update with `bits` bits an entry.
    """

    neighbours: int
    threshold: int
    survivors: int
    exact: bool
    abandoned: str
    client_ms: Mapping[str, Seconds]
    client_session_ms: float
    client_identities_ms: float
    client_cold_chains_ms: float
    server_s: Mapping[str, Seconds]
    server_session_s: float
    server_identities_s: float
    primitives_us: Seconds
    client_floor_ms: float
    server_floor_s: float
    client_over_floor: float
    server_over_floor: float
    peak_bytes: int
    up_bytes: int
    down_bytes: int
    expansion_float32: float
    expansion_input: float
    expansion_both_ways: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if the sum was exact, 1 if it was not, 2 for options that cannot be."""
    options, file = _parse(arguments)
    console = Console(stderr=True)
    try:
        figures = measure(options)
    except ConfigError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return 2
    document = {"options": asdict(options), "figures": asdict(figures)}
    if file == "-":
        json.dump(document, sys.stdout, indent=2)
        return 0 if figures.exact else 1
    if file is not None:
        Path(file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    _show(options, figures, Console(width=_WIDTH, soft_wrap=True))
    return 0 if figures.exact else 1


def measure(options: Options) -> Figures:
    """Return what one session under `options` costs.

    Raises:
        ConfigError: There can be no such session.
    """
    meter = Meter()
    fleet = enrol(options.clients, meter, at=_AT)
    sample = [identity.certificate.der for identity in islice(fleet.devices.values(), _COLD_SAMPLE)]
    cold_s = cold_chain_seconds(fleet, sample)
    graph_for(options, options.members)  # A coordinator looks for it once, not in every session; it is remembered.
    with ThreadPoolExecutor(options.workers) as pool:
        spread = AT_ONCE if options.workers == 1 else Spread(options.workers, pool.map)
        measured = Bench(options, fleet, meter, spread).run()
    return figures_of(options, measured, cold_chain_s=cold_s)


def figures_of(options: Options, measured: Measured, *, cold_chain_s: float) -> Figures:
    """Return the figures that `measured` gives; `cold_chain_s` is the cost of one certificate never seen before."""
    client = {stage: _milliseconds(_medians(entries)) for stage, entries in measured.client.items()}
    server = {stage: {**lines, "closing": measured.closing.get(stage, 0.0)} for stage, lines in measured.server.items()}
    whole = [device for device, size in measured.up.items() if size > max(measured.up.values()) / 2]
    up = round(median(measured.up[device] for device in whole))
    down = round(median(measured.down[device] for device in whole))
    plain, packed = _FLOAT32_BYTES * options.dimension, options.bits * options.dimension / 8
    stages = [lines for stage, lines in client.items() if stage != ENCODING]
    client_ms, server_s = _total(stages, (SESSION,)), _total(server.values(), (SESSION, UPLOAD, "closing"))
    client_floor_ms, server_floor_s = _floors(options, measured)
    return Figures(
        neighbours=measured.neighbours,
        threshold=measured.threshold,
        survivors=measured.survivors,
        exact=measured.exact,
        abandoned=measured.abandoned,
        client_ms=client,
        client_session_ms=client_ms,
        client_identities_ms=_total(stages, (SIGNATURES, CHAINS)),
        client_cold_chains_ms=1000 * measured.neighbours * cold_chain_s,
        server_s=server,
        server_session_s=server_s,
        server_identities_s=_total(server.values(), (SIGNATURES, CHAINS)),
        primitives_us={name: 1e6 * seconds for name, seconds in measured.primitives.items()},
        client_floor_ms=client_floor_ms,
        server_floor_s=server_floor_s,
        client_over_floor=client_ms / client_floor_ms if measured.survivors else 0.0,
        server_over_floor=server_s / server_floor_s if measured.survivors else 0.0,
        peak_bytes=measured.peak_bytes,
        up_bytes=up,
        down_bytes=down,
        expansion_float32=up / plain,
        expansion_input=up / packed,
        expansion_both_ways=(up + down) / packed,
    )


def _floors(options: Options, measured: Measured) -> tuple[float, float]:
    """Return the floor of a device, in ms, and of the server, in s."""
    members, sharers, neighbours = options.members, options.sharers, measured.neighbours
    device = device_counts(neighbours=neighbours, sharers=neighbours * (sharers - 1) / (members - 1))
    server = server_counts(neighbours=neighbours, members=members, sharers=sharers, survivors=measured.survivors)
    return 1000 * device.floor_s(measured.primitives), server.floor_s(measured.primitives)


def _medians(entries: Sequence[Seconds]) -> Seconds:
    lines = {line for entry in entries for line in entry}
    return {line: median(entry.get(line, 0.0) for entry in entries) for line in sorted(lines)}


def _milliseconds(lines: Seconds) -> Seconds:
    return {line: 1000 * seconds for line, seconds in lines.items()}


def _total(stages: Iterable[Mapping[str, float]], lines: Sequence[str]) -> float:
    return sum(stage.get(line, 0.0) for stage in stages for line in lines)


def _parse(arguments: Sequence[str] | None) -> tuple[Options, str | None]:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_secagg",
        description="Measure one session of secure aggregation: real sessions of both sides, one process, no network.",
    )
    parser.add_argument("--clients", type=int, default=100, help="devices invited (default 100)")
    parser.add_argument("--dim", type=int, default=100_000, help="entries of the update (default 100000)")
    parser.add_argument("--dropout", type=float, default=0.0, help="share of the devices that drop out (default 0)")
    parser.add_argument("--drop-stage", choices=get_args(DropStage), default="after-keys", help="when they drop out")
    parser.add_argument("--mode", choices=get_args(Mode), default="active", help="of the session (default active)")
    parser.add_argument("--corrupt", type=float, default=0.05, help="assumed share of corrupt devices (default 0.05)")
    parser.add_argument(
        "--assumed-dropout", type=float, help="assumed share of dropouts (default: --dropout, at least 0.05)"
    )
    parser.add_argument("--graph", type=_graph, default="auto", help="auto, complete, or K neighbours on a ring")
    parser.add_argument("--lanes", choices=get_args(LaneName), default="uint32", help="width of one entry")
    parser.add_argument("--bits", type=int, default=16, help="width of one entry before summation (default 16)")
    parser.add_argument("--cipher", choices=get_args(Cipher), default="aes-128-ctr", help="of the masks")
    parser.add_argument("--workers", type=int, default=1, help="threads that take the masks off the sum (default 1)")
    parser.add_argument(
        "--uploads-at-once",
        type=_count,
        default=UPLOADS_AT_ONCE,
        help=f"masked vectors that wait for the coordinator, which takes them in a row (default {UPLOADS_AT_ONCE})",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the updates and of who drops out")
    parser.add_argument("--json", metavar="FILE", help="also write every figure there; - is standard output, alone")
    chosen = parser.parse_args(arguments)
    assumed = chosen.assumed_dropout
    options = Options(
        clients=chosen.clients,
        dimension=chosen.dim,
        dropout=chosen.dropout,
        drop_stage=chosen.drop_stage,
        mode=chosen.mode,
        corrupt=chosen.corrupt,
        assumed_dropout=max(_SMALLEST_ASSUMPTION, chosen.dropout) if assumed is None else assumed,
        lane=chosen.lanes,
        bits=chosen.bits,
        cipher=chosen.cipher,
        workers=chosen.workers,
        seed=chosen.seed,
        graph=chosen.graph,
        uploads_at_once=chosen.uploads_at_once,
    )
    return options, chosen.json


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _graph(text: str) -> str:
    if text not in ("auto", "complete") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, complete or a number of neighbours")
    return text


def _show(options: Options, figures: Figures, console: Console) -> None:
    """Print the figures for people."""
    console.print(
        f"{options.clients} devices, {options.dimension:,} entries of {options.bits} bits in {options.lane} lanes, "
        f"{options.mode} mode, k = {figures.neighbours}, t = {figures.threshold}; {options.dropouts} drop out "
        f"{options.drop_stage}, {figures.survivors} in the sum",
        highlight=False,
    )
    table = Table("CPU time", "device, ms", "  identities", "server, s", "  identities", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in [ENCODING, *STAGE_NAMES.values()]:
        device, server = figures.client_ms.get(stage, {}), figures.server_s.get(stage, {})
        if not device and not server:
            continue
        table.add_row(
            stage,
            f"{device.get(SESSION, device.get(ENCODING, 0.0)):.2f}",
            f"{_total([device], (SIGNATURES, CHAINS)):.2f}",
            f"{_total([server], (SESSION, UPLOAD, 'closing')):.3f}",
            f"{_total([server], (SIGNATURES, CHAINS)):.3f}",
        )
    table.add_row(
        f"total without {ENCODING}",
        f"{figures.client_session_ms:.2f}",
        f"{figures.client_identities_ms:.2f}",
        f"{figures.server_session_s:.3f}",
        f"{figures.server_identities_s:.3f}",
        style="bold",
    )
    table.add_row(
        "floor, by what primitives cost meanwhile",
        f"{figures.client_floor_ms:.2f}",
        "",
        f"{figures.server_floor_s:.3f}",
    )
    table.add_row("total over floor", f"{figures.client_over_floor:.2f}", "", f"{figures.server_over_floor:.2f}")
    console.print(table)
    of = {name: f"{microseconds:.1f} us" for name, microseconds in figures.primitives_us.items()}
    for line in (
        f"primitives, median of this run: X25519 {of['agreements']}; of a whole vector: {options.cipher} stream "
        f"{of['streams']}, addition {of['additions']}, tag {of['tags']}",
        "device: the median; identities: signing, and verifying signatures",
        f"certificate chains are cached; all of them cold: {figures.client_cold_chains_ms:.1f} ms more a device",
        f"bytes a device, without the model: {figures.up_bytes:,} up, {figures.down_bytes:,} down",
        f"expansion, up: {figures.expansion_float32:.3f} of float32, {figures.expansion_input:.3f} of the "
        f"{options.bits}-bit input; both ways {figures.expansion_both_ways:.3f} of the {options.bits}-bit input",
        f"peak memory of the whole process, all devices in it: {figures.peak_bytes / _MEGABYTE:,.0f} MB",
        "the sum is exact" if figures.exact else f"NO EXACT SUM {figures.abandoned}",
    ):
        console.print(line, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
