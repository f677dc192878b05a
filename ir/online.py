"""Exact online gradients: every token's gradient is taken at the weights that the token before left.

The gradient of token t is a product with one factor u_t that is affine in the weights, and these hold the u_s of all
s < t. Read through them, u is a system of equations with a unit lower triangle:

    e[t] = k[t] @ W_{t-1} - v[t],   W_{t-1} = W - sum over s < t of A[t-1, s] * outer(k[s], e[s])
    ->
    e + stril(A' * (k @ k.T)) @ e = k @ W - v          solved at once, whatever the chunk
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, const, depends_on, leaf, leaves
from tttc.ir.linearity import Dependence, dependence
from tttc.ir.names import own, suffixed
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.ir.reading import PerTokenWeights, Term, summed, vectorize_over_tokens

Gradients = Mapping[str, tuple[Term, ...]]


class NotTriangular(Exception):
    """The gradients of a chunk are no triangular system; the argument says why."""


def affine_unknown(gradients: Gradients, states: Sequence[Expr]) -> Expr | None:
    """The one factor of all gradients that depends on the weights; None where none does.

    Raises `NotTriangular` where there are several, or where it is not affine.
    """
    found: dict[Expr, None] = {}
    for terms in gradients.values():
        for term in terms:
            moving = [f for f in term.factors if dependence(f, states).dependence > Dependence.CONSTANT]
            if len(moving) > 1:
                raise NotTriangular("a gradient is a product of several values that depend on the weights")
            found.update(dict.fromkeys(unnamed(f) for f in moving))
    for e in found:
        how = dependence(e, states)
        if how.dependence == Dependence.NONLINEAR:
            op = "" if how.because is None else f" (`{how.because.op}`)"
            raise NotTriangular(f"the gradient is not affine in the weights{op}")
    if len(found) > 1:
        raise NotTriangular("the gradients hold several different values that depend on the weights")
    return next(iter(found), None)


def factor_constants(gradients: Gradients, states: Sequence[Expr]) -> dict[str, tuple[Term, ...]]:
    """Numbers as factors of their own: 2 * e in the gradient of a bias is the e in that of its matrix. Where several
    unknown values are left, so is all that does not depend on the weights: weight * e holds the same e.
    """
    names = {w.name for w in states}
    numbers = {n: _apart(terms, lambda e: e.op == "const") for n, terms in gradients.items()}
    constants = {n: _apart(terms, lambda e: not _reads(e, names)) for n, terms in gradients.items()}
    return constants if len(_unknowns(constants, names)) == 1 < len(_unknowns(numbers, names)) else numbers


def _apart(terms: Sequence[Term], known: Callable[[Expr], bool]) -> tuple[Term, ...]:
    found = []
    for term in terms:
        products = [replace(term, factors=())]
        for f in term.factors:
            products = [p.times(t) for p in products for t in _split(f, known)]
        found += products
    return tuple(found)


def _split(f: Expr, known: Callable[[Expr], bool]) -> tuple[Term, ...]:
    """A factor as a sum of products of known factors and of one that is not, where it is one."""
    match f:
        case Expr("rename", (x,), arg):
            return tuple(t.renamed(dict(arg)) for t in _split(x, known))
        case Expr("neg", (x,)):
            return tuple(replace(t, sign=-t.sign) for t in _split(x, known))
        case Expr("mul", (x, y)) if known(x) != known(y):
            factor, rest = (x, y) if known(x) else (y, x)
            return tuple(t.scaled(factor) for t in _split(rest, known))
        case Expr("add" | "sub" as op, (x, y)) if known(x) != known(y):
            second = _split(y, known)
            return (*_split(x, known), *(second if op == "add" else (replace(t, sign=-t.sign) for t in second)))
    return (Term(1, (f,)),)


def _unknowns(gradients: Gradients, states: set[str]) -> set[Expr]:
    return {unnamed(f) for terms in gradients.values() for t in terms for f in t.factors if _reads(f, states)}


def _reads(e: Expr, states: set[str]) -> bool:
    return any(x.name in states for x in leaves([e]))


def unnamed(f: Expr) -> Expr:
    """A factor under whatever axis names: the gradients of a matrix and of its bias share one."""
    return f.src[0] if f.op == "rename" else f


def named_like(f: Expr, value: Expr) -> Expr:
    """The value of `unnamed(f)` under the axis names of f."""
    return b.rename(value, dict(f.arg)) if f.op == "rename" else value


def unknown_rows(u: Expr) -> Expr:
    """The leaf that stands for the values of `u` at the source tokens."""
    return leaf(own("u"), "unknown", (S_AXIS, *u.axes))


def solved(u: Expr, weights: Mapping[str, PerTokenWeights], sizes: Mapping[str, int], moved: dict[Expr, Expr]) -> Expr:
    """The values of `u` at every source token, where `weights` are those that each token finds, in terms of
    `unknown_rows(u)`.

    Raises `NotTriangular` where an entry of u_t depends on other entries of u_s: then the blocks are no numbers.
    """
    rows = unknown_rows(u)
    known, matrix = [], None
    for term in _Affine(weights, moved).of(u):
        unknown = [f for f in term.factors if f.op == "leaf" and f.variable == rows.variable]
        if not unknown:
            known.append(term)
            continue
        if set(unknown[0].axes) != set(rows.axes):
            raise NotTriangular("the entries of a token's gradient depend on other entries of earlier ones")
        others = tuple(f for f in term.factors if f is not unknown[0])
        own = tuple(a for a in u.axes if any(a in f.axes for f in others))
        kept = (S_AXIS, *own)
        block = summed([Term(1, others, tuple(a for a in term.over if a not in kept))], kept, sizes)
        block = b.broadcast(block, (T_AXIS, S_AXIS))
        if matrix is None:
            matrix = block if term.sign < 0 else b.neg(block)
        else:
            matrix = (b.add if term.sign < 0 else b.sub)(matrix, block)
    right = b.broadcast(summed(known, u.axes, sizes), (T_AXIS, *u.axes))
    if matrix is None:
        return b.rename(right, {T_AXIS: S_AXIS})
    return b.solve(matrix, right, T_AXIS, S_AXIS)


def gain(
    gradients: Gradients, states: Sequence[Expr], rates: Mapping[str, Expr], sizes: Mapping[str, int]
) -> Expr | None:
    """How much a token's own step shrinks what it learns from: u becomes (1 - gain) * u, for every token of a chunk.

    For the delta rule that is lr * |k|^2: beyond 2 the step overshoots and the error grows. None where the gradients
    are not affine in the weights, or where the entries of u mix.
    """
    try:
        u = affine_unknown(gradients, states)
    except NotTriangular:
        return None
    if u is None:
        return None
    rows = unknown_rows(u)
    own = b.rename(rows, {S_AXIS: T_AXIS})
    weights = {}
    for w in states:
        name = w.name
        (rate,) = vectorize_over_tokens([rates[name]], T_AXIS, {})
        terms = []
        for t in gradients[name]:
            factors = [
                named_like(f, own) if unnamed(f) is u else vectorize_over_tokens([f], T_AXIS, {})[0] for f in t.factors
            ]
            terms.append(Term(-t.sign, (rate, *factors), t.over))
        weights[name] = PerTokenWeights(w.axes, tuple(terms))
    total: Expr | None = None
    for term in _Affine(weights, {}).of(u):
        unknown = [f for f in term.factors if f.op == "leaf" and f.variable == rows.variable]
        if not unknown:
            continue
        if set(unknown[0].axes) != set(own.axes):
            return None
        others = tuple(f for f in term.factors if f is not unknown[0])
        part = summed([Term(1, others, term.over)], (T_AXIS,), sizes)
        part = part if term.sign < 0 else b.neg(part)
        total = part if total is None else b.add(total, part)
    return total


class _Affine:
    """An affine function of the weights as a sum of products, nothing added up: axes that are summed over get names
    of their own, so that products can be taken further.
    """

    def __init__(self, weights: Mapping[str, PerTokenWeights], moved: dict[Expr, Expr]) -> None:
        self.weights, self.moved, self.hidden = weights, moved, 0

    def of(self, e: Expr) -> tuple[Term, ...]:
        declared = [x for x in leaves([e]) if x.name in self.weights]
        if e not in depends_on([e], declared):
            return (Term(1, tuple(vectorize_over_tokens([e], T_AXIS, self.moved))),)
        if e.op == "leaf":
            moving = self.weights[e.name]
            to = dict(zip(moving.axes, e.axes, strict=True))
            return tuple(t.renamed(to) for t in moving.terms)
        return tuple(getattr(self, f"_{e.op}")(e))

    def _add(self, e: Expr) -> Sequence[Term]:
        return [t for s in e.src for t in self.of(s)]

    def _neg(self, e: Expr) -> Sequence[Term]:
        return [replace(t, sign=-t.sign) for t in self.of(e.src[0])]

    def _sub(self, e: Expr) -> Sequence[Term]:
        return [*self.of(e.src[0]), *(replace(t, sign=-t.sign) for t in self.of(e.src[1]))]

    def _mul(self, e: Expr) -> Sequence[Term]:
        x, y = (self.of(s) for s in e.src)
        return [s.times(t) for s in x for t in y]

    def _div(self, e: Expr) -> Sequence[Term]:
        (below,) = vectorize_over_tokens([e.src[1]], T_AXIS, self.moved)
        return [t.times(Term(1, (b.div(const(1), below),))) for t in self.of(e.src[0])]

    def _contract(self, e: Expr) -> Sequence[Term]:
        product = [Term(1, ())]
        for s in e.src:
            product = [p.times(t) for p in product for t in self.of(s)]
        return self._summed_over(product, e.arg)

    def _sum(self, e: Expr) -> Sequence[Term]:
        return self._summed_over(self.of(e.src[0]), e.arg)

    def _mean(self, e: Expr) -> Sequence[Term]:
        sizes = tuple(b.div(const(1), b.size(a)) for a in e.arg)
        return [t.scaled(*sizes) for t in self._summed_over(self.of(e.src[0]), e.arg)]

    def _rename(self, e: Expr) -> Sequence[Term]:
        return [t.renamed(dict(e.arg)) for t in self.of(e.src[0])]

    def _broadcast(self, e: Expr) -> Sequence[Term]:
        return self.of(e.src[0])

    def _summed_over(self, terms: Sequence[Term], over: Sequence[Axis]) -> Sequence[Term]:
        self.hidden += 1
        names = {a: Axis(suffixed(a.name, str(self.hidden)), a.size) for a in over}
        return [t.summed(over).renamed(names) for t in terms]
