"""Every error Sottovoce raises on purpose, as one tree.

SottovoceError
├── ConfigError            a setting, file or argument is wrong; the text says what to do
│   ├── TypeMismatch           a value or function of one type where another is declared; shows both
│   └── DefinitionError        a computation that cannot be defined or called as it is written; names the line
├── TransportError         the link failed; retry
├── ProtocolError
│   ├── LocalProtocolError     our own code broke the rules: a bug
│   └── RemoteProtocolError    the other side broke them: counted by `reason`, dropped
│       ├── MalformedMessage   bytes that are not a message
│       ├── UnexpectedMessage  no such (state, message) pair in the table
│       ├── ConflictingMessage a second, different answer where one was given already
│       ├── Equivocation       two signed survivor sets in one session; carries the evidence
│       ├── Replayed           an old round, session or transfer
│       └── BadBlob            a blob or chunk that does not match its digest
├── CryptoError            never retried
│   ├── BadSignature
│   ├── BadCertificate         chain, validity, role, fleet or revocation
│   ├── BadShare               a share, limb or pad bit out of range, a failed commitment
│   └── LowOrderPoint
├── RoundAbandoned         this round ends without a result; `reason` is a short code
├── PolicyRefusal          the device's owner does not allow it
└── ProgramError           a client program, its data or its runtime
    ├── BadBundle
    ├── SelfTestFailed
    ├── NonFiniteUpdate        the program's result holds NaN or infinity
    └── BadExamples            shape, dtype, NaN, label out of range, none at all
"""

from __future__ import annotations


class SottovoceError(Exception):
    """The root: catching it catches everything raised on purpose, and no bug."""


class ConfigError(SottovoceError):
    """A setting, file or command-line argument is wrong; the text says what to do about it."""


class TypeMismatch(ConfigError):
    """A value, function or argument has another type than the one that is declared; the text prints both.

    Attributes:
        expected: The type that is declared (`sottovoce.types.Type`).
        found: The type that was given.
    """

    def __init__(self, what: str, *, expected: object, found: object, cure: str) -> None:
        super().__init__(f"{what} does not fit its type\n    expected: {expected}\n    found:    {found}\n{cure}")
        self.expected = expected
        self.found = found


class DefinitionError(ConfigError):
    """A computation cannot be defined or called as it is written; the text begins with the author's line.

    Attributes:
        where: File, line and operator, such as `temperature.py:12, federated_sum`.
    """

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where


class TransportError(SottovoceError):
    """The link failed or refused; trying again later may help."""


class ProtocolError(SottovoceError):
    """One side left the protocol."""


class LocalProtocolError(ProtocolError):
    """Our own code broke the rules: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The other side broke the rules; `reason` is the short code under which it is counted."""

    reason = "protocol"


class MalformedMessage(RemoteProtocolError):
    """Bytes that are not a message: too long, truncated, unknown fields, wrong types."""

    reason = "malformed"


class UnexpectedMessage(RemoteProtocolError):
    """A message that the current state does not allow."""

    reason = "unexpected"

    def __init__(self, state: object, message: object) -> None:
        super().__init__(f"{type(message).__name__} is not expected in state {type(state).__name__}")
        self.state_name = type(state).__name__
        self.message_name = type(message).__name__


class ConflictingMessage(RemoteProtocolError):
    """A second, different answer where this sender has already given one."""

    reason = "conflicting"


class Equivocation(RemoteProtocolError):
    """Two survivor sets were signed in one session.

    Attributes:
        evidence: The signed envelopes that prove it.
    """

    reason = "equivocation"

    def __init__(self, text: str, evidence: tuple[bytes, ...]) -> None:
        super().__init__(text)
        self.evidence = evidence


class Replayed(RemoteProtocolError):
    """A message of an old round, attempt or session."""

    reason = "replayed"


class BadBlob(RemoteProtocolError):
    """A blob or one of its chunks does not match its digest, size or count."""

    reason = "bad_blob"


class CryptoError(SottovoceError):
    """A cryptographic check failed. Never retried."""

    reason = "crypto"


class BadSignature(CryptoError):
    """A signature is not of this message by this certificate, or is not in canonical low-s form."""

    reason = "bad_signature"


class BadCertificate(CryptoError):
    """A certificate does not chain to the pinned fleet CA, is not valid now, is revoked, or names another role."""

    reason = "bad_certificate"


class BadShare(CryptoError):
    """A secret share, a rebuilt limb or a commitment is not what it must be."""

    reason = "bad_share"


class LowOrderPoint(CryptoError):
    """A peer's X25519 key gives an all-zero secret."""

    reason = "low_order_point"


class RoundAbandoned(SottovoceError):
    """The round ends without a result; `reason` is a short code that the journal and the outcome carry."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class PolicyRefusal(SottovoceError):
    """The device's owner does not allow what the plan asks; nothing was run and nothing left the device."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"refused by this device's policy ({rule}): {detail}")
        self.rule = rule


class ProgramError(SottovoceError):
    """A client program, its data or its runtime does not work; `code` is the short name told to the coordinator."""

    code = "program"


class BadBundle(ProgramError):
    """The bundle is not well-formed or does not match its digest."""

    code = "bad_bundle"


class SelfTestFailed(ProgramError):
    """The bundle's self-test vectors do not come out on this device's runtime.

    Attributes:
        tensor: The result or metric that differs.
        difference: The largest absolute difference found.
        tolerance: The largest allowed.
    """

    code = "self_test_failed"

    def __init__(
        self, text: str, *, tensor: str = "", difference: float = float("nan"), tolerance: float = 0.0
    ) -> None:
        super().__init__(text)
        self.tensor = tensor
        self.difference = difference
        self.tolerance = tolerance


class NonFiniteUpdate(ProgramError):
    """The client program's result holds NaN or infinity; nothing of it is sent."""

    code = "non_finite"


class BadExamples(ProgramError):
    """Local examples do not fit the program: shape, dtype, NaN, label out of range, or none at all."""

    code = "bad_examples"
