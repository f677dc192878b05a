"""The op table, row by row: meaning, adjoint, lowering, dependence and printed text.

Every row of `OPS` must have an example in `EXAMPLES`, and every elementwise row a meaning in `TORCH` and `TRUE`: an
operation without them fails here.
"""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F

from tests.helpers import evaluate_function
from tttc.ir import build as b
from tttc.ir.differentiate import lower_composites, vjp
from tttc.ir.expr import OPS, Axis, Expr, const, leaf, leaves
from tttc.ir.formulas import adopt
from tttc.ir.linearity import Dependence, dependence
from tttc.ir.names import own
from tttc.ir.ops import align, evaluate
from tttc.ir.program import Assign, Block, Function, Program
from tttc.ir.program_text import program_text
from tttc.ir.scalars import SCALARS, Formula, numpy_names

SIZES = {"D": 3, "E": 4, "P": 5}
D, E = Axis("D", "D"), Axis("E", "E")
T, S = (Axis(own(name), "P") for name in "ts")  # token axes, with a size that does not depend on a chunk
DIFFERENTIATED = [name for name, op in OPS.items() if op.adjoint is not None or op.lower is not None]


def operand(i: int, *axes: Axis) -> Expr:
    return leaf(f"x{i}", "param", axes)


x, y, row, M, tall = operand(0, D), operand(1, D), operand(2, E), operand(3, D, E), operand(4, T, D)
square = operand(5, T, S)
a, c = sympy.symbols("x y", real=True)
swish = Formula("swish2", (a, c), adopt(a * c / (1 + sympy.exp(-a))))


def elementwise(name: str) -> list[Expr]:
    """A row on operands of the same axes, and, with several operands, on operands that broadcast."""
    arity = SCALARS[name].arity
    same = [operand(i, D) for i in range(arity)]
    if arity == 1:
        return [b.apply(name, *same)]
    return [
        b.apply(name, *same),
        b.apply(name, operand(0, D, E), operand(1, D), *same[2:]),
        b.apply(name, operand(0), operand(1, E), *(operand(i, D, E) for i in range(2, arity))),
    ]


EXAMPLES: dict[str, list[Expr]] = {name: elementwise(name) for name in SCALARS} | {
    "leaf": [x, tall, operand(6)],
    "const": [const(2.5), const(-1e-7), const(3)],
    "size": [b.size(D), b.mul(x, b.size(E))],
    "map": [Expr("map", (x, y), swish), Expr("map", (M, row), swish), Expr("map", (row, M), swish)],
    "pow": [b.power(x, n) for n in (1, 2, 3, -1, 0.5, -1.5)],
    "contract": [
        b.contract((x, M), (D,)),
        b.contract((M, row), (E,)),
        b.contract((x, row), ()),
        b.contract((x, y), (D,)),
        b.contract((x, y), ()),
        b.contract((M, operand(6, D, E)), (D, E)),
        b.contract((M, operand(6, D, E)), (E,)),
        b.contract((tall, operand(6, S, D)), (D,)),
        Expr("contract", (x, M, row), (D, E)),
        b.contract((x, row), (D,)),
        b.contract((operand(6, D, E, T), x), (D,)),
    ],
    "sum": [b.total(x, (D,)), b.total(M, (D,)), b.total(M, (D, E)), b.total(operand(6, D, E, T), (D, T))],
    "mean": [b.mean(x, (D,)), b.mean(M, (E,)), b.mean(M, (D, E))],
    "max": [b.maximum(x, (D,)), b.maximum(M, (E,)), b.maximum(M, (D, E))],
    "mask": [
        b.mask(square, T, S),
        b.mask(square, T, S, strict=True),
        b.mask(square, S, T),
        b.mask(operand(6, D, T, S), T, S, strict=True),
        b.mask(operand(6, T, S, D), T, S),
        b.mask(operand(6, T, D, S), T, S),
        b.mask(operand(6, S, D, T), T, S, strict=True),
        b.mask(operand(6, T), T, S),
    ],
    "last": [b.last(tall, T), b.last(operand(6, D, T), T)],
    "put_last": [b.put_last(x, T), b.put_last(M, T), b.put_last(operand(6), T)],
    "broadcast": [
        b.broadcast(x, (T, D)),
        b.broadcast(const(2), (D, E)),
        b.broadcast(x, (D, E)),
        b.broadcast(const(0), (D,)),
    ],
    "rename": [Expr("rename", (b.mul(tall, const(2)),), ((T, S),)), b.rename(b.neg(square), {T: S, S: T})],
    "segprod": [b.segprod(operand(6, T), T, S), b.segprod(operand(6, D, T), T, S), b.segprod(operand(6, S), S, T)],
    "cumprod": [b.cumprod(operand(6, T), T), b.cumprod(operand(6, D, T), T)],
    "shift": [b.shift(tall, T), b.shift(operand(6, D, T), T, 1.0), b.shift(square, S, 2.0)],
    "shift_back": [b.shift_back(tall, T), b.shift_back(operand(6, D, T), T)],
    "solve": [
        b.solve(square, tall, T, S),
        b.solve(square, operand(6, S, D), S, T),
        b.solve(square, operand(6, D, T, E), T, S),
        b.solve(operand(6, T, S, D), operand(7, T, D), T, S),
        b.solve(operand(6, T, S, D), operand(7, E, S, D), S, T),
        b.solve(square, operand(6, D), T, S),
    ],
    "stop_gradient": [b.stop_gradient(x), b.mul(x, b.stop_gradient(x))],
    "layer_norm": [
        Expr("layer_norm", (x, y, operand(6, D)), (D, 1e-6)),
        Expr("layer_norm", (tall, x, y), (D, 0.1)),
        Expr("layer_norm", (M, x, y), (D, 0.1)),
    ],
    "rms_norm": [
        Expr("rms_norm", (x, y), (D, 1e-6)),
        Expr("rms_norm", (tall, x), (D, 0.1)),
        Expr("rms_norm", (M, x), (D, 0.1)),
    ],
    "l2_norm": [Expr("l2_norm", (x,), (D, 1e-6)), Expr("l2_norm", (M,), (D, 0.1)), Expr("l2_norm", (M,), (E, 0.1))],
    "softmax": [Expr("softmax", (x,), (D,)), Expr("softmax", (M,), (E,)), Expr("softmax", (M,), (D,))],
}


def test_every_row_has_examples():
    """An operation without one is an operation without a check of its meaning, its adjoint and its text."""
    assert set(EXAMPLES) == set(OPS)
    assert all(any(n.op == name for n in nodes(e)) for name, es in EXAMPLES.items() for e in es)
    assert set(TORCH) == set(SCALARS)
    assert set(TRUE) == set(SCALARS)


def test_every_row_is_differentiated_or_a_leaf():
    assert set(OPS) - set(DIFFERENTIATED) == {"leaf"}


def nodes(e: Expr) -> list[Expr]:
    from tttc.ir.expr import postorder

    return postorder([e])


def by_axis() -> dict[str, int]:
    return {a.name: SIZES[a.size] for a in (D, E, T, S)} | {own("r"): SIZES["P"]}


def drawn(e: Expr, name: str, seed: int = 0) -> dict[Expr, np.ndarray]:
    """Operands from the domain of the row; of (0.1, 2) where powers and norms need it."""
    low, high = SCALARS[name].domain if name in SCALARS else (0.1, 2.0)
    result = {}
    for i, node in enumerate(leaves([e])):
        generator = np.random.default_rng([seed, i])
        result[node] = generator.uniform(low, high, [SIZES[a.size] for a in node.axes])
    return result


def value_of(e: Expr, known) -> np.ndarray:
    """The value, with every axis at its full length; a leaf under other axis names is the same variable."""
    variables = {node.variable: value for node, value in known.items()}
    values = {node: variables[node.variable] for node in leaves([e])}
    return np.broadcast_to(evaluate(e, values, by_axis()), [SIZES[a.size] for a in e.axes])


cases = [(name, i) for name, examples in EXAMPLES.items() for i in range(len(examples))]
every_example = pytest.mark.parametrize(("name", "index"), cases, ids=[f"{n}-{i}" for n, i in cases])


# -- adjoints -----------------------------------------------------------------------------------------------


@every_example
def test_adjoint_against_central_differences(name, index):
    """J' g by the table against (f(x + h) - f(x - h)) / 2h.

    That is wrong by h**2 = 1e-10 times third derivatives, which reach a few thousand at the edges of the domains, and
    by rounding over h, 1e-11.
    """
    e = EXAMPLES[name][index]
    known = drawn(e, name)
    wrt = list(known)
    g = leaf("g", "cotangent", e.axes)
    (lowered,) = lower_composites([e], wrt)
    found, _ = vjp([(lowered, g)], wrt)
    cotangent = np.random.default_rng(1).standard_normal([SIZES[a.size] for a in e.axes])
    for node, expression in zip(wrt, found, strict=True):
        wanted = central_differences(e, known, node, cotangent)
        if expression is None:
            assert not wanted.any() or name == "stop_gradient"
            continue
        assert set(expression.axes) <= set(node.axes)
        full = b.broadcast(expression, node.axes)
        got = align(value_of(full, known | {g: cotangent}), full.axes, node.axes)
        if name == "stop_gradient":
            wanted = held(known, node, cotangent)
        assert np.linalg.norm(got - wanted) <= 1e-6 * (1 + np.linalg.norm(wanted))


def held(known, node, cotangent):
    """The derivative of x * stop_gradient(x): the second factor counts as a number."""
    return known[node] * cotangent


def central_differences(e, known, node, cotangent, h=1e-5):
    result = np.zeros_like(known[node])
    for position in np.ndindex(known[node].shape):
        values = []
        for step in (h, -h):
            moved = known[node].copy()
            moved[position] += step
            values.append(value_of(e, known | {node: moved}))
        result[position] = np.sum((values[0] - values[1]) / (2 * h) * cotangent)
    return result


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.lower])
def test_a_composite_is_differentiated_through_its_lowering(name):
    """It has no adjoint of its own, and its lowering holds no composite."""
    for e in EXAMPLES[name]:
        assert OPS[name].adjoint is None
        assert not any(OPS[n.op].lower for n in nodes(OPS[name].lower(e)))
        assert set(OPS[name].lower(e).axes) == set(e.axes)


def test_composites_against_torch():
    """1e-13: a few operations on numbers of order 1."""
    n, gamma, beta = (np.random.default_rng(i).uniform(-2, 2, s) for i, s in enumerate(((5, 3), 3, 3)))
    t = [torch.tensor(a) for a in (n, gamma, beta)]
    known = {tall: n, x: gamma, y: beta}
    pairs = {
        Expr("layer_norm", (tall, x, y), (D, 0.1)): F.layer_norm(t[0], (3,), t[1], t[2], 0.1),
        Expr("rms_norm", (tall, x), (D, 0.1)): F.rms_norm(t[0], (3,), t[1], 0.1),
        Expr("l2_norm", (tall,), (D, 0.0)): F.normalize(t[0], dim=-1),
        Expr("softmax", (tall,), (D,)): torch.softmax(t[0], -1),
    }
    for e, wanted in pairs.items():
        np.testing.assert_allclose(value_of(e, known), wanted.numpy(), rtol=1e-13, atol=1e-13)


def test_softmax_of_large_values_does_not_overflow():
    e = Expr("softmax", (x,), (D,))
    found = value_of(e, {x: np.array([1e4, 1e4, -1e4])})
    np.testing.assert_array_equal(found, [0.5, 0.5, 0.0])


# -- dependence ---------------------------------------------------------------------------------------------


@every_example
def test_dependence_against_second_differences(name, index):
    """A result that is said to be constant, linear or affine in an operand is: f(0), f(a), f(b) and f(a + b) tell."""
    e = EXAMPLES[name][index]
    known = drawn(e, name)
    for node in known:
        said = dependence(e, [node]).dependence
        if said == Dependence.NONLINEAR:
            continue
        one, two = (np.random.default_rng([7, i]).uniform(0.1, 2, known[node].shape) for i in range(2))
        with np.errstate(all="ignore"):
            at = [value_of(e, known | {node: v}) for v in (0 * one, one, two, one + two)]
        scale = 1e-12 * (1 + max(np.abs(v).max(initial=0) for v in at))
        assert np.abs(at[3] - at[1] - at[2] + at[0]).max(initial=0) <= scale
        if said == Dependence.LINEAR:
            assert np.abs(at[0]).max(initial=0) <= scale
        if said == Dependence.CONSTANT:
            assert np.abs(at[1] - at[2]).max(initial=0) == 0


# -- text ---------------------------------------------------------------------------------------------------


@every_example
def test_the_text_computes_what_the_interpreter_does(name, index):
    """To the last bits: NumPy runs the same operations, at most in another order (einsum or @)."""
    e = EXAMPLES[name][index]
    known = drawn(e, name)
    out = leaf("out", "output", e.axes)
    # The shapes of the operands give the sizes of token axes, so the text needs no chunk.
    function = Function("f", tuple(known), (Block((Assign(out, e),)),), (out,))
    program = Program("f", "test", (function,), SIZES)
    arguments = {node.name: value for node, value in known.items()}
    scope: dict[str, object] = {}
    exec(program_text(program), scope)
    found = np.asarray(scope["f"](**arguments))
    (wanted,) = evaluate_function(function, SIZES, arguments)
    assert found.shape == wanted.shape == tuple(SIZES[a.size] for a in e.axes)
    np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=1e-14)


# -- elementwise rows ---------------------------------------------------------------------------------------

TORCH = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "abs": torch.abs,
    "sign": torch.sign,
    "step": lambda a: torch.where(a > 0, torch.ones_like(a), torch.zeros_like(a)),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": lambda a: F.softplus(a, threshold=1e4),
    "silu": F.silu,
    "gelu": lambda a: F.gelu(a, approximate="tanh"),
    "huber": lambda a, delta: torch.where(a.abs() <= delta, a * a / 2, delta * (a.abs() - delta / 2)),
    "less_equal": lambda a, c: (a <= c).to(a.dtype),
    "select": lambda condition, a, c: torch.where(condition > 0.5, a, c),
}
mp = mpmath.mp.clone()
mp.dps = 60
# The function itself to 60 digits, from which mpmath takes the derivative.
TRUE = {
    "add": lambda a, c: a + c,
    "sub": lambda a, c: a - c,
    "mul": lambda a, c: a * c,
    "div": lambda a, c: a / c,
    "neg": lambda a: -a,
    "exp": mp.exp,
    "log": mp.log,
    "sqrt": mp.sqrt,
    "rsqrt": lambda a: 1 / mp.sqrt(a),
    "tanh": mp.tanh,
    "sin": mp.sin,
    "cos": mp.cos,
    "erf": mp.erf,
    "abs": abs,
    "sign": mp.sign,
    "step": lambda a: mp.mpf(a > 0),
    "relu": lambda a: max(a, mp.mpf(0)),
    "sigmoid": lambda a: 1 / (1 + mp.exp(-a)),
    "softplus": lambda a: mp.log1p(mp.exp(a)),
    "silu": lambda a: a / (1 + mp.exp(-a)),
    "gelu": lambda a: a / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (a + mp.mpf("0.044715") * a**3))),
    "huber": lambda a, d: a * a / 2 if abs(a) <= d else d * (abs(a) - d / 2),
    "less_equal": lambda a, c: mp.mpf(a <= c),
    "select": lambda condition, a, c: a if condition > 0.5 else c,
}
EXTREME = (-1e4, -80.0, 0.0, 80.0, 1e4)
# Where a function has a kink or a jump its derivative is by convention that of a flat line.
KINKS = {"abs": {0.0: 0.0}, "relu": {0.0: 0.0}, "sign": {0.0: 0.0}, "step": {0.0: 0.0}}
FLAT = {("less_equal", 0), ("less_equal", 1), ("select", 0)}  # constant but for jumps, by these operands
every_row = pytest.mark.parametrize("name", SCALARS)


@every_row
def test_a_row_means_what_torch_means(name):
    """1e-13: the two libraries round their own way, at most a few times."""
    values = [np.random.default_rng(i).uniform(*SCALARS[name].domain, 200) for i in range(SCALARS[name].arity)]
    wanted = TORCH[name](*map(torch.tensor, values)).numpy()
    np.testing.assert_allclose(SCALARS[name].numpy(*values), wanted, rtol=1e-13, atol=1e-13)


@every_row
def test_the_derivative_of_a_row_is_that_of_torch(name):
    """1e-12: the formulas differ, their conditioning on the domains does not."""
    arity = SCALARS[name].arity
    values = [np.random.default_rng(i).uniform(*SCALARS[name].domain, 200) for i in range(arity)]
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    result = TORCH[name](*tensors)
    wanted = [torch.zeros_like(t) for t in tensors]
    if result.requires_grad:
        wanted = torch.autograd.grad(result.sum(), tensors, allow_unused=True, materialize_grads=True)
    for index in range(arity):
        found = partial_value(name, index, values)
        np.testing.assert_allclose(found, wanted[index].numpy(), rtol=1e-12, atol=1e-12)


def partial_value(name, index, values):
    """The derivative by one operand, as the compiler computes it."""
    operands = [leaf(f"x{i}", "param", (D,)) for i in range(len(values))]
    e = b.broadcast(b.partial(b.apply(name, *operands), index), (D,))
    return evaluate(e, dict(zip(operands, map(np.asarray, values), strict=True)), {"D": len(values[0])})


def true_value(name, arguments):
    """The value in float64 where it is a finite real number."""
    try:
        found = TRUE[name](*map(mp.mpf, arguments))
    except (ZeroDivisionError, ValueError):
        return None
    return finite(found)


def true_derivative(name, index, arguments):
    if (name, index) in FLAT:
        return 0.0
    if len(arguments) == 1 and arguments[0] in KINKS.get(name, {}):
        return KINKS[name][arguments[0]]
    try:
        orders = tuple(int(i == index) for i in range(len(arguments)))
        return finite(mp.diff(TRUE[name], tuple(map(mp.mpf, arguments)), orders))
    except (ZeroDivisionError, ValueError):
        return None


def finite(found):
    if not isinstance(found, mp.mpf) or mp.isnan(found):
        return None
    return float(found) if abs(found) < 1e308 else None


def arguments_of(name):
    """Every combination of extreme arguments; the width of a Huber loss is positive."""
    choices = [EXTREME] * SCALARS[name].arity
    if name == "huber":
        choices = [EXTREME, (1.0, 80.0, 1e4)]
    return list(itertools.product(*choices))


@every_row
def test_extreme_arguments(name):
    """Finite and right where the truth is finite: 1e-12 of it, or 1e-12 where it is smaller than that."""
    for arguments in arguments_of(name):
        with np.errstate(all="ignore"):
            found = float(SCALARS[name].numpy(*map(np.float64, arguments)))
            derivatives = [float(partial_value(name, i, [[a] for a in arguments])[0]) for i in range(len(arguments))]
        wanted = true_value(name, arguments)
        if wanted is None:
            continue
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12), f"{name}{arguments}"
        for i, derivative in enumerate(derivatives):
            wanted = true_derivative(name, i, arguments)
            if wanted is not None:
                assert derivative == pytest.approx(wanted, rel=1e-12, abs=1e-12), f"d{name}{arguments} by operand {i}"


@every_row
def test_the_formula_of_a_row_is_its_meaning(name):
    """What SymPy differentiates is what NumPy computes, on the domain of the row."""
    row = SCALARS[name]
    values = [np.random.default_rng(i).uniform(*row.domain, 50) for i in range(row.arity)]
    compiled = sympy.lambdify(row.symbols, row.formula, modules=[numpy_names(), "numpy"])
    np.testing.assert_allclose(compiled(*values), row.numpy(*values), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["gelu", "silu", "huber"])
def test_second_derivatives(name):
    """The derivative of the derivative against central differences, where the first is kept whole or is in pieces."""
    row = SCALARS[name]
    values = [np.random.default_rng(i).uniform(0.3, 2, 20) for i in range(row.arity)]
    operands = [leaf(f"x{i}", "param", (D,)) for i in range(row.arity)]
    first = b.partial(b.apply(name, *operands), 0)
    (second,), _ = vjp([(first, const(1))], operands[:1])
    found = evaluate(b.broadcast(second, (D,)), dict(zip(operands, values, strict=True)), {"D": 20})
    ahead, behind = (partial_value(name, 0, [values[0] + h, *values[1:]]) for h in (1e-5, -1e-5))
    np.testing.assert_allclose(found, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-7)  # h**2, and rounding over h
