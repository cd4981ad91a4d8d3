"""The server's side of one session, sans-IO: verified messages of devices in, requests to devices out.

It never holds a plain vector: it adds masked ones as they become whole, and takes the masks off the sum. A device's
message, however wrong, changes nothing but the record of its own answer. What is fatal ends the session as
RoundAbandoned, with everything gathered dropped. When to close a stage is the caller's decision: everybody has
answered, or the deadline has come.

Reference: Bonawitz et al. 2017 (eprint 2017/281), figure 4; `docs/SPEC.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any, TypeAlias

import msgspec

from sottovoce.errors import (
    BadBlob,
    ConfigError,
    ConflictingMessage,
    LocalProtocolError,
    Replayed,
    RoundAbandoned,
    UnexpectedMessage,
)
from sottovoce.identity import SignedContext
from sottovoce.secagg import graph, keys, server_steps
from sottovoce.secagg.encoding import Entropy
from sottovoce.secagg.graph import GraphRule
from sottovoce.secagg.mask_removal import AT_ONCE, Spread
from sottovoce.secagg.server_stages import (
    Abandoned,
    AdvertisingKeys,
    CheckingConsistency,
    CollectingInputs,
    CollectingShares,
    SharingKeys,
    Stage,
    Unmasked,
)
from sottovoce.secagg.transcript import NO_SESSION, Agreement, agree
from sottovoce.secagg.uploads import ExpectedVector
from sottovoce.wire.chunks import Assembly
from sottovoce.wire.codec import Opened
from sottovoce.wire.messages import (
    AdvertiseKeys,
    AdvertiseKeysRequest,
    MaskedInput,
    Message,
    SecAggParameters,
    ShareKeys,
    SurvivorsSignature,
    Unmasking,
)

__all__ = ["CLOSINGS", "STAGE_NAMES", "STEPS", "Reply", "ServerSession"]

_Step: TypeAlias = Callable[[Agreement, Any, Any], None]
_Closing: TypeAlias = Callable[[Agreement, Any], tuple[Stage, dict[str, Message]]]

STEPS: Mapping[tuple[type[Stage], type[Message]], _Step] = {
    (AdvertisingKeys, AdvertiseKeys): server_steps.take_advertisement,
    (SharingKeys, ShareKeys): server_steps.take_shares,
    (CollectingInputs, MaskedInput): server_steps.take_announcement,
    (CheckingConsistency, SurvivorsSignature): server_steps.take_signature,
    (CollectingShares, Unmasking): server_steps.take_unmasking,
}
"""Every legal (stage, message) pair; what is not here is refused and changes nothing."""

CLOSINGS: Mapping[type[Stage], _Closing] = {
    AdvertisingKeys: server_steps.close_advertising,
    SharingKeys: server_steps.close_sharing,
    CollectingInputs: server_steps.close_inputs,
    CheckingConsistency: server_steps.close_consistency,
    CollectingShares: server_steps.close_unmasking,
}
"""How each stage ends."""

STAGE_NAMES: Mapping[type[Stage], str] = {
    AdvertisingKeys: "advertise_keys",
    SharingKeys: "share_keys",
    CollectingInputs: "masked_input",
    CheckingConsistency: "consistency_check",
    CollectingShares: "unmasking",
}
"""The stages' names in journals and reports."""


class Reply(msgspec.Struct, frozen=True):
    """A message for one device.

    Attributes:
        device: Device id.
        message: What to send.
        session: Session id for the envelope's signed context; zeros up to and including the roster, because the
            device knows the session id only once it has accepted the roster.
    """

    device: str
    message: Message
    session: bytes


class ServerSession:
    """One session of secure aggregation.

    Attributes:
        stage: Where the session stands.
        invitation: What every device is asked first, the same of all.
        dropped: Stage name -> device ids, sorted, that owed an answer when the stage was closed. Those who are missing
            from `consistency_check` or `unmasking` are in the sum all the same.
        survivors: Device ids, sorted, whose vector is in the sum; empty until the masked input stage is closed.
    """

    def __init__(
        self,
        *,
        context: SignedContext,
        plan: bytes,
        state: bytes,
        parameters: SecAggParameters,
        expected: Iterable[str],
        entropy: Entropy,
        graph_rule: GraphRule | None = None,
        spread: Spread = AT_ONCE,
    ) -> None:
        """Open the session; `outstanding()` then holds the first requests.

        Args:
            context: Sender the coordinator; fleet, round and attempt of the session.
            plan: Plan digest, 32 bytes.
            state: Digest of the state that the updates start from, 32 bytes.
            parameters: Of the session.
            expected: Device ids invited to advertise keys.
            entropy: Source of this session's upload key; `os.urandom` outside tests.
            graph_rule: Gives (k, t) once it is known how many have advertised; the complete graph if None.
            spread: Over how many threads the masks are taken off, and how.

        Raises:
            ConfigError: The parameters are impossible, or more devices are invited than they allow.
        """
        graph.check_parameters(parameters)
        if graph_rule is None:
            graph.degree(parameters.maximum_clients)
            graph_rule = partial(graph.complete_graph, parameters)
        invited = frozenset(expected)
        if len(invited) > parameters.maximum_clients:
            raise ConfigError(
                f"{len(invited)} devices are invited where maximum_clients is {parameters.maximum_clients}"
            )
        upload_keys = keys.key_pair(entropy(keys.SECRET_BYTES))
        self.invitation = AdvertiseKeysRequest(parameters=parameters, upload_key=upload_keys.public)
        self._agreement = agree(
            context,
            coordinator=context.sender,
            plan=plan,
            state=state,
            parameters=parameters,
            upload_key=upload_keys.public,
        )
        self._recorded: dict[tuple[str, type[Message]], bytes] = {}
        self._requests: dict[str, Message] = dict.fromkeys(invited, self.invitation)
        self._requests_session = self._session = NO_SESSION
        self._spread = spread
        self.stage: Stage = AdvertisingKeys(invited, graph_rule, upload_keys)
        self._owing = set(self.stage.waiting_for())
        self.dropped: dict[str, list[str]] = {}
        self.survivors: tuple[str, ...] = ()

    @property
    def session_id(self) -> bytes:
        """Session id, 32 bytes; zeros until the roster is fixed."""
        return self._session

    @property
    def result(self) -> bytearray:
        """The unmasked total, once the session is Unmasked.

        Raises:
            LocalProtocolError: There is none (yet).
        """
        if not isinstance(self.stage, Unmasked):
            raise LocalProtocolError(f"there is no unmasked sum in stage {type(self.stage).__name__}")
        return self.stage.total

    @property
    def owing(self) -> Set[str]:
        """The devices that still owe an answer in this stage: not a copy, it shrinks as they answer."""
        return self._owing

    def waiting_for(self) -> frozenset[str]:
        """Return the devices that still owe an answer in this stage."""
        return frozenset(self._owing)

    def outstanding(self) -> list[Reply]:
        """Return this stage's requests to the devices that still owe an answer: at first, and after a reconnect."""
        return [Reply(device, self._requests[device], self._requests_session) for device in sorted(self._owing)]

    def receive(self, opened: Opened[Any]) -> list[Reply]:
        """Record a device's verified message; the very same message again changes nothing.

        Returns:
            Requests that follow at once; at present always none, they come from `close_stage`.

        Raises:
            Replayed: It was signed for another round, attempt, coordinator or session.
            ConflictingMessage: This device has already given another answer.
            UnexpectedMessage: This stage does not allow such a message.
            RemoteProtocolError, CryptoError: The message itself is not what it must be.
        """
        kind, device = type(opened.message), opened.certificate.name
        session = NO_SESSION if kind is AdvertiseKeys else self._session
        if opened.context != self._agreement.context_of(device, session=session):
            raise Replayed(f"{device}'s {kind.__name__} was signed for another round or session")
        recorded = self._recorded.get((device, kind))
        if recorded == opened.body_digest:
            return []
        if recorded is not None:
            raise ConflictingMessage(f"{device} has already given another {kind.__name__} in this session")
        step = STEPS.get((type(self.stage), kind))
        if step is None:
            raise UnexpectedMessage(self.stage, opened.message)
        step(self._agreement, self.stage, opened)
        self._recorded[device, kind] = opened.body_digest
        if kind is not MaskedInput:  # It is followed by the vector itself.
            self._owing.discard(device)
        return []

    def expected_vector(self, device: str) -> ExpectedVector | None:
        """Return the masked vector that `device` has announced and that is not yet added, or None."""
        match self.stage:
            case CollectingInputs(cohort=cohort, announced=announced) if device in cohort.position_of:
                return announced.get(cohort.position_of[device])
            case _:
                return None

    def add_vector(self, device: str, upload: Assembly[ExpectedVector]) -> None:
        """Add the masked vector of `device` to the total, in one step; it may be freed afterwards.

        Args:
            device: Device id.
            upload: The whole of what `expected_vector` gave. Its chunks were verified as they came, and are not again.

        Raises:
            LocalProtocolError: No vector of this device is expected: not announced, already added, or too late.
            BadBlob: It is not the vector that was announced, or not whole.
        """
        expected = self.expected_vector(device)
        if expected is None or not isinstance(self.stage, CollectingInputs):
            raise LocalProtocolError(f"no masked vector of {device} is expected")
        if upload.ref is not expected:
            raise BadBlob(f"the upload of {device} is not the vector that it has announced")
        position = self.stage.cohort.position_of[device]
        server_steps.add_upload(self.stage.total, upload, self._agreement.parameters)
        self.stage.added.add(position)
        del self.stage.announced[position]
        self._owing.discard(device)

    def close_stage(self) -> list[Reply]:
        """Go on with those who have answered; return what to ask of them next.

        Raises:
            RoundAbandoned: Too few are left, or their shares are wrong; everything gathered is dropped.
            LocalProtocolError: The session is over already.
        """
        closing = CLOSINGS.get(type(self.stage))
        if isinstance(self.stage, CollectingShares):
            closing = partial(server_steps.close_unmasking, spread=self._spread)
        if closing is None:
            raise LocalProtocolError(f"the session is over: {type(self.stage).__name__}")
        self.dropped[STAGE_NAMES[type(self.stage)]] = sorted(self._owing)
        try:
            following, requests = closing(self._agreement, self.stage)
        except RoundAbandoned as abandoned:
            self.abandon(abandoned.reason)
            raise
        self._requests, self._requests_session = requests, self._session
        match following:
            case SharingKeys(cohort=cohort):
                self._session = cohort.shape.session
            case (
                CheckingConsistency(inputs=inputs, survivors=survivors)
                | CollectingShares(inputs=inputs, survivors=survivors)
            ):
                self.survivors = tuple(sorted(inputs.cohort.names(survivors)))
            case _:
                pass
        self.stage = following
        self._owing = set(following.waiting_for())
        return self.outstanding()

    def abandon(self, reason: str) -> None:
        """End the session without a sum, dropping everything gathered; `reason` is a short code."""
        self.stage = Abandoned(reason)
        self._owing = set(self.stage.waiting_for())
        self._requests.clear()
        self._recorded.clear()
        self.survivors = ()
