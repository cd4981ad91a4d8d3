"""What the owner sees of a device: who it is, what it allows, what it holds, and what has left it. Reads only."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import msgspec

from edge_agent.client_states import kept_slots
from edge_agent.config import AgentConfig
from edge_agent.examples import ExampleStore
from edge_agent.home import Home
from edge_agent.latest import LATEST_FOLDER
from edge_agent.ledger import Ledger, Release
from edge_agent.published import PUBLISHED_FOLDER, read_published
from sottovoce.errors import ConfigError
from sottovoce.identity import load_certificate

_NEWEST = 20


class Report(msgspec.Struct, frozen=True):
    """The state of one device, as `edge-agent status --json` prints it.

    Attributes:
        device: Device id.
        fleet: Fleet name.
        home: The device's folder.
        broker: Where the broker is.
        certificate_valid_until: ISO date, or what is missing.
        policy: What the owner allows.
        collections: Collection -> number of examples.
        client_states: What programs keep on this device from one round to the next, without the values.
        pending: Sealed checkpoints and results that wait on disk.
        last_rounds: Plan name -> newest (round, attempt) that is over for this device.
        states: Digests of the programs for which a state of the fleet is here.
        published: Plan name -> round of the sums that the fleet has published last.
        releases: How many masked updates may have left this device.
        last_releases: The newest of them, newest first.
    """

    device: str
    fleet: str
    home: str
    broker: str
    certificate_valid_until: str
    policy: dict[str, Any]
    collections: dict[str, int]
    client_states: list[dict[str, Any]]
    pending: list[str]
    last_rounds: dict[str, tuple[int, int]]
    states: list[str]
    published: dict[str, int]
    releases: int
    last_releases: list[dict[str, Any]]


def make_report(home: Home, config: AgentConfig) -> Report:
    """Return the state of the device in `home`.

    Raises:
        ConfigError: A file in it cannot be used.
    """
    with Ledger(home.ledger) as ledger, ExampleStore(home.examples) as examples:
        rows, collections, last_rounds = ledger.rows(), examples.collections(), ledger.rounds_reached()
    latest = home.path / LATEST_FOLDER
    return Report(
        device=config.device,
        fleet=config.fleet,
        home=str(home.path),
        broker=f"{config.broker.host}:{config.broker.actual_port}",
        certificate_valid_until=_validity(home),
        policy={f.name: getattr(config.policy, f.name) for f in dataclasses.fields(config.policy)},
        collections=collections,
        client_states=[dataclasses.asdict(slot) for slot in kept_slots(home.client_states)],
        pending=sorted(path.stem for path in home.pending.glob("*.sealed")) if home.pending.is_dir() else [],
        last_rounds=last_rounds,
        states=sorted(path.stem for path in latest.glob("*.state")) if latest.is_dir() else [],
        published={each.plan.name: each.round for each in read_published(home.path / PUBLISHED_FOLDER)},
        releases=len(rows),
        last_releases=[_release(row) for row in rows[:_NEWEST]],
    )


def lines(report: Report) -> Iterator[str]:
    """Yield the report in words, line by line."""
    yield f"device       {report.device} of fleet {report.fleet}, in {report.home}"
    yield f"broker       {report.broker}"
    yield f"certificate  {report.certificate_valid_until}"
    yield "policy       " + ", ".join(f"{key} {_shown(value)}" for key, value in report.policy.items())
    collections = ", ".join(f"{name} ({count} examples)" for name, count in report.collections.items())
    yield f"collections  {collections or 'none: edge-agent import COLLECTION FILE'}"
    for slot in report.client_states:
        yield (
            f"keeps        {slot['slot']} v{slot['version']}: {slot['types']} ({slot['bytes']} bytes), computed from "
            f"{', '.join(slot['collections'])} by {slot['plan_name']}, round {slot['round']}"
        )
    yield f"unfinished   {', '.join(report.pending) or 'nothing'}"
    rounds = ", ".join(f"{number}.{attempt} of {plan}" for plan, (number, attempt) in report.last_rounds.items())
    yield f"last round   {rounds or 'none yet'}"
    if report.published:
        published = ", ".join(f"{plan} (round {number})" for plan, number in report.published.items())
        yield f"published    {published}"
    if not report.last_releases:
        yield "released     nothing has left this device"
        return
    yield f"released     {report.releases} masked updates; the newest:"
    for row in report.last_releases:
        yield (
            f"  {row['time']}  {row['plan']}, round {row['round']}, attempt {row['attempt']}: {row['status']}; masked "
            f"with {row['cohort']} devices, {row['weight']} examples, {', '.join(row['contents'])}; {row['purpose']}"
        )


def _release(row: Release) -> dict[str, Any]:
    return {
        "time": datetime.datetime.fromtimestamp(row.at_unix_s, datetime.UTC).isoformat(timespec="seconds"),
        "plan": row.plan_name,
        "round": row.round,
        "attempt": row.attempt,
        "session": row.session.hex(),
        "status": row.status,
        "cohort": row.cohort,
        "weight": row.weight,
        "contents": dict(row.contents),
        "purpose": row.purpose,
    }


def _validity(home: Home) -> str:
    try:
        certificate = load_certificate(home.certificate.read_bytes())
    except FileNotFoundError:
        return f"missing: let the fleet's CA sign {home.request}"
    except (OSError, ConfigError) as error:
        return f"unreadable: {error}"
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def _shown(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value).lower()
