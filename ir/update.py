"""The update rule, written once and read twice: token by token (ir/primal.py), and over a chunk (ir/response.py).

    S_t = mu_t * S_{t-1} + lr_t * g_t            momentum           M_W
    U_t = alpha_t * U_{t-1} + S_t                what the mini-batch has added since it began, U = 0      S_W
    a_t = alpha_t * a_{t-1}                      what is left of the weights that it began with, a = 1    a_W
    W_t = a_t * W_start - tau_t * U_t            the weights that token t reads
    V_t = (1 - rho_t) * V_{t-1} + rho_t * W_t    or their average   V_W

Everything is linear in the gradients and in what is carried. `advance` is these lines over an `Algebra`: the values of
one token are expressions; those of all tokens of a chunk are responses, matrices of coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple, Protocol

from tttc.ir import build as b
from tttc.ir.expr import Axes, Expr, const, leaf, leaves, substitute
from tttc.ir.names import own, prefixed
from tttc.ir.program import Assign, Block, EndStage, Update, end_leaf


class Algebra(Protocol):
    """What `advance` needs to know of values that run along the tokens."""

    def recur(self, before: Any, decay: Expr | None, added: Any) -> Any:
        """x_t = decay_t * x_{t-1} + added_t, from `before`; a decay of None is 1."""
        ...

    def scaled(self, x: Any, rate: Expr) -> Any: ...
    def plus(self, x: Any, y: Any) -> Any: ...
    def minus(self, x: Any, y: Any) -> Any: ...
    def started(self, scale: Any, decay: Expr | None, start: Any) -> tuple[Any, Any]:
        """a_t, and a_t * W_start."""
        ...


class Carried(NamedTuple):
    """What one state's rule carries from token to token; None for what it has not or what is zero."""

    start: Any  # W_start
    added: Any  # U
    scale: Any  # a
    momentum: Any  # S
    average: Any  # V


class Advanced(NamedTuple):
    """One token, or one chunk, later."""

    added: Any
    scale: Any
    momentum: Any
    average: Any
    started: Any  # a * W_start
    weights: Any  # a * W_start - U


def advance(update: Update, name: str, carried: Carried, gradient: Any, on: Algebra) -> Advanced:
    """The rule of the state `name`, with the rates of its tokens."""
    lr, mu, rho = update.lr[name], update.momentum.get(name), update.average.get(name)
    decay = update.decay.get(name)
    if update.per == "mini_batch":
        mu = decay = None  # they act where the mini-batch ends
    momentum, step = carried.momentum, on.scaled(gradient, lr)
    if mu is not None and update.ema:
        momentum = on.recur(carried.momentum, mu, on.scaled(gradient, b.sub(const(1), mu)))
        step = on.scaled(momentum, lr)
    elif mu is not None:
        momentum = on.recur(carried.momentum, mu, step)
        step = on.plus(step, on.scaled(momentum, mu)) if update.nesterov else momentum
    added = on.recur(carried.added, decay, step)
    scale, started = on.started(carried.scale, decay, carried.start)
    weights = on.minus(started, added)
    average = None
    if rho is not None:
        average = on.recur(carried.average, b.sub(const(1), rho), on.scaled(weights, rho))
    return Advanced(added, scale, momentum, average, started, weights)


class TokenAlgebra:
    """One token: values are expressions."""

    def recur(self, before: Expr | None, decay: Expr | None, added: Expr) -> Expr:
        if before is None:
            return added
        return b.add(before if decay is None else b.mul(decay, before), added)

    def scaled(self, x: Expr, rate: Expr) -> Expr:
        return b.mul(rate, x)

    def plus(self, x: Expr, y: Expr) -> Expr:
        return b.add(x, y)

    def minus(self, x: Expr, y: Expr) -> Expr:
        return b.sub(x, y)

    def started(self, scale: Expr | None, decay: Expr | None, start: Expr) -> tuple[Expr | None, Expr]:
        if decay is None:
            return scale, start if scale is None else b.mul(scale, start)
        scale = decay if scale is None else b.mul(decay, scale)
        return scale, b.mul(scale, start)


# -- what is carried ---------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """A variable that a sequence carries beside its weights, and where it starts."""

    variable: Expr
    begins: Expr  # from the weights that the sequence begins with


def added_leaf(w: Expr) -> Expr:
    """U: what the open mini-batch has added."""
    return leaf(prefixed("S", w.name), "sum", w.axes)


def scale_leaf(update: Update, w: Expr) -> Expr | None:
    """a: the product of the decays of the open mini-batch, with the axis of a channel decay; None without decay."""
    decay = update.decay.get(w.name)
    if decay is None or update.per == "mini_batch":
        return None
    return leaf(prefixed("a", w.name), "sum", decay.axes)


def momentum_leaf(update: Update, w: Expr) -> Expr | None:
    return leaf(prefixed("M", w.name), "memory", w.axes) if update.momentum.get(w.name) is not None else None


def average_leaf(update: Update, w: Expr) -> Expr | None:
    return leaf(prefixed("V", w.name), "memory", w.axes) if update.average.get(w.name) is not None else None


def accumulated(update: Update, w: Expr) -> Expr:
    """What the rule adds to: the weights, or the accumulator `A_W` of which they are a view."""
    viewed = any(w.name in s.values for s in update.at_end if s.on == "view")
    return leaf(prefixed("A", w.name), "memory", w.axes) if viewed else w


def memories(update: Update) -> tuple[Memory, ...]:
    """Everything that a sequence carries from mini-batch to mini-batch beside its weights."""
    found: list[Memory] = []
    for w in update.states:
        n = w.name
        momentum, average, base = momentum_leaf(update, w), average_leaf(update, w), accumulated(update, w)
        if momentum is not None:
            found.append(Memory(momentum, b.broadcast(const(0), w.axes)))
        if average is not None:
            found.append(Memory(average, w))
        for stage in update.at_end:
            begun = stage.begins.get(n, w if stage.on == "view" and n in stage.values else None)
            if begun is None:
                continue
            (value,) = substitute([begun], {end_leaf(w): w})
            found.append(Memory(base if stage.on == "view" else stage.kept[n], value))
    return tuple(found)


def beginning(update: Update) -> tuple[Block, ...]:
    """The block at the beginning of a sequence, where it carries anything beside its weights."""
    kept = memories(update)
    return (Block(tuple(Assign(m.variable, m.begins) for m in kept)),) if kept else ()


class Opened(NamedTuple):
    """A variable of an open mini-batch, and the number that it starts with."""

    variable: Expr
    begins: float


COUNT = leaf(own("n_tokens"), "sum")


def averaged_gates(update: Update) -> dict[Expr, Expr]:
    """With per="mini_batch", the rates whose mean is taken, and the variable of the open mini-batch that sums each."""
    if update.per != "mini_batch":
        return {}
    rates = [r for g in (update.momentum, update.decay) for r in g.values() if r is not None]
    gates = dict.fromkeys(r for r in rates if r.op == "leaf" and r.role == "gate")
    return {r: leaf(prefixed("m", r.name), "sum", r.axes) for r in gates}


def openings(update: Update) -> tuple[Opened, ...]:
    """What an open mini-batch carries from token to token beside the memories: U, a, and sums of gates."""
    found = [Opened(added_leaf(w), 0.0) for w in update.states]
    found += [Opened(a, 1.0) for w in update.states if (a := scale_leaf(update, w)) is not None]
    means = averaged_gates(update)
    found += [Opened(m, 0.0) for m in means.values()]
    return (*found, *((Opened(COUNT, 0.0),) if means else ()))


def opening(update: Update) -> tuple[Assign, ...]:
    """What an open mini-batch carries, where it begins."""
    return tuple(Assign(o.variable, b.broadcast(const(o.begins), o.variable.axes)) for o in openings(update))


def clip_scale(squares: Iterable[Expr], clip: float) -> Expr:
    """What scales a gradient down to the norm `clip`, from the squares of the norms of its parts."""
    most = const(float(clip) ** 2)
    excess = b.apply("relu", b.sub(reduce(b.add, squares), most))
    return b.apply("sqrt", b.div(most, b.add(most, excess)))


def changed_rates(update: Update, change: Callable[[Expr], Expr]) -> Update:
    """The rule with every rate changed."""

    def over(rates: Mapping[str, Expr | None]) -> dict[str, Expr | None]:
        return {n: None if r is None else change(r) for n, r in rates.items()}

    groups = {role: over(getattr(update, role)) for role in ("lr", "tau", "momentum", "decay", "average")}
    return replace(update, **groups)  # type: ignore[arg-type]


# -- the end of a mini-batch -------------------------------------------------------------------------------------------


class Ending(NamedTuple):
    """What the end of a mini-batch knows of one state."""

    base: Expr  # a * W_start, or without its decay where that acts here
    added: Expr  # U, before tau
    tau: Expr | None  # of the last token


def ended(update: Update, ends: Mapping[str, Ending], means: Mapping[Expr, Expr]) -> tuple[Assign, ...]:
    """The weights that a mini-batch hands on, and the memories that change only there.

    `means` gives, with per="mini_batch", the mean of each momentum and decay gate.
    """
    names = [w.name for w in update.states]
    steps, bases, made = {}, {}, []
    for w, n in zip(update.states, names, strict=True):
        base, step, tau = ends[n]
        if update.per == "mini_batch":
            base, step, momentum = _once(update, w, base, step, means)
            made += [Assign(m, momentum) for m in [momentum_leaf(update, w)] if m is not None]
        steps[n], bases[n] = step if tau is None else b.mul(tau, step), base
    for stage in update.at_end:
        if stage.on == "update":
            steps |= _staged(stage, steps, update)
    weights = {n: b.sub(bases[n], steps[n]) for n in names}
    for stage in update.at_end:
        if stage.on == "view":
            made += [Assign(accumulated(update, w), weights[n]) for w, n in _acted(stage, update)]
        if stage.on != "update":
            weights |= _staged(stage, weights, update)
    return (*(Assign(w, weights[n]) for w, n in zip(update.states, names, strict=True)), *made)


def _once(update: Update, w: Expr, base: Expr, step: Expr, means: Mapping[Expr, Expr]) -> tuple[Expr, Expr, Expr]:
    """Momentum and decay that act once, with the mean of their gates."""
    n = w.name
    mu, decay, momentum = update.momentum.get(n), update.decay.get(n), step
    if mu is not None:
        mu = means.get(mu, mu)
        before = momentum_leaf(update, w)
        assert before is not None
        momentum = b.add(b.mul(mu, before), step)
        step = b.add(step, b.mul(mu, momentum)) if update.nesterov else momentum
    if decay is not None:
        base = b.mul(means.get(decay, decay), base)
    return base, step, momentum


def _acted(stage: EndStage, update: Update) -> list[tuple[Expr, str]]:
    return [(w, w.name) for w in update.states if w.name in stage.values]


def _staged(stage: EndStage, values: Mapping[str, Expr], update: Update) -> dict[str, Expr]:
    """A stage applied: its expressions, with the values in place of the leaves that stand for them."""
    given = {end_leaf(w).variable: (w, values[n]) for w, n in _acted(stage, update)}
    acted = _acted(stage, update)
    roots = [stage.values[n] for _, n in acted]
    replaced = {}
    for e in leaves(roots):
        if e.variable in given:
            w, value = given[e.variable]
            value = b.broadcast(value, w.axes)
            replaced[e] = b.rename(value, dict(zip(w.axes, e.axes, strict=True)))
    done = substitute(roots, replaced)
    return {n: _as(w.axes, stage.values[n].axes, x) for (w, n), x in zip(acted, done, strict=True)}


def _as(axes: Axes, declared: Axes, value: Expr) -> Expr:
    """A stage may return its matrix under other axis names (X @ X.T has the axes D and D2)."""
    if set(declared) == set(axes):
        return value
    free = [a for a in axes if a not in declared]
    foreign = [a for a in declared if a not in axes]
    return b.rename(value, dict(zip(foreign, free, strict=True)))


def is_staged(update: Update) -> bool:
    """Whether the weights that a mini-batch hands on are more than those after its last token."""
    return bool(update.at_end) or update.per == "mini_batch"


def observed(update: Update) -> bool:
    """Whether results depend on where mini-batches end, beside the gradients."""
    tied = any(tau is not None and tau.op != "const" for tau in update.tau.values())
    constant = any(tau is not None and tau.op == "const" and tau.arg != 1 for tau in update.tau.values())
    recurs = any(r is not None for g in (update.momentum, update.decay, update.average) for r in g.values())
    return tied or (constant and recurs) or update.read in ("start", "end") or is_staged(update) or update.steps > 1
