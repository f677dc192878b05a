"""Running the user's functions on traced values: each on an instance of its own, and twice.

A declaration is mathematics: what a function gives depends on its arguments and on what is declared, and on nothing
that another call left behind. So `loss` and `output` get fresh instances, as in the definition, and each is run again
on leaves that are marked: what comes out must be the same expression, made of its own leaves.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from tttc.declare.locations import captured_names, captured_places
from tttc.declare.purity import Snapshot, changed, snapshot
from tttc.declare.sizes import size_of_dim
from tttc.declare.suggest import instead
from tttc.declare.tracer import Traced, leaf_axes, lift
from tttc.declare.upstream import loss_of
from tttc.declare.variant import Signature, Variant, bind
from tttc.errors import DeclarationError, Place, Problem, SourceLine, TTTCError, raised_at
from tttc.ir.expr import Expr, leaf, leaves, rebuild, transform
from tttc.ir.names import as_declared
from tttc.ir.text import expression_text

Produce = Callable[[Callable[[Expr], Traced]], Any]
"""Calls a function of the user's; it is given what makes a value of a leaf."""


class Leaves(NamedTuple):
    """The declared values as leaves of the IR, by name."""

    tokens: dict[str, Expr]
    gates: dict[str, Expr]
    params: dict[str, Expr]
    states: dict[str, Expr]


class TracedFunctions(NamedTuple):
    """What the user's functions are: the loss, the output, the names of their values, and the lines that make them."""

    leaves: Leaves
    loss: Traced
    output: Traced
    names: dict[Expr, str]
    places: dict[Expr, Place]


def declared_leaves(declared: Signature) -> Leaves:
    return Leaves(
        *(
            {n: leaf(declared.identity(role, n), role, leaf_axes(s.dims)) for n, s in specs.items()}
            for role, specs in declared.by_role.items()
        )
    )


def traced_functions(declared: Signature) -> tuple[TracedFunctions | None, list[Problem]]:
    """The user's functions as expressions; or every problem met on the way."""
    sizes = tuple(map(size_of_dim, declared.dims))
    if sizes not in declared.traced:
        declared.traced[sizes] = _traced_functions(declared)
    functions, problems = declared.traced[sizes]
    return functions, list(problems)


def _traced_functions(declared: Signature) -> tuple[TracedFunctions | None, list[Problem]]:
    known = declared_leaves(declared)
    problems: list[Problem] = []
    codes: list[Callable[..., Any]] = [declared.variant.learner, declared.variant.loss, declared.variant.output]
    with captured_places() as places, captured_names(codes, _held) as names:
        loss = _run(declared, known, "loss", ("k", "v"), places, problems)
        output = _run(declared, known, "output", ("q",), places, problems)
    if loss is not None and loss.axes:
        shape = ", ".join(loss.dims)
        problems.append(
            Problem(f"loss returns [{shape}], not a scalar.", "Reduce it: tttc.sum(...) or tttc.mean(...).")
        )
    if problems or loss is None or output is None:
        return None, _merged(problems)
    return TracedFunctions(known, loss, output, names, places), []


def traced_output(declared: Signature) -> tuple[Traced | None, list[Problem]]:
    """The output alone, whatever the loss is; or every problem met on the way."""
    problems: list[Problem] = []
    with captured_places() as places:
        output = _run(declared, declared_leaves(declared), "output", ("q",), places, problems)
    return output, problems


def _held(value: Any) -> Expr | None:
    return value.expr if isinstance(value, Traced) else None


def _run(
    declared: Signature,
    known: Leaves,
    name: str,
    arguments: tuple[str, ...],
    places: dict[Expr, Place],
    problems: list[Problem],
) -> Traced | None:
    """One function, on instances of its own."""

    def produce(value: Callable[[Expr], Traced]) -> Traced:
        attributes = {a: known.gates[g] for a, g in declared.attributes.items()}
        extras = {n: e for n, e in known.tokens.items() if n not in ("q", "k", "v")}
        visible = known.states | known.params | attributes | extras
        bound = bind(declared.variant, {n: value(e) for n, e in visible.items()})
        given = [value(known.tokens[a]) for a in arguments]
        return lift(loss_of(bound, *given) if name == "loss" else getattr(bound, name)(*given))

    try:
        return run_twice(name, produce, places, lambda: _surroundings(declared.variant))
    except Repeated as found:
        problems.append(found.problem)
    except DeclarationError as error:
        what = str(error).removeprefix(f"variant `{declared.name}` ")
        problems.append(Problem(f"the class {what}.", "Define it as a method of the class."))
    except TTTCError as error:
        what, _, remedy = f"in {name}: {error}".rpartition("\n  ")
        problems.append(Problem(what or str(error), remedy))
    except AttributeError as error:
        problems.append(_unknown_attribute(declared, name, error))
    except Exception as error:  # the user's own code may raise anything; say where
        what = f"in {name}: {type(error).__name__}: {error}"
        problems.append(Problem(what, _ONLY_OPERATIONS, raised_at(error)))
    return None


_ONLY_OPERATIONS = "The function must run on traced values: only operations of tttc on them."


def _unknown_attribute(declared: Signature, name: str, error: AttributeError) -> Problem:
    """An attribute of the declaration that is none, or of something else."""
    missing = str(error.name)
    if not isinstance(error.obj, Variant):
        what = f"in {name}: {str(error).splitlines()[0].split('. ')[0].rstrip('.')}."
        remedy = instead(missing) if isinstance(error.obj, ModuleType) else _ONLY_OPERATIONS
        return Problem(what, remedy, raised_at(error))
    known = [*declared.states, *declared.params, *declared.attributes]
    known += [n for n in declared.tokens if n not in ("q", "k", "v")]
    near = difflib.get_close_matches(missing, known, 1, 0.0)
    remedy = f"Declare it on the class, or write one of {', '.join(known)}" + (f": `{near[0]}`?" if near else ".")
    return Problem(f"in {name}: `{missing}` is not declared.", remedy, raised_at(error))


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


# -- the same again ----------------------------------------------------------------------------------------------------


class Repeated(Exception):
    """A function that gives something else when it is run again."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


_PURE = (
    "A function of a declaration depends on its arguments and on what is declared, on nothing that changes from call "
    "to call: pass such a value as a gate or a token, or set it before the class is compiled."
)


def run_twice(
    name: str, produce: Produce, places: dict[Expr, Place], surroundings: Callable[[], Snapshot] = dict
) -> Traced:
    """What a function gives on the leaves, which must be what it gives again; raises `Repeated`.

    `surroundings` is what it might change; what the first run has made of that, the second must leave alone.
    """
    first = produce(Traced)
    before = surroundings()
    again = f"{name} again"
    second = produce(lambda e: Traced(_marked(e, again)))
    after = surroundings()
    left = changed(before, after)
    if left:  # or another thread has changed it meanwhile
        produce(lambda e: Traced(_marked(e, again)))
        left = [n for n in changed(after, surroundings()) if n in left]
    strays = [e for value, mark in ((first, None), (second, again)) for e in leaves([value.expr]) if e.at != mark]
    if strays:
        read = ", ".join(dict.fromkeys(f"{e.role} {as_declared(e.name)}" for e in strays))
        what = f"in {name}: a value that an earlier call has made is used again (it is made of {read})."
        raise Repeated(Problem(what, _PURE, _line_of(first.expr, places)))
    (repeated,) = transform([second.expr], lambda e, src: _marked(e, None) if e.op == "leaf" else rebuild(e, src))
    if repeated is not first.expr or second.dims != first.dims:
        one, other, line = _difference(first.expr, repeated, places)
        what = f"in {name}: another expression comes out the second time, {other} where the first time it was {one}."
        raise Repeated(Problem(what, _PURE, line))
    if left:
        what = f"in {name}: {', '.join(left)} changes with every call."
        raise Repeated(Problem(what, _PURE, _line_of(first.expr, places)))
    return first


def _surroundings(variant: type[Variant]) -> Snapshot:
    classes = [c for c in variant.__mro__ if issubclass(c, Variant) and c is not Variant]
    functions = [f for c in classes for f in vars(c).values() if callable(f)]
    return snapshot(functions, classes)


def _marked(e: Expr, mark: str | None) -> Expr:
    return leaf(e.name, e.role, e.axes, mark)


def _line_of(e: Expr, places: dict[Expr, Place]) -> SourceLine | None:
    place = places.get(e)
    return None if place is None else place.line


def _difference(one: Expr, other: Expr, places: dict[Expr, Place]) -> tuple[str, str, SourceLine | None]:
    """The innermost values at which two expressions part, as text, and the line that makes the first."""
    line = _line_of(one, places)
    while (one.op, one.arg, len(one.src)) == (other.op, other.arg, len(other.src)):
        pairs = [(a, b) for a, b in zip(one.src, other.src, strict=True) if a is not b]
        if not pairs:
            break
        one, other = pairs[0]
        line = _line_of(one, places) or line
    return _short(one), _short(other), line


def _short(e: Expr) -> str:
    text = expression_text(e)
    return text if len(text) <= 60 else text[:57] + "..."
