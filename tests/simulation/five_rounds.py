"""A federated program for a fleet: five rounds of federated averaging, each followed by a count that devices remember.

    python five_rounds.py COORDINATOR.TOML FOLDER MODEL.svp VISITS.svp

Needs no TensorFlow. Killed anywhere and started again, it goes on where it was.
"""

import sys
from typing import Any

import sottovoce as sv
from coordinator import connect
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import ClientOptimizer, build_fed_avg
from sottovoce.plan import LocalWork
from sottovoce.types import FederatedType

ROUNDS, GOAL, MINIMUM = 5, 6, 4


def main(config: str, folder: str, model: str, visits: str) -> None:
    process = build_fed_avg(
        model,
        ClientOptimizer(learning_rate=0.1, work=LocalWork(epochs=1, batch_size=16)),
        terms=Terms(clip_norm=5.0, half_range=1.0, weight_cap=500),
        metrics={"loss": (0.0, 2000.0), "correct": (0.0, 500.0)},
    )
    program_of_visits = sv.client_program(visits, order="stored")
    slot = sv.client_state_of(program_of_visits)

    def remembered(examples):  # type: ignore[no-untyped-def]
        """How much the devices of this round have counted in earlier ones."""
        nothing = sv.federated_broadcast(sv.federated_value((), sv.SERVER))
        found = sv.federated_map(program_of_visits, (nothing, slot.read(), examples))
        slot.write(found.client_state)
        return sv.federated_sum(found.before, bound=(0, 8**GOAL))

    examples_type = FederatedType(program_of_visits.parameter.elements[-1][1], sv.CLIENTS)
    count = sv.federated_computation(remembered, examples_type)
    with sv.federated_program("five", folder) as program, connect(config, goal=GOAL, minimum=MINIMUM, timeout_s=60):
        state = program.restore(process.initialize())
        for number in program.rounds(ROUNDS):
            trained = process.next(state, sv.collection("digits"))
            before = count(sv.collection("visits"))
            state = trained.state
            release = {"round": number, "examples": int(trained.metrics.examples), "before": _total(before)}
            program.commit(state, release=release)
        print(_total(count(sv.collection("visits"))), flush=True)


def _total(before: Any) -> int:
    """What the devices of a round have in their slots: device n counts in units of 8^n, one for every round."""
    return round(float(before.sum_before[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
