"""Whole sessions in tests/vectors: real devices and a real coordinator do the same again, and refuse lies in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from stored_vectors import ANCHOR, AT, TRANSCRIPTS, VECTORS, Replay, agreement_of, raw, refused

from sottovoce.blobs import canonical, digest_of
from sottovoce.errors import RoundAbandoned
from sottovoce.identity import Identity, SignedContext
from sottovoce.secagg import keys, transcript
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.client_stages import Aborted
from sottovoce.secagg.server import STAGE_NAMES, ServerSession
from sottovoce.secagg.server_stages import Abandoned, Unmasked
from sottovoce.wire import messages
from sottovoce.wire.chunks import assemble
from sottovoce.wire.codec import Opened, open_envelope, parse

LENIENT = {"minimum_cohort": 3, "minimum_honest_survivors": 2, "modes": ["active", "curious"]}


class Session:
    """A transcript, and real devices and a real coordinator that are to do the same again."""

    def __init__(self, name: str) -> None:
        self.file = TRANSCRIPTS[name]
        self.agreement = agreement_of(self.file["agreement"])
        self.devices = {device["name"]: device for device in self.file["devices"]}
        self.stages = {stage["stage"]: stage for stage in self.file["stages"]}

    def certificate(self, name: str) -> Any:
        der = self.file["coordinator_certificate"] if name == "conductor" else self.devices[name]["certificate"]
        return ANCHOR.verify(raw(der), at=AT)

    def opened(self, payload: str, sender: str) -> Opened[Any]:
        return open_envelope(parse(raw(payload)), self.certificate(sender), raw(payload))

    def request(self, stage: str, device: str) -> Any:
        return self.opened(self.stages[stage]["requests"][device], "conductor").message

    def client(
        self, name: str, terms: Mapping[str, Any] | None = None, upload_key: bytes | None = None
    ) -> ClientSession:
        device = self.devices[name]
        key = ec.derive_private_key(int(device["private_key"], 16), ec.SECP256R1())
        agreement = self.agreement
        return ClientSession(
            identity=Identity(key, self.certificate(name)),
            anchor=ANCHOR,
            at=AT,
            context=agreement.context_of(name, session=transcript.NO_SESSION),
            plan=agreement.plan,
            state=agreement.state,
            parameters=agreement.parameters,
            upload_key=agreement.upload_key if upload_key is None else upload_key,
            terms=msgspec.convert(LENIENT | dict(terms or {}), ClientTerms),
            vector=bytearray(raw(device["vector"])),
            entropy=Replay(raw(device["entropy"])),
            chunk_bytes=self.file["chunk_bytes"],
        )

    def client_before(self, stage: str, name: str, terms: Mapping[str, Any] | None = None) -> ClientSession:
        """A real device that has gone through the transcript up to `stage`."""
        client = self.client(name, terms)
        for earlier, exchange in self.stages.items():
            if earlier == stage:
                break
            request = self.request(earlier, name)
            reply = client.advertise() if earlier == "advertise_keys" else client.receive(request)
            assert canonical(reply) == canonical(self.opened(exchange["answers"][name], name).message), earlier
        return client

    def server(self) -> ServerSession:
        agreement = self.agreement
        return ServerSession(
            context=SignedContext("conductor", "all", agreement.fleet, agreement.round, agreement.attempt),
            plan=agreement.plan,
            state=agreement.state,
            parameters=agreement.parameters,
            expected=self.devices,
            entropy=Replay(raw(self.file["upload_secret"])),
        )

    def play(self, server: ServerSession, stage: str, replaced: Mapping[str, str] | None = None) -> None:
        """Let the coordinator hear the answers of one stage."""
        for device, payload in self.stages[stage]["answers"].items():
            server.receive(self.opened((replaced or {}).get(device, payload), device))
            announced = server.expected_vector(device)
            if announced is not None:
                server.add_vector(device, assemble(announced, raw(self.devices[device]["masked_vector"])))

    def server_before(self, stage: str) -> ServerSession:
        """A real coordinator that has gone through the transcript up to `stage`, whose answers are still to come."""
        server = self.server()
        for earlier in self.stages:
            if earlier == stage:
                break
            self.play(server, earlier)
            server.close_stage()
        return server


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_device_does_again_what_the_transcript_says(name: str) -> None:
    session = Session(name)
    for device, written in session.devices.items():
        client = session.client(device)
        for stage, exchange in session.stages.items():
            if device not in exchange["answers"]:
                break
            request = session.request(stage, device)
            reply = client.advertise() if stage == "advertise_keys" else client.receive(request)
            assert canonical(reply) == canonical(session.opened(exchange["answers"][device], device).message), stage
            if stage == "masked_input":
                assert bytes(client.masked_vector or b"") == raw(written["masked_vector"])
            if stage == "share_keys":
                assert client.session_id.hex() == session.file["session"]
        entropy = client._setting.entropy
        assert isinstance(entropy, Replay)
        assert entropy.left == b""


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_coordinator_does_again_what_the_transcript_says(name: str) -> None:
    session = Session(name)
    server, outcome = session.server(), session.file["outcome"]
    for stage, exchange in session.stages.items():
        assert STAGE_NAMES[type(server.stage)] == stage
        asked = {reply.device: (canonical(reply.message), reply.session) for reply in server.outstanding()}
        for device, payload in exchange["requests"].items():
            opened = session.opened(payload, "conductor")
            assert asked.pop(device) == (canonical(opened.message), opened.context.session), (stage, device)
        assert not asked
        session.play(server, stage)
        if outcome.get("stage") == stage:
            with pytest.raises(RoundAbandoned) as caught:
                server.close_stage()
            assert caught.value.reason == outcome["abandoned"]
            assert server.stage == Abandoned(outcome["abandoned"])
            return
        server.close_stage()
    assert isinstance(server.stage, Unmasked)
    assert bytes(server.result).hex() == outcome["sum"]
    survivors = [session.file["devices"][position]["name"] for position in outcome["survivors"]]
    assert server.survivors == tuple(sorted(survivors))


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_intermediate_values_of_a_transcript_are_the_codes(name: str) -> None:
    session = Session(name)
    number, cipher = raw(session.file["session"]), session.agreement.parameters.cipher
    assert canonical(session.agreement.parameters).hex() == session.file["parameters_encoded"]
    assert digest_of(canonical(session.agreement.parameters)).hex() == session.file["parameters_digest"]
    for device, written in session.devices.items():
        for peer, channel in written.get("share_channels", {}).items():
            pair = keys.key_pair(raw(written["channel_secret"]))
            secret = pair.agree(raw(session.devices[peer]["channel_key"]))
            assert secret.hex() == channel["agreed"]
            between = keys.channel(secret, session=number)
            out = keys.share_channel_key(between, sender=device, recipient=peer)
            back = keys.share_channel_key(between, sender=peer, recipient=device)
            assert (out.hex(), back.hex()) == (channel["to"], channel["from"])
            out = keys.inclusion_token(between, sender=device, recipient=peer)
            back = keys.inclusion_token(between, sender=peer, recipient=device)
            assert (out.hex(), back.hex()) == (channel["inclusion_to"], channel["inclusion_from"])
        for peer, pairwise in written.get("pairwise_masks", {}).items():
            secret = keys.key_pair(raw(written["mask_secret"])).agree(raw(session.devices[peer]["mask_key"]))
            lower, upper = (device, peer) if pairwise["sign"] == "+" else (peer, device)
            key = keys.pairwise_mask_key(secret, session=number, lower=lower, upper=upper, cipher=cipher)
            assert (secret.hex(), key.hex()) == (pairwise["agreed"], pairwise["key"])
        if "upload" in written:
            secret = keys.key_pair(raw(session.file["upload_secret"])).agree(raw(written["channel_key"]))
            key = keys.upload_key(secret, session=number, device=device, cipher=cipher)
            assert (secret.hex(), key.hex()) == (written["upload"]["agreed"], written["upload"]["key"])
        if "self_mask" in written:
            key = keys.self_mask_key(raw(written["self_seed"]), session=number, device=device, cipher=cipher)
            assert key.hex() == written["self_mask"]["key"]


def of(operation: str) -> pytest.MarkDecorator:
    chosen = [vector for vector in VECTORS if vector["operation"] == operation]
    return pytest.mark.parametrize("vector", chosen, ids=lambda v: f"{v['id']}")


@of("device")
def test_a_device_refuses_what_the_vector_says_and_forgets_everything(vector: Any) -> None:
    inputs = vector["inputs"]
    client = Session(inputs["transcript"]).client_before(inputs["before"], inputs["device"], inputs.get("terms"))
    request = msgspec.msgpack.decode(raw(inputs["body"]), type=getattr(messages, inputs["request"]))
    with refused(vector) as caught:
        client.receive(request)
    assert client.stage == Aborted(caught.value)
    assert client.masked_vector is None


@of("device_terms")
def test_a_device_refuses_parameters_that_its_owner_does_not_allow(vector: Any) -> None:
    inputs = vector["inputs"]
    client = Session(inputs["transcript"]).client(inputs["device"], inputs["terms"])
    with refused(vector) as caught:
        client.advertise()
    assert client.stage == Aborted(caught.value)


@of("device_invited")
def test_a_device_makes_no_keys_for_a_coordinator_whose_own_is_none(vector: Any) -> None:
    inputs = vector["inputs"]
    client = Session(inputs["transcript"]).client(inputs["device"], upload_key=raw(inputs["upload_key"]))
    with refused(vector) as caught:
        client.advertise()
    assert client.stage == Aborted(caught.value)


@of("coordinator")
def test_the_coordinator_refuses_what_the_vector_says_and_stays_as_it_was(vector: Any) -> None:
    inputs = vector["inputs"]
    server = Session(inputs["transcript"]).server_before(inputs["before"])
    payload, certificate = raw(inputs["payload"]), ANCHOR.verify(raw(inputs["certificate"]), at=AT)
    stage, waiting = server.stage, server.waiting_for()
    with refused(vector):
        server.receive(open_envelope(parse(payload), certificate, payload))
    assert server.stage is stage
    assert server.waiting_for() == waiting


@of("abandon")
def test_the_coordinator_abandons_the_round_and_gives_no_sum(vector: Any) -> None:
    inputs = vector["inputs"]
    session = Session(inputs["transcript"])
    server = session.server()
    for stage in session.stages:
        session.play(server, stage, inputs["replaced"] if stage == inputs["stage"] else None)
        if stage != "unmasking":
            server.close_stage()
    with pytest.raises(RoundAbandoned) as caught:
        server.close_stage()
    assert caught.value.reason == vector["error"]
    assert server.stage == Abandoned(vector["error"])


@of("tolerate")
def test_the_coordinator_gets_the_sum_in_spite_of_one_members_wrong_shares(vector: Any) -> None:
    inputs = vector["inputs"]
    session = Session(inputs["transcript"])
    server = session.server_before(inputs["stage"])
    session.play(server, inputs["stage"], inputs["replaced"])
    server.close_stage()
    assert bytes(server.result).hex() == vector["expected"] == session.file["outcome"]["sum"]
