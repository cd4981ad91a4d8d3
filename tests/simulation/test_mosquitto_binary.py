"""Where a broker is looked for, and what happens where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from simulation.broker_process import HOST, BrokerProcess, find_broker
from simulation.embedded_broker import EmbeddedBroker, install_embedded_broker
from simulation.mosquitto_binary import find_mosquitto
from sottovoce.errors import ConfigError


def program(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "mosquitto"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_broker_on_the_path_comes_before_one_in_an_sbin_folder(tmp_path: Path) -> None:
    first, second = program(tmp_path / "bin"), program(tmp_path / "sbin")
    sbin = [str(tmp_path / "none"), str(tmp_path / "sbin")]
    assert find_mosquitto(search_path=str(tmp_path / "bin"), sbin_folders=sbin).executable == first
    assert find_mosquitto(search_path=str(tmp_path / "empty"), sbin_folders=sbin).executable == second


def test_an_unpacked_package_is_used_with_its_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = program(tmp_path / "usr" / "sbin")
    libraries = tmp_path / "usr" / "lib" / "x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (libraries / "libcjson.so.1").touch()
    found = find_mosquitto(install_folder=tmp_path, search_path="", sbin_folders=())
    assert found.executable == executable
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert found.environment()["LD_LIBRARY_PATH"] == str(libraries)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    assert found.environment()["LD_LIBRARY_PATH"] == f"{libraries}:/mine"


def test_without_apt_the_error_has_the_line_that_installs_a_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = program(tmp_path / "tools").with_name("dnf")
    tools.parent.joinpath("mosquitto").rename(tools)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match="sudo dnf install mosquitto"):
        find_mosquitto(install_folder=tmp_path / "unpacked", sbin_folders=())
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match="brew install mosquitto"):
        find_mosquitto(install_folder=tmp_path / "unpacked", sbin_folders=())


def test_a_failing_apt_leaves_nothing_behind_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("apt-get", "apt-cache", "dpkg", "dpkg-query"):
        (tools / name).write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ConfigError, match="no network"):
        find_mosquitto(install_folder=tmp_path / "environment" / "mosquitto", sbin_folders=())
    assert list((tmp_path / "environment").iterdir()) == []


@pytest.mark.slow
def test_debian_s_package_runs_unpacked_without_root(tmp_path: Path) -> None:
    unpacked = find_mosquitto(install_folder=tmp_path / "mosquitto", search_path="", sbin_folders=())
    assert unpacked.executable.is_relative_to(tmp_path)
    with BrokerProcess(program=unpacked) as broker:
        assert broker.description.startswith("mosquitto 2")
    assert [path.name for path in tmp_path.iterdir()] == ["mosquitto"], "no archive and no package list is left"


@pytest.mark.slow
def test_the_embedded_broker_delivers_over_mqtt_3_1_1(tmp_path: Path) -> None:
    embedded = install_embedded_broker(tmp_path / "embedded")
    with BrokerProcess(program=embedded) as broker:
        assert (broker.description, broker.protocol) == ("amqtt 0.12.1", "3.1.1")
        client = mqtt.Client(CallbackAPIVersion.VERSION2)
        client.connect(HOST, broker.port)
        client.loop_start()
        client.publish("sv1/fleet/all/x", b"x" * 262_144, qos=1).wait_for_publish(10)
        client.disconnect()
        client.loop_stop()
        broker.restart()


def fails(text: str) -> Callable[[], EmbeddedBroker]:
    def find() -> EmbeddedBroker:
        raise ConfigError(text)

    return find


def test_the_embedded_broker_is_the_last_resort_and_comes_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedded = EmbeddedBroker(tmp_path)
    assert find_broker(fails("no mosquitto; sudo apt-get install mosquitto"), lambda: embedded) is embedded
    assert "warning: no mosquitto; sudo apt-get install mosquitto" in capsys.readouterr().err


def test_where_no_broker_can_be_had_both_reasons_are_told() -> None:
    with pytest.raises(ConfigError, match=r"sudo apt-get install mosquitto.*no network"):
        find_broker(fails("no mosquitto; sudo apt-get install mosquitto"), fails("pip: no network"))
