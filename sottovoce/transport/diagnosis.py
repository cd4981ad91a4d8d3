"""What the end of a connection means: bare facts in, a text for the user and a judgement out. Pure."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from sottovoce.transport.reconnection import Ending

SESSION_TAKEN_OVER = 0x8E
PACKET_TOO_LARGE = 0x95
# CONNACK codes that only a change of settings cures, and what to look at. Those of MQTT 3.1.1 are given the numbers of
# MQTT 5.
_REFUSALS = {
    0x84: "it does not speak this version of MQTT: set protocol to the other of 5 and 3.1.1",
    0x85: "it does not accept this client id: check the device id",
    0x86: "user name or password are wrong: check username and password",
    0x87: "this client is not authorised: check that its certificate, user name and client id are the device's own",
    0x8A: "this client is banned: ask the fleet's operator",
    0x8C: "it wants another way to authenticate: check username, password and the TLS files",
}


@dataclass(slots=True)
class Facts:
    """What was seen of one connection.

    Attributes:
        started_s: When it began, and later when the broker let us in; monotonic seconds.
        connack_code, connack_text: The broker's answer to CONNECT; None if there was none.
        farewell_code, farewell_text: The DISCONNECT packet of the broker, or paho's idea of why the connection ended.
        from_broker: The farewell is a packet of the broker (MQTT 5 only).
        last_words: The last error that paho or the socket reported.
        silent: We hung up because the broker did not answer.
        unacknowledged: Publishes were on their way when it ended.
    """

    started_s: float
    connack_code: int | None = None
    connack_text: str = ""
    farewell_code: int | None = None
    farewell_text: str = ""
    from_broker: bool = False
    last_words: str = ""
    silent: bool = False
    unacknowledged: bool = False

    @property
    def too_large(self) -> bool:
        """The broker said goodbye because of a packet that it never takes."""
        return self.from_broker and self.farewell_code == PACKET_TOO_LARGE

    @property
    def hung_up(self) -> bool:
        """The broker closed the connection without a word.

        A reset may as well be the network's; it counts where a publish may be what the broker did not like.
        """
        reset_by_the_network = bool(self.last_words) and not self.unacknowledged
        return not (self.from_broker or "keep alive" in self.farewell_text.lower() or reset_by_the_network)


def diagnose(facts: Facts, *, where: str, now_s: float) -> Ending:
    """Return how a connection that was established at TCP level has ended.

    Args:
        facts: What was seen.
        where: The broker, in words.
        now_s: Monotonic seconds.
    """
    if facts.connack_code is None:
        return _unanswered(facts, where, now_s)
    if facts.connack_code >= 0x80:
        advice = _REFUSALS.get(facts.connack_code)
        text = f"{where} refused the connection: {advice or facts.connack_text}"
        return Ending(text, now_s, hopeless=advice is not None)
    if facts.from_broker:
        text = f"{where} said: {facts.farewell_text}"
    elif facts.hung_up:
        text = f"{where} closed the connection"
    else:
        text = f"the link broke: {facts.last_words or facts.farewell_text}"
    return Ending(
        text,
        now_s,
        lasted_s=now_s - facts.started_s,
        let_in=True,
        hung_up=facts.hung_up,
        taken_over=facts.from_broker and facts.farewell_code == SESSION_TAKEN_OVER,
    )


def _unanswered(facts: Facts, where: str, now_s: float) -> Ending:
    """The connection ended before the broker said whether it lets us in."""
    if facts.silent:
        return Ending(f"{where} accepts connections but does not answer", now_s)
    if "ALERT" in facts.last_words.upper():  # TLS 1.3 refuses a client's certificate only after the handshake.
        text = f"{where} refused this client's certificate ({facts.last_words}): check cert_file and key_file"
        return Ending(text, now_s, hopeless=True)
    text = (
        f"{where} closed the connection without an answer: check that the port is right, that TLS is configured "
        "exactly if the broker wants it, and that the certificate is of its fleet and not revoked"
    )
    return Ending(text, now_s, hung_up=True)


def diagnose_tls(error: ssl.SSLError, *, where: str, now_s: float) -> Ending:
    """Return what a failed TLS handshake means."""
    reason = str(getattr(error, "reason", None) or "").upper()
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"{where} shows a certificate that does not fit ca_file and host: {error.verify_message}"
        return Ending(text, now_s, hopeless=True)
    if "ALERT" in reason:
        text = f"{where} refused this client's certificate ({reason}): check cert_file and key_file"
        return Ending(text, now_s, hopeless=True)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return Ending(f"{where} does not speak TLS on this port: check port and tls", now_s, hopeless=True)
    return Ending(f"the TLS handshake with {where} failed: {error}", now_s, hung_up=True)
