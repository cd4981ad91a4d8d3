"""The state machines as their tables say: every pair that is not in a table is refused, on both sides."""

from __future__ import annotations

import gc
import types
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from sottovoce.errors import (
    BadShare,
    CryptoError,
    LocalProtocolError,
    RoundAbandoned,
    SottovoceError,
    UnexpectedMessage,
)
from sottovoce.secagg import client_stages, server_stages
from sottovoce.secagg.client import STEPS as CLIENT_STEPS
from sottovoce.secagg.server import CLOSINGS, STAGE_NAMES
from sottovoce.secagg.server import STEPS as SERVER_STEPS
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInput,
    MaskedInputRequest,
    Mode,
    Roster,
    RoundOver,
    ShareKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    TaggedVector,
    Unmasking,
    UnmaskingRequest,
)

REQUESTS: dict[type, Any] = {
    Roster: Roster(leaves=bytes(96), neighbours=2, threshold=2, advertisements=()),
    MaskedInputRequest: MaskedInputRequest(senders=(99,), ciphertexts=b"x"),
    SurvivorsRequest: SurvivorsRequest(survivors=(5, 4)),
    UnmaskingRequest: UnmaskingRequest(survivors=(5, 4), signatures=()),
    RoundOver: RoundOver(reason="late"),
}
"""One made-up request of every kind: none is one that was really asked."""
ANSWERS: dict[type, Any] = {
    AdvertiseKeys: AdvertiseKeys(b"c", b"p", b"s", b"d", bytes(32), bytes(32), bytes(32)),
    ShareKeys: ShareKeys(commitment=b"", ciphertexts=b""),
    MaskedInput: MaskedInput(vector=TaggedVector(size=7, chunk_bytes=7, tags=bytes(16))),
    SurvivorsSignature: SurvivorsSignature(survivors=bytes(32)),
    Unmasking: Unmasking(shares=b""),
}
CLIENT_STAGES = get_args(client_stages.Stage)
SERVER_STAGES = get_args(server_stages.Stage)
MODES: tuple[Mode, ...] = ("active", "curious")
_REACHED_BY = {
    client_stages.Advertised: server_stages.SharingKeys,
    client_stages.KeysShared: server_stages.CollectingInputs,
    client_stages.Revealed: server_stages.Unmasked,
}


def client_in(stage: type, fleet: Any, mode: Mode) -> Any:
    """A rehearsal whose first device's real client stands in `stage`, or None where the mode has no such stage."""
    rehearsal = fleet.rehearse(5, parameters=fleet.parameters(mode=mode))
    client = rehearsal.clients[rehearsal.devices[0]]
    if stage is client_stages.Aborted:
        client.abort()
    elif stage is client_stages.InputMasked:
        after = server_stages.CheckingConsistency if mode == "active" else server_stages.CollectingShares
        rehearsal.run_until(after)
    elif stage is client_stages.SurvivorsSigned:
        if mode == "curious":
            return None
        rehearsal.run_until(server_stages.CollectingShares)
    elif stage is not client_stages.Prepared:
        rehearsal.run_until(_REACHED_BY[stage])
    assert type(client.stage) is stage
    return client


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", CLIENT_STAGES)
@pytest.mark.parametrize("kind", REQUESTS)
def test_a_device_refuses_what_its_table_does_not_hold(fleet: Any, mode: Mode, stage: type, kind: type) -> None:
    client = client_in(stage, fleet, mode)
    if client is None:
        assert not any(stage is source for source, _ in CLIENT_STEPS[mode])
        return
    vector = getattr(client.stage, "vector", None)
    legal = (stage, kind) in CLIENT_STEPS[mode]
    with pytest.raises(SottovoceError) as caught:
        client.receive(REQUESTS[kind])
    assert (type(caught.value) is UnexpectedMessage) != legal
    assert isinstance(client.stage, client_stages.Aborted)
    assert client.stage.error is caught.value
    assert client.masked_vector is None
    assert vector is None or bytes(vector) == bytes(len(vector))
    with pytest.raises(LocalProtocolError):
        client.advertise()


@pytest.mark.parametrize("mode", MODES)
def test_every_stage_of_a_device_is_in_its_table_or_final(mode: Mode) -> None:
    sources = {stage for stage, _ in CLIENT_STEPS[mode]}
    final = {client_stages.Revealed, client_stages.Aborted}
    only_active = {client_stages.SurvivorsSigned} if mode == "curious" else set()
    assert sources == set(CLIENT_STAGES) - {client_stages.Prepared} - final - only_active


def server_in(stage: type, fleet: Any) -> Any:
    rehearsal = fleet.rehearse(5)
    if stage is server_stages.Abandoned:
        with pytest.raises(RoundAbandoned):
            rehearsal.close()
    else:
        rehearsal.run_until(stage)
    assert type(rehearsal.server.stage) is stage
    return rehearsal


@pytest.mark.parametrize("stage", SERVER_STAGES)
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_server_refuses_what_its_table_does_not_hold_and_nothing_changes(
    fleet: Any, stage: type, kind: type
) -> None:
    rehearsal = server_in(stage, fleet)
    server, device = rehearsal.server, rehearsal.devices[0]
    session = bytes(32) if kind is AdvertiseKeys else server.session_id
    before, waiting = server.stage, server.waiting_for()
    with pytest.raises(SottovoceError) as caught:
        server.receive(rehearsal.opened(device, ANSWERS[kind], session=session))
    if (stage, kind) not in SERVER_STEPS and not isinstance(caught.value, UnexpectedMessage):
        # An answer of this kind was given before: a second, different one is named as that.
        assert caught.value.reason == "conflicting"  # type: ignore[attr-defined]
    assert ((stage, kind) in SERVER_STEPS) <= (type(caught.value) is not UnexpectedMessage)
    assert server.stage is before
    assert server.waiting_for() == waiting


@pytest.mark.parametrize(
    "stage", [stage for stage in SERVER_STAGES if stage is not server_stages.Unmasked], ids=lambda stage: stage.__name__
)
def test_no_partial_sum_is_ever_given_out(fleet: Any, stage: type) -> None:
    with pytest.raises(LocalProtocolError):
        _ = server_in(stage, fleet).server.result


def test_every_stage_of_the_server_can_be_closed_or_is_final(fleet: Any) -> None:
    assert CLOSINGS.keys() == STAGE_NAMES.keys() == {stage for stage, _ in SERVER_STEPS}
    for stage in set(SERVER_STAGES) - CLOSINGS.keys():
        with pytest.raises(LocalProtocolError):
            server_in(stage, fleet).server.close_stage()


def test_a_bug_of_ours_also_ends_the_devices_session(fleet: Any) -> None:
    rehearsal = fleet.rehearse(5)
    device = rehearsal.devices[0]
    vector = bytearray(rehearsal.plain[device])

    def broken(count: int) -> bytes:
        raise OSError("no entropy")

    client = fleet.client(device, vector, entropy=broken)
    with pytest.raises(OSError, match="no entropy"):
        client.advertise()
    assert client.stage == client_stages.Aborted()
    assert bytes(vector) == bytes(len(vector))


def reachable(root: object) -> set[bytes]:
    """Every bytes object that can be reached from `root`, through tracebacks and the variables of their frames too."""
    seen, pending, found = set[int](), [root], set[bytes]()
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, types.ModuleType | type | types.FunctionType):
            continue
        seen.add(id(each))
        if isinstance(each, bytes | bytearray):
            found.add(bytes(each))
        elif isinstance(each, types.FrameType):
            if each.f_globals["__name__"].startswith("sottovoce."):
                pending += each.f_locals.values()
        elif isinstance(each, types.TracebackType):
            pending += [each.tb_frame, each.tb_next]
        else:
            if isinstance(each, BaseException):
                pending += [each.__traceback__, each.__context__, each.__cause__]
            pending += gc.get_referents(each)
    return found


@pytest.mark.parametrize("stage", [server_stages.CollectingInputs, server_stages.CollectingShares])
def test_the_error_that_ended_a_session_holds_none_of_its_secrets(fleet: Any, stage: type) -> None:
    """It outlives the session: a traceback keeps the variables of every step that it went through."""
    rehearsal = fleet.rehearse(6)
    requests = rehearsal.run_until(stage)
    client, request = rehearsal.clients[rehearsal.devices[0]], requests[rehearsal.devices[0]]
    error: type[CryptoError]
    if stage is server_stages.CollectingInputs:
        secrets = {client.stage.self_seed, client.stage.mask.secret, client.stage.upload_key}
        request, error = replace(request, ciphertexts=request.ciphertexts[:-1] + b"x"), BadShare
    else:
        secrets = {*client.stage.masked.held.values()}
        request, error = replace(request, inclusions=b""), CryptoError
    assert secrets <= reachable(client)
    with pytest.raises(error):
        client.receive(request)
    assert client.stage.error is not None
    assert secrets.isdisjoint(reachable(client))
