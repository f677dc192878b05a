"""Printing: every program is Python that a reader of the papers knows, and that runs on NumPy.

    z1: f64[C, F] = k[c] @ W1 + b1
    W1 = W1 - (eta[:, None] * k[c]).T @ g1

Only shared and long expressions get a name; the names that the user gave win. `steps` decides both for the printer and
for the backends, so that generated code has the same lines. Which word stands for which variable, ir/names.py decides
when the text is whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tttc.ir.contraction import layout
from tttc.ir.expr import OPS, PRINTERS, Axes, Axis, Expr, Leaf, postorder
from tttc.ir.names import Word, own, size_of, spelled
from tttc.ir.ops import einsum_spec, is_upper
from tttc.ir.program import Block
from tttc.ir.scalars import SCALARS

LONG = 72  # an expression whose text is longer is cut in two by a name

_FREE = ("leaf", "const", "size", "rename")  # reading these is not a computation


class Step(NamedTuple):
    """One line of a block: `target` is a variable of the program, or None for a name given here."""

    name: str
    value: Expr
    target: Leaf | None = None


# -- from a block to lines --------------------------------------------------------------------------------------------


class Namer:
    """Gives every value a name of its own, the same in every process: from hints and positions, never from a counter.
    It reads like none of `taken`.
    """

    def __init__(self, taken: Iterable[str], hints: Mapping[Expr, str]) -> None:
        self.taken = set(taken)
        self.hints = hints

    def __call__(self, e: Expr) -> str:
        hint = self.hints.get(e) or self.hints.get(core(e)) or OPS[core(e).op].hint
        if hint not in self.taken:
            self.taken.add(hint)
            return own(hint)
        stem = hint + "_" if hint[-1].isdigit() else hint
        n = next(n for n in range(1, len(self.taken) + 2) if f"{stem}{n}" not in self.taken)
        self.taken.add(f"{stem}{n}")
        return own(f"{stem}{n}")


def core(e: Expr) -> Expr:
    """The value under renamings: what is computed."""
    while e.op == "rename":
        e = e.src[0]
    return e


def steps(block: Block, namer: Namer) -> list[Step]:
    """The lines of a block: named values first, in the order of need, then stores, then the new values of the
    variables.
    """
    names: dict[Expr, str] = {}
    roots = [a.value for a in block.assigns]
    named = _to_be_named(roots, namer.hints)
    carried = [a for a in block.assigns if a.leaf.at is None]
    read = {e.name for e in postorder(roots) if e.op == "leaf"}
    fresh = {a.value: a for a in carried if a.leaf.name not in read and a.target.axes == a.value.axes}
    lines: list[Step] = []
    for node in postorder(roots):
        if node in names or node not in named:
            continue
        if node in fresh:  # the variable is new here: it is the name
            lines.append(Step(fresh[node].leaf.name, node, fresh[node].leaf))
        else:
            lines.append(Step(namer(node), node))
        names[node] = lines[-1].name
    lines += [Step(a.leaf.name, a.value, a.leaf) for a in block.assigns if a.leaf.at is not None]
    written = {line.target for line in lines if line.target}
    carried = [a for a in carried if a.leaf not in written]
    late: list[Step] = []
    for i, a in enumerate(carried):
        overwritten = {c.leaf.name for c in carried[:i]}
        if _reads(a.value, names) & overwritten:  # an earlier assignment would change what this one reads
            lines.append(Step(namer(a.value), a.value))
            names[a.value] = lines[-1].name
        late.append(Step(a.leaf.name, a.value, a.leaf))
    return lines + late


def _reads(e: Expr, names: Mapping[Expr, str]) -> set[str]:
    """The variables that the text of `e` mentions, given that named values are not spelled out again."""
    if e in names:
        return set()
    found, seen, stack = set(), set(), [e]
    while stack:
        node = stack.pop()
        if node in seen or node in names:
            continue
        seen.add(node)
        if node.op == "leaf" and node.at is None:
            found.add(node.name)
        stack.extend(node.src)
    return found


def _to_be_named(roots: list[Expr], hints: Mapping[Expr, str]) -> set[Expr]:
    order = postorder(roots)
    uses: dict[Expr, int] = {}
    for e in order:
        for s in e.src:
            uses[core(s)] = uses.get(core(s), 0) + 1
    for root in roots:
        uses[core(root)] = uses.get(core(root), 0) + 1
    named = {e for e, n in uses.items() if n > 1 and worth_a_name(e)}
    named |= {e for e in order if e in hints and e.op not in _FREE}
    lengths: dict[Expr, int] = {}
    for e in order:  # cut long expressions at their longest operand
        lengths[e] = _length(e, lengths, named)
        while lengths[e] > LONG:
            candidates = [core(s) for s in e.src if core(s) not in named and worth_a_name(core(s))]
            if not candidates:
                break
            named.add(max(candidates, key=lambda s: lengths[s]))
            lengths[e] = _length(e, lengths, named)
    return named


def worth_a_name(e: Expr) -> bool:
    """Whether a value is computed at all."""
    return e.op not in _FREE and not (e.op in ("neg", "broadcast") and e.src[0].op in _FREE)


def is_written_again(e: Expr) -> bool:
    """A leaf, a constant, or one of these along more axes: no line reads it from a variable of another. All else is
    read, never computed a second time: what it was made of may have changed since.
    """
    return (e.src[0] if e.op == "broadcast" else e).op in ("leaf", "const")


def _length(e: Expr, lengths: Mapping[Expr, int], named: set[Expr]) -> int:
    own = {"leaf": 5, "const": 4, "size": 1}.get(e.op, 3 if e.op in SCALARS and SCALARS[e.op].infix else 6)
    return own + sum(4 if core(s) in named else lengths.get(s, 4) for s in e.src)


# -- expressions ------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Printed text with its precedence: 1 sum, 2 product, 3 sign, 4 power, 5 atom."""

    text: str
    precedence: int = 5

    def at_least(self, precedence: int) -> str:
        return self.text if self.precedence >= precedence else f"({self.text})"


@dataclass
class Printer:
    """Prints expressions as NumPy; a value with axes (s, D) is an array with these dimensions in this order."""

    names: dict[Expr, str] = field(default_factory=dict)
    infinity, undefined = "inf", "nan"  # how these two numbers are written

    lengths: Mapping[str, str] = field(default_factory=dict)  # dim -> how its size is written here (TOKENS -> "len(c)")
    word: Word = spelled

    def __call__(self, e: Expr) -> str:
        return self.text(e).text

    def arranged(self, axes: Axes) -> Axes:
        """The order in which a value with these axes has its dimensions."""
        return axes

    def text(self, e: Expr) -> Text:
        """`e` with its dimensions in its own order."""
        return self.ordered(e, self.arranged(e.axes))

    def ordered(self, e: Expr, axes: Axes) -> Text:
        """`e` with its dimensions in the order `axes`: by writing it so, or by transposing it."""
        if e not in self.names:
            if e.op in SCALARS:
                return self._elementwise(e, axes)
            if e.op == "rename":
                back = {new: old for old, new in e.arg}
                return self.ordered(e.src[0], tuple(back.get(a, a) for a in axes))
            if e.op == "contract" and (contracted := self._contraction(e, axes)) is not None:
                return contracted
        text = Text(self.word(self.names[e])) if e in self.names else self.writer(e.op)(e)
        own = self.arranged(e.axes)
        return text if own == axes else self.transposed(text, own, axes)

    def writer(self, op: str) -> Callable[[Expr], Text]:
        """What writes an operation that is not elementwise."""
        found: Callable[[Expr], Text] = getattr(self, f"_{op}", self._composite)
        return found

    def _contraction(self, e: Expr, axes: Axes) -> Text | None:
        """A contraction written in the order `axes`; None where it has to be transposed."""
        kind = layout(e).kind
        if kind == "product":
            return self._product(e, axes)
        if kind in ("matmul", "outer") and e.axes != axes:
            return self._contract(Expr("contract", e.src[::-1], e.arg))
        return None

    def transposed(self, text: Text, axes: Axes, to: Axes) -> Text:
        """An array with axes `axes`, its dimensions in the order `to`."""
        if len(axes) == 2:
            return Text(f"{text.at_least(5)}.T")
        return Text(f"transpose({text.text}, {tuple(axes.index(a) for a in to)})")

    def size(self, dim: str) -> str:
        return self.lengths.get(dim) or self.word(size_of(dim))

    def aligned(self, e: Expr, to: Axes) -> Text:
        """`e` made ready to broadcast against an array with axes `to`."""
        present = tuple(a for a in to if a in e.axes)
        text = self.ordered(e, present)
        if not present:
            return text
        index = [":" if a in present else "None" for a in to[to.index(present[0]) :]]
        while index and index[-1] == ":":
            index.pop()
        return Text(f"{text.at_least(5)}[{', '.join(index)}]") if index else text

    def _leaf(self, e: Expr) -> Text:
        leaf = e.variable
        return Text(f"{self.word(leaf.name)}[{self.word(own(leaf.at))}]" if leaf.at else self.word(leaf.name))

    def _const(self, e: Expr) -> Text:
        if not math.isfinite(e.arg):
            return Text(f"-{self.infinity}", 3) if e.arg < 0 else Text(self.infinity if e.arg > 0 else self.undefined)
        text = f"{e.arg:.17g}" if e.arg != int(e.arg) or abs(e.arg) > 1e15 else str(int(e.arg))
        short = repr(e.arg)
        text = short if "." in text or "e" in text else text
        return Text(text, 3 if e.arg < 0 else 5)

    def _size(self, e: Expr) -> Text:
        return Text(self.size(e.arg.size))

    def _elementwise(self, e: Expr, axes: Axes) -> Text:
        row = SCALARS[e.op]
        if row.infix is None:
            return Text(f"{row.name}({', '.join(self.aligned(s, axes).text for s in e.src)})")
        if e.op == "neg":
            return Text(f"-{self.ordered(e.src[0], axes).at_least(4)}", 3)
        own = 1 if e.op in ("add", "sub") else 2
        left, right = (self.aligned(s, axes) for s in e.src)
        stricter = e.op in ("sub", "div", "mul")
        return Text(f"{left.at_least(own)} {row.infix} {right.at_least(own + 1 if stricter else own)}", own)

    def _product(self, e: Expr, axes: Axes) -> Text:
        return Text(" * ".join(self.aligned(s, axes).at_least(3 if i else 2) for i, s in enumerate(e.src)), 2)

    def _pow(self, e: Expr) -> Text:
        n = int(e.arg) if e.arg == int(e.arg) else e.arg
        return Text(f"{self.text(e.src[0]).at_least(5)} ** {n if n >= 0 else f'({n})'}", 4)

    def _map(self, e: Expr) -> Text:
        return Text(f"{e.arg.name}({', '.join(self.aligned(s, e.axes).text for s in e.src)})")

    def _contract(self, e: Expr) -> Text:
        kind, transpose_left, transpose_right = layout(e)
        if kind == "outer":
            return Text(f"outer({self(e.src[0])}, {self(e.src[1])})")
        if kind == "matmul":
            a, c = (self.text(s) for s in e.src)
            a_text = a.at_least(2 if core(e.src[0]).op == "contract" else 3)
            a_text = f"{a.at_least(5)}.T" if transpose_left else a_text
            c_text = f"{c.at_least(5)}.T" if transpose_right else c.at_least(3)
            return Text(f"{a_text} @ {c_text}", 2)
        if kind == "dot":
            left, right = e.src
            axes = [i for i, a in enumerate(left.axes) if a in e.arg]
            product = f"{self.text(left).at_least(2)} * {self.ordered(right, left.axes).at_least(3)}"
            result = Text(f"sum({product}{self._axis(axes, left.axes)})")
            kept = tuple(a for a in left.axes if a not in e.arg)
            return result if kept == e.axes else self.transposed(result, kept, e.axes)
        return Text(f'einsum("{einsum_spec(e)}", {", ".join(self(s) for s in e.src)})')

    @staticmethod
    def _axis(positions: list[int], axes: Axes) -> str:
        """The `axis=` argument of a reduction; nothing where all axes go."""
        if len(positions) == len(axes):
            return ""
        return f", axis={positions[0] - len(axes) if len(positions) == 1 else tuple(positions)}"

    def _reduction(self, e: Expr) -> Text:
        axes = e.src[0].axes
        return Text(f"{e.op}({self(e.src[0])}{self._axis([axes.index(a) for a in e.arg], axes)})")

    _sum = _mean = _max = _reduction

    def _mask(self, e: Expr) -> Text:
        rows, columns, strict = e.arg
        inside = self.text(e.src[0])
        if e.axes[-2:] == (rows, columns):
            return Text(f"tril({inside.text}{', -1' if strict else ''})")
        if e.axes[-2:] == (columns, rows):
            return Text(f"triu({inside.text}{', 1' if strict else ''})")
        allowed = (
            f"tril(broadcast_to(1, ({self.size(rows.size)}, {self.size(columns.size)})){', -1' if strict else ''})"
        )
        first = min(e.axes.index(rows), e.axes.index(columns))
        turned = f"{allowed}{'' if e.axes.index(rows) == first else '.T'}"
        index = [":" if a in (rows, columns) else "None" for a in e.axes[first:]]
        return Text(f"{inside.at_least(2)} * {turned}[{', '.join(index)}]", 2)

    def _broadcast(self, e: Expr) -> Text:
        shape = ", ".join(self.size(a.size) for a in e.axes)
        if e.src[0].op == "const" and e.src[0].arg == 0:
            return Text(f"zeros({shape})")
        return Text(f"broadcast_to({self.aligned(e.src[0], e.axes).text}, ({shape},))")

    def _last(self, e: Expr) -> Text:
        position = e.src[0].axes.index(e.arg)
        inside = self.text(e.src[0]).at_least(5)
        return Text(f"{inside}[-1]" if position == 0 else f"last({self(e.src[0])}, {position})")

    def _put_last(self, e: Expr) -> Text:
        return Text(f"put_last({self(e.src[0])}, {self.size(e.arg.size)})")

    def _token_first(self, e: Expr, axis: Axis) -> str:
        return self.ordered(e, (axis, *(a for a in e.axes if a != axis))).text

    def _segprod(self, e: Expr) -> Text:
        return Text(f"segprod({self._token_first(e.src[0], e.axis)})")

    def _cumprod(self, e: Expr) -> Text:
        return Text(f"cumprod({self._token_first(e.src[0], e.arg)}, axis=0)")

    def _shift(self, e: Expr) -> Text:
        axis, fill = e.arg
        return Text(f"shift({self._token_first(e.src[0], axis)}, {fill:g})")

    def _shift_back(self, e: Expr) -> Text:
        return Text(f"shift_back({self._token_first(e.src[0], e.arg)})")

    def _solve(self, e: Expr) -> Text:
        matrix, right, settings = self._system(e)
        shown = [f"{name}={value}" for name, value in settings]
        return Text(f"solve_lower({', '.join([matrix, right, *shown])})")

    def _system(self, e: Expr) -> tuple[str, str, list[tuple[str, str]]]:
        """Matrix and right side of a solve, the tokens of the right side first, and how they go together."""
        known, unknown = e.arg
        lower, right = e.src
        shared = tuple(a for a in e.axes[1:] if a in lower.axes)
        matrix = self.ordered(lower, (known, unknown, *shared)).text
        settings = [("upper", "True")] if is_upper(e) else []
        if shared:
            positions = ", ".join(str(e.axes.index(a)) for a in shared)
            settings.append(("along", f"({positions},)"))
        return matrix, self.ordered(right, (known, *e.axes[1:])).text, settings

    def _stop_gradient(self, e: Expr) -> Text:
        return self.text(e.src[0])

    def _composite(self, e: Expr) -> Text:
        axis, *settings = e.arg if isinstance(e.arg, tuple) and not hasattr(e.arg, "size") else (e.arg,)
        operands = [self.aligned(s, e.axes).text for s in e.src]
        operands += [f"eps={value:g}" for value in settings]
        position = e.axes.index(axis) - len(e.axes)
        operands += [f"axis={position}"] if position != -1 else []
        return Text(f"{e.op}({', '.join(operands)})")


def expression_text(e: Expr) -> str:
    """An expression on one line, nothing named."""
    return Printer()(e)


PRINTERS[Expr] = expression_text
