"""Requests that end a device's session, each made from one of a whole session's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import by_the_spec as spec
import msgspec
from by_the_spec import Fields
from fleet_by_the_spec import CONDUCTOR, COORDINATOR, FLEET, signer
from transcript_files import DROPOUT, session, victim
from vector import Vector

Change = Callable[[Fields], Fields]
Row = tuple[str, Change, str, str]


def device_refusals() -> Iterator[Vector]:
    yield from _terms()
    yield from _invitations()
    for comment, change, error, flag in _rosters():
        yield _to_device("curious-3", "share_keys", "Roster", comment, change, error, flag)
    for comment, change, error, flag in _maskings():
        yield _to_device("active-5", "masked_input", "MaskedInputRequest", comment, change, error, flag)
    for comment, survivors, error in _survivor_sets():
        for name, stage, kind in (
            (DROPOUT, "consistency_check", "SurvivorsRequest"),
            ("curious-5-early", "unmasking", "UnmaskingRequest"),
        ):
            if kind == "SurvivorsRequest" and comment == "a member that never shared its keys":
                continue

            def change(fields: Fields, survivors: Callable[[list[int], int], list[int]] = survivors) -> Fields:
                return [survivors(fields[0], _position(name)), *fields[1:]]  # noqa: B023

            yield _to_device(name, stage, kind, f"survivors: {comment}", change, error, "Survivors")
    for comment, change, error, flag in _unmaskings():
        yield _to_device(DROPOUT, "unmasking", "UnmaskingRequest", comment, change, error, flag)
    yield _to_device(
        "curious-5-early", "unmasking", "UnmaskingRequest", "tokens in curious mode", lambda f: [*f[:2], bytes(48)],
        "MalformedMessage", "Inclusion",
    )  # fmt: skip
    flag = "Signatures"
    yield _to_device(
        "curious-5-early", "unmasking", "UnmaskingRequest", "signatures in curious mode", lambda f: [f[0], [b"x"], b""],
        "MalformedMessage", flag,
    )  # fmt: skip


def _position(name: str) -> int:
    return victim(name).position


def _to_device(name: str, stage: str, kind: str, comment: str, change: Change, error: str, flag: str) -> Vector:
    device = victim(name).signer.name
    body = spec.packed(change(session(name).body(stage, device)))
    inputs = {"transcript": f"transcript-{name}", "device": device, "before": stage, "request": kind, "body": body}
    return Vector("device", comment, inputs, error=error, flags=(flag,))


def _terms() -> Iterator[Vector]:
    """An owner's terms against the parameters of a session, and against its roster."""
    for comment, name, terms in (
        ("curious mode, though only active is allowed", "curious-3", {"modes": ["active"]}),
        ("a largest cohort below the owner's minimum", "active-5", {"minimum_cohort": 11}),
        ("a kinder fleet assumed than the owner does", "active-5", {"minimum_corrupt_share_bp": 501}),
    ):
        inputs: dict[str, Any] = {
            "transcript": f"transcript-{name}",
            "device": victim(name).signer.name,
            "terms": terms,
        }
        yield Vector("device_terms", comment, inputs, error="PolicyRefusal", flags=("Terms",))
    transcript = "active-5"
    device = victim(transcript).signer.name
    for comment, stage, kind, terms in (
        ("a smaller roster than the owner wants", "share_keys", "Roster", {"minimum_cohort": 6}),
        (
            "fewer to hide in than the owner wants",
            "masked_input",
            "MaskedInputRequest",
            {"minimum_honest_survivors": 5},
        ),
    ):
        body = spec.packed(session(transcript).body(stage, device))
        inputs = {
            "transcript": f"transcript-{transcript}", "device": device, "before": stage, "request": kind, "body": body,
            "terms": terms,
        }  # fmt: skip
        yield Vector("device", comment, inputs, error="PolicyRefusal", flags=("Terms",))


def _invitations() -> Iterator[Vector]:
    """The coordinator's own key, against which a device looks before it makes any."""
    device = {"transcript": "transcript-active-5", "device": victim("active-5").signer.name}
    for comment, key, error in (
        ("a coordinator's key of zeros", bytes(32), "LowOrderPoint"),
        ("a coordinator's key of low order", b"\1" + bytes(31), "LowOrderPoint"),
        ("a coordinator's key of low order, with the top bit", b"\1" + bytes(30) + b"\x80", "LowOrderPoint"),
        ("a coordinator's key of 31 bytes", bytes(31), "CryptoError"),
    ):
        yield Vector("device_invited", comment, device | {"upload_key": key}, error=error, flags=("UploadKey",))


def _rosters() -> Iterator[Row]:
    malformed, remote = "MalformedMessage", "RemoteProtocolError"
    yield "threshold lowered", lambda f: [f[0], f[1], f[2] - 1, f[3]], remote, "Threshold"
    yield "threshold raised", lambda f: [f[0], f[1], f[2] + 1, f[3]], remote, "Threshold"
    yield "fewer neighbours", lambda f: [f[0], f[1] - 1, f[2], f[3]], remote, "Threshold"
    yield "leaves not sorted", lambda f: [f[0][32:] + f[0][:32], *f[1:]], malformed, "Leaves"
    yield "a leaf twice", lambda f: [f[0][:32] + f[0], *f[1:]], malformed, "Leaves"
    yield "half a leaf", lambda f: [f[0][:-1], *f[1:]], malformed, "Leaves"
    yield "no leaves", lambda f: [b"", *f[1:]], malformed, "Leaves"
    yield "two leaves: too few to hide in", lambda f: [f[0][:64], 1, 2, f[3][:1]], "PolicyRefusal", "Leaves"
    yield "without this device", lambda f: [f[0][32:] + b"\xff" * 32, *f[1:]], remote, "Leaves"
    yield "another leaf for a neighbour", lambda f: [f[0][:64] + b"\xff" * 32, *f[1:]], remote, "Leaves"
    yield "an advertisement missing", lambda f: [*f[:3], f[3][1:]], malformed, "Advertisement"
    yield "an advertisement too many", lambda f: [*f[:3], [*f[3], f[3][0]]], malformed, "Advertisement"
    yield "advertisements swapped", lambda f: [*f[:3], f[3][::-1]], remote, "Advertisement"
    yield "not an envelope", lambda f: [*f[:3], [b"?", f[3][1]]], malformed, "Advertisement"
    yield "a request where an advertisement belongs", _replaced(_as_request), malformed, "Advertisement"
    yield "a key swapped by the broker", _replaced(lambda payload: _tampered(payload)), "BadSignature", "Advertisement"
    for comment, fields, context, error in (
        ("another state for this neighbour", {2: b"z" * 32}, {}, remote),
        ("another plan", {1: b"z" * 32}, {}, remote),
        ("other parameters", {3: b"z" * 32}, {}, remote),
        ("an advertisement of another round", {}, {"round": 6}, "Replayed"),
        ("an advertisement of another attempt", {}, {"attempt": 0}, "Replayed"),
        ("an advertisement of another session", {}, {"session": b"x" * 32}, "Replayed"),
        ("an advertisement for another coordinator", {}, {"recipient": "impostor"}, "Replayed"),
        ("a mask key of low order", {5: bytes(32)}, {}, "LowOrderPoint"),
        ("a channel key of low order", {4: b"\1" + bytes(31)}, {}, "LowOrderPoint"),
        ("a short key", {5: bytes(31)}, {}, malformed),
        ("a short nonce", {6: bytes(31)}, {}, malformed),
        ("fresh keys for an old leaf", {5: b"m" * 32}, {}, remote),
    ):
        yield comment, _replaced(_reissued(fields, context)), error, "Advertisement"


def _replaced(change: Callable[[bytes], bytes]) -> Change:
    """The first advertisement of a roster, changed."""
    return lambda fields: [*fields[:3], [change(fields[3][0]), *fields[3][1:]]]


def _reissued(changes: Mapping[int, Any], context: Mapping[str, Any]) -> Callable[[bytes], bytes]:
    """What a corrupt neighbour would sign."""

    def change(payload: bytes) -> bytes:
        parts = msgspec.msgpack.decode(payload)
        fields = [changes.get(index, value) for index, value in enumerate(msgspec.msgpack.decode(parts[9]))]
        names = ("sender", "recipient", "fleet", "round", "attempt", "session")
        settings = dict(zip(names, parts[2:8], strict=True)) | dict(context)
        return spec.envelope("AdvertiseKeys", fields, signer(parts[2]), spec.Context(**settings))

    return change


def _tampered(payload: bytes) -> bytes:
    key = msgspec.msgpack.decode(msgspec.msgpack.decode(payload)[9])[5]
    return payload.replace(key, b"k" * 32)


def _as_request(payload: bytes) -> bytes:
    context = spec.Context(COORDINATOR, "all", FLEET, 7, 1)
    return spec.envelope("RoundOver", ["late"], CONDUCTOR, context)


def _maskings() -> Iterator[Row]:
    malformed, bad, flag = "MalformedMessage", "BadShare", "Shares"
    one = spec.CIPHERTEXT_BYTES
    yield "below the threshold", lambda f: [f[0][:2], f[1][: 2 * one]], "RemoteProtocolError", flag
    yield "no shares at all", lambda f: [[], b""], "RemoteProtocolError", flag
    yield "an unknown position", lambda f: [[*f[0], 5], f[1] + f[1][:one]], malformed, flag
    yield "a negative position", lambda f: [[-1, *f[0]], f[1][:one] + f[1]], malformed, flag
    yield "its own position", _with_its_own, malformed, flag
    yield "a position twice", lambda f: [[f[0][0], *f[0]], f[1][:one] + f[1]], malformed, flag
    yield "unsorted", lambda f: [f[0][::-1], b"".join(spec.pieces(f[1], one)[::-1])], malformed, flag
    yield "shares swapped", lambda f: [f[0], f[1][one : 2 * one] + f[1][:one] + f[1][2 * one :]], bad, flag
    yield "a byte changed", lambda f: [f[0], b"\0" + f[1][1:]], bad, flag
    yield "cut short", lambda f: [f[0], f[1][:-1]], malformed, flag
    yield "a byte too many", lambda f: [f[0], f[1] + b"\0"], malformed, flag
    yield "a byte late, of the right length", lambda f: [f[0], b"\0" + f[1][:-1]], bad, flag
    yield "a ciphertext missing", lambda f: [f[0], f[1][one:]], malformed, flag
    yield "a ciphertext too many", lambda f: [f[0], f[1] + f[1][:one]], malformed, flag
    yield "no ciphertexts", lambda f: [f[0], b""], malformed, flag
    yield "a sender missing", lambda f: [f[0][1:], f[1]], malformed, flag
    for comment, shares, error in (
        ("a limb of 65535 inside", [b"\xff\xff" * 36], bad), ("the last limb 65521", [bytes(70) + b"\xf1\xff"], bad),
        ("one share only", [bytes(36)], malformed), ("two bytes too few", [bytes(70)], malformed),
        ("two bytes too many", [bytes(74)], malformed),
        ("one share only, and three of the next", [bytes(36), bytes(108)], bad),
        ("two bytes too many, and too few of the next", [bytes(74), bytes(70)], bad),
    ):  # fmt: skip
        yield comment, _sealed_shares(shares), error, "ShareRange"


def _with_its_own(fields: Fields) -> Fields:
    own, ciphertexts = _position("active-5"), spec.pieces(fields[1], spec.CIPHERTEXT_BYTES)
    return [sorted([*fields[0], own]), b"".join([*ciphertexts[:own], ciphertexts[0], *ciphertexts[own:]])]


def _sealed_shares(shares: list[bytes]) -> Change:
    """Corrupt neighbours' shares, properly encrypted: those of the first in order of position."""

    def change(fields: Fields) -> Fields:
        device = victim("active-5")
        sealed = [
            spec.encrypt(device._share_key(position), content, session=device.session)
            for position, content in zip(fields[0], shares, strict=False)
        ]
        rest = spec.pieces(fields[1], spec.CIPHERTEXT_BYTES)[len(sealed) :]
        return [fields[0], b"".join(sealed + rest)]

    return change


def _survivor_sets() -> Iterator[tuple[str, Callable[[list[int], int], list[int]], str]]:
    malformed, remote = "MalformedMessage", "RemoteProtocolError"
    yield "without this device, which has uploaded", lambda s, me: [p for p in s if p != me], remote
    yield "a member twice", lambda s, me: sorted([*s, s[-1]]), malformed
    yield "an unknown member", lambda s, me: [*s, 6], malformed
    yield "a negative member", lambda s, me: [-1, *s], malformed
    yield "unsorted", lambda s, me: s[::-1], malformed
    yield "nobody", lambda s, me: [], remote
    yield "below the threshold", lambda s, me: sorted({me, s[0], s[1]})[:2] if me in s[:2] else [s[0], me], remote
    yield "this device alone: its whole neighbourhood dropped out", lambda s, me: [me], remote
    yield "a member that never shared its keys", lambda s, me: list(range(5)), remote


def _unmaskings() -> Iterator[Row]:
    remote, malformed, wrong, flag = "RemoteProtocolError", "MalformedMessage", "BadSignature", "Signatures"
    all_, own = list(range(6)), victim(DROPOUT).signer.name
    yield "one signature too few", _signed(lambda s, given: given[1:]), remote, flag
    yield "no signatures", _signed(lambda s, given: []), remote, flag
    yield "a signature twice", _signed(lambda s, given: [*given[1:], given[1]]), malformed, flag
    yield "not an envelope", _signed(lambda s, given: [*given[1:], b"nothing"]), malformed, flag
    yield "an unknown member in the set that was signed", lambda f: [[*f[0], 6], *f[1:]], malformed, flag
    yield "the set that was signed, unsorted", lambda f: [f[0][::-1], *f[1:]], malformed, flag
    yield "another set than the one signed", lambda f: [all_, *f[1:]], remote, flag
    everybody_signs = [_sign(name, all_) for name in _peers()]
    yield "another set, signed by corrupt peers as well", lambda f: [all_, everybody_signs, f[2]], remote, flag
    dropped, last = _sign("pi-2", all_), _sign(_peers()[-1], all_)
    yield "a peer's signature on another set", _signed(lambda s, given: [*given, dropped]), malformed, flag
    yield "a survivor's signature on another set", _signed(lambda s, given: [*given, last]), "Equivocation", flag
    yield "its own signature", _signed(lambda s, given: [*given[1:], _sign(own, s)]), malformed, flag
    for comment, changes in (
        ("a signature of another session", {"session": b"o" * 32}), ("a signature of another round", {"round": 6}),
    ):  # fmt: skip
        yield comment, _signed(_again(changes)), "Replayed", flag
    yield "a signature with s in the upper half", _signed(lambda s, given: [*given[1:], _high_s(given[0])]), wrong, flag
    swapped = _signed(lambda s, given: [*given[1:], given[0][:-64] + given[1][-64:]])
    yield "another key's signature", swapped, wrong, flag
    crypto, flag = "CryptoError", "Inclusion"
    yield "no tokens", lambda f: [f[0], f[1], b""], crypto, flag
    yield "a token missing", lambda f: [f[0], f[1], f[2][16:]], crypto, flag
    yield "a token too many", lambda f: [f[0], f[1], f[2] + f[2][:16]], crypto, flag
    yield "tokens in another order", lambda f: [f[0], f[1], f[2][16:32] + f[2][:16] + f[2][32:]], crypto, flag
    yield "one bit of a token changed", lambda f: [f[0], f[1], bytes([f[2][0] ^ 1]) + f[2][1:]], crypto, flag


def _sign(name: str, survivors: list[int], **changes: Any) -> bytes:
    transcript = session(DROPOUT)
    number = transcript.devices[0].session
    settings: dict[str, Any] = {"recipient": COORDINATOR, "fleet": FLEET, "round": 7, "attempt": 1, "session": number}
    digest = spec.survivors_digest(number, survivors)
    return spec.envelope("SurvivorsSignature", [digest], signer(name), spec.Context(name, **(settings | changes)))


def _peers() -> list[str]:
    transcript = session(DROPOUT)
    return [transcript.devices[p].signer.name for p in transcript.survivors if p != victim(DROPOUT).position]


Signatures = Callable[[list[int], list[bytes]], list[bytes]]


def _signed(change: Signatures) -> Change:
    """Other signatures on the same survivors, made of both."""
    return lambda fields: [fields[0], change(fields[0], fields[1]), fields[2]]


def _again(changes: Mapping[str, Any]) -> Signatures:
    """The first signature again, with another context."""
    return lambda survivors, given: [*given[1:], _sign(msgspec.msgpack.decode(given[0])[2], survivors, **changes)]


def _high_s(payload: bytes) -> bytes:
    s = int.from_bytes(payload[-32:], "big")
    return payload[:-32] + (spec.ORDER - s).to_bytes(32, "big")


FILES = {"refusals-device": ("Requests that end a device's session", device_refusals)}
