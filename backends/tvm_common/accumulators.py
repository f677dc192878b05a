"""What a statement says about its products: which share their accumulators, and which of their factors are zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tttc.backends.tvm_common.statements import Statement
from tttc.ir.expr import Axis, Expr, postorder

# -- sums of products --------------------------------------------------------------------------------------------------


class Accumulation(NamedTuple):
    """Products that are added up in the same registers, which begin as the sum of the others."""

    products: tuple[tuple[int, Expr], ...]
    others: tuple[tuple[int, Expr], ...]


def accumulated(value: Expr) -> dict[Expr, Accumulation]:
    """The sums that hold a product, none inside another."""
    holding = {e for e in postorder([value]) if e.op == "contract"}
    for e in postorder([value]):
        if any(s in holding for s in e.src):
            holding.add(e)
    found: dict[Expr, Accumulation] = {}
    stack = [value]
    while stack:
        e = stack.pop()
        if e not in holding or e in found:
            continue
        terms = _terms(e, 1)
        products = tuple((sign, t) for sign, t in terms if t.op == "contract")
        others = tuple((sign, t) for sign, t in terms if t.op != "contract")
        if products and not any(t in holding for _, t in others):
            found[e] = Accumulation(products, others)
        elif e.op == "contract":
            found[e] = Accumulation(((1, e),), ())
        else:
            stack += e.src
    return found


def _terms(e: Expr, sign: int) -> list[tuple[int, Expr]]:
    if e.op == "add":
        return [t for s in e.src for t in _terms(s, sign)]
    if e.op == "sub":
        return [*_terms(e.src[0], sign), *_terms(e.src[1], -sign)]
    if e.op == "neg":
        return _terms(e.src[0], -sign)
    return [(sign, e)]


# -- triangles ---------------------------------------------------------------------------------------------------------


def zeros(e: Expr, known: Mapping[str, set[tuple[int, int]]]) -> set[tuple[Axis, Axis]]:
    """The pairs (rows, columns) of token axes with nothing where the column comes after the row."""
    if e.op == "leaf":
        return {(e.axes[i], e.axes[j]) for i, j in known.get(e.name, ())}
    if e.op == "mask":
        return {e.arg[:2]} | zeros(e.src[0], known)
    if e.op == "segprod":
        return {e.arg[:2]}
    if e.op == "mul":
        return zeros(e.src[0], known) | zeros(e.src[1], known)
    if e.op == "neg":
        return zeros(e.src[0], known)
    if e.op == "div":
        return zeros(e.src[0], known)
    if e.op == "rename":
        to = dict(e.arg)
        return {(to.get(i, i), to.get(j, j)) for i, j in zeros(e.src[0], known)}
    return set()


def triangle(s: Statement, known: Mapping[str, set[tuple[int, int]]]) -> set[tuple[int, int]]:
    axes = s.target.axes
    return {(axes.index(i), axes.index(j)) for i, j in zeros(s.value, known) if i in axes and j in axes}
