"""The paho client that the settings mean; `sottovoce.transport.mqtt_link` owns and drives it."""

from __future__ import annotations

from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY, Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from sottovoce.transport.mqtt_settings import HEADER_ALLOWANCE_BYTES, MqttSettings, tls_context


def new_client(settings: MqttSettings) -> Client:
    """Return a paho client that knows everything in `settings` but has not connected.

    Raises:
        ConfigError: A TLS file cannot be used.
    """
    version_5 = settings.protocol == "5"
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=settings.client_id,
        clean_session=None if version_5 else settings.clean_start,
        protocol=MQTTProtocolVersion.MQTTv5 if version_5 else MQTTProtocolVersion.MQTTv311,
        reconnect_on_failure=False,
        manual_ack=True,
    )
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    if settings.will is not None:
        client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
    if settings.tls is not None:
        client.tls_set_context(tls_context(settings.tls))
    client.connect_timeout = settings.connect_timeout_s
    if not version_5:
        client.connect_async(settings.host, settings.port, settings.keepalive_s)
        return client
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves it untyped
    properties.SessionExpiryInterval = settings.session_expiry_s
    properties.ReceiveMaximum = settings.receive_maximum
    properties.MaximumPacketSize = settings.max_payload_bytes + HEADER_ALLOWANCE_BYTES
    client.connect_async(
        settings.host,
        settings.port,
        settings.keepalive_s,
        clean_start=MQTT_CLEAN_START_FIRST_ONLY if settings.clean_start else False,
        properties=properties,
    )
    return client
