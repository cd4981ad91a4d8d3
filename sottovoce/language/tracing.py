"""Finds the Tracer, lazily: tracing needs TensorFlow, which devices and coordinators do without."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from sottovoce.errors import ConfigError
from sottovoce.language.definition import defining
from sottovoce.language.ports import Traced, Tracer
from sottovoce.types import Type

_symbolic: ContextVar[bool] = ContextVar("symbolic", default=False)


@functools.cache
def tracer() -> Tracer:
    """Return the one tracer of this process.

    Raises:
        ConfigError: TensorFlow is not installed; the text says which command installs it.
    """
    try:
        module = importlib.import_module("models.tracer")
    except ImportError as error:
        raise ConfigError(
            f"@sv.tf_computation needs TensorFlow on the author's machine: pip install 'sottovoce[models]' ({error})"
        ) from error
    found: Tracer = module.TensorFlowTracer()
    return found


def trace(function: Callable[..., object], parameter: Type | None, *, name: str) -> Traced:
    """Return `function` traced; see `Tracer.trace`."""
    with defining(None), tracing_symbolically():
        return tracer().trace(function, parameter, name=name)


@contextlib.contextmanager
def tracing_symbolically() -> Iterator[None]:
    """Say that calls of computations come with the tensors of a graph, not with numbers."""
    token = _symbolic.set(True)
    try:
        yield
    finally:
        _symbolic.reset(token)


def is_symbolic() -> bool:
    """Say whether a graph is being traced."""
    return _symbolic.get()
