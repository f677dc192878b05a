"""Which operations of a program a backend has a row for: what is missing in its table is a refusal.

The table of a backend is `ROWS` in its `ops.py`: for every operation of the IR a template, or the name of what writes
it. A composite without a row is looked up as what it consists of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import sympy

from tttc.ir.expr import OPS, Expr, postorder
from tttc.ir.program import AdjointProgram, ScanProgram
from tttc.ir.scalars import SCALARS

INFIX = {name: row.infix for name, row in SCALARS.items() if row.infix is not None}
"""The rows of arithmetic, which all languages write alike."""


def calls(prefix: str, *names: str) -> dict[str, str]:
    """Templates of functions that have the names of their operations: calls("tl.", "exp") is {"exp": "tl.exp({0})"}."""
    places = {n: ", ".join(f"{{{i}}}" for i in range(SCALARS[n].arity)) for n in names}
    return {n: f"{prefix}{n}({place})" for n, place in places.items()}


def methods(*names: str) -> dict[str, str]:
    """Rows of operations that methods with their names write: methods("mask") is {"mask": "_mask"}."""
    return {n: f"_{n}" for n in names}


PRINTED = methods(
    *("leaf", "const", "size", "map", "pow", "mask", "last", "put_last", "segprod", "cumprod", "shift", "shift_back"),
    *("solve", "broadcast", "stop_gradient"),
)
"""The rows of what every printer of expressions (ir/text.py) has such a method for."""


def missing_rows(program: ScanProgram, rows: Collection[str], table: str) -> list[str]:
    """A refusal for every operation of the program that has no row; `table` is the file where it would stand."""
    needed = set(_operations(_values(program), rows))
    return [f"it has no row for the operation `{op}`: add one to {table}" for op in sorted(needed - set(rows))]


def _values(program: ScanProgram) -> list[Expr]:
    """All that a backend may be asked to compute."""
    found = [a.value for s in program.scans for a in s.block.assigns]
    adjoints = program.adjoints if isinstance(program, AdjointProgram) else ()
    found += [x.value for a in adjoints for block in (a.forward, a.backward) for x in block.assigns]
    return found


def _operations(values: Iterable[Expr], rows: Collection[str]) -> Iterator[str]:
    for e in postorder(values):
        lower = OPS[e.op].lower
        if e.op not in rows and lower is not None:
            yield from _operations([lower(e)], rows)
            continue
        yield e.op
        if e.op == "map":
            yield from (f.func.__name__ for f in e.arg.body.atoms(sympy.Function))
