"""The compiler: a tuple of stages, and a history that checks itself.

Reading `PIPELINE` is reading what happens to a declaration.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tttc.errors import (
    BackendRefusal,
    DeclarationError,
    NotDifferentiable,
    PassChangedMeaning,
    Problem,
    SourceLine,
    TTTCError,
    problems_text,
)
from tttc.ir import build as b
from tttc.ir.adjoint import adjoint
from tttc.ir.differentiate import lower_composites, vjp
from tttc.ir.dualize import dualize
from tttc.ir.expr import OPS, Axis, Expr, const, leaf, leaves
from tttc.ir.interpret import interpret
from tttc.ir.primal import token_loop
from tttc.ir.program import Assign, Block, Function, Program, Update, blocks
from tttc.ir.schedule import schedule
from tttc.ir.simplify import renamed_hints, simplify
from tttc.ir.verify import verify
from tttc.trace import Traced, captured_names, leaf_axes, lift
from tttc.variant import SGD, GateSpec, ParamSpec, Rate, Signature, Variant, is_dim, read_declaration

COMPOSITES = tuple(op.name for op in OPS.values() if op.lower)


@dataclass(frozen=True)
class Options:
    """What a user may choose beside the declaration; every stage is given them."""

    dims: Mapping[str, int]
    dtype: str = "f32"
    chunk: int | None = None


@dataclass(frozen=True)
class Stage:
    """One step of the compiler: its name, what it does, and the ops that must be gone after it."""

    name: str
    run: Callable[[Any, Options], Program]
    forbidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A stage of the history: the program that it made, and how long that took."""

    name: str
    number: int
    total: int
    program: Program | None
    milliseconds: float
    text: str = ""
    where: SourceLine | None = None

    def __str__(self) -> str:
        origin = f" - from {self.where}" if self.where else ""
        head = f"# stage {self.number} of {self.total}: {self.name} - {self.milliseconds:.1f} ms{origin}\n"
        return head + (str(self.program) if self.program else self.text)


class History:
    """The stages that a declaration went through, verified as they were added. `history["dualize"]` is one of them."""

    def __init__(self, entries: list[Entry] | None = None) -> None:
        self.entries = entries or []

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no stage {name!r}; the stages are {', '.join(e.name for e in self.entries)}")

    @property
    def program(self) -> Program:
        """The last program: what a backend is given."""
        return next(e.program for e in reversed(self.entries) if e.program is not None)

    def append(self, entry: Entry, stage: Stage) -> None:
        """Add a stage: its types, scopes and ops are verified, with `TTTC_CHECK=1` also its meaning."""
        if entry.program is not None:
            verify(entry.program, stage.forbidden)
            before = [e for e in self.entries if e.program is not None]
            if os.environ.get("TTTC_CHECK", "0") not in ("", "0") and before:
                check_meaning(before[-1].program, entry.program)  # type: ignore[arg-type]
        self.entries.append(entry)
        _debug(entry)

    def diff(self, one: str, other: str) -> str:
        """A unified diff of two stages as text."""
        before, after = (str(self[name]).splitlines(keepends=True) for name in (one, other))
        return "".join(difflib.unified_diff(before, after, fromfile=one, tofile=other))


def _debug(entry: Entry) -> None:
    level = int(os.environ.get("TTTC_DEBUG", "0") or 0)
    if level >= 1:
        print(f"tttc: {entry.name:<14}{entry.milliseconds:8.1f} ms", file=sys.stderr)
    if level >= 3:
        print(entry, file=sys.stderr)


# -- declare -----------------------------------------------------------------------------------------------------------


def declare(declared: Signature, options: Options) -> Program:
    """Trace the user's `loss` and `output` into per-token functions of the IR."""
    program, problems = _declared_program(declared, options)
    if problems:
        raise DeclarationError(problems_text(declared.name, problems))
    assert program is not None
    return program


def _declared_program(declared: Signature, options: Options) -> tuple[Program | None, list[Problem]]:
    tokens = {n: leaf(n, "token", leaf_axes(s.dims)) for n, s in declared.tokens.items()}
    gates = {n: leaf(n, "gate", leaf_axes(s.dims)) for n, s in declared.gates.items()}
    states = {n: leaf(n, "state", leaf_axes(s.dims)) for n, s in declared.states.items()}
    params = {n: leaf(n, "param", leaf_axes(s.dims)) for n, s in declared.params.items()}
    attributes = {a: gates[g] for a, g in declared.attributes.items()}
    extras = {n: e for n, e in tokens.items() if n not in ("q", "k", "v")}
    bound = declared.variant.bind({n: Traced(e) for n, e in (states | params | attributes | extras).items()})
    functions: list[Callable[..., Any]] = [declared.variant.learner, declared.variant.loss, declared.variant.output]
    problems: list[Problem] = []
    with captured_names(functions) as names:
        loss = _traced(declared, "loss", bound, (tokens["k"], tokens["v"]), problems)
        output = _traced(declared, "output", bound, (tokens["q"],), problems)
    if loss is not None and loss.axes:
        shape = ", ".join(loss.shape)
        problems.append(
            Problem(f"loss returns [{shape}], not a scalar.", "Reduce it: tttc.sum(...) or tttc.mean(...).")
        )
    if problems or loss is None or output is None:
        return None, _merged(problems)
    z = leaf("z", "output", output.axes)
    update = _update_rule(declared, states, params, gates)
    program = Program(
        _snake(declared.name),
        "declare",
        (
            _function("loss", loss.expr, leaf("loss", "output"), declared, (states, params, gates, tokens)),
            _function("output", output.expr, z, declared, (states, params, gates, tokens)),
        ),
        dict(options.dims),
        options.dtype,
        names,
        update,
        title=declared.name,
    )
    return program, []


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


def _function(
    name: str, value: Expr, target: Expr, declared: Signature, groups: tuple[dict[str, Expr], ...]
) -> Function:
    """A per-token function whose parameters are the leaves that its value reads, in the order of the declaration."""
    read = {e.arg[0].name for e in leaves([value])}
    order = [e for group in reversed(groups) for n, e in group.items() if n in read]
    return Function(name, tuple(order), (Block((Assign(target, value),)),), (target,))


def _update_rule(
    declared: Signature, states: dict[str, Expr], params: dict[str, Expr], gates: dict[str, Expr]
) -> Update:
    def rate(r: Rate) -> Expr:
        if isinstance(r, GateSpec):
            return gates[r.name]
        return params[declared.rate_name(r)] if isinstance(r, ParamSpec) else const(float(r))

    lr = {n: rate(declared.update.lr_of(n)) for n in states}
    scale = {n: declared.update.read_scale_of(n) for n in states}
    tau = {n: None if s is None else rate(s) for n, s in scale.items()}
    return Update(tuple(states.values()), lr, tau, declared.mini_batch, declared.read)


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


# -- differentiate and simplify ----------------------------------------------------------------------------------------


def differentiate(program: Program, options: Options) -> Program:
    """loss -> gradient: the derivative of the loss with respect to every state, kept as products."""
    update = program.update
    assert update is not None
    (block,) = blocks(program["loss"].body)
    (loss,) = lower_composites([block.assigns[0].value], update.states)
    wrt = [e for e in leaves([loss]) if e.arg[0].role == "state"]
    found, named = vjp([(loss, const(1))], wrt, program.names, prefix="g_")
    if not any(g is not None for g in found):
        states = ", ".join(w.arg[0].name for w in update.states)
        raise NotDifferentiable(
            f"variant `{program.title}`: the loss does not depend on any state ({states}).\n"
            "  Let `loss` call `self.learner(k)`, or read a state in it."
        )
    assigns = []
    for w in update.states:
        total = None
        for e, g in zip(wrt, found, strict=True):
            if e.arg[0] == w.arg[0] and g is not None:
                aligned = b.rename(g, dict(zip(e.axes, w.axes, strict=True)))
                total = aligned if total is None else b.add(total, aligned)
        value = b.broadcast(total if total is not None else const(0), w.axes)
        assigns.append(Assign(leaf(f"d{w.arg[0].name}", "gradient", w.axes), value))
    used = {e.arg[0].name for e in leaves(a.value for a in assigns)}
    params = tuple(p for p in program["loss"].params if p.arg[0].name in used)
    gradient = Function("gradient", params, (Block(tuple(assigns)),), tuple(a.target for a in assigns))
    names = {**program.names, **named}
    return replace(program, stage="differentiate", functions=(gradient, program["output"]), names=names)


def simplify_functions(program: Program, options: Options) -> Program:
    """Algebra on the per-token functions."""
    names = dict(program.names)
    functions = []
    for function in program.functions:
        moved: dict[Expr, Expr] = {}
        (block,) = blocks(function.body)
        values = simplify([a.value for a in block.assigns], moved=moved)
        names.update(renamed_hints(program.names, moved))
        assigns = tuple(Assign(a.target, v) for a, v in zip(block.assigns, values, strict=True))
        functions.append(replace(function, body=(Block(assigns),)))
    return replace(program, stage="simplify", functions=tuple(functions), names=names)


# -- the pipeline ------------------------------------------------------------------------------------------------------

PIPELINE: tuple[Stage, ...] = (
    Stage("declare", declare),  # the user's loss and output, as written
    Stage("differentiate", differentiate),  # the gradient of the loss, kept as products
    Stage("simplify", simplify_functions),
    Stage("primal", lambda p, o: token_loop(p)),  # the definition: a loop over tokens
    Stage("dualize", lambda p, o: dualize(p)),  # a mini-batch at once, no weights of a single token
    Stage("schedule", lambda p, o: schedule(p, o.chunk)),  # chunks, open mini-batches, what is carried
    Stage("adjoint", lambda p, o: adjoint(p), COMPOSITES),  # the derivative of every chunk
)


def run_pipeline(declared: Signature, options: Options) -> History:
    """Every stage before `emit`, which is the backend's."""
    history = History()
    where = next(iter(declared.states.values())).where
    total = len(PIPELINE) + 1
    current: Any = declared
    for number, stage in enumerate(PIPELINE, 1):
        began = time.perf_counter()
        current = stage.run(current, options)
        milliseconds = (time.perf_counter() - began) * 1e3
        history.append(Entry(stage.name, number, total, current, milliseconds, where=where), stage)
    return history


def check(variant: type[Variant]) -> list[Problem]:
    """Everything wrong with a declaration, without compiling it; an empty list when it is fine."""
    declared, program, problems = _examined(variant)
    if problems or program is None:
        return problems
    try:
        differentiate(program, _smallest(declared))
    except NotDifferentiable as error:
        what, _, remedy = str(error).partition("\n  ")
        return [Problem(what.removeprefix(f"variant `{declared.name}`: "), remedy)]
    return []


def checked_signature(variant: type[Variant]) -> Signature:
    """The signature of a declaration without problems; raises `DeclarationError` with all of them at once."""
    declared, _, problems = _examined(variant)
    if problems:
        raise DeclarationError(problems_text(declared.name, problems))
    return declared


def _examined(variant: type[Variant]) -> tuple[Signature, Program | None, list[Problem]]:
    """Problems of the settings and, where the axes are named at all, of the functions."""
    declared, problems = read_declaration(variant)
    if not isinstance(declared.update, SGD) or not all(map(is_dim, declared.dims)):
        return declared, None, problems
    program, found = _declared_program(declared, _smallest(declared))
    return declared, program, problems + found


def _smallest(declared: Signature) -> Options:
    return Options(dict.fromkeys(declared.dims, 2), "f64")


# -- meaning -----------------------------------------------------------------------------------------------------------


def check_meaning(before: Program, after: Program, tokens: int = 21, tolerance: float = 1e-9) -> None:
    """Interpret two stages on the same random inputs; raise `PassChangedMeaning` where they differ.

    The tolerance is far above float64 rounding of a few hundred operations (1e-13) and far below any wrong term.
    """
    comparable = {f.name for f in before.functions} & {f.name for f in after.functions}
    for name in sorted(comparable):
        arguments = random_arguments(after[name].params, after.dims, tokens)
        arguments |= random_arguments(before[name].params, before.dims, tokens)
        results = zip(
            before[name].returns, interpret(before, name, arguments), interpret(after, name, arguments), strict=True
        )
        for returned, x, y in results:
            error = float(np.max(np.abs(x - y), initial=0.0)) / (1.0 + float(np.max(np.abs(x), initial=0.0)))
            if not error <= tolerance:
                raise PassChangedMeaning(
                    f"stage {after.stage!r} changed the output {returned.arg[0].name} of {name}: "
                    f"relative error {error:.1e}.\n"
                    f"--- {before.stage}\n{before}\n--- {after.stage}\n{after}"
                )


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


def refuse(backend: str, reasons: list[str]) -> BackendRefusal:
    """The error of a backend that was asked for by name."""
    listed = "\n".join(f"  - {r}" for r in reasons)
    return BackendRefusal(f'backend {backend!r} cannot run this program:\n{listed}\n  Use backend="torch" or "auto".')
