"""What these kernels are, as text, and what they cannot run."""

from __future__ import annotations

from tttc.backends.interface import Preferred, Source
from tttc.backends.tvm_common.statements import listing
from tttc.ir.program import AdjointProgram, ScanProgram
from tttc.ir.substitution import PAST


def refusals(program: ScanProgram) -> list[str]:
    """Why these kernels cannot run the program."""
    if _finds_rows(program):
        return ["the rows of a chunk are found one after the other, each from all before it"]
    return []


def only_chunk(program: ScanProgram) -> Preferred | None:
    """Of a scheduled program that these kernels cannot run, the chunk at which they can: tokens one at a time."""
    if not _finds_rows(program):
        return None
    return Preferred(1, "native kernels have no loop that finds the rows of a longer chunk one after the other")


def _finds_rows(program: ScanProgram) -> bool:
    """Whether a scan is given the rows of the tokens before, as many as there are."""
    return any(a == PAST for s in program.scans for p in s.params for a in p.axes)


def notes(program: ScanProgram) -> list[str]:
    """Nothing: every scan runs in the same way."""
    return []


def emit(program: AdjointProgram) -> Source:
    """The statements of every kernel; `TVMScan.script()` has the TensorIR that they become."""
    return Source(lambda: listing(program), "text")


__all__ = ["emit", "notes", "only_chunk", "refusals"]
