"""Whole rounds of real agents over the memory transport, against a scripted coordinator with a real ServerSession."""

from __future__ import annotations

from typing import Any

import numpy as np

from sottovoce.wire.messages import CheckIn, Ready, Withdraw


def test_a_round_sums_what_every_device_computed(world: Any) -> None:
    devices = world.fleet(4)
    world.train(devices)
    assert {world.state_of(name) for name in devices} == {"Waiting"}
    assert all(isinstance(world.coordinator.last(name), Ready) for name in devices)

    aggregate = world.run_rendezvous(devices)

    assert aggregate.survivors == 4
    assert aggregate.weight == 80
    assert 0 < np.abs(np.concatenate([t.reshape(-1) for t in aggregate.mean("delta")])).max() < 1
