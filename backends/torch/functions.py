"""Single functions of a program as PyTorch, for files that are read, laid out as `ruff format` lays out Python.

    def chunk(W1, b1, gamma, beta, q, k, v, lr, tau):
        \"\"\"Whole mini-batches.\"\"\"
        z1 = k @ W1 + b1.unsqueeze(1)  # [C, D]
        ...
        return z, W1, b1

Tensors have a leading axis G = batch * heads, as in emit.py. The backward of a chunk makes again what it needs of the
forward: it is one function of the same inputs and of the cotangents of the results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy

from tttc.backends.torch.emit import length_lines
from tttc.backends.torch.ops import FUSED_DERIVATIVES, HELPERS, formula
from tttc.backends.torch.printer import CHUNK, HEADS, TorchPrinter, is_tensor, name_of
from tttc.ir import build as b
from tttc.ir.expr import TOKENS, Axes, Expr, const, leaves, postorder, substitute
from tttc.ir.formulas import formula_text
from tttc.ir.names import function, marked, own, size_of, spelled, unmarked
from tttc.ir.program import Allocate, Assign, Block, For, Function, Length, Program, ScanAdjoint, Statement, cotangent
from tttc.ir.program_text import formulas, said
from tttc.ir.simplify import simplify_assigns
from tttc.ir.text import Namer, Text, core, is_written_again, steps, worth_a_name

LINE_WIDTH = 120
_ASSIGN = "{} = {}".format
_SIMPLE = re.compile(r"[\w.⟨⟩:'@#]+")


# -- layout ------------------------------------------------------------------------------------------------------------


def listed(head: str, items: Sequence[str], tail: str, *, each: bool = False) -> list[str]:
    """A list in brackets on one line, in brackets on a line of its own, or one item a line; a tuple that does not fit
    is always the last (`each`).
    """
    inner = ", ".join(items)
    if len(unmarked(head + inner + tail)) <= LINE_WIDTH:
        return [head + inner + tail]
    indent = " " * (len(head) - len(head.lstrip()) + 4)
    if not each and len(unmarked(indent + inner)) <= LINE_WIDTH:
        body = [indent + inner]
    else:
        body = [line for x in items for line in _item(indent, x)]
    return [head, *body, indent[4:] + tail]


def _item(indent: str, text: str) -> list[str]:
    """An item on a line; of a call that is too long for one, the arguments on lines of their own."""
    head, bracket, arguments = text.partition("⟩(")  # what is called has a name
    if len(unmarked(f"{indent}{text},")) <= LINE_WIDTH or not (bracket and text.startswith("lambda ")):
        return [f"{indent}{text},"]
    return listed(f"{indent}{head}{bracket}", _arguments(arguments.removesuffix(")")), "),")


def _arguments(text: str) -> list[str]:
    """The arguments of a call: what is between commas, but for those of an index."""
    return re.split(r", (?![^\[\]]*\])", text)


def assigned(indent: str, names: Sequence[str], head: str, items: Sequence[str], tail: str) -> list[str]:
    """`a, b = f(x, y)`, or `(a,) = f(x)`; what is called is opened before the names are."""
    target = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
    if len(unmarked(f"{indent}{target} = {head}")) <= LINE_WIDTH:
        return listed(f"{indent}{target} = {head}", items, tail)
    *first, last = listed(f"{indent}(", names, ")", each=True)
    return [*first, *listed(f"{last} = {head}", items, tail)]


def returned(indent: str, items: Sequence[str]) -> list[str]:
    """`return` of one value, or of several."""
    if len(unmarked(f"{indent}return {', '.join(items)}")) <= LINE_WIDTH:
        return [f"{indent}return {', '.join(items) if len(items) > 1 else f'({items[0]},)'}"]
    return listed(f"{indent}return (", items, ")", each=True)


# -- functions ---------------------------------------------------------------------------------------------------------


def block_function(
    name: str, parameters: Sequence[Expr], block: Block, program: Program, doc: str, *, alone: bool = False
) -> str:
    """A function of tensors that returns the targets of a block; `alone`: the one value and not a tuple of it."""
    targets = [name_of(a.target) for a in block.assigns]
    writer = Writer(program, parameters, targets)
    body = writer.block(block, "    ")
    lines = listed(f"def {marked(function(name))}(", list(map(name_of, parameters)), "):")
    lines += [f'    """{doc}"""'] if doc else []
    result = [f"    return {targets[0]}"] if alone else returned("    ", targets)
    return "\n".join([*lines, *length_lines(parameters, "\n".join(body), writer.printer), *body, *result])


def adjoint_function(name: str, a: ScanAdjoint, program: Program) -> str:
    """The backward of a chunk: from its inputs and the cotangents of its results to the cotangents of the inputs, in
    the order of the inputs. Those of what all chunks read are the parts of this one.
    """
    scan = a.scan
    values = _without_residuals(a)
    found = {x.target: Assign(x.target, v) for x, v in zip(a.backward.assigns, values, strict=True)}
    assigns, names, _ = simplify_assigns([found[cotangent(p)] for p in scan.params], program.names)
    parameters = (*scan.params, *a.cotangents)
    targets = [name_of(x.target) for x in assigns]
    writer = Writer(program, parameters, targets, names)
    body = writer.block(Block(assigns), "    ")
    head = listed(f"def {marked(function(name))}(", list(map(name_of, parameters)), "):")
    doc = "The cotangents of the inputs of a chunk, from those of its results."
    lengths = length_lines(parameters, "\n".join(body), writer.printer)
    return "\n".join([*head, f'    """{doc}"""', *lengths, *body, *returned("    ", targets)])


def _without_residuals(a: ScanAdjoint) -> list[Expr]:
    """The values of a backward, with those that a forward would keep for it spelled out, and nothing added up yet."""
    values = [x.value for x in a.backward.assigns]
    kept = {x.target.name: x for x in a.forward.assigns if x.target in set(a.residuals)}
    known: dict[Expr, Expr] = {p: const(0) for p in a.accumulated}
    for e in leaves(values):
        if e.name in kept:
            made = kept[e.name]
            known[e] = b.rename(made.value, dict(zip(made.target.axes, e.axes, strict=True)))
    targets = [x.target for x in a.backward.assigns]
    return [b.broadcast(v, t.axes) for v, t in zip(substitute(values, known), targets, strict=True)]


def helpers_of(roots: Iterable[Expr]) -> list[str]:
    """What the text of these values calls and PyTorch lacks: functions, and formulas of the user's own."""
    nodes = postorder(roots)
    used = {e.op for e in nodes}
    used |= {f.func.__name__ for e in nodes if e.op == "map" for f in e.arg.body.atoms(sympy.Function)}
    texts = [text.strip() for name, text in HELPERS.items() if name in used]
    return texts + [_formula(formula_text(f, formula)) for f in formulas(nodes) if f.name not in FUSED_DERIVATIVES]


def _formula(text: str) -> str:
    """SymPy writes a*b and a/b, and -a**b; a**b stays where it is of names and numbers."""
    text = re.sub(r"(?<=\))\*\*(?=\w)", " ** ", text)
    text = re.sub(r"((?:return |[(=*/,+-]) ?)-(\w+\*\*\w+)", r"\1-(\2)", text)
    return re.sub(r"(?<!\*)([*/])(?!\*)(?<!\*\*)", r" \1 ", text)


# -- lines -------------------------------------------------------------------------------------------------------------


class FilePrinter(TorchPrinter):
    """PyTorch as it stands in files; the token that a variable is read at is an index."""

    def _leaf(self, e: Expr) -> Text:
        at = e.variable.at
        return Text(f"{name_of(e)}[:, {marked(own(at))}]" if at in ("t", "m") else name_of(e))

    def _pow(self, e: Expr) -> Text:
        text = super()._pow(e)
        base, _, exponent = text.text.rpartition(" ** ")
        simple = _SIMPLE.fullmatch(base) and _SIMPLE.fullmatch(exponent)
        return Text(f"{base}**{exponent}" if simple else text.text, 3)  # of a sign, it is in brackets


class Writer:
    """Writes the blocks of one function: a line for each value, with its shape behind it."""

    def __init__(
        self,
        program: Program,
        parameters: Sequence[Expr],
        targets: Iterable[str],
        names: Mapping[Expr, str] | None = None,
    ) -> None:
        like = name_of(parameters[0])
        self.like, self.printer = like, FilePrinter(dict(program.dims), like)
        taken = {*map(name_of, parameters), *targets, CHUNK, HEADS, "F", "torch", "aten"}
        self.namer = Namer(map(unmarked, taken), program.names if names is None else names)

    def block(self, block: Block, indent: str, store: Callable[[str, str], str] = _ASSIGN) -> list[str]:
        """The lines of a block; `store` writes what is stored into a sequence."""
        targets = {x.leaf: x.target for x in block.assigns}
        lines: list[str] = []
        for step in steps(block, self.namer):
            axes = targets[step.target].axes if step.target else step.value.axes
            write = store if step.target is not None and step.target.at else _ASSIGN
            number = step.target is not None and not is_tensor(step.value)
            lines += self.line(marked(step.name), step.value, axes, indent, write, number)
            stored = write is not _ASSIGN
            if step.value.axes == axes and not is_written_again(step.value) and not stored:
                self.printer.names[step.value] = step.name
        return lines

    def line(
        self, name: str, value: Expr, axes: Axes, indent: str, write: Callable[[str, str], str], number: bool = False
    ) -> list[str]:
        """One value, after those of its operands that would make the line too long."""
        before: list[str] = []
        while True:
            text = self.printer.ordered(value, axes).text
            text = f"{self.like}.new_full(({HEADS},), {text})" if number else text
            line = f"{indent}{write(name, text)}"
            longest = self._longest(value) if len(unmarked(line)) > LINE_WIDTH else None
            if longest is None:
                break
            before += self._named(longest, indent)
        if text == name:
            return before
        dims = ["C" if a.size == TOKENS else spelled(a.size) for a in axes]
        shown = f"{line}  # [{', '.join(dims)}]"
        said = dims and write is _ASSIGN and not _SIMPLE.fullmatch(text)
        return [*before, shown if said and len(unmarked(shown)) <= LINE_WIDTH else line]

    def _named(self, value: Expr, indent: str) -> list[str]:
        """A value of which a line that follows reads the name."""
        name = self.namer(value)
        lines = self.line(marked(name), value, value.axes, indent, _ASSIGN)
        self.printer.names[value] = name
        return lines

    def _longest(self, value: Expr) -> Expr | None:
        """The operand of which the text is the longest; through operations whose operands have names."""
        stack, found = list(core(value).src), []
        while stack:
            e = core(stack.pop())
            if e in self.printer.names or not worth_a_name(e) or not is_tensor(e):
                continue
            found.append(e)
        if not found:
            return None
        return max(found, key=lambda e: len(unmarked(self.printer.text(e).text)))


# -- the definition ----------------------------------------------------------------------------------------------------


def token_loops(
    of: Function,
    program: Program,
    gradients: Callable[[Writer, str], list[str]],
    parameters: Sequence[Expr],
    mini_batch: str | None = None,
) -> list[str]:
    """The body of the loops of an update rule: over mini-batches, and over the tokens of each, where `gradients` writes
    those of token t. What tokens read is gathered in a list. `mini_batch` is what the file calls its length.
    """
    writer = Writer(program, parameters, [marked(n) for n in said(of, program)])
    return _statements(of.body, writer, gradients, "    ", mini_batch)


def _statements(
    body: Iterable[Statement],
    writer: Writer,
    gradients: Callable[[Writer, str], list[str]],
    indent: str,
    mini_batch: str | None,
) -> list[str]:
    lines: list[str] = []
    for s in body:
        if isinstance(s, For):
            over = _places(s, mini_batch)
            inner = _statements(s.body, writer, gradients, f"{indent}    ", mini_batch)
            if s.step is None and any(e.role == "gradient" for x in s.body for e in _leaves(x)):
                inner = [*gradients(writer, f"{indent}    "), *inner]
            lines += [f"{indent}for {marked(own(s.var))} in {over}:", *inner] if inner else []
        elif isinstance(s, Block):
            lines += writer.block(s, indent, "{}.append({})".format)
            writer.printer.names.clear()
        elif isinstance(s, Allocate):
            lines.append(f"{indent}{name_of(s.target)} = []")
    return lines


def _leaves(s: Statement) -> list[Expr]:
    return leaves([a.value for a in s.assigns]) if isinstance(s, Block) else []


def _places(s: For, mini_batch: str | None) -> str:
    """What a loop goes over: mini-batches as the indices of their tokens, or these."""
    if s.step is None:
        return marked(own(str(s.over)))
    every = marked(size_of(own("T")))
    if isinstance(s.step, Length):
        return f"[torch.arange({every})]"
    return f"torch.arange({every}).split({mini_batch or s.step})"
