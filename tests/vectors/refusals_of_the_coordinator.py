"""Answers that the coordinator refuses, wrong shares that it survives, and those for which it abandons the round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import by_the_spec as spec
import shares_by_the_spec as share_spec
from by_the_spec import Fields
from fleet_by_the_spec import CONDUCTOR, COORDINATOR, FLEET, signer
from transcript_files import DROPOUT, session, victim
from vector import Vector

Change = Callable[[Fields], Fields]


def coordinator_refusals() -> Iterator[Vector]:
    device = victim(DROPOUT).signer.name
    for stage, kind, comment, change, error in _answers():
        fields = change(session(DROPOUT).body(stage, device, answer=True))
        yield _to_coordinator(stage, device, comment, _answer(kind, device, fields), error)
    for stage, kind in (("share_keys", "ShareKeys"), ("unmasking", "Unmasking")):
        fields = session(DROPOUT).body(stage, device, answer=True)
        other = _answer(kind, device, fields, session=b"o" * 32)
        yield _to_coordinator(stage, device, f"{kind} of another session", other, "Replayed")
        stranger = _answer(kind, "pi-9", fields)
        yield _to_coordinator(stage, "pi-9", f"{kind} of a stranger", stranger, "RemoteProtocolError")
    dropped = _answer("SurvivorsSignature", "pi-2", session(DROPOUT).body("consistency_check", device, answer=True))
    yield _to_coordinator(
        "consistency_check", "pi-2", "a signature of a member that dropped out", dropped, "RemoteProtocolError"
    )
    uninvited = _answer("AdvertiseKeys", "pi-9", _fresh_keys("pi-9"))
    yield _to_coordinator("advertise_keys", "pi-9", "not invited", uninvited, "RemoteProtocolError")
    _, ciphertexts = session(DROPOUT).body("share_keys", device, answer=True)
    changed = _answer("ShareKeys", device, [b"c" * 32, ciphertexts])
    yield _to_coordinator(
        "masked_input", device, "an answer to an earlier stage, changed", changed, "ConflictingMessage"
    )
    too_early = _answer("Unmasking", device, [b""])
    yield _to_coordinator("masked_input", device, "shares before anybody asked", too_early, "UnexpectedMessage")


def _to_coordinator(stage: str, device: str, comment: str, payload: bytes, error: str) -> Vector:
    inputs = {"transcript": f"transcript-{DROPOUT}", "before": stage, "payload": payload}
    inputs |= {"certificate": signer(device).certificate}
    return Vector("coordinator", comment, inputs, error=error, flags=(stage,))


def _answer(kind: str, device: str, fields: Fields, **changes: Any) -> bytes:
    number = spec.NO_SESSION if kind == "AdvertiseKeys" else session(DROPOUT).devices[0].session
    settings: dict[str, Any] = {"session": number} | changes
    context = spec.Context(device, COORDINATOR, FLEET, 7, 1, **settings)
    return spec.envelope(kind, fields, signer(device), context)


def _fresh_keys(device: str) -> Fields:
    agreed = session(DROPOUT).agreement
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
    short = spec.tagged(bytes(32), 16, bytes(32), "aes-128-ctr")
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
    transcript = session(DROPOUT)
    given = transcript.shares_given(victim(DROPOUT).signer.name)
    return [b"".join(share for owner, share in given.items() if owner in transcript.survivors)]


def _both_kinds(_: Fields) -> Fields:
    """Of the first neighbour, which survives, the share of its mask key too."""
    given = session(DROPOUT).shares_given(victim(DROPOUT).signer.name)
    held = victim(DROPOUT).held
    return [b"".join(share + (held[owner][36:] if owner == min(held) else b"") for owner, share in given.items())]


def _everything_held(_: Fields) -> Fields:
    giver = victim(DROPOUT)
    held = giver.held | {giver.position: giver.own_share}
    return [b"".join(held[position] for position in sorted(held))]


def _with(index: int, value: Any) -> Change:
    return lambda fields: [value if place == index else field for place, field in enumerate(fields)]


def abandonments() -> Iterator[Vector]:
    """Answers that are well-formed and wrong: the round ends, and no sum comes out of it."""
    transcript = session(DROPOUT)
    liar = transcript.devices[transcript.survivors[0]].signer.name
    fields = transcript.body("share_keys", liar, answer=True)
    lie = {liar: _answer("ShareKeys", liar, [b"c" * 32, fields[1]])}
    yield _abandoned("share_keys", "a member commits to another seed", lie)
    for comment, alive in (("self seeds", True), ("a mask key", False)):
        replaced = {
            device: _given(device, _spoilt(device, index, alive=alive)) for index, device in enumerate(_too_many())
        }
        yield _abandoned("unmasking", f"too many wrong shares of {comment}", replaced)
    for comment, change in _WRONG_PLACES.items():
        replaced = {device: _given(device, change(device)) for device in _too_many()}
        yield _abandoned("unmasking", f"too many members give {comment}", replaced)


def tolerated() -> Iterator[Vector]:
    """One member's shares are of the wrong kind or in the wrong place: those of the others give the same sum."""
    transcript = session(DROPOUT)
    for comment, change in _WRONG_PLACES.items():
        liar = transcript.devices[transcript.survivors[0]].signer.name
        replaced = {liar: _given(liar, change(liar))}
        inputs = {"transcript": f"transcript-{DROPOUT}", "stage": "unmasking", "replaced": replaced}
        yield Vector("tolerate", f"one member gives {comment}", inputs, transcript.total, flags=("WrongShare",))


def _too_many() -> list[str]:
    """So many survivors that t of the others are not left."""
    transcript = session(DROPOUT)
    t = spec.threshold(6, transcript.agreement.parameters)
    return [transcript.devices[p].signer.name for p in transcript.survivors[: len(transcript.survivors) - t + 1]]


def _given(device: str, shares: list[bytes]) -> bytes:
    return _answer("Unmasking", device, [b"".join(shares)])


def _spoilt(device: str, index: int, *, alive: bool) -> list[bytes]:
    """The shares that `device` gives, wrong where they are of survivors, or of those that dropped out."""
    transcript = session(DROPOUT)
    given = transcript.shares_given(device)
    return [_spoiled(s, index) if (p in transcript.survivors) == alive else s for p, s in given.items()]


def _other_kind(device: str) -> list[bytes]:
    """Of every neighbour the kind of share that was not asked for; of `device` itself, which has one kind, that one."""
    transcript = session(DROPOUT)
    held, given = transcript.device(device).held, transcript.shares_given(device)
    return [(held[p][36:] if p in transcript.survivors else held[p][:36]) if p in held else given[p] for p in given]


def _both_of_the_first(device: str) -> list[bytes]:
    """Both kinds of the first neighbour, and so every later share in the place of the one before, the last left out."""
    transcript = session(DROPOUT)
    held, shares = transcript.device(device).held, list(transcript.shares_given(device).values())
    first = min(held)
    return [*shares[: first + 1], held[first][36:], *shares[first + 1 : -1]]


def _backwards(device: str) -> list[bytes]:
    return list(session(DROPOUT).shares_given(device).values())[::-1]


_WRONG_PLACES: dict[str, Callable[[str], list[bytes]]] = {
    "shares of the wrong kind": _other_kind,
    "both kinds of a neighbour and so nothing of the last": _both_of_the_first,
    "shares in another order": _backwards,
}


def _spoiled(share: bytes, index: int) -> bytes:
    # Hashed, for errors that lie on a polynomial of low degree can vanish at 0 and leave the secret right.
    error = 1 + int.from_bytes(spec.sha256(bytes([index])), "little") % (share_spec.PRIME - 1)
    return ((int.from_bytes(share[:2], "little") + error) % share_spec.PRIME).to_bytes(2, "little") + share[2:]


def _abandoned(stage: str, comment: str, replaced: dict[str, bytes]) -> Vector:
    inputs = {"transcript": f"transcript-{DROPOUT}", "stage": stage, "replaced": replaced}
    return Vector("abandon", comment, inputs, error="bad_shares", flags=("WrongShare",))


def server_vectors() -> Iterator[Vector]:
    yield from coordinator_refusals()
    yield from abandonments()
    yield from tolerated()


FILES = {
    "refusals-coordinator": ("Answers that the coordinator refuses, and rounds that it abandons", server_vectors),
}
