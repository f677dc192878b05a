"""From a declaration to the IR: its functions are traced, and everything wrong with it is reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tttc.errors import DeclarationError, Problem, SourceLine, TTTCError, problems_text
from tttc.ir.differentiate import NoGradient, differentiate
from tttc.ir.expr import Expr, const, leaf, leaves
from tttc.ir.program import Assign, Block, Function, Program, Update
from tttc.trace import Traced, captured_names, leaf_axes, lift
from tttc.variant import GateSpec, ParamSpec, Rate, Signature, Variant, is_dim, read_declaration


def check(variant: type[Variant]) -> list[Problem]:
    """Everything wrong with a declaration, without compiling it; an empty list when it is fine."""
    declared, problems = _examined(variant)
    if problems:
        return problems
    try:
        differentiate(declare(declared, dict.fromkeys(declared.dims, 2), "f64"))
    except NoGradient as states:
        return [no_gradient(str(states))]
    return []


def checked_signature(variant: type[Variant]) -> Signature:
    """The signature of a declaration without problems; raises `DeclarationError` with all of them at once."""
    declared, problems = _examined(variant)
    if problems:
        raise DeclarationError(problems_text(declared.name, problems))
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
    return declared, problems


def declare(declared: Signature, dims: Mapping[str, int], dtype: str) -> Program:
    """Trace the user's `loss` and `output` into per-token functions of the IR.

    Raises `DeclarationError` with every problem of the functions.
    """
    traced, problems = _traced_functions(declared)
    if traced is None:
        raise DeclarationError(problems_text(declared.name, problems))
    leaves_, loss, output, names = traced
    z = leaf("z", "output", output.axes)
    functions = (
        _function("loss", loss.expr, leaf("loss", "output"), leaves_),
        _function("output", output.expr, z, leaves_),
    )
    update = _update_rule(declared, leaves_)
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
    def rate(r: Rate) -> Expr:
        if isinstance(r, GateSpec):
            return known.gates[r.name]
        return known.params[declared.rate_name(r)] if isinstance(r, ParamSpec) else const(float(r))

    lr = {n: rate(declared.update.lr_of(n)) for n in known.states}
    scale = {n: declared.update.read_scale_of(n) for n in known.states}
    tau = {n: None if s is None else rate(s) for n, s in scale.items()}
    return Update(tuple(known.states.values()), lr, tau, declared.mini_batch, declared.read)


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
