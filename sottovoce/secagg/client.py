"""A device's side of one session, sans-IO: requests of the coordinator in, replies out, secrets in memory only.

The coordinator's signature on a request is verified before it comes here; nothing else about it is believed. What
follows from the protocol's rules, and what this device's owner demands beyond them (`ClientTerms`), is checked before a
reply exists. Every refusal ends the session and drops every secret. One object per session, never reused.

Reference: Bonawitz et al. 2017 (eprint 2017/281), figure 4; `docs/SPEC.md`.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeAlias

from sottovoce.blobs import DEFAULT_CHUNK_BYTES, canonical, digest_of
from sottovoce.errors import LocalProtocolError, SottovoceError, UnexpectedMessage
from sottovoce.identity import Identity, SignedContext, TrustAnchor
from sottovoce.secagg import client_steps
from sottovoce.secagg.client_stages import (
    Aborted,
    Advertised,
    ClientTerms,
    InputMasked,
    KeysShared,
    Prepared,
    Setting,
    Stage,
    SurvivorsSigned,
)
from sottovoce.secagg.encoding import Entropy
from sottovoce.secagg.transcript import NO_SESSION, agree
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInput,
    MaskedInputRequest,
    Message,
    Mode,
    Roster,
    SecAggParameters,
    ShareKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmasking,
    UnmaskingRequest,
)

__all__ = ["STEPS", "ClientSession", "ClientTerms", "Reply", "Request"]

Request: TypeAlias = Roster | MaskedInputRequest | SurvivorsRequest | UnmaskingRequest
Reply: TypeAlias = ShareKeys | MaskedInput | SurvivorsSignature | Unmasking
_Step: TypeAlias = Callable[[Setting, Any, Any], tuple[Stage, Reply]]

STEPS: Mapping[Mode, Mapping[tuple[type[Stage], type[Message]], _Step]] = {
    "active": {
        (Advertised, Roster): client_steps.share_keys,
        (KeysShared, MaskedInputRequest): client_steps.mask_input,
        (InputMasked, SurvivorsRequest): client_steps.sign_survivors,
        (SurvivorsSigned, UnmaskingRequest): client_steps.reveal_agreed,
    },
    "curious": {
        (Advertised, Roster): client_steps.share_keys,
        (KeysShared, MaskedInputRequest): client_steps.mask_input,
        (InputMasked, UnmaskingRequest): client_steps.reveal,
    },
}
"""Every legal (stage, request) pair of each mode; what is not here ends the session."""


class ClientSession:
    """One device in one session.

    Attributes:
        stage: Where the session stands.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        anchor: TrustAnchor,
        at: datetime.datetime,
        context: SignedContext,
        plan: bytes,
        state: bytes,
        parameters: SecAggParameters,
        upload_key: bytes,
        terms: ClientTerms,
        vector: bytearray,
        entropy: Entropy,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        """Prepare the session; nothing is checked and nothing leaves before `advertise`.

        Args:
            identity: Of this device.
            anchor: The fleet CA.
            at: Time to judge certificates by.
            context: Sender this device, recipient the coordinator; fleet, round and attempt of the session.
            plan: Plan digest, 32 bytes.
            state: Digest of the state that the update starts from, 32 bytes.
            parameters: As the coordinator proposes them; the caller has checked them against the plan's Layout.
            upload_key: The coordinator's X25519 public key for this session.
            terms: What the owner demands.
            vector: The plain quantised vector. The session takes it over: it is masked in place, or erased.
            entropy: Source of every secret; `os.urandom` outside tests.
            chunk_bytes: Size of the chunks in which the masked vector will be uploaded.
        """
        agreement = agree(
            context,
            coordinator=context.recipient,
            plan=plan,
            state=state,
            parameters=parameters,
            upload_key=upload_key,
        )
        self._setting = Setting(identity, anchor, at, agreement, terms, entropy, chunk_bytes)
        self._answers: dict[type[Message], tuple[bytes, Reply]] = {}
        self._advertisement: AdvertiseKeys | None = None
        self._session = NO_SESSION
        self.stage: Stage = Prepared(vector)

    @property
    def session_id(self) -> bytes:
        """Session id, 32 bytes; zeros until a roster is accepted."""
        return self._session

    @property
    def masked_vector(self) -> bytearray | None:
        """The masked vector while it may have to be sent (again), else None. Never the plain one."""
        match self.stage:
            case InputMasked(vector=vector) | SurvivorsSigned(masked=InputMasked(vector=vector)):
                return vector
            case _:
                return None

    def advertise(self) -> AdvertiseKeys:
        """Return fresh keys for one roster, if the proposed parameters are acceptable; the same ones if called again.

        Raises:
            PolicyRefusal: The owner does not allow such a session.
            RemoteProtocolError: The parameters are impossible or do not fit the vector.
            LowOrderPoint, CryptoError: The coordinator's upload key is not one.
            LocalProtocolError: The session has been aborted.
        """
        if self._advertisement is not None:
            return self._advertisement
        if not isinstance(self.stage, Prepared):
            raise LocalProtocolError(f"keys are advertised once per session, not in {type(self.stage).__name__}")
        with _AbortOnError(self):
            stage = client_steps.advertise(self._setting, self.stage)
        self.stage, self._advertisement = stage, stage.advertisement
        return stage.advertisement

    def receive(self, request: Request) -> Reply:
        """Return the reply to `request`; the same question gets the same answer, anything unexpected ends the session.

        Raises:
            UnexpectedMessage: This stage does not allow such a request, or it differs from one already answered.
            PolicyRefusal: The owner does not allow what follows from it.
            CryptoError: A key, share or signature in it is not what it must be.
            RemoteProtocolError: It breaks another rule of the protocol.
        """
        digest = digest_of(canonical(request))
        answered = self._answers.get(type(request))
        if answered is not None and answered[0] == digest:
            return answered[1]
        with _AbortOnError(self):
            step = STEPS[self._setting.agreement.parameters.mode].get((type(self.stage), type(request)))
            if step is None:
                raise UnexpectedMessage(self.stage, request)
            stage, reply = step(self._setting, self.stage, request)
        self.stage = stage
        self._answers[type(request)] = digest, reply
        if isinstance(stage, KeysShared):
            self._session = stage.seat.shape.session
        return reply

    def abort(self, error: SottovoceError | None = None) -> None:
        """End the session: every secret and the vector are dropped, and whatever comes next is refused.

        Args:
            error: Why, if something went wrong.
        """
        match self.stage:
            case Prepared(vector=vector) | Advertised(vector=vector) | KeysShared(vector=vector):
                _erase(vector)
            case InputMasked(vector=vector) | SurvivorsSigned(masked=InputMasked(vector=vector)):
                _erase(vector)
            case _:
                pass  # Revealed and Aborted hold neither vector nor secret.
        self._answers.clear()
        self._advertisement = None
        self.stage = Aborted(error)


class _AbortOnError:
    """Leaves the session aborted whatever goes wrong inside the block, a bug of ours included."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            _forget_locals(error)
            self._session.abort(error if isinstance(error, SottovoceError) else None)


def _forget_locals(error: BaseException | None) -> None:
    """Clear the variables of the steps that `error` went through: it outlives them, and they are secrets."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _erase(vector: bytearray) -> None:
    """Overwrite `vector`; best effort, CPython may have copied it before."""
    vector[:] = bytes(len(vector))
