"""The command `edge-agent`: a device's side of a fleet, for its owner."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from edge_agent.config import AgentConfig, BrokerConfig
from edge_agent.home import Home, default_home, init_home, load_anchor, load_config, load_identity
from sottovoce.errors import BadBundle, BadCertificate, BadExamples, ConfigError, SottovoceError
from sottovoce.file_lock import FileLock
from sottovoce.identity import latest_time, load_certificate

if TYPE_CHECKING:
    from edge_agent.agent import Agent
    from sottovoce.transport.base import Will
    from sottovoce.transport.mqtt_settings import MqttSettings

_DESCRIPTION = """\
Takes part in a fleet's learning without giving away what this device knows: programs run here, on this device's own
examples, and only masked results leave it. The owner's limits stand in agent.toml and have the last word.

  1. edge-agent init --device pi-7 --fleet clinic --broker broker.example     makes a key and a signing request
  2. the fleet's CA signs the request                                         fleet-ca sign request.csr
  3. edge-agent enrol --certificate pi-7.pem --ca fleet-ca.pem                checks and keeps its answer
  4. edge-agent import digits my-digits.csv                                   adds examples; they stay here
  5. edge-agent run                                                           takes part, until it is stopped
  6. edge-agent infer digits.svp new.csv                                      uses what the fleet has learned
     edge-agent suggest hello                                                 and what it has counted

`edge-agent status` shows what has left this device, and for what purpose."""

_ONCE = """\
Makes one visit: connects, does what can be done now, disconnects, prints when to come back, and exits 0. For cron and
for Android's job scheduler; call it every 15 minutes or at the time it prints. Unfinished work goes on at the next
visit. A rendezvous that is open, or due within a minute, is waited for."""

_USERS_MISTAKES = (ConfigError, BadCertificate, BadExamples, BadBundle)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 when it failed, or 2 when the user must change something."""
    options = _parser().parse_args(arguments)
    verbosity = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=verbosity, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return int(options.run(options) or 0)
    except SottovoceError as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 2 if isinstance(error, _USERS_MISTAKES) else 1
    except OSError as error:
        print(f"edge-agent: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# --- becoming part of a fleet -----------------------------------------------------------------------------------------


def _init(options: argparse.Namespace) -> None:
    from sottovoce.transport.mqtt_settings import broker_address

    host, port = broker_address(options.broker)
    tls = not _plain_is_allowed(host) if options.tls is None else options.tls
    broker = BrokerConfig(host=host, port=port, protocol=options.protocol, tls=tls)
    home = init_home(_home(options).path, device=options.device, fleet=options.fleet, broker=broker)
    option = f" --home {home.path}" if options.home else ""
    print(f"made {home.path}: key.pem (never give it away), request.csr, agent.toml (settings and your policy)")
    print("next:")
    print(f"  fleet-ca sign {home.request} --ca FOLDER        by the fleet's CA, on its own machine")
    print(f"  edge-agent enrol --certificate CERTIFICATE --ca fleet-ca.pem{option}")
    print(f"  edge-agent import COLLECTION FILE{option}")
    print(f"  edge-agent run{option}")


def _enrol(options: argparse.Namespace) -> None:
    home = _home(options)
    config = load_config(home)
    contents = {path: _read(path) for path in (options.certificate, options.ca, options.revoked) if path}
    load_certificate(contents[options.certificate])
    load_certificate(contents[options.ca])
    before = {path: path.read_bytes() if path.exists() else None for path in (home.certificate, home.fleet_ca)}
    home.certificate.write_bytes(contents[options.certificate])
    home.fleet_ca.write_bytes(contents[options.ca])
    try:
        load_identity(home, latest_time(time.time()))
    except SottovoceError:
        _restore(before)
        raise
    if options.revoked:
        home.revoked.write_bytes(contents[options.revoked])
        load_anchor(home)
    print(f"{config.device} belongs to fleet {config.fleet} now")


def _restore(before: dict[Path, bytes | None]) -> None:
    for path, content in before.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)


# --- taking part ------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    with _agent(options, resident=True) as agent:
        agent.run()


def _once(options: argparse.Namespace) -> None:
    with _agent(options, resident=False) as agent:
        print(agent.visit())


@contextlib.contextmanager
def _agent(options: argparse.Namespace, *, resident: bool) -> Iterator[Agent]:
    """Yield the agent of this home; SIGTERM and SIGINT stop it in an orderly way."""
    # The shell and the MQTT library are imported here: the owner's other commands answer at once without them.
    from edge_agent.agent import Agent, Clock
    from edge_agent.ledger import Ledger
    from edge_agent.performer import Setup
    from edge_agent.presence import last_will
    from sottovoce.transport.mqtt import MqttTransport

    home = _home(options)
    config = _config(options, home)
    with _only_one(home):
        with Ledger(home.ledger) as ledger:
            last_signed_s = ledger.last_signed_ms() / 1000
        identity = load_identity(home, latest_time(time.time(), last_signed_s))
        setup = Setup(
            home=home,
            config=config,
            identity=identity,
            anchor=load_anchor(home),
            clock=Clock(),
            resident=resident,
        )
        settings = _mqtt_settings(home, config.broker, config.device, last_will(identity))

        def now_unix_s() -> float:
            return latest_time(time.time(), last_signed_s).timestamp()

        agent = Agent(setup, MqttTransport(settings, rng=random.Random(), now_unix_s=now_unix_s))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stop())
        yield agent


def _mqtt_settings(home: Home, broker: BrokerConfig, device: str, will: Will) -> MqttSettings:
    from sottovoce.transport.mqtt import MqttSettings, TlsFiles

    files = TlsFiles(
        ca_file=home.path / broker.ca_file,
        cert_file=home.path / broker.certificate_file,
        key_file=home.path / broker.key_file,
    )
    return MqttSettings(
        host=broker.host,
        port=broker.actual_port,
        client_id=device,
        protocol=broker.protocol,
        tls=files if broker.tls else None,
        keepalive_s=broker.keepalive_s,
        will=will,
    )


def _only_one(home: Home) -> FileLock:
    """Hold the home for this process: two agents with one identity would throw each other out for ever."""
    lock = FileLock.take(home.path / "lock")
    if lock is None:
        raise ConfigError(f"an agent already runs in {home.path}; one device has one agent")
    return lock


# --- examples and models ----------------------------------------------------------------------------------------------


def _import(options: argparse.Namespace) -> None:
    from edge_agent.examples import ExampleStore
    from edge_agent.ledger import Ledger

    home = _home(options)
    load_config(home)
    with Ledger(home.ledger) as ledger:
        now_s = latest_time(time.time(), ledger.last_signed_ms() / 1000).timestamp()
    with ExampleStore(home.examples) as store:
        added = store.import_file(options.collection, options.file, now_s=now_s)
        print(f"added {added} examples to {options.collection}, which now has {store.count(options.collection)}")


def _forget(options: argparse.Namespace) -> None:
    from edge_agent.client_states import forget_client_states
    from edge_agent.examples import ExampleStore

    home = _home(options)
    load_config(home)
    if sum((bool(options.collection), bool(options.client_state), options.all)) != 1:
        raise ConfigError("say which collection to forget, or --client-state SLOT, or --all")
    # What was computed from examples goes with them.
    slots = forget_client_states(home.client_states, slot=options.client_state, collection=options.collection)
    for slot in slots:
        print(f"forgot client state {slot}")
    if options.client_state:
        if not slots:
            print(f"nothing is kept in client state {options.client_state}")
        return
    with ExampleStore(home.examples) as store:
        for collection in list(store.collections()) if options.all else [options.collection]:
            print(f"forgot {store.forget(collection)} examples of {collection}")


def _infer(options: argparse.Namespace) -> None:
    from edge_agent.inference import load_model, predict, read_features
    from edge_agent.latest import LATEST_FOLDER

    home = _home(options)
    runtime = options.runtime or (load_config(home).runtime if home.config.exists() else "auto")
    model = load_model(options.bundle, latest_folder=home.path / LATEST_FOLDER, choice=options.state)
    features = read_features(model.bundle, options.file)
    rows = ({name: value.tolist() for name, value in row.items()} for row in predict(model, features, runtime=runtime))
    if options.json:
        print(msgspec.json.encode({"state": model.origin, "predictions": list(rows)}).decode())
        return
    print(f"with {model.origin}:")
    for number, row in enumerate(rows):
        print(f"{number}: " + ", ".join(f"{name} {_value(value)}" for name, value in row.items()))


def _suggest(options: argparse.Namespace) -> None:
    from edge_agent.examples import ExampleStore
    from edge_agent.published import PUBLISHED_FOLDER, read_published
    from edge_agent.suggestions import last_word, newest_table, own_pairs, suggest

    home = _home(options)
    load_config(home)
    word = last_word(" ".join(options.text))
    table = newest_table(read_published(home.path / PUBLISHED_FOLDER), options.plan)
    with ExampleStore(home.examples) as examples:
        found = suggest(table, word, own_pairs(examples, table), limit=max(1, options.number))
    origin = f"plan {table.plan.name}, round {table.round}"
    if options.json:
        rows = [dataclasses.asdict(each) for each in found]
        print(msgspec.json.encode({"after": word, "origin": origin, "suggestions": rows}).decode())
        return
    print(f"after {word!r} ({origin}):" if found else f"nothing is known to follow {word!r} ({origin})")
    for each in found:
        print(f"  {each.word:<16} {each.share:4.0%}   {each.fleet} in the fleet, {each.own} here")


def _value(value: object) -> str:
    """Return a prediction for people: of several numbers the largest with its place, which for classes is the class."""
    if not isinstance(value, list) or not all(isinstance(each, int | float) for each in value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    largest = max(range(len(value)), key=value.__getitem__)
    return f"{value[0]:.4g}" if len(value) == 1 else f"largest at {largest} ({value[largest]:.3g})"


def _status(options: argparse.Namespace) -> None:
    from edge_agent.report import lines, make_report

    home = _home(options)
    report = make_report(home, load_config(home))
    if options.json:
        print(msgspec.json.encode(report).decode())
    else:
        print("\n".join(lines(report)))


# --- arguments --------------------------------------------------------------------------------------------------------


_Command: TypeAlias = Callable[..., argparse.ArgumentParser]
"""Adds a subcommand: its name, what runs it, and what it is for."""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("edge-agent", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, description: str | None = None) -> argparse.ArgumentParser:
        """Return the parser of a new subcommand, with what all of them have."""
        sub = commands.add_parser(name, help=text, description=description or text, formatter_class=raw)
        sub.add_argument(
            "--home",
            type=Path,
            help="this device's folder (default: $SOTTOVOCE_HOME or ~/.local/share/sottovoce/agent)",
        )
        sub.add_argument("--verbose", action="store_true", help="log more")
        sub.set_defaults(run=run)
        return sub

    _add_enrolment(command)
    run = command("run", _run, "take part in round after round, until stopped")
    once = command("once", _once, "make one visit and print when to come back", _ONCE)
    infer = _add_use(command)
    status = command("status", _status, "show identity, policy, examples, and what has left this device")
    status.add_argument("--json", action="store_true", help="print it as JSON")
    forget = command("forget", _forget, "erase examples, and what programs keep of them, from this device")
    forget.add_argument("collection", nargs="?", metavar="COLLECTION")
    forget.add_argument("--client-state", metavar="SLOT", help="only what programs keep in this slot")
    forget.add_argument("--all", action="store_true", help="every collection and every slot")
    for each in (run, once, infer):
        each.add_argument(
            "--runtime", choices=("auto", "litert", "tflite"), help="the TFLite runtime (default: what agent.toml says)"
        )
    return parser


def _add_enrolment(command: _Command) -> None:
    """Add what makes this machine a device of a fleet."""
    init = command("init", _init, "make this device's key, signing request and settings")
    init.add_argument("--device", required=True, metavar="ID", help="1 to 64 characters of A-Z a-z 0-9 _ -")
    init.add_argument("--fleet", required=True, metavar="NAME", help="the fleet to belong to")
    init.add_argument("--broker", required=True, metavar="HOST[:PORT]", help="the fleet's MQTT broker")
    init.add_argument("--protocol", choices=("5", "3.1.1"), default="5", help="MQTT version (default: 5)")
    init.add_argument(
        "--tls", action=argparse.BooleanOptionalAction, help="TLS to the broker (default: yes, but not on this machine)"
    )
    enrol = command("enrol", _enrol, "keep the certificate that the fleet's CA has signed")
    enrol.add_argument("--certificate", type=Path, required=True, metavar="FILE", help="this device's certificate")
    enrol.add_argument(
        "--ca", type=Path, required=True, metavar="FILE", help="the fleet CA's certificate, to be pinned"
    )
    enrol.add_argument("--revoked", type=Path, metavar="FILE", help="the CA's list of revoked certificates")


def _add_use(command: _Command) -> argparse.ArgumentParser:
    """Add what brings examples and uses what the fleet has learned; return the parser of `infer`."""
    importing = command("import", _import, "add examples from a .npz, .csv or .jsonl file; they stay on this device")
    importing.add_argument("collection", metavar="COLLECTION", help="made if it does not exist")
    importing.add_argument("file", type=Path, metavar="FILE")
    infer = command("infer", _infer, "use what the fleet has learned on a file of examples")
    infer.add_argument("bundle", type=Path, metavar="BUNDLE", help="the model, a .svp file")
    infer.add_argument("file", type=Path, metavar="FILE", help=".npz, .csv or .jsonl")
    infer.add_argument(
        "--state",
        choices=("auto", "latest", "initial"),
        default="auto",
        help="whose weights (default: the fleet's latest, else the file's own)",
    )
    infer.add_argument("--json", action="store_true", help="print all numbers, as JSON")
    suggesting = command(
        "suggest", _suggest, "say which words may follow one, by the fleet's published table and yours"
    )
    suggesting.add_argument("text", nargs="+", metavar="WORD", help="of several the last one counts")
    suggesting.add_argument("--plan", metavar="NAME", help="whose table (default: the newest)")
    suggesting.add_argument("-n", dest="number", type=int, default=3, metavar="N", help="how many words (default: 3)")
    suggesting.add_argument("--json", action="store_true", help="print them as JSON")
    return infer


def _home(options: argparse.Namespace) -> Home:
    return Home(options.home) if options.home else default_home(os.environ)


def _config(options: argparse.Namespace, home: Home) -> AgentConfig:
    config = load_config(home)
    return config if options.runtime is None else dataclasses.replace(config, runtime=options.runtime)


def _plain_is_allowed(host: str) -> bool:
    try:
        BrokerConfig(host=host, tls=False)
    except ConfigError:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
