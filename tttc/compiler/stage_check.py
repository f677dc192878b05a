"""Whether a stage kept the meaning of a program: `TTTC_CHECK=1` runs it before and after on the same random inputs.

Functions that both programs have are interpreted and compared. Where a stage turns the per-token functions into a loop,
the loop is compared with the definition: the class itself, token by token (tttc/reference.py). Where it takes the
derivative, that is compared with finite differences of the loss. A stage that fails runs again, and every rule of
rewriting that fires is compared by itself, so that the one at fault is named.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch

from tttc.declare.specs import Spec
from tttc.declare.variant import Absent, Signature
from tttc.errors import PassChangedMeaning
from tttc.ir.expr import OPS, Axis, Expr, postorder
from tttc.ir.interpret import interpret
from tttc.ir.names import differentiated, spelled
from tttc.ir.ops import align, sizes_of
from tttc.ir.program import S_AXIS, T_AXIS, GradientProgram, LoopProgram, Program
from tttc.ir.rewrite import Rule, watched
from tttc.ir.substitution import PAST
from tttc.reference import of_one_head

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-9  # far above float64 rounding of a few hundred operations (1e-13), far below any wrong term
ROUNDING = 1e-13  # of some hundred operations
STEP = 1e-5  # of the central differences: wrong by its square, 1e-10, times third derivatives of order 1
DIFFERENCES_TOLERANCE = 1e-6


def checking() -> bool:
    """Whether programs are to be checked as they are compiled."""
    return os.environ.get("TTTC_CHECK", "0") not in ("", "0")


def check_meaning(declared: Signature, before: Program, after: Program, tokens: int = 21) -> None:
    """Raise `PassChangedMeaning` naming the stage `after`, where it differs from the one before."""
    names = {f.name for f in before.functions} & {f.name for f in after.functions}
    for name in sorted(names):
        arguments = random_arguments((*after[name].params, *before[name].params), after.dims, tokens)
        wanted, found = interpret(before, name, arguments), interpret(after, name, arguments)
        _compare(before, after, name, wanted, found, TOLERANCE)
    if isinstance(after, GradientProgram) and not isinstance(before, GradientProgram):
        _check_gradient(before, after)
    defined = not issubclass(declared.variant, Absent)
    if defined and isinstance(after, LoopProgram) and not isinstance(before, LoopProgram):
        _check_loop(declared, before, after, tokens)


def _check_loop(declared: Signature, before: Program, after: LoopProgram, tokens: int) -> None:
    """The loop over tokens against the definition. Where a rule makes much of little, they may differ by what becomes
    of rounding: by as much as the definition itself does on inputs that are `ROUNDING` away.
    """
    (loop,) = after.functions
    arguments = random_arguments(loop.params, after.dims, tokens)
    wanted = by_definition(declared, after.dims, arguments, tokens)
    found = interpret(after, loop.name, arguments)
    try:
        _compare(before, after, loop.name, wanted, found, TOLERANCE)
    except PassChangedMeaning:
        again = by_definition(declared, after.dims, nearby(arguments), tokens)
        allowed = [max(TOLERANCE, relative_error(x, y)) for x, y in zip(wanted, again, strict=True)]
        _compare(before, after, loop.name, wanted, found, *allowed)


def nearby(arguments: Arrays) -> Arrays:
    """The same, `ROUNDING` away."""
    generator = np.random.default_rng(2)
    return {n: x * (1 + ROUNDING * generator.standard_normal(np.shape(x))) for n, x in arguments.items()}


def relative_error(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of an entry, beside 1 and the largest entry of x."""
    return float(np.max(np.abs(x - y), initial=0.0)) / (1.0 + float(np.max(np.abs(x), initial=0.0)))


def _compare(
    before: Program,
    after: Program,
    name: str,
    wanted: tuple[np.ndarray, ...],
    found: tuple[np.ndarray, ...],
    *allowed: float,
) -> None:
    """`allowed` is for each result, or one number for all."""
    limits = allowed * len(wanted) if len(allowed) == 1 else allowed
    for returned, x, y, limit in zip(after[name].returns, wanted, found, limits, strict=True):
        if not np.all(np.isfinite(x)):
            continue  # the rule itself diverges on these inputs: there is nothing to compare
        error = relative_error(x, y)
        if not error <= limit:
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


def by_definition(
    declared: Signature, dims: Mapping[str, int], arguments: Arrays, tokens: int
) -> tuple[np.ndarray, ...]:
    """Outputs and final weights of one head as the class itself gives them; what no function reads is zero."""

    def given(role: str, specs: Mapping[str, Spec]) -> dict[str, torch.Tensor]:
        found = {}
        for name, spec in specs.items():
            shape = [tokens] * (role in ("token", "gate")) + [dims[d] for d in spec.dims]
            value = arguments.get(declared.identity(role, name))
            found[name] = (
                torch.zeros(shape, dtype=torch.float64) if value is None else torch.from_numpy(np.asarray(value))
            )
        return found

    z, final = of_one_head(declared, *(given(role, specs) for role, specs in declared.by_role.items()))
    return tuple(x.detach().numpy() for x in (z, *final.values()))


# -- which rule it was -------------------------------------------------------------------------------------------------


class WrongRule(Exception):
    """A rule of rewriting that gave a node another value."""


def blamed(error: PassChangedMeaning, run: Callable[[], object]) -> PassChangedMeaning:
    """The error with the rule that did it, found by checking each one that fires while the stage runs again."""
    try:
        with watched(_Values().compare):
            run()
    except WrongRule as rule:
        what, _, programs = str(error).partition("\n")
        return PassChangedMeaning(f"{what}\n{rule}\n{programs}")
    return error


class _Values:
    """Values of expressions where every variable is random: the same for the same variable, and each node once."""

    def __init__(self) -> None:
        self.known: dict[Expr, np.ndarray] = {}
        self.lengths: dict[str, int] = defaultdict(lambda: 2 + len(self.lengths) % 4)

    def compare(self, rule: Rule, before: Expr, after: Expr) -> None:
        one, other = (np.asarray(align(self.of(e), e.axes, before.axes)) for e in (before, after))
        scale = 1.0 + float(np.max(np.abs(one), initial=0.0))
        if np.all(np.isfinite(one)) and not float(np.max(np.abs(one - other), initial=0.0)) <= TOLERANCE * scale:
            raise WrongRule(f'the rule "{rule.title}" did: {before!r} became {after!r}.')

    def of(self, root: Expr) -> np.ndarray:
        for node in postorder([root], self.known):
            sizes = sizes_of(node, self.lengths)
            operands = (self.known[e] for e in node.src)
            self.known[node] = self._drawn(node) if node.op == "leaf" else OPS[node.op].numpy(node, sizes, *operands)  # type: ignore[misc]
        return self.known[root]

    def _drawn(self, e: Expr) -> np.ndarray:
        generator = np.random.default_rng([*spelled(e.name).encode()])
        value = generator.standard_normal([self.lengths[a.size] for a in e.axes]) * 0.5
        return np.abs(value) * 0.2 if e.role == "gate" else value


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
