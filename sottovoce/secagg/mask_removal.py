"""The end of the server's session: the secrets that a survivor set calls for, rebuilt, and every mask off the total.

A survivor's self mask comes off by its self seed. A member that shared keys but whose vector is not in the total left
one pairwise mask with each surviving neighbour; they come off by its mask key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from sottovoce.errors import BadShare, RoundAbandoned
from sottovoce.secagg import keys, segments
from sottovoce.secagg.masks import MaskExpander
from sottovoce.secagg.server_stages import CollectingShares
from sottovoce.secagg.transcript import Agreement, commitment_to
from sottovoce.secagg.unmask import rebuild_secrets

_STREAMS_AT_ONCE = 64
"""Mask streams that pass over the total together; each needs about 1 kB, which the processor's cache has to hold."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How the masks' expansion is spread over threads; most of it runs without the interpreter's lock.

    Attributes:
        parts: How many, each with an accumulator of its own.
        run: `map`, or the `map` of a pool of as many threads.
    """

    parts: int
    run: Callable[..., Iterable[None]]


AT_ONCE = Spread(1, map)
"""One part, in the caller's thread."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What the shares gave, by roster position.

    Attributes:
        self_seeds: Of every survivor.
        mask_keys: Of every member that dropped out after it had shared keys.
    """

    self_seeds: Mapping[int, bytes] = field(repr=False)
    mask_keys: Mapping[int, keys.KeyPair] = field(repr=False)


def rebuild(stage: CollectingShares) -> Rebuilt:
    """Return the self seed of every survivor and the mask keys of every member that dropped out after sharing.

    Raises:
        RoundAbandoned: No subset of the shares gives what their owners committed to.
    """
    cohort, inputs = stage.inputs.cohort, stage.inputs
    point_of = dict(zip(stage.answers, cohort.shape.points(tuple(stage.answers)), strict=True))
    givers = sorted(stage.answers, key=point_of.__getitem__)
    held = cohort.holders[givers]
    shared = cohort.marked(inputs.commitments)[held]
    session = cohort.shape.session
    pairs: dict[int, keys.KeyPair] = {}

    def verify(owner: int, secret: bytes) -> None:
        if owner in stage.alive:
            found, expected = commitment_to(secret, session=session, position=owner), inputs.commitments[owner]
        else:
            pairs[owner] = keys.key_pair(secret)
            found, expected = pairs[owner].public, cohort.members[owner].mask_key
        if found != expected:
            raise BadShare(f"the rebuilt secret of {cohort.members[owner].device} is not the one it committed to")

    try:
        secrets = rebuild_secrets(
            owner_of=held[shared],
            point_of=np.repeat([point_of[giver] for giver in givers], shared.sum(axis=1)),
            limbs=np.concatenate([stage.answers[giver] for giver in givers]),
            owners=tuple(inputs.commitments),
            threshold=cohort.shape.threshold,
            verify=verify,
            session=session,
        )
    except BadShare as error:
        raise RoundAbandoned("bad_shares", str(error)) from error
    return Rebuilt({owner: secret for owner, secret in secrets.items() if owner in stage.alive}, pairs)


def take_masks_off(agreement: Agreement, stage: CollectingShares, rebuilt: Rebuilt, spread: Spread) -> None:
    """Take every mask off the total of `stage`, in place, the members dealt out to the parts of `spread`."""
    masks = _Masks(agreement, stage, rebuilt)
    owners, total = [*rebuilt.self_seeds, *rebuilt.mask_keys], stage.inputs.total
    parts = [owners[start :: spread.parts] for start in range(spread.parts)]
    totals = [total, *(bytearray(len(total)) for _ in parts[1:])]
    list(spread.run(masks.take_off, parts, totals))
    for part in totals[1:]:
        segments.add_into(total, part, agreement.parameters)


class _Masks:
    """The masks in the total of one session, as far as they must come off."""

    def __init__(self, agreement: Agreement, stage: CollectingShares, rebuilt: Rebuilt) -> None:
        self._parameters, self._rebuilt = agreement.parameters, rebuilt
        self._cohort, self._session = stage.inputs.cohort, stage.inputs.cohort.shape.session
        around, members = self._cohort.neighbours_of, self._cohort.members
        self._partners = {owner: stage.alive.intersection(around(owner)) for owner in rebuilt.mask_keys}
        partners = frozenset[int]().union(*self._partners.values())
        self._keys = {position: keys.parsed(members[position].mask_key) for position in partners}

    def take_off(self, owners: Iterable[int], total: bytearray) -> None:
        """Take the masks that follow from the secrets of `owners` off `total`."""
        expander = MaskExpander(self._parameters)
        streams = chain.from_iterable(map(self._streams_of, owners))
        while batch := list(islice(streams, _STREAMS_AT_ONCE)):
            added, subtracted = ([key for key, sign in batch if sign == wanted] for wanted in (1, -1))
            expander.apply(total, added=added, subtracted=subtracted)
        expander.erase()

    def _streams_of(self, owner: int) -> Iterator[tuple[bytes, int]]:
        """Yield the keys of the streams that follow from the secret of `owner`, each with the sign it is added with."""
        cipher, session, device = self._parameters.cipher, self._session, self._cohort.members[owner].device
        seed = self._rebuilt.self_seeds.get(owner)
        if seed is not None:
            yield keys.self_mask_key(seed, session=session, device=device, cipher=cipher), -1
            return
        pair = self._rebuilt.mask_keys[owner]
        for position in self._partners[owner]:
            peer, first = self._cohort.members[position].device, owner < position
            lower, upper = (device, peer) if first else (peer, device)
            secret = pair.exchange(self._keys[position])
            # The survivor added this stream if its position is the lower one, and subtracted it otherwise.
            yield (
                keys.pairwise_mask_key(secret, session=session, lower=lower, upper=upper, cipher=cipher),
                1 if first else -1,
            )
