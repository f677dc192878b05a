"""`layer.explain()`: what was compiled, which form was found and why, every stage as text, and what it costs.

Every line that is not program text is a Python comment, so that the whole keeps the colours of a program; the
text of a stage, cut out, runs.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

from tttc.compile import Entry
from tttc.ir import cost
from tttc.ir.cost import CHUNK, EVERY, MINI_BATCH, TOKENS, Formula, Work
from tttc.ir.expr import Expr
from tttc.ir.latex import program_latex
from tttc.ir.linearity import Dependence, Finding, dependence
from tttc.ir.primal import per_token
from tttc.ir.program import Program, Scan, Update, blocks
from tttc.ir.text import Namer, Printer, steps, variables

if TYPE_CHECKING:
    from tttc.layer import Layer

WIDTH = 108
SHOWN_TOKENS = 4096  # length of the sequence in the examples that need one
LATEX_STAGES = {"declare": "Declaration", "simplify": "Gradient of the loss", "dualize": "Dual form"}

_MASKS = {
    "after": "by the lower triangle of {} over tokens (t, s), diagonal included: token t reads what s <= t taught",
    "before": "by the lower triangle of {} over tokens (t, s), no diagonal: token t reads what s < t taught",
    "start": "no token reads what another of its mini-batch taught",
    "end": "by {} for all tokens (t, s): every token reads what the whole mini-batch taught",
}
_CLASSES = {
    Dependence.CONSTANT: "constant: the gradient does not depend on the weights, so it may be taken at any of them",
    Dependence.LINEAR: "linear in the weights: taken where the mini-batch starts",
    Dependence.AFFINE: "affine in the weights: taken where the mini-batch starts",
    Dependence.NONLINEAR: "nonlinear in the weights: taken at frozen ones, those at the start of the mini-batch",
}


# -- costs as data -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """What one function of a stage costs for one head, as formulas and for the dims of the layer."""

    stage: str
    function: str
    unit: str
    """What the cost is for: "token", or "mini-batch" for what is done once at the end of one."""
    work: Work
    """Formulas in the dims, the chunk C and the mini-batch b."""
    lengths: Mapping[sympy.Symbol, Formula]
    dims: Mapping[str, int]

    @property
    def contraction(self) -> Formula:
        """FLOPs of contractions; a number unless a chunk is the whole sequence, then a formula in T."""
        return cost.evaluate(self.work.contraction, self.dims, self.lengths)

    @property
    def elementwise(self) -> Formula:
        return cost.evaluate(self.work.elementwise, self.dims, self.lengths)

    @property
    def flops(self) -> Formula:
        return sympy.expand(self.contraction + self.elementwise)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs for one head, with its dims: FLOPs per token, sizes in bytes, formulas where T stays open."""

    primal: Work
    forward: Work
    recomputed: Work
    """The forward chunk once more, with the values that its backward needs: unless all of them were kept."""
    backward: Work
    state_bytes: Formula
    sequence_bytes: Formula
    """Read and written in a forward, per token."""
    chunk_bytes: Formula
    """State and fixed values read and written by a chunk that finds them in memory, per token."""
    largest: Formula
    """Elements of the largest intermediate value of a forward chunk."""
    primal_largest: Formula
    critical_path: Formula
    """Dependent contractions in a call on T tokens."""
    sequential: Formula
    """FLOPs per token of the forward that lie between the carry coming in and going out."""
    memory: Formula
    """Bytes that a backward keeps, with a state every n chunks."""
    memory_whole: Formula
    """The same where every value is kept."""

    @property
    def intensity(self) -> tuple[Formula, Formula]:
        """FLOPs of the forward per byte: state in memory, state on the chip."""
        on_chip = self.forward.flops / self.sequence_bytes
        return self.forward.flops / (self.sequence_bytes + self.chunk_bytes), on_chip


def stage_costs(layer: Layer) -> list[StageCost]:
    """The cost of every function of every stage, in their order; the two sweeps of an adjoint apart."""
    return [c for entry in layer.stages if entry.program is not None for c in _stage_costs(entry.program)]


def _stage_costs(program: Program) -> Iterator[StageCost]:
    if program.adjoints:
        yield from _sweeps(program)
        return
    runs_once = {s.name for s in program.scans if not s.loops}
    for function in program.functions:
        lengths = cost.lengths_of(function)
        work = cost.function_work(function)
        work = work.times(1 / TOKENS) if lengths else work
        unit = "mini-batch" if function.name in runs_once else "token"
        yield StageCost(program.stage, function.name, unit, work, lengths, program.dims)


def _sweeps(program: Program) -> Iterator[StageCost]:
    for a in program.adjoints:
        costs = cost.adjoint_cost(a)
        unit, share = ("token", 1 / CHUNK) if a.scan.loops else ("mini-batch", sympy.S.One)
        lengths = {CHUNK: cost.tokens(a.scan.chunk)}
        for sweep, work in (("forward, keeping values", costs.forward), ("backward", costs.backward.work)):
            name = f"{a.scan.name}, {sweep}"
            yield StageCost(program.stage, name, unit, work.times(share), lengths, program.dims)


def layer_cost(layer: Layer) -> LayerCost:
    """The cost of the scheduled program: of the scans that a sequence of whole mini-batches runs."""
    program = layer.stages.program
    plan, scan = program.plan, program.scans[0]
    assert plan is not None
    assert program.update is not None
    lengths = _lengths(program)
    scheduled, primal = layer.stages["schedule"].program, layer.stages["primal"].program
    assert scheduled is not None
    assert primal is not None
    adjoints = {a.scan.name: cost.adjoint_cost(a) for a in program.adjoints}
    chunk, tile = cost.scan_cost(scan), adjoints[scan.name]
    recomputed, backward = tile.forward.times(1 / CHUNK), tile.backward.work.times(1 / CHUNK)
    if plan.tiled:
        closing = adjoints[program.scans[-1].name]
        recomputed += closing.forward.times(1 / MINI_BATCH)
        backward += closing.backward.work.times(1 / MINI_BATCH)
    item = cost.ITEM_BYTES[program.dtype]
    (token_loop,) = primal.functions

    def value(formula: Formula) -> Formula:
        return cost.evaluate(formula, program.dims, lengths)

    def valued(work: Work) -> Work:
        return Work(value(work.contraction), value(work.elementwise))

    return LayerCost(
        primal=valued(cost.function_work(token_loop).times(1 / TOKENS)),
        forward=valued(cost.function_work(scheduled.functions[0]).times(1 / TOKENS)),
        recomputed=valued(recomputed),
        backward=valued(backward),
        state_bytes=value(item * sympy.Add(*(cost.elements(w.axes) for w in program.update.states))),
        sequence_bytes=value(item * (chunk.read + chunk.written) / CHUNK),
        chunk_bytes=value(item * (chunk.traffic(True) - chunk.traffic(False)) / CHUNK),
        largest=value(chunk.largest),
        primal_largest=value(sympy.Max(*(cost.chunk_cost(block, ()).largest for block in blocks(token_loop.body)))),
        critical_path=value(_critical_path(program)),
        sequential=value(chunk.sequential.flops / CHUNK),
        memory=value(item * tile.memory()),
        memory_whole=value(item * tile.memory(sympy.S.Zero)),
    )


def _lengths(program: Program) -> dict[sympy.Symbol, Formula]:
    """The chunk and the mini-batch of a scheduled program."""
    plan = program.plan
    assert plan is not None
    lengths = {CHUNK: cost.tokens(plan.chunk)}
    return lengths if plan.mini_batch is None else {**lengths, MINI_BATCH: cost.tokens(plan.mini_batch)}


def _critical_path(program: Program) -> Formula:
    """Dependent contractions of a call: tiles of a mini-batch share its weights, mini-batches wait for one another."""
    plan, update, scan = program.plan, program.update, program.scans[0]
    assert plan is not None
    assert update is not None
    if not plan.tiled:
        return cost.scan_cost(scan).critical_path()
    grown = {a.leaf.name: a.value for a in scan.updates}
    handed_on = {w.arg[0].name: grown[f"S_{w.arg[0].name}"] for w in update.states}
    return cost.chain_growth(handed_on) * TOKENS / MINI_BATCH


# -- text ----------------------------------------------------------------------------------------------------


def explain(layer: Layer, latex: bool = False, stages: Iterable[str] | None = None) -> str:
    """Everything about a layer as one text; `latex` gives the mathematics as a LaTeX document instead.

    `stages` are the names of those that are printed, all of them if not given.
    """
    if latex:
        return latex_document(layer)
    wanted = [e.name for e in layer.stages] if stages is None else list(stages)
    parts = ["\n".join(_header(layer)), "\n".join(_summary(layer))]
    parts += [_stage_text(layer.stages[name]) for name in wanted]
    return "\n\n".join(parts) + "\n"


def _stage_text(entry: Entry) -> str:
    """The text of a stage as it is, and its costs."""
    lines = [str(entry).rstrip("\n")]
    costs = list(_stage_costs(entry.program)) if entry.program is not None else []
    for c in costs:
        where = f", {_bindings(c.lengths)}" if c.lengths else ""
        lines += ["", f"# {c.function}: {_number(c.flops)} FLOPs per {c.unit} and head{where}"]
        lines += _comment(f"contractions  {_formula(c.work.contraction)} = {_number(c.contraction)}", hang=14)
        lines += _comment(f"elementwise   {_formula(c.work.elementwise)} = {_number(c.elementwise)}", hang=14)
    return "\n".join(lines)


def _bindings(lengths: Mapping[sympy.Symbol, Formula]) -> str:
    return ", ".join(f"{symbol} = {length}" for symbol, length in lengths.items())


def _header(layer: Layer) -> list[str]:
    declared = layer.signature
    program = layer.stages.program
    plan, update = program.plan, program.update
    assert plan is not None
    assert update is not None
    first = " ".join((declared.variant.__doc__ or "").split("\n\n")[0].split())
    dims = ", ".join(f"{d}={n}" for d, n in layer.dims.items())
    lines = _comment(f"{declared.name}: {first}" if first else declared.name, hang=0, indent=0)
    lines.append("#")
    lines += _item(
        "dims",
        f"{dims}; q, k, v and z in {_dtype(layer.dtype)}, states and arithmetic in {_dtype(layer.compute_dtype)}",
    )
    why = layer.why if layer.why.startswith(layer.backend) else f"{layer.backend}: {layer.why}"
    lines += _item("backend", f"{why} (device {layer.device})")
    lines += _item("states", ", ".join(_declared_shape(w) for w in update.states))
    lines += _item("update", _update_text(update))
    lines += _item("read", f'"{update.read}": {_read_text(update)}')
    lines += _class_lines(layer)
    lines += _item("form", _form_text(layer))
    lines += _item("chunk", f"{_length_text(plan.chunk)}; {plan.reason}")
    return lines


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _declared_shape(w: Expr) -> str:
    return f"{w.arg[0].name}[{', '.join(a.size for a in w.axes)}]"


def _length_text(length: int | str) -> str:
    return "the whole sequence" if length == "T" else f"{length} tokens"


def _update_text(update: Update) -> str:
    rates = {_rate_text(update, w.arg[0].name): None for w in update.states}
    many = "" if len(rates) == 1 else f" (by state: {'; '.join(rates)})"
    rule = next(iter(rates)) if len(rates) == 1 else "tau_t * sum of lr_s * g_s"
    span = "the whole sequence" if update.mini_batch == "all" else f"{update.mini_batch} tokens"
    return f"W_t = W_start - {rule}{many}, over the tokens s of a mini-batch of {span}; g_s at W_start"


def _rate_text(update: Update, name: str) -> str:
    tau, lr = update.tau[name], update.lr[name]
    scale = "" if tau is None else f"{Printer()(tau)}_t * " if tau.op == "leaf" else f"{Printer()(tau)} * "
    source = (
        f"{Printer()(lr)}_s * "
        if lr.op == "leaf"
        else ""
        if lr.op == "const" and lr.arg == 1
        else f"{Printer()(lr)} * "
    )
    return f"{scale}sum of {source}g_s"


def _read_text(update: Update) -> str:
    what = {"after": "z_t from W_t, which has seen token t", "before": "z_t from W_(t-1)", "start": "z_t from W_start"}
    return what.get(update.read, "z_t from the weights at the end of the mini-batch: not causal inside it")


def _class_lines(layer: Layer) -> list[str]:
    """How the gradient of each state depends on each state, with the operation that made it so."""
    program = layer.stages["simplify"].program
    compiled = layer.stages.program
    assert program is not None
    assert compiled.update is not None
    states = compiled.update.states
    gradients, _ = per_token(compiled)
    names = _gradient_names(program)
    worst = max((dependence(g, states) for g in gradients.values()), key=lambda f: f.dependence)
    lines = _item("class", _CLASSES[worst.dependence])
    alike: dict[str, list[str]] = {}
    for name, g in gradients.items():
        alike.setdefault(_dependence_text(g, states, names), []).append(f"d{name}")
    for said, which in alike.items():
        lines += _comment(f"{', '.join(which)}: {said}", indent=15, hang=2)
    return lines


def _dependence_text(g: Expr, states: Iterable[Expr], names: Mapping[Expr, str]) -> str:
    """How one gradient depends on each state, states of which the same is true together."""
    groups: dict[Finding, list[str]] = {}
    for w in states:
        groups.setdefault(dependence(g, (w,)), []).append(w.arg[0].name)
    return "; ".join(_finding_text(found, on, names) for found, on in groups.items())


def _finding_text(found: Finding, on: Iterable[str], names: Mapping[Expr, str]) -> str:
    kind = f"{found.dependence.name.lower()} in {', '.join(on)}"
    return kind if found.because is None else f"{kind}, made so by {_operation(found.because, names)}"


def _operation(e: Expr, names: Mapping[Expr, str]) -> str:
    """An operation with its operands by the names of the listing, and its own name where it has one."""
    others = {value: name for value, name in names.items() if value is not e}
    text = textwrap.shorten(Printer(names=others)(e), 60, placeholder=" ...")
    return f"{names[e]} = {text}" if e in names else text


def _gradient_names(program: Program) -> dict[Expr, str]:
    """The names that the listing of the simplified gradient gives to values."""
    function = program["gradient"]
    (block,) = blocks(function.body)
    namer = Namer(variables(function) | set(program.dims) | {"T"}, program.names)
    return {step.value: step.name for step in steps(block, namer) if step.value.op != "leaf"}


def _form_text(layer: Layer) -> str:
    update = layer.stages.program.update
    assert update is not None
    rates = dict.fromkeys(
        _rate_text(update, w.arg[0].name).replace("sum of ", "").removesuffix("g_s") for w in update.states
    )
    shown = " and ".join(f"({rate.removesuffix(' * ')})" if rate else "ones" for rate in rates)
    return (
        f"dual: a chunk at once in matrix products, the weights of no single token; {_MASKS[update.read].format(shown)}"
    )


def _summary(layer: Layer) -> list[str]:
    """The costs of the layer, with its dims."""
    c = layer_cost(layer)
    program = layer.stages.program
    scan, plan = program.scans[0], program.plan
    assert plan is not None
    chunk = cost.scan_cost(scan)
    lines = [
        f"# Costs for one head, {_bindings(_lengths(program))}; T tokens in a call. "
        "Times B * H for all heads of a batch."
    ]
    lines += _comment(
        "A multiply-add of a contraction is 2 FLOPs, everything else 1 per element, a named function too. "
        "Masked halves of Gram matrices are counted in full: they are computed."
    )
    lines.append("#")
    lines += _work_lines("forward", c.forward)
    lines += _work_lines("backward", c.backward)
    lines += _item("recompute", f"{_number(c.recomputed.flops)} more, unless every value is kept (checkpoint=None)")
    lines += _item(
        "primal",
        f"{_number(c.primal.flops)}, {_number(c.primal.contraction)} of them in contractions. {_saved_text(c)}",
    )
    lines += _item("whole call", f"B*H*T/{CHUNK} * ({_formula(chunk.work.flops)}) forward" + _closing_text(plan.tiled))
    lines += _item("state", f"{_number(c.state_bytes)} bytes")
    lines += _item("sequences", f"{_number(c.sequence_bytes)} bytes read and written per token of a forward")
    in_memory, on_chip = (x.subs(TOKENS, SHOWN_TOKENS) for x in c.intensity)
    depends = f", at T = {SHOWN_TOKENS}" if any(x.free_symbols for x in c.intensity) else ""
    lines += _item(
        "intensity",
        f"{_number(on_chip)} FLOPs per byte with the state on the chip, {_number(in_memory)} where every chunk "
        f"reads and writes it{depends}",
    )
    lines += _item("critical path", _critical_text(program, c))
    lines += _item("largest", f"{_number(c.largest)} elements in one intermediate value: {chunk.largest}")
    lines += _memory_lines(layer, scan, c)
    return lines


def _closing_text(tiled: bool) -> str:
    return ", and the end of each mini-batch" if tiled else ""


def _work_lines(name: str, work: Work) -> list[str]:
    shown = f"{_number(work.contraction)} in contractions, {_number(work.elementwise)} elementwise"
    return _item(name, f"{_number(work.flops)} FLOPs per token: {shown}")


def _saved_text(c: LayerCost) -> str:
    """What the dual form is good for, in both of its currencies."""
    largest = f"Its largest value has {_number(c.primal_largest)} elements, for each token"
    ratio = sympy.expand(c.primal.flops) / c.forward.flops
    if ratio.free_symbols:
        return f"{largest}."
    compared = f"{float(ratio):.2f} times the dual form"
    touched = f"it reads and writes the state for each token, {_number(2 * c.state_bytes)} bytes"
    dual = f"the dual form for each chunk, {_number(c.chunk_bytes)} bytes per token"
    return f"That is {compared}; {touched}, {dual}."


def _critical_text(program: Program, c: LayerCost) -> str:
    if c.critical_path == 0:
        return "no contraction waits for the one of an earlier chunk: the state is a running sum"
    plan = program.plan
    assert plan is not None
    unit = "mini-batch" if plan.tiled else "chunk"
    length = plan.mini_batch if plan.tiled else plan.chunk
    per_unit = sympy.nsimplify(c.critical_path * cost.tokens(length or 1) / TOKENS)
    shared = "" if plan.tiled else f"; {_number(c.sequential)} FLOPs per token of the forward lie on it"
    return f"{_number(per_unit)} dependent contractions per {unit}, {_number(c.critical_path)} in a call{shared}"


def _memory_lines(layer: Layer, scan: Scan, c: LayerCost) -> list[str]:
    """What the backward keeps: by formula, and for a sequence of a length that is often trained on."""
    kept = {"auto": "about sqrt(T/C)", None: "0: every value is kept", 0: "0: every value is kept"}
    setting = kept.get(layer.checkpoint, str(layer.checkpoint))
    tile = cost.adjoint_cost(next(a for a in layer.stages.program.adjoints if a.scan is scan))
    lines = _item("kept", f"for the backward, with a state every n chunks (n here: {setting}), in elements:")
    lines += _comment(f"T/(C*n) * ({_formula(tile.carry)}) + n * ({_formula(tile.residuals)})", indent=15, hang=2)
    chunk = _lengths(layer.stages.program)[CHUNK].subs(TOKENS, SHOWN_TOKENS)
    every = math.isqrt(math.ceil(SHOWN_TOKENS / chunk))  # as the layer chooses it
    with_states = c.memory.subs({TOKENS: SHOWN_TOKENS, EVERY: every})
    whole = c.memory_whole.subs(TOKENS, SHOWN_TOKENS)
    examples = f"{_number(with_states)} bytes with n = {every}, {_number(whole)} where every value is kept"
    return [*lines, *_comment(f"at T = {SHOWN_TOKENS}: {examples}", indent=15)]


# -- layout --------------------------------------------------------------------------------------------------


def _item(name: str, text: str) -> list[str]:
    """A line of a list: its name in a column of its own."""
    return _comment(f"{name:<14} {text}", indent=0, hang=15)


def _comment(text: str, hang: int = 0, indent: int = 0) -> list[str]:
    first = "# " + " " * indent
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first + " " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _formula(formula: Formula) -> str:
    return str(sympy.expand(formula))


def _number(formula: Formula) -> str:
    """A number with its thousands apart, at most one digit after the point; a formula where a symbol is left."""
    value = sympy.sympify(formula)
    if value.free_symbols:
        large = {r: sympy.Integer(round(r)) for r in value.atoms(sympy.Rational) if abs(r) > 100}
        return str(sympy.expand(value.xreplace(large)))
    return f"{int(value):,}" if value == int(value) else f"{float(value):,.1f}"


# -- LaTeX ---------------------------------------------------------------------------------------------------

_DOCUMENT = r"""\documentclass[a4paper]{article}
\usepackage[margin=15mm]{geometry}
\usepackage{amsmath,amssymb}
\allowdisplaybreaks
\begin{document}
\section*{%s}
Tokens are rows: a vector over features is a row, a vector over tokens a column, $\mathbf{1}$ the column of ones,
and a number that is added to a matrix is added to each of its entries. $\odot$ is elementwise and binds looser
than a matrix product.

%s
\end{document}
"""


def latex_document(layer: Layer) -> str:
    """The mathematics, from the declaration to the dual form, as a LaTeX document that compiles by itself."""
    sections = []
    for stage, title in LATEX_STAGES.items():
        program = layer.stages[stage].program
        assert program is not None
        sections.append(f"\\subsection*{{{title}}}\n{program_latex(program)}")
    name = layer.signature.name.replace("_", r"\_")
    return _DOCUMENT % (name, "\n\n".join(sections))
