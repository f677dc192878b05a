"""Contractions: how one is laid out as a matrix product, and in which order a product of many is best taken.

The dual form is nothing but a contraction order. Reading x_t through the weights W - sum_s A_ts * outer(X_s, d_s) is

    contract(x[t, D], A[t, s], X[s, D], d[s, F]; over D, s)      token by token: d x F weights for each t
        -> ((x @ X.T) * A) @ d                                   the same product, cheapest pair first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations
from math import prod
from typing import NamedTuple

from tttc.ir import build as b
from tttc.ir.expr import Axes, Axis, Expr

Sizes = Mapping[str, int]


class Layout(NamedTuple):
    """How a two-operand contraction is written: kind is product, outer, matmul, dot or einsum."""

    kind: str
    transpose_left: bool = False
    transpose_right: bool = False


def layout(node: Expr) -> Layout:
    """The plainest form of a contraction of two operands; of more than two, an elementwise product or an einsum."""
    over = set(node.arg)
    if not over:
        left, right = node.src[0].axes, node.src[-1].axes
        apart = len(node.src) == 2 and not set(left) & set(right) and len(left) == len(right) == 1
        return Layout("outer" if apart else "product")
    if len(node.src) != 2:
        return Layout("einsum")
    left, right = (e.axes for e in node.src)
    shared = set(left) & set(right)
    if not over <= shared:
        return Layout("einsum")
    if shared == over and len(over) == 1 and len(left) <= 2 and len(right) <= 2:
        (axis,) = over
        return Layout("matmul", left[-1] != axis, right[0] != axis)
    if set(left) == set(right):
        return Layout("dot")
    return Layout("einsum")


def ordered(factors: Sequence[Expr], out: Axes, sizes: Sizes) -> Expr:
    """The product of `factors` summed to the axes `out`, as nested contractions of two in the cheapest order.

    Exact: every order of every subset is considered (Bellman). Ties go to the earlier factors.
    """
    factors = tuple(factors)
    if len(factors) == 1:
        return b.total(factors[0], [a for a in factors[0].axes if a not in out])
    everything = frozenset(range(len(factors)))

    @cache
    def axes_of(subset: frozenset[int]) -> frozenset[Axis]:
        """What a partial product must keep: the axes that the result or a factor outside still needs."""
        inside = {a for i in subset for a in factors[i].axes}
        outside = {a for i in everything - subset for a in factors[i].axes} | set(out)
        return frozenset(inside & outside)

    @cache
    def best(subset: frozenset[int]) -> tuple[float, float, tuple[frozenset[int], frozenset[int]] | None]:
        """(multiply-adds, total size of intermediates, split)"""
        if len(subset) == 1:
            return 0.0, 0.0, None
        found: tuple[float, float, tuple[frozenset[int], frozenset[int]] | None] | None = None
        held = prod(sizes[a.size] for a in axes_of(subset))
        for left in _splits(subset):
            right = subset - left
            axes = {a for i in (left, right) for a in _available(i)}
            cost = prod(sizes[a.size] for a in axes) * (2 if axes - axes_of(subset) else 1)
            total = (cost + best(left)[0] + best(right)[0], held + best(left)[1] + best(right)[1])
            if found is None or total < found[:2]:
                found = (*total, (left, right))
        assert found is not None
        return found

    def _available(subset: frozenset[int]) -> frozenset[Axis]:
        if len(subset) == 1:
            return frozenset(factors[next(iter(subset))].axes)
        return axes_of(subset)

    def build(subset: frozenset[int]) -> Expr:
        if len(subset) == 1:
            (i,) = subset
            return factors[i]
        split = best(subset)[2]
        assert split is not None
        left, right = sorted(split, key=min)
        return _pair(build(left), build(right), axes_of(subset))

    return build(everything)


def _pair(left: Expr, right: Expr, keep: Iterable[Axis]) -> Expr:
    """Contract two, after summing away what only one of them has and nobody needs."""
    keep = set(keep)
    left = b.total(left, [a for a in left.axes if a not in keep and a not in right.axes])
    right = b.total(right, [a for a in right.axes if a not in keep and a not in left.axes])
    over = [a for a in left.axes if a in right.axes and a not in keep]
    if not over and (set(left.axes) <= set(right.axes) or set(right.axes) <= set(left.axes)):
        return b.mul(left, right)
    return b.contract((left, right), over)


def _splits(subset: frozenset[int]) -> list[frozenset[int]]:
    """The ways to cut a subset in two, each once."""
    items = sorted(subset)
    first, rest = items[0], items[1:]
    return [frozenset((first, *chosen)) for n in range(len(rest)) for chosen in combinations(rest, n)]
