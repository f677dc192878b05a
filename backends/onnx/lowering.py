"""Expressions as nodes of ONNX, as text: an expression with axes (s, D) is an array [N, s, D], N the batch elements
times the heads; a number is a scalar.

    x2: f32[C, D] = A @ x        ->        x2 = MatMul (A, x)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import sympy

from tttc.backends.onnx.nodes import Nodes
from tttc.backends.onnx.ops import ROWS
from tttc.backends.rows import in_others
from tttc.ir.expr import Axes, Axis, Expr, postorder
from tttc.ir.names import marked
from tttc.ir.ops import einsum_spec, is_upper
from tttc.ir.scalars import SCALARS

Factor = tuple[str, Axes]  # the name of an array, and its axes after N
BATCH = "z"  # the letter of N in an Einsum: the axes of an expression have the first of the alphabet


class Lowering(Nodes):
    """The nodes of one graph, made of expressions: `known` are those that have a name."""

    def __init__(self, parameters: Sequence[Expr], dims: Mapping[str, int], chunk: int | None, word: str = "") -> None:
        super().__init__(word)
        self.parameters, self.dims, self.chunk = parameters, dims, chunk
        self.known: dict[Expr, str] = {p: marked(p.name) for p in parameters}
        self.variables = {p.variable: marked(p.name) for p in parameters}
        self.lengths: dict[str, str] = {}

    # -- lengths

    def length(self, dim: str) -> str:
        """How long an axis is, as a vector of one; "" is N."""
        if dim in self.dims:
            return self.integers(self.dims[dim])
        if dim not in self.lengths:
            found = ((p, i + 1) for p in self.parameters for i, a in enumerate(p.axes) if a.size == dim)
            p, at = next(found) if dim else (self.parameters[0], 0)
            self.lengths[dim] = self.node("Shape", marked(p.name), start=at, end=at + 1)
        return self.lengths[dim]

    def shape(self, *dims: str) -> str:
        """N and the lengths of several axes."""
        return self.node("Concat", self.length(""), *map(self.length, dims), axis=0) if dims else self.length("")

    # -- axes

    def transposed(self, name: str, axes: Sequence[Axis], to: Sequence[Axis]) -> str:
        """An array with axes `axes` with these in the order `to`."""
        if tuple(axes) == tuple(to):
            return name
        perm = [0, *(list(axes).index(a) + 1 for a in to)]
        node = self.nodes.get(name)
        if node is not None and node.kind == "MatMul" and perm == swapped(len(perm)):
            return self.node("MatMul", *(self._turned(x, len(perm)) for x in node.inputs[::-1]))
        return self.node("Transpose", name, perm=perm)

    def _turned(self, name: str, rank: int) -> str:
        """With its last two axes exchanged."""
        node = self.nodes.get(name)
        if node is not None and (node.kind, node.attributes) == ("Transpose", f"perm = {swapped(rank)}"):
            return node.inputs[0]
        return self.node("Transpose", name, perm=swapped(rank))

    def aligned(self, e: Expr, to: Sequence[Axis]) -> str:
        """Made ready to broadcast against an array [N, *to]."""
        name = self(e)
        if not is_array(e):
            return name
        order = tuple(a for a in to if a in e.axes)
        if order != e.axes and name in self.nodes and (factors := self._outer(e)) is not None:
            return self._spread(self._product(*factors, order), order, to)
        return self._spread(name, e.axes, to)

    def _spread(self, name: str, axes: Axes, to: Sequence[Axis]) -> str:
        name = self.transposed(name, axes, [a for a in to if a in axes])
        missing = [i + 1 for i, a in enumerate(to) if a not in axes]
        if not missing:
            return name
        over, node = self.integers(*missing), self.nodes.get(name)
        if node is not None and node.attributes == "keepdims = 0" and node.inputs[1] == over:
            return self.node(node.kind, *node.inputs, keepdims=1)  # summed over the same axes, which stay
        return self.node("Unsqueeze", name, over)

    def filled(self, e: Expr, to: Axes) -> str:
        """An array [N, *to], whatever axes the value lacks."""
        name = self.aligned(e, to)
        if is_array(e) and set(e.axes) == set(to):
            return name
        return self.node("Expand", name, self.shape(*(a.size for a in to)))

    # -- expressions

    def __call__(self, e: Expr) -> str:
        """The name of its value, whose axes are in its own order."""
        for node in postorder([e], self.known):
            if node not in self.known:
                self.known[node] = self._lowered(node)
        return self.known[e]

    def _lowered(self, e: Expr) -> str:
        if e.op not in ROWS and (made_of := in_others(e)) is not None:
            return self(made_of)
        if e.op == "mul" and (factors := self._outer(e)) is not None:
            return self._product(*factors, e.axes)
        if e.op in SCALARS:
            return self.applied(e.op, *(self.aligned(s, e.axes) for s in e.src))
        if ROWS[e.op].startswith("_"):
            return str(getattr(self, ROWS[e.op])(e))
        over = self.integers(*(e.src[0].axes.index(a) + 1 for a in e.arg))
        return self.node(ROWS[e.op], self(e.src[0]), over, keepdims=0)

    def applied(self, op: str, *operands: str) -> str:
        """An elementwise operation of values that broadcast."""
        row = ROWS[op]
        return str(getattr(self, row)(*operands)) if row.startswith("_") else self.node(row, *operands)

    def _leaf(self, e: Expr) -> str:
        return self.variables[e.variable]

    def _const(self, e: Expr) -> str:
        return self.number(e.arg)

    def _size(self, e: Expr) -> str:
        if e.arg.size in self.dims:
            return self.number(self.dims[e.arg.size])
        return self.node("Cast", self.node("Squeeze", self.length(e.arg.size)), to=1)

    def _rename(self, e: Expr) -> str:
        return self(e.src[0])

    _stop_gradient = _rename

    def _broadcast(self, e: Expr) -> str:
        return self.filled(e.src[0], e.axes)

    def named(self, e: Expr, name: str, axes: Axes) -> None:
        """Give a value with these axes its own name: the node that makes it, where that is the last one."""
        value = self.filled(e, axes)
        head, equals, node = self.lines[-1].partition(" = ") if self.lines else ("", "", "")
        if head == value and equals:
            self.lines[-1] = f"{name} = {node}"
            self.made = {n: name if made == value else made for n, made in self.made.items()}
        else:
            self.lines.append(f"{name} = Identity ({value})")
        self.known = {x: name if n == value and head == value else n for x, n in self.known.items()}

    # -- elementwise

    def _rsqrt(self, x: str) -> str:
        return self.node("Reciprocal", self.node("Sqrt", x))

    def _silu(self, x: str) -> str:
        return self.node("Mul", x, self.node("Sigmoid", x))

    def _gelu(self, x: str) -> str:
        return self.node("Gelu", x, approximate="tanh")

    def _step(self, x: str) -> str:
        return self.node("Cast", self.node("Greater", x, self.number(0.0)), to=1)

    def _less_equal(self, x: str, y: str) -> str:
        return self.node("Cast", self.node("LessOrEqual", x, y), to=1)

    def _select(self, condition: str, x: str, y: str) -> str:
        return self.node("Where", self.node("Greater", condition, self.number(0.5)), x, y)

    def _huber(self, x: str, delta: str) -> str:
        size, half = self.node("Abs", x), self.number(0.5)
        linear = self.node("Mul", delta, self.node("Sub", size, self.node("Mul", delta, half)))
        square = self.node("Mul", half, self.node("Mul", size, size))
        return self.node("Where", self.node("LessOrEqual", size, delta), square, linear)

    def _pow(self, e: Expr) -> str:
        return self._power(self(e.src[0]), float(e.arg))

    def _power(self, x: str, n: float) -> str:
        if n == -1:
            return self.node("Reciprocal", x)
        if n in (2, 3):
            square = self.node("Mul", x, x)
            return square if n == 2 else self.node("Mul", square, x)
        return self.node("Pow", x, self.number(n))

    def _map(self, e: Expr) -> str:
        """A user's formula, what occurs several times once."""
        names: dict[sympy.Expr, str] = dict(zip(e.arg.symbols, (self.aligned(s, e.axes) for s in e.src), strict=True))
        shared, (body,) = sympy.cse(e.arg.body)
        for symbol, value in shared:
            names[symbol] = self._formula(value, names)
        return self._formula(body, names)

    def _formula(self, x: sympy.Expr, names: Mapping[sympy.Expr, str]) -> str:
        if x in names:
            return names[x]
        if x.is_number:
            return self.number(float(x))
        if x.is_Pow and x.exp.is_number:
            return self._power(self._formula(x.base, names), float(x.exp))
        operands = [self._formula(a, names) for a in x.args]
        if x.is_Add or x.is_Mul:
            total = operands[0]
            for operand in operands[1:]:
                total = self.node("Add" if x.is_Add else "Mul", total, operand)
            return total
        return self.node("Pow", *operands) if x.is_Pow else self.applied(x.func.__name__, *operands)

    # -- norms

    def _layer_norm(self, e: Expr) -> str:
        x, gain, bias = e.src
        axis, eps = e.arg
        order = (*(a for a in x.axes if a != axis), axis)
        ones = self.node("Expand", self.number(1.0), self.length(axis.size))
        normal = self.node("LayerNormalization", self.filled(x, order), ones, axis=-1, epsilon=float(eps))
        normal = self.transposed(normal, order, e.axes)
        return self.node("Add", self.node("Mul", self.aligned(gain, e.axes), normal), self.aligned(bias, e.axes))

    # -- contractions

    def _contract(self, e: Expr) -> str:
        operands = [(self.filled(s, s.axes), s.axes) for s in e.src]
        if len(operands) != 2:
            return self._einsum(e, [name for name, _ in operands])
        (left, la), (right, ra) = (self._summed(n, axes, e, 1 - i) for i, (n, axes) in enumerate(operands))
        batch = [a for a in la if a in ra and a not in e.arg]
        over = [a for a in la if a in e.arg]
        if e.axes[len(batch) :] and e.axes[len(batch)] in ra and tuple(e.axes[: len(batch)]) == tuple(batch):
            (left, la), (right, ra) = (right, ra), (left, la)  # otherwise the product is transposed
        rows, columns = ([a for a in axes if a not in batch and a not in over] for axes in (la, ra))
        if not over:
            return self._product((left, la), (right, ra), e.axes)
        if not rows and not columns:
            left, right = (self.transposed(x, axes, [*batch, *over]) for x, axes in ((left, la), (right, ra)))
            last = self.integers(*range(len(batch) + 1, len(batch) + len(over) + 1))
            total = self.node("ReduceSum", self.node("Mul", left, right), last, keepdims=0)
            return self.transposed(total, batch, e.axes)
        if max(map(len, (rows, columns, over))) > 1:
            return self._einsum(e, [name for name, _ in operands])
        left = self.transposed(left, la, [*batch, *rows, *over])
        right = self.transposed(right, ra, [*batch, *over, *columns])
        left = left if rows else self.node("Unsqueeze", left, self.integers(-2))
        right = right if columns else self.node("Unsqueeze", right, self.integers(-1))
        product = self.node("MatMul", left, right)
        product = product if rows else self.node("Squeeze", product, self.integers(-2))
        product = product if columns else self.node("Squeeze", product, self.integers(-1))
        return self.transposed(product, [*batch, *rows, *columns], e.axes)

    def _outer(self, e: Expr) -> tuple[Factor, Factor] | None:
        """The factors of an outer product, of which neither has all axes; what multiplies it belongs to one of them,
        which is smaller.
        """
        if e.op == "contract" and not e.arg and len(e.src) == 2:
            left, right = ((self.filled(x, x.axes), x.axes) for x in e.src)
            return (left, right) if max(len(left[1]), len(right[1])) < len(e.axes) else None
        for scale, product in (e.src, e.src[::-1]) if e.op == "mul" else ():
            for one, other in self._ways(product):
                if set(scale.axes) <= set(one[1]):
                    return (self.applied("mul", self.aligned(scale, one[1]), one[0]), one[1]), other
        return None

    def _ways(self, e: Expr) -> list[tuple[Factor, Factor]]:
        factors = self._outer(e)
        return [] if factors is None else [factors, factors[::-1]]

    def _product(self, left: Factor, right: Factor, to: Axes) -> str:
        return self.node("Mul", self._spread(*left, to), self._spread(*right, to))

    def _summed(self, name: str, axes: Axes, e: Expr, other: int) -> tuple[str, Axes]:
        """An operand of a contraction, summed over the axes that it alone has."""
        alone = [a for a in axes if a in e.arg and a not in e.src[other].axes]
        if not alone:
            return name, axes
        over = self.integers(*(axes.index(a) + 1 for a in alone))
        return self.node("ReduceSum", name, over, keepdims=0), tuple(a for a in axes if a not in alone)

    def _einsum(self, e: Expr, operands: Sequence[str]) -> str:
        return self.node("Einsum", *operands, equation=einsum_spec(e, BATCH))

    # -- along tokens

    def _mask(self, e: Expr) -> str:
        rows, columns, strict = e.arg
        last = [*(a for a in e.axes if a not in (rows, columns)), rows, columns]
        x = self.transposed(self.filled(e.src[0], e.axes), e.axes, last)
        return self.transposed(self._triangle(x, strict), last, e.axes)

    def _triangle(self, x: str, strict: bool, upper: bool = False) -> str:
        """The triangle of the last two axes, without its diagonal where it is strict."""
        diagonal = self._constant(f"int64 {{{int(strict) * (1 if upper else -1)}}}")
        return self.node("Trilu", x, diagonal, upper=int(upper))

    def _last(self, e: Expr) -> str:
        at = self._constant("int64 {-1}")
        return self.node("Gather", self(e.src[0]), at, axis=e.src[0].axes.index(e.arg) + 1)

    def _put_last(self, e: Expr) -> str:
        row = self.node("Unsqueeze", self.filled(e.src[0], e.src[0].axes), self.integers(1))
        before = self.node("Sub", self.length(e.arg.size), self.integers(1))
        return self._padded(row, before, self.integers(0), len(e.axes), 0.0)

    def _shift(self, e: Expr) -> str:
        axis, fill = e.arg
        x = self._padded(self._token_first(e.src[0], axis), self.integers(1), self.integers(0), len(e.axes), fill)
        return self.node("Slice", x, self.integers(0), self.integers(-1), self.integers(1))

    def _shift_back(self, e: Expr) -> str:
        x = self._padded(self._token_first(e.src[0], e.arg), self.integers(0), self.integers(1), len(e.axes), 0.0)
        return self.node("Slice", x, self.integers(1), self.integers(2**62), self.integers(1))

    def _token_first(self, e: Expr, axis: Axis) -> str:
        return self.transposed(self.filled(e, e.axes), e.axes, [axis, *(a for a in e.axes if a != axis)])

    def _padded(self, x: str, before: str, after: str, rank: int, fill: float) -> str:
        """With so many more rows of its first axis."""
        none = self.integers(*[0] * (rank - 1)) if rank > 1 else None
        pads = [self.integers(0), before, *([none] if none else []), self.integers(0), after, *([none] if none else [])]
        return self.node("Pad", x, self.node("Concat", *pads, axis=0), self.number(fill))

    def _cumprod(self, e: Expr) -> str:
        return self.node("CumProd", self._token_first(e.src[0], e.arg), self._constant("int64 {1}"))

    def _segprod(self, e: Expr) -> str:
        """P[t, s]: the product of x[r] for s < r <= t. Where s < r does not hold, its factor is 1."""
        rest = len(e.axes) - 2
        x = self.node("Unsqueeze", self._token_first(e.src[0], e.axis), self.integers(2))
        length = self.length(e.axis.size)
        ones = self.node("Expand", self.number(1.0), self.node("Concat", length, length, axis=0))
        later, lower = self._triangle(ones, strict=True), self._triangle(ones, strict=False)
        if rest:
            later, lower = (self.node("Unsqueeze", m, self.integers(*range(2, 2 + rest))) for m in (later, lower))
        factors = self.node("Where", self.node("Greater", later, self.number(0.5)), x, self.number(1.0))
        return self.node("Mul", self.node("CumProd", factors, self._constant("int64 {1}")), lower)

    def _solve(self, e: Expr) -> str:
        """(I + N)^-1 x. N is nilpotent: its inverse is a product of I + (-N)^(2^i), for each binary digit of C."""
        (known, unknown), (lower, right) = e.arg, e.src
        shared = [a for a in e.axes[1:] if a in lower.axes]
        others = [a for a in e.axes[1:] if a not in shared]
        system = self.transposed(self.filled(lower, lower.axes), lower.axes, [*shared, known, unknown])
        power = self.node("Neg", self._triangle(system, strict=True, upper=is_upper(e)))
        x = self.filled(right, (*shared, known, *others))
        if len(others) != 1:
            kept = self.shape(*(a.size for a in (*shared, known)))
            x = self.node("Reshape", x, self.node("Concat", kept, self.integers(-1), axis=0))
        x = self._doubled(x, power, e.axis) if self.chunk is None else self._doubled_to(self.chunk, x, power)
        if len(others) != 1:
            x = self.node("Reshape", x, self.shape(*(a.size for a in (*shared, unknown, *others))))
        return self.transposed(x, [*shared, unknown, *others], e.axes)

    def _doubled_to(self, length: int, x: str, power: str) -> str:
        """As many factors as a system of known length has."""
        for i in range(max(1, math.ceil(math.log2(length)))):
            power = self.node("MatMul", power, power) if i else power
            x = self.node("Add", x, self.node("MatMul", power, x))
        return x

    def _doubled(self, x: str, power: str, tokens: Axis) -> str:
        """As many factors as the system turns out to have: the binary digits of its length."""
        length = self.node("Cast", self.node("Squeeze", self.length(tokens.size)), to=11)
        logarithm = self.node("Mul", self.node("Log", length), self._constant(f"double {{{1 / math.log(2)!r}}}"))
        digits = self.node("Floor", self.node("Add", logarithm, self._constant("double {1.000001}")))
        rounds, always = self.node("Cast", digits, to=7), self._constant("bool {1}")
        words = ("done", "left", "i", "go", "x_in", "p_in", "goes_on", "product", "x_out", "p_out")
        done, left, i, go, x_in, p_in, goes_on, product, x_out, p_out = map(self.local, words)
        given, made = f"int64 {i}, bool {go}, {x_in}, {p_in}", f"{goes_on}, {x_out}, {p_out}"
        self.lines += [
            f"{done}, {left} = Loop <body = doubling ({given}) => ({made}) {{",
            f"   {goes_on} = Identity ({go})",
            f"   {product} = MatMul ({p_in}, {x_in})",
            f"   {x_out} = Add ({x_in}, {product})",
            f"   {p_out} = MatMul ({p_in}, {p_in})",
            f"}}> ({rounds}, {always}, {x}, {power})",
        ]
        return done


def swapped(rank: int) -> list[int]:
    """The permutation that exchanges the last two axes."""
    return [*range(rank - 2), rank - 1, rank - 2]


def is_array(e: Expr) -> bool:
    """Whether a value is more than a number that is known from dims and lengths."""
    return any(x.op in ("leaf", "broadcast") for x in postorder([e]))
