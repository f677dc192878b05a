"""`layer.explain()`: what was compiled, which form was found and why, every stage as text, and what it costs.

Every line that is not program text is a Python comment, so that the whole keeps the colours of a program; the
text of a stage, cut out, runs.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import sympy

from tttc.backends.onnx.form import form_text
from tttc.compiler.pipeline import HistoryEntry
from tttc.explain.chunk_form import form_lines
from tttc.explain.costs import LayerCost, kept, layer_cost, pieces_depth, plan_lengths, program_costs
from tttc.explain.latex_document import latex_document
from tttc.explain.update_rule import Line, read_text, update_lines
from tttc.ir import cost
from tttc.ir.cost import CHUNK, EVERY, TOKENS, Formula, Work
from tttc.ir.expr import Expr, postorder
from tttc.ir.linearity import Dependence, Finding, dependence
from tttc.ir.names import spelled
from tttc.ir.online import affine_unknown
from tttc.ir.primal import per_token
from tttc.ir.program import (
    SEQUENCE,
    GradientClass,
    GradientProgram,
    Plan,
    Scan,
    ScanKind,
    ScanProgram,
    Tokens,
    Update,
    blocks,
)
from tttc.ir.program_text import said
from tttc.ir.reading import terms_of
from tttc.ir.text import Namer, Printer, steps
from tttc.ir.update import is_staged

if TYPE_CHECKING:
    from tttc.runtime.layer import Layer

WIDTH = 108
SHOWN_TOKENS = 4096  # length of the sequence in the examples that need one


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


def summary(layer: Layer) -> str:
    """One page: what is learned, the rule in words and formulas, the class of its gradients, the form that was found,
    why this backend, and what it costs.
    """
    c, program = layer_cost(layer), layer.stages.program
    header = _header(layer)
    title = header.index("#")
    lines = [*header[: title + 1], *_declared_lines(layer), *header[title + 1 :], "#"]
    lines += _item("costs", f"for one head, {_bindings(plan_lengths(program))}; T tokens in a call")
    lines += _work_lines("forward", c.forward) + _work_lines("backward", c.backward)
    lines += _item("token by token", f"{_number(c.primal.flops)} FLOPs. {_saved_text(c, program.plan)}")
    lines += _state_lines(layer, c) + _item("critical path", _critical_text(program, c))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines) + "\n"


def _declared_lines(layer: Layer) -> list[str]:
    """The loss and the output, each as one formula."""
    program = layer.stages["declare"].program
    lines: list[str] = []
    for name in ("loss", "output"):
        (block,) = blocks(program[name].body)
        (value,) = (a.value for a in block.assigns)
        lines += _item(name, textwrap.shorten(Printer()(value), 3 * WIDTH, placeholder=" ..."))
    return lines


def _stage_text(entry: HistoryEntry) -> str:
    """The text of a stage as it is, and its costs."""
    lines = [str(entry).rstrip("\n")]
    costs = list(program_costs(entry.program))
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
    kind = program.gradients
    lines += _paragraph("update", update_lines(update, kind, plan))
    lines += _item("read", read_text(update, declared.read))
    lines += _class_lines(layer, kind)
    lines += _paragraph("form", form_lines(update, kind, plan, _unknown_text(layer, kind)))
    lines += _item("chunk", f"{_length_text(plan.chunk)}; {plan.reason}")
    if layer.tuning.how != "off":
        lines += _item("tuning", str(layer.tuning))
    lines += _item("onnx", form_text(program))
    if program.telemetry:
        measured = ", ".join(spelled(a.leaf.name) for a in program.scans[0].outputs[1:])
        lines += _item("telemetry", f"{measured} of each mini-batch; the costs have them in")
    return lines


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _declared_shape(w: Expr) -> str:
    return f"{w.name}[{', '.join(a.size for a in w.axes)}]"


def _length_text(length: Tokens) -> str:
    return "the whole sequence" if length is SEQUENCE else f"{length} token{'' if length == 1 else 's'}"


def _class_lines(layer: Layer, kind: GradientClass) -> list[str]:
    """The class of the gradients, and how that of each state depends on each, with the operation that made it so."""
    program, names = layer.stages.program, _gradient_names(layer)
    because = kind.finding.because
    lines = _item("class", _class_text(kind, "" if because is None else _operation(because, names), program.update))
    if len(program.update.states) == 1 or kind.kind == "constant":
        return lines
    alike: dict[str, list[str]] = {}
    for name, g in per_token(program)[0].items():
        alike.setdefault(_dependence_text(g, program.update.states, names), []).append(f"d{name}")
    for text, which in alike.items():
        lines += _comment(f"{', '.join(which)}: {text}", indent=15, hang=2)
    return lines


def _class_text(kind: GradientClass, operation: str, update: Update) -> str:
    """The class, and the operation that decided it."""
    said = f"{kind.kind}: {kind.why}"
    found = kind.finding.dependence
    if found == Dependence.CONSTANT:
        return said
    when = "in the weights they are" if update.clip is None else "before clipping they are, in the weights,"
    how = "" if kind.kind == "affine" else f"{when} {found.name.lower()}"
    made = f"made so by {operation}" if operation else ""
    more = ", ".join(part for part in (how, made) if part)
    steps = "; a further step takes them where it begins" if update.steps > 1 else ""
    return f"{said}; {more}{steps}" if more else said + steps


def _unknown_text(layer: Layer, kind: GradientClass) -> str:
    """The part of an online gradient that depends on the weights."""
    if kind.kind != "affine":
        return ""
    program = layer.stages.program
    gradients, axes = per_token(program)[0], {w.name: w.axes for w in program.update.states}
    unknown = affine_unknown({n: terms_of(g, axes[n]) for n, g in gradients.items()}, program.update.states)
    assert unknown is not None
    return _operation(unknown, _gradient_names(layer))


def _dependence_text(g: Expr, states: Iterable[Expr], names: Mapping[Expr, str]) -> str:
    """How one gradient depends on each state, states of which the same is true together."""
    groups: dict[Finding, list[str]] = {}
    for w in states:
        groups.setdefault(dependence(g, (w,)), []).append(w.name)
    return "; ".join(_finding_text(found, on, names) for found, on in groups.items())


def _finding_text(found: Finding, on: Iterable[str], names: Mapping[Expr, str]) -> str:
    kind = f"{found.dependence.name.lower()} in {', '.join(on)}"
    return kind if found.because is None else f"{kind}, made so by {_operation(found.because, names)}"


def _operation(e: Expr, names: Mapping[Expr, str]) -> str:
    """An operation with its operands by the names of the listing, and its own name where it has one."""
    others = {value: name for value, name in names.items() if value is not e}
    text = textwrap.shorten(Printer(names=others)(e), 60, placeholder=" ...")
    return f"{spelled(names[e])} = {text}" if e in names else text


def _gradient_names(layer: Layer) -> dict[Expr, str]:
    """The names that the listing of the simplified gradient gives to values."""
    program = layer.stages.of(GradientProgram)
    function = program["gradient"]
    (block,) = blocks(function.body)
    namer = Namer(said(function, program), program.names)
    return {step.value: step.name for step in steps(block, namer) if step.value.op != "leaf"}


def _summary(layer: Layer) -> list[str]:
    """The costs of the layer, with its dims."""
    c = layer_cost(layer)
    program = layer.stages.program
    scan, plan = program.scans[0], program.plan
    chunk = cost.scan_cost(scan)
    lines = [
        f"# Costs for one head, {_bindings(plan_lengths(program))}; T tokens in a call. "
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
        f"{_number(c.primal.flops)}, {_number(c.primal.contraction)} of them in contractions. {_saved_text(c, plan)}",
    )
    lines += _item("whole call", f"B*H*T/{CHUNK} * ({_formula(chunk.work.flops)}) forward{_ends_text(program)}")
    lines += _state_lines(layer, c)
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
    return lines if plan.substitution else lines + _memory_lines(layer, scan, c)


def _ends_text(program: ScanProgram) -> str:
    """What a call computes beside its chunks."""
    more = ["the end of each mini-batch"] if program.plan.tiled else []
    more += ["the rows of each chunk"] if program.plan.substitution else []
    beginning = program.scan(ScanKind.BEGIN)
    if beginning is not None and cost.scan_cost(beginning).work.flops != 0:
        more.append("the beginning of the sequence")
    return f", and {' and '.join(more)}" if more else ""


def _work_lines(name: str, work: Work) -> list[str]:
    shown = f"{_number(work.contraction)} in contractions, {_number(work.elementwise)} elementwise"
    return _item(name, f"{_number(work.flops)} FLOPs per token: {shown}")


def _saved_text(c: LayerCost, plan: Plan) -> str:
    """What a chunk is good for, in both of its currencies."""
    largest = f"Its largest value has {_number(c.primal_largest)} elements, for each token"
    if plan.chunk == 1:
        return f"{largest}."
    ratio = sympy.sympify(c.primal.flops / c.forward.flops)
    at = f" at T = {SHOWN_TOKENS}" if ratio.free_symbols else ""
    compared = f"{float(ratio.subs(TOKENS, SHOWN_TOKENS)):.2f} times the chunked form{at}"
    touched = f"It reads and writes {_number(c.primal_bytes)} bytes of state for each token"
    chunked = f"the chunked form {_number(c.chunk_bytes)}, where every chunk finds its state in memory"
    return f"That is {compared}. {largest}. {touched}; {chunked}."


def _state_lines(layer: Layer, c: LayerCost) -> list[str]:
    """What a sequence carries from call to call: in prefill, and when decoding."""
    carried, plan, update = kept(layer), layer.stages.program.plan, layer.stages.program.update
    always, inside = ("; ".join(str(k) for k in carried if k.inside == flag) for flag in (False, True))
    alike = "in prefill and when decoding alike"
    if not inside:
        return _item("state", f"{_number(c.state_bytes)} bytes, {alike}: {always}")
    decoding = f", {alike}" if update.read != "end" else ""
    if plan.mini_batch is SEQUENCE:
        after = " after T tokens" if layer.decode == "rows" else ""
        one = f"the sequence is one mini-batch: {_number(c.open_bytes)} bytes{after}{decoding}"
        lines = _item("state", f"{one}: {always}; {inside}")
    else:
        lines = _item("state", f"{_number(c.state_bytes)} bytes in prefill, from mini-batch to mini-batch: {always}")
        where = "in a mini-batch that a call left open" if update.read == "end" else "when decoding inside a mini-batch"
        most = "at most " if layer.decode == "rows" else ""
        open_ = f'{most}{_number(c.open_bytes)} bytes {where} (decode="{layer.decode}")'
        lines += _comment(f"{open_}: also {inside}", indent=15)
    if update.read == "end":
        lines += _comment('read="end" reads what the whole mini-batch taught: no call continues inside one', indent=15)
    return lines


def _critical_text(program: ScanProgram, c: LayerCost) -> str:
    plan, update = program.plan, program.update
    if c.critical_path == 0:
        summed = "" if is_staged(update) else ": what a chunk hands on is scaled and added to, nothing more"
        return f"no contraction waits for the one of an earlier chunk{summed}"
    total, pieces = f"{_number(c.critical_path)} in a call", pieces_depth(program)
    if pieces is not None:
        first, further = pieces
        unit, piece = ("chunk", "token") if plan.substitution else ("mini-batch", "tile")
        more = f" of one {piece}, {_number(further)} more for each further {piece}" if further else ""
        return f"{_number(first)} dependent contractions per {unit}{more}, {total}"
    per_chunk = sympy.nsimplify(c.critical_path * cost.tokens(plan.chunk) / TOKENS)
    solves = any(e.op == "solve" for a in program.scans[0].updates for e in postorder([a.value]))
    solve = ", a triangular solve counted as one of them," if solves else ","
    unit = "token" if plan.chunk == 1 else "chunk"
    return (
        f"{_number(per_chunk)} dependent contractions per {unit}{solve} {total}; "
        f"{_number(c.sequential)} FLOPs per token of the forward lie on it"
    )


def _memory_lines(layer: Layer, scan: Scan, c: LayerCost) -> list[str]:
    """What the backward keeps: by formula, and for a sequence of a length that is often trained on."""
    kept = {"auto": "about sqrt(T/C)", None: "0: every value is kept", 0: "0: every value is kept"}
    setting = kept.get(layer.checkpoint, str(layer.checkpoint))
    if layer.checkpoint == "auto" and layer.tuning.choice.checkpoint is not None and layer.tuning.entry is not None:
        tuned = f"{layer.tuning.choice.checkpoint} as tuned, for calls of at most {layer.tuning.entry.tokens} tokens"
        setting = f"{tuned}, otherwise {setting}"
    tile = cost.adjoint_cost(next(a for a in layer.stages.program.adjoints if a.scan is scan))
    lines = _item("kept", f"for the backward, with a state every n chunks (n here: {setting}), in elements:")
    lines += _comment(f"T/(C*n) * ({_formula(tile.carry)}) + n * ({_formula(tile.residuals)})", indent=15, hang=2)
    chunk = plan_lengths(layer.stages.program)[CHUNK].subs(TOKENS, SHOWN_TOKENS)
    every = math.isqrt(math.ceil(SHOWN_TOKENS / chunk))  # as the layer chooses it
    with_states = c.memory.subs({TOKENS: SHOWN_TOKENS, EVERY: every})
    whole = c.memory_whole.subs(TOKENS, SHOWN_TOKENS)
    examples = f"{_number(with_states)} bytes with n = {every}, {_number(whole)} where every value is kept"
    return [*lines, *_comment(f"at T = {SHOWN_TOKENS}: {examples}", indent=15)]


# -- layout --------------------------------------------------------------------------------------------------


def _item(name: str, text: str) -> list[str]:
    """A line of a list: its name in a column of its own."""
    return _comment(f"{name:<14} {text}", indent=0, hang=15)


def _paragraph(name: str, lines: list[Line]) -> list[str]:
    """A line of a list with lines below it."""
    first, *others = lines
    shown = _item(name, first.text)
    for line in others:
        shown += _comment(line.text, indent=17 if line.deep else 15, hang=2)
    return shown


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
        return re.sub(r"\d{4,}", lambda digits: f"{int(digits[0]):,}", str(sympy.expand(value.xreplace(large))))
    return f"{int(value):,}" if value == int(value) else f"{float(value):,.1f}"
