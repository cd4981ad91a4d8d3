"""When a link tries again, when it gives up, and what it tells the user."""

from __future__ import annotations

import random
import ssl

import pytest

from sottovoce.transport.diagnosis import Facts, diagnose, diagnose_tls
from sottovoce.transport.reconnection import (
    TAKEOVERS_A_MINUTE,
    UNANSWERED_BEFORE_GIVING_UP,
    Ending,
    FullJitter,
    Persistence,
    TakeoverGuard,
)

WHERE = "the broker at b:1"


def test_the_window_doubles_to_its_bound_and_the_wait_fills_it():
    jitter = FullJitter(random.Random(3), min_s=1, max_s=60)
    windows = [1, 2, 4, 8, 16, 32, 60, 60]
    waits = [jitter.next_wait_s() for _ in windows]
    assert all(0 <= wait <= window for wait, window in zip(waits, windows, strict=True))
    tail = [jitter.next_wait_s() for _ in range(500)]
    assert min(tail) < 3 < 57 < max(tail) <= 60


def test_only_a_stable_link_starts_over():
    jitter = FullJitter(random.Random(3), min_s=1, max_s=60)
    for _ in range(10):
        jitter.next_wait_s(link_lasted_s=0.5)
    assert max(jitter.next_wait_s(link_lasted_s=0.5) for _ in range(20)) > 10
    assert jitter.next_wait_s(link_lasted_s=100) <= 1
    assert jitter.next_wait_s(link_lasted_s=0.5) <= 2


def test_two_devices_do_not_come_back_together():
    waits = [FullJitter(random.Random(seed), min_s=1, max_s=60).next_wait_s() for seed in range(100)]
    assert len({round(wait, 1) for wait in waits}) >= 8


def test_takeovers_are_counted_within_one_minute():
    guard = TakeoverGuard()
    assert not any(guard.taken_over(float(time_s)) for time_s in range(0, 300, 20))
    rapid = TakeoverGuard()
    assert [rapid.taken_over(10.0 + index) for index in range(TAKEOVERS_A_MINUTE + 1)] == [False, False, False, True]


def persistence_after(*endings: Ending) -> tuple[str, bool]:
    persistence = Persistence("pi-1")
    verdicts = [persistence.verdict(ending) for ending in endings]
    assert not any(final for _, final in verdicts[:-1])
    return verdicts[-1]


def let_in(at_s: float, **how: bool) -> Ending:
    return Ending("", at_s, lasted_s=1, let_in=True, **how)


def away(at_s: float) -> Ending:
    return Ending("away", at_s, reached=False)


def unanswered(at_s: float) -> Ending:
    return Ending("unanswered", at_s, hung_up=True)


def test_a_broker_that_cannot_be_reached_is_tried_for_ever():
    assert persistence_after(*(away(float(time_s)) for time_s in range(1000))) == ("away", False)


def test_an_announced_takeover_is_named():
    reason, final = persistence_after(*(let_in(float(time_s), taken_over=True) for time_s in range(4)))
    assert final
    assert reason.startswith("another client keeps connecting as 'pi-1'")


def test_a_silent_hang_up_may_have_two_causes():
    reason, final = persistence_after(*(let_in(float(time_s), hung_up=True) for time_s in range(4)))
    assert final
    assert "'pi-1'" in reason
    assert "max_packet_size" in reason


def test_a_restarting_broker_is_not_a_takeover():
    endings = [each for time_s in range(20) for each in (let_in(float(time_s), hung_up=True), away(time_s + 0.5))]
    assert persistence_after(*endings) == ("away", False)


def test_no_answer_is_final_only_for_who_was_never_let_in():
    some = [unanswered(float(time_s)) for time_s in range(UNANSWERED_BEFORE_GIVING_UP)]
    assert persistence_after(*some) == ("unanswered", True)
    assert persistence_after(let_in(0.0), *some, *some) == ("unanswered", False)
    assert persistence_after(*some[1:], away(9.0), Ending("silent", 9.5), *some[1:]) == ("unanswered", False)


def test_a_refusal_is_final_only_for_who_was_never_let_in():
    refused = Ending("refused", 1.0, hopeless=True)
    assert persistence_after(refused) == ("refused", True)
    assert persistence_after(let_in(0.0), refused, refused) == ("refused", False)


@pytest.mark.parametrize(
    ("code", "says"), [(0x84, "protocol"), (0x85, "device id"), (0x86, "password"), (0x87, "authorised")]
)
def test_a_refusal_says_what_to_check(code, says):
    ending = diagnose(Facts(0.0, connack_code=code), where=WHERE, now_s=1.0)
    assert ending.hopeless
    assert says in ending.text


def test_a_busy_broker_is_tried_again():
    ending = diagnose(Facts(0.0, connack_code=0x88, connack_text="Server unavailable"), where=WHERE, now_s=1.0)
    assert (ending.hopeless, "Server unavailable" in ending.text) == (False, True)


def test_a_tls_alert_after_the_handshake_is_about_the_certificate():
    facts = Facts(0.0, last_words="[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required")
    ending = diagnose(facts, where=WHERE, now_s=1.0)
    assert (ending.hopeless, "cert_file" in ending.text) == (True, True)


def test_a_reset_counts_as_a_hang_up_only_with_a_publish_on_its_way():
    reset = "[Errno 104] Connection reset by peer"
    for unacknowledged in (False, True):
        facts = Facts(0.0, connack_code=0, last_words=reset, unacknowledged=unacknowledged)
        assert diagnose(facts, where=WHERE, now_s=5.0).hung_up is unacknowledged


def test_a_keepalive_timeout_and_a_farewell_are_no_hang_up():
    timeout = Facts(0.0, connack_code=0, farewell_code=0x8D, farewell_text="Keep alive timeout")
    assert diagnose(timeout, where=WHERE, now_s=5.0).hung_up is False
    stopping = Facts(0.0, connack_code=0, farewell_code=0x8B, farewell_text="Server shutting down", from_broker=True)
    ending = diagnose(stopping, where=WHERE, now_s=5.0)
    assert (ending.hung_up, ending.taken_over, ending.lasted_s) == (False, False, 5.0)
    assert "Server shutting down" in ending.text


def test_other_tls_failures_are_tried_again():
    ending = diagnose_tls(ssl.SSLError(1, "[SSL: INTERNAL_ERROR] internal error"), where=WHERE, now_s=1.0)
    assert (ending.hopeless, ending.reached) == (False, True)
