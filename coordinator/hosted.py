"""From a task file to the federated program that the coordinator hosts."""

from __future__ import annotations

from coordinator.requests import plan_of
from coordinator.task import Standardise, Task
from sottovoce.errors import ConfigError, LocalProtocolError
from sottovoce.language import hosted_tasks
from sottovoce.language.expressions import Terms
from sottovoce.language.hosted import HostedProgram, SumTerms
from sottovoce.plan import LocalWork, Plan


def hosted_program(task: Task, bundle: bytes, *, moments: bytes | None = None) -> HostedProgram:
    """Return the federated program of `task`, after checking that task and bundles fit together.

    Args:
        task: The task.
        bundle: Content of the bundle file that the task names.
        moments: Content of the bundle that `standardise` names, if there is such a table.

    Raises:
        ConfigError: They do not fit together; the text names the key and says what to write.
        BadBundle: One of the bundles is not one.
    """
    if (task.standardise is None) != (moments is None):
        raise LocalProtocolError("a task has a moments bundle if, and only if, it has a table standardise")
    return _training(task, bundle, moments) if task.update is not None else _sums(task, bundle)


def check_plans(program: HostedProgram, task: Task, *, fleet: str, chunk_bytes: int) -> Plan:
    """Return the plan of the last round, after checking that every round's plan is possible.

    Raises:
        ConfigError: One is not, or its sums do not fit into their lanes.
    """
    plans = [
        plan_of(program.request_at(at, program.first_state), task.terms, fleet=fleet, chunk_bytes=chunk_bytes)
        for at in sorted({0, program.length - 1})
    ]
    return plans[-1]


def _training(task: Task, bundle: bytes, moments: bytes | None) -> HostedProgram:
    update = task.update
    if update is None:
        raise LocalProtocolError("training needs a table update")
    return hosted_tasks.hosted_training(
        bundle,
        name=task.name,
        purpose=task.purpose,
        collection=task.collection,
        rounds=task.rounds,
        work=_work(task),
        terms=Terms(update.clip_norm, update.half_range, update.weight_cap, update.bits, update.lane),
        largest_cohort=task.cohort.wanted,
        learning_rate=task.optimizer.learning_rate,
        learning_rate_decay=task.optimizer.learning_rate_decay,
        server_optimizer=task.optimizer.server,
        server_options=task.optimizer.server_options,
        metrics=_terms(task, "metrics"),
        results=_terms(task, "results"),
        moments=moments,
        moments_results=_terms(task.standardise, "results", where="standardise.results") if task.standardise else {},
    )


def _sums(task: Task, bundle: bytes) -> HostedProgram:
    program = hosted_tasks.hosted_sums(
        bundle,
        name=task.name,
        purpose=task.purpose,
        collection=task.collection,
        work=_work(task),
        results=_terms(task, "results"),
        metrics=_terms(task, "metrics"),
        largest_cohort=task.cohort.wanted,
        learning_rate=task.optimizer.learning_rate,
    )
    if task.rounds != 1 or task.standardise is not None:
        raise ConfigError(
            f"bundle {program.bundle.name!r} only sums and updates no model; set rounds = 1 and leave out [standardise]"
        )
    return program


def _work(task: Task) -> LocalWork:
    return LocalWork(epochs=task.work.epochs, batch_size=task.work.batch_size, max_examples=task.work.max_examples)


def _terms(table: Task | Standardise, key: str, *, where: str = "") -> dict[str, SumTerms]:
    return {
        name: SumTerms(terms.encoding(f"{where or key}.{name}"), terms.clip_norm)
        for name, terms in getattr(table, key).items()
    }
