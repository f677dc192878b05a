"""Products of many factors: the value is that of einsum, the order is never worse than the one as written."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tttc.ir.contraction import layout, ordered
from tttc.ir.expr import Axis, leaf, postorder
from tttc.ir.ops import align, evaluate

NAMES = "ABCDE"
AXES = {n: Axis(n, n) for n in NAMES}
sizes = st.fixed_dictionaries({n: st.integers(1, 5) for n in NAMES})


@st.composite
def products(draw):
    """Factors, the axes that are kept, and the sizes."""
    factors = draw(st.lists(st.sets(st.sampled_from(NAMES), max_size=3), min_size=1, max_size=5))
    present = sorted(set().union(*factors))
    kept = draw(st.permutations(draw(st.lists(st.sampled_from(present), unique=True)) if present else []))
    order = [draw(st.permutations(sorted(f))) for f in factors]
    return order, list(kept), draw(sizes)


def leaves_of(factors):
    return [leaf(f"f{i}", "param", tuple(AXES[n] for n in f)) for i, f in enumerate(factors)]


@given(products(), st.integers(0, 2**32 - 1))
def test_ordered_equals_einsum(product, seed):
    """1e-12: sums of at most 5**5 products of numbers of order 1, in float64."""
    factors, kept, size = product
    generator = np.random.default_rng(seed)
    arrays = [generator.standard_normal([size[n] for n in f]) for f in factors]
    nodes = leaves_of(factors)
    out = tuple(AXES[n] for n in kept)
    result = ordered(nodes, out, size)
    assert set(result.axes) == set(out)
    found = align(evaluate(result, dict(zip(nodes, arrays, strict=True)), size), result.axes, out)
    wanted = np.einsum(",".join("".join(f) for f in factors) + "->" + "".join(kept), *arrays)
    assert np.linalg.norm(found - wanted) <= 1e-12 * (1 + np.linalg.norm(wanted))


@given(products())
def test_ordered_is_never_dearer_than_left_to_right(product):
    factors, kept, size = product
    result = ordered(leaves_of(factors), tuple(AXES[n] for n in kept), size)
    pairs = [e for e in postorder([result]) if e.op in ("contract", "mul")]
    assert all(len(e.src) == 2 for e in pairs)
    assert sum(flop_count(e, size) if e.op == "contract" else entries(e, size) for e in pairs) <= left_to_right(
        factors, kept, size
    )


def flop_count(e, size):
    """Multiplications and additions of a contraction of two operands."""
    return prod(size[a.size] for a in {a for s in e.src for a in s.axes}) * (2 if e.arg else 1)


def entries(e, size):
    return prod(size[a.size] for a in e.axes)


def left_to_right(factors, kept, size):
    """Multiplications and additions of taking the factors as they come."""
    cost, done = 0, set(factors[0])
    for i, factor in enumerate(factors[1:], 1):
        present = done | set(factor)
        needed = set(kept).union(*factors[i + 1 :])
        cost += prod(size[n] for n in present) * (2 if present - needed else 1)
        done = present & needed
    return cost


def test_the_dual_form_is_the_cheapest_order():
    """Reading x through the sum of A[t, s] * outer(X[s], d[s]): never a D x F matrix for each token."""
    t, s, d, f = (Axis(n, n) for n in "tsDF")
    x, A, X, g = (
        leaf("x", "token", (t, d)),
        leaf("A", "gate", (t, s)),
        leaf("X", "token", (s, d)),
        leaf("g", "token", (s, f)),
    )
    result = ordered((x, A, X, g), (t, f), {"t": 16, "s": 16, "D": 64, "F": 256})
    assert max(len(e.axes) for e in postorder([result])) == 2
    assert layout(result).kind == "matmul"


def test_layouts():
    """A product of two as a reader writes it."""
    d, e, f = (Axis(n, n) for n in "DEF")
    v, w, M = leaf("v", "token", (d,)), leaf("w", "token", (e,)), leaf("M", "state", (d, e))
    from tttc.ir import build as b

    assert layout(b.contract((v, w), ())).kind == "outer"
    assert layout(b.contract((v, M), (d,))) == ("matmul", False, False)
    assert layout(b.contract((M, v), (d,))) == ("matmul", True, False)
    assert layout(b.contract((M, leaf("N", "state", (d, e))), (d, e))).kind == "dot"
    assert layout(b.contract((leaf("P", "state", (d, e, f)), v), (d,))).kind == "einsum"
