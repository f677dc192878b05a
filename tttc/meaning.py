"""Whether a stage kept the meaning of a program: `TTTC_CHECK=1` runs it before and after on the same random inputs.

Functions that both programs have are interpreted and compared. Where a stage turns the per-token functions into a loop,
the loop is compared with the update rule applied token by token; where it takes the derivative, that is compared with
finite differences of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tttc.errors import PassChangedMeaning
from tttc.ir.expr import Axis, Expr
from tttc.ir.interpret import interpret
from tttc.ir.program import Program

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
    if {"gradient", "output"} <= functions and not names:
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
        error = float(np.max(np.abs(x - y), initial=0.0)) / (1.0 + float(np.max(np.abs(x), initial=0.0)))
        if not error <= allowed:
            raise PassChangedMeaning(
                f"stage {after.stage!r} changed the output {returned.arg[0].name} of {name}: "
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
        state = returned.arg[0].name.removeprefix("d")
        if state not in arguments:
            continue
        direction = generator.standard_normal(gradient.shape)
        moved = [arguments | {state: arguments[state] + sign * STEP * direction} for sign in (1, -1)]
        up, down = (interpret(before, "loss", m)[0] for m in moved)
        wanted.append((up - down) / (2 * STEP))
        found.append(np.asarray(np.sum(gradient * direction)))
    _compare(before, after, "gradient", tuple(wanted), tuple(found), DIFFERENCES_TOLERANCE)


def token_by_token(program: Program, params: tuple[Expr, ...], arguments: Arrays) -> tuple[np.ndarray, ...]:
    """Outputs and final weights by the update rule itself, from the per-token functions `gradient` and `output`."""
    update = program.update
    assert update is not None
    states = [w.arg[0].name for w in update.states]
    sequences = {p.arg[0].name for p in params if p.arg[0].at}
    tokens = len(arguments["q"])
    b = tokens if update.mini_batch == "all" else int(update.mini_batch)
    weights = {n: arguments[n] for n in states}

    def at(t: int) -> Arrays:
        return {n: x[t] if n in sequences else x for n, x in arguments.items()}

    def rate(e: Expr | None, t: int) -> float:
        return 1.0 if e is None else float(e.arg) if e.op == "const" else float(at(t)[e.arg[0].name])

    def moved(start: Arrays, total: Arrays, t: int) -> Arrays:
        return {n: start[n] - rate(update.tau[n], t) * total[n] for n in states}

    outputs = []
    for first in range(0, tokens, b):
        start, batch = weights, range(first, min(first + b, tokens))
        sums = [{n: np.zeros_like(start[n]) for n in states}]
        for s in batch:
            gradient = dict(zip(states, interpret(program, "gradient", at(s) | start), strict=True))
            sums.append({n: sums[-1][n] + rate(update.lr[n], s) * gradient[n] for n in states})
        for i, t in enumerate(batch):
            seen = {"after": i + 1, "before": i, "start": 0, "end": len(batch)}[update.read]
            outputs.append(interpret(program, "output", at(t) | moved(start, sums[seen], t))[0])
        weights = moved(start, sums[-1], batch[-1])
    return (np.stack(outputs), *(weights[n] for n in states))


def random_arguments(
    params: tuple[Expr, ...], dims: Mapping[str, int], tokens: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays for a function of the IR: the same for the same name, whatever the stage."""
    result = {}
    for p in params:
        found, axes = p.arg
        generator = np.random.default_rng([seed, *found.name.encode()])
        own: list[Axis] = [a for a in axes if a.name not in ("t", "s")]
        shape = ([tokens] if found.at else []) + [dims[a.size] for a in own]
        value = generator.standard_normal(shape) * 0.5
        result[found.name] = np.abs(value) * 0.2 if found.role == "gate" else value
    return result
