"""The vectors in tests/vectors: the code does what each says, and each is what the second implementation makes."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import vector_files
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from vector import plain as in_hex

from sottovoce import errors
from sottovoce.errors import RoundAbandoned
from sottovoce.identity import Identity, SignedContext, TrustAnchor
from sottovoce.plan import Aggregation, Counted, LocalWork, Plan, PrivacyTerms, blob_ref, canonical, digest_of
from sottovoce.secagg import graph, keys, segments, shamir, transcript, uploads
from sottovoce.secagg.client import ClientSession, ClientTerms
from sottovoce.secagg.client_stages import Aborted
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.lanes import Layout, decode, encode, layout_of
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.server import STAGE_NAMES, ServerSession
from sottovoce.secagg.server_stages import Abandoned, Unmasked
from sottovoce.wire import messages
from sottovoce.wire.chunks import VectorChunk, assemble, decode_vector_chunk, encode_vector_chunk
from sottovoce.wire.codec import Opened, open_envelope, parse
from sottovoce.wire.messages import AdvertiseKeys, SecAggParameters, TaggedVector

FOLDER = Path(__file__).parents[2] / "vectors"
WRITTEN_BY_HAND = {"text.json", "sketches.json"}
"""Examples, not computed ones: what people expect of a message's words."""
PATHS = [path for path in FOLDER.glob("*.json") if path.name not in WRITTEN_BY_HAND]
FILES: dict[str, Any] = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in PATHS}
VECTORS = [vector for file in FILES.values() for vector in file.get("vectors", ())]
TRANSCRIPTS = {name: file for name, file in FILES.items() if name.startswith("transcript-")}
AT = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
ANCHOR = TrustAnchor(x509.load_der_x509_certificate(bytes.fromhex(FILES["keys"]["authority"])))
LENIENT = {"minimum_cohort": 3, "minimum_honest_survivors": 2, "modes": ["active", "curious"]}

Inputs = Mapping[str, Any]


def test_no_vector_file_is_stale() -> None:
    made = vector_files.files()
    stored = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
    stale = [name for name in sorted(made.keys() | stored.keys()) if made.get(name) != stored.get(name)]
    assert not stale, (
        f"stale: {', '.join(stale)}; look at what has changed in the protocol, then run scripts/make_vectors"
    )


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def parameters_of(inputs: Inputs) -> SecAggParameters:
    return msgspec.convert(inputs, SecAggParameters)


def agreement_of(inputs: Inputs) -> transcript.Agreement:
    context = SignedContext("pi-1", inputs["coordinator"], inputs["fleet"], inputs["round"], inputs["attempt"])
    return transcript.agree(
        context,
        coordinator=inputs["coordinator"],
        plan=raw(inputs["plan"]),
        state=raw(inputs["state"]),
        parameters=parameters_of(inputs["parameters"]),
        upload_key=raw(inputs["upload_key"]),
    )


class Replay:
    """Entropy that gives exactly the bytes of a vector, all of them."""

    def __init__(self, content: bytes) -> None:
        self.left = content

    def __call__(self, count: int) -> bytes:
        drawn, self.left = self.left[:count], self.left[count:]
        assert len(drawn) == count
        return drawn


# --- one function per operation ---------------------------------------------------------------------------------------


def leaf(inputs: Inputs) -> bytes:
    given = [raw(inputs[name]) for name in ("channel_key", "mask_key", "nonce")]
    return transcript.leaf_of(inputs["device"], raw(inputs["fingerprint"]), AdvertiseKeys(b"", b"", b"", b"", *given))


def session_id(inputs: Inputs) -> bytes:
    return transcript.session_id(
        agreement_of(inputs),
        members=inputs["n"],
        neighbour_count=inputs["k"],
        threshold=inputs["t"],
        root=raw(inputs["root"]),
    )


def open_payload(inputs: Inputs) -> bytes:
    payload, certificate = raw(inputs["payload"]), ANCHOR.verify(raw(inputs["certificate"]), at=AT)
    return canonical(open_envelope(parse(payload), certificate, payload).message)


def certificate(inputs: Inputs) -> str:
    anchor = TrustAnchor(x509.load_der_x509_certificate(raw(inputs["authority"])))
    at = datetime.datetime.fromtimestamp(inputs["at"], datetime.UTC)
    return anchor.verify(raw(inputs["certificate"]), at=at, role=inputs["role"]).name


def mask(inputs: Inputs) -> bytes:
    parameters, vector = parameters_of(inputs["parameters"]), bytearray(raw(inputs["vector"]))
    plain = bytes(vector)
    expander = MaskExpander(parameters)
    expander.add(vector, raw(inputs["key"]))
    back = bytearray(vector)
    expander.subtract(back, raw(inputs["key"]))
    assert back == plain
    segments.pack(vector, parameters)
    return bytes(vector)


def split(inputs: Inputs) -> list[list[bytes]]:
    rows = shamir.split(
        [raw(secret) for secret in inputs["secrets"]],
        points=inputs["points"],
        threshold=inputs["threshold"],
        entropy=Replay(raw(inputs["entropy"])),
    )
    size = shamir.SHARE_BYTES
    return [[row[at : at + size] for at in range(0, len(row), size)] for row in rows]


def rebuild(inputs: Inputs) -> bytes:
    points = [point for point, _ in inputs["shares"]]
    limbs = shamir.parse_shares(b"".join(raw(share) for _, share in inputs["shares"]))
    return shamir.secret_of(shamir.interpolate(points, limbs))


def plan_of(inputs: Inputs) -> Plan:
    aggregations = [
        Aggregation(name=f"a{index}", tensors=(f"int64[{count}]",), encoding=Counted(maximum=maximum), lane=lane)
        for index, (lane, count, maximum) in enumerate(inputs["lanes"])
    ]
    return Plan(
        fleet="choir",
        name="song",
        collection="takes",
        program=blob_ref(b"program"),
        work=LocalWork(),
        aggregations=tuple(aggregations),
        privacy=PrivacyTerms(purpose="vectors", minimum_cohort=3, weight_cap=inputs["weight_cap"]),
    )


def layout(inputs: Inputs) -> Layout:
    return layout_of(plan_of(inputs), maximum_clients=inputs["maximum_clients"])


def lay_out(inputs: Inputs) -> dict[str, Any]:
    made = layout(inputs)
    values = {f"a{index}": [np.array(row, np.int64)] for index, row in enumerate(inputs["entries"])}
    vector = encode(made, values, weight=inputs["weight"], entropy=bytes)
    shape = {name: getattr(made, name) for name in ("vector_bytes", "wide_bytes", "packed")}
    return shape | {"in_memory": bytes(vector)}


def lane_sum(inputs: Inputs) -> dict[str, Any]:
    found = decode(layout(inputs), raw(inputs["total"]), survivors=inputs["survivors"])
    sums = [found.sums[f"a{index}"][0].astype(np.int64).tolist() for index in range(len(inputs["lanes"]))]
    return {"weight": found.weight, "clamped": found.clamped, "sums": sums}


def complete_graph(inputs: Inputs) -> dict[str, int]:
    parameters, members = parameters_of(inputs["parameters"]), inputs["members"]
    told = graph.complete_graph(parameters, members)
    graph.check_graph(parameters, members, told)
    return {
        "k": told.neighbours,
        "c": graph.corrupt_bound(members, parameters.corrupt_share_bp),
        "t": told.threshold,
        "members_needed": graph.survivors_needed(parameters, told.threshold),
    }


def ring(inputs: Inputs) -> dict[str, Any]:
    made = graph.Graph(inputs["members"], inputs["k"], transcript.graph_seed(raw(inputs["root"])))
    every = made.all_neighbours().tolist()
    assert [list(made.neighbours(position)) for position in range(inputs["members"])] == every
    chosen = inputs["positions"]
    return {"neighbours": [every[position] for position in chosen], "points": made.evaluation_points(chosen)}


def check_graph(inputs: Inputs) -> bool:
    told = GraphParameters(inputs["k"], inputs["t"])
    graph.check_graph(parameters_of(inputs["parameters"]), inputs["members"], told)
    return True


def check_parameters(inputs: Inputs) -> bool:
    graph.check_parameters(parameters_of(inputs["parameters"]))
    return True


def accept_key(inputs: Inputs) -> None:
    keys.refuse_low_order(raw(inputs["public_key"]))


def tag(inputs: Inputs) -> dict[str, Any]:
    made = uploads.tag_vector(raw(inputs["vector"]), raw(inputs["key"]), chunk_bytes=inputs["chunk_bytes"])
    return {"size": made.size, "chunk_bytes": made.chunk_bytes, "tags": made.tags}


def verify_chunk(inputs: Inputs) -> None:
    announced = inputs["announced"] | {"tags": raw(inputs["announced"]["tags"])}
    expected = uploads.expect(TaggedVector(**announced), raw(inputs["key"]))
    expected.verify_chunk(inputs["index"], raw(inputs["chunk"]))


def chunk_payload(inputs: Inputs) -> bytes:
    return encode_vector_chunk(VectorChunk(raw(inputs["session"]), inputs["index"], raw(inputs["content"])))


def parse_chunk(inputs: Inputs) -> dict[str, Any]:
    chunk = decode_vector_chunk(raw(inputs["payload"]))
    return {"session": chunk.session, "index": chunk.index, "content": bytes(chunk.content)}


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "leaf": leaf,
    "merkle_root": lambda i: transcript.merkle_root([raw(one) for one in i["leaves"]]),
    "session_id": session_id,
    "graph_seed": lambda i: transcript.graph_seed(raw(i["root"])),
    "commitment": lambda i: transcript.commitment_to(
        raw(i["self_seed"]), session=raw(i["session"]), position=i["position"]
    ),
    "survivors": lambda i: transcript.survivors_digest(i["survivors"], session=raw(i["session"])),
    "subsets": lambda i: transcript.subset_seed(raw(i["session"]), i["attempt"]),
    "open": open_payload,
    "certificate": certificate,
    "public_key": lambda i: keys.key_pair(raw(i["secret"])).public,
    "agree": lambda i: keys.key_pair(raw(i["secret"])).agree(raw(i["public_key"])),
    "accept_key": accept_key,
    "self_mask_key": lambda i: keys.self_mask_key(
        raw(i["self_seed"]), session=raw(i["session"]), device=i["device"], cipher=i["cipher"]
    ),
    "pairwise_mask_key": lambda i: keys.pairwise_mask_key(
        raw(i["secret"]), session=raw(i["session"]), lower=i["lower"], upper=i["upper"], cipher=i["cipher"]
    ),
    "share_channel_key": lambda i: keys.share_channel_key(
        keys.channel(raw(i["secret"]), session=raw(i["session"])), sender=i["sender"], recipient=i["recipient"]
    ),
    "inclusion_token": lambda i: keys.inclusion_token(
        keys.channel(raw(i["secret"]), session=raw(i["session"])), sender=i["sender"], recipient=i["recipient"]
    ),
    "upload_key": lambda i: keys.upload_key(raw(i["secret"]), session=raw(i["session"]), device=i["device"]),
    "tag": tag,
    "verify_chunk": verify_chunk,
    "chunk_payload": chunk_payload,
    "parse_chunk": parse_chunk,
    "encrypt": lambda i: keys.encrypt_shares(raw(i["key"]), raw(i["shares"]), session=raw(i["session"])),
    "decrypt": lambda i: keys.decrypt_shares(raw(i["key"]), raw(i["ciphertext"]), session=raw(i["session"])),
    "limbs": lambda i: shamir._limbs_of(raw(i["secret"])).tolist(),
    "join_limbs": lambda i: shamir.secret_of(np.array(i["limbs"], np.uint16)),
    "split": split,
    "parse_shares": lambda i: shamir.parse_shares(raw(i["shares"])).tolist(),
    "rebuild": rebuild,
    "mask": mask,
    "layout": layout,
    "lay_out": lay_out,
    "sum": lane_sum,
    "complete_graph": complete_graph,
    "ring": ring,
    "check_graph": check_graph,
    "check_parameters": check_parameters,
}
_NEED_A_SESSION = {"device", "device_terms", "device_invited", "coordinator", "abandon", "tolerate"}


def plain(value: Any) -> Any:
    """`value` as JSON has it."""
    return json.loads(json.dumps(in_hex(value)))


@pytest.mark.parametrize(
    "vector", [v for v in VECTORS if v["operation"] not in _NEED_A_SESSION], ids=lambda v: f"{v['id']}"
)
def test_the_code_does_what_the_vector_says(vector: Any) -> None:
    operation = OPERATIONS[vector["operation"]]
    if vector["result"] == "valid":
        assert plain(operation(vector["inputs"])) == vector["expected"], vector["comment"]
        return
    refusal = getattr(errors, vector["error"])
    with pytest.raises(refusal) as caught:
        operation(vector["inputs"])
    assert type(caught.value) is refusal, vector["comment"]


# --- whole sessions ---------------------------------------------------------------------------------------------------


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
            key = keys.upload_key(secret, session=number, device=device)
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
    refusal = getattr(errors, vector["error"])
    with pytest.raises(refusal) as caught:
        client.receive(request)
    assert type(caught.value) is refusal, vector["comment"]
    assert client.stage == Aborted(caught.value)
    assert client.masked_vector is None


@of("device_terms")
def test_a_device_refuses_parameters_that_its_owner_does_not_allow(vector: Any) -> None:
    inputs = vector["inputs"]
    client = Session(inputs["transcript"]).client(inputs["device"], inputs["terms"])
    with pytest.raises(getattr(errors, vector["error"])):
        client.advertise()
    assert isinstance(client.stage, Aborted)


@of("device_invited")
def test_a_device_makes_no_keys_for_a_coordinator_whose_own_is_none(vector: Any) -> None:
    inputs = vector["inputs"]
    client = Session(inputs["transcript"]).client(inputs["device"], upload_key=raw(inputs["upload_key"]))
    refusal = getattr(errors, vector["error"])
    with pytest.raises(refusal) as caught:
        client.advertise()
    assert type(caught.value) is refusal, vector["comment"]
    assert client.stage == Aborted(caught.value)


@of("coordinator")
def test_the_coordinator_refuses_what_the_vector_says_and_stays_as_it_was(vector: Any) -> None:
    inputs = vector["inputs"]
    server = Session(inputs["transcript"]).server_before(inputs["before"])
    payload, certificate = raw(inputs["payload"]), ANCHOR.verify(raw(inputs["certificate"]), at=AT)
    stage, waiting = server.stage, server.waiting_for()
    refusal = getattr(errors, vector["error"])
    with pytest.raises(refusal) as caught:
        server.receive(open_envelope(parse(payload), certificate, payload))
    assert type(caught.value) is refusal, vector["comment"]
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


def test_every_operation_has_valid_and_invalid_vectors_where_it_can_fail() -> None:
    found = {(vector["operation"], vector["result"]) for vector in VECTORS}
    assert {operation for operation, _ in found} == OPERATIONS.keys() | _NEED_A_SESSION
    can_fail = {"open", "certificate", "agree", "decrypt", "join_limbs", "parse_shares", "rebuild", "sum"}
    can_fail |= {"check_graph", "verify_chunk", "parse_chunk"}
    assert {(operation, result) for operation in can_fail for result in ("valid", "invalid")} <= found
