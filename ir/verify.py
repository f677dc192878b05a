"""The verifier: types are re-derived, every variable is defined before it is read, and a stage holds only what its spec
allows (ir/spec.py).
"""

from __future__ import annotations

from tttc.ir.expr import OPS, Expr, postorder
from tttc.ir.names import is_declared, own
from tttc.ir.program import (
    SEQUENCE,
    T_AXIS,
    Allocate,
    Block,
    For,
    Function,
    Program,
    Restore,
    Save,
    Scan,
    ScanProgram,
    Statement,
    values,
)
from tttc.ir.spec import DECLARED, SPECS, Spec


class MalformedProgram(Exception):
    """Internal: a stage made a program that breaks the rules of the IR."""


def verify(program: Program) -> None:
    """Raise `MalformedProgram` naming the stage, the function and the expression at fault."""
    spec = SPECS[program.stage]
    if not isinstance(program, spec.program):
        raise MalformedProgram(
            f"stage {program.stage!r} made a {type(program).__name__}, not a {spec.program.__name__}"
        )
    for function in program.functions:
        _Scope(function, f"stage {program.stage!r}, function {function.name!r}", spec).verify()
    for scan in program.scans if isinstance(program, ScanProgram) else ():
        _given_tokens(scan, f"stage {program.stage!r}, scan {scan.name!r}")


def _given_tokens(scan: Scan, where: str) -> None:
    """A backend takes batch, heads and tokens from the parameters: there is one that has them."""
    along = scan.loops or any(a.size == T_AXIS.size for e in postorder(values(scan.block)) for a in e.axes)
    if along and not any(a.size == T_AXIS.size for p in scan.params for a in p.axes):
        raise MalformedProgram(f"{where}: no parameter has an axis over the tokens")
    if not scan.params:
        raise MalformedProgram(f"{where}: there is no parameter")


class _Scope:
    """One function, and what is defined where it has come to."""

    def __init__(self, function: Function, where: str, spec: Spec) -> None:
        self.function, self.where, self.spec = function, where, spec
        self.defined = {p.name for p in function.params}

    def verify(self) -> None:
        for p in self.function.params:
            self._kind(p)
        self._statements(self.function.body)
        missing = [r.name for r in self.function.returns if r.name not in self.defined]
        if missing:
            raise MalformedProgram(f"{self.where} returns undefined {', '.join(missing)}")

    def _statements(self, body: tuple[Statement, ...]) -> None:
        for statement in body:
            if not isinstance(statement, self.spec.statements):
                self._fail(f"there is no {type(statement).__name__} after this stage")
            if isinstance(statement, For):
                if statement.over is not SEQUENCE and own(statement.over) not in self.defined:
                    self._fail(f"the loop over {statement.over!r} runs over nothing")
                self.defined.add(own(statement.var))
                self._statements(statement.body)
            elif isinstance(statement, Allocate):
                self.defined.add(statement.target.name)
            elif isinstance(statement, Restore):
                self.defined.update(t.name for t in statement.targets)
            elif isinstance(statement, Block):
                self._block(statement)
            else:
                assert isinstance(statement, Save)

    def _block(self, block: Block) -> None:
        for e in postorder(a.value for a in block.assigns):
            self._node(e)
        for a in block.assigns:
            if set(a.value.axes) != set(a.target.axes):
                self._fail(
                    f"{a.leaf.name} has axes {_names(a.target)} "
                    f"but is assigned {_shown(a.value)} with axes {_names(a.value)}"
                )
            if a.leaf.at is not None and a.leaf.name not in self.defined:
                self._fail(f"{a.leaf.name} is stored into before it is allocated")
            self._kind(a.target)
            self.defined.add(a.leaf.name)

    def _node(self, e: Expr) -> None:
        if e.op not in self.spec.ops:
            self._fail(f"{e.op!r} must not occur after this stage, in {_shown(e)}")
        axes = OPS[e.op].infer(e.src, e.arg)
        if axes != e.axes:
            self._fail(f"{_shown(e)} has axes {e.axes}, its type rule gives {axes}")
        if len(set(e.axes)) != len(e.axes):
            self._fail(f"an axis occurs twice in {_shown(e)}")
        if e.op == "leaf":
            self._kind(e)
            for name in (e.name, e.at and own(e.at)):
                if name is not None and name not in self.defined:
                    self._fail(f"{name} is read before it is defined")

    def _kind(self, e: Expr) -> None:
        """Whether there may be such a leaf, and it has no name of a kind that users give."""
        if e.role not in self.spec.kinds or e.at not in self.spec.places:
            self._fail(f"{e!r} is a {e.role} at {e.at}, of which there are none after this stage")
        if e.role not in DECLARED and is_declared(e.name):
            self._fail(f"{e.name}, a {e.role}, is called as a user may call a variable")

    def _fail(self, what: str) -> None:
        raise MalformedProgram(f"{self.where}: {what}")


def _names(e: Expr) -> str:
    return "[" + ", ".join(a.name for a in e.axes) + "]"


def _shown(e: Expr, depth: int = 4) -> str:
    """An expression down to a few operations: its whole text repeats what it shares, and may have no end."""
    if not e.src:
        return repr(e)
    return f"{e.op}({', '.join(_shown(s, depth - 1) for s in e.src) if depth else '...'})"
