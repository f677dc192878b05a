"""When Python looks for garbage: not in the midst of a compilation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection meanwhile, in the whole process; as it was, afterwards.

    For work that makes a great many objects and no cycles to speak of. Python would count the objects and look through
    everything that torch has imported, which takes longer than the work.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
