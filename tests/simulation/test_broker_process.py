"""The broker process: a real mosquitto that starts, survives what is done to it, and leaves nothing behind."""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from simulation.broker_process import HOST, BrokerProcess, render_configuration
from sottovoce.errors import TransportError

TIMEOUT_S = 10.0


@pytest.fixture
def broker() -> Iterator[BrokerProcess]:
    with BrokerProcess() as running:
        yield running


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        select.select([], [], [], 0.01)
    return True


def publish_retained(broker: BrokerProcess, payload: bytes) -> None:
    with_ack = mqtt.Client(CallbackAPIVersion.VERSION2)
    with_ack.connect(HOST, broker.port)
    with_ack.loop_start()
    try:
        with_ack.publish("sv1/fleet/all/x", payload, qos=1, retain=True).wait_for_publish(TIMEOUT_S)
    finally:
        with_ack.disconnect()
        with_ack.loop_stop()


def read_retained(broker: BrokerProcess) -> bytes:
    heard: queue.Queue[bytes] = queue.Queue()
    reader = mqtt.Client(CallbackAPIVersion.VERSION2)
    reader.on_message = lambda _client, _userdata, message: heard.put(bytes(message.payload))
    reader.connect(HOST, broker.port)
    reader.subscribe("sv1/fleet/all/#", qos=1)
    reader.loop_start()
    try:
        return heard.get(timeout=TIMEOUT_S)
    finally:
        reader.disconnect()
        reader.loop_stop()


def test_it_accepts_connections_as_soon_as_it_is_entered(broker: BrokerProcess) -> None:
    socket.create_connection((HOST, broker.port), timeout=TIMEOUT_S).close()
    assert exists(broker.pid)


def test_it_listens_on_loopback_only(broker: BrokerProcess) -> None:
    listening = (broker.folder / "mosquitto.conf").read_text()
    assert f"\nlistener {broker.port} 127.0.0.1\n" in listening
    assert stat.S_IMODE(broker.folder.stat().st_mode) == 0o700


def test_leaving_frees_process_port_and_folder() -> None:
    with BrokerProcess() as broker:
        pid, folder, port = broker.pid, broker.folder, broker.port
    assert not exists(pid)
    assert not folder.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=TIMEOUT_S)


def interrupt_while_paused(broker: BrokerProcess, pids: list[int]) -> None:
    with broker:
        pids.append(broker.pid)
        broker.pause()
        raise KeyboardInterrupt


def test_an_interrupt_while_the_broker_is_paused_frees_everything_too() -> None:
    broker, pids = BrokerProcess(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        interrupt_while_paused(broker, pids)
    assert not exists(pids[0])
    assert not broker.folder.exists()


def test_a_killed_parent_leaves_nothing_behind() -> None:
    program = (
        "import sys\nfrom simulation.broker_process import BrokerProcess\n"
        "with BrokerProcess() as broker:\n"
        "    print(broker.pid, broker.folder, flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert exists(int(pid))
        parent.send_signal(signal.SIGKILL)
    assert eventually(lambda: not exists(int(pid)) and not Path(folder).exists())


def test_saved_messages_survive_a_stop_and_a_restart_on_the_same_port(broker: BrokerProcess) -> None:
    publish_retained(broker, b"kept")
    port, pid = broker.port, broker.pid
    broker.restart()
    assert (broker.port, exists(pid)) == (port, False)
    assert read_retained(broker) == b"kept"


def test_messages_saved_by_autosave_survive_sigkill() -> None:
    with BrokerProcess(settings={"autosave_interval": "1", "autosave_on_changes": "true"}) as broker:
        publish_retained(broker, b"kept")
        assert eventually((broker.folder / "mosquitto.db").exists)
        broker.kill()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, broker.port), timeout=TIMEOUT_S)
        broker.restart()
        assert read_retained(broker) == b"kept"


def test_a_paused_broker_answers_nothing_until_it_is_resumed(broker: BrokerProcess) -> None:
    broker.pause()
    with socket.create_connection((HOST, broker.port), timeout=TIMEOUT_S) as link:
        link.sendall(b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x3c\x00\x02ab")
        assert select.select([link], [], [], 0.2)[0] == []
        broker.resume()
        assert link.recv(4) == b"\x20\x02\x00\x00", "CONNACK, accepted"


def test_a_stopped_broker_cannot_be_paused(broker: BrokerProcess) -> None:
    broker.stop()
    with pytest.raises(TransportError, match="not running"):
        broker.pause()


def test_a_paused_broker_can_be_stopped_and_restarted(broker: BrokerProcess) -> None:
    broker.pause()
    broker.restart()
    socket.create_connection((HOST, broker.port), timeout=TIMEOUT_S).close()


def test_a_wrong_setting_fails_at_once_with_the_broker_own_words() -> None:
    broker = BrokerProcess(settings={"max_queued_bananas": "3"})
    with pytest.raises(TransportError, match="max_queued_bananas"), broker:
        pass
    assert not broker.folder.exists()


def test_an_oversized_packet_is_refused_by_the_file_of_the_repository(broker: BrokerProcess) -> None:
    gone: queue.Queue[str] = queue.Queue()
    sender = mqtt.Client(CallbackAPIVersion.VERSION2, reconnect_on_failure=False)
    sender.on_disconnect = lambda _client, _userdata, _flags, reason, _properties: gone.put(str(reason))
    sender.connect(HOST, broker.port)
    sender.loop_start()
    try:
        sender.publish("sv1/fleet/up/a/0/x", b"\0" * (256 * 1024 + 1024), qos=1).wait_for_publish(TIMEOUT_S)
        assert gone.empty(), "a chunk and its header fit"
        sender.publish("sv1/fleet/up/a/0/x", b"\0" * 400_000, qos=1)
        assert gone.get(timeout=TIMEOUT_S)
    finally:
        sender.loop_stop()


def test_it_says_what_it_is(broker: BrokerProcess) -> None:
    name, version = broker.description.split(" ")
    assert (name, version[0], broker.protocol) == ("mosquitto", "2", "5")


def test_rendering_replaces_directives_in_place_and_appends_new_ones() -> None:
    base = "# listener is explained here\nlistener 1883 127.0.0.1\n\npersistence true\n"
    assert render_configuration(base, {"listener": "2000 127.0.0.1", "user": "me"}) == (
        "# listener is explained here\nlistener 2000 127.0.0.1\n\npersistence true\nuser me\n"
    )
