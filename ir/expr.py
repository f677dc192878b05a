"""The expression: one immutable, interned node over tensors whose axes are named.

`a is b` holds exactly when a and b are structurally equal, so a graph is shared by construction and equality costs
nothing:

    k = leaf("k", "token", (D,));  W = leaf("W", "state", (D, F))
    contract((k, W), (D,))  is  contract((k, W), (D,))        # k @ W: [F]
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tttc.ir.names import own


class Axis(NamedTuple):
    """A named axis: `name` tells it from the others of one expression, `size` is the dim that it runs over."""

    name: str
    size: str

    def __str__(self) -> str:
        return self.name


Axes = tuple[Axis, ...]
TOKENS = own("C")  # the size of an axis that runs along the tokens of a chunk: no dim is called so


class Leaf(NamedTuple):
    """What a leaf stands for: a variable, what it is to the variant, and which tokens of it are read.

    `name` is as the user declared it; what is derived has one that nobody can declare (ir/names.py).

    `role` is one of state, param, token, gate, sum (the learning-rate weighted gradients of the open mini-batch),
    cotangent. `at` is the loop variable that indexes its token axis: "t" (one token), "c" (the tokens of a chunk) or
    None.
    """

    name: str
    role: str
    at: str | None = None


class Expr:
    """A node: an operation of the table (`OPS`), its operands and its argument; `axes` is its type."""

    __slots__ = ("__weakref__", "arg", "axes", "op", "src")
    op: str
    src: tuple[Expr, ...]
    arg: Any
    axes: Axes

    def __new__(cls, op: str, src: tuple[Expr, ...] = (), arg: Any = None) -> Expr:
        key = (op, src, arg)
        with _lock:
            known = _interned.get(key)
            if known is not None:
                return known
            node = object.__new__(cls)
            object.__setattr__(node, "op", op)
            object.__setattr__(node, "src", src)
            object.__setattr__(node, "arg", arg)
            object.__setattr__(node, "axes", OPS[op].infer(src, arg))
            _interned[key] = node
            return node

    __match_args__ = ("op", "src", "arg")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Expr is immutable; cannot set {name}")

    @property
    def variable(self) -> Leaf:
        """What a leaf stands for; its `name`, `role` and `at` are those of the node."""
        found: Leaf = self.arg[0]
        return found

    @property
    def name(self) -> str:
        return self.variable.name

    @property
    def role(self) -> str:
        return self.variable.role

    @property
    def at(self) -> str | None:
        return self.variable.at

    @property
    def axis(self) -> Axis:
        """The axis along which an operation works; of two token axes, that of the rows."""
        found: Axis = self.arg if isinstance(self.arg, Axis) else self.arg[0]
        return found

    def __repr__(self) -> str:
        return f"{PRINTERS[Expr](self)}: [{', '.join(a.name for a in self.axes)}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return Expr, (self.op, self.src, self.arg)


PRINTERS: dict[type, Callable[[Any], str]] = {}  # what writes expressions and programs: ir/text.py, program_text.py
_interned: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()
_lock = threading.RLock()


@dataclass(frozen=True)
class Op:
    """One row of the op table: everything that the compiler knows about an operation, side by side."""

    name: str
    infer: Callable[[tuple[Expr, ...], Any], Axes]
    """Type rule: the axes of the result from the operands and the argument."""
    numpy: Callable[..., Any] | None = None
    """Meaning on NumPy arrays, whose dimensions follow the operands' axes; called as numpy(node, *values, sizes)."""
    adjoint: Callable[..., tuple[Expr | None, ...]] | None = None
    """adjoint(g, y, *operands): the cotangent of each operand, from the cotangent g of the result y."""
    depends: str = "nonlinear"
    """How the result depends on its operands: constant, linear (jointly), multilinear (in each), or nonlinear."""
    hint: str = "x"
    """What a shared result of this op is called when the user gave it no name."""
    lower: Callable[[Expr], Expr] | None = None
    """For a composite: the same value in simpler operations."""
    make: Callable[[tuple[Expr, ...], Any], Expr] | None = None
    """make(operands, argument): the operation on operands that may lack an axis along which it works; None where it
    works along none. The type rule of such an operation takes no operand that lacks one.
    """


class IllTyped(TypeError):
    """Internal: a node was made of operands that its type rule does not take."""


OPS: dict[str, Op] = {}


def leaf(name: str, role: str, axes: Axes = (), at: str | None = None) -> Expr:
    return Expr("leaf", (), (Leaf(name, role, at), axes))


def const(value: float) -> Expr:
    number = float(value)
    return Expr("const", (), number if number == number else _NAN)


_NAN = float("nan")  # one object, which is what makes the nodes that hold it one node


def is_const(e: Expr, value: float | None = None) -> bool:
    return e.op == "const" and (value is None or e.arg == value)


def postorder(roots: Iterable[Expr], known: Iterable[Expr] = ()) -> list[Expr]:
    """Every node under `roots` once, operands first, not going below (or listing) the nodes `known`.

    Without Python recursion, so depth does not matter.
    """
    seen: set[Expr] = set(known)
    order: list[Expr] = []
    stack: list[Expr | None] = [*reversed(list(roots))]
    while stack:
        node = stack.pop()
        if node is None:  # the operands of the one below are listed
            order.append(stack.pop())  # type: ignore[arg-type]
        elif node not in seen:
            seen.add(node)
            if node.src:
                stack += (node, None, *node.src[::-1])
            else:
                order.append(node)
    return order


def leaves(roots: Iterable[Expr]) -> list[Expr]:
    return [e for e in postorder(roots) if e.op == "leaf"]


def transform(
    roots: Iterable[Expr], visit: Callable[[Expr, tuple[Expr, ...]], Expr], moved: dict[Expr, Expr] | None = None
) -> list[Expr]:
    """Rebuild a graph bottom-up: `visit(node, new_operands)` gives the node that replaces `node`.

    `moved`, where given, collects what each node became.
    """
    roots = list(roots)
    done: dict[Expr, Expr] = {} if moved is None else moved
    for node in postorder(roots):
        done[node] = visit(node, tuple(map(done.__getitem__, node.src)))
    return [done[root] for root in roots]


def rebuild(node: Expr, src: tuple[Expr, ...]) -> Expr:
    """`node` with other operands, which may lack axes that those of `node` have."""
    if src == node.src:
        return node
    make = OPS[node.op].make
    return Expr(node.op, src, node.arg) if make is None else make(src, node.arg)


def substitute(
    roots: Iterable[Expr], replacement: Mapping[Expr, Expr], moved: dict[Expr, Expr] | None = None
) -> list[Expr]:
    """Replace nodes (usually leaves) by others of the same axes."""
    return transform(roots, lambda node, src: replacement.get(node) or rebuild(node, src), moved)


def depends_on(roots: Iterable[Expr], of: Iterable[Expr]) -> set[Expr]:
    """The nodes under `roots` whose value depends on one of the nodes `of`."""
    found = set(of)
    for node in postorder(roots):
        if any(s in found for s in node.src):
            found.add(node)
    return found
