"""What lies beyond the end of an axis: blocks have powers of two, dims and the last chunk have not.

Loads put zeros there, and what is computed from them may be anything. Before numbers are added up along such an axis,
one factor must be zero beyond its end and the others numbers at all (0 * inf is none). This file says which are; the
others get a `tl.where`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import sympy

from tttc.ir.expr import Axis, Expr
from tttc.ir.formulas import numpy_function
from tttc.ir.scalars import Formula

Axes = frozenset[Axis]
NONE: Axes = frozenset()
_ZERO_TO_ZERO = {"add", "sub", "neg", "sum", "mean", "mask", "last", "put_last", "shift", "shift_back"}
_PRODUCTS = {"mul", "contract", "segprod", "cumprod", "solve"}
_LAYOUT = {"broadcast", "rename", "stop_gradient", "max"}
_SMOOTH = {"exp", "tanh", "sigmoid", "silu", "gelu", "erf", "sin", "cos", "softplus"}
_PIECEWISE = {"abs", "sign", "relu", "step", "less_equal", "select", "huber"}
_FINITE = _ZERO_TO_ZERO | _PRODUCTS | _LAYOUT | _SMOOTH | _PIECEWISE  # numbers where their operands are
_ZERO_AT_ZERO = frozenset(("tanh", "silu", "gelu", "erf", "sin", "abs", "sign", "relu", "step", "sqrt"))  # f(0) = 0
_NOT_NEGATIVE = frozenset(("abs", "relu", "sqrt", "softplus", "step", "less_equal"))
_POSITIVE = frozenset(("exp", "sigmoid"))


class Padding:
    """What is known beyond the ends of the axes that are padded."""

    def __init__(self, padded: Callable[[Axis], bool]) -> None:
        self.padded = padded
        self._zero: dict[Expr, Axes] = {}
        self._finite: dict[Expr, bool] = {}

    def unclean(self, e: Expr, axes: Axes) -> list[Axis]:
        """The padded ones of these axes beyond whose end `e` is not known to be zero."""
        return [a for a in e.axes if a in axes and self.padded(a) and a not in self.zero(e)]

    def zero(self, e: Expr) -> Axes:
        """The padded axes beyond whose end `e` is zero."""
        if e not in self._zero:
            self._zero[e] = frozenset(a for a in self._zeros(e) if self.padded(a))
        return self._zero[e]

    def _zeros(self, e: Expr) -> Axes:
        inside = [self.zero(s) for s in e.src]
        match e.op:
            case "leaf":
                return frozenset(e.axes)
            case "contract":
                return frozenset(a for z in inside for a in z if a in e.axes)
            case "mul":
                return inside[0] | inside[1]
            case "add" | "sub":
                return inside[0] & inside[1]
            case "div" | "neg" | "mask" | "stop_gradient":
                return inside[0]
            case "sum" | "mean" | "last" | "put_last" | "max":
                return frozenset(a for a in inside[0] if a in e.axes)
            case "pow":
                return inside[0] if e.arg > 0 else NONE
            case "rename":
                to = dict(e.arg)
                return frozenset(to.get(a, a) for a in inside[0])
            case "broadcast":
                return frozenset(e.axes) if e.src[0].op == "const" and e.src[0].arg == 0 else inside[0]
            case "map":
                return frozenset.intersection(*inside) if inside and _vanishes(e.arg) else NONE
            case "solve":
                return inside[1]
        return inside[0] if e.op in _ZERO_AT_ZERO else NONE

    def finite(self, e: Expr) -> bool:
        """Whether `e` is a number beyond every end, where all that is loaded is zero."""
        if e not in self._finite:
            self._finite[e] = all(self.finite(s) for s in e.src) and self._finite_of_finite(e)
        return self._finite[e]

    def _finite_of_finite(self, e: Expr) -> bool:
        if e.op == "const":
            return math.isfinite(e.arg)
        if e.op in ("leaf", "size") or e.op in _FINITE:
            return True
        if e.op == "div":
            return self.positive(e.src[1])
        if e.op in ("rsqrt", "log"):
            return self.positive(e.src[0])
        if e.op == "sqrt":
            return self.not_negative(e.src[0])
        if e.op == "pow":
            return (e.arg > 0 and e.arg == int(e.arg)) or self.positive(e.src[0])
        return e.op == "map" and _is_polynomial(e.arg)

    def positive(self, e: Expr) -> bool:
        """Whether `e` is more than zero, whatever is loaded."""
        match e.op:
            case "const":
                return bool(e.arg > 0)
            case "size":
                return True
            case "add":
                x, y = e.src
                one, other = self.positive(x), self.positive(y)
                return (one and (other or self.not_negative(y))) or (other and self.not_negative(x))
            case "mul" | "div":
                return all(self.positive(s) for s in e.src)
            case "rename" | "broadcast" | "stop_gradient" | "sqrt" | "rsqrt" | "pow":
                return self.positive(e.src[0])
        return e.op in _POSITIVE

    def not_negative(self, e: Expr) -> bool:
        match e.op:
            case "pow":
                return bool(e.arg % 2 == 0) or self.not_negative(e.src[0])
            case "mul" | "contract":
                twice = len(e.src) == 2 and e.src[0] is e.src[1]
                return twice or all(self.not_negative(s) for s in e.src)
            case "sum" | "mean" | "max" | "rename" | "broadcast" | "stop_gradient" | "mask":
                return self.not_negative(e.src[0])
            case "add":
                return all(self.not_negative(s) for s in e.src)
        return e.op in _NOT_NEGATIVE or (e.op == "const" and e.arg == 0) or self.positive(e)


def _vanishes(formula: Formula) -> bool:
    with np.errstate(all="ignore"):
        return bool(numpy_function(formula)(*(np.float64(0) for _ in formula.symbols)) == 0)


def _is_polynomial(formula: Formula) -> bool:
    """Whether a formula divides by nothing, and has no root or logarithm, that could be no number."""
    powers = all(p.exp.is_Integer and p.exp > 0 for p in formula.body.atoms(sympy.Pow) if not p.base.is_number)
    return powers and all(type(f).__name__ in _FINITE for f in formula.body.atoms(sympy.Function))
