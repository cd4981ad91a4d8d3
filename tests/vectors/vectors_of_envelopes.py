"""Vectors of envelopes, their bodies, and the certificates that they are verified with."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import by_the_spec as spec
import msgspec
from by_the_spec import Context, Signer
from fleet_by_the_spec import (
    AT,
    AUTHORITY,
    AUTHORITY_KEY,
    AUTHORITY_NAME,
    CONDUCTOR,
    COORDINATOR,
    FLEET,
    agreement,
    certificate,
    key_of,
    signer,
    subject,
)  # fmt: skip
from vector import Inputs, Vector

SESSION = spec.sha256(b"a session")


def envelope_vectors() -> Iterator[Vector]:
    device, agreed = signer("pi-1"), agreement()
    context, fields = agreed.context("pi-1", session=SESSION), [b"d" * 32]
    body = spec.packed(fields)
    good = spec.envelope("SurvivorsSignature", fields, device, context)
    holder = {"certificate": device.certificate}
    content = spec.signed_bytes("SurvivorsSignature", context, device.fingerprint, body)
    yield Vector("open", "a signed message", {"payload": good} | holder, body, also={"signed": content})
    request = Context(COORDINATOR, "pi-1", FLEET, 7, 1)
    payload = spec.envelope("SurvivorsRequest", [[0, 1, 300]], CONDUCTOR, request)
    yield Vector(
        "open", "a request", {"payload": payload, "certificate": CONDUCTOR.certificate}, spec.packed([[0, 1, 300]])
    )

    yield from _altered(good, holder)
    for comment, payload in {
        "no bytes": b"", "cut short": good[:-1], "one byte more": good + b"\0", "a map": spec.packed({"version": 1}),
        "ten fields": spec.packed(msgspec.msgpack.decode(good)[:10]), "not MessagePack": b"\xc1" * 40,
    }.items():  # fmt: skip
        yield Vector("open", comment, {"payload": payload} | holder, error="MalformedMessage", flags=("Malformed",))
    yield from _bodies(device, context, holder)


def _altered(good: bytes, holder: Inputs) -> Iterator[Vector]:
    """One part of a good envelope changed after signing, or of another form."""
    parts: list[Any] = msgspec.msgpack.decode(good)

    def changed(comment: str, error: str, flag: str, **changes: Any) -> Vector:
        altered = [changes.get(f"at{index}", part) for index, part in enumerate(parts)] + changes.get("more", [])
        return Vector("open", comment, {"payload": spec.packed(altered), **holder}, error=error, flags=(flag,))

    r, s = parts[10][:32], parts[10][32:]
    other_s = (spec.ORDER - int.from_bytes(s, "big")).to_bytes(32, "big")
    high, zero = "HighS", bytes(32)
    yield changed("s in the upper half", "BadSignature", high, at10=r + other_s)
    for comment, signature in {
        "r is zero": zero + s, "s is zero": r + zero, "r is the order": spec.ORDER.to_bytes(32, "big") + s,
        "r and s swapped": s + r, "one bit of r": bytes([r[0] ^ 1]) + r[1:] + s,
    }.items():  # fmt: skip
        yield changed(comment, "BadSignature", "Signature", at10=signature)
    for index, name in enumerate(("sender", "recipient", "fleet", "round", "attempt", "session"), 2):
        other = {"round": 8, "attempt": 2, "session": bytes(32)}.get(name, "another")
        error = "MalformedMessage" if name in ("sender", "fleet") else "BadSignature"
        yield changed(f"{name} changed after signing", error, "Context", **{f"at{index}": other})
    yield changed("body changed after signing", "BadSignature", "Context", at9=spec.packed([b"e" * 32]))
    yield changed("fingerprint of another certificate", "MalformedMessage", "Context", at8=CONDUCTOR.fingerprint)
    yield changed("renamed after signing", "BadSignature", "Context", at1="ShareKeys")
    malformed: dict[str, dict[str, Any]] = {
        "version 2": {"at0": 2}, "an unknown message": {"at1": "Nonsense"}, "a field too many": {"more": [b""]},
        "a slash in a name": {"at2": "pi/1"}, "an empty name": {"at3": ""}, "a name of 65": {"at2": "p" * 65},
        "a negative round": {"at5": -1}, "a round of 2^63": {"at5": 2**63}, "an attempt of 2^31": {"at6": 2**31},
        "a session of 31 bytes": {"at7": bytes(31)}, "a fingerprint of 33 bytes": {"at8": bytes(33)},
        "a signature of 63 bytes": {"at10": r + s[1:]}, "a signature of 65 bytes": {"at10": r + s + b"\0"},
        "text where bytes belong": {"at9": "text"}, "a number where a name belongs": {"at2": 1},
    }  # fmt: skip
    for comment, changes in malformed.items():
        yield changed(comment, "MalformedMessage", "Malformed", **changes)


def _bodies(device: Signer, context: Context, holder: Inputs) -> Iterator[Vector]:
    """Bodies of another form, properly signed."""
    bodies: dict[str, tuple[str, Any]] = {
        "a body with a field too many": ("SurvivorsSignature", [b"d" * 32, 1]),
        "a body with a field too few": ("SurvivorsSignature", []),
        "a body of the wrong type": ("SurvivorsSignature", ["text"]),
        "a body that is a map": ("SurvivorsSignature", {"survivors": b"d" * 32}),
        "a request, from a device": ("SurvivorsRequest", [[0]]),
        "a vector without the tags of its chunks": ("MaskedInput", [{"size": 40, "chunk_bytes": 16, "tags": b""}]),
        "a vector with a tag too many": ("MaskedInput", [{"size": 40, "chunk_bytes": 16, "tags": bytes(64)}]),
        "a vector in chunks of nothing": ("MaskedInput", [{"size": 40, "chunk_bytes": 0, "tags": bytes(16)}]),
        "a vector with a digest": (
            "MaskedInput",
            [{"digest": bytes(32), "size": 40, "chunk_bytes": 16, "chunk_digests": bytes(96), "sources": []}],
        ),
    }  # fmt: skip
    for comment, (name, given) in bodies.items():
        payload = spec.envelope(name, given, device, context)
        yield Vector("open", comment, {"payload": payload, **holder}, error="MalformedMessage", flags=("Body",))


def certificate_vectors() -> Iterator[Vector]:
    at = int(AT.timestamp())
    base = {"authority": AUTHORITY, "fleet": FLEET, "at": at, "role": "device"}
    device = signer("pi-1")
    key = device.key
    yield Vector("certificate", "a device of the fleet", base | {"certificate": device.certificate}, "pi-1")

    def made(holder: Any, *, issuer: Any = AUTHORITY_NAME, by: Any = AUTHORITY_KEY, **changes: Any) -> bytes:
        return certificate(holder, key, issuer=issuer, by=by, **changes)

    expired = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
    refused = {
        "expired": made(subject("pi-1", "device"), after=expired),
        "of another CA with the same name": made(subject("pi-1", "device"), by=key_of("impostor")),
        "of another fleet": made(subject("pi-1", "device", "quartet")),
        "with a name that cannot stand in a topic": made(subject("pi/1", "device")),
        "with an unknown role": made(subject("pi-1", "auditor")),
        "the coordinator's, where a device's is wanted": CONDUCTOR.certificate,
        "the CA's own": AUTHORITY,
        "cut short": device.certificate[:-1],
        "signed by another device": made(
            subject("pi-1", "device"), issuer=subject("pi-2", "device"), by=key_of("pi-2")
        ),
    }
    for comment, content in refused.items():
        yield Vector(
            "certificate", comment, base | {"certificate": content}, error="BadCertificate", flags=("Certificate",)
        )


FILES = {
    "envelopes": ("Envelopes of section 2", envelope_vectors),
    "certificates": ("Certificates of section 2", certificate_vectors),
}
