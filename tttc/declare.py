"""From a declaration to the IR: its functions are traced, and everything wrong with it is reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tttc.errors import DeclarationError, Problem, SourceLine, TTTCError, refusal
from tttc.ir import build as b
from tttc.ir.differentiate import NoGradient, differentiate
from tttc.ir.expr import Expr, const, leaf, leaves
from tttc.ir.primal import token_loop
from tttc.ir.program import Assign, Block, EndStage, Function, Program, Update, end_leaf
from tttc.ir.reading import NoExactForm
from tttc.ir.schedule import schedule
from tttc.ir.simplify import simplify_program
from tttc.rules import AtEnd
from tttc.trace import Traced, captured_names, known_sizes, leaf_axes, lift, watching
from tttc.variant import GateSpec, ParamSpec, Rate, Signature, Variant, is_dim, read_declaration


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


def no_exact_form(declared: Signature, reason: NoExactForm) -> Problem:
    """A rule or a read point without an exact form over a chunk, at the line that decides it."""
    where = None if reason.node is None else _line_of(declared, reason.node.op)
    if where is None:
        where = declared.update.where
    return Problem(f"no exact chunked form: {reason.why}.", reason.instead, where, inexact=True)


def _line_of(declared: Signature, op: str) -> SourceLine | None:
    """The first line of the learner that makes a node of this operation."""
    with watching(op) as lines:
        _traced_functions(declared)
    return next(iter(lines), None)


def checked_signature(variant: type[Variant]) -> Signature:
    """The signature of a declaration without problems; raises `DeclarationError` with all of them at once."""
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
        problems += _traced_functions(declared)[1]
        stages = [s for s in getattr(declared.update, "at_end", ()) if isinstance(s, AtEnd)]
        problems += [p for stage in stages for p in _stage_problems(stage, declared)]
    return declared, problems


def _stage_problems(stage: AtEnd, declared: Signature) -> list[Problem]:
    """Whether an `at_end` function runs on the states that it is for, and gives back their shapes."""
    known, where = _declared_leaves(declared), stage.where or declared.update.where
    if not set(stage.states or ()) <= set(known.states):
        return []  # said already
    try:
        traced = _traced_stage(stage, known)
    except TTTCError as error:
        what = str(error).split("\n", maxsplit=1)[0]
        return [Problem(f"{stage.label}: {what}", "Name the states that it is for: states=(...,).", where)]
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
        traced, problems = _traced_functions(declared)
        if traced is None:
            raise refusal(declared.name, problems)
        leaves_, loss, output, names = traced
        update = _update_rule(declared, leaves_)
    z = leaf("z", "output", output.axes)
    functions = (
        _function("loss", loss.expr, leaf("loss", "output"), leaves_),
        _function("output", output.expr, z, leaves_),
    )
    return Program(_snake(declared.name), "declare", functions, dict(dims), dtype, names, update, title=declared.name)


class _Leaves(NamedTuple):
    """The declared values as leaves of the IR, by name."""

    tokens: dict[str, Expr]
    gates: dict[str, Expr]
    params: dict[str, Expr]
    states: dict[str, Expr]


def _declared_leaves(declared: Signature) -> _Leaves:
    groups = (
        ("token", declared.tokens),
        ("gate", declared.gates),
        ("param", declared.params),
        ("state", declared.states),
    )
    return _Leaves(*({n: leaf(n, role, leaf_axes(s.dims)) for n, s in specs.items()} for role, specs in groups))


def _traced_functions(
    declared: Signature,
) -> tuple[tuple[_Leaves, Traced, Traced, dict[Expr, str]] | None, list[Problem]]:
    """The leaves, the loss, the output and the user's names; or the problems met on the way."""
    known = _declared_leaves(declared)
    attributes = {a: known.gates[g] for a, g in declared.attributes.items()}
    extras = {n: e for n, e in known.tokens.items() if n not in ("q", "k", "v")}
    visible = known.states | known.params | attributes | extras
    bound = declared.variant.bind({n: Traced(e) for n, e in visible.items()})
    functions: list[Callable[..., Any]] = [declared.variant.learner, declared.variant.loss, declared.variant.output]
    problems: list[Problem] = []
    with captured_names(functions) as names:
        loss = _traced(declared, "loss", bound, (known.tokens["k"], known.tokens["v"]), problems)
        output = _traced(declared, "output", bound, (known.tokens["q"],), problems)
    if loss is not None and loss.axes:
        shape = ", ".join(loss.shape)
        problems.append(
            Problem(f"loss returns [{shape}], not a scalar.", "Reduce it: tttc.sum(...) or tttc.mean(...).")
        )
    if problems or loss is None or output is None:
        return None, _merged(problems)
    return (known, loss, output, names), []


def _merged(problems: list[Problem]) -> list[Problem]:
    """A line that several functions run is one problem: `in loss and output: ...`."""
    functions: dict[tuple[str, str, SourceLine | None], list[str]] = {}
    for p in problems:
        function, separator, what = p.what.removeprefix("in ").partition(": ")
        key = (what, p.remedy, p.where) if separator and p.what.startswith("in ") else (p.what, p.remedy, p.where)
        functions.setdefault(key, []).append(function if key[0] == what else "")
    return [
        Problem(f"in {' and '.join(names)}: {what}" if names[0] else what, remedy, where)
        for (what, remedy, where), names in functions.items()
    ]


def _traced(
    declared: Signature, name: str, bound: Any, arguments: tuple[Expr, ...], problems: list[Problem]
) -> Traced | None:
    try:
        return lift(getattr(bound, name)(*(Traced(e) for e in arguments)))
    except DeclarationError as error:
        what = str(error).removeprefix(f"variant `{declared.name}` ")
        problems.append(Problem(f"the class {what}.", "Define it as a method of the class."))
    except TTTCError as error:
        what, _, remedy = f"in {name}: {error}".rpartition("\n  ")
        problems.append(Problem(what or str(error), remedy))
    except AttributeError as error:
        known = [*declared.states, *declared.params, *declared.attributes]
        known += [n for n in declared.tokens if n not in ("q", "k", "v")]
        near = difflib.get_close_matches(str(error.name), known, 1, 0.0)
        remedy = f"Declare it on the class, or write one of {', '.join(known)}" + (f": `{near[0]}`?" if near else ".")
        problems.append(Problem(f"in {name}: `{error.name}` is not declared.", remedy, _user_line(error)))
    except Exception as error:  # the user's own code may raise anything; say where
        what = f"in {name}: {type(error).__name__}: {error}"
        problems.append(
            Problem(what, "The function must run on traced values: only operations of tttc on them.", _user_line(error))
        )
    return None


def _user_line(error: Exception) -> SourceLine | None:
    trace = error.__traceback__
    found = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name in ("learner", "loss", "output"):
            found = SourceLine(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _function(name: str, value: Expr, target: Expr, known: _Leaves) -> Function:
    """A per-token function whose parameters are the leaves that its value reads, in the order of the declaration."""
    read = {e.arg[0].name for e in leaves([value])}
    order = [e for group in known for n, e in group.items() if n in read]
    return Function(name, tuple(order), (Block((Assign(target, value),)),), (target,))


def _update_rule(declared: Signature, known: _Leaves) -> Update:
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


def _traced_stages(stages: Sequence[AtEnd], known: _Leaves) -> tuple[EndStage, ...]:
    """What the first stage keeps of W is `N_W`, what a second one keeps `N2_W`."""
    traced: list[EndStage] = []
    for stage in stages:
        keeping = 1 + sum(bool(s.kept) for s in traced)
        traced.append(_traced_stage(stage, known, "N" if keeping == 1 else f"N{keeping}"))
    return tuple(traced)


def _traced_stage(stage: AtEnd, known: _Leaves, memory: str = "N") -> EndStage:
    """A stage as expressions over the leaves that stand for what it is given: `in_W`, and `N_W` where it keeps that."""
    acted = stage.of(known.states)
    given = {n: end_leaf(known.states[n]) for n in acted}
    begins, kept = {}, {}
    if stage.begin is not None:
        for n in acted:
            begun = lift(stage.begin(Traced(given[n])))
            begins[n] = begun.expr
            if stage.on == "weights":
                kept[n] = leaf(f"{memory}_{n}", "memory", begun.axes)
    if stage.joint:
        values = {n: lift(x).expr for n, x in stage.function({n: Traced(e) for n, e in given.items()}).items()}
    elif kept:
        values = {n: lift(stage.function(Traced(e), Traced(kept[n], kept[n].axes))).expr for n, e in given.items()}
    else:
        values = {n: lift(stage.function(Traced(e))).expr for n, e in given.items()}
    return EndStage(stage.on, values, begins, kept, stage.label)


def _snake(name: str) -> str:
    """TTTLinear -> ttt_linear."""
    parts: list[str] = []
    for i, letter in enumerate(name):
        starts = letter.isupper() and i > 0
        after_lower = starts and not name[i - 1].isupper()
        before_lower = starts and i + 1 < len(name) and name[i + 1].islower() and name[i - 1].isupper()
        parts.append("_" if after_lower or before_lower else "")
        parts.append(letter.lower())
    return "".join(parts)
