"""From a declaration to the IR: its functions are traced, and everything wrong with it is reported at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from tttc.declare.tracer import Traced, known_sizes, lift
from tttc.declare.update_rules import AtEnd
from tttc.declare.user_functions import Leaves, Produce, Repeated, declared_leaves, run_twice, traced_functions
from tttc.declare.variant import GateSpec, ParamSpec, Rate, Signature, Variant, is_dim, read_declaration
from tttc.errors import Problem, ShapeError, SourceLine, TTTCError, refusal
from tttc.ir import build as b
from tttc.ir.differentiate import NoGradient, differentiate
from tttc.ir.expr import Expr, const, leaf, leaves, postorder
from tttc.ir.names import own, prefixed
from tttc.ir.primal import token_loop
from tttc.ir.program import T_AXIS, Assign, Block, EndStage, Function, Program, Update, end_leaf
from tttc.ir.reading import NoExactForm, over_chunk
from tttc.ir.schedule import schedule
from tttc.ir.simplify import simplify, simplify_program


def check(variant: type[Variant]) -> list[Problem]:
    """Everything wrong with a declaration, without compiling it; an empty list when it is fine."""
    declared, problems = _examined(variant)
    if problems:
        return problems
    try:
        schedule(token_loop(simplify_program(differentiate(declare(declared, dict.fromkeys(declared.dims, 2), "f64")))))
    except NoGradient as states:
        return [no_gradient(str(states))]
    except NoExactForm as reason:
        return [no_exact_form(declared, reason)]
    return []


def no_exact_form(declared: Signature, reason: NoExactForm, dims: Mapping[str, int] | None = None) -> Problem:
    """A rule or a read point without an exact form over a chunk, at the line that decides it."""
    with known_sizes(dims or {}):
        where = None if reason.node is None else _line_of(declared, reason.node)
    if where is None:
        where = declared.update.where
    return Problem(f"no exact chunked form: {reason.why}.", reason.instead, where, inexact=True)


def _line_of(declared: Signature, node: Expr) -> SourceLine | None:
    """The user's line that makes a value of the simplified program, which may read the tokens of a chunk."""
    traced, _ = traced_functions(declared)
    if traced is None:
        return None
    moved: dict[Expr, Expr] = {}
    simplify([traced.output.expr, traced.loss.expr], moved=moved)
    became = {made: moved.get(made, made) for made in traced.places}

    def lines(found: Callable[[Expr, Expr], bool]) -> Iterator[SourceLine]:
        return (place.line for made, place in traced.places.items() if found(made, became[made]))

    def is_it(made: Expr, simple: Expr) -> bool:
        return node in (simple, *over_chunk([simple], T_AXIS, {}))

    def holds_it(made: Expr, simple: Expr) -> bool:  # the first that does is the innermost
        return node in (*postorder([simple]), *postorder(over_chunk([simple], T_AXIS, {})))

    found = (lines(is_it), lines(holds_it), lines(lambda made, simple: made.op == node.op))
    return next(chain.from_iterable(found), None)


def checked_signature(variant: type[Variant], dims: Mapping[str, int] | None = None) -> Signature:
    """The signature of a declaration without problems; raises `DeclarationError` with all of them at once.

    `dims`, where they are known, are what `tttc.size` gives while the functions are traced.
    """
    with known_sizes(dims or {}):
        declared, problems = _examined(variant)
    if problems:
        raise refusal(declared.name, problems)
    return declared


def no_gradient(states: str) -> Problem:
    """The loss has no gradient."""
    return Problem(
        f"the loss does not depend on any state ({states}).",
        "Let `loss` call `self.learner(k)`, or read a state in it.",
    )


def _examined(variant: type[Variant]) -> tuple[Signature, list[Problem]]:
    """Problems of the settings and, where the axes are named at all, of the functions."""
    declared, problems = read_declaration(variant)
    if all(map(is_dim, declared.dims)):
        problems += traced_functions(declared)[1]
        stages = [s for s in getattr(declared.update, "at_end", ()) if isinstance(s, AtEnd)]
        problems += [p for stage in stages for p in _stage_problems(stage, declared)]
    return declared, problems


def _stage_problems(stage: AtEnd, declared: Signature) -> list[Problem]:
    """Whether an `at_end` function runs on the states that it is for, and gives back their shapes."""
    known, where = declared_leaves(declared), stage.where or declared.update.where
    if not set(stage.states or ()) <= set(known.states):
        return []  # said already
    try:
        traced = _traced_stage(stage, known)
    except Repeated as found:
        return [replace(found.problem, where=where)]
    except ShapeError as error:
        what = str(error).split("\n", maxsplit=1)[0]
        return [Problem(f"{stage.label}: {what}", "Name the states that it is for: states=(...,).", where)]
    except TTTCError as error:
        what, _, remedy = f"in {stage.label}: {error}".rpartition("\n  ")
        return [Problem(what, remedy)]
    except Exception as error:  # the user's own function may raise anything
        remedy = "It must run on traced values: only operations of tttc on them."
        return [Problem(f"in {stage.label}: {type(error).__name__}: {error}.", remedy, where)]
    problems = []
    if set(traced.values) != set(stage.of(known.states)):
        what = f"{stage.label} gives back {', '.join(traced.values) or 'nothing'}."
        return [Problem(what, f"With joint=True it gives back {', '.join(stage.of(known.states))}.", where)]
    for n, value in traced.values.items():
        shape, own = (tuple(sorted(a.size for a in e.axes)) for e in (value, known.states[n]))
        if shape != own:
            what = f"{stage.label} makes [{', '.join(shape)}] of state `{n}`, which is [{', '.join(own)}]."
            problems.append(Problem(what, "It must give back what it is given: the same shape.", where))
    return problems


def declare(declared: Signature, dims: Mapping[str, int], dtype: str) -> Program:
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
    return Program(name, "declare", functions, dict(dims), dtype, traced.names, update, title=declared.name)


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
        declared.mini_batch,
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
        traced.append(_traced_stage(stage, known, "N" if keeping == 1 else f"N{keeping}"))
    return tuple(traced)


def _traced_stage(stage: AtEnd, known: Leaves, memory: str = "N") -> EndStage:
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
