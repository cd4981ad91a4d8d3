"""Whole sessions with fixed entropy and every value in between, and the refusals of both sides inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import by_the_spec as spec
import msgspec
from by_the_spec import Fields
from fleet_by_the_spec import AUTHORITY, CONDUCTOR, COORDINATOR, FLEET, UPLOAD_SECRET, Transcript, play, signer
from spec_device import SpecDevice
from vector import Vector, plain

Change = Callable[[Fields], Fields]
_PACKED: dict[str, Any] = {"packed": [[11, 64], [16, 64], [21, 64]], "vector_bytes": 88 + 128 + 168 + 40}
_SESSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "curious-3": ("three devices, nobody drops out", {"count": 3, "mode": "curious"}),
    "curious-3-dropout": (
        "one of three drops out: too few are left", {"count": 3, "mode": "curious", "drops": {"pi-2": "masked_input"}}
    ),
    "curious-5-dropout": (
        "one of five drops out after sharing its keys; ChaCha20; packed segments",
        {"count": 5, "mode": "curious", "cipher": "chacha20", "drops": {"pi-2": "masked_input"}, **_PACKED},
    ),
    "curious-5-early": (
        "one of five drops out before sharing its keys",
        {"count": 5, "mode": "curious", "drops": {"pi-4": "share_keys"}},
    ),
    "active-3": ("three devices are too few: t is 3 and everybody wants t signatures of others", {"count": 3}),
    "active-5": ("five devices, nobody drops out", {"count": 5}),
    "active-5-dropout": ("one of five drops out: too few are left", {"count": 5, "drops": {"pi-2": "masked_input"}}),
    "active-6-dropout": (
        "one of six drops out after sharing its keys", {"count": 6, "drops": {"pi-2": "masked_input"}}
    ),
    "active-6-silent": ("one of six is silent once it has signed", {"count": 6, "drops": {"pi-3": "unmasking"}}),
}  # fmt: skip


@cache
def session(name: str) -> Transcript:
    """Play one of the sessions."""
    comment, settings = _SESSIONS[name]
    return play(name, comment, **settings)


def transcripts() -> dict[str, dict[str, Any]]:
    """Every session, by the name of its file."""
    return {f"transcript-{name}": _transcript(session(name)) for name in _SESSIONS}


def _transcript(transcript: Transcript) -> dict[str, Any]:
    agreed = transcript.agreement
    names = ("fleet", "coordinator", "round", "attempt", "plan", "state", "parameters", "upload_key")
    outcome: dict[str, Any] = {"sum": transcript.total, "survivors": transcript.survivors}
    if transcript.abandoned is not None:
        outcome = dict(zip(("stage", "abandoned"), transcript.abandoned, strict=True))
    n = len(transcript.devices)
    made = {
        "title": f"A session in {agreed.parameters['mode']} mode: {transcript.comment}",
        "made_by": "scripts/make_vectors",
        "agreement": {name: getattr(agreed, name) for name in names},
        "parameters_encoded": spec.packed(agreed.parameters),
        "parameters_digest": agreed.parameters_digest,
        "authority": AUTHORITY,
        "coordinator_certificate": CONDUCTOR.certificate,
        "upload_secret": UPLOAD_SECRET,
        "chunk_bytes": 16,
        "roster": {"n": n, "k": n - 1, "t": spec.threshold(n, agreed.parameters), "root": transcript.root},
        "session": next((device.session for device in transcript.devices if device.position >= 0), spec.NO_SESSION),
        "devices": [_device(transcript, device) for device in transcript.devices],
        "stages": [
            {"stage": one.stage, "requests": one.requests, "answers": one.answers} for one in transcript.exchanges
        ],
        "outcome": outcome,
    }
    written: dict[str, Any] = plain(made)
    return written


def _device(transcript: Transcript, device: SpecDevice) -> dict[str, Any]:
    """A device's secrets and everything derived from them, as far as it came."""
    name = device.signer.name
    made: dict[str, Any] = {
        "name": name,
        "private_key": device.signer.key.private_numbers().private_value.to_bytes(32, "big"),
        "certificate": device.signer.certificate,
        "vector": transcript.plain[name],
        "entropy": transcript.entropy(name).given,
        "channel_secret": device.channel,
        "channel_key": spec.public_key(device.channel),
        "mask_secret": device.mask,
        "mask_key": spec.public_key(device.mask),
        "nonce": device.nonce,
    }
    if device.position >= 0:
        made |= _of_shares(transcript, device)
    if device.held:
        made |= _of_masks(transcript, device)
    return made


def _of_shares(transcript: Transcript, device: SpecDevice) -> dict[str, Any]:
    keys = {
        peer.device: {
            "agreed": spec.agreed(device.channel, peer.channel_key),
            "to": device._share_key(position, outgoing=True),
            "from": device._share_key(position),
            "inclusion_to": device._token(position, outgoing=True),
            "inclusion_from": device._token(position, outgoing=False),
        }
        for position, peer in device.neighbours.items()
    }
    given = [peer for peer in transcript.devices if device.position in peer.held]
    return {
        "position": device.position,
        "self_seed": device.seed,
        "commitment": spec.commitment(device.session, device.position, device.seed),
        "limbs": {"self_seed": spec.limbs(device.seed), "mask_secret": spec.limbs(device.mask)},
        "own_share": device.own_share,
        "shares_given": {peer.signer.name: peer.held[device.position] for peer in given},
        "share_channels": keys,
    }


def _of_masks(transcript: Transcript, device: SpecDevice) -> dict[str, Any]:
    cipher, name = transcript.agreement.parameters["cipher"], device.signer.name
    pairs: dict[str, Any] = {}
    for position in device.held:
        peer = device.neighbours[position]
        names = (name, peer.device) if device.position < position else (peer.device, name)
        secret = spec.agreed(device.mask, peer.mask_key)
        key = spec.pairwise_mask_key(secret, *names, cipher, session=device.session)
        sign = "+" if device.position < position else "-"
        pairs[peer.device] = {"agreed": secret, "key": key, "sign": sign, "first_words": spec.stream(cipher, key, 16)}
    own = spec.self_mask_key(device.seed, name, cipher, session=device.session)
    return {
        "self_mask": {"key": own, "first_words": spec.stream(cipher, own, 16)},
        "pairwise_masks": pairs,
        "upload": {"agreed": spec.agreed(device.channel, transcript.agreement.upload_key), "key": device.upload_key()},
        "masked_vector": device.vector,
    }


# --- refusals of a device ---------------------------------------------------------------------------------------------


def device_refusals() -> Iterator[Vector]:
    yield from _terms()
    yield from _invitations()
    for comment, change, error, flag in _rosters():
        yield _to_device("curious-3", "share_keys", "Roster", comment, change, error, flag)
    for comment, change, error, flag in _maskings():
        yield _to_device("active-5", "masked_input", "MaskedInputRequest", comment, change, error, flag)
    for comment, survivors, error in _survivor_sets():
        for name, stage, kind in (
            ("active-6-dropout", "consistency_check", "SurvivorsRequest"),
            ("curious-5-early", "unmasking", "UnmaskingRequest"),
        ):
            if kind == "SurvivorsRequest" and comment == "a member that never shared its keys":
                continue

            def change(fields: Fields, survivors: Callable[[list[int], int], list[int]] = survivors) -> Fields:
                return [survivors(fields[0], _position(name)), *fields[1:]]  # noqa: B023

            yield _to_device(name, stage, kind, f"survivors: {comment}", change, error, "Survivors")
    for comment, change, error, flag in _unmaskings():
        yield _to_device("active-6-dropout", "unmasking", "UnmaskingRequest", comment, change, error, flag)
    yield _to_device(
        "curious-5-early", "unmasking", "UnmaskingRequest", "tokens in curious mode", lambda f: [*f[:2], bytes(48)],
        "MalformedMessage", "Inclusion",
    )  # fmt: skip
    flag = "Signatures"
    yield _to_device(
        "curious-5-early", "unmasking", "UnmaskingRequest", "signatures in curious mode", lambda f: [f[0], [b"x"], b""],
        "MalformedMessage", flag,
    )  # fmt: skip


def _victim(name: str) -> SpecDevice:
    """The device that is lied to: the first of the roster that stays to the end."""
    transcript = session(name)
    last = transcript.exchanges[-1].answers
    return next(device for device in transcript.devices if device.signer.name in last)


def _position(name: str) -> int:
    return _victim(name).position


def _to_device(name: str, stage: str, kind: str, comment: str, change: Change, error: str, flag: str) -> Vector:
    device = _victim(name).signer.name
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
            "device": _victim(name).signer.name,
            "terms": terms,
        }
        yield Vector("device_terms", comment, inputs, error="PolicyRefusal", flags=("Terms",))
    transcript = "active-5"
    device = _victim(transcript).signer.name
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
    device = {"transcript": "transcript-active-5", "device": _victim("active-5").signer.name}
    for comment, key, error in (
        ("a coordinator's key of zeros", bytes(32), "LowOrderPoint"),
        ("a coordinator's key of low order", b"\1" + bytes(31), "LowOrderPoint"),
        ("a coordinator's key of low order, with the top bit", b"\1" + bytes(30) + b"\x80", "LowOrderPoint"),
        ("a coordinator's key of 31 bytes", bytes(31), "CryptoError"),
    ):
        yield Vector("device_invited", comment, device | {"upload_key": key}, error=error, flags=("UploadKey",))


Row = tuple[str, Change, str, str]


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
        device = _victim("active-5")
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
    remote, malformed, flag = "RemoteProtocolError", "MalformedMessage", "Signatures"
    everybody = list(range(6))
    yield "one signature too few", lambda f: [f[0], f[1][1:], f[2]], remote, flag
    yield "no signatures", lambda f: [f[0], [], f[2]], remote, flag
    yield "a signature twice", lambda f: [f[0], [*f[1][1:], f[1][1]], f[2]], malformed, flag
    yield "not an envelope", lambda f: [f[0], [*f[1][1:], b"nothing"], f[2]], malformed, flag
    yield "an unknown member in the set that was signed", lambda f: [[*f[0], 6], *f[1:]], malformed, flag
    yield "the set that was signed, unsorted", lambda f: [f[0][::-1], *f[1:]], malformed, flag
    yield "another set than the one signed", lambda f: [everybody, *f[1:]], remote, flag
    yield (
        "another set, signed by corrupt peers as well",
        lambda f: [everybody, _all_sign(everybody), f[2]],
        remote,
        flag,
    )
    yield (
        "a peer's signature on another set",
        lambda f: [f[0], [*f[1], _sign("pi-2", everybody)], f[2]],
        malformed,
        flag,
    )
    yield (
        "a survivor's signature on another set",
        lambda f: [f[0], [*f[1], _other_survivor(everybody)], f[2]],
        "Equivocation",
        flag,
    )
    yield "its own signature", lambda f: [f[0], [*f[1][1:], _sign(_victim_name(), f[0])], f[2]], malformed, flag
    yield (
        "a signature of another session",
        lambda f: [f[0], [*f[1][1:], _spare(f, session=b"o" * 32)], f[2]],
        "Replayed",
        flag,
    )
    yield "a signature of another round", lambda f: [f[0], [*f[1][1:], _spare(f, round=6)], f[2]], "Replayed", flag
    yield (
        "a signature with s in the upper half",
        lambda f: [f[0], [*f[1][1:], _high_s(f[1][0])], f[2]],
        "BadSignature",
        flag,
    )
    yield (
        "another key's signature",
        lambda f: [f[0], [*f[1][1:], f[1][0][:-64] + f[1][1][-64:]], f[2]],
        "BadSignature",
        flag,
    )
    crypto, flag = "CryptoError", "Inclusion"
    yield "no tokens", lambda f: [f[0], f[1], b""], crypto, flag
    yield "a token missing", lambda f: [f[0], f[1], f[2][16:]], crypto, flag
    yield "a token too many", lambda f: [f[0], f[1], f[2] + f[2][:16]], crypto, flag
    yield "tokens in another order", lambda f: [f[0], f[1], f[2][16:32] + f[2][:16] + f[2][32:]], crypto, flag
    yield "one bit of a token changed", lambda f: [f[0], f[1], bytes([f[2][0] ^ 1]) + f[2][1:]], crypto, flag


def _victim_name() -> str:
    return _victim("active-6-dropout").signer.name


def _sign(name: str, survivors: list[int], **changes: Any) -> bytes:
    transcript = session("active-6-dropout")
    number = transcript.devices[0].session
    settings: dict[str, Any] = {"recipient": COORDINATOR, "fleet": FLEET, "round": 7, "attempt": 1, "session": number}
    digest = spec.survivors_digest(number, survivors)
    return spec.envelope("SurvivorsSignature", [digest], signer(name), spec.Context(name, **(settings | changes)))


def _peers() -> list[str]:
    transcript = session("active-6-dropout")
    return [
        transcript.devices[p].signer.name for p in transcript.survivors if p != _victim("active-6-dropout").position
    ]


def _all_sign(survivors: list[int]) -> list[bytes]:
    return [_sign(name, survivors) for name in _peers()]


def _other_survivor(survivors: list[int]) -> bytes:
    return _sign(_peers()[-1], survivors)


def _spare(fields: Fields, **changes: Any) -> bytes:
    first = msgspec.msgpack.decode(fields[1][0])[2]
    return _sign(first, fields[0], **changes)


def _high_s(payload: bytes) -> bytes:
    s = int.from_bytes(payload[-32:], "big")
    return payload[:-32] + (spec.ORDER - s).to_bytes(32, "big")


# --- refusals of the coordinator --------------------------------------------------------------------------------------


def coordinator_refusals() -> Iterator[Vector]:
    name = "active-6-dropout"
    for stage, kind, comment, change, error in _answers():
        device = _victim(name).signer.name
        fields = change(session(name).body(stage, device, answer=True))
        yield _to_coordinator(name, stage, device, comment, _answer(name, kind, device, fields), error)
    device = _victim(name).signer.name
    for stage, kind in (("share_keys", "ShareKeys"), ("unmasking", "Unmasking")):
        fields = session(name).body(stage, device, answer=True)
        other = _answer(name, kind, device, fields, session=b"o" * 32)
        yield _to_coordinator(name, stage, device, f"{kind} of another session", other, "Replayed")
        stranger = _answer(name, kind, "pi-9", fields)
        yield _to_coordinator(name, stage, "pi-9", f"{kind} of a stranger", stranger, "RemoteProtocolError")
    dropped = _answer(name, "SurvivorsSignature", "pi-2", session(name).body("consistency_check", device, answer=True))
    yield _to_coordinator(
        name, "consistency_check", "pi-2", "a signature of a member that dropped out", dropped, "RemoteProtocolError"
    )
    uninvited = _answer(name, "AdvertiseKeys", "pi-9", _fresh_keys("pi-9"))
    yield _to_coordinator(name, "advertise_keys", "pi-9", "not invited", uninvited, "RemoteProtocolError")
    early = _answer(name, "ShareKeys", device, session(name).body("share_keys", device, answer=True))
    yield _to_coordinator(
        name,
        "masked_input",
        device,
        "an answer to an earlier stage, changed",
        _changed(early, device),
        "ConflictingMessage",
    )
    too_early = _answer(name, "Unmasking", device, [b""])
    yield _to_coordinator(name, "masked_input", device, "shares before anybody asked", too_early, "UnexpectedMessage")


def _to_coordinator(name: str, stage: str, device: str, comment: str, payload: bytes, error: str) -> Vector:
    inputs = {"transcript": f"transcript-{name}", "before": stage, "payload": payload}
    inputs |= {"certificate": signer(device).certificate}
    return Vector("coordinator", comment, inputs, error=error, flags=(stage,))


def _answer(name: str, kind: str, device: str, fields: Fields, **changes: Any) -> bytes:
    number = spec.NO_SESSION if kind == "AdvertiseKeys" else session(name).devices[0].session
    settings: dict[str, Any] = {"session": number} | changes
    context = spec.Context(device, COORDINATOR, FLEET, 7, 1, **settings)
    return spec.envelope(kind, fields, signer(device), context)


def _changed(payload: bytes, device: str) -> bytes:
    fields = msgspec.msgpack.decode(msgspec.msgpack.decode(payload)[9])
    return _answer("active-6-dropout", "ShareKeys", device, [b"c" * 32, fields[1]])


def _fresh_keys(device: str) -> Fields:
    agreed = session("active-6-dropout").agreement
    keys = [spec.public_key(b"1" * 32), spec.public_key(b"2" * 32), b"n" * 32]
    return [signer(device).certificate, agreed.plan, agreed.state, agreed.parameters_digest, *keys]


def _answers() -> Iterator[tuple[str, str, str, Change, str]]:
    malformed, remote = "MalformedMessage", "RemoteProtocolError"
    for comment, index, value, error in (
        ("another certificate", 0, CONDUCTOR.certificate, remote), ("another plan", 1, b"z" * 32, remote),
        ("another state", 2, b"z" * 32, remote), ("other parameters", 3, b"z" * 32, remote),
        ("a channel key of low order", 4, bytes(32), "LowOrderPoint"), ("a short mask key", 5, bytes(31), malformed),
        ("no nonce", 6, b"", malformed),
    ):  # fmt: skip
        yield "advertise_keys", "AdvertiseKeys", comment, _with(index, value), error
    yield "share_keys", "ShareKeys", "a short commitment", _with(0, b"short"), malformed
    one = spec.CIPHERTEXT_BYTES
    yield "share_keys", "ShareKeys", "a ciphertext missing", lambda f: [f[0], f[1][one:]], malformed
    yield "share_keys", "ShareKeys", "a ciphertext too many", lambda f: [f[0], f[1] + f[1][:one]], malformed
    yield "share_keys", "ShareKeys", "a short ciphertext", lambda f: [f[0], f[1][1:]], malformed
    yield "share_keys", "ShareKeys", "no ciphertexts", lambda f: [f[0], b""], malformed
    short = spec.tagged(bytes(32), 16, bytes(32))
    yield "masked_input", "MaskedInput", "a vector of another length", _with(0, short), malformed
    yield "masked_input", "MaskedInput", "a token missing", lambda f: [f[0], f[1][16:]], malformed
    yield "masked_input", "MaskedInput", "no tokens", _with(1, b""), malformed
    yield "consistency_check", "SurvivorsSignature", "another set", _with(0, b"x" * 32), remote
    kind = "Unmasking"
    yield "unmasking", kind, "a share missing", lambda f: [f[0][36:]], malformed
    yield "unmasking", kind, "a share twice", lambda f: [f[0] + f[0][-36:]], malformed
    yield "unmasking", kind, "no shares", lambda f: [b""], malformed
    yield "unmasking", kind, "only shares of self seeds", _without_the_dropped, malformed
    yield "unmasking", kind, "both kinds of one member", _both_kinds, malformed
    yield "unmasking", kind, "both kinds of every neighbour", _everything_held, malformed
    yield "unmasking", kind, "a second field, for the other kind", lambda f: [f[0], f[0]], malformed
    yield "unmasking", kind, "shares with their owners' positions", lambda f: [[[0, f[0][:36]]]], malformed
    yield "unmasking", kind, "a short share", lambda f: [f[0][1:]], malformed
    yield "unmasking", kind, "a long share", lambda f: [f[0] + b"\0"], malformed
    yield "unmasking", kind, "a limb of 65535", lambda f: [b"\xff" * 36 + f[0][36:]], "BadShare"
    yield "unmasking", kind, "the last limb 65521", lambda f: [f[0][:-2] + b"\xf1\xff"], "BadShare"


def _without_the_dropped(_: Fields) -> Fields:
    transcript = session("active-6-dropout")
    given = transcript.shares_given(_victim_name())
    return [b"".join(share for owner, share in given.items() if owner in transcript.survivors)]


def _both_kinds(_: Fields) -> Fields:
    """Of the first neighbour, which survives, the share of its mask key too."""
    given = session("active-6-dropout").shares_given(_victim_name())
    held = _victim("active-6-dropout").held
    return [b"".join(share + (held[owner][36:] if owner == min(held) else b"") for owner, share in given.items())]


def _everything_held(_: Fields) -> Fields:
    victim = _victim("active-6-dropout")
    held = victim.held | {victim.position: victim.own_share}
    return [b"".join(held[position] for position in sorted(held))]


def _with(index: int, value: Any) -> Change:
    return lambda fields: [value if place == index else field for place, field in enumerate(fields)]


def abandonments() -> Iterator[Vector]:
    """Answers that are well-formed and wrong: the round ends, and no sum comes out of it."""
    name = "active-6-dropout"
    transcript = session(name)
    liar = transcript.devices[transcript.survivors[0]].signer.name
    fields = transcript.body("share_keys", liar, answer=True)
    lie = {liar: _answer(name, "ShareKeys", liar, [b"c" * 32, fields[1]])}
    yield _abandoned(name, "share_keys", "a member commits to another seed", lie)
    for comment, alive in (("self seeds", True), ("a mask key", False)):
        replaced = {
            device: _given(device, _spoilt(device, index, alive=alive)) for index, device in enumerate(_too_many())
        }
        yield _abandoned(name, "unmasking", f"too many wrong shares of {comment}", replaced)
    for comment, change in _WRONG_PLACES.items():
        replaced = {device: _given(device, change(device)) for device in _too_many()}
        yield _abandoned(name, "unmasking", f"too many members give {comment}", replaced)


def tolerated() -> Iterator[Vector]:
    """One member's shares are of the wrong kind or in the wrong place: those of the others give the same sum."""
    name = "active-6-dropout"
    transcript = session(name)
    for comment, change in _WRONG_PLACES.items():
        liar = transcript.devices[transcript.survivors[0]].signer.name
        replaced = {liar: _given(liar, change(liar))}
        inputs = {"transcript": f"transcript-{name}", "stage": "unmasking", "replaced": replaced}
        yield Vector("tolerate", f"one member gives {comment}", inputs, transcript.total, flags=("WrongShare",))


def _too_many() -> list[str]:
    """So many survivors that t of the others are not left."""
    transcript = session("active-6-dropout")
    t = spec.threshold(6, transcript.agreement.parameters)
    return [transcript.devices[p].signer.name for p in transcript.survivors[: len(transcript.survivors) - t + 1]]


def _given(device: str, shares: list[bytes]) -> bytes:
    return _answer("active-6-dropout", "Unmasking", device, [b"".join(shares)])


def _spoilt(device: str, index: int, *, alive: bool) -> list[bytes]:
    """The shares that `device` gives, wrong where they are of survivors, or of those that dropped out."""
    transcript = session("active-6-dropout")
    given = transcript.shares_given(device)
    return [_spoiled(s, index) if (p in transcript.survivors) == alive else s for p, s in given.items()]


def _other_kind(device: str) -> list[bytes]:
    """Of every neighbour the kind of share that was not asked for; of `device` itself, which has one kind, that one."""
    transcript = session("active-6-dropout")
    held, given = transcript.device(device).held, transcript.shares_given(device)
    return [(held[p][36:] if p in transcript.survivors else held[p][:36]) if p in held else given[p] for p in given]


def _both_of_the_first(device: str) -> list[bytes]:
    """Both kinds of the first neighbour, and so every later share in the place of the one before, the last left out."""
    transcript = session("active-6-dropout")
    held, shares = transcript.device(device).held, list(transcript.shares_given(device).values())
    first = min(held)
    return [*shares[: first + 1], held[first][36:], *shares[first + 1 : -1]]


def _backwards(device: str) -> list[bytes]:
    return list(session("active-6-dropout").shares_given(device).values())[::-1]


_WRONG_PLACES: dict[str, Callable[[str], list[bytes]]] = {
    "shares of the wrong kind": _other_kind,
    "both kinds of a neighbour and so nothing of the last": _both_of_the_first,
    "shares in another order": _backwards,
}


def _spoiled(share: bytes, index: int) -> bytes:
    # Hashed, for errors that lie on a polynomial of low degree can vanish at 0 and leave the secret right.
    error = 1 + int.from_bytes(spec.sha256(bytes([index])), "little") % (spec.PRIME - 1)
    return ((int.from_bytes(share[:2], "little") + error) % spec.PRIME).to_bytes(2, "little") + share[2:]


def _abandoned(name: str, stage: str, comment: str, replaced: dict[str, bytes]) -> Vector:
    inputs = {"transcript": f"transcript-{name}", "stage": stage, "replaced": replaced}
    return Vector("abandon", comment, inputs, error="bad_shares", flags=("WrongShare",))


def server_vectors() -> Iterator[Vector]:
    yield from coordinator_refusals()
    yield from abandonments()
    yield from tolerated()


REFUSALS = {
    "refusals-device": ("Requests that end a device's session", device_refusals),
    "refusals-coordinator": ("Answers that the coordinator refuses, and rounds that it abandons", server_vectors),
}
