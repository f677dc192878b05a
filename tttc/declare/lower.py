"""From a declaration to the IR: its functions traced, and its update rule as expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tttc.declare.sizes import known_sizes
from tttc.declare.specs import GateSpec, ParamSpec
from tttc.declare.tracer import Traced, lift
from tttc.declare.update_rules import AtEnd, Rate
from tttc.declare.user_functions import Leaves, Produce, Repeated, run_twice, traced_functions
from tttc.declare.variant import Signature
from tttc.errors import refusal
from tttc.ir import build as b
from tttc.ir.expr import Expr, const, leaf, leaves
from tttc.ir.names import own, prefixed
from tttc.ir.program import SEQUENCE, Assign, Block, EndStage, Function, TokenProgram, Update, end_leaf


def declare(declared: Signature, dims: Mapping[str, int], dtype: str) -> TokenProgram:
    """Trace the user's `loss` and `output` into per-token functions of the IR.

    Raises `DeclarationError` with every problem of the functions.
    """
    with known_sizes(dims):
        traced, problems = traced_functions(declared)
        if traced is None:
            raise refusal(declared.name, problems)
        try:
            update = _update_rule(declared, traced.leaves)
        except Repeated as found:
            raise refusal(declared.name, [found.problem]) from None
    z = leaf(own("z"), "output", traced.output.axes)
    functions = (
        _function("loss", traced.loss.expr, leaf(own("loss"), "output"), traced.leaves),
        _function("output", traced.output.expr, z, traced.leaves),
    )
    name = _snake(declared.name)
    return TokenProgram(name, "declare", functions, dict(dims), dtype, traced.names, update=update, title=declared.name)


def _function(name: str, value: Expr, target: Expr, known: Leaves) -> Function:
    """A per-token function whose parameters are the leaves that its value reads, in the order of the declaration."""
    read = {e.name for e in leaves([value])}
    order = [e for group in known for e in group.values() if e.name in read]
    return Function(name, tuple(order), (Block((Assign(target, value),)),), (target,))


def _update_rule(declared: Signature, known: Leaves) -> Update:
    rule = declared.update

    def rate(r: Rate) -> Expr:
        if isinstance(r, GateSpec):
            return known.gates[r.name]
        return known.params[declared.rate_name(r)] if isinstance(r, ParamSpec) else const(float(r))

    def rates(role: str) -> dict[str, Expr | None]:
        found = {n: rule.of(role, n) for n in known.states}
        return {n: None if r is None else rate(r) for n, r in found.items()}

    update = Update(
        tuple(known.states.values()),
        {n: r for n, r in rates("lr").items() if r is not None},
        rates("read_scale"),
        SEQUENCE if isinstance(declared.mini_batch, str) else int(declared.mini_batch),
        declared.read,
        momentum=rates("momentum"),
        decay=rates("decay"),
        average=rates("average"),
        nesterov=rule.nesterov,
        ema=rule.ema,
        decay_first=rule.decay_first,
        clip=rule.clip,
        per=rule.per,
        anchor=declared.anchor,
        steps=declared.steps,
        at_end=_traced_stages(rule.at_end, known),
    )
    return _online(update) if declared.mini_batch == 1 else update


def _online(update: Update) -> Update:
    """A mini-batch of one token takes its gradient at the weights of the token before: the same rule with
    anchor="token", whose chunk is not tied to the mini-batch. Where it is not the same, anchor makes no difference.
    """
    recurs = any(r is not None for g in (update.momentum, update.average) for r in g.values())
    scaled = any(t is not None for t in update.tau.values())
    if update.at_end or update.steps > 1 or update.per != "token" or (scaled and recurs):
        return replace(update, anchor="mini_batch")
    lr = {n: r if (tau := update.tau[n]) is None else b.mul(tau, r) for n, r in update.lr.items()}
    read = {"start": "before", "end": "after"}.get(update.read, update.read)
    return replace(update, anchor="token", lr=lr, tau=dict.fromkeys(update.tau), read=read)


def _traced_stages(stages: Sequence[AtEnd], known: Leaves) -> tuple[EndStage, ...]:
    """What the first stage keeps of W is `N_W`, what a second one keeps `N2_W`."""
    traced: list[EndStage] = []
    for stage in stages:
        keeping = 1 + sum(bool(s.kept) for s in traced)
        traced.append(traced_stage(stage, known, "N" if keeping == 1 else f"N{keeping}"))
    return tuple(traced)


def traced_stage(stage: AtEnd, known: Leaves, memory: str = "N") -> EndStage:
    """A stage as expressions over the leaves that stand for what it is given: `in_W`, and `N_W` where it keeps that."""
    acted = stage.of(known.states)
    given = {n: end_leaf(known.states[n]) for n in acted}

    def value(produce: Produce) -> Expr:
        return run_twice(stage.label, lambda leaf_of: lift(produce(leaf_of)), {}).expr

    begins, kept = {}, {}
    if stage.begin is not None:
        begin = stage.begin
        for n in acted:
            begins[n] = value(lambda leaf_of, n=n: begin(leaf_of(given[n])))  # type: ignore[misc]
            if stage.on == "weights":
                kept[n] = leaf(prefixed(memory, n), "memory", begins[n].axes)
    act = stage.function
    if stage.joint:

        def together(leaf_of: Callable[[Expr], Traced]) -> Mapping[str, Any]:
            return dict(act({n: leaf_of(e) for n, e in given.items()}))

        values = {n: value(lambda leaf_of, n=n: together(leaf_of)[n]) for n in together(Traced)}  # type: ignore[misc]
    elif kept:
        values = {n: value(lambda leaf_of, n=n: act(leaf_of(given[n]), leaf_of(kept[n]))) for n in given}  # type: ignore[misc]
    else:
        values = {n: value(lambda leaf_of, n=n: act(leaf_of(given[n]))) for n in given}  # type: ignore[misc]
    return EndStage(stage.on, values, begins, kept, stage.label)


def _snake(name: str) -> str:
    """TTTLinear -> ttt_linear; in letters of ASCII, which kernels need."""
    parts: list[str] = []
    for i, letter in enumerate(name):
        starts = letter.isupper() and i > 0
        after_lower = starts and not name[i - 1].isupper()
        before_lower = starts and i + 1 < len(name) and name[i + 1].islower() and name[i - 1].isupper()
        parts.append("_" if after_lower or before_lower else "")
        parts.append(letter.lower() if letter.isascii() else f"u{ord(letter):x}")
    return "".join(parts)
