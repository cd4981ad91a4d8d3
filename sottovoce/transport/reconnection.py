"""When to try again, and when to give up: pure rules for the life of a link, fed with times and outcomes."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

TAKEOVERS_A_MINUTE = 3
"""More than this many and two clients are fighting for one id: this one stops."""
UNANSWERED_BEFORE_GIVING_UP = 5
"""A broker that closes every connection without an answer, and never let us in: it will not tomorrow."""
_STABLE_AFTER_S = 10.0


class FullJitter:
    """Exponential back-off with full jitter: a fleet that lost its broker does not come back in one wave.

    See "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self, rng: random.Random, *, min_s: float, max_s: float) -> None:
        self._rng = rng
        self._min_s = min_s
        self._max_s = max_s
        self._window_s = min_s

    def next_wait_s(self, *, link_lasted_s: float = 0.0) -> float:
        """Return how long to wait, 0 to the window, and double the window.

        Args:
            link_lasted_s: How long the link was up before it broke; one that was stable starts over at the smallest
                window.
        """
        if link_lasted_s >= _STABLE_AFTER_S:
            self._window_s = self._min_s
        wait_s = self._rng.uniform(0, self._window_s)
        self._window_s = min(self._max_s, 2 * self._window_s)
        return wait_s


class TakeoverGuard:
    """Counts how often another client took this one's id within the last minute."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque()

    def taken_over(self, now_s: float) -> bool:
        """Note a takeover at `now_s` (monotonic seconds) and say whether it was one too many."""
        self._times_s.append(now_s)
        while now_s - self._times_s[0] >= 60.0:
            self._times_s.popleft()
        return len(self._times_s) > TAKEOVERS_A_MINUTE

    def reset(self) -> None:
        """The broker itself was away: what looked like takeovers was not."""
        self._times_s.clear()


@dataclass(frozen=True, slots=True)
class Ending:
    """How one connection ended.

    Attributes:
        text: What happened, in words.
        at_s: When, monotonic seconds.
        lasted_s: Seconds since the broker let us in; 0 if it did not.
        let_in: The broker answered CONNECT with success.
        reached: There was a TCP connection at all.
        hopeless: Somebody must change a setting: the broker refused us, or TLS did. Final, unless this process was let
            in before: then it is likelier that the broker's settings are wrong for a while than that ours are.
        hung_up: The other side closed the connection and did not say why, which is how mosquitto 2.0 and every broker
            under 3.1.1 behave when another client takes the id, or when a message is larger than they accept.
        taken_over: The broker said that another client took the id.
    """

    text: str
    at_s: float
    lasted_s: float = 0.0
    let_in: bool = False
    reached: bool = True
    hopeless: bool = False
    hung_up: bool = False
    taken_over: bool = False


@dataclass(slots=True)
class Persistence:
    """Decides after each connection whether there is any sense in another one."""

    client_id: str
    guard: TakeoverGuard = field(default_factory=TakeoverGuard)
    was_let_in: bool = False
    unanswered: int = 0

    def verdict(self, ending: Ending) -> tuple[str, bool]:
        """Return the reason to tell the owner, and whether it is final."""
        self.was_let_in = self.was_let_in or ending.let_in
        if ending.hopeless:
            return ending.text, not self.was_let_in
        if not ending.reached:
            self.guard.reset()
            return ending.text, False
        if ending.let_in:
            return self._after_a_session(ending)
        self.guard.reset()
        self.unanswered = self.unanswered + 1 if ending.hung_up else 0
        final = self.unanswered >= UNANSWERED_BEFORE_GIVING_UP and not self.was_let_in
        return ending.text, final

    def _after_a_session(self, ending: Ending) -> tuple[str, bool]:
        self.unanswered = 0
        if not (ending.taken_over or ending.hung_up) or not self.guard.taken_over(ending.at_s):
            return ending.text, False
        if ending.taken_over:
            cause = f"another client keeps connecting as {self.client_id!r}"
        else:
            cause = (
                "the broker keeps closing this connection: another client connects as "
                f"{self.client_id!r}, or a message is larger than the broker's max_packet_size"
            )
        return f"{cause}; stopped after {TAKEOVERS_A_MINUTE + 1} times in a minute. Give every device its own id", True
