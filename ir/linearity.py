"""How an expression depends on a leaf: constant < linear < affine < nonlinear, with the operations that made it so.

A type system over the graph, not a heuristic: it decides where the gradient of the inner loss may be taken at any
weights (constant), by a triangular solve (affine), or only at frozen weights (nonlinear).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from tttc.ir.expr import OPS, Expr, postorder


class Dependence(IntEnum):
    """Ordered: a sum is as bad as its worst operand."""

    CONSTANT = 0
    LINEAR = 1
    AFFINE = 2
    NONLINEAR = 3


class Finding(NamedTuple):
    """The dependence of a value, and the operation at which it first became that."""

    dependence: Dependence
    because: Expr | None = None


def dependence(root: Expr, on: Iterable[Expr]) -> Finding:
    """How `root` depends on the leaves `on`, taken together."""
    names = {e.name for e in on}
    found: dict[Expr, Finding] = {}
    for node in postorder([root]):
        if node.op == "leaf":
            found[node] = Finding(Dependence.LINEAR if node.name in names else Dependence.CONSTANT)
        else:
            found[node] = _combine(node, [found[s] for s in node.src])
    return found[root]


def _combine(node: Expr, operands: list[Finding]) -> Finding:
    moving = [f for f in operands if f.dependence > Dependence.CONSTANT]
    if not moving:
        return Finding(Dependence.CONSTANT)
    worst = max(moving, key=lambda f: f.dependence)
    if worst.dependence == Dependence.NONLINEAR:
        return worst
    rule = OPS[node.op].depends
    if node.op == "div" and operands[1].dependence == Dependence.CONSTANT:
        rule = "linear"
    if rule == "multilinear":
        return worst if len(moving) == 1 else Finding(Dependence.NONLINEAR, node)
    if rule != "linear":
        return Finding(Dependence.NONLINEAR, node)
    if len(moving) < len(operands) and worst.dependence == Dependence.LINEAR and not _is_zero_elsewhere(node, operands):
        return Finding(Dependence.AFFINE, node)
    return worst


def _is_zero_elsewhere(node: Expr, operands: list[Finding]) -> bool:
    """Whether the operands that do not move are only scale factors, so that the result stays linear."""
    return node.op not in ("add", "sub")
