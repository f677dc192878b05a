"""Elementwise functions: a SymPy formula for each, from which SymPy takes every derivative.

SymPy rewrites on its own (`exp(a) * exp(b)`, `x / x`), which can overflow where the original did not. Functions with a
numerically stable form (sigmoid, softplus, rsqrt, ...) therefore stay named functions with a derivative of their own.
The formula of every other row is in terms of these, and so is its derivative:

    silu = x * sigmoid(x)      ->  silu' = sigmoid(x) + x * sigmoid(x) * (1 - sigmoid(x))

A backend that has no row for such a function computes its formula (backends/rows.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
from sympy.core.function import ArgumentIndexError

x, y, z = sympy.symbols("x y z", real=True)


def _named(name: str, derivative: Callable[..., sympy.Expr]) -> Any:
    """A function that SymPy leaves alone and differentiates by the given rule."""

    def fdiff(self: sympy.Function, argindex: int = 1) -> sympy.Expr:
        if argindex != 1:
            raise ArgumentIndexError(self, argindex)
        return derivative(self.args[0])

    return type(name, (sympy.Function,), {"fdiff": fdiff, "is_real": True, "nargs": (1,)})


step = _named("step", lambda a: sympy.Integer(0))  # 1 where a > 0, else 0; its derivative is 0 almost everywhere
sign = _named("sign", lambda a: sympy.Integer(0))
absolute = _named("abs", lambda a: sign(a))
relu = _named("relu", lambda a: step(a))
sigmoid: Any = _named("sigmoid", lambda a: sigmoid(a) * (1 - sigmoid(a)))
softplus = _named("softplus", lambda a: sigmoid(a))
rsqrt: Any = _named("rsqrt", lambda a: -(rsqrt(a) ** 3) / 2)
exp: Any = _named("exp", lambda a: exp(a))
log = _named("log", lambda a: 1 / a)
tanh: Any = _named("tanh", lambda a: 1 - tanh(a) ** 2)
sqrt: Any = _named("sqrt", lambda a: 1 / (2 * sqrt(a)))
sin = _named("sin", lambda a: cos(a))
cos: Any = _named("cos", lambda a: -sin(a))
erf = _named("erf", lambda a: 2 / sqrt(sympy.pi) * exp(-(a**2)))
less_equal = type(
    "less_equal", (sympy.Function,), {"is_real": True, "nargs": (2,), "fdiff": lambda self, i=1: sympy.Integer(0)}
)
select = type(
    "select",
    (sympy.Function,),
    {"is_real": True, "nargs": (3,), "fdiff": lambda self, i=1: _select_derivative(self, i)},
)


def _select_derivative(call: sympy.Function, i: int) -> sympy.Expr:
    """d select(condition, a, b): the condition is piecewise constant."""
    condition = call.args[0]
    zero, one = sympy.Integer(0), sympy.Integer(1)
    return (zero, select(condition, one, zero), select(condition, zero, one))[i - 1]


SILU: sympy.Expr = x * sigmoid(x)
GELU: sympy.Expr = x / 2 * (1 + tanh(sympy.sqrt(2 / sympy.pi) * (x + sympy.Float("0.044715") * x**3)))
HUBER = select(less_equal(absolute(x), y), x**2 / 2, y * (absolute(x) - y / 2))


@dataclass(frozen=True)
class Scalar:
    """A row: an elementwise function, its formula, and its meaning on NumPy arrays."""

    name: str
    formula: sympy.Expr
    numpy: Callable[..., Any]
    infix: str | None = None
    opaque_derivative: bool = False
    """Keep the derivative as one named function (`dgelu`): backends often have it as one operation."""
    domain: tuple[float, float] = (-3.0, 3.0)
    arity: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arity", len(self.formula.free_symbols) if self.formula.free_symbols else 1)

    @property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        return (x, y, z)[: self.arity]

    @property
    def definition(self) -> Formula | None:
        """The function in terms of others, which every backend can compute; None where it is one of these itself."""
        elementary = self.infix is not None or self.formula.func.__name__ == self.name
        return None if elementary else Formula(self.name, self.symbols, self.formula)


@dataclass(frozen=True)
class Formula:
    """An elementwise function without a row: a user's own, or a derivative kept whole. Prints as `name(...)`."""

    name: str
    symbols: tuple[sympy.Symbol, ...]
    body: sympy.Expr


def _sigmoid(a: Any) -> Any:
    e = np.exp(-np.abs(a))  # never overflows
    return np.where(np.asarray(a) >= 0, 1 / (1 + e), e / (1 + e))


def _erf(a: Any) -> Any:
    import math

    return np.vectorize(math.erf, otypes=[float])(a)


def _gelu(a: Any) -> Any:
    return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


def _huber(a: Any, delta: Any) -> Any:
    return np.where(np.abs(a) <= delta, 0.5 * a * a, delta * (np.abs(a) - 0.5 * delta))


_positive = (0.1, 3.0)
SCALARS: dict[str, Scalar] = {
    row.name: row
    for row in (
        Scalar("add", x + y, np.add, infix="+"),
        Scalar("sub", x - y, np.subtract, infix="-"),
        Scalar("mul", x * y, np.multiply, infix="*"),
        Scalar("div", x / y, np.divide, infix="/", domain=_positive),
        Scalar("neg", -x, np.negative, infix="-"),
        Scalar("exp", exp(x), np.exp),
        Scalar("log", log(x), np.log, domain=_positive),
        Scalar("sqrt", sqrt(x), np.sqrt, domain=_positive),
        Scalar("rsqrt", rsqrt(x), lambda a: 1 / np.sqrt(a), domain=_positive),
        Scalar("tanh", tanh(x), np.tanh),
        Scalar("sin", sin(x), np.sin),
        Scalar("cos", cos(x), np.cos),
        Scalar("erf", erf(x), _erf),
        Scalar("abs", absolute(x), np.abs),
        Scalar("sign", sign(x), np.sign),
        Scalar("step", step(x), lambda a: np.where(np.asarray(a) > 0, 1.0, 0.0)),
        Scalar("relu", relu(x), lambda a: np.maximum(a, 0)),
        Scalar("sigmoid", sigmoid(x), _sigmoid),
        Scalar("softplus", softplus(x), lambda a: np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a)))),
        Scalar("silu", SILU, lambda a: a * _sigmoid(a), opaque_derivative=True),
        Scalar("gelu", GELU, _gelu, opaque_derivative=True),
        Scalar("huber", HUBER, _huber),
        Scalar("less_equal", less_equal(x, y), lambda a, b: np.where(np.asarray(a) <= b, 1.0, 0.0)),
        Scalar("select", select(x, y, z), lambda c, a, b: np.where(np.asarray(c) > 0.5, a, b)),
    )
}


def numpy_names() -> dict[str, Callable[..., Any]]:
    """The rows that a NumPy program calls by their names."""
    return {row.name: row.numpy for row in SCALARS.values() if row.infix is None}


def derivative_name(name: str, index: int, arity: int) -> str:
    return f"d{name}" if arity == 1 else f"d{name}_{index}"
