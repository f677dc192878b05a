"""Blocks as source: a printed program is Python already, one function for each scan and one for its adjoint."""

from __future__ import annotations

from tests.backends.toy.ops import ROWS
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.rows import missing_rows
from tttc.ir.adjoint import adjoint_function
from tttc.ir.program import AdjointProgram, Program, ScanProgram
from tttc.ir.program_text import program_text

HEADER = "from tttc.ir.numerics import *\n"  # what load.py has rows for is in scope instead


def refusals(program: ScanProgram) -> list[str]:
    return missing_rows(program, ROWS, "tests/backends/toy/ops.py")


def emit_source(program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST) -> Source:
    functions = [s.function() for s in program.scans] + [adjoint_function(a) for a in program.adjoints]
    whole = Program(program.name, "toy", tuple(functions), program.dims, program.dtype, program.names)
    return Source(lambda: program_text(whole).replace(HEADER, ""), "python")
