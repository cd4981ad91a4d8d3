"""Where in the author's program something was written: the line that errors begin with."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable

from sottovoce.language.expressions import Source

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def here() -> Source:
    """Return the author's line: that of the innermost frame outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return Source(os.path.basename(path), line, linecache.getline(path, line).strip())


def line_of(function: Callable[..., object]) -> Source:
    """Return where `function` is written; where that is not known, the author's line."""
    code = getattr(function, "__code__", None)
    if code is None:
        return here()
    line = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    return Source(os.path.basename(code.co_filename), code.co_firstlineno, line)
