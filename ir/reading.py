"""Reading through weights that differ from token to token, kept as sums of products.

Token t reads x_t through W_t = W - sum over s <= t of A[t, s] * outer(X_s, d_s). Kept factored, that is a contraction
of x, A, X and d, and the cheapest order of it is the dual form (ir/contraction.py):

    z[t] = x @ W_t                       token by token, a D x F matrix for each t
    ->
    z[m] = x @ W - (A * (x @ X.T)) @ d   a bias is the same with x = X = 1, hence A * (x @ X.T + 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tttc.ir import build as b
from tttc.ir.contraction import ordered
from tttc.ir.expr import Axes, Axis, Expr, const, leaf, postorder, rebuild, transform
from tttc.ir.program import T_AXIS


@dataclass(frozen=True)
class Term:
    """sign * the product of the factors, summed over the axes `over`, whether a factor has them or not: what a
    mini-batch adds is a sum over its tokens also where it is the same for every token.
    """

    sign: int
    factors: tuple[Expr, ...]
    over: Axes = ()

    def times(self, other: Term) -> Term:
        return Term(self.sign * other.sign, (*self.factors, *other.factors), (*self.over, *other.over))

    def scaled(self, *factors: Expr) -> Term:
        """With further factors, which may have the axes that it is summed over."""
        return replace(self, factors=(*factors, *self.factors))

    def summed(self, over: Sequence[Axis]) -> Term:
        """Summed over further axes."""
        return replace(self, over=(*self.over, *over))

    def mapped(self, function: Callable[[Expr], Expr]) -> Term:
        return replace(self, factors=tuple(function(f) for f in self.factors))

    def renamed(self, to: Mapping[Axis, Axis]) -> Term:
        factors = tuple(b.rename(f, to) for f in self.factors)
        return Term(self.sign, factors, tuple(to.get(a, a) for a in self.over))


@dataclass(frozen=True)
class PerTokenWeights:
    """Weights that differ from token to token: a sum of products, never multiplied out."""

    axes: Axes
    terms: tuple[Term, ...]

    @property
    def of_tokens(self) -> bool:
        """Whether they do differ: weights at a mini-batch's end are the same for all that read them."""
        return any(T_AXIS in f.axes for t in self.terms for f in t.factors)


# -- tokens --------------------------------------------------------------------------------------------------------


def vectorize_over_tokens(roots: Sequence[Expr], axis: Axis, moved: dict[Expr, Expr]) -> list[Expr]:
    """Per-token expressions over all tokens of a chunk: named axes make this one more axis on the token leaves."""
    return transform(roots, lambda e, src: at_chunk(e, axis) if e.op == "leaf" else rebuild(e, src), moved)


def at_chunk(e: Expr, axis: Axis) -> Expr:
    """k -> k[c] with a token axis; leaves that are no sequences stay as they are."""
    return leaf(e.name, e.role, (axis, *e.axes), "c") if is_sequence(e) else e


def is_sequence(e: Expr) -> bool:
    return e.op == "leaf" and e.role in ("token", "gate", "output")


# -- gradients as products ---------------------------------------------------------------------------------------------


def terms_of(g: Expr, axes: Axes) -> tuple[Term, ...]:
    """A gradient taken apart: sums into terms, outer products into factors. A vector is one factor."""
    match g:
        case Expr("add", (x, y)) if len(axes) > 1:
            return (*terms_of(x, axes), *terms_of(y, axes))
        case Expr("sub", (x, y)) if len(axes) > 1:
            return (*terms_of(x, axes), *(replace(t, sign=-t.sign) for t in terms_of(y, axes)))
        case Expr("neg", (x,)):
            return tuple(replace(t, sign=-t.sign) for t in terms_of(x, axes))
        case Expr("rename", (x,), arg) if len(axes) > 1:
            back = {new: old for old, new in arg}
            inner = terms_of(x, tuple(back.get(a, a) for a in axes))
            return tuple(t.renamed(dict(arg)) for t in inner)
        case Expr("broadcast", (x,)) if len(axes) > 1:
            return terms_of(x, x.axes)  # the same along the axes that it lacks
        case Expr("contract", src, ()) if len(axes) > 1:
            return (Term(1, tuple(f for s in src for f in _factors(s))),)
        case Expr("mul", (x, y)) if len(axes) > 1 and g.op == "mul":
            return tuple(p.times(q) for p in terms_of(x, x.axes) for q in terms_of(y, y.axes))
    return (Term(1, (g,)),)


def _factors(e: Expr) -> tuple[Expr, ...]:
    match e:
        case Expr("contract", src, ()):
            return tuple(f for s in src for f in _factors(s))
    return (e,)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_through(
    output: Expr, weights: Mapping[str, PerTokenWeights | Expr], sizes: Mapping[str, int], moved: dict[Expr, Expr]
) -> Expr:
    """Evaluate the output on weights that move: contractions take a sum of products apart, anything else multiplies it
    out.
    """
    done: dict[Expr, PerTokenWeights | Expr] = {}
    for node in postorder([output]):
        src = tuple(done[s] for s in node.src)
        if node.op == "leaf" and node.name in weights:
            declared = weights[node.name]
            to = dict(zip(declared.axes, node.axes, strict=True))
            done[node] = _renamed(declared, to)
        elif any(isinstance(s, PerTokenWeights) for s in src):
            done[node] = _on_moving(node, src, sizes)
        else:
            done[node] = rebuild(node, src)  # type: ignore[arg-type]
    for origin, node in moved.items():
        value = done.get(node)
        if isinstance(value, Expr):
            moved[origin] = value
    return materialize(done[output], sizes)


def _renamed(e: PerTokenWeights | Expr, to: Mapping[Axis, Axis]) -> PerTokenWeights | Expr:
    if isinstance(e, Expr):
        return b.rename(e, to)
    return PerTokenWeights(tuple(to.get(a, a) for a in e.axes), tuple(t.renamed(to) for t in e.terms))


class NoExactForm(Exception):
    """A rule or a read point without an exact form over a chunk: why, what to write instead, and the value at fault."""

    def __init__(self, why: str, instead: str, node: Expr | None = None) -> None:
        super().__init__(why)
        self.why, self.instead, self.node = why, instead, node


def nonlinear_use(output: Expr, states: Sequence[Expr], sizes: Mapping[str, int]) -> Expr | None:
    """The value that uses a matrix of weights nonlinearly: weights of every token then have to be multiplied out."""
    weights = {}
    for w in states:
        of_token = leaf(w.name, w.role, (T_AXIS, *w.axes), "c")
        weights[w.name] = PerTokenWeights(w.axes, (Term(1, (of_token,)),))
    (over,) = vectorize_over_tokens([output], T_AXIS, {})
    try:
        read_through(over, weights, sizes, {})
    except NoExactForm as reason:
        return reason.node
    return None


def _on_moving(node: Expr, src: tuple[PerTokenWeights | Expr, ...], sizes: Mapping[str, int]) -> PerTokenWeights | Expr:
    moving = [s for s in src if isinstance(s, PerTokenWeights)]
    axes = tuple(a for a in node.axes if a != T_AXIS)
    if node.op == "rename":
        return _renamed(moving[0], dict(node.arg))
    if node.op == "contract":
        first = src.index(moving[0])
        others = [materialize(s, sizes) for i, s in enumerate(src) if i != first]
        return summed([t.scaled(*others).summed(node.arg) for t in moving[0].terms], axes, sizes)
    if node.op == "sum":
        return summed([t.summed(node.arg) for t in moving[0].terms], axes, sizes)
    if node.op == "neg":
        return PerTokenWeights(moving[0].axes, tuple(replace(t, sign=-t.sign) for t in moving[0].terms))
    if node.op == "mul" and len(moving) == 1 and len(moving[0].axes) > 1:
        (other,) = (s for s in src if isinstance(s, Expr))
        return PerTokenWeights(axes, tuple(t.scaled(other) for t in moving[0].terms))
    if node.op in ("add", "sub") and any(len(m.axes) > 1 for m in moving):
        x, y = (s.terms if isinstance(s, PerTokenWeights) else (Term(1, (s,)),) for s in src)
        sign = 1 if node.op == "add" else -1
        return PerTokenWeights(axes, (*x, *(replace(t, sign=sign * t.sign) for t in y)))
    if any(len(m.axes) > 1 and m.of_tokens for m in moving):
        raise NoExactForm(
            f"`{node.op}` uses a matrix of fast weights nonlinearly, and every token reads weights of its own: they "
            "would have to be multiplied out, one matrix for each token",
            'Set read = "start" or "end", or mini_batch = 1, or write the learner as products of vectors and weights.',
            node,
        )
    return rebuild(node, tuple(materialize(s, sizes) for s in src))


def materialize(e: PerTokenWeights | Expr, sizes: Mapping[str, int]) -> Expr:
    """The weights of every token multiplied out: cheap for a vector, exact for anything."""
    return e if isinstance(e, Expr) else summed(e.terms, e.axes, sizes)


def summed(terms: Sequence[Term], axes: Axes, sizes: Mapping[str, int]) -> Expr:
    """A sum of products as an expression with the given axes, and a reading-token axis where a factor has one."""
    result: Expr | None = None
    for term in terms:
        out = (T_AXIS, *axes) if any(T_AXIS in f.axes for f in term.factors) else axes
        product = _product(term, out, sizes)
        if result is None:
            result = product if term.sign > 0 else b.neg(product)
        else:
            result = (b.add if term.sign > 0 else b.sub)(result, product)
    assert result is not None
    return b.broadcast(result, axes)


def _product(term: Term, out: Axes, sizes: Mapping[str, int]) -> Expr:
    """One product, taken in the cheapest order: times the size of an axis that it is summed over and no factor has."""
    present = dict.fromkeys(a for f in term.factors for a in f.axes)
    undeclared = [str(a) for a in present if a not in out and a not in term.over]
    assert not undeclared, f"a product with an axis {', '.join(undeclared)} that is neither kept nor summed over"
    numbers = [f for f in term.factors if f.op == "const"]
    numbers += [b.size(a) for a in term.over if a not in present]
    others = [f for f in term.factors if f.op != "const"]
    product = ordered(others, out, sizes) if others else const(1)
    for number in numbers:
        product = b.mul(number, product)
    return product
