"""Where computations run: the current executor, the reference one by default."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

from sottovoce.language.ports import Executor

_current: ContextVar[Executor | None] = ContextVar("executor", default=None)


def current_executor() -> Executor:
    """Return the executor that a called computation runs in."""
    return _current.get() or _default()


@contextlib.contextmanager
def use(executor: Executor) -> Iterator[Executor]:
    """Run every computation that is called inside the `with` in `executor`."""
    token = _current.set(executor)
    try:
        yield executor
    finally:
        _current.reset(token)


@functools.cache
def _default() -> Executor:
    from sottovoce.language.reference import ReferenceExecutor

    return ReferenceExecutor()
