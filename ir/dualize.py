"""The dual form: the mini-batch at once, without the weights of any single token.

Token t reads x_t through W_t = W - tau_t * sum_{s <= t} lr_s * outer(X_s, d_s). Kept factored, that read is a
contraction of x, the coefficients A, X and d, and the cheapest order of it is the dual form (ir/contraction.py):

    z[t] = x @ W_t                       token by token, a D x F matrix for each t
    ->
    A: f64[C, C] = tril(outer(tau[m], lr[m]))
    z[m] = x @ W - (A * (x @ X.T)) @ d   a bias is the same with x = X = 1, hence A * (x @ X.T + 1)
    W = W - (eta[:, None] * X).T @ d     eta = tau of the last token * lr

`read` is only the mask of A: lower triangle (after), strict lower triangle (before), nothing (start), everything (end).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tttc.ir import build as b
from tttc.ir.contraction import ordered
from tttc.ir.expr import Axes, Axis, Expr, Leaf, const, postorder, rebuild, transform
from tttc.ir.primal import loop_params, per_token
from tttc.ir.program import S_AXIS, T_AXIS, Allocate, Assign, Block, For, Function, Program, Update
from tttc.ir.simplify import renamed_hints, simplify

DEFAULT_CHUNK = 64  # assumed length of a chunk where the mini-batch is the whole sequence


@dataclass(frozen=True)
class Term:
    """A product of factors, summed over the axes that the result lacks, with a sign."""

    sign: int
    factors: tuple[Expr, ...]

    def times(self, other: Term) -> Term:
        return Term(self.sign * other.sign, (*self.factors, *other.factors))

    def renamed(self, to: Mapping[Axis, Axis]) -> Term:
        return Term(self.sign, tuple(b.rename(f, to) for f in self.factors))


@dataclass(frozen=True)
class Moving:
    """Weights that differ from token to token: a sum of products, never multiplied out."""

    axes: Axes
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class ChunkForm:
    """What one chunk computes, over its source tokens s and its reading tokens t."""

    z: Assign
    growth: dict[str, tuple[Term, ...]]
    """Per state, sum over s of lr_s * g_s as products: what the chunk adds to the open mini-batch's sum."""
    moved: dict[Expr, Expr]


def dualize(program: Program) -> Program:
    """From the loop over tokens to one block per mini-batch."""
    update = program.update
    assert update is not None
    sizes = chunk_sizes(program)
    form = chunk_form(program, sizes, sums=None)
    stores = [Assign(form.z.target, form.z.value)]
    closed = [Assign(w, closed_weights(update, w, form.growth[w.arg[0].name], sizes)) for w in update.states]
    assigns, names, _ = finished([*stores, *closed], renamed_hints(program.names, form.moved))
    step = "T" if update.mini_batch == "all" else update.mini_batch
    body = (Allocate(form.z.target), For("c", "T", step, (Block(assigns),)))
    params = tuple(at_chunk(p, T_AXIS) for p in loop_params(program))
    function = Function(program.name, params, body, (form.z.target, *update.states))
    return replace(program, stage="dualize", functions=(function,), names=names)


def chunk_sizes(program: Program) -> dict[str, int]:
    """Sizes for the cost of contractions: the dims, and the chunk."""
    assert program.update is not None
    b_ = program.update.mini_batch
    return {**program.dims, "C": DEFAULT_CHUNK if b_ == "all" else min(int(b_), DEFAULT_CHUNK)}


def finished(
    assigns: Sequence[Assign], names: Mapping[Expr, str], fired: Counter[str] | None = None
) -> tuple[tuple[Assign, ...], dict[Expr, str], dict[Expr, Expr]]:
    """Simplify assignments together, so that what they share stays one node; names follow their values."""
    moved: dict[Expr, Expr] = {}
    values = simplify([a.value for a in assigns], fired, moved)
    done = tuple(Assign(a.target, v) for a, v in zip(assigns, values, strict=True))
    return done, {**names, **renamed_hints(names, moved)}, moved


# -- one chunk -------------------------------------------------------------------------------------------------------


def chunk_form(program: Program, sizes: Mapping[str, int], sums: Mapping[str, Expr] | None) -> ChunkForm:
    """The chunk's output and growth. `sums` holds, per state, what the open mini-batch has added before this chunk."""
    update = program.update
    assert update is not None
    gradients, output = per_token(program)
    moved: dict[Expr, Expr] = {}
    names = [_name(w) for w in update.states]
    at_source = dict(zip(names, over_chunk([gradients[n] for n in names], S_AXIS, moved), strict=True))
    raw = {n: _terms(g, w.axes) for (n, g), w in zip(at_source.items(), update.states, strict=True)}
    growth = {n: tuple(_with_rate(update.lr[n], S_AXIS, t) for t in terms) for n, terms in raw.items()}
    weights = {n: _read_weights(update, w, raw[n], sums) for n, w in zip(names, update.states, strict=True)}
    (reading,) = over_chunk([output.value], T_AXIS, moved)
    z = _read(reading, weights, sizes, moved)
    return ChunkForm(Assign(at_chunk(output.target, T_AXIS), z), growth, moved)


def closed_weights(update: Update, w: Expr, growth: Sequence[Term], sizes: Mapping[str, int]) -> Expr:
    """The weights that a whole mini-batch hands on: W - tau of its last token * its sum."""
    tau = update.tau[_name(w)]
    if tau is not None and tau.op != "const":
        tau = b.last(at_chunk(tau, T_AXIS), T_AXIS) if _is_sequence(tau) else tau
    factors = () if tau is None else (tau,)
    return _summed([Term(1, (w,)), *(Term(-t.sign, (*factors, *t.factors)) for t in growth)], w.axes, sizes)


def grown_sum(s: Expr, growth: Sequence[Term], sizes: Mapping[str, int]) -> Expr:
    """The sum of the open mini-batch after this chunk."""
    return _summed([Term(1, (s,)), *growth], s.axes, sizes)


def over_chunk(roots: Sequence[Expr], axis: Axis, moved: dict[Expr, Expr]) -> list[Expr]:
    """Per-token expressions over all tokens of a chunk: named axes make this one more axis on the token leaves."""
    return transform(roots, lambda e, src: at_chunk(e, axis) if e.op == "leaf" else rebuild(e, src), moved)


def at_chunk(e: Expr, axis: Axis) -> Expr:
    """k -> k[c] with a token axis; leaves that are no sequences stay as they are."""
    if not _is_sequence(e):
        return e
    found, axes = e.arg
    return Expr("leaf", (), (Leaf(found.name, found.role, "c"), (axis, *axes)))


def _is_sequence(e: Expr) -> bool:
    return e.op == "leaf" and e.arg[0].role in ("token", "gate", "output")


def _name(e: Expr) -> str:
    return str(e.arg[0].name)


# -- gradients as products ---------------------------------------------------------------------------------------------


def _terms(g: Expr, axes: Axes) -> tuple[Term, ...]:
    """A gradient taken apart: sums into terms, outer products into factors. A vector is one factor."""
    match g:
        case Expr("add", (x, y)) if len(axes) > 1:
            return (*_terms(x, axes), *_terms(y, axes))
        case Expr("sub", (x, y)) if len(axes) > 1:
            return (*_terms(x, axes), *(replace(t, sign=-t.sign) for t in _terms(y, axes)))
        case Expr("neg", (x,)):
            return tuple(replace(t, sign=-t.sign) for t in _terms(x, axes))
        case Expr("rename", (x,), arg) if len(axes) > 1:
            back = {new: old for old, new in arg}
            inner = _terms(x, tuple(back.get(a, a) for a in axes))
            return tuple(t.renamed(dict(arg)) for t in inner)
        case Expr("contract", src, ()) if len(axes) > 1:
            return (Term(1, tuple(f for s in src for f in _factors(s))),)
        case Expr("mul", (x, y)) if len(axes) > 1 and g.op == "mul":
            return tuple(p.times(q) for p in _terms(x, x.axes) for q in _terms(y, y.axes))
    return (Term(1, (g,)),)


def _factors(e: Expr) -> tuple[Expr, ...]:
    match e:
        case Expr("contract", src, ()):
            return tuple(f for s in src for f in _factors(s))
    return (e,)


def _with_rate(rate: Expr, axis: Axis, term: Term) -> Term:
    """The learning rate of each source token as one more factor."""
    return Term(term.sign, (at_chunk(rate, axis), *term.factors))


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_weights(update: Update, w: Expr, terms: Sequence[Term], sums: Mapping[str, Expr] | None) -> Moving | Expr:
    """The weights that each token t reads, as a sum of products."""
    if update.read == "start":
        return w
    name = _name(w)
    tau = None if update.tau[name] is None else at_chunk(update.tau[name], T_AXIS)  # type: ignore[arg-type]
    scale = () if tau is None else (tau,)
    result = [Term(1, (w,))]
    if sums is not None:
        result.append(Term(-1, (*scale, sums[name])))
    coefficients = _coefficients(update, name, tau)
    result += [Term(-t.sign, (*coefficients, *t.factors)) for t in terms]
    return Moving(w.axes, tuple(result))


def _coefficients(update: Update, name: str, tau: Expr | None) -> tuple[Expr, ...]:
    """The matrix A over (reading token, source token), or its factors where no mask ties them together."""
    lr = at_chunk(update.lr[name], S_AXIS)
    if update.read == "end":
        return (lr,) if tau is None else (tau, lr)
    if tau is None or not tau.axes or not lr.axes:
        pair = lr if tau is None else b.mul(tau, lr)
    else:
        pair = b.contract((tau, lr), ())
    square = b.broadcast(pair, (T_AXIS, S_AXIS))
    return (b.mask(square, T_AXIS, S_AXIS, strict=update.read == "before"),)


def _read(
    output: Expr, weights: Mapping[str, Moving | Expr], sizes: Mapping[str, int], moved: dict[Expr, Expr]
) -> Expr:
    """Evaluate the output on weights that move: contractions take a sum of products apart, anything else multiplies it
    out.
    """
    done: dict[Expr, Moving | Expr] = {}
    for node in postorder([output]):
        src = tuple(done[s] for s in node.src)
        if node.op == "leaf" and node.arg[0].name in weights:
            declared = weights[node.arg[0].name]
            to = dict(zip(declared.axes, node.axes, strict=True))
            done[node] = _renamed(declared, to)
        elif any(isinstance(s, Moving) for s in src):
            done[node] = _on_moving(node, src, sizes)
        else:
            done[node] = rebuild(node, src)  # type: ignore[arg-type]
    for origin, node in moved.items():
        value = done.get(node)
        if isinstance(value, Expr):
            moved[origin] = value
    return _still(done[output], sizes)


def _renamed(e: Moving | Expr, to: Mapping[Axis, Axis]) -> Moving | Expr:
    if isinstance(e, Expr):
        return b.rename(e, to)
    return Moving(tuple(to.get(a, a) for a in e.axes), tuple(t.renamed(to) for t in e.terms))


def _on_moving(node: Expr, src: tuple[Moving | Expr, ...], sizes: Mapping[str, int]) -> Moving | Expr:
    moving = [s for s in src if isinstance(s, Moving)]
    if node.op == "rename":
        return _renamed(moving[0], dict(node.arg))
    if node.op == "contract":
        first = next(i for i, s in enumerate(src) if isinstance(s, Moving))
        others = [_still(s, sizes) for i, s in enumerate(src) if i != first]
        moving_operand = src[first]
        assert isinstance(moving_operand, Moving)
        out = [a for a in node.axes if a != T_AXIS]
        products = [Term(t.sign, (*others, *t.factors)) for t in moving_operand.terms]
        return _summed(products, tuple(out), sizes)
    if node.op == "neg":
        return Moving(moving[0].axes, tuple(replace(t, sign=-t.sign) for t in moving[0].terms))
    if node.op == "mul" and len(moving) == 1 and len(moving[0].axes) > 1:
        (other,) = (s for s in src if isinstance(s, Expr))
        axes = tuple(a for a in node.axes if a != T_AXIS)
        return Moving(axes, tuple(Term(t.sign, (other, *t.factors)) for t in moving[0].terms))
    if node.op in ("add", "sub") and len(moving) == 2 and len(node.axes) > 1:
        x, y = moving
        sign = 1 if node.op == "add" else -1
        return Moving(node.axes, (*x.terms, *(replace(t, sign=sign * t.sign) for t in y.terms)))
    return rebuild(node, tuple(_still(s, sizes) for s in src))


def _still(e: Moving | Expr, sizes: Mapping[str, int]) -> Expr:
    """The weights of every token multiplied out: cheap for a vector, exact for anything."""
    return e if isinstance(e, Expr) else _summed(e.terms, e.axes, sizes)


def _summed(terms: Sequence[Term], axes: Axes, sizes: Mapping[str, int]) -> Expr:
    """A sum of products as an expression with the given axes, and a reading-token axis where a factor has one."""
    result: Expr | None = None
    for term in terms:
        out = (T_AXIS, *axes) if any(T_AXIS in f.axes for f in term.factors) else axes
        product = _product(term.factors, out, sizes)
        if result is None:
            result = product if term.sign > 0 else b.neg(product)
        else:
            result = (b.add if term.sign > 0 else b.sub)(result, product)
    assert result is not None
    if len(terms) == 1 and set(axes) - set(result.axes):
        return b.broadcast(result, axes)
    return result


def _product(factors: Sequence[Expr], out: Axes, sizes: Mapping[str, int]) -> Expr:
    numbers = [f for f in factors if f.op == "const"]
    others = [f for f in factors if f.op != "const"]
    product = ordered(others, out, sizes) if others else const(1)
    for number in numbers:
        product = b.mul(number, product)
    return product
