"""A value that lacks an axis is the same along it: summed as often as that is long, spread before it is masked."""

from __future__ import annotations

import numpy as np
import pytest

from tttc.ir import build as b
from tttc.ir.expr import OPS, Axis, Expr, IllTyped, leaf, rebuild
from tttc.ir.ops import align, evaluate
from tttc.ir.program import S_AXIS, T_AXIS
from tttc.ir.reading import Term, summed

SIZES = {"D": 3, T_AXIS.name: 4, S_AXIS.name: 4}
D = Axis("D", "D")
x, rows, columns, square = (leaf("x", "param", axes) for axes in ((D,), (T_AXIS, D), (S_AXIS, D), (T_AXIS, S_AXIS, D)))
lower = leaf("L", "param", (T_AXIS, S_AXIS))

# every operation that works along axes, on an operand that has them
ALONG = {
    "contract": b.contract((rows, x), (T_AXIS,)),
    "sum": b.total(rows, (T_AXIS,)),
    "mean": b.mean(rows, (T_AXIS,)),
    "max": b.maximum(rows, (T_AXIS,)),
    "mask": b.mask(square, T_AXIS, S_AXIS),
    "last": b.last(rows, T_AXIS),
    "segprod": b.segprod(rows, T_AXIS, S_AXIS),
    "cumprod": b.cumprod(rows, T_AXIS),
    "shift": b.shift(rows, T_AXIS, 1.0),
    "shift_back": b.shift_back(rows, T_AXIS),
    "solve": b.solve(lower, rows, T_AXIS, S_AXIS),
    "layer_norm": Expr("layer_norm", (rows, x, x), (T_AXIS, 1e-6)),
    "rms_norm": Expr("rms_norm", (rows, x), (T_AXIS, 1e-6)),
    "l2_norm": Expr("l2_norm", (rows,), (T_AXIS, 1e-6)),
    "softmax": Expr("softmax", (rows,), (T_AXIS,)),
}
ONLY_NAMED = {"rename", "broadcast"}  # their argument names axes, along which they do nothing


def value_of(e: Expr, to: tuple[Axis, ...]) -> np.ndarray:
    arrays = {
        v: np.random.default_rng(len(v.axes)).normal(size=[SIZES[a.name] for a in v.axes])
        for v in (x, rows, columns, square, lower)
    }
    found = align(evaluate(e, arrays, SIZES), e.axes, to)
    return np.broadcast_to(found, [SIZES[a.name] for a in to])


@pytest.mark.parametrize("op", ALONG)
def test_an_operation_along_an_axis(op):
    """On what lacks the axis it is what it is on the same value spread along it."""
    node = ALONG[op]
    others = node.src[1:] if op != "solve" else ()
    for given in (x, leaf("x", "param", (D,))):
        src = (lower, given) if op == "solve" else (given, *others)
        spread = (
            (lower, b.broadcast(given, (T_AXIS,)))
            if op == "solve"
            else (
                b.broadcast(given, (T_AXIS, S_AXIS) if op == "mask" else (T_AXIS,)),
                *others,
            )
        )
        with pytest.raises(IllTyped):
            Expr(op, src, node.arg)
        short, wanted = rebuild(node, src), Expr(op, spread, node.arg)
        np.testing.assert_allclose(value_of(short, wanted.axes), value_of(wanted, wanted.axes), rtol=1e-13)


def test_a_mask_on_one_of_its_axes():
    """It masks (t, s), not the one axis that is there."""
    for given in (rows, columns):
        with pytest.raises(IllTyped):
            Expr("mask", (given,), (T_AXIS, S_AXIS, False))
        made = b.mask(given, T_AXIS, S_AXIS)
        assert {T_AXIS, S_AXIS} <= set(made.axes)
        assert value_of(made, (T_AXIS, S_AXIS, D))[0, 1].tolist() == [0, 0, 0]


def test_every_operation_with_an_axis_in_its_argument_has_a_rule():
    """An operation that is added later says how it is made on what lacks its axis."""
    named = {n for n, op in OPS.items() if op.make is not None}
    assert named == {*ALONG} | ONLY_NAMED


def test_a_product_is_summed_over_all_of_its_axes():
    """What a mini-batch adds is a sum over its tokens, also where it is the same for every token."""
    plain = summed([Term(1, (x,), (S_AXIS,))], (D,), {"D": 3, S_AXIS.size: 4})
    np.testing.assert_allclose(value_of(plain, (D,)), 4 * value_of(x, (D,)))
    with pytest.raises(AssertionError, match="neither kept nor summed"):
        summed([Term(1, (columns,))], (D,), {"D": 3, S_AXIS.size: 4})
