"""A whole fleet in this process: real agents, the real coordinator, a broker in memory, and time that never waits.

    with simulation.fleet(devices=20):
        get_fraction_over_threshold(sv.latest("temperature"), 21.0)

Every device has a home with key, certificate, example store, ledger and policy; every round is the protocol's, masked
and signed. There are no threads: who has a message is given a turn, and when nobody has one, the clock jumps to what is
due next. Devices that a round does not need are asleep. With the same seed the same devices draw the same numbers; so
nothing here is secret.

Faults are made on demand, at a stage of a round: `kill` (the process is gone, its disk stays), `drop` (the link).
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from simulation.device_examples import DeviceExamples, columns_of, temperatures
from simulation.fleet_terms import STAGE_OF_EVENT, Fault, FleetTerms, Mode, Stage, check_fleet
from simulation.guarded import GuardedFolder
from simulation.memory_coordinator import MemoryCoordinator
from simulation.memory_device import Enrolment, MemoryDevice, SimulatedClock
from sottovoce.blobs import digest_of
from sottovoce.errors import ConfigError, RoundAbandoned
from sottovoce.language.context import use
from sottovoce.language.fleet_executor import FleetExecutor
from sottovoce.language.ports import RoundRequest, RoundSums
from sottovoce.secagg.graph import SMALLEST_COHORT
from sottovoce.tensors import decode_tensors
from sottovoce.transport.memory import COORDINATOR, MemoryBroker

ARGUMENTS = "arguments"
"""The collection in which a device finds its value where a computation is called with a list of them."""
_ATTEMPT_MS = 3600 * 1000
"""On the clock of the simulation; an attempt whose every deadline passes takes a sixth of it."""
_SHORTEST_STEP_MS, _LONGEST_STEP_MS = 10, 5000
_LARGE_STATE_BYTES = 256 * 1024
"""Asleep, an agent keeps its opened program, ten times the state. From this size on it is stopped, for 10 ms."""
_MEMORY_DISK = Path("/dev/shm")  # noqa: S108  homes on it cost no disk access; each is in a folder of mode 0700


@contextlib.contextmanager
def fleet(
    devices: int = 20,
    *,
    collections: Mapping[str, DeviceExamples] | None = None,
    seed: int = 0,
    mode: Mode = "curious",
    cohort: int | None = None,
    minimum: int | None = None,
    attempts: int = 1,
    loss: float = 0.0,
    duplicate: float = 0.0,
    reorder: float = 0.0,
) -> Iterator[MemoryFleet]:
    """Make a fleet, and run every computation that is called inside the `with` on it.

    Args:
        devices: How many, at least 3.
        collections: Name -> what each device has, one entry a device: a number, an array or list of examples, or a
            mapping from columns to such. By default one collection `temperature` of ten seeded readings a device.
        seed: Of everything that is drawn.
        mode: Of secure aggregation; `active` costs one stage more.
        cohort: Devices of a round, drawn anew for each; None takes all of them.
        minimum: Fewest devices in a sum; None is half of those that take part, at least 3.
        attempts: How often a round that was abandoned is tried before `RoundAbandoned` is raised.
        loss: Probability that a delivery is lost at first and comes later.
        duplicate: Probability that a delivery comes twice.
        reorder: Probability that a later delivery comes first.

    Raises:
        ConfigError: A number is impossible, or a collection does not have one entry a device.
    """
    terms = FleetTerms(mode=mode, cohort=cohort, minimum=minimum, attempts=attempts)
    broker = MemoryBroker(random.Random(f"{seed}/broker"), loss=loss, duplicate=duplicate, reorder=reorder)
    made = MemoryFleet(devices, terms=terms, seed=seed, broker=broker)
    with contextlib.closing(made):
        for name, examples in (temperatures(devices, seed) if collections is None else collections).items():
            made.give(name, examples)
        with use(FleetExecutor(made)):
            yield made


class MemoryFleet:
    """A fleet (`sottovoce.language.ports.Rounds`); close it when it is done with.

    Attributes:
        devices: The device ids, in order.
        clock: The fleet's time; it starts at the machine's.
    """

    def __init__(self, devices: int, *, terms: FleetTerms, seed: int, broker: MemoryBroker) -> None:
        """Start a coordinator; devices are made when they are first needed.

        Args:
            devices: How many.
            terms: What rounds look like.
            seed: Of everything that is drawn.
            broker: The broker, with its faults.

        Raises:
            ConfigError: There are too few devices, or a cohort is larger than the fleet.
        """
        check_fleet(devices, terms)
        self.devices = tuple(f"device-{number:0{len(str(devices - 1))}}" for number in range(devices))
        self.clock = SimulatedClock(time.time_ns() // 1_000_000)
        self._terms = terms
        self._seed = seed
        self._draw = random.Random(f"{seed}/cohorts")
        self._broker = broker
        self._made: dict[str, MemoryDevice] = {}
        self._given: list[tuple[str, DeviceExamples]] = []
        self._faults: list[Fault] = []
        self._dead: set[str] = set()
        self._seen_events = 0
        self._idle_steps = 0
        on = _MEMORY_DISK if _MEMORY_DISK.is_dir() else None
        self._guarded = contextlib.ExitStack()
        self._folder = self._guarded.enter_context(GuardedFolder("sottovoce-fleet-", within=on)).path
        self._enrolment = Enrolment(self._folder / "ca", self.clock)
        self._coordinator = MemoryCoordinator(
            self._folder,
            identity=self._enrolment.identity(COORDINATOR, "coordinator"),
            anchor=self._enrolment.anchor,
            broker=broker,
            clock=self.clock,
            entropy=self._entropy(COORDINATOR),
        )

    def __enter__(self) -> MemoryFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove every file."""
        for device in self._made.values():
            device.close()
        self._coordinator.close()
        self._guarded.close()

    # --- devices ------------------------------------------------------------------------------------------------------

    def device(self, name: str) -> MemoryDevice:
        """Return a device, made and enrolled if it was not needed before.

        Raises:
            ConfigError: There is no such device.
        """
        if name not in self._made:
            if name not in self.devices:
                raise ConfigError(
                    f"there is no device {name!r}; this fleet has {self.devices[0]} to {self.devices[-1]}"
                )
            made = MemoryDevice(
                self._enrolment.home(self._folder / "devices" / name, name),
                name=name,
                broker=self._broker,
                clock=self.clock,
                entropy=self._entropy(name),
            )
            self._made[name] = made
            for collection, examples in self._given:
                self._import(made, collection, examples)
        return self._made[name]

    def give(self, collection: str, examples: DeviceExamples) -> None:
        """Append examples to a collection of every device.

        Args:
            collection: Its name.
            examples: One entry a device, as `fleet` takes them.

        Raises:
            ConfigError: There is not one entry a device, or the name is taken by the simulation itself.
            BadExamples: An entry is no numbers, or does not fit the examples that are there.
        """
        if collection == ARGUMENTS:
            raise ConfigError(f"the collection {ARGUMENTS!r} is the simulation's own; choose another name")
        if len(examples) != len(self.devices):
            raise ConfigError(
                f"{collection} has {len(examples)} entries for {len(self.devices)} devices; give one entry a device"
            )
        self._given.append((collection, examples))
        for device in self._made.values():
            self._import(device, collection, examples)

    def kill(self, device: str, *, stage: Stage, restart: bool = False) -> None:
        """Have the process of `device` killed in a coming round, instead of its answer at `stage`.

        It is started again for the next round, on what its disk remembers.

        Args:
            device: Its id, or `coordinator`, which is always started again at once.
            stage: When: as soon as the coordinator has begun it.
            restart: Start it again at once.
        """
        self._plan_fault(Fault(device, stage, "restart" if restart else "kill"))

    def drop(self, device: str, *, stage: Stage) -> None:
        """Have the link of `device` break in a coming round, instead of its answer at `stage`, until the next round."""
        self._plan_fault(Fault(device, stage, "drop"))

    def retire(self, device: str) -> None:
        """Never wake `device` again."""
        self.device(device).sleep()
        self._dead.add(device)

    # --- rounds -------------------------------------------------------------------------------------------------------

    def run(self, request: RoundRequest) -> RoundSums:
        """Run the round that `request` asks for and return its sums; every survivor has heard the outcome then.

        Raises:
            ConfigError: There are more values than devices, fewer than three, or the request is impossible.
            RoundAbandoned: The round ended without a result.
        """
        chosen = self._lend(request) if request.members else self._chosen()
        if request.members:
            request = msgspec.structs.replace(request, members=(), collection=ARGUMENTS)
        self._gather(chosen, stop_others=len(request.broadcast) >= _LARGE_STATE_BYTES)
        deadline_ms = self.clock() + _ATTEMPT_MS * self._terms.attempts
        number = self._coordinator.ask(request, self._terms.of_round(len(chosen)), deadline_ms=deadline_ms)
        try:
            return self._sums_of(number)
        finally:
            # What has been answered stays so; what has not must not be in the way of the next request.
            self._coordinator.give_up(number)

    @property
    def events(self) -> Sequence[tuple[str, dict[str, Any]]]:
        """What the coordinator told so far, as (name, fields); the names are those of its events file."""
        return self._coordinator.log.events

    def _sums_of(self, number: int) -> RoundSums:
        """Let the fleet go on until the request is answered."""
        since = len(self.events)
        while (answer := self._coordinator.answer(number)).status in ("queued", "running"):
            self._check_abandoned(since)
            self._wait()
            self._settle()
        if answer.sums is None:
            reason, _, detail = answer.reason.partition(": ")
            raise RoundAbandoned(reason, detail)
        return answer.sums

    def _chosen(self) -> list[str]:
        """Return the devices that are awake in the next round."""
        alive, count = self._alive(), self._terms.cohort
        return alive if count is None or count >= len(alive) else sorted(self._draw.sample(alive, count))

    def _alive(self) -> list[str]:
        return [name for name in self.devices if name not in self._dead]

    def _lend(self, request: RoundRequest) -> list[str]:
        """Give each of the first devices its value, and return them."""
        alive, count = self._alive(), len(request.members)
        if count > len(alive):
            raise ConfigError(
                f"{request.name}: {count} values were given to a fleet of {len(alive)} devices, one value a "
                f"device; make it larger: simulation.fleet(devices={count})"
            )
        if count < SMALLEST_COHORT:
            raise ConfigError(
                f"{request.name}: {count} values are too few for a sum that hides each of them; give at least "
                f"{SMALLEST_COHORT}, or run it without a fleet"
            )
        chosen = alive[:count]
        for name, member in zip(chosen, request.members, strict=True):
            self.device(name).lend(
                ARGUMENTS, decode_tensors(member), digest=digest_of(member), now_s=self.clock() / 1000
            )
        return chosen

    def _gather(self, chosen: Sequence[str], *, stop_others: bool) -> None:
        """Wake those that are chosen, put all others to sleep, and let everybody find out where things stand."""
        for name, device in self._made.items():
            if name not in chosen and stop_others:
                device.stop()
            elif name not in chosen:
                device.sleep()
        if stop_others:
            gc.collect()  # An agent and its hands refer to each other, so nothing else frees what they hold.
        for name in chosen:
            self.device(name).wake()
        self._settle()

    def _check_abandoned(self, since: int) -> None:
        """Raise if a round of the request was abandoned for the last time."""
        told = self.events[since:]
        abandoned = [fields for event, fields in told if event == "abandoned"]
        if len(abandoned) < self._terms.attempts:
            return
        reason, detail = str(abandoned[-1]["reason"]), str(abandoned[-1]["detail"])
        codes = Counter(str(fields["code"]) for event, fields in told if event == "withdrew")
        if codes:
            withdrew = ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))
            detail = f"{detail}; devices withdrew: {withdrew}, and the log of edge-agent says why"
        raise RoundAbandoned(reason, detail)

    # --- turns --------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Give turns until nobody has anything to do but wait."""
        while waiting := self._broker.waiting():
            for name in waiting:
                if name == COORDINATOR:
                    self._turn_coordinator()
                    continue
                device = self._made[name]
                while device.awake and device.turn():
                    pass

    def _turn_coordinator(self) -> None:
        while self._broker.queued(COORDINATOR):
            self._coordinator.turn()
            self._strike()

    def _wait(self) -> None:
        """Let the time pass until something is due, and have it done.

        The coordinator looks at its queue many times a second. The longer nothing comes of it, the larger the steps:
        what is due comes a little late, as on a busy machine.
        """
        now_ms, awake = self.clock.now_ms, [device for device in self._made.values() if device.awake]
        due = [at for device in awake if (at := device.due_ms()) is not None]
        step_ms = min(_SHORTEST_STEP_MS * 2**self._idle_steps, _LONGEST_STEP_MS)
        self.clock.now_ms = max(now_ms + 1, min([max(self._coordinator.due_ms(), now_ms + step_ms), *due]))
        self._coordinator.turn()
        self._strike()
        for device in awake:
            at = device.due_ms()
            if device.awake and at is not None and at <= self.clock.now_ms:
                device.turn()
        self._idle_steps = 0 if self._broker.waiting() else self._idle_steps + 1

    def _strike(self) -> None:
        """Make the faults that were wished for the stage that has just begun."""
        events = self.events
        while self._seen_events < len(events):
            event, fields = events[self._seen_events]
            self._seen_events += 1
            stage = fields["stage"] if event == "stage" else STAGE_OF_EVENT.get(event)
            for fault in [fault for fault in self._faults if fault.stage == stage]:
                self._faults.remove(fault)
                self._make(fault)

    def _make(self, fault: Fault) -> None:
        if fault.device == COORDINATOR:
            self._coordinator.crash()
            return
        device = self._made[fault.device]
        match fault.how:
            case "drop":
                device.sleep()
            case "kill":
                device.crash()
            case "restart":
                device.crash()
                device.wake()

    def _plan_fault(self, fault: Fault) -> None:
        if fault.device != COORDINATOR:
            self.device(fault.device)
        self._faults.append(fault)

    # --- making -------------------------------------------------------------------------------------------------------

    def _import(self, device: MemoryDevice, collection: str, examples: DeviceExamples) -> None:
        entry = examples[self.devices.index(device.name)]
        device.give(collection, columns_of(entry), now_s=self.clock() / 1000)

    def _entropy(self, name: str) -> Any:
        return random.Random(f"{self._seed}/{name}").randbytes
