"""What a session costs, printed for people; the only assertion is that the sum is right."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest

from sottovoce.secagg.server_stages import Unmasked

CLIENTS, ENTRIES = 100, 100_000


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dropped"), [("curious", 10), ("curious", 30), ("active", 10)])
def test_cost_of_a_hundred_devices(fleet: Any, mode: str, dropped: int, capsys: pytest.CaptureFixture[str]) -> None:
    wide = replace(fleet, vector_bytes=4 * ENTRIES + 16, wide_bytes=16)
    rehearsal = wide.rehearse(CLIENTS, parameters=wide.parameters(mode=mode))
    spent: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        result = call(*arguments)
        spent[name].append(time.process_time() - started)
        return result

    server, alive = rehearsal.server, rehearsal.devices[dropped:]
    while not isinstance(server.stage, Unmasked):
        stage = rehearsal.stage_name
        requests = {reply.device: reply.message for reply in server.outstanding()}
        for device in [d for d in requests if stage in ("advertise_keys", "share_keys") or d in alive]:
            client, session = rehearsal.clients[device], None
            if stage == "advertise_keys":
                answer, session = timed(f"client {stage}", client.advertise), bytes(32)
            else:
                answer = timed(f"client {stage}", client.receive, requests[device])
            timed("server messages", server.receive, rehearsal.opened(device, answer, session=session))
            if stage == "masked_input":
                timed("server adding", server.add_vector, device, client.masked_vector)
        timed("server closing", server.close_stage)

    device_ms = 1000 * sum(median(times) for name, times in spent.items() if name.startswith("client"))
    server_s = sum(sum(times) for name, times in spent.items() if name.startswith("server"))
    with capsys.disabled():
        print(f"\n{mode}, {CLIENTS} devices, {ENTRIES} entries, {dropped} lost: {device_ms:.0f} ms a device, verifying")
        print(f"its neighbours' signatures included; server {server_s:.2f} s, verifying envelopes not included")
    first, last = (np.frombuffer(rehearsal.plain_sum(alive), "<u4")[index] for index in (0, -5))
    total = np.frombuffer(server.result, "<u4")
    assert (total[0], total[-5]) == (first, last)
