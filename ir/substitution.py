"""Online gradients that are not affine: the chunk's rows one after the other, on rows alone.

No weights of a token are built. Token t reads the weights that it finds, a_{t-1} * W - sum over s < t of A[t-1, s] *
outer(X_s, d_s), through the rows X, d of the tokens before it, and makes its own; the chunk then goes on as if the rows
had been given.

    coefficients:  a, A                     of the chunk, from its gates
    rows:          past -> past             for t in c: row[t] = f(k[t] @ W - (A[t] * (k[t] @ X.T)) @ d), kept in `past`
    whole:         W -> W                   outputs and weights, from all rows
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, const, leaf, leaves, substitute
from tttc.ir.names import own, prefixed, suffixed
from tttc.ir.program import S_AXIS, T_AXIS, Assign
from tttc.ir.reading import PerTokenWeights, Term, read_through, vectorize_over_tokens
from tttc.ir.response import Response, Transfer, coefficients

PAST = Axis(own("n"), own("n"))  # the tokens of the chunk, seen from one of them
NOW = leaf(own("now"), "token", (T_AXIS, PAST), "c")  # a one where the token itself stands


class Substitution(NamedTuple):
    """The coefficients of a chunk, and the loop over its tokens that fills the rows."""

    coefficients: tuple[Assign, ...]
    rows: tuple[Assign, ...]
    past: tuple[Assign, ...]


def distinct_factors(gradients: Mapping[str, tuple[Term, ...]]) -> list[Expr]:
    """The per-token values of which all gradients are products, each once."""
    return list(dict.fromkeys(f for terms in gradients.values() for t in terms for f in t.factors))


def row_name(i: int) -> str:
    """The sequence of the i-th factor."""
    return prefixed("row", own(str(i)))


def row(i: int, f: Expr, axis: Axis) -> Expr:
    """The i-th factor at the tokens of the chunk."""
    return leaf(row_name(i), "token", (axis, *f.axes), "c")


def is_row(e: Expr) -> bool:
    """Whether a leaf is a factor at the tokens of the chunk."""
    return e.name.startswith(prefixed("row", own("")))


def rows_given(gradients: Mapping[str, tuple[Term, ...]]) -> dict[str, tuple[Term, ...]]:
    """The gradients at the source tokens, their factors read from the rows."""
    known = {f: row(i, f, S_AXIS) for i, f in enumerate(distinct_factors(gradients))}
    return {n: tuple(t.mapped(known.__getitem__) for t in ts) for n, ts in gradients.items()}


def substitution(
    states: Mapping[str, Expr],
    anchors: Mapping[str, Response],
    gradients: Mapping[str, tuple[Term, ...]],
    sizes: Mapping[str, int],
) -> Substitution:
    """The rows of a chunk, from the responses of the weights at which each token takes its gradient."""
    factors = distinct_factors(gradients)
    past = {f: leaf(prefixed("past", own(str(i))), "sum", (PAST, *f.axes)) for i, f in enumerate(factors)}
    made: list[Assign] = []
    weights: dict[str, PerTokenWeights | Expr] = {}

    def coefficient(value: Expr, name: str) -> Expr:
        """A coefficient computed for all tokens, as each of them reads it: its own row, if it has one of its own."""
        if value.op == "const":
            return value
        made.append(Assign(leaf(name, "sum", value.axes), value))
        axes = tuple(PAST if a == S_AXIS else a for a in value.axes)
        return leaf(name, "token", axes, "c") if T_AXIS in axes else leaf(name, "sum", axes)

    for n, w in states.items():
        terms = []
        for i, p in enumerate(anchors[n].parts):
            scale = () if p.coefficient is None else (coefficient(p.coefficient, suffixed(prefixed("a", n), str(i))),)
            terms.append(Term(p.sign, (*scale, *p.held)))
        for i, k in enumerate(anchors[n].kernels):
            # rows that are still to come are zero: a triangle of ones need not be said
            whole = (k.column or const(1)) if k.kind == "strict" else _matrix_of(k)
            A = coefficient(whole, suffixed(prefixed("A", n), str(i)))
            kernel = Term(k.sign, (A,), (PAST,))
            terms += [kernel.times(t.mapped(past.__getitem__)) for t in gradients[n]]
        weights[n] = PerTokenWeights(w.axes, tuple(terms))
    at_once = {e: leaf(e.name, e.role, e.axes) for e in leaves(a.value for a in made)}
    made = [Assign(a.target, *substitute([a.value], at_once)) for a in made]
    rows, grown = [], []
    for i, f in enumerate(factors):
        (over,) = vectorize_over_tokens([f], T_AXIS, {})
        reads = any(e.name in weights for e in leaves([f]))
        value = b.broadcast(read_through(over, weights, sizes, {}) if reads else over, (T_AXIS, *f.axes))
        rows.append(Assign(row(i, f, T_AXIS), value))
        grown.append(Assign(past[f], b.add(past[f], b.contract((NOW, value), (T_AXIS,)))))
    return Substitution(tuple(made), tuple(rows), tuple(grown))


def _matrix_of(k: Transfer) -> Expr:
    """A kernel as one matrix over (t, s), a stack of them where a rate has channels."""
    ((_, factors),) = coefficients(Response(kernels=(k,)))
    return b.broadcast(reduce(b.mul, factors), (T_AXIS, S_AXIS))
