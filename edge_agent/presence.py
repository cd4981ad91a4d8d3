"""What a device says about being there: its retained status, and the last will that the broker keeps for it."""

from __future__ import annotations

import functools
import importlib.metadata

from sottovoce.identity import Identity, SignedContext
from sottovoce.transport.base import Will
from sottovoce.wire.codec import ALL, seal
from sottovoce.wire.messages import Status
from sottovoce.wire.topics import Topics


def last_will(identity: Identity) -> Will:
    """Return what the broker publishes when the device of `identity` vanishes."""
    name, fleet = identity.certificate.name, identity.certificate.fleet
    return Will(Topics(fleet).status(name), sealed_status(identity, online=False))


def sealed_status(identity: Identity, *, online: bool) -> bytes:
    """Return the signed status of the device of `identity`."""
    name, fleet = identity.certificate.name, identity.certificate.fleet
    return seal(Status(online=online, version=_version()), identity, SignedContext(name, ALL, fleet))


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("sottovoce")
    except importlib.metadata.PackageNotFoundError:
        return "0"
