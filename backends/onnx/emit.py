"""Scans as ONNX text: a model for each, of tensors with a leading axis N = batch * heads.

    drawn (float[N, D, D] W, float[N, T, D] k, ...) => (float[N, T, D] z, float[N, D, D] W_new) {
       z, W_new = tttc.drawn (W, k, ...)
    }

What it calls is a loop over chunks (loop.py) or, where the rule is one that the runtime has, its operator
(recurrence.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.onnx.loop import block, call, loop_functions, made
from tttc.backends.onnx.ops import ROWS
from tttc.backends.onnx.recurrence import OPERATORS, SCAN_FORM, operator_functions, recurrence_of
from tttc.backends.rows import missing_rows
from tttc.ir.expr import Expr
from tttc.ir.names import marked, unmarked, worded
from tttc.ir.program import AdjointProgram, Scan, ScanProgram

OPSET = 26  # the first with CumProd
HEAD = '<ir_version: 10, opset_import: [{imports}], producer_name: "tttc">'
FUNCTION = '<domain: "tttc", opset_import: [{imports}]>'
SCAN = "# scan "  # before the model of each
DEFAULT = "com.microsoft"  # whose operator ONNX Runtime has a kernel of


def refusals(program: ScanProgram) -> list[str]:
    """What has no row, and float64."""
    wide = ["it computes in float32: compile with dtype=torch.float32"] if program.dtype == "f64" else []
    return [*wide, *missing_rows(program, ROWS, "backends/onnx/ops.py")]


def notes(program: ScanProgram) -> list[str]:
    """That it has no backward."""
    return ["ONNX Runtime runs forward alone; train with another backend"]


def emit_source(program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST) -> Source:
    """All models of the program, one after the other."""
    return Source(lambda: "\n".join(_model(scan, program) for scan in program.scans), "onnx")


def _model(scan: Scan, program: ScanProgram) -> str:
    inputs = [_typed(p, marked(p.name), program) for p in scan.params]
    results = [_typed(e, made(e), program) for e in scan.results]
    graph = block(scan.name, inputs, results, [call(scan.name, scan, "new", "", "")])
    return f"{SCAN}{scan.name}: {scan.doc}\n{model_text(graph, functions(scan, program), DEFAULT)}"


def model_text(graph: str, called: Sequence[str], linear: str = SCAN_FORM) -> str:
    """A graph and the functions that it calls, each with words of its own, as a model."""
    operator = OPERATORS.get(linear)
    used = operator is not None and any(f" = {operator.node} <" in part for part in called)
    imports = operator.imports if operator is not None and used else f'"" : {OPSET}, "tttc" : 1'
    parts = [HEAD.format(imports=imports), words(graph)]
    return "\n".join([*parts, *(x for part in called for x in (FUNCTION.format(imports=imports), words(part)))])


def functions(scan: Scan, program: ScanProgram, linear: str = DEFAULT) -> list[str]:
    """A scan as `tttc.<name>`, its parameters in their order, and what that calls; `linear` is the domain whose
    operator it may be, or "scan".
    """
    rule = recurrence_of(scan, program) if linear in OPERATORS else None
    return loop_functions(scan, program) if rule is None else operator_functions(scan, program, rule, linear)


def words(text: str) -> str:
    """A text with a word for each name; words of ONNX have the letters of ASCII alone."""
    return re.sub(r"[^\x00-\x7f]", lambda m: f"u{ord(m[0]):x}", worded(text).text)


def _typed(e: Expr, name: str, program: ScanProgram) -> str:
    unknown = ["T" if e.at and not i else unmarked(marked(a.name)) for i, a in enumerate(e.axes)]
    sizes = [str(program.dims.get(a.size, n)) for a, n in zip(e.axes, unknown, strict=True)]
    return f"float[{', '.join(['N', *sizes])}] {name}"
