"""Constructors of expressions: one short function for each kind of node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import sympy

from tttc.ir.expr import Axes, Axis, Expr, const
from tttc.ir.names import numbered, own
from tttc.ir.scalars import SCALARS, Formula, derivative_name

__all__ = ["const"]  # beside what is made here


def apply(name: str, *operands: Expr) -> Expr:
    """An elementwise function of the table: `apply("tanh", x)`."""
    return Expr(name, operands)


def add(a: Expr, b: Expr) -> Expr:
    return Expr("add", (a, b))


def sub(a: Expr, b: Expr) -> Expr:
    return Expr("sub", (a, b))


def mul(a: Expr, b: Expr) -> Expr:
    return Expr("mul", (a, b))


def div(a: Expr, b: Expr) -> Expr:
    return Expr("div", (a, b))


def neg(a: Expr) -> Expr:
    return Expr("neg", (a,))


def power(a: Expr, n: float) -> Expr:
    return Expr("pow", (a,), n)


def contract(operands: Sequence[Expr], over: Iterable[Axis]) -> Expr:
    """The sum over the axes `over` of the product of the operands; they broadcast over axes that they lack.

    Over an axis that none of them has, the sum is the product times the size of that axis.
    """
    over = tuple(dict.fromkeys(over))
    if len(operands) == 1:
        return total(operands[0], over)
    present = tuple(a for a in over if any(a in e.axes for e in operands))
    if len(operands) == 2 and _token_rank(operands[1], over) < _token_rank(operands[0], over):
        operands = operands[::-1]  # tokens are rows: what keeps a token axis stands on the left
    return _repeated(Expr("contract", tuple(operands), present), over, present)


def _token_rank(e: Expr, over: Axes) -> int:
    """0 if `e` keeps the reading-token axis of a chunk, 1 if the source-token axis, 2 if neither."""
    kept = {a.name for a in e.axes if a not in over}
    return 0 if own("t") in kept else 1 if own("s") in kept else 2


def total(a: Expr, over: Iterable[Axis]) -> Expr:
    """The sum over axes: over one that `a` lacks, along which it is the same, that is a product with its size."""
    over = tuple(over)
    present = tuple(axis for axis in over if axis in a.axes)
    return _repeated(Expr("sum", (a,), present) if present else a, over, present)


def _repeated(a: Expr, over: Axes, present: Axes) -> Expr:
    """`a` times the sizes of the axes `over` that are not `present`."""
    for axis in over:
        if axis not in present:
            a = mul(size(axis), a)
    return a


def mean(a: Expr, over: Iterable[Axis]) -> Expr:
    """The mean over axes; along one that `a` lacks, it is its own mean."""
    present = tuple(axis for axis in over if axis in a.axes)
    return Expr("mean", (a,), present) if present else a


def maximum(a: Expr, over: Iterable[Axis]) -> Expr:
    """The largest entry over axes; along one that `a` lacks, there is but one."""
    present = tuple(axis for axis in over if axis in a.axes)
    return Expr("max", (a,), present) if present else a


def size(axis: Axis) -> Expr:
    """The length of an axis as a scalar."""
    return Expr("size", (), axis)


def mask(a: Expr, rows: Axis, columns: Axis, *, strict: bool = False) -> Expr:
    """Zero where the source token (`columns`) comes after the reading token (`rows`); at it too when `strict`."""
    absent = tuple(axis for axis in (rows, columns) if axis not in a.axes)
    return Expr("mask", (broadcast(a, absent),), (rows, columns, strict))


def last(a: Expr, axis: Axis) -> Expr:
    """The entry of the last token along `axis`; of what is the same for all tokens, that is itself."""
    return Expr("last", (a,), axis) if axis in a.axes else a


def put_last(a: Expr, axis: Axis) -> Expr:
    """`a` at the last token along `axis`, zero at the others: the transpose of `last`."""
    return Expr("put_last", (a,), axis)


def segprod(a: Expr, rows: Axis, columns: Axis) -> Expr:
    """Products of a segment of tokens: P[t, s] = a[s + 1] * ... * a[t], 1 where t = s, 0 where s comes after t."""
    return Expr("segprod", (broadcast(a, (rows,)),), (rows, columns))


def cumprod(a: Expr, axis: Axis) -> Expr:
    """a[0] * ... * a[t] at every token t."""
    return Expr("cumprod", (broadcast(a, (axis,)),), axis)


def shift(a: Expr, axis: Axis, fill: float = 0.0) -> Expr:
    """Every token gets the entry of the one before it, the first one `fill`."""
    return Expr("shift", (broadcast(a, (axis,)),), (axis, float(fill)))


def shift_back(a: Expr, axis: Axis) -> Expr:
    """Every token gets the entry of the one after it, the last one 0: the transpose of `shift`."""
    return Expr("shift_back", (broadcast(a, (axis,)),), axis)


def solve(matrix: Expr, right: Expr, known: Axis, unknown: Axis) -> Expr:
    """The x with x[t] + sum over s < t of matrix[t, s] * x[s] = right[t], its tokens on the axis `unknown`.

    Of `matrix` only what lies strictly below the diagonal is read. `right` has its tokens on the axis `known`: t for
    this system, s for the transposed one.
    """
    return Expr("solve", (broadcast(matrix, (known, unknown)), broadcast(right, (known,))), (known, unknown))


def normalize(op: str, operands: Sequence[Expr], arg: tuple[Axis, *tuple[float, ...]]) -> Expr:
    """A norm or softmax of the first operand along the axis that `arg` begins with."""
    first, *others = operands
    return Expr(op, (broadcast(first, (arg[0],)), *others), arg)


def between(*taken: Axis) -> Axis:
    """A token axis that is none of `taken`."""
    return next(Axis(name, taken[0].size) for name in map(own, "trs") if name not in {a.name for a in taken})


def stop_gradient(a: Expr) -> Expr:
    return Expr("stop_gradient", (a,))


def broadcast(a: Expr, axes: Axes) -> Expr:
    """`a` repeated along the axes that it lacks."""
    return a if set(axes) <= set(a.axes) else Expr("broadcast", (a,), axes)


def rename(a: Expr, to: Mapping[Axis, Axis]) -> Expr:
    """The same values under other axis names: never a computation, only a label."""
    moved = {old: new for old, new in to.items() if old in a.axes and old != new}
    if not moved:
        return a
    if a.op == "leaf":
        return Expr("leaf", (), (a.variable, tuple(moved.get(x, x) for x in a.axes)))
    if a.op == "rename":
        back = {new: old for old, new in a.arg}
        composed = {back.get(x, x): moved.get(x, x) for x in a.axes}
        return rename(a.src[0], composed)
    return Expr("rename", (a,), tuple(sorted(moved.items())))


def fresh(axis: Axis, taken: Iterable[Axis]) -> Axis:
    """An axis of the same size whose name is not taken: D, D1, D2, ..., which are no names of dims."""
    names = {a.name for a in taken}
    candidates = (axis.size if i == 0 else numbered(axis.size, i) for i in range(len(names) + 1))
    return Axis(next(name for name in candidates if name not in names), axis.size)


def reduce_to(a: Expr, full: Axes, target: Axes) -> Expr:
    """Sum a cotangent over the axes of `full` that `target` lacks.

    A cotangent may lack axes along which it is constant; the sum over such an axis is a product with its size.
    """
    gone = [axis for axis in full if axis not in target]
    summed = total(a, [axis for axis in gone if axis in a.axes])
    for axis in gone:
        if axis not in a.axes:
            summed = mul(summed, size(axis))
    return summed


# -- elementwise functions and SymPy ---------------------------------------------------------------------------------


def expression_of(body: sympy.Expr, values: Mapping[sympy.Symbol, Expr]) -> Expr:
    """A SymPy formula as nodes: `y * (1 - y)` -> mul(y, sub(1, y))."""
    if body.is_Symbol:
        return values[body]
    if body.is_number:
        return const(float(body))
    if isinstance(body, sympy.Add):
        positive, negative = _by_sign(body.as_ordered_terms())
        result = expression_of(positive[0], values) if positive else None
        for term in positive[1:]:
            result = add(result, expression_of(term, values)) if result else None
        for term in negative:
            value = expression_of(-term, values)
            result = sub(result, value) if result is not None else neg(value)
        assert result is not None
        return result
    if isinstance(body, sympy.Mul):
        return _product_of(body, values)
    if isinstance(body, sympy.Pow):
        base, exponent = body.args
        if not exponent.is_number:
            return apply("exp", mul(expression_of(exponent, values), apply("log", expression_of(base, values))))
        if exponent == -1:
            return div(const(1.0), expression_of(base, values))
        return power(expression_of(base, values), float(exponent))
    return Expr(body.func.__name__, tuple(expression_of(a, values) for a in body.args))


def _product_of(body: sympy.Mul, values: Mapping[sympy.Symbol, Expr]) -> Expr:
    """-x**3 / (2 * y) -> -0.5 * x ** 3 / y: the number first, negative powers below."""
    number, rest = body.as_coeff_Mul()
    above: list[sympy.Expr] = []
    below: list[sympy.Expr] = []
    for factor in sympy.Mul.make_args(rest):
        base, exponent = factor.as_base_exp()
        negative = exponent.is_number and exponent.is_negative
        (below if negative else above).append(base**-exponent if negative else factor)
    parts = [expression_of(f, values) for f in above]
    result = parts[0] if parts else const(float(number))
    for part in parts[1:]:
        result = mul(result, part)
    if parts and number != 1:
        result = neg(result) if number == -1 else mul(const(float(number)), result)
    for factor in below:
        result = div(result, expression_of(factor, values))
    return result


def _by_sign(terms: Sequence[sympy.Expr]) -> tuple[list[sympy.Expr], list[sympy.Expr]]:
    negative = [t for t in terms if t.could_extract_minus_sign()]
    return [t for t in terms if t not in negative], negative


def partial(y: Expr, index: int) -> Expr:
    """The derivative of an elementwise node by its operand `index`, taken by SymPy from the formula of its row."""
    if y.op == "pow":
        (a,), n = y.src, y.arg
        return const(1.0) if n == 1 else mul(const(n), a if n == 2 else power(a, n - 1))
    if y.op == "map":
        formula: Formula = y.arg
        name = derivative_name(formula.name, index, len(formula.symbols))
        return _formula_node(name, formula.symbols, _derivative(formula.body, formula.symbols[index]), y.src)
    row = SCALARS[y.op]
    derivative = _derivative(row.formula, row.symbols[index])
    if row.opaque_derivative:
        return _formula_node(derivative_name(row.name, index, row.arity), row.symbols, derivative, y.src)
    result = sympy.Symbol("result", real=True)
    values = dict(zip(row.symbols, y.src, strict=True)) | {result: y}
    return expression_of(derivative.subs(row.formula, result), values)


@cache
def _derivative(body: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """By SymPy, once for each formula: a millisecond that many nodes share."""
    return sympy.diff(body, symbol)


def _formula_node(name: str, symbols: tuple[sympy.Symbol, ...], body: sympy.Expr, src: tuple[Expr, ...]) -> Expr:
    """An opaque function of the operands, or plain nodes where the formula is a number or an operand."""
    if body.is_number or body.is_Symbol:
        return expression_of(body, dict(zip(symbols, src, strict=True)))
    return Expr("map", src, Formula(name, symbols, body))
