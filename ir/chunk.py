"""A chunk of tokens at once, without the weights of any single token.

Three things come together. The update rule over a chunk is a matrix of coefficients A (ir/response.py). A gradient is a
product outer(X_s, d_s), whose rows are those of the mini-batch's start, or the solution of a triangular system
(ir/online.py). Reading through W_t = a_t * W - sum over s of A[t, s] * outer(X_s, d_s) is a contraction, taken in the
cheapest order (ir/reading.py):

    A: f64[C, C] = tril(outer(tau[m], lr[m]))
    z[m] = x @ W - (A * (x @ X.T)) @ d   a bias is the same with x = X = 1, hence A * (x @ X.T + 1)
    W = W - (eta[:, None] * X).T @ d     eta = tau of the last token * lr

`read` chooses among the responses: x_t (after), x_{t-1} (before), x of the last token (end), or what was found (start).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from tttc.ir import build as b
from tttc.ir.expr import TOKENS, Expr, leaf
from tttc.ir.names import own
from tttc.ir.online import affine_unknown, factor_constants, named_like, solved, unknown_rows, unnamed
from tttc.ir.primal import per_token
from tttc.ir.program import S_AXIS, T_AXIS, Assign, DualProgram, Update, blocks
from tttc.ir.reading import (
    PerTokenWeights,
    Term,
    at_chunk,
    materialize,
    read_through,
    summed,
    terms_of,
    vectorize_over_tokens,
)
from tttc.ir.response import GRADIENT, ChunkAlgebra, Response, coefficients, held
from tttc.ir.substitution import PAST, Substitution, rows_given, substitution
from tttc.ir.update import (
    COUNT,
    Advanced,
    Carried,
    Ending,
    accumulated,
    added_leaf,
    advance,
    average_leaf,
    averaged_gates,
    changed_rates,
    clip_scale,
    ended,
    is_staged,
    momentum_leaf,
    scale_leaf,
)

DEFAULT_CHUNK = 64  # assumed length of a chunk where the mini-batch is the whole sequence
Gradients = Mapping[str, tuple[Term, ...]]


@dataclass(frozen=True)
class ChunkForm:
    """What one chunk computes: the outputs, and the new values of what it carries."""

    z: Assign
    updates: tuple[Assign, ...]
    moved: dict[Expr, Expr]
    measures: tuple[Assign, ...] = ()


def whole_form(program: DualProgram, sizes: Mapping[str, int], *, rows: bool = False) -> ChunkForm:
    """A chunk that is a whole mini-batch, or any chunk where its boundaries cannot be observed.

    With `rows` the factors of its gradients are given (ir/substitution.py).
    """
    chunk = Chunk(program, sizes, opened=False, rows=rows)
    ends = chunk.closed()
    return ChunkForm(chunk.output(), (*ends, *chunk.memories()), chunk.moved, chunk.measures())


def open_form(program: DualProgram, sizes: Mapping[str, int]) -> ChunkForm:
    """A tile of a mini-batch that began at the weights W, from what it has added so far to what it has added after."""
    chunk = Chunk(program, sizes, opened=True)
    return ChunkForm(chunk.output(), (*chunk.grown(), *chunk.memories()), chunk.moved, chunk.measures())


def chunk_substitution(program: DualProgram, sizes: Mapping[str, int]) -> Substitution:
    """What gives the rows of a chunk whose gradients are online and not affine."""
    chunk = Chunk(program, sizes, opened=False)
    states = dict(chunk._states())
    return substitution(
        states, {n: chunk._anchor(n) for n in states}, chunk.raw, {**sizes, PAST.size: sizes[TOKENS], TOKENS: 1}
    )


class Chunk:
    """The update rule over one chunk. `opened`: the chunk is part of a mini-batch that other chunks share."""

    def __init__(self, program: DualProgram, sizes: Mapping[str, int], *, opened: bool, rows: bool = False) -> None:
        self.given = rows
        self.program, self.sizes, self.opened = program, sizes, opened
        self.declared = program.update
        self.moved: dict[Expr, Expr] = {}
        self.update = rates_over_chunk(program.update)
        self.algebra = ChunkAlgebra()
        self.starts: dict[str, PerTokenWeights | Expr] = {w.name: w for w in self.declared.states}
        gradients, self.reading = per_token(program)
        self.raw = {n: terms_of(gradients[n], w.axes) for n, w in self._states()}
        if self.declared.anchor == "token":
            self.raw = factor_constants(self.raw, self.declared.states)
        self.advanced = {n: self._advanced(w) for n, w in self._states()}
        self.rows: dict[str, tuple[Term, ...]] | None = None

    def _states(self) -> list[tuple[str, Expr]]:
        return [(w.name, w) for w in self.declared.states]

    def _advanced(self, w: Expr) -> Advanced:
        """The rule of one state over the chunk, as responses."""
        momentum = momentum_leaf(self.update, w) if self.update.per == "token" else None
        average = average_leaf(self.update, w)
        scale = scale_leaf(self.declared, w) if self.opened else None
        carried = Carried(
            start=w,
            added=held(added_leaf(w)) if self.opened else None,
            scale=scale,
            momentum=None if momentum is None else held(momentum),
            average=None if average is None else held(average),
        )
        return advance(self.update, w.name, carried, GRADIENT, self.algebra)

    # -- gradients

    def gradients(self) -> dict[str, tuple[Term, ...]]:
        """Per state, the gradients of the source tokens as products."""
        if self.rows is None:
            self.rows = self._clipped(self._found())
        return self.rows

    def _found(self) -> dict[str, tuple[Term, ...]]:
        update = self.declared
        if update.anchor == "token":
            kind = self.program.gradients
            if self.given:
                return rows_given(self.raw)
            if kind.kind == "affine":
                return self.solved_rows()
            if kind.sequential:
                return self._at({n: self._found_weights(w, decayed=True) for n, w in self._states()})
        if update.decay_first:  # a mini-batch of one token: its start is what the token before left
            return self._at({n: self._found_weights(w, decayed=True) for n, w in self._states()})
        for _ in range(update.steps - 1):
            self.rows = self._clipped(self._at(self.starts))
            self.starts = dict(self._next_starts())
        self.rows = None
        return self._at(self.starts)

    def solved_rows(self) -> dict[str, tuple[Term, ...]]:
        """Online gradients, by a triangular system."""
        unknown = affine_unknown(self.raw, self.declared.states)
        if unknown is None:
            return self._at(self.starts)
        rows = unknown_rows(unknown)
        terms = {n: self._at_sources(n, {unknown: rows}) for n in self.raw}
        anchors = {n: self._moving(w, self._anchor(n), terms) for n, w in self._states()}
        value = solved(unknown, anchors, self.sizes, self.moved)
        return {n: self._at_sources(n, {unknown: value}) for n in self.raw}

    def _anchor(self, name: str) -> Response:
        """The weights at which the gradient of each token is taken: W_{t-1}, or alpha_t * W_{t-1}."""
        before: Response = self.advanced[name].weights.before()
        decay = self.update.decay.get(name)
        return self.algebra.scaled(before, decay) if self.declared.decay_first and decay is not None else before

    def _found_weights(self, w: Expr, *, decayed: bool) -> Expr:
        """The weights that a chunk of one token finds, `decayed` by its own decay where that comes first; else what it
        reads there, so that its tau scales what the mini-batch has added.
        """
        n = w.name
        start: Expr = w
        if self.opened:
            scale, tau, added = scale_leaf(self.declared, w), self.update.tau.get(n), added_leaf(w)
            if tau is not None and not decayed:
                added = b.mul(b.last(tau, T_AXIS), added)
            start = b.sub(w if scale is None else b.mul(scale, w), added)
        decay = self.update.decay.get(n)
        if decayed and self.declared.decay_first and decay is not None:
            start = b.mul(b.last(decay, T_AXIS) if T_AXIS in decay.axes else decay, start)
        return start

    def _at(self, weights: Mapping[str, PerTokenWeights | Expr]) -> dict[str, tuple[Term, ...]]:
        """The gradients of all tokens at weights that they share."""
        if all(isinstance(x, Expr) and x.op == "leaf" for x in weights.values()):
            return {n: self._at_sources(n, {}) for n in self.raw}
        result = {}
        for n, terms in self.raw.items():
            result[n] = tuple(t.mapped(lambda f: self._read_at(f, weights)) for t in terms)
        return result

    def _read_at(self, factor: Expr, weights: Mapping[str, PerTokenWeights | Expr]) -> Expr:
        (over,) = vectorize_over_tokens([factor], T_AXIS, {})
        return b.rename(read_through(over, weights, self.sizes, {}), {T_AXIS: S_AXIS})

    def _at_sources(self, name: str, given: Mapping[Expr, Expr]) -> tuple[Term, ...]:
        """The gradient's factors at the source tokens, some of them given."""
        result = []
        for t in self.raw[name]:
            factors = [
                named_like(f, given[unnamed(f)])
                if unnamed(f) in given
                else vectorize_over_tokens([f], S_AXIS, self.moved)[0]
                for f in t.factors
            ]
            for f, value in given.items():
                self.moved[f] = value
            result.append(replace(t, factors=tuple(factors)))
        return tuple(result)

    def _clipped(self, found: dict[str, tuple[Term, ...]]) -> dict[str, tuple[Term, ...]]:
        """Gradients scaled down to the norm `clip`: of a product that is the product of the norms."""
        if self.declared.clip is None:
            return found
        squares = []
        for n, w in self._states():
            for x in found[n]:
                squares += [x.times(y).summed(w.axes) for y in found[n]]
        scale = clip_scale([summed(squares, (S_AXIS,), self.sizes)], self.declared.clip)
        return {n: tuple(t.scaled(scale) for t in terms) for n, terms in found.items()}

    # -- weights

    def _moving(self, w: Expr, response: Response, gradients: Gradients) -> PerTokenWeights:
        """Weights as sums of products: what was found, and the gradients times their coefficients."""
        terms = []
        for p in response.parts:
            coefficient = () if p.coefficient is None else (p.coefficient,)
            terms.append(Term(p.sign, (*coefficient, *p.held)))
        for sign, factors in coefficients(response):
            kernel = Term(sign, factors, (S_AXIS,))
            terms += [kernel.times(t) for t in gradients[w.name]]
        return PerTokenWeights(w.axes, tuple(terms))

    def _at_end(self, w: Expr, response: Response) -> Expr:
        """What a response is after the last token."""
        return materialize(self._moving(w, response.last(), self.gradients()), self.sizes)

    def _scaled_by_tau(self, added: Response, name: str, *, last: bool = False) -> Response:
        tau = self.update.tau.get(name)
        if tau is None:
            return added
        return self.algebra.scaled(added, b.last(tau, T_AXIS) if last and T_AXIS in tau.axes else tau)

    def _next_starts(self) -> dict[str, PerTokenWeights | Expr]:
        """The weights after one step on a whole mini-batch, where the next step begins; kept as products."""
        if is_staged(self.declared) or any(m is not None for m in self.declared.momentum.values()):
            return {a.leaf.name: a.value for a in self._ended()}
        return {n: self._left(w) for n, w in self._states()}

    def _left(self, w: Expr) -> PerTokenWeights:
        """The weights after the last token of the chunk, without the stages that act there."""
        a = self.advanced[w.name]
        end = self.algebra.minus(a.started.last(), self._scaled_by_tau(a.added.last(), w.name, last=True))
        return PerTokenWeights(w.axes, self._from_start(w.name, self._moving(w, end, self.gradients()).terms))

    def _from_start(self, name: str, terms: Sequence[Term]) -> tuple[Term, ...]:
        """Terms in the weights at the mini-batch's start, where the leaf of the weights stands for a later step's."""
        start = self.starts[name]
        leaf_ = next(w for n, w in self._states() if n == name)
        result: list[Term] = []
        for t in terms:
            if leaf_ not in t.factors:
                result.append(t)
                continue
            others = replace(t, factors=tuple(f for f in t.factors if f is not leaf_))
            started = start.terms if isinstance(start, PerTokenWeights) else (Term(1, (start,)),)
            result += [others.times(s) for s in started]
        return tuple(result)

    def closed(self) -> tuple[Assign, ...]:
        """The weights that the mini-batch hands on, and what changes only there."""
        if is_staged(self.declared):
            return self._ended()
        return tuple(Assign(w, materialize(self._left(w), self.sizes)) for w in self.declared.states)

    def _ended(self) -> tuple[Assign, ...]:
        """The same through the stages that act where a mini-batch ends."""
        ends = {}
        self.gradients()  # of the last step, with where that begins
        for n, w in self._states():
            a, base = self.advanced[n], accumulated(self.declared, w)
            started = a.started.last()
            start = base if base is not w else materialize(self.starts[n], self.sizes)
            factors = [f for p in started.parts for f in (*p.held, p.coefficient) if f is not None and f is not w]
            for f in factors:
                start = b.mul(f, start)
            tau = self.update.tau.get(n)
            if tau is not None and T_AXIS in tau.axes:
                tau = b.last(tau, T_AXIS)
            ends[n] = Ending(start, self._at_end(w, a.added), tau)
        means = {}
        for gate, sum_ in averaged_gates(self.declared).items():
            total, count = b.total(at_chunk(gate, T_AXIS), (T_AXIS,)), b.size(T_AXIS)
            if self.opened:
                total, count = b.add(sum_, total), b.add(COUNT, count)
            means[gate] = b.div(total, count)
        return ended(self.declared, ends, means)

    def grown(self) -> tuple[Assign, ...]:
        """What an open mini-batch has added after this chunk."""
        made = [Assign(added_leaf(w), self._at_end(w, self.advanced[n].added)) for n, w in self._states()]
        for n, w in self._states():
            scale = scale_leaf(self.declared, w)
            if scale is not None:
                made.append(Assign(scale, self.advanced[n].scale))
        sums = averaged_gates(self.declared)
        for gate, sum_ in sums.items():
            made.append(Assign(sum_, b.add(sum_, b.total(at_chunk(gate, T_AXIS), (T_AXIS,)))))
        if sums:
            made.append(Assign(COUNT, b.add(COUNT, b.size(T_AXIS))))
        return tuple(made)

    def memories(self) -> tuple[Assign, ...]:
        """What changes at every token: momentum and averages."""
        made = []
        for n, w in self._states():
            a = self.advanced[n]
            momentum = momentum_leaf(self.declared, w) if self.declared.per == "token" else None
            for variable, response in ((momentum, a.momentum), (average_leaf(self.declared, w), a.average)):
                if variable is not None:
                    made.append(Assign(variable, self._at_end(w, response)))
        return tuple(made)

    # -- the output

    def output(self) -> Assign:
        """What the tokens read."""
        weights = {n: self._read_weights(n, w) for n, w in self._states()}
        (reading,) = vectorize_over_tokens([self.reading.value], T_AXIS, self.moved)
        target = at_chunk(self.reading.target, T_AXIS)
        z = read_through(reading, weights, self.sizes, self.moved)
        return Assign(target, b.broadcast(z, target.axes))  # an output may see no token

    def _read_weights(self, n: str, w: Expr) -> PerTokenWeights | Expr:
        read, a, average = self.declared.read, self.advanced[n], average_leaf(self.declared, w)
        if read == "start":
            return w if average is None else average
        if read == "end" and is_staged(self.declared):
            return next(x.value for x in self._ended() if x.target is w)
        gradients = self.gradients()
        if self._single():
            return self._read_alone(n, w)

        def at(response: Response) -> Response:
            return {"after": lambda: response, "before": response.before, "end": response.last}[read]()

        if average is not None:
            return self._moving(w, at(a.average), gradients)
        response = self.algebra.minus(at(a.started), self._scaled_by_tau(at(a.added), n))
        moved = self._moving(w, response, gradients)
        return PerTokenWeights(w.axes, self._from_start(n, moved.terms))

    def measures(self) -> tuple[Assign, ...]:
        """What the inner loop does in this chunk, where that is asked for; every token holds the chunk's number.

        Mostly by-products: the loss at the start shares the products of the gradients, the update is the new weights.
        """
        if not self.program.telemetry:
            return ()
        (block,) = blocks(self.program.loss.body)
        (loss,) = vectorize_over_tokens([block.assigns[0].value], T_AXIS, {})
        start = {n: materialize(x, self.sizes) for n, x in self.starts.items()}
        end = {a.leaf.name: a.value for a in self.closed() if a.target in self.declared.states}
        gradients = self.gradients()
        added = {n: summed([t.summed((S_AXIS,)) for t in gradients[n]], w.axes, self.sizes) for n, w in self._states()}
        moved = {n: b.sub(end[n], start[n]) for n in start}
        found = {
            own("loss_before"): b.total(read_through(loss, start, self.sizes, {}), (T_AXIS,)),
            own("loss_after"): b.total(read_through(loss, end, self.sizes, {}), (T_AXIS,)),
            own("gradient_norm"): _norm([b.broadcast(added[n], w.axes) for n, w in self._states()]),
            own("update_norm"): _norm([b.broadcast(moved[n], w.axes) for n, w in self._states()]),
        }
        return tuple(
            Assign(leaf(n, "output", (T_AXIS,), "c"), b.stop_gradient(b.broadcast(x, (T_AXIS,))))
            for n, x in found.items()
        )

    def _single(self) -> bool:
        """Whether a chunk is always one token: then its weights are a matrix like any other."""
        found = self.program.gradients
        if self.given:
            return False
        alone = self.declared.mini_batch == 1 and self.declared.anchor == "mini_batch" and found.kind == "frozen"
        return found.sequential or alone

    def _read_alone(self, n: str, w: Expr) -> PerTokenWeights | Expr:
        """What the only token of a chunk reads: the weights that it found, or those that it leaves."""
        a, average = self.advanced[n], average_leaf(self.declared, w)
        if self.declared.read == "before":
            return average if average is not None else self._found_weights(w, decayed=False)
        if average is not None:
            return self._moving(w, a.average.last(), self.gradients())
        return self._left(w)


def _norm(tensors: Sequence[Expr]) -> Expr:
    """The Frobenius norm of several tensors together."""
    return b.apply("sqrt", reduce(b.add, (b.total(b.power(x, 2), x.axes) for x in tensors)))


def rates_over_chunk(update: Update) -> Update:
    """The rule with the rates of all tokens of a chunk."""
    return changed_rates(update, lambda r: vectorize_over_tokens([r], T_AXIS, {})[0])
