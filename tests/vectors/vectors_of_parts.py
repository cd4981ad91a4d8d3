"""Vectors of all that a session is made of: hashes, keys, shares, streams, lanes, graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import by_the_spec as spec
import shares_by_the_spec as share_spec
import vector_by_the_spec as vector_spec
from fleet_by_the_spec import (
    FixedEntropy,
    agreement,
    parameters,
    signer,
)  # fmt: skip
from vector import Vector
from vector_by_the_spec import Lane

SESSION = spec.sha256(b"a session")
SHORT, LONG = spec.sha256(b"one secret"), b"\xff" * 32


def hash_vectors() -> Iterator[Vector]:
    keys = spec.sha256(b"channel"), spec.sha256(b"mask"), spec.sha256(b"nonce")
    device = signer("pi-1")
    inputs: dict[str, Any] = {"device": "pi-1", "fingerprint": device.fingerprint}
    inputs |= dict(zip(("channel_key", "mask_key", "nonce"), keys, strict=True))
    content = spec.lp(b"sv1/leaf", b"pi-1", device.fingerprint, *keys)
    yield Vector(
        "leaf", "a roster leaf", inputs, spec.leaf("pi-1", device.fingerprint, *keys), also={"hashed": content}
    )
    for count in (1, 2, 3, 4, 5, 7, 8):
        leaves = sorted(spec.sha256(bytes([count, index])) for index in range(count))
        yield Vector("merkle_root", f"{count} leaves", {"leaves": leaves}, spec.merkle_root(leaves))
    for mode in ("active", "curious"):
        agreed = agreement(mode=mode)
        shape = {"n": 6, "k": 5, "t": 4, "root": b"R" * 32}
        inputs = _agreement_of(agreed) | shape
        also = {"parameters": spec.packed(agreed.parameters), "parameters_digest": agreed.parameters_digest}
        yield Vector("session_id", f"{mode} mode", inputs, spec.session_id(agreed, **shape), also=also)  # type: ignore[arg-type]
    yield Vector("graph_seed", "the ring's seed", {"root": b"R" * 32}, spec.hashed("sv1/graph", b"R" * 32))
    for position in (0, 3, 65519):
        inputs = {"session": SESSION, "position": position, "self_seed": SHORT}
        yield Vector("commitment", "to a self seed", inputs, spec.commitment(SESSION, position, SHORT))
    for survivors in ([], [0], [0, 2, 5], list(range(300))):
        inputs = {"session": SESSION, "survivors": survivors}
        yield Vector("survivors", f"{len(survivors)} survivors", inputs, spec.survivors_digest(SESSION, survivors))
    for attempt in (0, 255):
        inputs = {"session": SESSION, "attempt": attempt}
        yield Vector("subsets", "order of the subsets", inputs, spec.hashed("sv1/subsets", SESSION, spec.u32(attempt)))


def _agreement_of(agreed: spec.Agreement) -> dict[str, Any]:
    names = ("fleet", "coordinator", "round", "attempt", "plan", "state", "parameters", "upload_key")
    return {name: getattr(agreed, name) for name in names}


_P = 2**255 - 19
_LOW_ORDER = (
    0, 1, _P - 1, _P, _P + 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)  # fmt: skip


def key_vectors() -> Iterator[Vector]:
    one, two = spec.sha256(b"one"), spec.sha256(b"two")
    yield Vector("public_key", "X25519", {"secret": one}, spec.public_key(one))
    secret = spec.agreed(one, spec.public_key(two))
    yield Vector("agree", "X25519", {"secret": one, "public_key": spec.public_key(two)}, secret)
    yield Vector("agree", "the other way round", {"secret": two, "public_key": spec.public_key(one)}, secret)
    for number in _LOW_ORDER:
        for top in (0, 2**255):
            encoded = (number % 2**255 | top).to_bytes(32, "little")
            for operation in ("agree", "accept_key"):
                inputs: dict[str, Any] = (
                    {"secret": one, "public_key": encoded} if operation == "agree" else {"public_key": encoded}
                )
                yield Vector(operation, "a point of low order", inputs, error="LowOrderPoint", flags=("LowOrder",))
    yield Vector("accept_key", "31 bytes", {"public_key": bytes(31)}, error="CryptoError", flags=("Length",))
    for cipher in ("aes-128-ctr", "chacha20"):
        inputs = {"self_seed": SHORT, "session": SESSION, "device": "pi-1", "cipher": cipher}
        also = {"info": spec.lp(b"sv1/self-mask", b"pi-1", cipher.encode())}
        yield Vector(
            "self_mask_key", cipher, inputs, spec.self_mask_key(SHORT, "pi-1", cipher, session=SESSION), also=also
        )
        inputs = {"secret": secret, "session": SESSION, "lower": "pi-2", "upper": "pi-1", "cipher": cipher}
        also = {"info": spec.lp(b"sv1/pairwise-mask", b"pi-2", b"pi-1", cipher.encode())}
        made = spec.pairwise_mask_key(secret, "pi-2", "pi-1", cipher, session=SESSION)
        yield Vector("pairwise_mask_key", cipher, inputs, made, also=also)
    for sender, recipient in (("pi-1", "pi-2"), ("pi-2", "pi-1")):
        inputs = {"secret": secret, "session": SESSION, "sender": sender, "recipient": recipient}
        made = spec.share_channel_key(secret, sender, recipient, session=SESSION)
        also = {"info": spec.lp(b"sv1/share-channel", sender.encode(), recipient.encode(), b"chacha20-poly1305")}
        yield Vector("share_channel_key", f"from {sender} to {recipient}", inputs, made, also=also)
        also = {"info": spec.lp(b"sv1/inclusion", sender.encode(), recipient.encode())}
        token = spec.inclusion_token(secret, sender, recipient, session=SESSION)
        yield Vector("inclusion_token", f"from {sender} to {recipient}", inputs, token, also=also)
    for device in ("pi-1", "pi-2"):
        for cipher, (aead, _) in spec.TAGGING.items():
            inputs = {"secret": secret, "session": SESSION, "device": device, "cipher": cipher}
            also = {"info": spec.lp(b"sv1/upload", device.encode(), aead.encode())}
            key = spec.upload_key(secret, device, cipher, session=SESSION)
            yield Vector("upload_key", f"{device} {cipher}", inputs, key, also=also)
    for cipher in spec.TAGGING:
        yield from _tags(cipher, secret)
    yield from _payloads()
    yield from _ciphertexts(secret)


def _tags(cipher: str, secret: bytes) -> Iterator[Vector]:
    key, vector = spec.upload_key(secret, "pi-1", cipher, session=SESSION), FixedEntropy("tagged")(40)
    for chunk_bytes in (16, 20, 40, 64):
        inputs: dict[str, Any] = {"key": key, "cipher": cipher, "vector": vector, "chunk_bytes": chunk_bytes}
        tagged = spec.tagged(vector, chunk_bytes, key, cipher)
        yield Vector("tag", f"{cipher}: chunks of {chunk_bytes} bytes", inputs, tagged)
    chunks = [vector[:16], vector[16:32], vector[32:]]
    inputs = {"key": key, "cipher": cipher, "announced": spec.tagged(vector, 16, key, cipher)}
    for index, chunk in enumerate(chunks):
        yield Vector("verify_chunk", f"{cipher}: chunk {index}", inputs | {"index": index, "chunk": chunk}, None)
    whole = b"".join(chunks)
    other_session = spec.upload_key(secret, "pi-1", cipher, session=bytes(32))
    other_tags = spec.tagged(whole, 16, spec.upload_key(secret, "pi-2", cipher, session=SESSION), cipher)
    short = spec.tagged(vector[:15], 16, key, cipher)["tags"]
    other_cipher = next(other for other in spec.TAGGING if other != cipher)
    for comment, changes in {
        "one bit changed": {"index": 0, "chunk": bytes([vector[0] ^ 1]) + vector[1:16]},
        "another chunk": {"index": 0, "chunk": chunks[1]}, "cut short": {"index": 0, "chunk": vector[:15]},
        "longer": {"index": 0, "chunk": vector[:17]}, "empty": {"index": 2, "chunk": b""},
        "a chunk after the last": {"index": 3, "chunk": chunks[2]}, "chunk -1": {"index": -1, "chunk": chunks[2]},
        "another session's key": {"index": 0, "chunk": chunks[0], "key": other_session},
        "the other cipher's tags": {
            "index": 0, "chunk": chunks[0], "announced": spec.tagged(whole, 16, key, other_cipher)
        },
        "another device's tags": {"index": 0, "chunk": chunks[0], "announced": other_tags},
        "tagged with another length": {
            "index": 0, "chunk": vector[:15],
            "announced": {"size": 40, "chunk_bytes": 16, "tags": short + bytes(32)},
        },
    }.items():  # fmt: skip
        yield Vector("verify_chunk", f"{cipher}: {comment}", inputs | changes, error="BadBlob", flags=("Tag",))


def _payloads() -> Iterator[Vector]:
    """What carries a chunk: 40 bytes and its content."""
    content = FixedEntropy("uploaded")(24)
    for index, chunk in ((0, content), (1, content[:1]), (258, b""), (2**32, content)):
        parts = {"session": SESSION, "index": index, "content": chunk}
        payload = spec.chunk_payload(SESSION, index, chunk)
        comment = f"chunk {index} of {len(chunk)} bytes"
        yield Vector("chunk_payload", comment, parts, payload)
        yield Vector("parse_chunk", comment, {"payload": payload}, parts)
    for comment, payload in (
        ("no bytes", b""),
        ("a session only", SESSION),
        ("a byte too few", SESSION + bytes(7)),
    ):
        yield Vector("parse_chunk", comment, {"payload": payload}, error="MalformedMessage", flags=("Malformed",))


def _ciphertexts(secret: bytes) -> Iterator[Vector]:
    key = spec.share_channel_key(secret, "pi-1", "pi-2", session=SESSION)
    shares = FixedEntropy("shares")(72)
    good = spec.encrypt(key, shares, session=SESSION)
    inputs = {"key": key, "session": SESSION}
    yield Vector("encrypt", "two shares", inputs | {"shares": shares}, good)
    yield Vector("decrypt", "two shares", inputs | {"ciphertext": good}, shares)
    for comment, changes in {
        "one bit changed": {"ciphertext": bytes([good[0] ^ 1]) + good[1:]},
        "one bit of the tag changed": {"ciphertext": good[:-1] + bytes([good[-1] ^ 1])},
        "cut short": {"ciphertext": good[:-1]},
        "empty": {"ciphertext": b""},
        "of another session": {"ciphertext": good, "session": bytes(32)},
        "for the other direction": {
            "ciphertext": good, "key": spec.share_channel_key(secret, "pi-2", "pi-1", session=SESSION)
        },
    }.items():  # fmt: skip
        yield Vector("decrypt", comment, inputs | changes, error="BadShare", flags=("Ciphertext",))


def share_vectors() -> Iterator[Vector]:
    for secret in (bytes(32), SHORT, LONG):
        yield Vector("limbs", "lowest first", {"secret": secret}, share_spec.limbs(secret))
        yield Vector("join_limbs", "and back", {"limbs": share_spec.limbs(secret)}, secret)
    for comment, index, value in (
        ("a limb of 2^15", 0, 2**15), ("the largest field element", 3, 65520), ("the last limb of 2^15", 17, 2**15),
        ("the lowest pad bit", 17, 2), ("the highest pad bit", 17, 2**14),
    ):  # fmt: skip
        values = [value if place == index else 0 for place in range(18)]
        yield Vector("join_limbs", comment, {"limbs": values}, error="BadShare", flags=("LimbRange",))
    for count, threshold in ((1, 1), (3, 2), (5, 4)):
        yield from _splits(count, threshold)
    too_large = b"\xff\xff" * 2 + b"\xf1\xff"
    entropy = too_large + FixedEntropy("rejected")(2000)
    yield _split("coefficients of 65521 or more are drawn again", [SHORT], [1, 2], 2, entropy)
    for comment, content, error in (
        ("the largest limb", b"\xf0\xff" * 18, None), ("a limb of 65521", b"\xf1\xff" + bytes(34), "BadShare"),
        ("the last limb of 65535", bytes(34) + b"\xff\xff", "BadShare"), ("35 bytes", bytes(35), "BadShare"),
        ("37 bytes", bytes(37), "BadShare"), ("two shares", bytes(range(72)), None), ("no shares", b"", None),
        ("the last limb of the second 65521", bytes(70) + b"\xf1\xff", "BadShare"),
        ("two shares but for a byte", bytes(71), "BadShare"),
    ):  # fmt: skip
        expected = [spec.words(share, 2) for share in spec.pieces(content, 36)] if error is None else None
        flags = () if error is None else ("ShareRange",)
        yield Vector("parse_shares", comment, {"shares": content}, expected, error, flags)


def _split(comment: str, secrets: list[bytes], x: list[int], t: int, entropy: bytes) -> Vector:
    drawn = _Replayed(entropy)
    shares = share_spec.split(secrets, points=x, t=t, entropy=drawn)
    inputs = {"secrets": secrets, "points": x, "threshold": t, "entropy": entropy[: drawn.at]}
    return Vector("split", comment, inputs, shares)


class _Replayed:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def __call__(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]


def _splits(count: int, threshold: int) -> Iterator[Vector]:
    entropy = FixedEntropy(f"split {count} {threshold}")(2000)
    secrets, x = [SHORT, LONG], list(range(1, count + 1))
    made = _split(f"{threshold} of {count}", secrets, x, threshold, entropy)
    yield made
    shares = {point: share[0] for point, share in zip(x, made.expected, strict=True)}
    chosen = {point: shares[point] for point in x[-threshold:]}
    yield Vector("rebuild", f"{threshold} of {count}", {"shares": _rows(chosen)}, SHORT)
    if threshold > 1:
        yield from _wrong_shares(chosen)


def _wrong_shares(shares: dict[int, bytes]) -> Iterator[Vector]:
    """The last share changed: the limb comes out of range, or it gives another secret."""
    last, wanted = max(shares), {"BadShare", None}
    for change in range(1, share_spec.PRIME):
        value = (int.from_bytes(shares[last][:2], "little") + change) % share_spec.PRIME
        wrong = shares | {last: value.to_bytes(2, "little") + shares[last][2:]}
        try:
            came, error, comment = share_spec.rebuild(wrong), None, "a wrong share: only a commitment tells that it is"
        except spec.Refused:
            came, error, comment = b"", "BadShare", "a wrong share: the rebuilt limb is out of range"
        if error in wanted:
            wanted.remove(error)
            yield Vector("rebuild", comment, {"shares": _rows(wrong)}, came, error, ("WrongShare",))
        if not wanted:
            return


def _rows(shares: dict[int, bytes]) -> list[list[Any]]:
    return [[point, share] for point, share in shares.items()]


SHAPES: tuple[dict[str, Any], ...] = (
    {"vector_bytes": 40, "wide_bytes": 24, "packed": []},
    {"vector_bytes": 24, "wide_bytes": 24, "packed": []},
    {"vector_bytes": 88 + 128 + 168 + 8 + 16, "wide_bytes": 16, "packed": [[11, 64], [16, 64], [21, 64]]},
)


def mask_vectors() -> Iterator[Vector]:
    for cipher in ("aes-128-ctr", "chacha20"):
        key = spec.sha256(cipher.encode())[: spec.KEY_BYTES[cipher]]
        for shape in SHAPES:
            settings = parameters(cipher=cipher, **shape)
            length = vector_spec.memory_bytes(settings)
            vector = FixedEntropy(f"vector of {length}")(length)
            masked = vector_spec.combined(settings, vector, spec.stream(cipher, key, length), 1)
            inputs = {"parameters": settings, "key": key, "vector": vector}
            also = {"stream": spec.stream(cipher, key, length), "in_memory": masked}
            comment = f"{cipher}, {len(settings['packed'])} packed segments"
            yield Vector("mask", comment, inputs, vector_spec.packed_vector(settings, masked), also=also)


def lane_vectors() -> Iterator[Vector]:
    """Values on whole levels of the quantiser, so that rounding does not matter."""
    cases: dict[str, list[tuple[str, int, int]]] = {
        "uint32 and uint64": [("uint32", 5, 255), ("uint64", 2, 2**40 - 1)],
        "an odd number of uint32 entries": [("uint32", 3, 15), ("uint32", 2, 7)],
        "uint16": [("uint16", 70, 15), ("uint32", 1, 3)],
        "3x21": [("3x21", 7, 2047), ("uint32", 2, 3), ("3x21", 3, 1)],
        "dense": [("dense", 65, 31), ("uint64", 1, 9), ("dense", 3, 4095)],
        "only the weight": [("uint64", 1, 1)],
    }
    for comment, rows in cases.items():
        lanes = [Lane(*row) for row in rows]
        entropy = FixedEntropy(comment)
        entries = [
            [lane.maximum, *(byte % (lane.maximum + 1) for byte in entropy(lane.count)[1:])][: lane.count]
            for lane in lanes
        ]
        shape = vector_spec.layout(lanes, 100)
        memory = vector_spec.laid_out(lanes, entries, weight=3, clamped=0, maximum_clients=100)
        inputs = {"maximum_clients": 100, "lanes": rows, "entries": entries, "weight": 3, "weight_cap": 50}
        also = {"on_the_wire": vector_spec.packed_vector(shape, memory)}
        yield Vector("lay_out", comment, inputs, shape | {"in_memory": memory}, also=also)
        yield from _sums(comment, inputs, lanes, entries)
    for lane, maximum in (("uint16", 656), ("3x21", 20972), ("uint32", 42949673), ("dense", 42949673)):
        inputs = {"maximum_clients": 100, "lanes": [[lane, 1, maximum]], "weight_cap": 50}
        yield Vector(
            "layout", f"the sum of 100 would carry out of {lane}", inputs, error="ConfigError", flags=("Carry",)
        )


def _sums(comment: str, inputs: dict[str, Any], lanes: list[Lane], entries: list[list[int]]) -> Iterator[Vector]:
    def total(**changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"weight": 9, "clamped": 0, "maximum_clients": 100} | changes
        return inputs | {"survivors": 3, "total": vector_spec.laid_out(lanes, tripled, **settings)}

    tripled = [[3 * value for value in row] for row in entries]
    yield Vector("sum", f"{comment}, three devices", total(), {"weight": 9, "clamped": 0, "sums": tripled})
    impossible = ("ImpossibleSum",)
    for what, changes in {
        "no weight": {"weight": 0}, "a weight above three caps": {"weight": 151},
        "more clamped than there are": {"clamped": 3 * sum(lane.count for lane in lanes) + 1},
    }.items():  # fmt: skip
        yield Vector("sum", f"{comment}: {what}", total(**changes), error="RoundAbandoned", flags=impossible)
    room = (
        2
        ** {"uint32": 32, "uint16": 16, "3x21": 21, "uint64": 64}.get(
            lanes[0].lane, vector_spec.dense_width(lanes[0], 100)
        )
        - 1
    )
    tripled[0][0] = min(3 * lanes[0].maximum + 1, room)
    yield Vector("sum", f"{comment}: an entry above three maxima", total(), error="RoundAbandoned", flags=impossible)


def graph_vectors() -> Iterator[Vector]:
    for mode in ("active", "curious"):
        for members, gamma in ((3, 500), (4, 500), (6, 500), (12, 500), (21, 500), (100, 3333), (200, 1000)):
            settings = parameters(mode=mode, corrupt_share_bp=gamma, maximum_clients=200)
            expected: dict[str, Any] = {
                "k": members - 1, "c": spec.corrupt(members, settings), "t": spec.threshold(members, settings),
                "members_needed": spec.members_needed(members, settings),
            }  # fmt: skip
            inputs: dict[str, Any] = {"parameters": settings, "members": members}
            yield Vector("complete_graph", f"{members} members, {mode}", inputs, expected)
    for members, k in ((300, 30), (1000, 30)):
        root = spec.sha256(str(members).encode())
        order = spec.ring(root, members)
        around = [spec.neighbours(root, n=members, k=k, position=position) for position in (0, 1, members - 1)]
        inputs = {"root": root, "members": members, "k": k, "positions": [0, 1, members - 1]}
        expected = {"neighbours": around, "points": [order.index(p) + 1 for p in (0, 1, members - 1)]}
        yield Vector(
            "ring", f"{members} members, {k} neighbours", inputs, expected, also={"first_on_the_ring": order[:5]}
        )
    told = {"parameters": parameters(maximum_clients=1000), "members": 1000}
    for mode, k, t in (("active", 70, 53), ("curious", 30, 17)):
        inputs = told | {"parameters": parameters(maximum_clients=1000, mode=mode), "k": k, "t": t}
        yield Vector("check_graph", f"safe in {mode} mode", inputs, True)
    for comment, k, t in (
        ("the curious figures in active mode", 30, 17), ("a threshold one too low", 70, 50), ("an odd degree", 71, 53),
        ("more shares than neighbours", 70, 71), ("too few neighbours", 16, 14),
        ("a complete graph's k, another t", 999, 500),
    ):  # fmt: skip
        yield Vector("check_graph", comment, told | {"k": k, "t": t}, error="ConfigError", flags=("Graph",))
    for changes in _IMPOSSIBLE:
        comment = ", ".join(f"{name} = {value}" for name, value in changes.items())
        yield Vector(
            "check_parameters",
            comment,
            {"parameters": parameters() | changes},
            error="ConfigError",
            flags=("Parameters",),
        )
    yield Vector("check_parameters", "possible", {"parameters": parameters()}, True)


_IMPOSSIBLE: tuple[dict[str, Any], ...] = (
    {"maximum_clients": 2}, {"maximum_clients": 65521}, {"minimum_survivors": 2}, {"minimum_survivors": 11},
    {"corrupt_share_bp": 499}, {"corrupt_share_bp": 5000}, {"dropout_share_bp": 499}, {"dropout_share_bp": 10_000},
    {"vector_bytes": 44}, {"wide_bytes": 8}, {"wide_bytes": 20}, {"wide_bytes": 48}, {"packed": [[33, 64]]},
    {"packed": [[0, 64]]}, {"packed": [[8, 63]]}, {"packed": [[8, 64]], "vector_bytes": 80},
)  # fmt: skip

FILES = {
    "hashes": ("Hashes of section 4", hash_vectors),
    "keys": ("X25519 secrets, derived keys, tags and chunks, and share ciphertexts of section 4", key_vectors),
    "shares": ("Secret sharing of section 5", share_vectors),
    "masks": ("Mask streams of section 4", mask_vectors),
    "lanes": ("Vectors of section 6, and sums that cannot be", lane_vectors),
    "graph": ("Parameters, thresholds and rings of section 3", graph_vectors),
}
