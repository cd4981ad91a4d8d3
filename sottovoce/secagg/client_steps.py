"""The steps of a device through a session, pure: (setting, stage, request) -> (next stage, reply).

Each step checks everything before it builds anything. The one thing changed in place is the vector, because its plain
form must not exist beside its masked one.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping, Sequence

from sottovoce.errors import (
    ConfigError,
    CryptoError,
    Equivocation,
    MalformedMessage,
    PolicyRefusal,
    RemoteProtocolError,
)
from sottovoce.secagg import graph, keys, segments, shamir
from sottovoce.secagg.client_stages import (
    Advertised,
    InputMasked,
    KeysShared,
    Prepared,
    Revealed,
    Seat,
    Setting,
    SurvivorsSigned,
)
from sottovoce.secagg.graph import GraphParameters
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.roster import Shape, open_signature, shape_of, split_leaves, verify_neighbours
from sottovoce.secagg.transcript import commitment_to, leaf_of, survivors_digest
from sottovoce.secagg.uploads import tag_vector
from sottovoce.wire.messages import (
    AdvertiseKeys,
    MaskedInput,
    MaskedInputRequest,
    Roster,
    ShareKeys,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmasking,
    UnmaskingRequest,
)


def advertise(setting: Setting, stage: Prepared) -> Advertised:
    """Make fresh keys and bind them to everything that was agreed.

    Raises:
        PolicyRefusal: The owner does not allow such a session.
        RemoteProtocolError: The parameters are impossible or do not fit the vector.
        LowOrderPoint, CryptoError: The coordinator's upload key is not one.
    """
    _check_parameters(setting, len(stage.vector))
    keys.refuse_low_order(setting.agreement.upload_key)
    channel = keys.key_pair(setting.entropy(keys.SECRET_BYTES))
    mask = keys.key_pair(setting.entropy(keys.SECRET_BYTES))
    advertisement = AdvertiseKeys(
        certificate=setting.identity.certificate.der,
        plan=setting.agreement.plan,
        state=setting.agreement.state,
        parameters=setting.agreement.parameters_digest,
        channel_key=channel.public,
        mask_key=mask.public,
        nonce=setting.entropy(keys.NONCE_BYTES),
    )
    return Advertised(stage.vector, advertisement, channel, mask)


def share_keys(setting: Setting, stage: Advertised, roster: Roster) -> tuple[KeysShared, ShareKeys]:
    """Accept the one roster that these keys were made for; share both secrets among the neighbours.

    Raises:
        PolicyRefusal: The cohort is smaller than the owner allows.
        RemoteProtocolError, MalformedMessage, BadCertificate, BadSignature, LowOrderPoint: The roster or one
            neighbour's advertisement is not what it must be.
    """
    seat = _take_seat(setting, stage, roster)
    shape = seat.shape
    self_seed = setting.entropy(keys.SECRET_BYTES)
    holders = seat.holders
    rows = shamir.split(
        (self_seed, stage.mask.secret),
        points=shape.points(holders),
        threshold=shape.threshold,
        entropy=setting.entropy,
    )
    shares = dict(zip(holders, rows, strict=True))
    channels = _channels(stage, seat)
    ciphertexts = _encrypt_shares(setting.device, seat, channels, shares)
    commitment = commitment_to(self_seed, session=shape.session, position=seat.position)
    own_share = shares[seat.position][: shamir.SHARE_BYTES] if shape.graph.complete else b""
    uploading = stage.channel.agree(setting.agreement.upload_key)
    cipher = setting.agreement.parameters.cipher
    upload_key = keys.upload_key(uploading, session=shape.session, device=setting.device, cipher=cipher)
    following = KeysShared(stage.vector, seat, channels, stage.mask, self_seed, own_share, upload_key)
    return following, ShareKeys(commitment=commitment, ciphertexts=ciphertexts)


def mask_input(setting: Setting, stage: KeysShared, request: MaskedInputRequest) -> tuple[InputMasked, MaskedInput]:
    """Take the neighbours' shares and mask the vector in place; from here on the update is spent.

    Raises:
        PolicyRefusal: So few shared keys that too few can survive.
        RemoteProtocolError, MalformedMessage: Fewer sharers than the threshold; unknown, repeated or unsorted ones;
            not one ciphertext for each of them.
        BadShare: A neighbour's shares do not decrypt, or a limb is out of range.
        LowOrderPoint: A neighbour's key is of low order.
    """
    senders = request.senders
    _require_rising(senders, allowed=stage.seat.neighbours)
    _require_neighbourhood(stage.seat, (stage.seat.position, *senders))
    if stage.seat.shape.graph.complete:  # On a ring a device sees its own neighbourhood only, until U3 is shown.
        _require_members(setting, stage.seat, 1 + len(senders))
    held = _decrypt_shares(setting.device, stage, request)
    sent, wanted = _inclusion_tokens(setting, stage, senders)
    _mask_in_place(setting, stage, senders)
    cipher = setting.agreement.parameters.cipher
    announced = tag_vector(stage.vector, stage.upload_key, cipher, chunk_bytes=setting.chunk_bytes)
    following = InputMasked(stage.vector, stage.seat, held, wanted, stage.own_share)
    return following, MaskedInput(vector=announced, inclusions=sent)


def sign_survivors(
    setting: Setting, stage: InputMasked, request: SurvivorsRequest
) -> tuple[SurvivorsSigned, SurvivorsSignature]:
    """Commit to one survivor set; the envelope's signature makes it a signature on the set.

    Raises:
        PolicyRefusal, RemoteProtocolError, MalformedMessage: See `_check_survivors`.
    """
    _check_survivors(setting, stage, request.survivors)
    digest = survivors_digest(request.survivors, session=stage.seat.shape.session)
    return SurvivorsSigned(stage, digest), SurvivorsSignature(survivors=digest)


def reveal_agreed(setting: Setting, stage: SurvivorsSigned, request: UnmaskingRequest) -> tuple[Revealed, Unmasking]:
    """Active mode: answer only for the set that this device signed, and t of its neighbours with it.

    Raises:
        Equivocation: A neighbour signed another set; the error carries its signed envelope.
        RemoteProtocolError, MalformedMessage, BadSignature: Another set, or not t valid signatures of neighbours.
        CryptoError: A surviving neighbour has not masked with this device.
    """
    seat = stage.masked.seat
    _check_survivors(setting, stage.masked, request.survivors)
    if survivors_digest(request.survivors, session=seat.shape.session) != stage.survivors:
        raise RemoteProtocolError("asked to unmask another survivor set than the one signed")
    _check_signatures(setting, stage, request)
    _check_inclusions(stage.masked, request)
    return Revealed(), _shares_for(stage.masked, request.survivors)


def reveal(setting: Setting, stage: InputMasked, request: UnmaskingRequest) -> tuple[Revealed, Unmasking]:
    """Curious mode: answer for the first survivor set asked about.

    Raises:
        PolicyRefusal, RemoteProtocolError, MalformedMessage: See `_check_survivors`.
    """
    if request.signatures or request.inclusions:
        raise MalformedMessage("signatures or tokens in a session without a consistency check")
    _check_survivors(setting, stage, request.survivors)
    return Revealed(), _shares_for(stage, request.survivors)


def _check_parameters(setting: Setting, vector_bytes: int) -> None:
    parameters, terms = setting.agreement.parameters, setting.terms
    try:
        graph.check_parameters(parameters)
    except ConfigError as error:
        raise RemoteProtocolError(f"the coordinator proposed impossible parameters: {error}") from error
    expected = segments.unpacked_bytes(parameters)
    if expected != vector_bytes:
        raise RemoteProtocolError(f"the session masks {expected} bytes, the update has {vector_bytes}")
    if parameters.mode not in terms.modes:
        raise PolicyRefusal("modes", f"the session is {parameters.mode}, allowed is {', '.join(terms.modes)}")
    if parameters.maximum_clients < terms.minimum_cohort:
        largest, wanted = parameters.maximum_clients, terms.minimum_cohort
        raise PolicyRefusal("minimum_cohort", f"at most {largest} devices where {wanted} are wanted")
    if parameters.corrupt_share_bp < terms.minimum_corrupt_share_bp:
        proposed, wanted = parameters.corrupt_share_bp, terms.minimum_corrupt_share_bp
        raise PolicyRefusal("minimum_corrupt_share_bp", f"{proposed} basis points where {wanted} are wanted")


def _take_seat(setting: Setting, stage: Advertised, roster: Roster) -> Seat:
    """Return this device's place, once the roster, its graph and every neighbour are verified."""
    agreement = setting.agreement
    leaves = split_leaves(roster)
    if len(leaves) < setting.terms.minimum_cohort:
        raise PolicyRefusal("minimum_cohort", f"{len(leaves)} devices where {setting.terms.minimum_cohort} are wanted")
    if len(leaves) > agreement.parameters.maximum_clients:
        raise RemoteProtocolError(f"{len(leaves)} members where at most {agreement.parameters.maximum_clients} fit")
    own_leaf = leaf_of(setting.device, setting.identity.certificate.fingerprint, stage.advertisement)
    if own_leaf not in leaves:
        raise RemoteProtocolError("this device is not in the roster it was sent")
    shape = _shape_told(setting, roster, leaves)
    position = leaves.index(own_leaf)
    neighbours = verify_neighbours(
        agreement,
        roster,
        leaves=leaves,
        positions=shape.neighbours(position),
        anchor=setting.anchor,
        at=setting.at,
    )
    if any(member.device == setting.device for member in neighbours.values()):
        raise RemoteProtocolError("this device is in the roster twice")
    holders = tuple(range(shape.members)) if shape.graph.complete else tuple(neighbours)
    return Seat(position, shape, neighbours, holders)


def _shape_told(setting: Setting, roster: Roster, leaves: Sequence[bytes]) -> Shape:
    """Return the graph of the coordinator's figures, if they are safe."""
    try:
        return shape_of(setting.agreement, leaves, GraphParameters(roster.neighbours, roster.threshold))
    except ConfigError as error:
        raise RemoteProtocolError(f"an impossible roster: {error}") from error


def _channels(stage: Advertised, seat: Seat) -> dict[int, keys.Channel]:
    """Return the channel with every neighbour, by position."""
    session, agree = seat.shape.session, stage.channel.agree
    return {
        position: keys.channel(agree(neighbour.channel_key), session=session)
        for position, neighbour in seat.neighbours.items()
    }


def _encrypt_shares(
    device: str, seat: Seat, channels: Mapping[int, keys.Channel], shares: Mapping[int, bytes]
) -> bytes:
    """Return the ciphertexts for all neighbours, one after another; `shares` are by position."""
    session, neighbours = seat.shape.session, seat.neighbours
    return b"".join(
        keys.encrypt_shares(
            keys.share_channel_key(channel, sender=device, recipient=neighbours[position].device),
            shares[position],
            session=session,
        )
        for position, channel in channels.items()
    )


def _decrypt_shares(device: str, stage: KeysShared, request: MaskedInputRequest) -> dict[int, bytes]:
    """Return what each sender has entrusted to this device, by position: a share of its self seed, one of its key."""
    session, neighbours, size = stage.seat.shape.session, stage.seat.neighbours, keys.CIPHERTEXT_BYTES
    if len(request.ciphertexts) != size * len(request.senders):
        raise MalformedMessage("there must be one ciphertext for every neighbour that shared keys")
    ciphertexts = [request.ciphertexts[at : at + size] for at in range(0, len(request.ciphertexts), size)]
    held = {
        position: keys.decrypt_shares(
            keys.share_channel_key(stage.channels[position], sender=neighbours[position].device, recipient=device),
            ciphertext,
            session=session,
        )
        for position, ciphertext in zip(request.senders, ciphertexts, strict=True)
    }
    shamir.parse_shares(b"".join(held.values()))
    return held


def _inclusion_tokens(
    setting: Setting, stage: KeysShared, positions: Sequence[int]
) -> tuple[bytes, Mapping[int, bytes]]:
    """Return the tokens that this device masks with each of `positions`, joined, and those that it wants of them."""
    if setting.agreement.parameters.mode != "active":
        return b"", {}
    device, channels = setting.device, stage.channels
    peers = {position: stage.seat.neighbours[position].device for position in positions}
    sent = [keys.inclusion_token(channels[p], sender=device, recipient=peer) for p, peer in peers.items()]
    wanted = {p: keys.inclusion_token(channels[p], sender=peer, recipient=device) for p, peer in peers.items()}
    return b"".join(sent), wanted


def _mask_in_place(setting: Setting, stage: KeysShared, positions: Sequence[int]) -> None:
    """Add the self mask and one pairwise mask per neighbour that shared keys, the lower position adds; then pack."""
    session, cipher, device = stage.seat.shape.session, setting.agreement.parameters.cipher, setting.device
    own_key = keys.self_mask_key(stage.self_seed, session=session, device=device, cipher=cipher)
    added: list[bytes] = [own_key]
    subtracted: list[bytes] = []
    for position in positions:
        neighbour, first = stage.seat.neighbours[position], stage.seat.position < position
        lower, upper = (device, neighbour.device) if first else (neighbour.device, device)
        secret = stage.mask.agree(neighbour.mask_key)
        key = keys.pairwise_mask_key(secret, session=session, lower=lower, upper=upper, cipher=cipher)
        (added if first else subtracted).append(key)
    expander = MaskExpander(setting.agreement.parameters)
    expander.apply(stage.vector, added=added, subtracted=subtracted)
    expander.erase()
    segments.pack(stage.vector, setting.agreement.parameters)


def _check_survivors(setting: Setting, stage: InputMasked, survivors: Sequence[int]) -> None:
    """Check a survivor set as far as this device can see.

    Raises:
        MalformedMessage: Unsorted, repeated or unknown positions.
        RemoteProtocolError: This device is not among them, or a neighbour that never shared keys is, or too few of
            the neighbourhood survive.
        PolicyRefusal: Fewer survivors than the owner allows.
    """
    seat = stage.seat
    _require_rising(survivors, allowed=range(seat.shape.members))
    if seat.position not in survivors:
        raise RemoteProtocolError("this device has sent its masked input, yet it is not among the survivors")
    if not (seat.neighbours.keys() - stage.held.keys()).isdisjoint(survivors):
        raise RemoteProtocolError("a neighbour is among the survivors that never shared its keys")
    _require_neighbourhood(seat, survivors)
    _require_members(setting, seat, len(survivors))


def _require_neighbourhood(seat: Seat, positions: Collection[int]) -> None:
    """Refuse what leaves too few in the neighbourhood to rebuild a secret."""
    shape = seat.shape
    if len(set(positions).intersection(seat.holders)) < shape.threshold:
        raise RemoteProtocolError(f"fewer than {shape.threshold} of this device's neighbourhood are left")


def _require_members(setting: Setting, seat: Seat, members: int) -> None:
    """Refuse what leaves too few to hide in."""
    parameters, shape = setting.agreement.parameters, seat.shape
    if members < parameters.minimum_survivors:
        raise RemoteProtocolError(f"{members} members are left where the session needs {parameters.minimum_survivors}")
    if members - shape.corrupt < setting.terms.minimum_honest_survivors:
        wanted = f"{setting.terms.minimum_honest_survivors} beside the {shape.corrupt} that may be corrupt"
        raise PolicyRefusal("minimum_honest_survivors", f"{members} members are left where {wanted} are wanted")


def _check_signatures(setting: Setting, stage: SurvivorsSigned, request: UnmaskingRequest) -> None:
    """Check that at least t distinct neighbours among the survivors have signed the same set."""
    seat = stage.masked.seat
    survivors = set(request.survivors)
    known = {member.device: member for position, member in seat.neighbours.items() if position in survivors}
    signers: set[str] = set()
    for payload in request.signatures:
        opened = open_signature(setting.agreement, payload, known, session=seat.shape.session)
        device = opened.certificate.name
        if opened.message.survivors != stage.survivors:
            raise Equivocation(f"{device} has signed another survivor set in this session", (payload,))
        if device in signers:
            raise MalformedMessage(f"{device}'s signature is there twice")
        signers.add(device)
    if len(signers) < seat.shape.threshold:
        raise RemoteProtocolError(f"{len(signers)} neighbours signed the survivor set, not {seat.shape.threshold}")


def _check_inclusions(stage: InputMasked, request: UnmaskingRequest) -> None:
    """Check that every surviving neighbour has masked with this device, by the token that only it can make.

    Without this a server that tells two sides of a ring different lists of who shared keys could have one side answer
    for the self seeds of members whose pairwise masks all lie on the other.
    """
    alive = set(request.survivors)
    wanted = b"".join(token for position, token in stage.inclusions.items() if position in alive)
    if not hmac.compare_digest(wanted, request.inclusions):
        raise CryptoError("a neighbour among the survivors has not masked with this device")


def _shares_for(stage: InputMasked, survivors: Sequence[int]) -> Unmasking:
    """Return one share per owner, never both kinds: which one follows from the single survivor set."""
    alive, size = set(survivors), shamir.SHARE_BYTES
    shares = {p: content[:size] if p in alive else content[size:] for p, content in stage.held.items()}
    shares[stage.seat.position] = stage.own_share
    return Unmasking(shares=b"".join(shares[position] for position in sorted(shares)))


def _require_rising(positions: Sequence[int], *, allowed: Collection[int]) -> None:
    if sorted(set(positions)) != list(positions):
        raise MalformedMessage("positions must rise: unsorted, or one of them twice")
    if any(position not in allowed for position in positions):
        raise MalformedMessage("a position that is not in this device's roster")
