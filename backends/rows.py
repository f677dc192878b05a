"""Which operations of a program a backend has a row for: what is missing in its table is a refusal.

The table of a backend is `ROWS` in its `ops.py`: for every operation of the IR a template, or the name of what writes
it. What has none, but is made of others, is computed as these, and looked up as these: a composite as what it consists
of, an elementwise function as the formula of its row in ir/scalars.py. Without a row for `silu`, but with one for what
that is made of:

    silu(x)   ->   silu(x), and before it   def silu(x): return x * sigmoid(x)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import sympy

from tttc.ir.expr import OPS, Expr, postorder, rebuild, transform
from tttc.ir.program import AdjointProgram, Assign, Block, Scan, ScanAdjoint, ScanProgram
from tttc.ir.scalars import SCALARS
from tttc.ir.simplify import renamed_hints

P = TypeVar("P", bound=ScanProgram)

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
        made_of = None if e.op in rows else in_others(e)
        if made_of is not None:
            yield from _operations([made_of], rows)
            continue
        yield e.op
        if e.op == "map":
            yield from (f.func.__name__ for f in e.arg.body.atoms(sympy.Function))


# -- what has no row, but is made of what has --------------------------------------------------------------------------


def in_others(e: Expr) -> Expr | None:
    """A node as what it is made of: a composite as simpler operations, an elementwise function as the formula that
    defines it; None where it is made of nothing else.
    """
    lower, row = OPS[e.op].lower, SCALARS.get(e.op)
    if lower is not None:
        return lower(e)
    return Expr("map", e.src, row.definition) if row is not None and row.definition is not None else None


def spelled_out(program: P, rows: Collection[str]) -> P:
    """The scans of a program, and their adjoints, without what has no row but is made of others; as it is where there
    is nothing of that.
    """
    if all(e.op in rows for e in postorder(_values(program))):
        return program
    moved: dict[Expr, Expr] = {}

    def visit(node: Expr, src: tuple[Expr, ...]) -> Expr:
        new = rebuild(node, src)
        return new if new.op in rows else in_others(new) or new

    def spelled(assigns: Sequence[Assign]) -> tuple[Assign, ...]:
        values = transform([a.value for a in assigns], visit, moved)
        return tuple(Assign(a.target, v) for a, v in zip(assigns, values, strict=True))

    def of_scan(s: Scan) -> Scan:
        return replace(s, outputs=spelled(s.outputs), updates=spelled(s.updates))

    scans = {s.name: of_scan(s) for s in program.scans}
    made = replace(program, scans=tuple(scans.values()))
    if isinstance(made, AdjointProgram):
        adjoints = tuple(_adjoint(a, scans[a.scan.name], spelled) for a in made.adjoints)
        made = replace(made, adjoints=adjoints)
    return replace(made, names={**program.names, **renamed_hints(program.names, moved)})


def _adjoint(a: ScanAdjoint, scan: Scan, spelled: Callable[[Sequence[Assign]], tuple[Assign, ...]]) -> ScanAdjoint:
    """The adjoint of a scan that is spelled out."""
    forward, backward = (Block(spelled(block.assigns)) for block in (a.forward, a.backward))
    return replace(a, scan=scan, outputs=spelled(a.outputs), forward=forward, backward=backward)
