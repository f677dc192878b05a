"""Running a program directly, in float64 on NumPy: the meaning of the IR, independent of the printer and of the
backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tttc.ir.expr import OPS, TOKENS, Expr, postorder
from tttc.ir.numerics import chunks
from tttc.ir.ops import align, sizes_of
from tttc.ir.program import (
    S_AXIS,
    SEQUENCE,
    T_AXIS,
    Allocate,
    Block,
    For,
    Program,
    Restore,
    Save,
    Statement,
    number_of,
)

Array = np.ndarray


def interpret(program: Program, function: str, arguments: Mapping[str, Array]) -> tuple[Array, ...]:
    """Call a function of `program` on arrays for one batch element and head; what it returns, in order."""
    called = program[function]
    machine = _Machine(program.dims, dict(arguments))
    sequences = [p.name for p in called.params if p.at]
    machine.tokens = len(arguments[sequences[0]]) if sequences else 0
    for p in called.params:
        machine.measure(p, np.shape(arguments[p.name]))
    machine.run(called.body)
    return tuple(machine.variables[r.name] for r in called.returns)


class _Machine:
    def __init__(self, dims: Mapping[str, int], variables: dict[str, Array]) -> None:
        self.dims = dict(dims)
        self.variables: dict[str, Any] = variables
        self.places: dict[str, Any] = {}  # of loops: the tokens of a chunk, or one
        self.tokens = 0
        self.chunk = 0
        self.saved: list[list[Array]] = []
        self.values: dict[Expr, Array] = {}

    def measure(self, p: Expr, shape: tuple[int, ...]) -> None:
        """The sizes that no dim gives: the tokens of a chunk, and those seen from one of them."""
        if p.at:
            shape, axes = shape[1:], tuple(a for a in p.axes if a not in (T_AXIS, S_AXIS))
        else:
            axes = p.axes
        for axis, length in zip(axes, shape, strict=True):
            if axis.size == T_AXIS.size:
                self.chunk = length
            else:
                self.dims.setdefault(axis.size, length)

    def run(self, body: tuple[Statement, ...]) -> None:
        for statement in body:
            getattr(self, f"_{type(statement).__name__.lower()}")(statement)

    def _for(self, loop: For) -> None:
        whole = range(self.tokens) if loop.over is SEQUENCE else self.places[loop.over]
        ranges: list[Any] = list(whole) if loop.step is None else chunks(whole, number_of(loop.step, self.tokens))
        for part in reversed(ranges) if loop.reverse else ranges:
            self.places[loop.var] = part
            if loop.step is not None:
                self.chunk = len(part)
            self.run(loop.body)

    def _allocate(self, statement: Allocate) -> None:
        leaf, axes = statement.target.arg
        shape = [self.dims[a.size] for a in axes if a.size != TOKENS]
        self.variables[leaf.name] = np.full((self.tokens, *shape), np.nan)

    def _save(self, statement: Save) -> None:
        self.saved.append([self.variables[e.name] for e in statement.values])

    def _restore(self, statement: Restore) -> None:
        for target, value in zip(statement.targets, self.saved.pop(), strict=True):
            self.variables[target.name] = value

    def _block(self, block: Block) -> None:
        self.values = {}
        roots = [a.value for a in block.assigns]
        lengths = {**self.dims, TOKENS: self.chunk}
        for node in postorder(roots):
            if node.op == "leaf":
                self.values[node] = self._read(node)
            else:
                operands = (self.values[s] for s in node.src)
                self.values[node] = OPS[node.op].numpy(node, sizes_of(node, lengths), *operands)  # type: ignore[misc]
        for a in block.assigns:
            value = np.array(align(self.values[a.value], a.value.axes, a.target.axes), dtype=np.float64)
            if a.leaf.at is None:
                self.variables[a.leaf.name] = value
            else:
                self.variables[a.leaf.name][self.places[a.leaf.at]] = value

    def _read(self, node: Expr) -> Array:
        leaf = node.variable
        value = self.variables[leaf.name]
        return np.asarray(value[self.places[leaf.at]] if leaf.at else value, dtype=np.float64)
