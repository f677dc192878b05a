"""A learner at weights that stay: what it makes of each token, by itself.

for c in chunks(T, 64):
    z[c] = f(x[c], W)             nothing is carried, so that the backward is a scan too, and has an adjoint:

for c in chunks(T, 64):
    dx[c] = ...;  dW = dW + ...   `ir/adjoint.py` makes both
"""

from __future__ import annotations

from tttc.ir.expr import Expr, leaves
from tttc.ir.primal import per_token
from tttc.ir.program import SEQUENCE, T_AXIS, Assign, DualProgram, Plan, Scan, ScanKind, ScanProgram, Tokens
from tttc.ir.reading import at_chunk, vectorize_over_tokens
from tttc.ir.simplify import renamed_hints, simplify_assigns


def frozen(program: DualProgram, chunk: Tokens = SEQUENCE) -> ScanProgram:
    """The output of a program as its only scan, with all weights as they are given."""
    _, reading = per_token(program)
    moved: dict[Expr, Expr] = {}
    (value,) = vectorize_over_tokens([reading.value], T_AXIS, moved)
    z = Assign(at_chunk(reading.target, T_AXIS), value)
    done, named, _ = simplify_assigns([z], renamed_hints(program.names, moved))
    read = {e.name for e in leaves(a.value for a in done)}
    given = [at_chunk(p, T_AXIS) for p in program.output.params if p.name in read]
    fixed, sequence = (tuple(p for p in given if bool(p.at) is along) for along in (False, True))
    doc = "Every token by itself, at weights that stay."
    scan = Scan(f"{program.name}_read", ScanKind.READ, fixed, (), sequence, tuple(done), (), chunk, doc=doc)
    plan = Plan(chunk, None, "weights that stay: the chunk is free")
    names = {**program.names, **named}
    return ScanProgram.of(program, "schedule", functions=(scan.function(),), names=names, scans=(scan,), plan=plan)
