"""The vectors in tests/vectors, each of one operation: the code does what it says.

Also that the files are what the second implementation makes. Whole sessions: `test_vectors_of_sessions.py`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import vector_files
from aggregation_plans import plan_of
from cryptography import x509
from stored_vectors import ANCHOR, AT, PATHS, VECTORS, Inputs, Replay, agreement_of, parameters_of, raw, refused
from vector import plain as in_hex

from sottovoce.blobs import canonical
from sottovoce.identity import TrustAnchor
from sottovoce.plan import Aggregation, Counted
from sottovoce.secagg import graph, keys, segments, shamir, transcript, uploads
from sottovoce.secagg.encoding import decode, encode
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.lanes import Layout, layout_of
from sottovoce.secagg.masks import MaskExpander
from sottovoce.wire.chunks import VectorChunk, decode_vector_chunk, encode_vector_chunk
from sottovoce.wire.codec import open_envelope, parse
from sottovoce.wire.messages import AdvertiseKeys, TaggedVector


def test_no_vector_file_is_stale() -> None:
    made = vector_files.files()
    stored = {path.name: path.read_text(encoding="utf-8") for path in PATHS}
    stale = [name for name in sorted(made.keys() | stored.keys()) if made.get(name) != stored.get(name)]
    assert not stale, (
        f"stale: {', '.join(stale)}; look at what has changed in the protocol, then run scripts/make_vectors"
    )


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


def layout(inputs: Inputs) -> Layout:
    aggregations = (
        Aggregation(name=f"a{index}", tensors=(f"int64[{count}]",), encoding=Counted(maximum=maximum), lane=lane)
        for index, (lane, count, maximum) in enumerate(inputs["lanes"])
    )
    plan = plan_of(*aggregations, weight_cap=inputs["weight_cap"])
    return layout_of(plan, maximum_clients=inputs["maximum_clients"])


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
    key, cipher = raw(inputs["key"]), inputs["cipher"]
    made = uploads.tag_vector(raw(inputs["vector"]), key, cipher, chunk_bytes=inputs["chunk_bytes"])
    return {"size": made.size, "chunk_bytes": made.chunk_bytes, "tags": made.tags}


def verify_chunk(inputs: Inputs) -> None:
    announced = inputs["announced"] | {"tags": raw(inputs["announced"]["tags"])}
    expected = uploads.expect(TaggedVector(**announced), raw(inputs["key"]), inputs["cipher"])
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
    "upload_key": lambda i: keys.upload_key(
        raw(i["secret"]), session=raw(i["session"]), device=i["device"], cipher=i["cipher"]
    ),
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
    with refused(vector):
        operation(vector["inputs"])


def test_every_operation_has_valid_and_invalid_vectors_where_it_can_fail() -> None:
    found = {(vector["operation"], vector["result"]) for vector in VECTORS}
    assert {operation for operation, _ in found} == OPERATIONS.keys() | _NEED_A_SESSION
    can_fail = {"open", "certificate", "agree", "decrypt", "join_limbs", "parse_shares", "rebuild", "sum"}
    can_fail |= {"check_graph", "verify_chunk", "parse_chunk"}
    assert {(operation, result) for operation in can_fail for result in ("valid", "invalid")} <= found
