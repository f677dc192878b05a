"""What the ONNX form of a program is, in a line: `explain` says it, with onnx installed or not.

a Scan over chunks of 16 tokens, 71 nodes each
"""

from __future__ import annotations

from collections.abc import Iterable

from tttc.backends.onnx.composed import TILED, by_kind, composed_functions, composed_scan
from tttc.backends.onnx.emit import DEFAULT, functions
from tttc.backends.onnx.ops import RECURRENCE, ROWS
from tttc.backends.onnx.recurrence import OPERATORS
from tttc.backends.rows import missing_rows
from tttc.ir.program import ScanProgram


def form_text(program: ScanProgram) -> str:
    """What a graph does with many tokens, and of how many nodes; or why there is none."""
    missing = missing_rows(program, ROWS, "backends/onnx/ops.py")
    if missing:
        return f"none: {'; '.join(missing)}"
    scan = composed_scan(program)
    made = functions(program.scans[0], program) if scan is None else composed_functions(scan, program)
    if any(f"{OPERATORS[DEFAULT].node} <" in text for text in made):
        return f"one {RECURRENCE} node, {node_count(made[:1]) - 1} around it"
    chunk = program.scans[0].chunk if scan is None else scan.chunk
    tiles = scan is not None and not program.plan.substitution
    called = [f for kind in TILED for f in functions(by_kind(program)[kind], program)] if tiles else []
    nodes = f"{node_count([*made[1:], *called])} nodes"
    if not isinstance(chunk, int):
        return f"one chunk as long as the call, {nodes}"
    return f"a Scan over {'mini-batches' if tiles else 'chunks'} of {chunk} token{'s' * (chunk != 1)}, {nodes} each"


def node_count(texts: Iterable[str]) -> int:
    """The nodes of functions in ONNX text, and of the graphs inside of them: one a line."""
    lines = (line.strip() for text in texts for line in text.splitlines())
    return sum(" = " in line and line[0] not in "#}" for line in lines)
