"""TOML files as frozen documents: every mistake is a ConfigError with the key's path and what to write instead."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from sottovoce.blobs import DEFAULT_CHUNK_BYTES, Document
from sottovoce.errors import ConfigError

D = TypeVar("D", bound=Document)
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0.05, lt=0.5)]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`")
_MISSING = re.compile(r"Object missing required field `(?P<key>.*)`")


def read_toml(text: str, kind: type[D], *, where: str) -> D:
    """Return the TOML document `text` as a `kind`.

    Args:
        text: The content of the file.
        kind: What it must be; nested documents are tables.
        where: The file's name, for the error.

    Raises:
        ConfigError: Not TOML, an unknown key, a missing key, a wrong type or a number out of range.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not a TOML file: {error}") from error
    return read_tables(tables, kind, where=where)


def read_tables(tables: Mapping[str, object], kind: type[D], *, where: str) -> D:
    """Return nested `tables` as a `kind`.

    Args:
        tables: Key -> value or table.
        kind: What it must be.
        where: Where they were written, for the error.

    Raises:
        ConfigError: An unknown key, a missing key, a wrong type or a number out of range.
    """
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), kind)}") from error


def read_text(path: Path) -> str:
    """Return the text of the file `path`.

    Raises:
        ConfigError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error


def _explain(message: str, kind: type[Document]) -> str:
    """Turn msgspec's message into one with the key's full path and, for a key, the keys that exist there."""
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    if unknown := _UNKNOWN.fullmatch(what):
        known = ", ".join(sorted(_keys_at(kind, path)))
        return f"{_joined(path, unknown['key'])}: unknown key; the keys here are {known}"
    if missing := _MISSING.fullmatch(what):
        return f"{_joined(path, missing['key'])}: this key is missing; {_expected(kind, path, missing['key'])}"
    return f"{path or 'the file'}: {what[:1].lower()}{what[1:]}"


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _keys_at(kind: type[Document], path: str) -> Iterator[str]:
    for document in _documents_at(kind, path):
        yield from (field.encode_name for field in msgspec.structs.fields(document))


def _documents_at(kind: type[Document], path: str) -> Iterator[type[Document]]:
    """Yield the document type found by walking `path` (`cohort`, or `metrics[...]` for any key of a table)."""
    found: list[Any] = [kind]
    for level in re.findall(r"[^.\[\]]+|\[\.\.\.\]", path):
        found = [inner for outer in found for inner in _inside(outer, level)]
    for each in found:
        if isinstance(each, type) and issubclass(each, Document):
            yield each


def _inside(outer: Any, level: str) -> list[Any]:
    if level == "[...]":
        return list(getattr(outer, "__args__", ()))
    if not (isinstance(outer, type) and issubclass(outer, Document)):
        return []
    kinds = [field.type for field in msgspec.structs.fields(outer) if field.encode_name == level]
    return [part for kind in kinds for part in (kind, *getattr(kind, "__args__", ()))]


def _expected(kind: type[Document], path: str, key: str) -> str:
    for document in _documents_at(kind, path):
        for field in msgspec.structs.fields(document):
            if field.encode_name == key and isinstance(field.type, type) and issubclass(field.type, Document):
                return f"add the table [{_joined(path, key)}]"
    return f"add the line `{key} = ...`"


class BrokerSettings(Document, frozen=True):
    """How to reach the fleet's broker.

    Attributes:
        host: Name or address.
        port: 8883 with TLS, else 1883 by custom.
        protocol: MQTT version.
        ca_file, cert_file, key_file: For mutual TLS; all empty for a loopback broker without TLS.
        username: For a broker that asks for one.
        password_file: The file that holds the password.
        keepalive_s: A frozen process is noticed after 1.5 times this.
        chunk_bytes: Largest piece of a blob in one message; 120 KiB fits AWS IoT, 60 KiB Azure.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password_file: str = ""
    keepalive_s: Positive = 60
    chunk_bytes: Annotated[int, msgspec.Meta(ge=4096, le=2**24)] = DEFAULT_CHUNK_BYTES


class UploadSettings(Document, frozen=True):
    """How masked vectors come in.

    Attributes:
        slots: Devices that upload at the same time; the memory needed is (slots + 1) vectors.
        slot_idle_s: A slot without progress for so long goes to the next device in the queue.
    """

    slots: Positive = 4
    slot_idle_s: Seconds = 5.0


class _File(Document, frozen=True):
    """The file `coordinator.toml` as it is written."""

    name: Name
    fleet: Name
    key: str = "key.pem"
    certificate: str = "certificate.pem"
    fleet_ca: str = "fleet-ca.pem"
    revoked: str = ""
    journal: str = "journal.sqlite"
    broker: BrokerSettings = BrokerSettings()
    uploads: UploadSettings = UploadSettings()


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Everything in `coordinator.toml`, with paths made absolute.

    Attributes:
        name: The coordinator's name, the common name of its certificate.
        fleet: The fleet that it serves.
        key, certificate, fleet_ca: PEM files; the CA's private key is never among them.
        revoked: The CA's signed list of revoked certificates, or None.
        journal: The SQLite file.
        broker: See BrokerSettings; its file names are absolute.
        uploads: See UploadSettings.
    """

    name: str
    fleet: str
    key: Path
    certificate: Path
    fleet_ca: Path
    revoked: Path | None
    journal: Path
    broker: BrokerSettings
    uploads: UploadSettings


def read_settings(path: Path) -> CoordinatorSettings:
    """Return the settings in the file `path`; the file names in it are relative to its folder.

    Raises:
        ConfigError: The file cannot be read, or something in it is wrong.
    """
    file = read_toml(read_text(path), _File, where=str(path))
    folder = path.resolve().parent
    broker = file.broker
    named = {key: getattr(broker, key) for key in ("ca_file", "cert_file", "key_file")}
    if any(named.values()) and not all(named.values()):
        missing = ", ".join(f"broker.{key}" for key, value in named.items() if not value)
        raise ConfigError(f"{path}: TLS needs ca_file, cert_file and key_file together; missing: {missing}")
    absolute = {key: str(folder / value) if value else "" for key, value in named.items()}
    if broker.password_file:
        absolute["password_file"] = str(folder / broker.password_file)
    return CoordinatorSettings(
        name=file.name,
        fleet=file.fleet,
        key=folder / file.key,
        certificate=folder / file.certificate,
        fleet_ca=folder / file.fleet_ca,
        revoked=folder / file.revoked if file.revoked else None,
        journal=folder / file.journal,
        broker=msgspec.structs.replace(broker, **absolute),
        uploads=file.uploads,
    )


def lock_file(journal: Path) -> Path:
    """Return the file that a running coordinator holds a lock on."""
    return journal.with_name(journal.name + ".lock")


SETTINGS_TEMPLATE = """\
# Settings of the coordinator of fleet {fleet!r}. File names are relative to this file.
name = "{name}"
fleet = "{fleet}"

key = "key.pem"                  # made by `coordinator init`; never leaves this machine
certificate = "certificate.pem"  # made by `fleet-ca sign` from request.csr
fleet_ca = "fleet-ca.pem"        # the fleet CA's certificate. Its private key never belongs on this machine.
# revoked = "revoked.pem"        # the CA's signed list of revoked certificates; read again when it changes
journal = "journal.sqlite"       # rounds, states and digests; sums only, nothing of a single device

[broker]
host = "{host}"
port = {port:<20}      # 8883 with TLS
protocol = "5"                   # or "3.1.1"
# ca_file = "broker-ca.pem"      # for TLS, all three together; the fleet's own certificates will do
# cert_file = "certificate.pem"
# key_file = "key.pem"
keepalive_s = 60                 # a frozen coordinator is noticed after one and a half times this
chunk_bytes = 262144             # 120 KiB (122880) fits AWS IoT, 60 KiB (61440) Azure

[uploads]
slots = 4                        # devices that upload at once; memory needed: (slots + 1) vectors
slot_idle_s = 5.0                # a slot without progress goes to the next device
"""
