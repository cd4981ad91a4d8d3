"""Whole sessions with fixed entropy and every value in between."""

from __future__ import annotations

from functools import cache
from typing import Any

import by_the_spec as spec
import shares_by_the_spec as share_spec
from fleet_by_the_spec import AUTHORITY, CONDUCTOR, UPLOAD_SECRET, Transcript, play
from spec_device import SpecDevice
from vector import plain

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
DROPOUT = "active-6-dropout"
"""The session in which most lies are told."""


@cache
def session(name: str) -> Transcript:
    """Play one of the sessions."""
    comment, settings = _SESSIONS[name]
    return play(name, comment, **settings)


def victim(name: str) -> SpecDevice:
    """The device that is lied to: the first of the roster that stays to the end."""
    transcript = session(name)
    last = transcript.exchanges[-1].answers
    return next(device for device in transcript.devices if device.signer.name in last)


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
        "limbs": {"self_seed": share_spec.limbs(device.seed), "mask_secret": share_spec.limbs(device.mask)},
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
