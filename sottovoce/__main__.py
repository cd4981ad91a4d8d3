"""The author's command `sottovoce`: looks into what travels. Every subcommand imports what it needs itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sottovoce import ask_command
from sottovoce.blobs import digest_of
from sottovoce.bundle import Bundle, ClientState, Port, read_bundle
from sottovoce.errors import ConfigError, SottovoceError
from sottovoce.types import Array

_DESCRIPTION = """\
Tools for those who ask a fleet, and for those who write and check client programs.

  sottovoce inspect digits.svp               what a bundle contains, asks for and gives away
  sottovoce inspect digits.svp --self-test   ... and whether this machine's runtime computes it right
  sottovoce lint model.keras                 which layers of a Keras model will train on a device
  sottovoce export model.keras --out m.svp   the bundle that trains it, proven equal to Keras
  sottovoce ask mean temperature             asks a running fleet, without a program; see sottovoce ask --help

The other commands: edge-agent (a device), coordinator (the server), fleet-ca (who belongs to the fleet)."""

_MODEL = "a .keras file, or file.py:function or package.module:function, a function that returns a Keras model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 with one line on stderr when something is wrong with what was given."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sottovoce", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="show what a bundle contains, asks for and gives away")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help="a .svp file")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.add_argument("--self-test", action="store_true", help="run the bundle's self-test on this machine")
    inspect.set_defaults(run=_inspect)
    ask_command.add_parser(commands, connect=_connect)
    lint = commands.add_parser("lint", help="say which layers of a Keras model will train on a device")
    lint.add_argument("model", metavar="MODEL", help=_MODEL)
    lint.set_defaults(run=_lint)
    export = commands.add_parser("export", help="make a bundle of a Keras model that trains on a device")
    export.add_argument("model", metavar="MODEL", help=_MODEL)
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .svp file to write")
    export.add_argument("--loss", help="Keras' name of the loss, where the model was not compiled with one")
    export.add_argument("--optimizer", help="sgd or adam, where the model was not compiled with one")
    export.add_argument("--metrics", help="accuracy, mean_absolute_error, mean_squared_error; several with commas")
    export.add_argument("--int8", action="store_true", help="keep the large weights of frozen layers as int8")
    export.add_argument("--batch-size", type=int, default=10, help="for the time and the memory of a step (10)")
    export.set_defaults(run=_export)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except SottovoceError as error:
        print(f"sottovoce: {error}", file=sys.stderr)
        return 2
    return 0


def _connect(*arguments: Any, **named: Any) -> Any:
    from coordinator import connect

    return connect(*arguments, **named)


def _inspect(options: argparse.Namespace) -> None:
    import msgspec

    from sottovoce.tensors import decode_tensors

    bundle, digest = read_bundle(options.bundle)
    contents = describe(bundle, digest, decode_tensors(bundle.initial))
    if options.self_test:
        contents["self_test"]["result"] = _run_self_test(bundle)
    if options.json:
        print(msgspec.json.encode(contents).decode())
    else:
        print("\n".join(_lines(contents)))


def describe(bundle: Bundle, digest: bytes, initial: Mapping[str, Array]) -> dict[str, Any]:
    """Return what there is to know about `bundle`, as plain values.

    Args:
        bundle: The bundle.
        digest: Its SHA-256.
        initial: The first value of every broadcast port.
    """
    learned = {name for result in bundle.results for name in result.updates}
    return {
        "name": bundle.name,
        "description": bundle.description,
        "digest": digest.hex(),
        "reads": _ports(bundle.batch),
        "broadcast": _ports(bundle.broadcast),
        "results": {result.name: _ports(result.ports) for result in bundle.results},
        "updates": {result.name: list(result.updates) for result in bundle.results if result.updates},
        "metrics": _ports(bundle.metrics),
        "client_state": _client_state(bundle.client_state),
        "predictions": _ports(bundle.predictions),
        "sums": _ports(bundle.sums),
        "parameters": sum(initial[name].size for name in learned if name in initial),
        "roles": {name: f"{role.flatbuffer}/{role.signature}" for name, role in bundle.roles.items()},
        "flatbuffers": {
            name: {"bytes": len(content), "sha256": digest_of(content).hex()}
            for name, content in bundle.flatbuffers.items()
        },
        "initial_bytes": len(bundle.initial),
        "self_test": {"steps": len(bundle.self_test.batches), "tolerance": bundle.self_test.tolerance},
    }


def _lint(options: argparse.Namespace) -> None:
    print("\n".join(_keras_command().lint_report(options.model)))


def _export(options: argparse.Namespace) -> None:
    command = _keras_command()
    choice = command.Choice(
        loss=options.loss,
        optimizer=options.optimizer,
        metrics=None if options.metrics is None else [name for name in options.metrics.split(",") if name],
        int8=options.int8,
        batch_size=options.batch_size,
    )
    print("\n".join(command.export_report(options.model, options.out, choice)))


def _keras_command() -> Any:
    try:
        from models import keras_command
    except ImportError as error:
        raise ConfigError(f"this needs TensorFlow ({error}): pip install 'sottovoce[models]'") from error
    return keras_command


def _run_self_test(bundle: Bundle) -> str:
    from sottovoce.runtime import open_program, run_self_test, runtime_name

    run_self_test(bundle, open_program(bundle))
    return f"passed on {runtime_name()}"


def _ports(ports: Sequence[Port]) -> dict[str, str]:
    return {port.name: port.type + _bounds(port) for port in ports}


def _client_state(kept: ClientState | None) -> dict[str, Any] | None:
    if kept is None:
        return None
    return {"slot": kept.slot, "version": kept.version, "ports": _ports(kept.ports), "bytes": len(kept.initial)}


def _bounds(port: Port) -> str:
    if port.low is None and port.high is None:
        return ""
    low, high = ("" if bound is None else str(bound) for bound in (port.low, port.high))
    return f" from {low}..{high}"


def _lines(contents: Mapping[str, Any]) -> Iterator[str]:
    yield f"{contents['name']}: {contents['description']}"
    yield f"digest       {contents['digest']}"
    yield f"reads        {_listed(contents['reads'])}"
    yield f"is given     {_listed(contents['broadcast'])}"
    for name, ports in contents["results"].items():
        updates = contents["updates"].get(name)
        yield f"gives        {name}: {_listed(ports)}" + (f", added to {', '.join(updates)}" if updates else "")
    yield f"metrics      {_listed(contents['metrics'])}"
    if kept := contents["client_state"]:
        yield f"keeps        {kept['slot']} v{kept['version']}, {kept['bytes']} bytes: {_listed(kept['ports'])}"
    yield f"predicts     {_listed(contents['predictions'])}"
    yield f"parameters   {contents['parameters']}"
    yield f"roles        {', '.join(contents['roles'])}"
    for name, flatbuffer in contents["flatbuffers"].items():
        yield f"flatbuffer   {name}: {flatbuffer['bytes']} bytes, SHA-256 {flatbuffer['sha256'][:16]}..."
    test = contents["self_test"]
    yield f"self-test    {test['steps']} steps, tolerance {test['tolerance']:g}" + (
        f": {test['result']}" if "result" in test else ""
    )


def _listed(ports: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in ports.items()) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
