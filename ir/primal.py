"""The primal program: the definition, a loop over tokens.

gradient(k, v, W) -> dW,  output(q, W) -> z
->
for m in chunks(T, 16):
    W_start = W
    S_W = 0
    for t in m:
        S_W = S_W + lr[t] * dW                W = W_start - tau[t] * S_W                z[t] = output(q[t]; W)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tttc.ir import build as b
from tttc.ir.expr import Expr, const, leaf, leaves, rebuild, substitute, transform
from tttc.ir.names import as_declared, differential, suffixed
from tttc.ir.program import (
    EACH,
    SEQUENCE,
    T_AXIS,
    Allocate,
    Assign,
    Block,
    For,
    Function,
    GradientProgram,
    LoopProgram,
    Statement,
    Update,
    blocks,
)
from tttc.ir.simplify import renamed_hints, simplify_program
from tttc.ir.update import (
    COUNT,
    Advanced,
    Carried,
    Ending,
    TokenAlgebra,
    accumulated,
    added_leaf,
    advance,
    average_leaf,
    averaged_gates,
    beginning,
    changed_rates,
    clip_scale,
    ended,
    is_staged,
    momentum_leaf,
    opening,
    scale_leaf,
)


def token_loop(program: GradientProgram) -> LoopProgram:
    """Put the per-token functions `gradient` and `output` into the loops of the update rule."""
    made = LoopProgram.of(program, "primal", gradient=program["gradient"], output=program["output"])
    loop = _Loop(made)
    function = loop.function()
    names = {**program.names, **renamed_hints(program.names, loop.moved)}
    return simplify_program(replace(made, functions=(function,), names=names))


def declared_loop(program: GradientProgram) -> tuple[LoopProgram, dict[str, Expr]]:
    """The same loops for gradients that something else finds, such as torch.autograd: `d:W` is read as that of W. And
    the weights at which those of token t are taken, by state.
    """
    given = [leaf(differential(w.name), "gradient", w.axes) for w in program.update.states]
    gradient = replace(program["gradient"], body=(Block(tuple(Assign(g, g) for g in given)),))
    made = LoopProgram.of(program, "primal", gradient=gradient, output=program["output"])
    loop = _Loop(made)
    names = {**program.names, **renamed_hints(program.names, loop.moved)}
    done = simplify_program(replace(made, functions=(loop.function(),), names=names))
    return done, loop.anchors(rates_at_token(program.update))


class _Loop:
    """The loops of one update rule over per-token expressions."""

    def __init__(self, program: LoopProgram) -> None:
        self.program, self.update = program, program.update
        self.gradients, self.z = per_token(program)
        self.moved: dict[Expr, Expr] = {}
        self.states = {w.name: w for w in self.update.states}
        self.start = {n: leaf(suffixed(n, "start"), "state", w.axes) for n, w in self.states.items()}
        self.before = {n: self._carried(w) for n, w in self.states.items()}
        self.after = self._advanced()

    def _carried(self, w: Expr) -> Carried:
        update = self.update
        momentum = momentum_leaf(update, w) if update.per == "token" else None
        start = self.start[w.name]
        return Carried(start, added_leaf(w), scale_leaf(update, w), momentum, average_leaf(update, w))

    def _advanced(self) -> dict[str, Advanced]:
        """The rule, one token further."""
        at = rates_at_token(self.update)
        found = {n: self._placed(self.gradients[n], self.anchors(at)) for n in self.states}
        if at.clip is not None:
            squares = [b.total(b.power(b.broadcast(found[n], w.axes), 2), w.axes) for n, w in self.states.items()]
            scale = clip_scale(squares, at.clip)
            found = {n: b.mul(scale, g) for n, g in found.items()}
        return {n: advance(at, n, self.before[n], found[n], TokenAlgebra()) for n in self.states}

    def anchors(self, at: Update) -> dict[str, Expr]:
        """The weights at which gradients are taken; with several steps those of the step before, called W."""
        update = self.update
        if update.anchor == "token":
            found = {n: b.sub(_started(c), c.added) for n, c in self.before.items()}
        else:
            found = dict(self.start)
        if update.decay_first:
            found = {n: x if at.decay[n] is None else b.mul(at.decay[n], x) for n, x in found.items()}  # type: ignore[arg-type]
        return found

    def _placed(self, e: Expr, weights: Mapping[str, Expr]) -> Expr:
        return at_token(e, {w: weights[n] for n, w in self.states.items()}, self.moved)

    def _readable(self, when: str) -> dict[str, Expr]:
        """The weights that the token t of the loop reads."""
        found = {}
        tau = rates_at_token(self.update).tau
        for n, w in self.states.items():
            b_, a, scale = self.before[n], self.after[n], tau[n]
            average = average_leaf(self.update, w)
            if when == "start":
                found[n] = self.start[n] if average is None else average
            elif average is not None:
                found[n] = a.average if when == "after" else average
            else:
                added = a.added if when == "after" else b_.added
                started = a.started if when == "after" else _started(b_)
                found[n] = b.sub(started, added if scale is None else b.mul(scale, added))
        return found

    def token(self) -> list[Assign]:
        """The block of one token: what it reads, where it comes before any end, and what is carried after it."""
        update, read = self.update, self.update.read
        value = self._placed(self.z.value, self._readable("before" if read == "end" else read))
        at_once = read in ("after", "before") or (read == "start" and update.steps == 1)
        assigns = [Assign(_at(self.z.target, "t"), value)] if at_once else []
        assigns += [Assign(added_leaf(w), self.after[n].added) for n, w in self.states.items()]
        for n in self.states:
            a, c = self.after[n], self.before[n]
            for variable, x in ((c.scale, a.scale), (c.momentum, a.momentum), (c.average, a.average)):
                if variable is not None:
                    assigns.append(Assign(variable, x))
        means = averaged_gates(update)
        assigns += [Assign(s, b.add(s, _at(g, "t"))) for g, s in means.items()]
        return [*assigns, *([Assign(COUNT, b.add(COUNT, const(1)))] if means else [])]

    def function(self) -> Function:
        update, program = self.update, self.program
        read = update.read
        assigns, target = self.token(), _at(self.z.target, "t")
        staged = is_staged(update) or update.steps > 1
        if not staged:
            averaged = any(r is not None for r in update.average.values())  # which is what tokens read
            now = {n: a.weights for n, a in self.after.items()} if averaged else self._readable("after")
            assigns += [Assign(w, now[n]) for n, w in self.states.items()]
        begun = Block((*(Assign(self.start[n], w) for n, w in self.states.items()), *opening(update)))
        tokens = For("t", "m", None, (Block(tuple(assigns)),))
        inner: list[Statement] = []
        if staged and read == "start" and update.steps > 1:
            inner.append(For("t", "m", None, (Block((Assign(target, self._placed(self.z.value, self.states)),)),)))
        for _ in range(update.steps):
            inner += [begun, tokens, *((self._ending(),) if staged else ())]
        if read == "end":
            scaled = any(t is not None for t in update.tau.values())  # by each reading token, not by the last
            weights = self.states if is_staged(update) or (staged and not scaled) else self._readable("before")
            reading = Assign(target, self._placed(self.z.value, weights))
            inner.append(For("t", "m", None, (Block((reading,)),)))
        body: tuple[Statement, ...] = (
            Allocate(target),
            *beginning(update),
            For("m", SEQUENCE, update.mini_batch, tuple(inner)),
        )
        params = tuple(_at(p, "t") if p.role in ("token", "gate") else p for p in loop_params(program))
        return Function(program.name, params, body, (self.z.target, *update.states))

    def _ending(self) -> Block:
        """The block where a mini-batch ends: stages, and what acts once."""
        update = self.update
        ends = {}
        for n, w in self.states.items():
            c, base = self.before[n], accumulated(update, w)
            start = base if base is not w else self.start[n]
            tau = update.tau.get(n)
            if tau is not None and tau.op == "leaf" and tau.role == "gate":
                tau = last_of_mini_batch(tau)
            ends[n] = Ending(start if c.scale is None else b.mul(c.scale, start), c.added, tau)
        means = {g: b.div(s, COUNT) for g, s in averaged_gates(update).items()}
        return Block(ended(update, ends, means))


def _started(c: Carried) -> Expr:
    """What is left of the weights that the mini-batch began with."""
    start: Expr = c.start
    return start if c.scale is None else b.mul(c.scale, start)


def token_block(program: LoopProgram) -> tuple[Assign, ...]:
    """The block of one token inside an open mini-batch, by itself: it reads k and not k[t], and W for W_start."""
    loop = _Loop(program)
    assigns = loop.token()
    values = [a.value for a in assigns]
    begins = {start.name: n for n, start in loop.start.items()}

    def alone(e: Expr) -> Expr:
        return leaf(begins.get(e.name, e.name), e.role, e.axes)

    done = substitute(values, {e: alone(e) for e in leaves(values)})
    return tuple(Assign(alone(a.target), v) for a, v in zip(assigns, done, strict=True))


def rates_at_token(update: Update) -> Update:
    """The rule with the rates of the token t."""
    return changed_rates(update, lambda r: at_token(r, {}, {}))


def loop_params(program: LoopProgram) -> tuple[Expr, ...]:
    """States, params, then tokens and gates of the per-token functions, each once; at least one that has tokens."""
    found: dict[str, Expr] = {w.name: w for w in program.update.states}
    for role in ("param", "token", "gate"):
        for function in program.per_token:
            for p in function.params:
                if p.role == role:
                    found.setdefault(p.name, p)
        for rate in leaves(program.update.rates):
            if rate.role == role:
                found.setdefault(rate.name, rate)
    if all(p.role in ("state", "param") for p in found.values()):
        found[EACH.name] = EACH
    names = {as_declared(n): n for n, p in found.items() if p.role == "token"}
    tokens = [names[n] for n in ("q", "k", "v") if n in names]
    order = [n for n in found if found[n].role in ("state", "param")]
    order += tokens + [n for n in found if n not in order and n not in tokens]
    return tuple(found[n] for n in order)


def per_token(program: LoopProgram) -> tuple[dict[str, Expr], Assign]:
    """The gradient of each state, and the output, of one token."""
    states = {differential(w.name): w.name for w in program.update.states}
    (gradient,), (output,) = (blocks(f.body) for f in program.per_token)
    return {states[a.leaf.name]: a.value for a in gradient.assigns}, output.assigns[0]


def at_token(e: Expr, weights: Mapping[Expr, Expr], moved: dict[Expr, Expr]) -> Expr:
    """A per-token expression inside the token loop: k -> k[t]; the states stand for what is given."""
    by_name = {w.name: (w, value) for w, value in weights.items()}

    def visit(node: Expr, src: tuple[Expr, ...]) -> Expr:
        if node.op != "leaf":
            return rebuild(node, src)
        name, role, _ = node.variable
        if role in ("token", "gate"):
            return _at(node, "t")
        if name in by_name:
            declared, value = by_name[name]
            return b.rename(value, dict(zip(declared.axes, node.axes, strict=True)))
        return node

    return transform([e], visit, moved)[0]


def _at(e: Expr, at: str) -> Expr:
    return leaf(e.name, e.role, e.axes, at)


def last_of_mini_batch(gate: Expr) -> Expr:
    """The value of a gate at the last token of the mini-batch of a loop."""
    return b.last(leaf(gate.name, gate.role, (T_AXIS, *gate.axes), "m"), T_AXIS)
