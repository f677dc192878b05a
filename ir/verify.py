"""The verifier: types are re-derived, every variable is defined before it is read, and a stage holds only what its spec
allows.
"""

from __future__ import annotations

from collections.abc import Iterable

from tttc.ir.expr import OPS, Expr, postorder
from tttc.ir.names import is_declared, own
from tttc.ir.program import (
    SEQUENCE,
    T_AXIS,
    Allocate,
    Block,
    For,
    Program,
    Restore,
    Save,
    Scan,
    ScanProgram,
    Statement,
    values,
)

DECLARED = ("state", "param", "token", "gate")  # what a user names


class MalformedProgram(Exception):
    """Internal: a stage made a program that breaks the rules of the IR."""


def verify(program: Program, forbidden: Iterable[str] = ()) -> None:
    """Raise `MalformedProgram` naming the stage, the function and the expression at fault."""
    forbidden = frozenset(forbidden)
    for function in program.functions:
        scope = {p.name for p in function.params}
        _statements(function.body, scope, f"stage {program.stage!r}, function {function.name!r}", forbidden)
        missing = [r.name for r in function.returns if r.name not in scope]
        if missing:
            raise MalformedProgram(f"stage {program.stage!r}: {function.name!r} returns undefined {', '.join(missing)}")
    for scan in program.scans if isinstance(program, ScanProgram) else ():
        _given_tokens(scan, f"stage {program.stage!r}, scan {scan.name!r}")


def _given_tokens(scan: Scan, where: str) -> None:
    """A backend takes batch, heads and tokens from the parameters: there is one that has them."""
    along = scan.loops or any(a.size == T_AXIS.size for e in postorder(values(scan.block)) for a in e.axes)
    if along and not any(a.size == T_AXIS.size for p in scan.params for a in p.axes):
        raise MalformedProgram(f"{where}: no parameter has an axis over the tokens")
    if not scan.params:
        raise MalformedProgram(f"{where}: there is no parameter")


def _statements(body: tuple[Statement, ...], scope: set[str], where: str, forbidden: frozenset[str]) -> None:
    for statement in body:
        if isinstance(statement, For):
            if statement.over is not SEQUENCE and own(statement.over) not in scope:
                raise MalformedProgram(f"{where}: the loop over {statement.over!r} runs over nothing")
            scope.add(own(statement.var))
            _statements(statement.body, scope, where, forbidden)
        elif isinstance(statement, Allocate):
            scope.add(statement.target.name)
        elif isinstance(statement, Restore):
            scope.update(t.name for t in statement.targets)
        elif isinstance(statement, Block):
            _block(statement, scope, where, forbidden)
        else:
            assert isinstance(statement, Save)


def _block(block: Block, scope: set[str], where: str, forbidden: frozenset[str]) -> None:
    for e in postorder(a.value for a in block.assigns):
        if e.op in forbidden:
            raise MalformedProgram(f"{where}: {e.op!r} must not occur after this stage, in {_shown(e)}")
        axes = OPS[e.op].infer(e.src, e.arg)
        if axes != e.axes:
            raise MalformedProgram(f"{where}: {_shown(e)} has axes {e.axes}, its type rule gives {axes}")
        if len(set(e.axes)) != len(e.axes):
            raise MalformedProgram(f"{where}: an axis occurs twice in {_shown(e)}")
        _leaf(e, scope, where)
    for a in block.assigns:
        if set(a.value.axes) != set(a.target.axes):
            raise MalformedProgram(
                f"{where}: {a.leaf.name} has axes {_names(a.target)} "
                f"but is assigned {_shown(a.value)} with axes {_names(a.value)}"
            )
        if a.leaf.at is not None and a.leaf.name not in scope:
            raise MalformedProgram(f"{where}: {a.leaf.name} is stored into before it is allocated")
        scope.add(a.leaf.name)


def _leaf(e: Expr, scope: set[str], where: str) -> None:
    if e.op != "leaf":
        return
    leaf = e.variable
    if leaf.role not in DECLARED and is_declared(leaf.name):
        raise MalformedProgram(f"{where}: {leaf.name}, a {leaf.role}, is called as a user may call a variable")
    for name in (leaf.name, leaf.at and own(leaf.at)):
        if name is not None and name not in scope:
            raise MalformedProgram(f"{where}: {name} is read before it is defined")


def _names(e: Expr) -> str:
    return "[" + ", ".join(a.name for a in e.axes) + "]"


def _shown(e: Expr, depth: int = 4) -> str:
    """An expression down to a few operations: its whole text repeats what it shares, and may have no end."""
    if not e.src:
        return repr(e)
    return f"{e.op}({', '.join(_shown(s, depth - 1) for s in e.src) if depth else '...'})"
