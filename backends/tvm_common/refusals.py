"""Programs whose chunks kernels of TensorIR cannot make, and the chunk at which they can."""

from __future__ import annotations

from tttc.backends.interface import ChunkHint
from tttc.ir.program import ScanProgram
from tttc.ir.substitution import PAST


def unordered(program: ScanProgram) -> list[str]:
    """Why these kernels cannot make what a chunk finds in order."""
    if _finds_rows(program):
        return ["the rows of a chunk are found one after the other, each from all before it"]
    return []


def only_chunk(program: ScanProgram) -> ChunkHint | None:
    """Of a scheduled program that these kernels cannot run, the chunk at which they can: tokens one at a time."""
    if not _finds_rows(program):
        return None
    return ChunkHint(1, "native kernels have no loop that finds the rows of a longer chunk one after the other")


def _finds_rows(program: ScanProgram) -> bool:
    """Whether a scan is given the rows of the tokens before, as many as there are."""
    return any(a == PAST for s in program.scans for p in s.params for a in p.axes)
