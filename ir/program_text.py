"""Whole programs as Python files that run: functions, loops and typed bindings around the lines of ir/text.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tttc.ir.expr import PRINTERS, TOKENS, Axes, Axis, Expr, postorder
from tttc.ir.formulas import formula_text
from tttc.ir.names import function, marked, own, size_of, spelled, unmarked, worded
from tttc.ir.program import (
    S_AXIS,
    SEQUENCE,
    T_AXIS,
    Allocate,
    Block,
    For,
    Function,
    Length,
    Program,
    Restore,
    Save,
    Statement,
    blocks,
    values,
)
from tttc.ir.scalars import Formula
from tttc.ir.text import Namer, Printer, steps, worth_a_name

ALL_TOKENS = Axis(own("T"), own("T"))


def type_text(axes: Axes, dtype: str) -> str:
    """The type of a value, in a text that is not yet whole."""
    return f"{dtype}[{', '.join(marked(size_of(a.size)) for a in axes)}]" if axes else dtype


def said(function: Function, program: Program) -> set[str]:
    """What parameters, targets, loop variables and sizes are called in a function, as they read."""
    names = {p.name for p in function.params} | {r.name for r in function.returns}

    def visit(statements: tuple[Statement, ...]) -> None:
        for s in statements:
            if isinstance(s, For):
                names.add(own(s.var))
                visit(s.body)
            elif isinstance(s, Block):
                names.update(a.leaf.name for a in s.assigns)
            elif isinstance(s, Allocate):
                names.add(s.target.name)

    visit(function.body)
    return {*map(spelled, (*names, *program.dims)), "T"}


def formulas(roots: Iterable[Expr]) -> list[Formula]:
    """The named elementwise formulas that an expression uses, each once."""
    return list(dict.fromkeys(e.arg for e in postorder(roots) if e.op == "map"))


def function_text(of: Function, program: Program) -> str:
    """One function of a program, its names marked."""
    sequence = any(p.role in ("token", "gate") and p.at for p in of.params)
    arguments = []
    for p in of.params:
        leaf = p.variable
        own_axes = tuple(a for a in p.axes if a.size != TOKENS) if leaf.at else p.axes
        shape = type_text(((ALL_TOKENS, *own_axes) if leaf.at else own_axes), program.dtype)
        arguments.append(f"{marked(leaf.name)}: {shape}")
    lines = _wrapped(f"def {marked(function(of.name))}(", arguments, "):")
    if of.doc:
        lines.append(f'    """{of.doc}"""')
    if sequence:
        first = next(p for p in of.params if p.at)
        lines.append(f"    {_loop_name(SEQUENCE)} = len({marked(first.name)})")
    lines += [f"    {marked(size_of(size))} = {length}" for size, length in _measured(of, program).items()]
    if any(isinstance(s, For) and any(isinstance(x, Save) for x in s.body) for s in of.body):
        lines.append("    saved = []")
    namer = Namer(said(of, program), program.names)
    lines += _statements_text(of.body, program, namer, "    ", {})
    lines.append("    return " + (", ".join(marked(r.name) for r in of.returns) or "()"))
    return "\n".join(lines)


def _measured(function: Function, program: Program) -> dict[str, str]:
    """The sizes that no dim and no loop gives, read from the parameters: the tokens of a chunk that is given whole."""
    found: dict[str, str] = {}
    for p in function.params:
        leaf, axes = p.arg
        if leaf.at:  # [T, ...]
            axes = (None, *(a for a in axes if a not in (T_AXIS, S_AXIS)))
        for i, axis in enumerate(axes):
            if axis is not None and axis.size not in program.dims:
                found.setdefault(axis.size, f"{marked(leaf.name)}.shape[{i}]")
    return found


def _loop_name(name: str | Length) -> str:
    """The variable of a loop, or of all tokens."""
    return marked(size_of(ALL_TOKENS.size) if name is SEQUENCE else own(name))


def _wrapped(head: str, items: list[str], tail: str) -> list[str]:
    """A comma-separated list, wrapped at 100 columns under its opening bracket."""
    lines, current = [], head
    for i, item in enumerate(items):
        piece = item + (", " if i + 1 < len(items) else "")
        if len(unmarked(current + piece)) > 100:
            lines.append(current.rstrip())
            current = " " * len(unmarked(head))
        current += piece
    return [*lines, current + tail]


def _statements_text(
    body: tuple[Statement, ...], program: Program, namer: Namer, indent: str, lengths: dict[str, str]
) -> list[str]:
    lines: list[str] = []
    for statement in body:
        if isinstance(statement, For):
            over, var = _loop_name(statement.over), _loop_name(statement.var)
            if statement.step is not None:
                step = statement.step if isinstance(statement.step, int) else _loop_name(statement.step)
                over = f"chunks({over}, {step})"
            lines.append(f"{indent}for {var} in {f'reversed({over})' if statement.reverse else over}:")
            inner = {**lengths, TOKENS: f"len({var})"} if statement.step is not None else lengths
            lines += _statements_text(statement.body, program, namer, indent + "    ", inner)
        elif isinstance(statement, Allocate):
            leaf, axes = statement.target.arg
            sizes = [marked(size_of(a.size)) for a in axes if a.size != TOKENS]
            lines.append(f"{indent}{marked(leaf.name)} = empty({', '.join([_loop_name(SEQUENCE), *sizes])})")
        elif isinstance(statement, Save):
            names = [marked(e.name) for e in statement.values]
            lines += _wrapped(f"{indent}saved.append((", names, ",))" if names else "))")
        elif isinstance(statement, Restore):
            names = [marked(r.name) for r in statement.targets]
            lines += _wrapped(f"{indent}(", names, ",) = saved.pop()" if names else ") = saved.pop()")
        else:
            lines += _block_text(statement, program, namer, indent, lengths)
    return lines


def _block_text(block: Block, program: Program, namer: Namer, indent: str, lengths: Mapping[str, str]) -> list[str]:
    local = Namer(namer.taken, program.names)  # names of one block may be taken again by the next
    printer = Printer(lengths=lengths, word=marked)
    targets = {a.leaf: a.target for a in block.assigns}
    lines = []
    for step in steps(block, local):
        if step.target is None:
            axes, shown = step.value.axes, marked(step.name)
        else:
            axes = targets[step.target].axes
            shown = marked(step.name) + (f"[{_loop_name(step.target.at)}]" if step.target.at else "")
        value = printer.ordered(step.value, axes).text
        new = step.target is None or step.target.role == "saved"
        annotation = f": {type_text(axes, program.dtype)}" if new else ""
        lines.append(f"{indent}{shown}{annotation} = {value}")
        if step.target is None or (step.target.at is None and step.value.axes == axes and worth_a_name(step.value)):
            printer.names[step.value] = step.name
    return lines


def program_text(program: Program) -> str:
    """A whole program as a Python file that runs."""
    roots = [v for f in program.functions for block in blocks(f.body) for v in values(block)]
    dims = ", ".join(marked(size_of(d)) for d in program.dims), ", ".join(str(n) for n in program.dims.values())
    parts = ["from __future__ import annotations\n\nfrom tttc.ir.numerics import *"]
    if program.dims:
        parts.append(f"{dims[0]} = {dims[1]}")
    parts += [formula_text(f) for f in formulas(roots)]
    parts += [function_text(f, program) for f in program.functions]
    return worded("\n\n".join(parts) + "\n").text


PRINTERS[Program] = program_text
