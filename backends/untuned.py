"""What a backend says that has nothing to say: no notes on how a program runs, and nothing to tune but the schedule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from tttc.backends.interface import ChunkHint, Settings
from tttc.ir.program import ScanProgram


def notes(program: ScanProgram) -> list[str]:
    """Nothing: every scan runs in the same way."""
    return []


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    """No settings."""
    return {}


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    """The one that costs the least."""
    return None


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    """All settings are the same."""
    return ()


def versions(*distributions: str) -> dict[str, str]:
    """Those of what is installed; "absent" of what is not."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
