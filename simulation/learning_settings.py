"""The settings that `scripts/bench_learning` compares: those that were tried, and those that were chosen from them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from simulation.learning_runs import Method
from sottovoce.language.expressions import Terms
from sottovoce.language.learning import ClientOptimizer, build_fed_avg
from sottovoce.language.scaffold import build_scaffold
from sottovoce.language.server_optimizer import ServerOptimizer, adagrad, adam, momentum, sgd, yogi
from sottovoce.plan import LocalWork

_HAR_WORK = LocalWork(epochs=5, batch_size=32)
_HAR_TERMS = Terms(clip_norm=5.0, half_range=1.0, weight_cap=500)
_DIGITS_WORK = LocalWork(epochs=5, batch_size=16)
_DIGITS_RATES = (0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class HarSetting:
    """A server optimizer and the devices' rate, with the work and the terms of the demo's task `har.toml`.

    Attributes:
        server: The server optimizer.
        rate: The devices' learning rate in the first round.
        decay: Every round's rate is the one before times this.
    """

    server: ServerOptimizer
    rate: float
    decay: float

    @property
    def method(self) -> Method:
        """It as a line of a table."""
        client = ClientOptimizer(self.rate, self.decay, _HAR_WORK)
        return Method(
            f"{self.server}; devices {self.rate:g} * {self.decay:g}^round",
            lambda bundle: build_fed_avg(bundle, client, self.server, terms=_HAR_TERMS),
        )


def digits_methods(devices: int) -> Iterator[tuple[str, Method]]:
    """Yield (bundle's file name, method): federated averaging and SCAFFOLD, each at every rate."""
    clients = [ClientOptimizer(rate, work=_DIGITS_WORK) for rate in _DIGITS_RATES]
    for client in clients:
        build = functools.partial(build_fed_avg, client_optimizer=client)
        yield "digits.svp", Method(f"fed_avg; devices {client.learning_rate:g}", build)
    for client in clients:
        build = functools.partial(build_scaffold, client_optimizer=client, population=devices)
        yield "digits_scaffold.svp", Method(f"scaffold; devices {client.learning_rate:g}", build)


HAR_TRIED = (
    HarSetting(sgd(), 0.08, 1.0),
    HarSetting(sgd(), 0.08, 0.9),
    HarSetting(sgd(), 0.12, 0.9),
    HarSetting(sgd(), 0.16, 0.9),
    HarSetting(momentum(0.1), 0.08, 0.9),
    HarSetting(momentum(0.3), 0.08, 0.9),
    HarSetting(momentum(0.7, momentum=0.5), 0.12, 0.9),
    HarSetting(adagrad(0.01, tau=0.01), 0.08, 0.9),
    HarSetting(adagrad(0.03, tau=0.01), 0.12, 0.9),
    HarSetting(adam(0.003), 0.08, 0.9),
    HarSetting(adam(0.03, beta_1=0.5, tau=0.02), 0.12, 0.9),
    HarSetting(yogi(0.01, tau=0.01), 0.08, 0.9),
    HarSetting(yogi(0.03, beta_1=0.5, tau=0.02), 0.12, 0.9),
)
"""Judged by half of the training people (`scripts/bench_learning tune --seeds 1`)."""

HAR_CHOSEN = (
    HarSetting(sgd(), 0.16, 0.9),
    HarSetting(momentum(0.7, momentum=0.5), 0.12, 0.9),
    HarSetting(adagrad(0.03, tau=0.01), 0.12, 0.9),
    HarSetting(adam(0.03, beta_1=0.5, tau=0.02), 0.12, 0.9),
    HarSetting(yogi(0.03, beta_1=0.5, tau=0.02), 0.12, 0.9),
)
"""The best of each server optimizer among those that were tried."""
