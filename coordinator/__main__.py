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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from coordinator.clock import pause, steady_clock
from coordinator.events import LOG, EventLog
from coordinator.home import load_setup, make_home, mqtt_settings
from coordinator.hosted import check_plans, hosted_program
from coordinator.journal import Journal
from coordinator.journal_rows import TaskRow
from coordinator.requests import flat_sums
from coordinator.service import Service
from coordinator.settings import lock_file, read_settings, read_text
from coordinator.status import print_status, status_document
from coordinator.task import Task, read_task
from sottovoce.bundle import decode_bundle, encode_bundle, with_initial
from sottovoce.errors import ConfigError, ProgramError, SottovoceError
from sottovoce.file_lock import FileLock
from sottovoce.identity import latest_time
from sottovoce.secagg.mask_removal import Spread
from sottovoce.tensors import decode_tensors
from sottovoce.transport.base import Transport
from sottovoce.transport.mqtt import MqttTransport
from sottovoce.transport.mqtt_settings import broker_address
from sottovoce.types import Array

_FLUSH_S = 5.0
_TLS_PORT = 8883
_TRIES, _TRY_AGAIN_S = 5, 0.05
"""Somebody who looks whether a coordinator is running holds its lock for a moment."""
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

    cancel = commands.add_parser(
        "cancel", parents=[config], help="take a task or a request out; its round in flight is abandoned"
    )
    cancel.add_argument("task", metavar="NAME", help="its name, or its number in `coordinator status`")
    cancel.set_defaults(run=_cancel)

    status = commands.add_parser("status", parents=[config], help="show tasks, rounds and refused messages")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_status)

    model = commands.add_parser("model", help="what a task has learned")
    get = model.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "get", parents=[config], help="write the trained model as a bundle (.svp), or released sums (.npz)"
    )
    get.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write it")
    get.add_argument("--task", metavar="NAME", help="the task, by name or number (the newest that has a result)")
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
    threads = os.cpu_count() or 1
    events = _open_events(options.events)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stopping.append(received))
    with _only_one(settings.journal), Journal(settings.journal) as journal, ThreadPoolExecutor(threads) as pool:
        transport = MqttTransport(mqtt_settings(settings.name, settings.broker), rng=random.SystemRandom())
        try:
            setup = replace(setup, spread=Spread(threads, pool.map))
            service = Service(setup, journal=journal, transport=transport, events=events)
            serve(service, transport, clock=steady_clock(), stopping=lambda: bool(stopping), once=options.once)
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


def _only_one(journal: Path) -> FileLock:
    """Return the lock that says to everybody: a coordinator runs on this journal."""
    for _ in range(_TRIES):
        lock = FileLock.take(lock_file(journal))
        if lock is not None:
            return lock
        pause(_TRY_AGAIN_S)
    raise ConfigError(f"a coordinator is running on {journal} already; stop it first")


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
        program = hosted_program(task, bundle, moments=moments)
        plan = check_plans(program, task, fleet=settings.fleet, chunk_bytes=settings.broker.chunk_bytes)
    except SottovoceError as error:
        raise ConfigError(f"{options.task}: {error}") from error
    with Journal(settings.journal) as journal:
        now_ms = time.time_ns() // 1_000_000
        journal.submit(task.name, text, purpose=task.purpose, bundle=bundle, moments=moments, now_ms=now_ms)
    print(f"Task {task.name!r} is in the queue: {program.length} rounds, plan {plan.digest.hex()[:16]}.")
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
            if options.task in (task.name, str(task.id)) and task.status in ("queued", "running"):
                journal.end_task(task.id, "cancelled", "cancelled: by the coordinator's operator")
                what = f"Task {task.name!r}" if task.kind == "hosted" else f"Request {task.id} ({task.name})"
                print(f"{what} is cancelled; what it has committed stays.")
                return 0
    raise ConfigError(f"nothing named {options.task!r} is queued or running; see `coordinator status`")


def _status(options: argparse.Namespace) -> int:
    with Journal.open_read_only(read_settings(options.config).journal) as journal:
        if options.json:
            print(json.dumps(status_document(journal), indent=2))
        else:
            from rich.console import Console

            print_status(journal, Console())
    return 0


def _model_get(options: argparse.Namespace) -> int:
    with Journal.open_read_only(read_settings(options.config).journal) as journal:
        row = _task_with_result(journal, options.task)
        if row.kind == "request":
            sums = journal.answer(row.id).sums
            return _write_sums(options.out, row.name, flat_sums(sums.sums) if sums is not None else {})
        task = read_task(row.toml, where=row.name)
        kept = journal.state_at(row.id, _position(row, task, options.round))
        if kept is None:
            raise ConfigError(f"the journal has lost the state of task {row.name!r} after that round")
        broadcast, released = kept
        if task.update is None:
            return _write_sums(options.out, row.name, decode_tensors(released) if released is not None else {})
        return _write_model(options.out, row.name, bundle=journal.blob(row.bundle), broadcast=broadcast)


def _task_with_result(journal: Journal, name: str | None) -> TaskRow:
    tasks = [task for task in journal.tasks() if name in (None, task.name, str(task.id))]
    if not tasks:
        raise ConfigError(f"there is no task {name!r}" if name else "there is no task yet; submit one")
    for task in reversed(tasks):
        if task.position > 0:
            return task
    raise ConfigError(f"no round of task {tasks[-1].name!r} has committed yet; see `coordinator status`")


def _position(row: TaskRow, task: Task, rounds: int | None) -> int:
    before = int(task.standardise is not None)
    if rounds is None:
        return row.position
    if not 0 <= rounds <= row.position - before:
        raise ConfigError(f"--round {rounds}: task {row.name!r} has committed {max(0, row.position - before)} rounds")
    return before + rounds


def _write_sums(out: Path, name: str, sums: Mapping[str, Array]) -> int:
    try:
        np.savez(out, **sums)  # type: ignore[arg-type]  # numpy's stubs
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    print(f"Wrote the sums of task {name!r} to {out}.")
    return 0


def _write_model(out: Path, name: str, *, bundle: bytes | None, broadcast: bytes) -> int:
    if bundle is None:
        raise ConfigError(f"the journal has lost the bundle of task {name!r}")
    try:
        out.write_bytes(encode_bundle(with_initial(decode_bundle(bundle), decode_tensors(broadcast))))
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}") from error
    print(f"Wrote the model of task {name!r} to {out}; try: edge-agent infer {out} FILE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
