"""Generated text as a module, whose lines tracebacks, profilers and Triton find.

It imports nothing of `tttc`: a process that compiles one kernel runs it as a file (triton/compile_worker.py).
"""

from __future__ import annotations

import linecache
from types import ModuleType


def module(text: str, name: str, file: str) -> ModuleType:
    """The text run as a module of this name; `file` is where its lines are said to be."""
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    made = ModuleType(name)
    made.__file__ = file
    exec(compile(text, file, "exec"), made.__dict__)
    return made
