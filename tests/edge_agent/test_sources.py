"""Collections that fill themselves: sensors, commands, files that grow, topics of a real broker."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.examples import ExampleStore
from edge_agent.local_broker import connect
from edge_agent.source_readers import reading
from edge_agent.source_settings import SourceConfig
from edge_agent.sources import Sources
from simulation.broker_process import BrokerProcess
from sottovoce.errors import BadExamples
from sottovoce.transport.mqtt import MqttSettings, MqttTransport


class Device:
    """A store and its sources, asked by hand; time goes by as the test says."""

    def __init__(self, folder: Path) -> None:
        self.store = ExampleStore(folder / "examples.sqlite")
        self.now_ms = 1_000_000
        self.retained: list[str] = []
        self.sources: Sources | None = None

    def open(self, **configs: SourceConfig) -> Sources:
        self.sources = Sources(
            configs,
            self.store,
            connect=lambda collection, config: connect(config, client_id=f"pi-1-{collection}"),
            retain=self.retained.append,
        )
        return self.sources

    def poll(self, *, after_s: float = 0.0) -> None:
        assert self.sources is not None
        self.now_ms += round(1000 * after_s)
        self.sources.poll(now_ms=self.now_ms, now_s=self.now_ms / 1000)

    def values(self, collection: str, column: str = "value") -> list[float]:
        return [round(float(v), 4) for v in self.store.read(collection)[column]]

    def poll_until(self, holds: Callable[[], bool]) -> None:
        """Ask the sources until what is waited for has happened: other processes take their own time."""
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline, "it did not happen"
            self.poll(after_s=0.01)
            time.sleep(0.01)

    def close(self) -> None:
        if self.sources is not None:
            self.sources.close()
        self.store.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path)
    yield made
    made.close()


def test_the_kernels_sensor_is_read_in_degrees_at_its_interval(device: Device, tmp_path: Path) -> None:
    zone = tmp_path / "temp"
    zone.write_text("48312\n")
    device.open(temperature=SourceConfig(kind="thermal", path=str(zone), every_s=60))
    device.poll()
    zone.write_text("49000\n")
    device.poll(after_s=59)
    assert device.values("temperature") == [48.312]
    device.poll(after_s=1)
    assert device.values("temperature") == [48.312, 49.0]


def test_a_sensor_that_is_not_there_is_told_once_and_asked_again(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zone = tmp_path / "temp"
    device.open(temperature=SourceConfig(kind="thermal", path=str(zone), every_s=1))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            device.poll(after_s=1)
    assert [r.message for r in caplog.records] == [
        f"source of temperature: cannot read {zone}: [Errno 2] No such file or directory: '{zone}'"
    ]
    zone.write_text("20000")
    device.poll(after_s=1)
    assert device.values("temperature") == [20.0]


@pytest.mark.parametrize(
    ("text", "member", "value"),
    [
        ("21.5\n", "", 21.5),
        (" -3 ", "", -3.0),
        ('{"temperature": 19.25, "humidity": 40}', "temperature", 19.25),
        ('{"a": {"b": "7.5"}}', "a.b", 7.5),
        ('{"on": true}', "on", 1.0),
    ],
)
def test_a_reading_is_a_number_or_a_member_of_an_object(text: str, member: str, value: float) -> None:
    assert reading(text, member=member, scale=2.0) == 2 * value


@pytest.mark.parametrize(
    ("text", "member", "error"),
    [
        ("unavailable", "", "'unavailable' is not a number; it was left out"),
        ('{"t": 1}', "", 'it is a JSON object; say which member is meant: field = "..."'),
        ('{"t": 1}', "temperature", "has no member 'temperature'"),
        ('{"t": [1]}', "t", "the member 't' is '[1]', not a number"),
        ("21", "t", "has no member 't'"),
        ("[" * 100_000, "t", "is not a number"),
    ],
)
def test_what_is_no_reading_says_so(text: str, member: str, error: str) -> None:
    with pytest.raises(BadExamples) as refused:
        reading(text, member=member, scale=1.0)
    assert error in str(refused.value)


def test_a_command_is_run_without_a_shell_and_read_when_it_has_ended(device: Device) -> None:
    program = (sys.executable, "-c", "print('{\"load\": 0.5}')")
    device.open(load=SourceConfig(kind="command", command=program, field="load", every_s=3600))
    device.poll_until(lambda: device.store.count("load") > 0)
    assert device.values("load") == [0.5]


def test_a_command_that_hangs_is_killed(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    program = (sys.executable, "-c", "import time; time.sleep(600)")
    device.open(load=SourceConfig(kind="command", command=program, every_s=3600, timeout_s=5))
    device.poll()
    with caplog.at_level(logging.WARNING):
        device.poll(after_s=6)
    assert "did not end within 5 s and was killed" in caplog.text
    assert device.store.count("load") == 0


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (("no-such-program-here",), "cannot start no-such-program-here: No such file or directory"),
        ((sys.executable, "-c", "raise SystemExit(3)"), "ended with exit code 3"),
        ((sys.executable, "-c", "print('warm')"), "'warm' is not a number"),
    ],
)
def test_a_command_that_fails_is_told(
    device: Device, caplog: pytest.LogCaptureFixture, program: tuple[str, ...], error: str
) -> None:
    device.open(load=SourceConfig(kind="command", command=program, every_s=3600))
    with caplog.at_level(logging.WARNING):
        device.poll_until(lambda: bool(caplog.records))
    assert error in caplog.text


def test_a_csv_that_grows_gives_every_whole_line_once(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "power.csv"
    file.write_text("watts,volts\n10,230\n20,231.5\n3")
    source = SourceConfig(kind="file", path=str(file), every_s=0)
    device.open(power=source)
    device.poll()
    assert device.values("power", "watts") == [10, 20]
    with file.open("a") as more:
        more.write("0,229\n")
    device.poll()
    assert device.values("power", "watts") == [10, 20, 30]
    assert device.values("power", "volts") == [230, 231.5, 229]


def test_after_a_restart_reading_goes_on_where_it_was(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "power.csv"
    file.write_text("watts\n1\n2\n")
    source = SourceConfig(kind="file", path=str(file), every_s=0)
    device.open(power=source)
    device.poll()
    assert device.sources is not None
    device.sources.close()
    with file.open("a") as more:
        more.write("3\n")
    device.open(power=source)
    device.poll()
    device.poll()
    assert device.values("power", "watts") == [1, 2, 3]


def test_what_was_forgotten_does_not_come_back(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "power.csv"
    file.write_text("watts\n1\n2\n")
    device.open(power=SourceConfig(kind="file", path=str(file), every_s=0))
    device.poll()
    device.store.forget("power")
    device.poll()
    assert device.store.count("power") == 0
    with file.open("a") as more:
        more.write("3\n")
    device.poll()
    assert device.values("power", "watts") == [3]


def test_messages_that_are_added_to_a_file_are_kept_as_text(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text('{"text": "Ciao, come va?"}\n{"text": 7}\n{"text": "bene"}\n', encoding="utf-8")
    device.open(messages=SourceConfig(kind="file", path=str(file), every_s=0))
    device.poll()
    assert list(device.store.read("messages")["text"]) == ["Ciao, come va?", "bene"]


def test_a_file_that_is_replaced_is_read_from_its_beginning(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "power.jsonl"
    file.write_text('{"watts": 1}\n{"watts": 2}\n')
    device.open(power=SourceConfig(kind="file", path=str(file), every_s=0))
    device.poll()
    fresh = tmp_path / "fresh"
    fresh.write_text('{"watts": 9}\n')
    os.replace(fresh, file)
    device.poll()
    assert device.values("power", "watts") == [1, 2, 9]


def test_a_line_that_is_no_example_is_dropped_alone(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "power.jsonl"
    good = [json.dumps({"watts": n}) for n in range(3)]
    file.write_text("\n".join([good[0], "nonsense", '{"volts": 1}', good[1], '{"watts": NaN}', good[2]]) + "\n")
    sources = device.open(power=SourceConfig(kind="file", path=str(file), every_s=0))
    with caplog.at_level(logging.WARNING):
        device.poll()
    assert device.values("power", "watts") == [0, 1, 2]
    assert (sources.added["power"], sources.dropped["power"]) == (3, 3)
    assert "power.jsonl, byte 0 onwards, line 2: not JSON" in caplog.text


def test_a_line_that_is_too_long_does_not_keep_the_later_ones_waiting(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"value": 1}\n{"value": [' + b"0, " * 800_000 + b'0]}\n{"value": 2}\n')
    config = SourceConfig(kind="file", path=str(file), every_s=1)
    device.open(power=config)
    with caplog.at_level(logging.WARNING):
        device.poll(after_s=1)
        device.poll(after_s=1)
        device.open(power=config)  # As after a restart in the middle of that line.
        for _ in range(3):
            device.poll(after_s=1)
    assert device.values("power") == [1.0, 2.0]
    assert [r.message for r in caplog.records if "longer than" in r.message]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"value": ' + "9" * 400 + "}", "too large"),
        ('{"value": ' + "[" * 800 + "1" + "]" * 800 + "}", "lists in lists"),
        ('{"val\\ud800ue": 1}', "must be printable"),
    ],
)
def test_no_line_stops_a_source(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, error: str
) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(f'{line}\n{{"value": 2}}\n')
    device.open(power=SourceConfig(kind="file", path=str(file), every_s=1))
    with caplog.at_level(logging.WARNING):
        device.poll()
    assert device.values("power") == [2.0]
    assert error in caplog.text


def test_a_line_ends_where_the_file_says_and_not_within_a_message(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes('{"text": "one\u2028two\x85"}\r\n{"text": "three"}\n'.encode())
    device.open(messages=SourceConfig(kind="file", path=str(file), every_s=1))
    device.poll()
    assert device.store.read("messages")["text"].tolist() == ["one\u2028two\x85", "three"]


def test_a_csv_that_grows_may_have_columns_of_text(device: Device, tmp_path: Path) -> None:
    file = tmp_path / "sensor.csv"
    # What a sensor that is not there yet has in its first line says nothing about its column.
    file.write_text('when,value,note\n2026-11-22T09:59:00,unavailable,""\n2026-11-22T10:00:00,21.5,"warm, or so"\n')
    config = SourceConfig(kind="file", path=str(file), every_s=1)
    device.open(power=config)
    device.poll()
    device.open(power=config)  # What is text is known after a restart, too: 7 is a note.
    with file.open("a") as grown:
        grown.write("2026-11-22T10:01:00,22,7\n2026-11-22T10:02:00,none,7\n")
    device.poll(after_s=1)
    kept = device.store.read("power")
    assert (kept["value"].tolist(), kept["note"].tolist()) == ([21.5, 22.0], ["warm, or so", "7"])
    assert device.sources is not None
    assert device.sources.dropped["power"] == 1  # Since the restart.


def test_what_alternates_between_well_and_wrong_does_not_fill_the_log(
    device: Device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "log.jsonl"
    file.touch()
    device.open(power=SourceConfig(kind="file", path=str(file), every_s=1))
    with caplog.at_level(logging.WARNING), file.open("a") as grown:
        for number in range(1200):  # Twenty minutes.
            grown.write(f'{{"value": {number}}}\n' if number % 2 else f'{{"value": "off {number}"}}\n')
            grown.flush()
            device.poll(after_s=1)
    assert device.store.count("power") == 600
    assert len(caplog.records) == 2


def test_retention_is_applied_while_a_source_runs(device: Device, tmp_path: Path) -> None:
    zone = tmp_path / "temp"
    zone.write_text("1000")
    device.open(temperature=SourceConfig(kind="thermal", path=str(zone), every_s=10))
    for _ in range(12):
        device.poll(after_s=10)
    assert device.retained == ["temperature"] * 2


def test_a_topic_of_a_real_broker_fills_a_collection(device: Device) -> None:
    with BrokerProcess() as broker:
        sensor = MqttTransport(
            MqttSettings(host=broker.host, port=broker.port, client_id="sensors"), rng=random.Random(1)
        )
        try:
            sensor.publish("home/kitchen/temperature", b"21.5", retain=True)
            device.open(
                rooms=SourceConfig(
                    kind="mqtt", host=broker.host, port=broker.port, topic="home/+/temperature", every_s=0
                ),
                zigbee=SourceConfig(
                    kind="mqtt",
                    host=broker.host,
                    port=broker.port,
                    topic="zigbee2mqtt/+",
                    field="temperature",
                    every_s=0,
                ),
            )
            device.poll_until(lambda: device.store.count("rooms") == 1)
            for topic, payload in (
                ("home/attic/temperature", b"20" + bytes(1 << 16)),
                (f"home/{'a' * 1000}/temperature", b"20"),
                ("home/attic/temperature", b"unavailable"),
                ("home/attic/temperature", b"17"),
                ("zigbee2mqtt/door", b'{"contact": true}'),
                ("zigbee2mqtt/garden", b'{"temperature": 8.25, "battery": 90}'),
            ):
                sensor.publish(topic, payload)
            device.poll_until(lambda: device.store.count("rooms") == 2 and device.store.count("zigbee") == 1)
            assert device.values("rooms") == [21.5, 17.0]
            assert device.values("zigbee") == [8.25]
            assert device.sources is not None
            assert device.sources.dropped == {"rooms": 1, "zigbee": 1}
        finally:
            sensor.close()


def test_a_chatty_topic_is_read_as_often_as_the_owner_says(device: Device) -> None:
    with BrokerProcess() as broker:
        sensor = MqttTransport(
            MqttSettings(host=broker.host, port=broker.port, client_id="sensors"), rng=random.Random(1)
        )
        try:
            sources = device.open(
                power=SourceConfig(kind="mqtt", host=broker.host, port=broker.port, topic="plug/#", every_s=60)
            )
            marker = {"n": 0}

            def hear(topic: str, payload: bytes) -> None:
                """Publish, and wait until a later message on a topic of its own has been heard, and so this one too."""
                sensor.publish(topic, payload)
                marker["n"] += 1
                before = sources.added["power"]
                sensor.publish(f"plug/marker/{marker['n']}", b"0")
                device.poll_until(lambda: sources.added["power"] > before and device.values("power")[-1] == 0.0)

            sensor.publish("plug/marker/first", b"0", retain=True)
            device.poll_until(lambda: sources.added["power"] == 1)
            hear("plug/a", b"1")
            hear("plug/a", b"2")
            device.poll(after_s=60)
            hear("plug/a", b"3")
            assert [v for v in device.values("power") if v] == [1.0, 3.0]
        finally:
            sensor.close()
