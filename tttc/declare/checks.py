"""Everything wrong with a declaration at once: its settings, its rule, its values, and its functions as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from tttc.declare.lower import declare, traced_stage
from tttc.declare.read import read_declaration
from tttc.declare.sizes import known_sizes
from tttc.declare.update_rules import AtEnd
from tttc.declare.user_functions import Repeated, declared_leaves, traced_functions
from tttc.declare.variant import Signature, Variant, is_dim
from tttc.errors import Problem, ShapeError, SourceLine, TTTCError, refusal
from tttc.ir.differentiate import NoGradient, differentiate
from tttc.ir.expr import Expr, postorder
from tttc.ir.gradient_class import classified
from tttc.ir.primal import token_loop
from tttc.ir.program import T_AXIS
from tttc.ir.reading import NoExactForm, vectorize_over_tokens
from tttc.ir.schedule import schedule
from tttc.ir.simplify import simplify, simplify_program


def check(variant: type[Variant]) -> list[Problem]:
    """Everything wrong with a declaration, without compiling it; an empty list when it is fine."""
    declared, problems = _examined(variant)
    if problems:
        return problems
    try:
        gradients = differentiate(declare(declared, dict.fromkeys(declared.dims, 2), "f64"))
        schedule(classified(token_loop(simplify_program(gradients))))
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
        return node in (simple, *vectorize_over_tokens([simple], T_AXIS, {}))

    def holds_it(made: Expr, simple: Expr) -> bool:  # the first that does is the innermost
        return node in (*postorder([simple]), *postorder(vectorize_over_tokens([simple], T_AXIS, {})))

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
        traced = traced_stage(stage, known)
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
