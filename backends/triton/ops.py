"""How each operation of the IR is written in Triton, and as functions what Triton lacks."""

from __future__ import annotations

import sympy

from tttc.backends.rows import INFIX, PRINTED, calls
from tttc.ir.formulas import FormulaPrinter

ELEMENTWISE = {
    **calls("tl.", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "abs", "sigmoid"),
    **calls("", "tanh", "sign", "relu", "softplus", "silu", "gelu", "step", "less_equal", "select", "huber"),
}

# Methods of the printer (printer.py).
STRUCTURE = {
    **PRINTED,
    "contract": "_contraction",
    "rename": "rename",
    **dict.fromkeys(("sum", "mean", "max"), "_reduction"),
}

ROWS = {**INFIX, **ELEMENTWISE, **STRUCTURE}

# In an order in which each uses only those before it; a NaN stays a NaN.
HELPERS = {
    "dot": '''
@triton.jit
def dot(x, y, operand: tl.constexpr):
    """A product of matrices: factors of the dtype `operand`, the sum in float32."""
    return tl.dot(x.to(operand), y.to(operand), input_precision="ieee")
''',
    "pow": '''
@triton.jit
def power(x, n: tl.constexpr):
    """x ** n for a whole n > 0."""
    y = x
    for _ in tl.static_range(n - 1):
        y *= x
    return y
''',
    "tanh": """
@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -y, y)
""",
    "sign": """
@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, 0.0) - tl.where(x < 0.0, 1.0, 0.0)
""",
    "relu": """
@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)
""",
    "softplus": '''
@triton.jit
def softplus(x):
    """log(1 + exp(x)), which overflows nowhere."""
    return tl.where(x < 0.0, 0.0, x) + tl.log(1.0 + tl.exp(-tl.abs(x)))
''',
    "silu": """
@triton.jit
def silu(x):
    return x * tl.sigmoid(x)
""",
    "gelu": '''
@triton.jit
def gelu(x):
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))
''',
    "step": """
@triton.jit
def step(x):
    return tl.where(x > 0.0, 1.0, 0.0)
""",
    "less_equal": '''
@triton.jit
def less_equal(x, y):
    """1 where x <= y, else 0."""
    return tl.where(x <= y, 1.0, 0.0)
''',
    "select": '''
@triton.jit
def select(condition, x, y):
    """x where the condition is 1, y where it is 0."""
    return tl.where(condition > 0.5, x, y)
''',
    "huber": '''
@triton.jit
def huber(x, delta):
    """x**2 / 2 where |x| <= delta, otherwise delta * (|x| - delta / 2)."""
    return tl.where(tl.abs(x) <= delta, 0.5 * x * x, delta * (tl.abs(x) - 0.5 * delta))
''',
    "solve_rows": '''
@triton.jit
def solve_rows(matrix, x, t, upper: tl.constexpr, block: tl.constexpr):
    """x[:, i] -= sum over j < i of matrix[j, i] * x[:, j], token by token; j > i, from the last one, if `upper`. A row
    of x has entries in one block of tokens alone, and so all blocks are done at once.
    """
    first = t // block * block if block < x.shape[1] else 0  # of the block of each token
    for n in range(1, block):
        i = first + (block - 1 - n if upper else n)
        here = t[None, :] == (i[:, None] if block < x.shape[1] else i)
        column = tl.sum(tl.where(here, matrix, 0.0), 1)
        column = tl.where(t > i if upper else t < i, column, 0.0)
        x = tl.where(here, x - tl.sum(x * column[None, :], 1)[:, None], x)
    return x
''',
    "solve": '''
@triton.jit
def solve_lower(matrix, x, t, operand: tl.constexpr, upper: tl.constexpr):
    """y with y (1 + m) = x, where m is what `matrix` has above its diagonal, or below it if `upper`.

    Of more tokens than 16, the inverses of diagonal blocks of 16, then those of twice as many, of which b links two:
    [[a, b], [0, c]]^-1 = [[a^-1, -a^-1 b c^-1], [0, c^-1]].
    """
    C: tl.constexpr = x.shape[1]
    if C <= 16 or x.shape[0] < 16:
        return solve_rows(matrix, x, t, upper, C)
    first, second = (t[None, :], t[:, None]) if upper else (t[:, None], t[None, :])
    inverse = solve_rows(matrix, tl.where(first == second, 1.0, 0.0), t, upper, 16)
    for n in tl.static_range(4, 7):
        if 1 << n < C:
            b = tl.where(((first >> n) % 2 == 0) & (second >> n == (first >> n) + 1), matrix, 0.0)
            inverse -= dot(dot(inverse, b, operand), inverse, operand)
    return x + dot(x, tl.where(first == second, 0.0, inverse), operand)  # x itself is not rounded
''',
}


class TritonFormulas(FormulaPrinter):
    """A SymPy formula as Triton text."""

    def _print_Function(self, expr: sympy.Function) -> str:
        return ROWS[type(expr).__name__].format(*(self._print(a) for a in expr.args))

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        return power(self._print(expr.base), float(expr.exp))


def formula(body: sympy.Expr) -> str:
    """The text of a formula; numbers are decimal."""
    return str(TritonFormulas().doprint(body.evalf(17) if body.is_number else body))


def power(x: str, n: float) -> str:
    """x ** n: as a product, by way of a root, or of a logarithm."""
    if n in (0.5, -0.5):
        return f"tl.{'sqrt' if n > 0 else 'rsqrt'}({x})"
    if n == int(n) and 0 < abs(n) <= 16:
        product = f"power({x}, {abs(int(n))})"
        return product if n > 0 else f"(1.0 / {product})"
    if n == int(n):  # also of a negative number
        product = f"tl.exp({n!r} * tl.log(tl.abs({x})))"
        return product if n % 2 == 0 else f"(sign({x}) * {product})"
    return f"tl.exp({n!r} * tl.log({x}))"
