"""Every message that travels, as a typed struct. The meaning of a message never changes: a new need is a new message.

Bodies are MessagePack arrays in declaration order. Who sent it to whom, in which round and session, stands in the
envelope (`sottovoce.wire.codec`) and is part of what is signed. Times are Unix milliseconds on the coordinator's clock.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

import msgspec

from sottovoce.blobs import BlobRef, Cut, Document
from sottovoce.errors import BadBlob

Mode: TypeAlias = Literal["active", "curious"]
Cipher: TypeAlias = Literal["aes-128-ctr", "chacha20"]
REASON_CODE = re.compile(r"[a-z0-9_]{1,64}")
"""What a `code` or `reason` looks like; whoever writes one of the other side into a log or a file checks it first."""
CHUNK_TAG_BYTES = 16
"""Length of the tag of one chunk of a masked vector."""


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message body."""


# --- announcements, from the coordinator to everybody, retained -------------------------------------------------------


class Announcement(Message, frozen=True):
    """A round is open: the plan, the state to start from, and both appointments.

    Attributes:
        certificate: The coordinator's certificate, DER.
        previous: Digest of the previous announcement's envelope, 32 bytes (zeros for the first): a hash chain.
        plan: The plan's blob.
        state: The state's blob: named tensors for every broadcast port.
        now_ms: The coordinator's time when it signed.
        selection_closes_ms: Check in before this.
        rendezvous_ms: Be present at this time with the work done; earlier if everybody is ready.
        rendezvous_closes_ms: The round is over by then, one way or the other.
    """

    certificate: bytes
    previous: bytes
    plan: BlobRef
    state: BlobRef
    now_ms: int
    selection_closes_ms: int
    rendezvous_ms: int
    rendezvous_closes_ms: int


class Outcome(Message, frozen=True):
    """A round has ended.

    Attributes:
        certificate: The coordinator's certificate, DER.
        announcement: Digest of the announcement's envelope.
        committed: True if a new state came of it.
        reason: Short code when abandoned, empty when committed.
        survivors: Device ids whose update is in the sum, sorted.
        state: The new state if committed, else the old one.
        now_ms: The coordinator's time.
    """

    certificate: bytes
    announcement: bytes
    committed: bool
    reason: str
    survivors: tuple[str, ...]
    state: BlobRef
    now_ms: int


# --- from a device ----------------------------------------------------------------------------------------------------


class Status(Message, frozen=True):
    """Whether this device is connected; the last will says offline. A hint only, never believed for a decision.

    Attributes:
        online: True while connected.
        version: Version of the agent.
    """

    online: bool
    version: str


class CheckIn(Message, frozen=True):
    """This device is eligible for the announced round and its policy allows the plan.

    Attributes:
        certificate: The device's certificate, DER.
        announcement: Digest of the announcement's envelope.
        fast_aes: True if this device has AES instructions.
    """

    certificate: bytes
    announcement: bytes
    fast_aes: bool


class Ready(Message, frozen=True):
    """The work is done; the masked rendezvous may come.

    Attributes:
        present: True if the device stays connected until the rendezvous.
    """

    present: bool


class Withdraw(Message, frozen=True):
    """This device cannot go on in this round.

    Attributes:
        code: Short code, one of the `code`s and `reason`s of sottovoce.errors; never free text.
        certificate: The device's certificate, DER, where it withdraws instead of checking in: the coordinator may not
            know it yet. Else empty.
    """

    code: str
    certificate: bytes = b""


class AdvertiseKeys(Message, frozen=True):
    """Fresh keys for one session, bound to everything that was agreed before it.

    Attributes:
        certificate: The device's certificate, DER.
        plan: Plan digest, 32 bytes.
        state: State digest, 32 bytes.
        parameters: Digest of the SecAggParameters, 32 bytes.
        channel_key: X25519 public key for share encryption, 32 bytes.
        mask_key: X25519 public key for pairwise masks, 32 bytes.
        nonce: 32 fresh bytes.
    """

    certificate: bytes
    plan: bytes
    state: bytes
    parameters: bytes
    channel_key: bytes
    mask_key: bytes
    nonce: bytes


class ShareKeys(Message, frozen=True):
    """Shares of the self seed and of the mask private key, one ciphertext per neighbour.

    Attributes:
        commitment: SHA-256 commitment to the self seed, 32 bytes.
        ciphertexts: One AEAD ciphertext of 88 bytes per neighbour, one after another in the order of the neighbours'
            positions.
    """

    commitment: bytes
    ciphertexts: bytes


class TaggedVector(Cut, Document, frozen=True):
    """Announces a masked vector: how it is cut into chunks, and every chunk's tag (`sottovoce.secagg.uploads`).

    Attributes:
        size: Bytes in the whole.
        chunk_bytes: Bytes in every chunk but the last.
        tags: The chunks' tags one after another, 16 bytes each. Only the device and the coordinator can make or check
            them; they prove nothing to anybody else.

    Raises:
        BadBlob: A number is out of range, or there is not one tag for every chunk.
    """

    size: int
    chunk_bytes: int
    tags: bytes

    def __post_init__(self) -> None:
        if not self.is_possible or len(self.tags) != CHUNK_TAG_BYTES * self.chunk_count:
            raise BadBlob("a masked vector has an impossible size or chunk size, or not one tag for every chunk")


class MaskedInput(Message, frozen=True):
    """The masked vector is ready to be uploaded, chunk by chunk.

    Attributes:
        vector: Sizes of the masked vector and its chunks, and the chunks' tags.
        inclusions: In active mode one token of 16 bytes for every neighbour that this device masked with, in order of
            position: without it, that neighbour will not answer for this device's self seed. Else empty.
    """

    vector: TaggedVector
    inclusions: bytes = b""


class SurvivorsSignature(Message, frozen=True):
    """Consistency check: this device was shown exactly one survivor set, this one.

    Attributes:
        survivors: SHA-256 over the sorted survivor set, 32 bytes.
    """

    survivors: bytes


class Unmasking(Message, frozen=True):
    """For each neighbour that shared keys one share, never both: there is no place for two.

    Attributes:
        shares: 36 bytes for each, one after another in order of position: of the self seed if it survived, of the mask
            key if it dropped out. In the complete graph this device is among them, with the share of its own self seed.
    """

    shares: bytes


# --- from the coordinator to one device -------------------------------------------------------------------------------


class Selected(Message, frozen=True):
    """This device is in the cohort: do the work.

    Attributes:
        route: Topic level for everything this device sends in this round.
        now_ms: The coordinator's time.
    """

    route: str
    now_ms: int


class NotSelected(Message, frozen=True):
    """The cohort is complete.

    Attributes:
        retry_ms: Time of the next round's check-in, as far as it is known.
    """

    retry_ms: int


class SecAggParameters(Document, frozen=True):
    """What one session agrees on; its digest is in every advertisement and in the session id.

    Attributes:
        mode: `active` includes the consistency check.
        cipher: Mask expansion.
        minimum_survivors: Fewer survivors abandon the round.
        maximum_clients: Upper bound on the cohort; lanes are sized by it.
        corrupt_share_bp: gamma, assumed share of corrupt clients, in basis points.
        dropout_share_bp: delta, assumed share of dropouts, in basis points.
        vector_bytes: Length of the masked vector on the wire.
        wide_bytes: Bytes at the end of the vector that are uint64 words; all before them are uint32 words, but for:
        packed: Width in bits and number of entries of each packed segment, at the start of the vector.
    """

    mode: Mode
    cipher: Cipher
    minimum_survivors: int
    maximum_clients: int
    corrupt_share_bp: int
    dropout_share_bp: int
    vector_bytes: int
    wide_bytes: int
    packed: tuple[tuple[int, int], ...] = ()


class AdvertiseKeysRequest(Message, frozen=True):
    """The rendezvous is open: advertise keys for a session with these parameters.

    Attributes:
        parameters: Of the session.
        upload_key: X25519 public key of the coordinator, fresh for this session and in its id, 32 bytes: chunks of
            masked vectors are tagged with what it and a device's channel key agree on.
    """

    parameters: SecAggParameters
    upload_key: bytes


class Roster(Message, frozen=True):
    """The cohort is fixed.

    Attributes:
        leaves: The sorted 32-byte leaves of all members, concatenated.
        neighbours: Degree k of the graph; members - 1 is the complete graph.
        threshold: t, shares needed to rebuild a secret.
        advertisements: The signed envelopes of this device's neighbours' advertisements, in order of position.
    """

    leaves: bytes
    neighbours: int
    threshold: int
    advertisements: tuple[bytes, ...]


class MaskedInputRequest(Message, frozen=True):
    """Share keys is closed: these neighbours have shared, mask with exactly them.

    Attributes:
        senders: Positions of the neighbours that shared keys, rising.
        ciphertexts: The one of 88 bytes that each of them made for this device, one after another.
    """

    senders: tuple[int, ...]
    ciphertexts: bytes


class UploadSlot(Message, frozen=True):
    """An upload slot is granted, or progress in it: which chunks have arrived.

    Attributes:
        received: Bitmap, chunk i is bit i % 8 of byte i // 8.
        complete: The vector is whole, verified and added; the upload is over.
    """

    received: bytes
    complete: bool


class SurvivorsRequest(Message, frozen=True):
    """Consistency check (active mode): sign this survivor set.

    Attributes:
        survivors: Sorted roster positions of U3, those whose masked input was added.
    """

    survivors: tuple[int, ...]


class UnmaskingRequest(Message, frozen=True):
    """Reveal shares for exactly this survivor set.

    Attributes:
        survivors: Sorted roster positions of U3.
        signatures: In active mode the signed envelopes of neighbours' SurvivorsSignature messages.
        inclusions: In active mode the tokens that this device's surviving neighbours made for it, in order of position.
    """

    survivors: tuple[int, ...]
    signatures: tuple[bytes, ...]
    inclusions: bytes = b""


class RoundOver(Message, frozen=True):
    """This device is no longer in the round; the outcome follows for everybody.

    Attributes:
        reason: Short code, for example `late`, `abandoned`, `taken_over`.
    """

    reason: str


DeviceMessage: TypeAlias = (
    Status | CheckIn | Ready | Withdraw | AdvertiseKeys | ShareKeys | MaskedInput | SurvivorsSignature | Unmasking
)
CoordinatorMessage: TypeAlias = (
    Announcement
    | Outcome
    | Selected
    | NotSelected
    | AdvertiseKeysRequest
    | Roster
    | MaskedInputRequest
    | UploadSlot
    | SurvivorsRequest
    | UnmaskingRequest
    | RoundOver
)
AnyMessage: TypeAlias = DeviceMessage | CoordinatorMessage

DEVICE_MESSAGES: tuple[type[Message], ...] = (
    Status, CheckIn, Ready, Withdraw, AdvertiseKeys, ShareKeys, MaskedInput, SurvivorsSignature, Unmasking,
)  # fmt: skip
COORDINATOR_MESSAGES: tuple[type[Message], ...] = (
    Announcement, Outcome, Selected, NotSelected, AdvertiseKeysRequest, Roster, MaskedInputRequest, UploadSlot,
    SurvivorsRequest, UnmaskingRequest, RoundOver,
)  # fmt: skip
