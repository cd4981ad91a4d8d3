"""The demonstration `./scripts/demo attack`: a picture comes back out of a plain update, and not out of a masked one.

Twelve devices take part in one round of the digits task, unmodified: the real client program in the real runtime, the
real quantisation, one real session of secure aggregation in active mode. One device, the victim, has a single picture.
The same attack is made on its plain update, on its masked update, and on what is left of that when attackers who know
more and more take masks off. What is printed is measured in this run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from coordinator.hosted import hosted_program
from coordinator.requests import plan_of
from coordinator.task import read_task
from coordinator.terms import SecAggTerms
from edge_agent.policy import Policy, client_terms
from edge_agent.work import prepare
from simulation.attack import correlations, largest_by_chance, reconstruct
from simulation.attack_report import AttackReport, Bounds, Finding, draw, findings_table
from simulation.attack_session import COORDINATOR, Record, enrol, hold_session, without_known_masks
from simulation.datasets import Examples, digits
from simulation.report import write_report
from sottovoce.blobs import DEFAULT_CHUNK_BYTES, digest_of
from sottovoce.bundle import Bundle, decode_bundle
from sottovoce.errors import ConfigError
from sottovoce.identity import SignedContext
from sottovoce.plan import Plan
from sottovoce.runtime import Program, open_program
from sottovoce.secagg.client import ClientSession
from sottovoce.secagg.encoding import encode
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.secagg.segments import add_into
from sottovoce.secagg.server import ServerSession
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.types import Array, TensorType
from sottovoce.wire.messages import SecAggParameters

HERE = Path(__file__).resolve().parent
FLEET = "demo"
DEFAULT_DEVICES = 12
_BASIS_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the digits task and what came of it.

    Attributes:
        layout: Of the masked vector.
        picture: What the victim has trained on, float32 [pixels].
        digit: Which digit it shows.
        victim: Its device id.
        plain: The victim's quantised vector before it was masked: what a fleet without masks would have sent.
        plain_total: The plain sum of all devices' vectors.
        record: What the coordinator and the captured devices know.
    """

    layout: Layout
    picture: Array
    digit: int
    victim: str
    plain: bytes
    plain_total: bytes
    record: Record


def main(options: argparse.Namespace, console: Console) -> AttackReport:
    """Run `./scripts/demo attack` with the options of `simulation.demo`; raises what `run_attack` raises."""
    return run_attack(
        seed=options.seed,
        image_path=options.plot or Path("demo-attack.png"),
        console=console,
        devices=options.devices or DEFAULT_DEVICES,
        report_path=options.report,
    )


def run_attack(
    *,
    seed: int,
    image_path: Path,
    console: Console,
    devices: int = DEFAULT_DEVICES,
    report_path: Path | None = None,
) -> AttackReport:
    """Run the demonstration, print what it found, draw the picture; return the numbers.

    Args:
        seed: Of the division of the digits and the choice of the victim's picture. No secret depends on it.
        image_path: Where the PNG goes.
        console: Where the text goes.
        devices: Members of the session.
        report_path: Where the JSON goes, if it is wanted.

    Raises:
        ConfigError: Too few devices.
        ClaimFailed: Something that is said here did not come out; the picture and the numbers are there all the same.
    """
    started = time.monotonic()
    console.print(f"[bold]what one update gives away: {devices} devices, one of them has a single picture[/bold]\n")
    with console.status("the devices train, and hold one session of secure aggregation"):
        report = attack_round(hold_round(seed=seed, devices=devices))
    report = msgspec.structs.replace(report, seconds_total=time.monotonic() - started)
    draw(report, image_path)
    _print(report, console)
    console.print(f"\npicture: {image_path}")
    if report_path is not None:
        write_report(report, report_path)
        console.print(f"report: {report_path}")
    report.check()
    return report


def hold_round(*, seed: int, devices: int = DEFAULT_DEVICES) -> Round:
    """Let every device train and all of them sum their updates; capture all but the victim and one honest device.

    Raises:
        ConfigError: Too few devices for the devices' own default policy.
    """
    fewest = Policy().minimum_cohort
    if devices < fewest:
        raise ConfigError(f"--devices {devices}: a device takes part in rounds of at least {fewest}; ask for more")
    given = _digits_program(devices)
    examples = _divided(seed, devices)
    layout = layout_of(given.plan, maximum_clients=devices)
    runtime = open_program(given.bundle)
    plain = {device: _plain_update(given, runtime, layout, mine) for device, mine in examples.items()}
    total = bytearray(layout.unpacked_bytes)
    for vector in plain.values():
        add_into(total, vector, layout)
    victim, _honest, *captured = plain
    kept = bytes(plain[victim])
    record = _hold_session(given, layout, plain, captured)
    return Round(layout, examples[victim]["x"][0], int(examples[victim]["y"][0]), victim, kept, bytes(total), record)


def attack_round(round_: Round) -> AttackReport:
    """Make the same attack with what each attacker has; `seconds_total` is left at 0."""
    record, victim = round_.record, round_.victim
    cohort, held = record.cohort, sorted(record.captured)
    threshold, others = cohort.shape.threshold, len(cohort.members) - 1

    def conspiring(count: int) -> bytearray:
        return without_known_masks(record, victim, held=held[:count], pool_shares=True)

    shown = reconstruct(*_first_layer(round_.layout, round_.plain))
    entries = _entries(round_.layout, round_.plain).size
    return AttackReport(
        devices=len(cohort.members),
        threshold=threshold,
        entries=entries,
        digit=round_.digit,
        original=[float(value) for value in round_.picture],
        plain=_finding(round_, "one plain update", round_.plain),
        masked=_finding(round_, "the masked update", record.masked[victim]),
        one_mask_left=_finding(
            round_,
            f"all masks off but one ({len(held)} of {others})",
            without_known_masks(record, victim, held=held, pool_shares=False),
        ),
        below_threshold=_finding(round_, _conspiracy(threshold - 1), conspiring(threshold - 1)),
        at_threshold=_finding(round_, _conspiracy(threshold), conspiring(threshold)),
        bounds=Bounds(
            correlation=largest_by_chance(shown.picture.size),
            closest_unit=largest_by_chance(shown.picture.size, attempts=len(shown.of_every_unit)),
            whole_update=largest_by_chance(entries),
        ),
        sum_is_exact=record.total == round_.plain_total,
        seconds_total=0.0,
    )


# --- the round --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Given:
    """What the coordinator gives to every device.

    Attributes:
        plan: The plan.
        bundle: The client program.
        broadcast: The model.
        assumed: What the plan's task assumes of the fleet.
    """

    plan: Plan
    bundle: Bundle
    broadcast: Mapping[str, Array]
    assumed: SecAggTerms


def _digits_program(devices: int) -> _Given:
    """Return the digits task as it is, for a cohort of `devices`."""
    task = read_task((HERE / "tasks" / "digits.toml").read_text(), where="digits.toml")
    cohort = msgspec.structs.replace(task.cohort, goal=devices)
    task = msgspec.structs.replace(task, cohort=cohort)
    program = hosted_program(task, (HERE / "bundles" / "digits.svp").read_bytes())
    request = program.request_at(0, program.first_state)
    plan = plan_of(request, task.terms, fleet=FLEET, chunk_bytes=DEFAULT_CHUNK_BYTES)
    return _Given(plan, decode_bundle(request.bundle), decode_tensors(request.broadcast), task.secagg)


def _divided(seed: int, devices: int) -> dict[str, Examples]:
    """Return every device's examples; the first device, the victim, is left with one picture."""
    examples = digits(devices=devices, seed=seed).devices
    victim = next(iter(examples))
    row = np.random.default_rng(seed).integers(len(examples[victim]["y"]))
    return {**examples, victim: {name: column[row : row + 1] for name, column in examples[victim].items()}}


def _plain_update(given: _Given, runtime: Program, layout: Layout, examples: Examples) -> bytearray:
    """Return what a device would send without masks: trained as an agent trains, encoded as an agent encodes."""
    work = prepare(runtime, given.bundle, given.plan.work, broadcast=given.broadcast, examples=examples)
    state = work.start(os.urandom)
    while not work.is_done(state):
        state = work.advance(state)
    result = work.result(state)
    summed = {each.name: result.values[each.name] for each in given.plan.aggregations}
    return encode(layout, summed, weight=result.weight, entropy=os.urandom)


def _hold_session(given: _Given, layout: Layout, plain: Mapping[str, bytearray], captured: Sequence[str]) -> Record:
    """Hold one session over the `plain` vectors; each is masked in place."""
    plan, state = given.plan.digest, digest_of(encode_tensors(given.broadcast))
    parameters = _parameters(given, layout, len(plain))
    with tempfile.TemporaryDirectory(prefix="sottovoce-attack-") as folder:
        fleet = enrol(plain.keys(), Path(folder) / "ca", fleet=FLEET, at=datetime.datetime.now(datetime.UTC))
    context = SignedContext(COORDINATOR, "all", FLEET)
    server = ServerSession(
        context=context, plan=plan, state=state, parameters=parameters, expected=plain.keys(), entropy=os.urandom
    )
    clients = {
        device: ClientSession(
            identity=fleet.devices[device],
            anchor=fleet.anchor,
            at=fleet.at,
            context=SignedContext(device, COORDINATOR, FLEET),
            plan=plan,
            state=state,
            parameters=parameters,
            upload_key=server.invitation.upload_key,
            terms=client_terms(Policy()),
            vector=vector,
            entropy=os.urandom,
        )
        for device, vector in plain.items()
    }
    return hold_session(fleet, clients, server, parameters=parameters, captured=captured)


def _parameters(given: _Given, layout: Layout, devices: int) -> SecAggParameters:
    terms = given.assumed
    return SecAggParameters(
        mode="active",
        cipher="aes-128-ctr",
        minimum_survivors=given.plan.privacy.minimum_cohort,
        maximum_clients=devices,
        corrupt_share_bp=round(terms.corrupt_share * _BASIS_POINTS),
        dropout_share_bp=round(terms.dropout_share * _BASIS_POINTS),
        vector_bytes=layout.vector_bytes,
        wide_bytes=layout.wide_bytes,
        packed=layout.packed,
    )


# --- the attack -------------------------------------------------------------------------------------------------------


def _conspiracy(count: int) -> str:
    return f"the server and {count} devices conspire"


def _finding(round_: Round, attacker: str, vector: bytes | bytearray) -> Finding:
    """Attack `vector`, and compare what comes out with what the victim really trained on and would have sent."""
    found = reconstruct(*_first_layer(round_.layout, vector))
    everywhere = correlations(_entries(round_.layout, vector), _entries(round_.layout, round_.plain))
    return Finding(
        attacker=attacker,
        picture=[float(value) for value in found.picture],
        correlation=float(correlations(found.picture, round_.picture)[0, 0]),
        closest_unit=float(np.abs(correlations(found.of_every_unit, round_.picture)).max()),
        whole_update=float(everywhere[0, 0]),
    )


def _entries(layout: Layout, vector: bytes | bytearray) -> Array:
    """Return the model update's integers in `vector`, float64, about their zero; their scale does not matter here."""
    lane = layout.lanes[0]
    return lane.entries(vector) - lane.aggregation.encoding.maximum / 2


def _first_layer(layout: Layout, vector: bytes | bytearray) -> tuple[Array, Array]:
    """Return the updates of the first layer's weights [pixels, units] and biases [units] in `vector`."""
    kernel, bias = (TensorType.parse(notation) for notation in layout.lanes[0].aggregation.tensors[:2])
    entries = _entries(layout, vector)
    return entries[: kernel.size].reshape(kernel.shape), entries[kernel.size :][: bias.size]  # type: ignore[arg-type]


def _print(report: AttackReport, console: Console) -> None:
    for sentence in report.sentences:
        console.print(f"{sentence}\n", highlight=False)
    console.print(
        "correlation with the truth: of the picture found, of the closest of all hidden\nunits, of the whole update"
    )
    console.print(findings_table(report))
    console.print(f"\n[dim]{report.limit}[/dim]", highlight=False)
    exact = "is exact" if report.sum_is_exact else "is WRONG"
    console.print(
        f"\nactive mode, {report.devices} devices, the unmasked sum {exact}, {report.seconds_total:.1f} s in all"
    )
