"""The table of operations, and those on vectors of TensorIR: polynomials of our own where LLVM only calls libm.

The error of each, relative, in units of the last place over its whole range (tests/test_tvm.py measures it):

    exp 3    log 3    tanh 6    sigmoid 4    softplus 4    silu 8    gelu 20    erf, sin, cos: libm's, lane after lane

A NaN stays a NaN: `min` and `max` give their second operand where one of them is none. An exponential smaller than the
smallest number with all its digits is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy

from tttc.backends.rows import methods
from tttc.backends.tvm_common.tir import T
from tttc.ir.scalars import Formula

Vector = Any  # an expression of TensorIR, one number or several lanes


# Elementwise operations are methods of `Functions`; all others of `ExprLowering` (tvm_common/lowering.py), unless a
# statement of its own makes them (codegen.py, matmul.py, recurrences.py).
ALIKE = (
    *("add", "sub", "mul", "div", "neg", "exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf", "sign", "step"),
    *("relu", "sigmoid", "softplus", "silu", "gelu", "huber", "less_equal", "select"),
)
ROWS = {
    **{name: name for name in ALIKE},
    **methods("leaf", "const", "size", "rename", "last", "cumprod", "segprod", "shift", "shift_back", "solve"),
    "abs": "abs_",
    "pow": "pow_",
    "map": "formula",
    "contract": "products",
    **dict.fromkeys(("broadcast", "stop_gradient"), "_operand"),
    **dict.fromkeys(("mask", "put_last"), "_masked"),
    **dict.fromkeys(("sum", "mean", "max"), "_row"),
}


class Format:
    """The numbers of one dtype as IEEE 754 stores them, and how far the series go that are exact for it."""

    def __init__(self, dtype: str) -> None:
        self.double = dtype == "float64"
        self.integer = "int64" if self.double else "int32"
        self.fraction, self.bias = (52, 1023) if self.double else (23, 127)
        self.lowest, self.highest = (-708.0, 709.0) if self.double else (-87.0, 88.0)
        self.log2_high, self.log2_low = (
            (0.693147180369123816490, 1.90821492927058770002e-10) if self.double else (0.693359375, -2.12194440e-4)
        )
        self.exp_terms = 13 if self.double else 7  # 0.35**(n + 1) / (n + 1)! is below half a unit
        self.log_terms = 11 if self.double else 5  # 0.172**(2 * n) / (2 * n + 1)
        self.log1p_terms = 17 if self.double else 8  # 3**(-2 * n) / (2 * n + 1)


class Functions:
    """Elementwise functions on vectors of one dtype and length; `let` gives a value a name, so that it is made once."""

    def __init__(self, dtype: str, lanes: int, let: Callable[[Vector], Vector]) -> None:
        self.dtype, self.lanes, self.let = dtype, lanes, let
        self.format = Format(dtype)

    def const(self, value: float) -> Vector:
        return self.wide(getattr(T, self.dtype)(float(value)), self.dtype)

    def wide(self, x: Vector, dtype: str) -> Vector:
        return x if self.lanes == 1 else T.broadcast(x, self.lanes)

    def _type(self, dtype: str) -> str:
        return dtype if self.lanes == 1 else f"{dtype}x{self.lanes}"

    def _integer(self, value: int) -> Vector:
        return self.wide(getattr(T, self.format.integer)(value), self.format.integer)

    def _series(self, x: Vector, coefficients: Sequence[float]) -> Vector:
        """The polynomial with these coefficients, the constant one first."""
        result = self.const(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.let(result * x + self.const(c))
        return result

    def __getitem__(self, name: str) -> Callable[..., Vector]:
        found: Callable[..., Vector] = getattr(self, ROWS[name])
        return found

    # -- arithmetic

    def add(self, x: Vector, y: Vector) -> Vector:
        return x + y

    def sub(self, x: Vector, y: Vector) -> Vector:
        return x - y

    def mul(self, x: Vector, y: Vector) -> Vector:
        return x * y

    def div(self, x: Vector, y: Vector) -> Vector:
        return x / y

    def neg(self, x: Vector) -> Vector:
        return self.const(-1.0) * x

    def pow_(self, x: Vector, n: float) -> Vector:
        if n == int(n):
            return self._whole_power(x, int(n))
        if n * 2 == int(n * 2) and abs(n) <= 64:
            root = self.let(self.sqrt(x))
            return self._whole_power(root, int(n * 2))
        return self.exp(self.const(n) * self.log(x))

    def _whole_power(self, x: Vector, n: int) -> Vector:
        if n < 0:
            return self.const(1.0) / self._whole_power(x, -n)
        result, square = None, self.let(x)
        while n:
            if n & 1:
                result = square if result is None else self.let(result * square)
            n >>= 1
            square = self.let(square * square) if n else square
        return self.const(1.0) if result is None else result

    def sqrt(self, x: Vector) -> Vector:
        return T.sqrt(x)

    def rsqrt(self, x: Vector) -> Vector:
        return self.const(1.0) / T.sqrt(x)

    # -- exponentials

    def _power_of_two(self, x: Vector) -> tuple[Vector, Vector]:
        """s = 2**n and q with exp(x) = s * q + s, where |log(q + 1)| <= log(2) / 2: q is exact however small it is."""
        f = self.format
        x = self.let(T.max(self.const(f.lowest), T.min(self.const(f.highest), x)))
        n = self.let(T.floor(x * self.const(1 / math.log(2)) + self.const(0.5)))
        r = self.let((x - n * self.const(f.log2_high)) - n * self.const(f.log2_low))
        q = r * self._series(r, [1 / math.factorial(k) for k in range(1, f.exp_terms + 1)])
        exponent = T.Cast(self._type(f.integer), n) + self._integer(f.bias)
        s = T.reinterpret(self._type(self.dtype), T.shift_left(exponent, self._integer(f.fraction)))
        return self.let(s), self.let(q)

    def exp(self, x: Vector) -> Vector:
        x = self.let(x)
        s, q = self._power_of_two(x)
        y = T.Select(x > self.const(self.format.highest), self.const(math.inf), s * q + s)
        return T.Select(x < self.const(self.format.lowest), self.const(0.0), y)

    def tanh(self, x: Vector) -> Vector:
        """expm1(2 x) / (expm1(2 x) + 2), which is 1 beyond 20."""
        near = self.let(T.max(self.const(-20.0), T.min(self.const(20.0), x)))
        s, q = self._power_of_two(self.const(2.0) * near)
        m = self.let(s * q + (s - self.const(1.0)))
        return m / (m + self.const(2.0))

    def sigmoid(self, x: Vector) -> Vector:
        return self.const(1.0) / (self.const(1.0) + self.exp(self.neg(x)))

    def softplus(self, x: Vector) -> Vector:
        """max(x, 0) + log(1 + e) for e = exp(-|x|); the logarithm is 2 artanh(e / (2 + e))."""
        x = self.let(x)
        e = self.let(self.exp(self.neg(self.abs_(x))))
        z = self.let(e / (self.const(2.0) + e))
        terms = self._series(self.let(z * z), [2 / (2 * k + 1) for k in range(self.format.log1p_terms + 1)])
        return self.relu(x) + z * terms

    def log(self, x: Vector) -> Vector:
        """n log(2) + 2 artanh((m - 1) / (m + 1)) for x = m * 2**n with m between sqrt(1/2) and sqrt(2)."""
        f, x = self.format, self.let(x)
        bits = self.let(T.reinterpret(self._type(f.integer), x))
        offset = self._integer(int(math.sqrt(0.5) * 2**f.fraction) - 2 ** (f.fraction - 1) << 1)
        n = self.let(T.shift_right(bits - offset, self._integer(f.fraction)) - self._integer(f.bias - 1))
        m = self.let(T.reinterpret(self._type(self.dtype), bits - T.shift_left(n, self._integer(f.fraction))))
        z = self.let((m - self.const(1.0)) / (m + self.const(1.0)))
        terms = self._series(self.let(z * z), [2 / (2 * k + 1) for k in range(f.log_terms + 1)])
        n = self.let(T.Cast(self._type(self.dtype), n))
        y = self.let(n * self.const(f.log2_high) + (n * self.const(f.log2_low) + z * terms))
        y = T.Select(x < self.const(math.inf), y, x)  # infinity, and NaN
        y = T.Select(x < self.const(0.0), self.const(math.nan), y)
        return T.Select(T.EQ(x, self.const(0.0)), self.const(-math.inf), y)

    # -- others

    def abs_(self, x: Vector) -> Vector:
        return T.abs(x)

    def relu(self, x: Vector) -> Vector:
        return T.max(self.const(0.0), x)

    def sign(self, x: Vector) -> Vector:
        x = self.let(x)
        return self.step(x) - self.step(self.neg(x))

    def step(self, x: Vector) -> Vector:
        return T.Select(x > self.const(0.0), self.const(1.0), self.const(0.0))

    def less_equal(self, x: Vector, y: Vector) -> Vector:
        return T.Select(x <= y, self.const(1.0), self.const(0.0))

    def select(self, condition: Vector, x: Vector, y: Vector) -> Vector:
        return T.Select(condition > self.const(0.5), x, y)

    def huber(self, x: Vector, delta: Vector) -> Vector:
        x, delta = self.let(x), self.let(delta)
        a = self.let(self.abs_(x))
        half = self.const(0.5)
        return T.Select(a <= delta, half * x * x, delta * (a - half * delta))

    def silu(self, x: Vector) -> Vector:
        x = self.let(x)
        return x * self.sigmoid(x)

    def gelu(self, x: Vector) -> Vector:
        x = self.let(x)
        doubled = self.const(2 * math.sqrt(2 / math.pi)) * (x + self.const(0.044715) * (x * x * x))
        return x * self.sigmoid(self.let(doubled))  # (1 + tanh(u)) / 2, without the difference far left

    def sin(self, x: Vector) -> Vector:
        return self._lane_by_lane(T.sin, x)

    def cos(self, x: Vector) -> Vector:
        return self._lane_by_lane(T.cos, x)

    def erf(self, x: Vector) -> Vector:
        name = "erf" if self.format.double else "erff"
        return self._lane_by_lane(lambda e: T.call_pure_extern(self.dtype, name, e), x)

    def _lane_by_lane(self, function: Callable[[Vector], Vector], x: Vector) -> Vector:
        if self.lanes == 1:
            return function(x)
        x = self.let(x)
        return T.Shuffle([function(T.Shuffle([x], [i])) for i in range(self.lanes)], list(range(self.lanes)))

    # -- formulas

    def formula(self, formula: Formula, *values: Vector) -> Vector:
        """A SymPy formula; what it repeats is computed once."""
        known: dict[sympy.Expr, Vector] = dict(zip(formula.symbols, (self.let(v) for v in values), strict=True))
        shared, (body,) = sympy.cse([formula.body])
        for symbol, value in shared:
            known[symbol] = self.let(self._formula(value, known))
        return self._formula(body, known)

    def _formula(self, e: sympy.Expr, known: dict[sympy.Expr, Vector]) -> Vector:
        if e in known:
            return known[e]
        if e.is_number:
            return self.const(float(e))
        values = [self._formula(a, known) for a in e.args[: 1 if e.is_Pow else None]]
        if e.is_Pow and e.exp.is_number:
            return self.pow_(self.let(values[0]), float(e.exp))
        if e.is_Add or e.is_Mul:
            result = values[0]
            for v in values[1:]:
                result = result + v if e.is_Add else result * v
            return result
        return self[type(e).__name__](*values)
