"""The kernels of a program as TensorIR, which is what LLVM compiles, and what they cannot run."""

from __future__ import annotations

from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.rows import missing_rows
from tttc.backends.tvm_common.loops import listing
from tttc.backends.tvm_common.refusals import unordered
from tttc.backends.tvm_common.scan import all_kernels
from tttc.backends.tvm_cpu.machine import TileConfig
from tttc.backends.tvm_cpu.ops import ROWS
from tttc.backends.tvm_cpu.scan import CPUScan
from tttc.ir.program import AdjointProgram, ScanProgram


def refusals(program: ScanProgram) -> list[str]:
    """Why these kernels cannot run the program."""
    return [*unordered(program), *missing_rows(program, ROWS, "backends/tvm_cpu/ops.py")]


def emit_source(program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST) -> Source:
    """The statements of every kernel as comments, and the functions of TensorIR for this processor that they become:
    for whole heads, and for tokens in the dtype of the place.
    """

    def text() -> str:
        config = TileConfig(**(settings or {}))
        scans = {s.name: CPUScan(s, program, config) for s in program.scans}
        statements = [f"# {line.removeprefix('# ')}".rstrip() for line in listing(program).splitlines()]
        return "\n".join([*statements, "", all_kernels(scans, place.dtype)])

    return Source(text, "python", lambda: listing(program))
