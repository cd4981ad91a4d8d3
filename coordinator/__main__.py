"""The command `coordinator`: init, run, submit, cancel, status, model get.

Exit codes: 0 all went well, 1 it failed while running, 2 a mistake in what it was given (one line says which).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from coordinator.assignment import load_program
from coordinator.events import LOG, EventLog
from coordinator.home import load_setup, make_home, mqtt_settings
from coordinator.journal import Journal
from coordinator.journal_rows import TaskRow
from coordinator.program import FederatedProgram, build_program
from coordinator.service import Service
from coordinator.settings import read_settings, read_text
from coordinator.status import print_status, status_document
from coordinator.task import read_task
from sottovoce.bundle import encode_bundle, with_initial
from sottovoce.errors import ConfigError, ProgramError, SottovoceError
from sottovoce.identity import latest_time
from sottovoce.tensors import decode_tensors, encode_tensors
from sottovoce.transport.base import Transport
from sottovoce.transport.mqtt import MqttTransport
from sottovoce.transport.mqtt_settings import broker_address

_FLUSH_S = 5.0
_TLS_PORT = 8883
_EXAMPLES = """\
a coordinator in five commands:
  coordinator init --home DIR --fleet clinic      makes a key and asks for a certificate
  fleet-ca sign DIR/request.csr --role coordinator --out DIR/certificate.pem       on the CA's machine
  cp fleet-ca/fleet-ca.pem DIR/                   the CA's certificate, never its key
  coordinator submit TASK.toml --config DIR/coordinator.toml
  coordinator run --config DIR/coordinator.toml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ConfigError, ProgramError) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return 2
    except (SottovoceError, sqlite3.Error) as error:
        print(f"coordinator: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coordinator",
        description="Runs federated learning rounds for a fleet. It hears sums, never a single device.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--config",
        type=Path,
        default=Path("coordinator.toml"),
        metavar="FILE",
        help="its settings (./coordinator.toml)",
    )

    init = commands.add_parser("init", help="make a key, a signing request and commented settings")
    init.add_argument("--home", type=Path, required=True, metavar="DIR", help="a new folder for them")
    init.add_argument("--fleet", required=True, metavar="NAME", help="the fleet's name, as the CA knows it")
    init.add_argument("--name", default="coordinator", help="this coordinator's name (%(default)s)")
    init.add_argument(
        "--broker", default="127.0.0.1:1883", metavar="HOST[:PORT]", help="the fleet's MQTT broker (%(default)s)"
    )
    init.set_defaults(run=_init)

    run = commands.add_parser("run", parents=[config], help="run rounds until stopped (Ctrl-C or SIGTERM)")
    run.add_argument(
        "--events", type=Path, metavar="FILE", help="append one JSON object an event (docs/coordinator.md)"
    )
    run.add_argument("--once", action="store_true", help="stop when the queue of tasks is empty")
    run.set_defaults(run=_run)

    submit = commands.add_parser("submit", parents=[config], help="check a task and put it into the queue")
    submit.add_argument("task", type=Path, metavar="TASK.toml", help="the task file (docs/coordinator.md)")
    submit.set_defaults(run=_submit)

    cancel = commands.add_parser("cancel", parents=[config], help="take a task out; its round in flight is abandoned")
    cancel.add_argument("task", metavar="NAME", help="the task's name")
    cancel.set_defaults(run=_cancel)

    status = commands.add_parser("status", parents=[config], help="show tasks, rounds and refused messages")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    model = commands.add_parser("model", help="what a task has learned")
    get = model.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "get", parents=[config], help="write the trained model as a bundle (.svp), or released sums (.npz)"
    )
    get.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    get.add_argument("--task", metavar="NAME", help="the task (the newest that has a result)")
    get.add_argument("--round", type=int, metavar="N", help="after N rounds of training (the last)")
    get.set_defaults(run=_model_get)
    return parser


def _init(options: argparse.Namespace) -> int:
    host, port = broker_address(options.broker)
    settings = make_home(options.home, fleet=options.fleet, name=options.name, host=host, port=port or _TLS_PORT)
    home = options.home
    print(f"Made {home}/key.pem (keep it), {home}/request.csr and {settings}.\n")
    print("Next, on the machine that holds the fleet's CA:\n")
    print(f"  fleet-ca sign {home}/request.csr --role coordinator --out {home}/certificate.pem\n")
    print(f"Then copy fleet-ca.pem (the certificate, never the key) into {home}, look into {settings}, and:\n")
    print(f"  coordinator run --config {settings}")
    return 0


def _run(options: argparse.Namespace) -> int:
    settings = read_settings(options.config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    setup = load_setup(settings, at=latest_time(time.time()), entropy=os.urandom)
    events = _open_events(options.events)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stopping.append(received))
    with Journal(settings.journal) as journal:
        transport = MqttTransport(mqtt_settings(settings.name, settings.broker), rng=random.SystemRandom())
        try:
            service = Service(setup, journal=journal, transport=transport, events=events)
            serve(service, transport, clock=_clock(), stopping=lambda: bool(stopping), once=options.once)
        finally:
            transport.close()
            events.close()
        failed = options.once and any(task.status == "failed" for task in journal.tasks()[-1:])
    return 1 if failed else 0


def serve(
    service: Service, transport: Transport, *, clock: Callable[[], int], stopping: Callable[[], bool], once: bool
) -> None:
    """Run the loop until `stopping()`, or until there is nothing left to do if `once`; then end in order.

    Raises:
        TransportError: The link is lost for good.
        sqlite3.Error: The journal cannot be written.
    """
    service.start(clock())
    LOG.info("the coordinator is running")
    while not stopping() and not (once and service.idle):
        now_ms = clock()
        service.step(now_ms, service.wait_s(now_ms))
    service.stop(clock())
    deadline_ms = clock() + round(1000 * _FLUSH_S)
    while not service.flushed and clock() < deadline_ms:
        transport.receive(0.02)
    LOG.info("the coordinator has stopped")


def _clock() -> Callable[[], int]:
    """Return a clock in Unix milliseconds that never jumps: deadlines must not depend on somebody setting the time."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda: (time.monotonic_ns() + offset_ns) // 1_000_000


def _open_events(path: Path | None) -> EventLog:
    try:
        return EventLog(path.open("a", encoding="utf-8") if path else None)
    except OSError as error:
        raise ConfigError(f"cannot write the events to {path}: {error.strerror}") from error


def _submit(options: argparse.Namespace) -> int:
    settings = read_settings(options.config)
    text = read_text(options.task)
    task = read_task(text, where=str(options.task))
    folder = options.task.resolve().parent
    bundle = _read_bundle(folder / task.bundle, "bundle")
    moments = _read_bundle(folder / task.standardise.bundle, "standardise.bundle") if task.standardise else None
    try:
        program = build_program(
            task, bundle, fleet=settings.fleet, moments=moments, chunk_bytes=settings.broker.chunk_bytes
        )
    except SottovoceError as error:
        raise ConfigError(f"{options.task}: {error}") from error
    with Journal(settings.journal) as journal:
        journal.submit(task.name, text, bundle=bundle, moments=moments, now_ms=time.time_ns() // 1_000_000)
    print(f"Task {task.name!r} is in the queue: {program.length} rounds, plan {program.plan.digest.hex()[:16]}.")
    return 0


def _read_bundle(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error.strerror}; paths are relative to the task file"
        ) from error


def _cancel(options: argparse.Namespace) -> int:
    with Journal(read_settings(options.config).journal) as journal:
        for task in journal.tasks():
            if task.name == options.task and task.status in ("queued", "running"):
                journal.end_task(task.id, "cancelled")
                print(f"Task {task.name!r} is cancelled; what it has committed stays.")
                return 0
    raise ConfigError(f"no task named {options.task!r} is queued or running; see `coordinator status`")


def _status(options: argparse.Namespace) -> int:
    with Journal.open_read_only(read_settings(options.config).journal) as journal:
        if options.json:
            print(json.dumps(status_document(journal), indent=2))
        else:
            from rich.console import Console

            print_status(journal, Console())
    return 0


def _model_get(options: argparse.Namespace) -> int:
    settings = read_settings(options.config)
    with Journal.open_read_only(settings.journal) as journal:
        task = _task_with_result(journal, options.task)
        program = load_program(journal, task, fleet=settings.fleet, chunk_bytes=settings.broker.chunk_bytes)
        position = _position(task, program, options.round)
        kept = journal.state_at(task.id, position)
        if kept is None:
            raise ConfigError(f"the journal has lost the state of task {task.name!r} after that round")
        state, released = kept
    return _write_result(options.out, task, program, state, released)


def _task_with_result(journal: Journal, name: str | None) -> TaskRow:
    tasks = [task for task in journal.tasks() if name in (None, task.name)]
    if not tasks:
        raise ConfigError(f"there is no task {name!r}" if name else "there is no task yet; submit one")
    for task in reversed(tasks):
        if task.position > 0:
            return task
    raise ConfigError(f"no round of task {tasks[-1].name!r} has committed yet; see `coordinator status`")


def _position(task: TaskRow, program: FederatedProgram, rounds: int | None) -> int:
    before = program.length - program.task.rounds
    if rounds is None:
        return task.position
    if not 0 <= rounds <= task.position - before:
        raise ConfigError(f"--round {rounds}: task {task.name!r} has committed {max(0, task.position - before)} rounds")
    return before + rounds


def _write_result(out: Path, task: TaskRow, program: FederatedProgram, state: bytes, released: bytes | None) -> int:
    try:
        if program.task.update is None:
            np.savez(out, **decode_tensors(released or encode_tensors({})))  # type: ignore[arg-type]  # numpy's stubs
            print(f"Wrote the sums of task {task.name!r} to {out}.")
            return 0
        out.write_bytes(encode_bundle(with_initial(program.bundle, decode_tensors(state))))
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    print(f"Wrote the model of task {task.name!r} to {out}; try: edge-agent infer {out} FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
