"""What takes seconds is said where somebody waits: a line on the terminal while kernels are compiled, then erased.

Nothing is said where stderr is no terminal, with `TTTC_QUIET=1`, or where something else is drawn there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_compiling: list[str] = []  # whose kernels, by whichever threads
_covered = 0  # how many things are drawn where the line would be


@contextmanager
def compiling(title: str, place: str) -> Iterator[None]:
    """Inside, kernels of the declaration `title` are compiled for `place`."""
    if not _seen():
        yield
        return
    with _lock:
        _compiling.append(title)
        if len(_compiling) == 1:
            print(f"tttc: compiling {title} for {place}, once ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        with _lock:
            _compiling.remove(title)
            if not _compiling:
                print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def covered() -> Iterator[None]:
    """Inside, something else is drawn on the terminal, such as a bar."""
    global _covered
    _covered += 1
    try:
        yield
    finally:
        _covered -= 1


def _seen() -> bool:
    loud = os.environ.get("TTTC_QUIET", "0") in ("", "0")
    return loud and not _covered and sys.stderr is not None and sys.stderr.isatty()
