"""What these kernels are, as text, and what they cannot run."""

from __future__ import annotations

from importlib.util import find_spec

from tttc.backends.interface import Source
from tttc.backends.tvm.loops import listing
from tttc.ir.program import Program
from tttc.ir.substitution import PAST


def refusals(program: Program) -> list[str]:
    """Why these kernels cannot run the program."""
    found = []
    if find_spec("tvm") is None:
        found.append("apache-tvm is not installed: pip install 'tttc[tvm]'")
    if any(a == PAST for s in program.scans for p in s.params for a in p.axes):
        found.append("the rows of a chunk are found one after the other, each from all before it")
    return found


def notes(program: Program) -> list[str]:
    """Nothing: every scan runs in the same way."""
    return []


def emit(program: Program) -> Source:
    """The statements of every kernel; `TVMScan.script()` has the TensorIR that they become."""
    return Source(lambda: listing(program), "text")


__all__ = ["emit", "notes", "refusals"]
