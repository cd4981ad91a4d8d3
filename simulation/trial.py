"""A fleet of processes on trial: somebody follows the coordinator's events and does it harm at chosen moments.

Everything waits for an event or a condition, with a deadline; nothing waits blindly.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import tomli_w

from coordinator.__main__ import main as coordinator
from coordinator.journal import Journal
from simulation.broker_process import BrokerProcess
from simulation.guarded import GuardedFolder
from simulation.overheard import Eavesdropper
from simulation.process_fleet import FLEET, EventReader, FleetFailed, ProcessFleet, wait_until
from simulation.slow_link import SlowLink
from sottovoce.transport.base import Connected, Delivery
from sottovoce.transport.mqtt import MqttTransport
from sottovoce.transport.mqtt_settings import MqttSettings
from sottovoce.wire.topics import Topics

CoordinatorEvent: TypeAlias = Mapping[str, Any]
_POLL_S = 0.005


class Trial:
    """One fleet with its broker, as a context manager.

    Attributes:
        broker: Its broker; pause it, kill it, restart it.
        fleet: Its processes.
        events: Everything the coordinator has told so far.
    """

    def __init__(self, *, within_s: float = 60.0) -> None:
        """Prepare a fleet; nothing it is waited for may take longer than `within_s` seconds."""
        self._within_s = within_s
        self.events: list[CoordinatorEvent] = []
        self._seen = 0

    def __enter__(self) -> Self:
        """Start the broker."""
        with ExitStack() as on_failure:
            self.broker = on_failure.enter_context(BrokerProcess())
            guarded = on_failure.enter_context(GuardedFolder("sottovoce-trial-"))
            self.fleet = ProcessFleet(guarded, self.broker)
            on_failure.callback(self.fleet.stop)
            self._eavesdropper = on_failure.enter_context(Eavesdropper(self.broker, offset=0))
            self._reader = EventReader(self.fleet.events)
            self._undo = on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End everything."""
        self._undo.close()

    # --- preparing ----------------------------------------------------------------------------------------------------

    def allow(self, device: str, **policy: object) -> None:
        """Write settings into the agent.toml of `device`, in place of the defaults."""
        self.fleet.allow(device, **policy)

    def slow_down(self, devices: Iterable[str], *, delay_s: float) -> None:
        """Put `devices` behind a link on which everything arrives `delay_s` seconds late."""
        link = self._undo.enter_context(SlowLink(self.broker.port, delay_s=delay_s))
        for device in devices:
            settings = self.fleet.home(device).config
            settings.write_text(settings.read_text().replace(f"port = {self.broker.port}", f"port = {link.port}"))

    def submit(self, task: Mapping[str, object]) -> None:
        """Hand a task to the coordinator."""
        path = self.fleet.folder / f"{task['name']}.toml"
        path.write_text(tomli_w.dumps(dict(task)))
        # In this process: the command in one of its own takes a second to start.
        code = coordinator(["submit", str(path), "--config", str(self.fleet.config)])
        assert code == 0, f"the coordinator takes task {task['name']}"

    def start(self, devices: Sequence[str]) -> None:
        """Start agents and return when the broker knows that they are online."""
        for device in devices:
            self.fleet.start_agent(device)
        self.wait(lambda: self._eavesdropper.absent(devices) == 0, f"{', '.join(devices)} online")

    # --- following ----------------------------------------------------------------------------------------------------

    def until(self, *names: str, **fields: object) -> CoordinatorEvent:
        """Return the next event with one of these names and these fields; what comes before it is passed over."""
        found: list[CoordinatorEvent] = []

        def arrived() -> bool:
            self.events.extend(self._reader.new())
            while self._seen < len(self.events) and not found:
                event = self.events[self._seen]
                self._seen += 1
                if event["event"] in names and all(event.get(key) == value for key, value in fields.items()):
                    found.append(event)
            return bool(found)

        self.wait(arrived, f"{' or '.join(names)} {fields or ''}")
        return found[0]

    def skip(self) -> None:
        """Pass over everything that has happened so far: `until` then returns only what happens from now on."""
        self.events.extend(self._reader.new())
        self._seen = len(self.events)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition()` holds.

        Raises:
            FleetFailed: It does not in time, or a process has ended by itself; the text says what was waited for.
        """

        def holds() -> bool:
            if self.fleet.watch() is not None:
                raise FleetFailed(f"the coordinator has ended; waited for {what}")
            return condition()

        try:
            wait_until(holds, deadline_s=self._within_s, poll_s=_POLL_S)
        except TimeoutError as error:
            told = "\n".join(str(event) for event in self.events[-8:])
            log = self.fleet.log("coordinator") if (self.fleet.folder / "coordinator.log").exists() else ""
            raise FleetFailed(f"waited in vain for {what}\nlast events:\n{told}\n{log}") from error

    def wait_for_log(self, device: str, pattern: str) -> re.Match[str]:
        """Return the first place in the log of `device` that matches `pattern`, as soon as there is one."""
        path = self.fleet.folder / f"{device}.log"
        found: list[re.Match[str]] = []

        def said() -> bool:
            match = re.search(pattern, path.read_text(errors="replace"))
            if match:
                found.append(match)
            return bool(match)

        self.wait(said, f"{pattern!r} in the log of {device}")
        return found[0]

    def journal(self) -> Journal:
        """Open the coordinator's journal for reading; close it after use."""
        return Journal.open_read_only(self.fleet.coordinator_home / "journal.sqlite")

    def retained_blobs(self) -> frozenset[bytes]:
        """Return the digests of all blobs of which the broker retains a chunk."""
        topics = Topics(FLEET)
        settings = MqttSettings(host=self.broker.host, port=self.broker.port, client_id="onlooker", clean_start=True)
        found: set[bytes] = set()
        ended = False

        def listen() -> bool:
            nonlocal ended
            while (event := onlooker.receive(0)) is not None:
                if isinstance(event, Delivery) and event.topic == topics.down("onlooker"):
                    ended = True
                elif isinstance(event, Delivery) and event.payload:
                    found.add(topics.split_blob_chunk(event.topic)[0])
                elif isinstance(event, Connected):
                    # What was retained is on its way already, so this comes last.
                    onlooker.publish(topics.down("onlooker"), b"that was all")
            return ended

        onlooker = MqttTransport(settings, rng=random.Random())  # only jitters reconnects
        try:
            for topic in (topics.down("onlooker"), topics.all_blobs_filter()):
                onlooker.subscribe(topic)
            self.wait(listen, "what the broker retains")
        finally:
            onlooker.close()
        return frozenset(found)

    # --- doing harm ---------------------------------------------------------------------------------------------------

    def without_broker(self, *, outage_s: float, frozen: bool) -> None:
        """Take the broker away for `outage_s` seconds: freeze it (SIGSTOP), or kill it (SIGKILL) and start it again."""
        if frozen:
            self.broker.pause()
        else:
            self.broker.kill()
        try:
            time.sleep(outage_s)  # The outage itself.
        finally:
            if frozen:
                self.broker.resume()
            else:
                self.broker.restart()


def read_files(places: Iterable[Path]) -> dict[Path, bytes]:
    """Return the content of every file among, and in the folders of, `places`."""
    paths = (path for place in places for path in (place, *sorted(place.rglob("*"))))
    return {path: path.read_bytes() for path in paths if path.is_file()}
