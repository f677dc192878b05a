"""One table of formulas: what `tttc.elementwise` accepts is the same on tensors, in programs and in kernels, and its
derivatives too; what it does not accept is refused where it is written.
"""

from __future__ import annotations

import functools
import math

import mpmath
import numpy as np
import pytest
import sympy
import torch

import tttc
from tests.helpers import evaluate_function, inputs_for, keywords
from tttc.backends.torch.ops import function_of
from tttc.errors import TTTCError
from tttc.ir import build as b
from tttc.ir.expr import Expr, leaf
from tttc.ir.formulas import FUNCTIONS, adopt, formula_of
from tttc.ir.latex import formula_latex
from tttc.ir.program import Assign, Block, Function

x, y = sympy.symbols("x y")

FORMULAS = {
    "a root of a number": x * sympy.sqrt(2),
    "exact GELU": x * (1 + sympy.erf(x / sympy.sqrt(2))) / 2,
    "leaky ReLU": sympy.Max(x, x / 10),
    "ReLU6": sympy.Min(sympy.Max(x, 0), 6),
    "three values": sympy.Max(x, 1 - x, x**2 / 4),
    "ReLU by a step": x * sympy.Heaviside(x),
    "logarithm to a base": sympy.log(x**2 + 2, 2),
    "root of the third": (x**2 + 1) ** sympy.Rational(1, 3),
    "three halves": (x**2 + 1) ** sympy.Rational(3, 2),
    "one over a root": 1 / sympy.sqrt(x**2 + 1),
    "negative powers": (x**2 + 1) ** -3,
    "a high power": (x / 3) ** 11,
    "power by a value": (x**2 + 1) ** (x / 3),
    "power of a number": sympy.Integer(2) ** x,
    "power of a fraction": sympy.Rational(1, 3) ** x + sympy.pi**x + sympy.E**x,
    "absolute value": sympy.Abs(x - sympy.Rational(1, 3)) + sympy.sign(x),
    "cases": sympy.Piecewise((x**2, x < 0), (sympy.sin(x), x <= 1), (x, True)),
    "cases with two conditions": sympy.Piecewise((x, (x > -1) & (x < 1)), (sympy.sign(x), True)),
    "cases with one of two": sympy.Piecewise((x**2, (x < -1) | (x >= 1)), (1, True)),
    "cases that are not": sympy.Piecewise((2 * x, sympy.Ne(x, 0)), (7, True)),
    "constants": sympy.pi * x + sympy.E * x**2 - sympy.GoldenRatio + sympy.Rational(1, 7),
    "a large number": sympy.Integer(10) ** 30 * x,
    "a decimal of many digits": sympy.Float(1 / 3) * x,
    "trigonometric": sympy.sin(x) + sympy.cos(x) + sympy.tan(x / 2) + sympy.sec(x / 3),
    "cotangent and cosecant": sympy.cot(x / 4 + 2) + sympy.csc(x / 4 + 2),
    "hyperbolic": sympy.sinh(x) + sympy.cosh(x) + sympy.tanh(x) + sympy.sech(x),
    "hyperbolic below": sympy.coth(x**2 + 1) + sympy.csch(x**2 + 1),
    "error functions": sympy.erf(x) + sympy.erfc(x),
    "sigmoid by its name": sympy.Function("sigmoid")(x) * x,
}
POINTS = [-2.5, -1.0, -0.3, 1e-9, 0.4, 1.0, 2.25]
SMOOTH = [-2.3, -0.31, 0.41, 1.7]  # where no formula has a kink
every_formula = pytest.mark.parametrize("name", FORMULAS)


def true_value(formula, at, derivative=0):
    """From SymPy's own formula, to 40 digits."""
    formula = formula.replace(sympy.Function("sigmoid"), lambda a: 1 / (1 + sympy.exp(-a)))
    function = sympy.lambdify(
        x, formula, modules=[{"Heaviside": lambda a, h=0.5: 1.0 if a > 0 else 0.0 if a < 0 else h}, "mpmath"]
    )
    with mpmath.workdps(40):
        exact = mpmath.mpf(at)
        return float(
            mpmath.re(
                mpmath.diff(function, exact, derivative, h=mpmath.mpf(10) ** -12) if derivative else function(exact)
            )
        )


@every_formula
def test_a_formula_on_tensors_is_what_sympy_says(name):
    """1e-14: a few roundings; where terms cancel, relative to the largest of them."""
    found = tttc.elementwise(FORMULAS[name])(torch.tensor(POINTS, dtype=torch.float64))
    wanted = [true_value(FORMULAS[name], p) for p in POINTS]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=3e-14, atol=1e-15)


@every_formula
def test_a_formula_is_differentiable_twice_on_tensors_and_in_programs(name):
    """The derivatives on tensors are those of autograd, in programs those of SymPy: both are the true ones."""
    formula = formula_of(FORMULAS[name], [x])
    at = torch.tensor(SMOOTH, dtype=torch.float64, requires_grad=True)
    value = tttc.elementwise(FORMULAS[name])(at)
    node = Expr("map", (leaf("a", "param"),), formula)
    for order in (1, 2):
        value = torch.autograd.grad(value.sum(), at, create_graph=True)[0] if value.requires_grad else 0 * at.detach()
        node = derivative(node)
        wanted = [true_value(FORMULAS[name], p, order) for p in SMOOTH]
        np.testing.assert_allclose(value.detach().numpy(force=True), wanted, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose([evaluated(node, p) for p in SMOOTH], wanted, rtol=1e-9, atol=1e-9)
        if node.op == "map":
            text = function_of(node.arg)
            np.testing.assert_allclose(text(at).detach().numpy(), wanted, rtol=1e-9, atol=1e-9)
            assert formula_latex(node.arg)


def derivative(e):
    """By the leaf `a`, through the nodes that stand for a derivative."""
    from tttc.ir.differentiate import vjp
    from tttc.ir.expr import const, leaves

    found = leaves([e])
    if not found:
        return const(0)
    (g,), _ = vjp([(e, const(1))], found)
    return const(0) if g is None else g


def evaluated(e, at):
    function = Function("f", (leaf("a", "param"),), (Block((Assign(leaf("z", "output"), e),)),), (leaf("z", "output"),))
    return float(evaluate_function(function, {}, {"a": np.float64(at)})[0])


def test_steps_and_cases_have_the_value_that_is_written_where_they_jump():
    at = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    for formula, wanted in (
        (sympy.Heaviside(x), [0.0, 0.5, 1.0]),
        (sympy.Heaviside(x, 0), [0.0, 0.0, 1.0]),
        (sympy.Heaviside(x, 1), [0.0, 1.0, 1.0]),
        (sympy.Piecewise((5, x < 0), (6, True)), [5.0, 6.0, 6.0]),
        (sympy.Piecewise((5, x <= 0), (6, True)), [5.0, 5.0, 6.0]),
        (sympy.Piecewise((5, sympy.Eq(x, 0)), (6, True)), [6.0, 5.0, 6.0]),
    ):
        assert tttc.elementwise(formula + 0 * x)(at).tolist() == wanted


def test_nan_stays_nan_beside_a_number():
    at = torch.tensor([math.nan], dtype=torch.float64)
    for formula in (sympy.Max(x, 0), sympy.Max(x, 2), sympy.Min(x, 2), sympy.Max(2, sympy.Min(x, 5))):
        assert torch.isnan(tttc.elementwise(formula)(at)).all()


def test_any_symbol_is_a_name():
    """Names that a generated function would use itself, and words of Python."""
    names = ("torch", "lambda", "F", "u0", "exp", "less_equal")
    total = functools.reduce(lambda a, c: a + c, [sympy.Symbol(n) * (i + 1) for i, n in enumerate(sorted(names))])
    found = tttc.elementwise(total)(*(torch.tensor(float(i)) for i in range(6)))
    assert found.item() == sum(i * (i + 1) for i in range(6))


def test_operands_go_by_the_order_of_the_alphabet_whatever_they_are_renamed_to():
    a, q = sympy.symbols("y a")
    assert tttc.elementwise(a - 2 * q)(torch.tensor(5.0), torch.tensor(1.0)).item() == 1.0 - 10.0


def test_a_formula_takes_numbers_beside_values():
    gated = tttc.elementwise(sympy.Piecewise((x * sympy.exp(y), y > 0), (x / 2, True)) * sympy.log(y + 3))

    class Numbers(tttc.Variant):
        mini_batch = 4
        W = tttc.state("D", "D")

        def learner(self, k):
            return gated(k @ self.W, 0.5) * gated(tttc.sum(k), np.float32(0.25))

        def loss(self, k, v):
            return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

        update = tttc.sgd(lr=0.1)

    assert tttc.verify(Numbers, {"D": 3}, tokens=5, backend="torch").ok


# -- kernels -----------------------------------------------------------------------------------------------------------


class Formulas(tttc.Variant):
    """A loss with every formula in it."""

    mini_batch = 4
    W = tttc.state("D", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        y = self.learner(k)
        total = 0.5 * tttc.sum((y - v) ** 2)
        for name, formula in FORMULAS.items():
            if name != "a large number":  # in float32, beside which no other has digits
                total = total + 0.01 * tttc.sum(tttc.elementwise(formula)(y))
        return total

    update = tttc.sgd(lr=tttc.gate("lr", scale=0.1))


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("torch", torch.float64, 1e-11),
        ("tvm", torch.float64, 1e-10),
        ("triton", torch.float32, 2e-4),
    ],
)
def test_kernels_have_every_formula(backend, dtype, tolerance):
    """float32: tan and powers are steep, and each formula is a few roundings."""
    if backend != "torch":
        pytest.importorskip(backend)
    exact = tttc.compile(Formulas, {"D": 4}, torch.float64, backend="torch")
    layer = tttc.compile(Formulas, {"D": 4}, dtype, backend=backend)
    inputs = inputs_for(exact, 6)
    found = gradient(layer, inputs, dtype)
    from tttc.reference import reference

    wanted = gradient(lambda *a, **s: reference(Formulas, *a, **s), inputs, torch.float64)
    for name in wanted:
        assert (found[name].double() - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


def gradient(layer, inputs, dtype):
    named = {n: t.detach().to(dtype).requires_grad_() for n, t in inputs.named().items()}
    given = {kind: {n: named[n] for n in group} for kind, group in keywords(inputs).items()}
    z, state = layer(named["q"], named["k"], named["v"], **given)
    (g,) = torch.autograd.grad(z.square().sum() + state["W"].sum(), [named["k"]])
    return {"z": z.detach(), "W": state["W"].detach(), "dk": g}


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = {
    "gamma": sympy.gamma(x),
    "loggamma": sympy.loggamma(x),
    "atan2": sympy.atan2(x, y),
    "asinh": sympy.asinh(x),
    "floor": sympy.floor(x),
    "ceiling": sympy.ceiling(x),
    "Mod": sympy.Mod(x, 2),
    "an unknown function": sympy.Function("mine")(x),
    "an integral": sympy.Integral(sympy.exp(-(x**2)), (x, 0, x)),
    "an imaginary number": sympy.I * x,
    "an infinite number": x + sympy.Piecewise((sympy.oo, x > 0), (0, True)),
    "a division by zero": x * sympy.zoo,
    "cases without the last": sympy.Piecewise((x, x > 0)),
    "text": "x +",
    "text that SymPy would run": "__import__('sys').exit(3)",
    "a function of torch": torch.tanh,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused_where_it_is_written(name):
    with pytest.raises(TTTCError) as caught:
        tttc.elementwise(REFUSED[name])
    text = str(caught.value)
    assert "tttc.elementwise(REFUSED[name])" in text
    if name in ("gamma", "atan2", "floor", "Mod"):
        assert "has no elementwise form here; use one of" in text
        assert "erf" in text


def test_every_function_of_the_table_has_a_formula_here():
    """A function without one would be tested nowhere."""
    met = {
        f.func.__name__ for formula in FORMULAS.values() for f in formula.atoms(sympy.Function, sympy.Max, sympy.Min)
    }
    assert set(FUNCTIONS) <= met


# -- numbers that are infinite or none ---------------------------------------------------------------------------------


def infinite(divisor):
    class Infinite(tttc.Variant):
        mini_batch = 4
        W = tttc.state("D", "D", init=tttc.normal(0.5))

        def learner(self, x):
            return x @ self.W

        def loss(self, k, v):
            return tttc.sum((self.learner(k) - v) ** 2) / divisor(k)

        update = tttc.sgd(lr=tttc.gate("lr", scale=0.1))

    return Infinite


DIVISORS = {
    "a size of one": lambda k: tttc.size(k) - 4.0,
    "infinity": lambda k: math.inf,
    "nan": lambda k: math.nan,
    "zero over zero": lambda k: tttc.where(tttc.sum(k) > 0, 0.0, 0.0),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, on which Triton is interpreted
@pytest.mark.parametrize("name", DIVISORS)
@pytest.mark.parametrize("backend", ["torch", "tvm", "triton"])
def test_numbers_that_are_none_are_those_of_floating_point(name, backend):
    from tttc.reference import reference

    if backend != "torch":
        pytest.importorskip(backend)
    variant = infinite(DIVISORS[name])
    layer = tttc.compile(variant, {"D": 4}, torch.float32, backend=backend)
    inputs = inputs_for(tttc.compile(variant, {"D": 4}, torch.float64, backend="torch"), 6)
    found = gradient(layer, inputs, torch.float32)
    wanted = gradient(lambda *a, **s: reference(variant, *a, **s), inputs, torch.float64)
    assert torch.isfinite(found["W"]).any() == torch.isfinite(wanted["W"]).any()
    assert layer.stages["simplify"].text
    assert layer.explain(latex=True)


def test_a_program_of_numbers_that_are_none_runs_on_numpy():
    layer = tttc.compile(infinite(DIVISORS["a size of one"]), {"D": 4}, torch.float64, backend="torch")
    for entry in list(layer.stages)[:3]:
        scope: dict = {}
        exec(entry.text, scope)
    assert "inf" in layer.stages["simplify"].text
    assert adopt(x) == x
    assert b.const(math.nan) is b.const(math.nan)
