"""What a device may know at each stage of a session, one frozen dataclass per stage, and what its owner demands."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from sottovoce.errors import ConfigError, SottovoceError
from sottovoce.identity import Identity, TrustAnchor
from sottovoce.secagg import graph, keys
from sottovoce.secagg.encoding import Entropy
from sottovoce.secagg.roster import Member, Shape
from sottovoce.secagg.transcript import Agreement
from sottovoce.wire.messages import AdvertiseKeys, Mode

_HARD_FLOOR_HONEST = 2


@dataclass(frozen=True, slots=True)
class ClientTerms:
    """What this device's owner demands of a session; the last word, whatever the coordinator proposes.

    Attributes:
        minimum_cohort: Fewest members of a roster; 3 is a hard floor, for tests.
        minimum_honest_survivors: Fewest survivors beyond the c that may be corrupt; 2 is a hard floor.
        modes: Modes that this device accepts. `curious` must be named to be accepted.
        minimum_corrupt_share_bp: Smallest gamma that it accepts, in basis points: the coordinator may not assume a
            kinder fleet than the owner does.

    Raises:
        ConfigError: A number is below its hard floor, or no mode is allowed.
    """

    minimum_cohort: int = 10
    minimum_honest_survivors: int = 5
    modes: tuple[Mode, ...] = ("active",)
    minimum_corrupt_share_bp: int = 500

    def __post_init__(self) -> None:
        if self.minimum_cohort < graph.SMALLEST_COHORT:
            raise ConfigError(f"minimum_cohort is {self.minimum_cohort}; nobody hides among fewer than 3 devices")
        if self.minimum_honest_survivors < _HARD_FLOOR_HONEST:
            raise ConfigError(f"minimum_honest_survivors must be at least {_HARD_FLOOR_HONEST}")
        if not self.modes:
            raise ConfigError('modes is empty; allow "active", or "curious" as well')


@dataclass(frozen=True, slots=True)
class Setting:
    """What does not change during a session; see `ClientSession` for each field."""

    identity: Identity
    anchor: TrustAnchor
    at: datetime.datetime
    agreement: Agreement
    terms: ClientTerms
    entropy: Entropy
    chunk_bytes: int

    @property
    def device(self) -> str:
        """This device's id."""
        return self.identity.certificate.name


@dataclass(frozen=True, slots=True)
class Seat:
    """This device's place in the cohort, fixed by the roster.

    Attributes:
        position: Roster position.
        shape: The graph and the session id.
        neighbours: Verified, by position, ascending.
        holders: Positions that hold a share of this device's self seed, ascending.
    """

    position: int
    shape: Shape
    neighbours: Mapping[int, Member]
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The plain vector is ready; nothing has been sent."""

    vector: bytearray = field(repr=False)


@dataclass(frozen=True, slots=True)
class Advertised:
    """Keys are advertised, for exactly one roster."""

    vector: bytearray = field(repr=False)
    advertisement: AdvertiseKeys
    channel: keys.KeyPair = field(repr=False)
    mask: keys.KeyPair = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeysShared:
    """The roster is accepted and both secrets are shared; the vector is still plain.

    Attributes:
        vector: Plain.
        seat: This device's place.
        channels: Position -> the channel between this neighbour and this device.
        mask: Mask key pair.
        self_seed: b.
        own_share: This device's own share of b; empty on a ring, where only neighbours hold one.
        upload_key: Tags the masked vector's chunks; the coordinator has it, too.
    """

    vector: bytearray = field(repr=False)
    seat: Seat
    channels: Mapping[int, keys.Channel] = field(repr=False)
    mask: keys.KeyPair = field(repr=False)
    self_seed: bytes = field(repr=False)
    own_share: bytes = field(repr=False)
    upload_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class InputMasked:
    """The vector is masked in place, its plain form and the own secrets are gone; shares are held.

    Attributes:
        vector: Masked.
        seat: This device's place.
        held: Position -> what this neighbour has entrusted to this device: a share of its self seed, then one of its
            mask key.
        inclusions: Position -> the token that this neighbour makes if it masks with this device; none in curious mode.
        own_share: This device's own share of its self seed; empty on a ring.
    """

    vector: bytearray = field(repr=False)
    seat: Seat
    held: Mapping[int, bytes] = field(repr=False)
    inclusions: Mapping[int, bytes] = field(repr=False)
    own_share: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SurvivorsSigned:
    """This device has signed one survivor set and answers for no other.

    Attributes:
        masked: What it held before.
        survivors: Digest of the signed set, 32 bytes.
    """

    masked: InputMasked
    survivors: bytes


@dataclass(frozen=True, slots=True)
class Revealed:
    """The shares are given; nothing is held any more but the answers, for redelivery."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The session is over without this device; every secret is dropped.

    Attributes:
        error: What went wrong; None when the session was ended from outside.
    """

    error: SottovoceError | None = None


Stage: TypeAlias = Prepared | Advertised | KeysShared | InputMasked | SurvivorsSigned | Revealed | Aborted
