"""A user's own elementwise function: SymPy's formula in the named functions of `ir/scalars.py`, and as text.

Everything is made from the one formula that `adopt` gives: the function on tensors, the text in programs of NumPy,
PyTorch and Triton, the kernels of TVM. What `adopt` does not know is refused, so none of them meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from tttc.ir import scalars as s
from tttc.ir.scalars import Formula


def formula_of(expression: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> Formula:
    """A user's formula of these symbols; raises `ValueError` with the reason where it is none that can be computed."""
    names = "xyz" if len(symbols) <= 3 else [f"x{i}" for i in range(1, len(symbols) + 1)]
    real = [sympy.Symbol(name, real=True) for name, _ in zip(names, symbols, strict=False)]
    body = adopt(expression.xreplace(dict(zip(symbols, real, strict=True))))
    return Formula(formula_name(body), tuple(real), body)


def formula_name(body: sympy.Expr) -> str:
    """A name for a user's function, the same in every process: from the text of its formula."""
    import hashlib

    return "f_" + hashlib.sha256(sympy.srepr(body).encode()).hexdigest()[:6]


# -- from SymPy's functions to those with a row ------------------------------------------------------------------------


def _cosh(a: sympy.Expr) -> sympy.Expr:
    return (s.exp(a) + s.exp(-a)) / 2


def _sinh(a: sympy.Expr) -> sympy.Expr:
    return s.tanh(a) * _cosh(a)  # exact near 0, where a difference of exponentials has no digits


def _step(a: sympy.Expr, at_zero: sympy.Expr) -> sympy.Expr:
    """1 where a > 0, 0 where a < 0."""
    if at_zero == 0:
        return s.step(a)
    if at_zero == sympy.Rational(1, 2):
        return (1 + s.sign(a)) / 2
    return s.step(a) + at_zero * (1 - s.sign(a) ** 2)


FUNCTIONS: dict[str, Callable[..., sympy.Expr]] = {
    "exp": s.exp,
    "log": s.log,
    "tanh": s.tanh,
    "sin": s.sin,
    "cos": s.cos,
    "erf": s.erf,
    "Abs": s.absolute,
    "sign": s.sign,
    "Heaviside": _step,
    "tan": lambda a: s.sin(a) / s.cos(a),
    "cot": lambda a: s.cos(a) / s.sin(a),
    "sec": lambda a: 1 / s.cos(a),
    "csc": lambda a: 1 / s.sin(a),
    "sinh": _sinh,
    "cosh": _cosh,
    "sech": lambda a: 1 / _cosh(a),
    "csch": lambda a: 1 / _sinh(a),
    "coth": lambda a: 1 / s.tanh(a),
    "erfc": lambda a: 1 - s.erf(a),
    "Max": lambda *values: reduce(_larger, _numbers_last(values)),
    "Min": lambda *values: reduce(_smaller, _numbers_last(values)),
}
"""SymPy's functions, as a user writes them, in the named ones."""

ELEMENTARY: dict[str, Any] = {
    name: row.formula.func for name, row in s.SCALARS.items() if row.infix is None and row.definition is None
}
"""The named functions that no formula defines: what `adopt` leaves of functions."""

NAMED = {row.name: row for row in s.SCALARS.values() if row.infix is None}
"""The functions with a row, which a user may name too: sympy.Function("sigmoid")(x)."""


def function_names() -> list[str]:
    """The functions of SymPy that a formula may have."""
    return sorted([*FUNCTIONS, "Piecewise"])


def adopt(body: sympy.Expr) -> sympy.Expr:
    """A user's formula in the named functions; raises `ValueError` naming what has no form in them."""
    if body.is_number:
        return _number(body)
    if body.is_Symbol:
        return body
    if isinstance(body, sympy.Piecewise):
        return _piecewise(body)
    name = body.func.__name__
    if isinstance(body, sympy.Add | sympy.Mul):
        return body.func(*map(adopt, body.args))
    if isinstance(body, sympy.Pow) and name == "Pow":
        return _power(adopt(body.base), adopt(body.exp))
    if name in FUNCTIONS:
        return FUNCTIONS[name](*map(adopt, body.args))
    if name in NAMED and len(body.args) == NAMED[name].arity:
        return NAMED[name].formula.xreplace(dict(zip(NAMED[name].symbols, map(adopt, body.args), strict=True)))
    raise ValueError(f"{name} has no elementwise form here; use one of {', '.join(function_names())}, powers")


def _number(value: sympy.Expr) -> sympy.Expr:
    """A number as it is, where it is one of the real line."""
    if not value.is_comparable or value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan):
        raise ValueError(f"{value} is no finite real number")
    large = value.is_Rational and max(abs(value.p), value.q) > 2**53  # beyond what floating point counts
    return sympy.N(value, 17) if large else value


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent == sympy.Rational(1, 2):
        return s.sqrt(base)
    if exponent.is_number:
        return base**exponent
    logarithm = _number(sympy.log(base)) if base.is_number else s.log(base)
    return s.exp(exponent * logarithm)


def _numbers_last(values: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    return sorted(values, key=lambda v: bool(v.is_number))


def _larger(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """Of what is compared with a number, a NaN stays a NaN, and where both are equal the derivative is the number's."""
    return s.relu(a) if b == 0 else s.select(s.less_equal(a, b), b, a)


def _smaller(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return s.select(s.less_equal(b, a), b, a)


def _piecewise(body: sympy.Piecewise) -> sympy.Expr:
    *cases, (result, last) = body.args
    if last != sympy.true:
        raise ValueError(f"a Piecewise ends with (value, True): {body} has no value where none of its conditions holds")
    result = adopt(result)
    for value, condition in reversed(cases):
        result = s.select(_condition(condition), adopt(value), result)
    return result


def _condition(condition: Any) -> sympy.Expr:
    """1 where a condition holds, else 0."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
        parts = [_condition(c) for c in condition.args]
        if isinstance(condition, sympy.Not):
            return 1 - parts[0]
        if isinstance(condition, sympy.And):
            return sympy.Mul(*parts)
        return 1 - sympy.Mul(*(1 - p for p in parts))
    if isinstance(condition, sympy.core.relational.Relational):
        a, b = (adopt(x) for x in condition.args)
        if isinstance(condition, sympy.Eq | sympy.Ne):
            equal = s.less_equal(a, b) * s.less_equal(b, a)
            return equal if isinstance(condition, sympy.Eq) else 1 - equal
        if isinstance(condition, sympy.LessThan | sympy.GreaterThan):
            return s.less_equal(a, b) if isinstance(condition, sympy.LessThan) else s.less_equal(b, a)
        return 1 - (s.less_equal(b, a) if isinstance(condition, sympy.StrictLessThan) else s.less_equal(a, b))
    raise ValueError(f"the condition {condition} is not a comparison of two values")


# -- as text -----------------------------------------------------------------------------------------------------------


class FormulaPrinter(StrPrinter):
    """A formula as Python: numbers with all their digits, roots as powers; backends say how functions are written."""

    def _print_Float(self, expr: sympy.Float) -> str:
        doubles = expr._prec <= 53  # of a longer number SymPy shows all digits that count
        return repr(float(expr)) if doubles else str(super()._print_Float(expr))

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        return str(super()._print_Pow(expr, rational=True))


def rendered(body: sympy.Expr) -> str:
    """A formula as the text of a NumPy program."""
    return str(FormulaPrinter().doprint(body))


def formula_text(formula: Formula, render: Callable[[sympy.Expr], str] = rendered) -> str:
    """A formula as a Python function, its common subexpressions named."""
    arguments = ", ".join(x.name for x in formula.symbols)
    free = sympy.numbered_symbols("u", exclude=formula.symbols)
    irrational = formula.body.replace(lambda e: e.is_number and not e.is_Rational, lambda e: sympy.N(e, 17))
    shared, (body,) = sympy.cse(irrational, symbols=free)
    lines = [f"def {formula.name}({arguments}):"]
    lines += [f"    {name} = {render(value)}" for name, value in shared]
    return "\n".join([*lines, f"    return {render(body)}"])


@cache
def numpy_function(formula: Formula) -> Callable[..., Any]:
    """A formula as a function of NumPy's arrays."""
    scope: dict[str, Any] = s.numpy_names()
    exec(formula_text(formula), scope)
    return scope[formula.name]
