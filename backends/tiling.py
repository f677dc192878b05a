"""Strips of a scan, for backends that run each like another head: which axis is cut, and the program of a strip."""

from __future__ import annotations

from tttc.ir.adjoint import scan_adjoint
from tttc.ir.free import FreeAxis, free_axis
from tttc.ir.program import AdjointProgram, Scan, ScanProgram


def cut_axis(scan: Scan, program: ScanProgram) -> FreeAxis | None:
    """The axis that may be cut; None too where there is no derivative to take of a strip."""
    found = free_axis(scan) if scan.differentiated else None
    return found if found is not None and found.size in program.dims else None


def cut_program(scan: Scan, program: ScanProgram, axis: FreeAxis) -> AdjointProgram:
    """The program of a strip, of whatever width: its scan and the adjoint of that. The dim of a strip is that of the
    whole axis until a backend says otherwise.

    The backward is cut as its forward was, and what it has for a variable without the axis is a part of a sum over all
    strips.
    """
    strip = axis.cut(scan)
    adjoint = scan_adjoint(strip, program, dict(program.names))
    dims = {**program.dims, axis.strip: program.dims[axis.size]}
    return AdjointProgram.of(program, program.stage, dims=dims, scans=(strip,), adjoints=(adjoint,))
