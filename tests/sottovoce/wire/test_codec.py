"""The only parser of untrusted bytes: what goes in comes out, and everything else is refused by name."""

from __future__ import annotations

import contextlib
import time
import tracemalloc

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sottovoce.errors import BadSignature, LocalProtocolError, MalformedMessage
from sottovoce.identity import SignedContext
from sottovoce.wire.codec import Envelope, open_envelope, parse, parse_body, seal
from sottovoce.wire.messages import (
    COORDINATOR_MESSAGES,
    DEVICE_MESSAGES,
    CheckIn,
    MaskedInput,
    Message,
    Outcome,
    Ready,
    Roster,
    RoundOver,
    Selected,
    ShareKeys,
    Unmasking,
    UnmaskingRequest,
)

replace = msgspec.structs.replace
ALL_MESSAGES = (*DEVICE_MESSAGES, *COORDINATOR_MESSAGES)
UP = SignedContext("pi-1", "coordinator", "choir", 7, 1, bytes(range(32)))
DOWN = replace(UP, sender="coordinator", recipient="pi-1")
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

contexts = st.builds(
    SignedContext,
    sender=st.just("pi-1"),
    recipient=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    fleet=st.just("choir"),
    round=st.integers(0, 2**63 - 1),
    attempt=st.integers(0, 2**31 - 1),
    session=st.binary(min_size=32, max_size=32),
)


def sender_of(fleet, kind):
    return (fleet.device, UP) if kind in DEVICE_MESSAGES else (fleet.coordinator, DOWN)


def test_every_message_is_one_partys_only():
    assert not set(DEVICE_MESSAGES) & set(COORDINATOR_MESSAGES)
    assert set(ALL_MESSAGES) == set(Message.__subclasses__())


@pytest.mark.parametrize("kind", ALL_MESSAGES)
def test_what_is_sealed_is_opened_unchanged(fleet, messages_of, kind):
    identity, context = sender_of(fleet, kind)

    @given(message=messages_of(kind))
    @settings(max_examples=25)
    def check(message):
        payload = seal(message, identity, context)
        envelope = parse(payload)
        opened = open_envelope(envelope, identity.certificate, payload)
        assert (opened.message, opened.context) == (message, context)
        assert (opened.certificate, opened.payload) == (identity.certificate, payload)
        assert parse_body(envelope, kind) == message
        assert msgspec.msgpack.encode(envelope) == payload  # One encoding: what is verified is what was sent.

    check()


@given(context=contexts)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_context_survives(fleet, context):
    assert open_envelope(parse(seal(Ready(True), fleet.device, context)), fleet.device.certificate).context == context


_SWAPPED = {
    "recipient": "pi-2",
    "round": 8,
    "attempt": 2,
    "session": bytes(32),
    "name": "CheckIn",
    "body": msgspec.msgpack.encode(Ready(False)),
}


@pytest.mark.parametrize("field", _SWAPPED)
def test_the_signature_is_bound_to_every_field(fleet, field):
    envelope = parse(seal(Ready(True), fleet.device, UP))
    forged = msgspec.structs.replace(envelope, **{field: _SWAPPED[field]})
    with pytest.raises(BadSignature):
        open_envelope(parse(msgspec.msgpack.encode(forged)), fleet.device.certificate)


@pytest.mark.parametrize("field", ["sender", "fleet", "fingerprint"])
def test_an_envelope_must_fit_the_certificate(fleet, field):
    swapped = {"sender": "pi-2", "fleet": "other", "fingerprint": bytes(32)}
    forged = msgspec.structs.replace(parse(seal(Ready(True), fleet.device, UP)), **{field: swapped[field]})
    with pytest.raises(MalformedMessage, match="does not fit"):
        open_envelope(forged, fleet.device.certificate)


def test_every_field_of_an_envelope_is_protected_by_one_of_these_tests():
    elsewhere = {"version", "signature"}
    assert {f.name for f in msgspec.structs.fields(Envelope)} == {
        *_SWAPPED,
        "sender",
        "fleet",
        "fingerprint",
    } | elsewhere
    assert {*SignedContext.__struct_fields__} <= {*_SWAPPED, "sender", "fleet"}


def test_another_device_cannot_sign_for_this_one(fleet):
    theirs = parse(seal(Ready(True), fleet.other, replace(UP, sender="pi-2")))
    forged = msgspec.structs.replace(theirs, sender="pi-1", fingerprint=fleet.device.certificate.fingerprint)
    with pytest.raises(BadSignature):
        open_envelope(forged, fleet.device.certificate)


@pytest.mark.parametrize("kind", ALL_MESSAGES)
def test_roles_are_kept_apart(fleet, messages_of, kind):
    wrong, context = (fleet.coordinator, DOWN) if kind in DEVICE_MESSAGES else (fleet.device, UP)

    @given(message=messages_of(kind))
    @settings(max_examples=1)
    def check(message):
        with pytest.raises(MalformedMessage, match="may not send"):
            open_envelope(parse(seal(message, wrong, context)), wrong.certificate)

    check()


def test_nobody_signs_in_anothers_name(fleet):
    for context in (replace(UP, sender="pi-2"), replace(UP, fleet="other")):
        with pytest.raises(LocalProtocolError):
            seal(Ready(True), fleet.device, context)


def test_the_other_form_of_a_signature_is_refused(fleet):
    envelope = parse(seal(Ready(True), fleet.device, UP))
    high_s = P256_ORDER - int.from_bytes(envelope.signature[32:], "big")
    malleated = envelope.signature[:32] + high_s.to_bytes(32, "big")
    with pytest.raises(BadSignature, match="low-s"):
        open_envelope(msgspec.structs.replace(envelope, signature=malleated), fleet.device.certificate)


OUT_OF_RANGE = [
    ("version", 0),
    ("version", 2),
    ("name", "Envelope"),
    ("name", ""),
    ("sender", ""),
    ("sender", "pi/1"),
    ("sender", "pi-1\n"),
    ("sender", "a" * 65),
    ("recipient", "+"),
    ("fleet", "#"),
    ("round", -1),
    ("round", 2**63),
    ("attempt", -1),
    ("attempt", 2**31),
    ("session", bytes(31)),
    ("session", bytes(33)),
    ("fingerprint", b""),
    ("signature", bytes(63)),
    ("signature", bytes(65)),
]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_a_field_out_of_range_is_refused(fleet, field, value):
    envelope = parse(seal(Ready(True), fleet.device, UP))
    with pytest.raises(MalformedMessage):
        parse(msgspec.msgpack.encode(msgspec.structs.replace(envelope, **{field: value})))


def outcome_of(payload, certificate):
    """Return what parsing, then opening, makes of `payload`: a message or the name of the refusal."""
    try:
        return open_envelope(parse(payload), certificate).message
    except (MalformedMessage, BadSignature) as error:
        return type(error).__name__


@given(payload=st.binary(max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_by_name(fleet, payload):
    assert outcome_of(payload, fleet.device.certificate) == "MalformedMessage"


@given(choice=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mutation_of_a_message_is_refused_by_name(fleet, choice):
    message = ShareKeys(bytes(32), bytes(88) + b"ciphertext" * 9)
    payload = bytearray(seal(message, fleet.device, UP))
    kind = choice.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
    at = choice.draw(st.integers(0, len(payload) - 1))
    if kind == "flip":
        payload[at] ^= choice.draw(st.integers(1, 255))
    elif kind == "cut":
        del payload[at:]
    elif kind == "insert":
        payload[at:at] = choice.draw(st.binary(min_size=1, max_size=9))
    else:
        payload += payload[:at] or b"\0"
    assert outcome_of(bytes(payload), fleet.device.certificate) in ("MalformedMessage", "BadSignature")


@pytest.mark.parametrize("kind", ALL_MESSAGES)
def test_a_signed_body_that_is_not_one_is_refused_by_name(fleet, messages_of, kind):
    """A legitimate sender may sign anything at all."""
    envelope = parse(seal(Ready(True), fleet.device, UP))

    @given(choice=st.data())
    @settings(max_examples=60)
    def check(choice):
        body = bytearray(msgspec.msgpack.encode(choice.draw(messages_of(kind))))
        at = choice.draw(st.integers(0, len(body) - 1))
        body[at : at + choice.draw(st.integers(0, 3))] = choice.draw(st.binary(max_size=6))
        changed = msgspec.structs.replace(envelope, name=kind.__name__, body=bytes(body))
        with contextlib.suppress(MalformedMessage):
            assert isinstance(parse_body(changed, kind), kind)

    check()


LIE_ABOUT_LENGTH = (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")


def nasty_bodies(kind):
    fields = len(msgspec.structs.fields(kind))
    for head in (bytes([0x90 + fields]), bytes([0x91 + fields]), b"\xdd\xff\xff\xff\xff", b""):
        for lie in LIE_ABOUT_LENGTH:
            yield head + lie
            yield head + b"\xc4\x20" + bytes(32) + lie
        yield head + b"\x91" * 200_000  # nested arrays
        yield head + b"\x81" * 200_000  # nested maps
        yield head + b"\xc4\x20" + bytes(32) + b"\x92\x00" * 100_000


@pytest.mark.parametrize("kind", ALL_MESSAGES)
def test_lies_about_lengths_and_deep_nesting_cost_nothing(fleet, kind):
    envelope = parse(seal(Ready(True), fleet.device, UP))
    tracemalloc.start()
    started_s = time.process_time()
    for body in nasty_bodies(kind):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(MalformedMessage):
            parse_body(msgspec.structs.replace(envelope, name=kind.__name__, body=body), kind)
        with pytest.raises(MalformedMessage):
            parse(body)
        assert tracemalloc.get_traced_memory()[1] - before < 2_000_000
    tracemalloc.stop()
    assert time.process_time() - started_s < 5


def test_length_is_checked_before_anything_is_decoded(fleet):
    payload = seal(Ready(True), fleet.device, UP)
    assert parse(payload, max_bytes=len(payload)).name == "Ready"
    with pytest.raises(MalformedMessage, match="more than"):
        parse(payload, max_bytes=len(payload) - 1)
    with pytest.raises(MalformedMessage, match="more than"):
        parse(bytes(8 * 1024 * 1024 + 1))


def test_an_unknown_field_is_refused(fleet):
    for kind, values in ((Ready, [True, 1]), (CheckIn, [b"", b"", True, None]), (RoundOver, ["late", "and more"])):
        envelope = msgspec.structs.replace(
            parse(seal(Ready(True), fleet.device, UP)), name=kind.__name__, body=msgspec.msgpack.encode(values)
        )
        with pytest.raises(MalformedMessage):
            parse_body(envelope, kind)


def test_a_body_is_parsed_only_as_what_it_is(fleet):
    with pytest.raises(MalformedMessage, match="a Ready where a CheckIn"):
        parse_body(parse(seal(Ready(True), fleet.device, UP)), CheckIn)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 2**63},
        {"size": -1},
        {"size": 2**29, "chunk_bytes": 1},
        {"size": 2**29, "chunk_bytes": 1, "tags": bytes(16 * 1000)},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2**40},
        {"chunk_bytes": -5},
        {"tags": b""},
        {"tags": bytes(17)},
        {"tags": bytes(32)},
        {"digest": bytes(32)},
    ],
)
def test_a_hostile_announcement_of_a_vector_is_refused_before_anything_is_allocated(fleet, changes):
    def body(**changes):
        return msgspec.msgpack.encode([{"size": 10, "chunk_bytes": 10, "tags": bytes(16), **changes}, b""])

    envelope = msgspec.structs.replace(parse(seal(Ready(True), fleet.device, UP)), name="MaskedInput")
    hostile = msgspec.structs.replace(envelope, body=body(**changes))
    tracemalloc.start()
    with pytest.raises(MalformedMessage):
        parse_body(hostile, MaskedInput)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert parse_body(msgspec.structs.replace(envelope, body=body()), MaskedInput).vector.chunk_count == 1


def hostile_reference(**changes):
    """Return the body of an Outcome whose blob reference says `changes`."""
    reference = {"digest": bytes(32), "size": 10, "chunk_bytes": 10, "chunk_digests": bytes(32), **changes}
    return msgspec.msgpack.encode([b"", bytes(32), True, "", [], reference, 0])


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 2**63},
        {"size": -1},
        {"size": 2**29, "chunk_bytes": 1},
        {"size": 2**29, "chunk_bytes": 1, "chunk_digests": bytes(32 * 1000)},
        {"chunk_bytes": 0},
        {"chunk_bytes": 2**40},
        {"chunk_bytes": -5},
        {"chunk_digests": b""},
        {"chunk_digests": bytes(33)},
        {"digest": bytes(31)},
        {"extra": 1},
    ],
)
def test_a_hostile_blob_reference_is_refused_before_anything_is_allocated(fleet, changes):
    envelope = parse(seal(Ready(True), fleet.device, UP))
    body = msgspec.structs.replace(envelope, name="Outcome", body=hostile_reference(**changes))
    tracemalloc.start()
    with pytest.raises(MalformedMessage):
        parse_body(body, Outcome)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert parse_body(msgspec.structs.replace(body, body=hostile_reference()), Outcome).committed


def test_a_payload_may_be_a_view(fleet):
    for message in (Unmasking(b"x"), ShareKeys(b"", b"y")):
        payload = seal(message, fleet.device, UP)
        assert open_envelope(parse(memoryview(payload)), fleet.device.certificate).message == message
    for message in (Selected("0", 1), Roster(b"", 1, 2, ()), UnmaskingRequest((1,), (b"x",))):
        payload = seal(message, fleet.coordinator, DOWN)
        assert open_envelope(parse(memoryview(payload)), fleet.coordinator.certificate).message == message
