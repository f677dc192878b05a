"""A chunk as loops: every value that needs memory is a statement of its own, and runs of them share their loop.

    block   x7 = q[c] @ W1 + b1 - (A * (q[c] @ k[c].T + 1)) @ x6
    ->
    tile    x1[t, s] = A[t, s] * (q[t] @ kT[s] + 1)      products are accumulators in registers, what is around them is
    tile    x7[t, F] = q[t] @ W1 + b1 - x1[t] @ x6       applied to these before they are stored
    row     m[t] = mean over D of x2[t, D]               a reduction; neighbours that keep the token share one loop
    walk    a[t] = a[t - 1] * decay[t]                   token after token

Vectors run along the last axis of what is stored. A value that a statement reads along another axis is stored a second
time, transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tttc.ir import build as b
from tttc.ir.differentiate import lower_composites
from tttc.ir.expr import TOKENS, Axes, Axis, Expr, leaf, leaves, postorder, rebuild, substitute, transform
from tttc.ir.names import Word, size_of, spelled, suffixed
from tttc.ir.program import Assign, ScanProgram
from tttc.ir.text import Namer, Printer, core

RECURRENCES = ("cumprod", "segprod", "shift", "shift_back", "solve")
REDUCTIONS = ("sum", "mean", "max")
_UNSTORED = ("leaf", "const", "size")
_CHEAP = ("add", "sub", "mul", "neg", "mask")  # what is done to accumulators; a tile holds two dozen of them


@dataclass(frozen=True)
class Statement:
    """target = value, a leaf from leaves; `lane` is the axis of its vectors, None where all is one number.

    `kind` is "tile" (elementwise, products as accumulators), "row" (a reduction), "walk" (along the tokens) or "turn"
    (a copy with its last axis elsewhere).
    """

    target: Expr
    value: Expr

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def kind(self) -> str:
        if self.value.op == "leaf" and gathered(self.value, self.target.axes[-1] if self.target.axes else None):
            return "turn"
        return "walk" if self.value.op in RECURRENCES else "row" if self.value.op in REDUCTIONS else "tile"

    @property
    def products(self) -> bool:
        return any(e.op == "contract" for e in postorder([self.value]))

    @property
    def along(self) -> Axis | None:
        """The token axis of the result along which a walk goes."""
        match self.value.op:
            case "cumprod" | "shift_back" | "segprod" | "shift":
                return self.value.axis
            case "solve":
                return cast(Axis, self.value.arg[1])
        return None

    @property
    def lane(self) -> Axis | None:
        """The axis along which the fewest values have to be gathered: the last of the result, or one summed over."""
        if self.kind == "walk":
            return next((a for a in reversed(self.target.axes) if a != self.along), None)
        candidates = list(self.target.axes[-1:])
        if self.kind == "row":
            candidates += list(reversed(self.value.arg))
        return min(candidates, key=lambda a: len(gathered(self.value, a)), default=None)

    @property
    def row(self) -> Axis | None:
        """The token axis of the result, where it comes first."""
        return next((a for a in self.target.axes[:1] if a.size == TOKENS), None)

    def __str__(self) -> str:
        return self.text(spelled)

    def text(self, word: Word) -> str:
        axes = ", ".join(word(size_of(a.name)) for a in self.target.axes)
        value = Printer(word=word).ordered(self.value, self.value.axes).text
        return f"{self.kind} {word(self.name)}[{axes}] = {value}"


def gathered(value: Expr, lane: Axis | None) -> list[Expr]:
    """The leaves that have the axis of the vectors, but not as their last one."""
    return [e for e, axes in read(value) if len(axes) > 1 and lane in axes[:-1]]


def read(value: Expr) -> Iterator[tuple[Expr, Axes]]:
    """The leaves under an expression, with the names that their axes have in it; "" for one at its last token."""
    seen: set[tuple[Expr, tuple[tuple[Axis, Axis], ...]]] = set()
    stack: list[tuple[Expr, dict[Axis, Axis]]] = [(value, {})]
    while stack:
        e, names = stack.pop()
        key = (e, tuple(sorted(names.items())))
        if key in seen:
            continue
        seen.add(key)
        if e.op == "leaf":
            yield e, tuple(names.get(a, a) for a in e.axes)
        elif e.op == "rename":
            inside = {old: names.get(new, new) for old, new in e.arg}
            stack += [(s, {**{a: names.get(a, a) for a in s.axes if a not in inside}, **inside}) for s in e.src]
        elif e.op == "last":
            stack.append((e.src[0], {**names, e.arg: Axis("", TOKENS)}))
        else:
            stack += [(s, names) for s in e.src]


# -- which values are stored -------------------------------------------------------------------------------------------


def statements(
    assigns: Sequence[Assign], program: ScanProgram, taken: Iterable[str] = (), *, turned: bool = True
) -> list[Statement]:
    """The assignments of a block one by one, new values of variables last, when nothing reads the old ones.

    `taken` are names that no stored value may have. Without `turned` a value is read along any of its axes, and no copy
    is made of it.
    """
    known = {e.name for a in assigns for e in leaves([a.value])} | {a.leaf.name for a in assigns}
    name = Namer(map(spelled, (*known, *taken, *program.dims)), program.names)
    roots = [_plain(r) for r in lower_composites([a.value for a in assigns], leaves(a.value for a in assigns))]
    stored = _stored(roots)
    made: list[Statement] = []
    stand_in: dict[Expr, Expr] = {}
    for e in postorder(roots):
        src = tuple(stand_in[x] for x in e.src)
        new = _renamed(src[0], dict(e.arg)) if e.op == "rename" else rebuild(e, src)
        if e in stored:
            made.append(Statement(leaf(name(e), "scratch", e.axes), new))
            new = made[-1].target
        stand_in[e] = new
    pairs = [(a, stand_in[r]) for a, r in zip(assigns, roots, strict=True)]
    made += [Statement(a.target, v) for a, v in pairs if a.leaf.at is not None]
    made += _new_values([(a.target, v) for a, v in pairs if a.leaf.at is None], name)
    return _transposed(made) if turned else made


def _renamed(e: Expr, to: Mapping[Axis, Axis]) -> Expr:
    """The same value under other names of axes, which the leaves below it take: one variable that is read along two
    ways is two leaves.
    """
    to = {old: new for old, new in to.items() if old in e.axes and old != new}
    if not to or e.op in ("leaf", "rename"):
        return b.rename(e, to)
    assert e.op not in ("contract", *REDUCTIONS, *RECURRENCES), e.op  # these are stored: what is renamed is a leaf
    match e.op:
        case "mask":
            rows, columns, strict = e.arg
            arg: Any = (to.get(rows, rows), to.get(columns, columns), strict)
        case "put_last":
            arg = to.get(e.arg, e.arg)
        case "broadcast":
            arg = tuple(to.get(a, a) for a in e.arg)
        case "last":  # its token has an axis inside alone, whose name must stay one of its own
            arg = b.fresh(e.arg, (*to.values(), *e.src[0].axes))
            to = {**to, e.arg: arg}
        case _:
            arg = e.arg
    return Expr(e.op, tuple(_renamed(x, to) for x in e.src), arg)


def _plain(root: Expr) -> Expr:
    """Products without a sum as multiplications, and sums along the last axis of both operands as reductions."""

    def visit(e: Expr, src: tuple[Expr, ...]) -> Expr:
        if e.op == "rename":
            return b.rename(src[0], dict(e.arg))
        if e.op != "contract":
            return rebuild(e, src)
        if e.arg and not _is_dot(src, e.arg, e.axes):
            return rebuild(e, src)
        product = src[0]
        for s in src[1:]:
            product = b.mul(product, s)
        return b.total(product, e.arg)

    return transform([root], visit)[0]


def _is_dot(operands: Sequence[Expr], over: Axes, kept: Axes) -> bool:
    """Whether every operand that has an axis of the result has it before one that is summed over."""
    if len(kept) > 1:
        return False
    return all(e.axes[-1] in over for e in operands if e.axes and (not kept or kept[0] in e.axes))


def _stored(roots: Sequence[Expr]) -> set[Expr]:
    """Reductions, walks and what they and products read; values that several read; products, unless all that is done
    with one is elementwise, in the statement that stores the result.
    """
    order = postorder(roots)
    users: dict[Expr, list[Expr]] = {}
    for e in order:
        for x in dict.fromkeys(e.src):
            users.setdefault(x, []).append(e)

    def readers(e: Expr) -> list[Expr]:
        """Who reads the value, looking through renamings."""
        return [r for u in users.get(e, ()) for r in (readers(u) if u.op == "rename" else [u])]

    ends = [core(r) for r in roots]
    found: set[Expr] = {e for e in ends if ends.count(e) > 1}
    for e in order:
        if e.op in (*REDUCTIONS, *RECURRENCES):
            found.add(e)
        if e.op in (*RECURRENCES, "contract"):
            found |= {core(x) for x in e.src}
        if e.axes and len(readers(e)) + ends.count(e) > 1:
            found.add(core(e))
    found = {e for e in found if e.op not in (*_UNSTORED, "rename")}
    for e in order:
        if e.op == "contract" and not _fused(e, users, found, roots):
            found.add(e)
    return found


def _fused(e: Expr, users: Mapping[Expr, list[Expr]], stored: set[Expr], roots: Sequence[Expr]) -> bool:
    """Whether a product ends in registers: on the way to what is stored, it stays where it is."""
    node = e
    while node not in stored and node not in roots:
        found = users[node]
        if len(found) > 1 or found[0].op not in _CHEAP or set(found[0].axes) != set(e.axes):
            return False
        (node,) = found
    return True


def _new_values(assigns: Sequence[tuple[Expr, Expr]], name: Callable[[Expr], str]) -> list[Statement]:
    """New values of variables: through a copy where one would be overwritten before it is read."""
    early: list[Statement] = []
    late: list[Statement] = []
    overwritten: set[str] = set()
    for target, value in assigns:
        variable = target.name
        others = {e.name for e in leaves([value])} - {variable}
        elsewhere = any(e.name == variable and axes != target.axes for e, axes in read(value))
        inside = any(e.name == variable for c in postorder([value]) if c.op == "contract" for e in leaves([c]))
        if others & overwritten or elsewhere or inside or value.op in (*REDUCTIONS, *RECURRENCES):
            early.append(Statement(leaf(name(value), "scratch", target.axes), value))
            value = early[-1].target
        late.append(Statement(target, value))
        overwritten.add(variable)
    return early + late


def _transposed(made: Sequence[Statement]) -> list[Statement]:
    """Copies of what is read along another axis than its last, each before its first use."""
    result: list[Statement] = []
    copies: dict[tuple[str, int], str] = {}
    for s in made:
        replaced = {}
        for e in gathered(s.value, s.lane) if s.lane is not None and s.kind != "turn" else ():
            at = e.axes.index(s.lane)
            order = [i for i in range(len(e.axes)) if i != at] + [at]
            variable = e.name
            axes = tuple(e.axes[i] for i in order)
            if (variable, at) not in copies:
                copies[variable, at] = suffixed(variable, "T" if len(axes) == 2 else f"T{at}")
                result.append(Statement(leaf(copies[variable, at], "scratch", axes), e))
            replaced[e] = leaf(copies[variable, at], "scratch", axes)
        result.append(Statement(s.target, substitute([s.value], replaced)[0]) if replaced else s)
    return result


__all__ = ["TOKENS", "Statement", "gathered", "read", "statements"]
