"""What everybody may read, retained at the broker: announcements, outcomes, and the blobs that they name.

Blobs go first: an announcement or outcome is handed over only when every chunk it names has been. What is superseded is
cleared, also what an earlier run left behind. The current state and the one before it stay: a device that comes late
may be fetching either.
"""

from __future__ import annotations

from collections import deque

from coordinator.assignment import Assignment
from coordinator.phases import Terms
from sottovoce.blobs import BlobRef
from sottovoce.errors import TransportError
from sottovoce.identity import Identity, SignedContext
from sottovoce.transport.base import Transport
from sottovoce.transport.blobs import BlobPublisher
from sottovoce.wire.codec import ALL, seal
from sottovoce.wire.messages import Announcement, Outcome
from sottovoce.wire.topics import Topics

_KEPT_STATES = 2


class Announcer:
    """Publishes what is retained, in the right order.

    Args:
        transport: The link to the broker.
        topics: Of the fleet.
        identity: Of the coordinator.
    """

    def __init__(self, transport: Transport, topics: Topics, identity: Identity) -> None:
        self._transport = transport
        self._topics = topics
        self._identity = identity
        self._publisher = BlobPublisher(transport, topics)
        self._states: deque[bytes] = deque(maxlen=_KEPT_STATES)
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._retained: dict[str, bytes] = {}
        self._seeking_leftovers: bool | None = None

    def offer(self, assignment: Assignment) -> int:
        """Have the blobs of a round retained, and clear what nobody needs any more.

        Returns:
            How many bytes a device has to download: the state, and what it cannot have from an earlier round.

        Raises:
            BadBlob: Their chunks are larger than the link carries.
        """
        *lasting, (state, content) = assignment.blobs
        before = self._publisher.wanted
        for ref, blob in lasting:
            self._publisher.publish(ref, blob)
        self.offer_state(state, content)
        needed = {ref.digest for ref, _ in lasting} | set(self._states)
        for digest in self._publisher.wanted - needed:
            self._publisher.retire(digest)
        return state.size + sum(ref.size for ref, _ in lasting if ref.digest not in before)

    def offer_state(self, ref: BlobRef, content: bytes) -> None:
        """Have a state retained; the one before the previous is cleared with the next round's `offer`.

        Raises:
            BadBlob: Its chunks are larger than the link carries.
        """
        self._publisher.publish(ref, content)
        if ref.digest in self._states:
            self._states.remove(ref.digest)
        self._states.append(ref.digest)

    def announcement(
        self, assignment: Assignment, terms: Terms, *, number: int, attempt: int, previous: bytes, now_ms: int
    ) -> bytes:
        """Return the signed announcement of a round, not sent yet: first it belongs into the journal.

        Args:
            assignment: What the round does.
            terms: Its deadlines.
            number: Round number.
            attempt: Attempt within the round.
            previous: Digest of the announcement before it.
            now_ms: The coordinator's time.
        """
        (plan, _), _, (state, _) = assignment.blobs
        message = Announcement(
            certificate=self._identity.certificate.der,
            previous=previous,
            plan=plan,
            state=state,
            now_ms=now_ms,
            selection_closes_ms=terms.selection_closes_ms,
            rendezvous_ms=terms.rendezvous_ms,
            rendezvous_closes_ms=terms.rendezvous_closes_ms,
        )
        return seal(message, self._identity, self._context(number, attempt))

    def announce(self, envelope: bytes) -> None:
        """Publish an announcement, retained, behind the blobs offered so far."""
        self._publish(self._topics.round(), envelope)

    def conclude(self, outcome: Outcome, *, number: int, attempt: int) -> int:
        """Publish the outcome of a round, retained, behind the blobs offered so far; return its size in bytes."""
        envelope = seal(outcome, self._identity, self._context(number, attempt))
        self._publish(self._topics.outcome(), envelope)
        return len(envelope)

    def restore(self) -> None:
        """Publish everything again: the broker may have lost what it retained."""
        self._publisher.restore()
        self._waiting.extend(self._retained.items())

    def adopt(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Look at a blob chunk that the subscription has brought up, and clear it unless it is wanted.

        Args:
            topic: Where it was published.
            payload: Its bytes; nothing where it was cleared.
            retained: The broker had kept it. What it had kept comes first, so the first chunk that it had not is one
                of the coordinator's own: all leftovers are known, and nothing needs to be listened to any longer.

        Raises:
            MalformedMessage: Not the topic of a blob chunk.
        """
        self._publisher.adopt(topic, payload)
        if payload and not retained and self._seeking_leftovers:
            self._transport.unsubscribe(self._topics.all_blobs_filter())
            self._seeking_leftovers = False

    def advance(self) -> bool:
        """Hand over as much as the link takes now; return True when nothing is left."""
        try:
            if not self._publisher.advance():
                return False
            while self._waiting:
                topic, envelope = self._waiting[0]
                self._transport.publish(topic, envelope, retain=True)
                self._waiting.popleft()
        except TransportError:
            return False  # The queue is full, or the link is closed for good: then the transport says so itself.
        if self._seeking_leftovers is None:
            # What is wanted is out: now ask what else the broker retains from an earlier run, to clear it.
            self._transport.subscribe(self._topics.all_blobs_filter())
            self._seeking_leftovers = True
        return True

    @property
    def acknowledged(self) -> bool:
        """True when the broker has everything that was handed over."""
        return self._transport.pending() == 0

    def _publish(self, topic: str, envelope: bytes) -> None:
        self._retained[topic] = envelope
        self._waiting.append((topic, envelope))

    def _context(self, number: int, attempt: int) -> SignedContext:
        certificate = self._identity.certificate
        return SignedContext(certificate.name, ALL, certificate.fleet, number, attempt)
