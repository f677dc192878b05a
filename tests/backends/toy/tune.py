"""What may be tuned: nothing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from tttc.backends.interface import ChunkHint, Settings
from tttc.ir.program import ScanProgram


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    return {}


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    return None


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    return ()


def toolchain() -> dict[str, str]:
    return {"numpy": np.__version__}
