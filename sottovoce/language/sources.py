"""Where in the author's program something was written: the line that errors begin with."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from types import FrameType

from sottovoce.language.expressions import Source

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = ("numpy", "tensorflow", "keras")


def here() -> Source:
    """Return the author's line: that of the innermost frame outside this package and what computes with arrays."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_foreign(frame):
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return Source(os.path.basename(path), line, linecache.getline(path, line).strip())


def _is_foreign(frame: FrameType) -> bool:
    """Say whether `frame` is not the author's: a library that was handed a value calls this package from within."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return frame.f_code.co_filename.startswith(_PACKAGE) or package in _LIBRARIES


def line_of(function: Callable[..., object]) -> Source:
    """Return where `function` is written; where that is not known, the author's line."""
    code = getattr(function, "__code__", None)
    if code is None:
        return here()
    line = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    return Source(os.path.basename(code.co_filename), code.co_firstlineno, line)
