"""Simplification: every rule fires somewhere, and none changes a value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tttc.ir import build as b
from tttc.ir.expr import TOKENS, Axis, Expr, const, leaf, postorder
from tttc.ir.ops import align, evaluate
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.ir.rewrite import counted, rewrite
from tttc.ir.simplify import FINISHING, RULES, simplify

D, E, F = (Axis(n, n) for n in "DEF")
T, S = T_AXIS, S_AXIS
x, y, z = (leaf(n, "token", (D,)) for n in "xyz")
v = leaf("v", "token", (E,))
M, N = leaf("M", "state", (D, E)), leaf("N", "state", (D, E))
X, G = leaf("X", "token", (T, D)), leaf("G", "token", (T, E))
A, B = leaf("A", "gate", (T, S)), leaf("B", "gate", (T, S))
a, c = leaf("a", "param"), leaf("c", "param")
u = leaf("u", "token", (T,))
zeros, ones = b.broadcast(const(0), (D,)), b.broadcast(const(1), (T, S))

# Expressions on which the rule fires, each a different pattern of it.
EXAMPLES: dict[str, list[Expr]] = {
    "f(2, 3) -> its value": [
        b.add(const(2), const(3)),
        b.power(const(3), 2),
        b.apply("tanh", const(0.3)),
        b.apply("select", const(1), const(2), const(3)),
    ],
    "x / 0 -> x * inf": [b.div(x, const(0)), b.div(const(0), const(0)), b.div(b.neg(M), const(-0.0))],
    "x * 1 -> x": [b.mul(x, const(1)), b.mul(const(1), x), b.div(x, const(1))],
    "x + 0 -> x": [b.add(x, const(0)), b.add(const(0), x), b.sub(x, const(0)), b.sub(const(0), x)],
    "x * 0 -> 0": [
        b.mul(x, const(0)),
        b.mul(zeros, M),
        b.contract((zeros, M), (D,)),
        b.total(zeros, (D,)),
        b.mean(b.mul(M, const(0)), (E,)),
        b.mask(b.broadcast(const(0), (T, S)), T, S),
        b.neg(zeros),
        b.last(b.broadcast(const(0), (T, D)), T),
        b.put_last(zeros, T),
    ],
    "f(broadcast(x), y) -> f(x, y)": [
        b.add(b.broadcast(x, (D, E)), M),
        b.mul(M, b.broadcast(const(2), (D, E))),
        b.sub(b.broadcast(v, (D, E)), x),
    ],
    "--x -> x": [b.neg(b.neg(x))],
    "x + -y -> x - y": [b.add(x, b.neg(y)), b.add(b.neg(y), x), b.sub(x, b.neg(y)), b.sub(b.neg(x), y)],
    "x * -1 -> -x": [b.mul(x, const(-1)), b.mul(const(-1), x)],
    "a * -b -> -(a * b)": [
        b.mul(b.neg(x), y),
        b.mul(x, b.neg(M)),
        b.div(b.neg(x), y),
        b.div(x, b.neg(y)),
        b.contract((b.neg(x), M), (D,)),
        b.contract((b.neg(x), b.neg(M)), (D,)),
        b.total(b.neg(M), (D,)),
        b.mean(b.neg(M), (D, E)),
        b.mask(b.neg(A), T, S, strict=True),
        b.rename(b.neg(A), {T: S, S: T}),
        b.last(b.neg(X), T),
        b.put_last(b.neg(x), T),
    ],
    "x * c -> c * x": [b.mul(x, const(3)), b.mul(x, b.div(const(2), b.size(D))), b.div(b.mul(const(2), x), y)],
    "a * (b * x) -> (a * b) * x": [
        b.mul(const(2), b.mul(const(3), x)),
        b.mul(b.mul(const(2), x), M),
        b.mul(M, b.mul(const(2), x)),
        b.neg(b.mul(const(2), x)),
    ],
    "x ** 1 -> x, x ** 0 -> 1": [b.power(x, 1), b.power(x, 0)],
    "sum over no axis -> x": [
        Expr("sum", (x,), ()),
        Expr("mean", (x,), ()),
        Expr("contract", (x,), ()),
    ],
    "contraction with a number -> number * contraction": [
        Expr("contract", (const(2), x, M), (D,)),
        Expr("contract", (x, const(2)), (D,)),
        Expr("contract", (const(2), const(3), x, v), ()),
    ],
    "contraction of c * x -> c * contraction of x": [
        b.contract((b.mul(const(2), x), M), (D,)),
        b.contract((x, b.mul(const(2), M)), (D,)),
        b.total(b.mul(const(2), x), (D,)),
        b.mean(b.mul(const(2), M), (E,)),
    ],
    "rename(rename(x)) -> rename(x)": [
        Expr("rename", (X,), ((T, S),)),
        Expr("rename", (Expr("rename", (b.apply("tanh", X),), ((T, S),)),), ((S, T),)),
        Expr("rename", (b.broadcast(x, (T, D)),), ((T, S),)),
    ],
    "broadcast(x) -> x where x has the axes": [
        Expr("broadcast", (M,), (E, D)),
        Expr("broadcast", (b.broadcast(x, (D, E)),), (T, D, E)),
    ],
    "product of values without axes to the smaller side": [b.mul(b.mul(a, x), c), b.mul(b.mul(u, X), c)],
    "x + x -> 2 * x": [b.add(x, x), b.add(b.mul(const(2), x), x)],
    "sum(x) / n -> mean(x)": [
        b.div(b.total(x, (D,)), b.size(D)),
        b.div(b.contract((x, y), (D,)), b.size(D)),
        b.div(b.mul(b.total(M, (E,)), y), b.size(E)),
        b.div(b.mul(y, b.total(M, (E,))), b.size(E)),
        b.div(b.neg(b.total(M, (E,))), b.size(E)),
        b.div(b.contract((M, N), (E,)), b.size(E)),
    ],
    "(a * x) / n -> a * (x / n) where x is the smaller": [
        b.div(b.mul(M, x), b.size(E)),
        b.div(b.mul(x, M), c),
    ],
    "g @ x + ... + h @ x -> (g + h) @ x + ...": [
        b.add(b.contract((A, b.rename(X, {T: S})), (S,)), b.contract((B, b.rename(X, {T: S})), (S,))),
        b.sub(b.contract((A, b.rename(X, {T: S})), (S,)), b.contract((B, b.rename(X, {T: S})), (S,))),
        b.add(b.contract((x, M), (D,)), b.sub(v, b.contract((x, N), (D,)))),
        b.sub(v, b.add(b.contract((x, M), (D,)), b.contract((y, M), (D,)))),
    ],
    "a * m + a -> a * (m + 1)": [
        b.add(b.mul(x, y), x),
        b.add(b.mul(y, x), x),
        b.add(x, b.mul(x, y)),
        b.add(M, b.mul(x, M)),
    ],
    "mask(1) * x -> mask(x)": [
        b.mul(b.mask(ones, T, S), A),
        b.mul(A, b.mask(ones, T, S, strict=True)),
        b.mul(b.mask(b.broadcast(const(3), (T, S)), T, S), A),
    ],
    "a[t] * (product of a before t) -> product of a up to t": [
        b.mul(u, b.shift(b.cumprod(u, T), T, 1.0)),
        b.mul(b.shift(b.cumprod(X, T), T, 1.0), X),
        b.mul(u, b.shift(b.segprod(u, T, S), T)),
        b.mul(const(0.5), b.shift(b.segprod(b.broadcast(const(0.5), (T,)), T, S), T)),
    ],
    "c * (a * x) -> (c * a) * x where a is the smaller": [
        b.mul(const(2), b.mul(a, x)),
        b.mul(b.div(const(2), b.size(D)), b.mul(X, u)),
    ],
}


def value(e: Expr, axes, seed: int) -> np.ndarray:
    """The value of an expression on random arrays, with sizes of their own for each seed."""
    generator = np.random.default_rng(seed)
    by_dim = {d: int(n) for d, n in zip((TOKENS, "D", "E", "F"), generator.integers(1, 6, 4), strict=True)}
    known = {}
    for node in sorted((n for n in postorder([e]) if n.op == "leaf"), key=lambda n: (n.name, n.axes)):
        own = np.random.default_rng([seed, *node.name.encode()])
        known[node] = own.uniform(-1, 1, [by_dim[axis.size] for axis in node.axes])
    sizes = {axis.name: by_dim[axis.size] for axis in (D, E, F, T, S)}
    return align(evaluate(e, known, sizes), e.axes, axes)


def assert_same_value(before: Expr, after: Expr, seed: int) -> None:
    """1e-12: the rules reorder a few sums and products of numbers of order 1 in float64."""
    assert set(after.axes) == set(before.axes), f"{before} -> {after}"
    with np.errstate(all="ignore"):  # infinite numbers, and those that are none, are the same ones
        one, other = value(before, before.axes, seed), value(after, before.axes, seed)
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        difference = np.linalg.norm(np.where(same, 0.0, one - other))
    assert difference <= 1e-12 * (1 + np.linalg.norm(np.where(np.isfinite(one), one, 0.0))), f"{before} -> {after}"


def test_every_rule_has_examples():
    assert [r.title for r in (*RULES, *FINISHING)] == list(EXAMPLES), "give the new rule examples on which it fires"


@pytest.mark.parametrize("rule", [*RULES, *FINISHING], ids=lambda r: r.title)
def test_a_rule_fires_and_keeps_the_value(rule):
    for e in EXAMPLES[rule.title]:
        with counted() as fired:
            (after,) = rewrite([e], [rule])
        assert fired[rule.title] >= 1, f"{rule.title} does not fire on {e}"
        for seed in range(5):
            assert_same_value(e, after, seed)


@pytest.mark.parametrize("rule", [*RULES, *FINISHING], ids=lambda r: r.title)
def test_all_rules_together_keep_the_value_of_each_example(rule):
    """Later rules may need what an earlier one made; every rule that fires is told."""
    for e in EXAMPLES[rule.title]:
        moved: dict[Expr, Expr] = {}
        with counted() as fired:
            (after,) = simplify([e], moved)
        assert fired
        assert set(fired) <= set(EXAMPLES)
        assert moved[e] is after
        assert simplify([after]) == [after], "a second run finds nothing more"
        assert_same_value(e, after, seed=1)


# -- random expressions -------------------------------------------------------------------------------------

LEAVES = (x, y, v, M, N, X, G, A, B, a, c, u, leaf("X", "token", (S, D)), leaf("G", "token", (S, E)))
CONSTANTS = [const(n) for n in (0, 1, -1, 2, 0.5)]
start = st.sampled_from([*LEAVES, *CONSTANTS])


def grown(children):
    """One more operation on expressions; axes are taken from the operands, so every result is well typed."""
    return st.one_of(
        st.builds(b.neg, children),
        st.builds(lambda e, n: b.power(e, n), children, st.sampled_from([0, 1, 2])),
        st.builds(lambda name, e: b.apply(name, e), st.sampled_from(["tanh", "sigmoid", "sign"]), children),
        st.builds(lambda make, e, f: make(e, f), st.sampled_from([b.add, b.sub, b.mul]), children, children),
        st.builds(lambda e, f: b.contract((e, f), [i for i in e.axes if i in f.axes]), children, children),
        st.builds(lambda e, f: b.contract((e, f), e.axes[:1]), children, children),
        st.builds(
            lambda make, e, n: make(e, e.axes[:n]),
            st.sampled_from([b.total, b.mean]),
            children,
            st.integers(0, 2),
        ),
        st.builds(lambda e, n: b.div(e, b.size(n)), children, st.sampled_from([D, E, T])),
        st.builds(lambda e, axes: b.broadcast(e, axes), children, st.sampled_from([(D, E), (T, S), (D,)])),
        st.builds(lambda e: b.rename(e, {T: S, S: T}), children),
        st.builds(lambda e, strict: b.mask(e, T, S, strict=strict), children, st.booleans()),
        st.builds(lambda e: b.last(e, T) if T in e.axes else b.put_last(e, T), children),
    )


expressions = st.recursive(start, grown, max_leaves=12)


@settings(max_examples=200)
@given(expressions, st.integers(0, 99))
def test_random_expressions_keep_their_value(e, seed):
    (after,) = simplify([e])
    assert_same_value(e, after, seed)


@settings(max_examples=100)
@given(st.lists(expressions, min_size=2, max_size=4), st.integers(0, 99))
def test_random_expressions_simplified_together(roots, seed):
    """Several roots at once, as in a block: each keeps its value, and a second run changes nothing."""
    after = simplify(roots)
    assert simplify(after) == after
    for one, other in zip(roots, after, strict=True):
        assert_same_value(one, other, seed)
