"""Whether a stage kept the meaning of a program: `TTTC_CHECK=1` runs it before and after on the same random inputs.

Functions that both programs have are interpreted and compared. Where a stage turns the per-token functions into a loop,
the loop is compared with the update rule applied token by token; where it takes the derivative, that is compared with
finite differences of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tttc.errors import PassChangedMeaning
from tttc.ir.expr import Axis, Expr, leaves, postorder
from tttc.ir.interpret import interpret
from tttc.ir.names import differentiated, prefixed, spelled
from tttc.ir.ops import align, evaluate
from tttc.ir.program import S_AXIS, T_AXIS, EndStage, GradientProgram, Program, number_of
from tttc.ir.substitution import PAST

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-9  # far above float64 rounding of a few hundred operations (1e-13), far below any wrong term
STEP = 1e-5  # of the central differences: wrong by its square, 1e-10, times third derivatives of order 1
DIFFERENCES_TOLERANCE = 1e-6


def check_meaning(before: Program, after: Program, tokens: int = 21) -> None:
    """Raise `PassChangedMeaning` naming the stage `after`, where it differs from the one before."""
    names = {f.name for f in before.functions} & {f.name for f in after.functions}
    for name in sorted(names):
        arguments = random_arguments((*after[name].params, *before[name].params), after.dims, tokens)
        wanted, found = interpret(before, name, arguments), interpret(after, name, arguments)
        _compare(before, after, name, wanted, found, TOLERANCE)
    functions = {f.name for f in before.functions}
    if "loss" in functions and "gradient" not in functions and after.stage != before.stage:
        _check_gradient(before, after)
    if isinstance(before, GradientProgram) and {"gradient", "output"} <= functions and not names:
        arguments = random_arguments(after.functions[0].params, after.dims, tokens)
        name = after.functions[0].name
        found = interpret(after, name, arguments)
        _compare(before, after, name, token_by_token(before, after[name].params, arguments), found, TOLERANCE)


def _compare(
    before: Program,
    after: Program,
    name: str,
    wanted: tuple[np.ndarray, ...],
    found: tuple[np.ndarray, ...],
    allowed: float,
) -> None:
    for returned, x, y in zip(after[name].returns, wanted, found, strict=True):
        if not np.all(np.isfinite(x)):
            continue  # the rule itself diverges on these inputs: there is nothing to compare
        error = float(np.max(np.abs(x - y), initial=0.0)) / (1.0 + float(np.max(np.abs(x), initial=0.0)))
        if not error <= allowed:
            raise PassChangedMeaning(
                f"stage {after.stage!r} changed the output {spelled(returned.name)} of {name}: "
                f"relative error {error:.1e}.\n"
                f"--- {before.stage}\n{before}\n--- {after.stage}\n{after}"
            )


def _check_gradient(before: Program, after: Program) -> None:
    """Each gradient in a random direction, against central differences of the loss."""
    params = (*before["loss"].params, *after["gradient"].params)
    arguments = random_arguments(params, after.dims, 0)
    generator = np.random.default_rng(1)
    gradients = interpret(after, "gradient", arguments)
    wanted, found = [], []
    for returned, gradient in zip(after["gradient"].returns, gradients, strict=True):
        state = differentiated(returned.name)
        direction = generator.standard_normal(gradient.shape)
        here = arguments.get(state, np.zeros_like(direction))  # a state that the loss does not read changes nothing
        moved = [arguments | {state: here + sign * STEP * direction} for sign in (1, -1)]
        up, down = (interpret(before, "loss", m)[0] for m in moved)
        wanted.append((up - down) / (2 * STEP))
        found.append(np.asarray(np.sum(gradient * direction)))
    _compare(before, after, "gradient", tuple(wanted), tuple(found), DIFFERENCES_TOLERANCE)


def token_by_token(program: GradientProgram, params: tuple[Expr, ...], arguments: Arrays) -> tuple[np.ndarray, ...]:
    """Outputs and final weights by the update rule itself, from the per-token functions `gradient` and `output`."""
    rule = _Rule(program, {p.name for p in params if p.at}, arguments)
    return rule.run()


class _Rule:
    """The update rule on arrays, spelled out for one state and one token at a time (tttc/reference.py, in NumPy)."""

    def __init__(self, program: GradientProgram, sequences: set[str], arguments: Arrays) -> None:
        self.program, self.update, self.sequences, self.arguments = program, program.update, sequences, arguments
        self.states = {w.name: w for w in program.update.states}
        self.tokens = len(arguments[next(iter(sequences))])
        self.memory: Arrays = {}
        for n in self.states:
            self.memory[prefixed("M", n)], self.memory[prefixed("V", n)] = np.zeros_like(arguments[n]), arguments[n]
        for stage in self.update.at_end:
            for n in stage.values:
                given = {prefixed("in", n): arguments[n]}
                begun = self.evaluated(stage.begins[n], given) if n in stage.begins else arguments[n]
                if stage.on == "view":
                    self.memory[prefixed("A", n)] = begun
                elif n in stage.kept:
                    self.memory[stage.kept[n].name] = begun

    def run(self) -> tuple[np.ndarray, ...]:
        b = number_of(self.update.mini_batch, self.tokens)
        weights: Arrays = {n: self.arguments[n] for n in self.states}
        outputs: list[np.ndarray] = []
        for first in range(0, self.tokens, b):
            z, weights = self.mini_batch(range(first, min(first + b, self.tokens)), weights)
            outputs += z
        return (np.stack(outputs), *(weights[n] for n in self.states))

    def mini_batch(self, tokens: range, weights: Arrays) -> tuple[list[np.ndarray], Arrays]:
        update, at_start, trail = self.update, weights, []
        for _ in range(update.steps):
            start = weights
            U = {n: np.zeros_like(w) for n, w in start.items()}
            a = {n: np.ones_like(w) for n, w in start.items()}
            trail = [(U, a, {n: self.memory[prefixed("V", n)] for n in start})]
            for s in tokens:
                trail.append(self.after_token(s, start, *trail[-1]))
            weights = self.ended(tokens, start, *trail[-1][:2])
        for n in self.states:
            self.memory[prefixed("V", n)] = trail[-1][2][n]
        staged, outputs = bool(update.at_end) or update.per != "token", []
        for i, t in enumerate(tokens):
            seen = trail[{"after": i + 1, "before": i, "start": 0, "end": -1}[update.read]]
            read = self.readable(t, start, *seen)
            read = at_start if update.read == "start" else weights if update.read == "end" and staged else read
            outputs.append(interpret(self.program, "output", self.at(t) | read)[0])
        return outputs, weights

    def after_token(self, s: int, start: Arrays, U: Arrays, a: Arrays, V: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        update, per_token = self.update, self.update.per == "token"
        at = {n: a[n] * start[n] - U[n] for n in start} if update.anchor == "token" else start
        if update.decay_first:
            at = {n: self.rate("decay", n, s, 1.0) * w for n, w in at.items()}
        g = dict(zip(start, interpret(self.program, "gradient", self.at(s) | at), strict=True))
        if update.clip is not None:
            norm = np.sqrt(sum(float(np.sum(x * x)) for x in g.values()))
            g = {n: x * min(1.0, update.clip / norm) if norm else x for n, x in g.items()}
        U, a, V = dict(U), dict(a), dict(V)
        for n in start:
            mu, lr = self.rate("momentum", n, s, 0.0), self.rate("lr", n, s, 1.0)
            decay, rho = self.rate("decay", n, s, 1.0) if per_token else 1.0, self.rate("average", n, s, 0.0)
            step = lr * g[n]
            if update.momentum.get(n) is not None and per_token:
                self.memory[prefixed("M", n)] = M = mu * self.memory[prefixed("M", n)] + (
                    (1 - mu) * g[n] if update.ema else step
                )
                step = lr * M if update.ema else step + mu * M if update.nesterov else M
            U[n], a[n] = decay * U[n] + step, decay * a[n]
            V[n] = (1 - rho) * V[n] + rho * (a[n] * start[n] - U[n])
        return U, a, V

    def readable(self, t: int, start: Arrays, U: Arrays, a: Arrays, V: Arrays) -> Arrays:
        averaged = {n for n, r in self.update.average.items() if r is not None}
        moved = {n: a[n] * start[n] - self.rate("tau", n, t, 1.0) * U[n] for n in start}
        return {n: V[n] if n in averaged else w for n, w in moved.items()}

    def ended(self, tokens: range, start: Arrays, U: Arrays, a: Arrays) -> Arrays:
        update, weights, steps = self.update, {}, {}
        for n in start:
            step, scale = U[n], a[n]
            if update.per == "mini_batch":
                mu, decay = (
                    np.mean([self.rate(r, n, s, x) for s in tokens], 0) for r, x in (("momentum", 0), ("decay", 1))
                )
                self.memory[prefixed("M", n)] = M = mu * self.memory[prefixed("M", n)] + step
                step, scale = step + mu * M if update.nesterov else M, scale * decay
            steps[n] = self.rate("tau", n, tokens[-1], 1.0) * step
            weights[n] = scale * self.memory.get(prefixed("A", n), start[n])
        for stage in update.at_end:
            if stage.on == "update":
                steps |= self.staged(stage, steps)
        weights = {n: w - steps[n] for n, w in weights.items()}
        for stage in update.at_end:
            if stage.on == "view":
                self.memory |= {prefixed("A", n): weights[n] for n in stage.values}
            if stage.on != "update":
                weights |= self.staged(stage, weights)
        return weights

    def staged(self, stage: EndStage, values: Arrays) -> Arrays:
        given = {prefixed("in", n): values[n] for n in stage.values} | self.memory
        return {n: self.value(e, given, self.states[n]) for n, e in stage.values.items()}

    def at(self, t: int) -> Arrays:
        return {n: x[t] if n in self.sequences else x for n, x in self.arguments.items()}

    def rate(self, role: str, name: str, t: int, missing: float) -> Any:
        e = getattr(self.update, role).get(name)
        return missing if e is None else self.value(e, self.at(t), self.states[name])

    def value(self, e: Expr, given: Arrays, like: Expr) -> np.ndarray:
        """An expression of a rate or a stage, ready to multiply the state `like`."""
        found = self.evaluated(e, given)
        if set(e.axes) < set(like.axes):
            return np.asarray(align(found, e.axes, like.axes))
        return found

    def evaluated(self, e: Expr, given: Arrays) -> np.ndarray:
        known = {x: np.asarray(given[x.name], dtype=float) for x in leaves([e])}
        axes = {a for x in postorder([e]) for a in x.axes}
        return np.asarray(evaluate(e, known, {a.name: self.program.dims[a.size] for a in axes}))


def random_arguments(
    params: tuple[Expr, ...], dims: Mapping[str, int], tokens: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays for a function of the IR: the same for the same name, whatever the stage."""
    result = {}
    sizes = {**dims, T_AXIS.size: tokens, PAST.size: tokens}
    for p in params:
        found, axes = p.arg
        generator = np.random.default_rng([seed, *spelled(found.name).encode()])
        own: list[Axis] = [a for a in axes if not (found.at and a in (T_AXIS, S_AXIS))]
        shape = ([tokens] if found.at else []) + [sizes[a.size] for a in own]
        value = generator.standard_normal(shape) * 0.5
        result[found.name] = np.abs(value) * 0.2 if found.role == "gate" else value
    return result
