"""The op table: one row per operation, with its type rule, its meaning in NumPy, its adjoint and how it depends on its
operands.

Tests walk `OPS`, so an operation without a gradient check cannot exist. Elementwise operations are rows of `SCALARS`
(ir/scalars.py); their rows here are made from those.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tttc.ir import build as b
from tttc.ir import numerics
from tttc.ir.expr import OPS, Axes, Axis, Expr, IllTyped, Op, postorder
from tttc.ir.formulas import numpy_function
from tttc.ir.names import own
from tttc.ir.scalars import SCALARS

TOKEN_AXES = tuple(map(own, "trs"))  # the reading tokens of a chunk, those between, and the source tokens
Values = Mapping[str, int]


def union(operands: tuple[Expr, ...]) -> Axes:
    """The axes of an elementwise result: those of the widest operand, token axes of the others before, the rest
    after.
    """
    widest: Axes = max((o.axes for o in operands), key=len, default=())
    result = list(widest)
    for operand in operands:
        for axis in operand.axes:
            if axis in result:
                continue
            if axis.name in TOKEN_AXES:
                result.insert(sum(a.name in TOKEN_AXES for a in result[:2]), axis)
            else:
                result.append(axis)
    return tuple(result)


def align(value: Any, axes: Axes, to: Axes) -> Any:
    """An array with axes `axes` made ready to broadcast against one with axes `to`."""
    present = [a for a in to if a in axes]
    moved = np.transpose(value, [axes.index(a) for a in present])
    return np.reshape(moved, [moved.shape[present.index(a)] if a in present else 1 for a in to])


def sizes_of(node: Expr, lengths: Values) -> dict[str, int]:
    """Sizes by axis name for one node, from those of dims: axis names are unique within it."""
    axes = {a for e in (node, *node.src) for a in e.axes} | ({node.arg} if node.op == "size" else set())
    return {a.name: lengths[a.size] for a in axes}


# -- type rules --------------------------------------------------------------------------------------------------------


# An operation that works along an axis takes no operand that lacks it: what is the same along an axis is summed as
# often as that is long, and masked or shifted only once it is spread. `Op.make` does either; no rule can forget it.


def _along(e: Expr, *axes: Axis) -> None:
    missing = [a.name for a in axes if a not in e.axes]
    if missing:
        raise IllTyped(f"an operation along {', '.join(missing)} is given {e!r}, which lacks that axis")


def _contract_axes(src: tuple[Expr, ...], over: Axes) -> Axes:
    present = {a for e in src for a in e.axes}
    if any(a not in present for a in over):
        raise IllTyped(f"a contraction over {', '.join(map(str, over))} of {', '.join(map(repr, src))}")
    kept = [a for e in src for a in e.axes if a not in over]
    shared = [a for a in dict.fromkeys(kept) if kept.count(a) > 1]
    return tuple(dict.fromkeys([*shared, *kept]))


def _without(src: tuple[Expr, ...], over: Axes) -> Axes:
    _along(src[0], *over)
    return tuple(a for a in src[0].axes if a not in over)


def _mask_axes(src: tuple[Expr, ...], arg: tuple[Axis, Axis, bool]) -> Axes:
    _along(src[0], *arg[:2])
    return src[0].axes


def _segprod_axes(src: tuple[Expr, ...], arg: tuple[Axis, Axis]) -> Axes:
    rows, columns = arg
    _along(src[0], rows)
    return (rows, columns, *(a for a in src[0].axes if a != rows))


def _solve_axes(src: tuple[Expr, ...], arg: tuple[Axis, Axis]) -> Axes:
    known, unknown = arg
    _along(src[0], known, unknown)
    _along(src[1], known)
    return (unknown, *(a for a in src[1].axes if a != known))


def _token_first(src: tuple[Expr, ...], axis: Axis) -> Axes:
    _along(src[0], axis)
    return (axis, *(a for a in src[0].axes if a != axis))


def _normalized_axes(src: tuple[Expr, ...], arg: tuple[Axis, *tuple[float, ...]]) -> Axes:
    _along(src[0], arg[0])
    return union(src)


def _broadcast_axes(src: tuple[Expr, ...], axes: Axes) -> Axes:
    return (*axes, *(a for a in src[0].axes if a not in axes))


# -- meanings ----------------------------------------------------------------------------------------------------------


def _elementwise_numpy(node: Expr, sizes: Values, *values: Any) -> Any:
    aligned = [align(v, e.axes, node.axes) for v, e in zip(values, node.src, strict=True)]
    function = numpy_function(node.arg) if node.op == "map" else SCALARS[node.op].numpy
    return np.broadcast_to(function(*aligned), [sizes[a.name] for a in node.axes])


def einsum_spec(node: Expr, batch: str = "") -> str:
    """A contraction as einsum spells it; `batch` stands before the axes of every operand."""
    letters: dict[Axis, str] = {}
    for e in node.src:
        for axis in e.axes:
            letters.setdefault(axis, chr(ord("a") + len(letters)))
    operands, result = ([batch + "".join(letters[a] for a in e.axes) for e in es] for es in (node.src, (node,)))
    return f"{','.join(operands)}->{result[0]}"


def _positions(node: Expr) -> tuple[int, ...]:
    return tuple(node.src[0].axes.index(a) for a in node.arg)


def _mask_numpy(node: Expr, sizes: Values, value: Any) -> Any:
    rows, columns, strict = node.arg
    allowed = np.tri(sizes[rows.name], sizes[columns.name], -1 if strict else 0)
    return align(value, node.src[0].axes, node.axes) * align(allowed, (rows, columns), node.axes)


def _broadcast_numpy(node: Expr, sizes: Values, value: Any) -> Any:
    return np.broadcast_to(align(value, node.src[0].axes, node.axes), [sizes[a.name] for a in node.axes])


def _put_last_numpy(node: Expr, sizes: Values, value: Any) -> Any:
    result = np.zeros([sizes[a.name] for a in node.axes])
    result[-1] = value
    return result


def _tokens_first(node: Expr, value: Any) -> Any:
    """The operand with the axis along which the operation works before the others."""
    return np.moveaxis(value, node.src[0].axes.index(node.axis), 0)


def _solve_numpy(node: Expr, sizes: Values, matrix: Any, right: Any) -> Any:
    known, unknown = node.arg
    lower = node.src[0]
    axes = (known, *node.axes[1:])
    shared = tuple(a for a in axes[1:] if a in lower.axes)
    matrix = np.transpose(matrix, [lower.axes.index(a) for a in (known, unknown, *shared)])
    right = np.transpose(right, [node.src[1].axes.index(a) for a in axes])
    aligned = [axes.index(a) for a in shared]
    return numerics.solve_lower(matrix, right, upper=is_upper(node), along=tuple(aligned))


def is_upper(node: Expr) -> bool:
    """Whether a solve runs backwards in time: the transposed system, whose equations are those of source tokens."""
    known, unknown = node.arg
    return TOKEN_AXES.index(known.name) > TOKEN_AXES.index(unknown.name)


def _lowered_numpy(node: Expr, sizes: Values, *values: Any) -> Any:
    known = dict(zip(node.src, values, strict=True))
    return evaluate(OPS[node.op].lower(node), known, sizes)  # type: ignore[misc]


def evaluate(root: Expr, known: dict[Expr, Any], sizes: Values) -> Any:
    """The value of an expression from the values of some of its nodes."""
    values = dict(known)
    for node in postorder([root], known):
        values[node] = OPS[node.op].numpy(node, sizes, *(values[s] for s in node.src))  # type: ignore[misc]
    return values[root]


# -- adjoints: the cotangent of each operand, which may lack axes along which it is constant ---------------------------


def _elementwise_adjoint(g: Expr, y: Expr, *src: Expr) -> tuple[Expr, ...]:
    return tuple(b.reduce_to(b.mul(g, b.partial(y, i)), y.axes, e.axes) for i, e in enumerate(src))


def _contract_adjoint(g: Expr, y: Expr, *src: Expr) -> tuple[Expr, ...]:
    cotangents = []
    for i, e in enumerate(src):
        others = (*src[:i], *src[i + 1 :])
        over = dict.fromkeys(a for o in (g, *others) for a in o.axes if a not in e.axes)
        cotangents.append(b.contract((g, *others), over))
    return tuple(cotangents)


def _mask_adjoint(g: Expr, y: Expr, x: Expr) -> tuple[Expr]:
    rows, columns, strict = y.arg
    return (b.reduce_to(b.mask(g, rows, columns, strict=strict), y.axes, x.axes),)


def _segprod_adjoint(g: Expr, y: Expr, x: Expr) -> tuple[Expr]:
    """P is the inverse of a bidiagonal matrix: d alpha[i] = sum over t >= i > s of dP[t, s] * P[t, i] * P[i - 1, s]."""
    rows, columns = y.arg
    between = b.between(rows, columns)
    g = b.broadcast(g, y.axes)
    through = b.contract((b.rename(y, {columns: between}), g), (rows,))
    before = b.rename(b.shift(y, rows), {rows: between})
    return (b.rename(b.contract((through, before), (columns,)), {between: rows}),)


def _cumprod_adjoint(g: Expr, y: Expr, x: Expr) -> tuple[Expr]:
    axis = y.arg
    between = b.between(axis)
    g = b.broadcast(g, y.axes)
    through = b.contract((g, b.segprod(x, axis, between)), (axis,))
    return (b.rename(b.mul(through, b.rename(b.shift(y, axis, 1.0), {axis: between})), {between: axis}),)


def _solve_adjoint(g: Expr, y: Expr, matrix: Expr, right: Expr) -> tuple[Expr, Expr]:
    """With y = (I + N)^-1 x: dx = (I + N)^-T dy and dN = -dx y^T, of which only the strict triangle is read."""
    known, unknown = y.arg
    dx = b.solve(matrix, b.broadcast(g, y.axes), unknown, known)
    over = [a for a in y.axes if a not in matrix.axes]
    square = b.contract((dx, y), over)
    rows, columns = (known, unknown) if not is_upper(y) else (unknown, known)
    dm = b.neg(b.mask(square, rows, columns, strict=True))
    return b.reduce_to(dm, dm.axes, matrix.axes), b.reduce_to(dx, dx.axes, right.axes)


def _mean_adjoint(g: Expr, y: Expr, x: Expr) -> tuple[Expr]:
    for axis in y.arg:
        g = b.div(g, b.size(axis))
    return (g,)


def _rename_adjoint(g: Expr, y: Expr, x: Expr) -> tuple[Expr]:
    return (b.rename(g, {new: old for old, new in y.arg}),)


# -- composites --------------------------------------------------------------------------------------------------------


def _lower_layer_norm(node: Expr) -> Expr:
    x, gamma, beta = node.src
    axis, eps = node.arg
    centred = b.sub(x, b.mean(x, (axis,)))
    variance = b.mean(b.power(centred, 2), (axis,))
    return b.add(b.mul(gamma, b.mul(centred, b.apply("rsqrt", b.add(variance, b.const(eps))))), beta)


def _lower_rms_norm(node: Expr) -> Expr:
    x, gamma = node.src
    axis, eps = node.arg
    return b.mul(gamma, b.mul(x, b.apply("rsqrt", b.add(b.mean(b.power(x, 2), (axis,)), b.const(eps)))))


def _lower_l2_norm(node: Expr) -> Expr:
    (x,) = node.src
    axis, eps = node.arg
    return b.mul(x, b.apply("rsqrt", b.add(b.total(b.power(x, 2), (axis,)), b.const(eps))))


def _lower_softmax(node: Expr) -> Expr:
    (x,), (axis,) = node.src, node.arg
    raised = b.apply("exp", b.sub(x, b.stop_gradient(b.maximum(x, (axis,)))))
    return b.div(raised, b.total(raised, (axis,)))


# -- the table ---------------------------------------------------------------------------------------------------------


_ROWS = (
    Op("leaf", lambda src, arg: arg[1]),
    Op("const", lambda src, arg: (), lambda n, sizes: np.float64(n.arg), lambda g, y: (), "constant"),
    Op("size", lambda src, arg: (), lambda n, sizes: np.float64(sizes[n.arg.name]), lambda g, y: (), "constant"),
    Op("map", lambda src, arg: union(src), _elementwise_numpy, _elementwise_adjoint, hint="f"),
    Op("pow", lambda src, n: src[0].axes, lambda n, sizes, v: np.power(v, n.arg), _elementwise_adjoint, hint="p"),
    Op(
        "contract",
        _contract_axes,
        lambda n, sizes, *values: np.einsum(einsum_spec(n), *values),
        _contract_adjoint,
        "multilinear",
        hint="p",
        make=b.contract,
    ),
    Op(
        "sum",
        _without,
        lambda n, sizes, v: np.sum(v, axis=_positions(n)),
        lambda g, y, x: (g,),
        "linear",
        hint="total",
        make=lambda src, over: b.total(src[0], over),
    ),
    Op(
        "mean",
        _without,
        lambda n, sizes, v: np.mean(v, axis=_positions(n)),
        _mean_adjoint,
        "linear",
        hint="m",
        make=lambda src, over: b.mean(src[0], over),
    ),
    Op(
        "max",
        _without,
        lambda n, sizes, v: np.max(v, axis=_positions(n)),
        lambda g, y, x: (b.mul(g, b.apply("less_equal", y, x)),),
        hint="peak",
        make=lambda src, over: b.maximum(src[0], over),
    ),
    Op(
        "mask",
        _mask_axes,
        _mask_numpy,
        _mask_adjoint,
        "linear",
        hint="A",
        make=lambda src, arg: b.mask(src[0], arg[0], arg[1], strict=arg[2]),
    ),
    Op(
        "last",
        lambda src, axis: _without(src, (axis,)),
        lambda n, sizes, v: np.take(v, -1, axis=n.src[0].axes.index(n.arg)),
        lambda g, y, x: (b.put_last(g, y.arg),),
        "linear",
        hint="end",
        make=lambda src, axis: b.last(src[0], axis),
    ),
    Op(
        "put_last",
        lambda src, axis: (axis, *src[0].axes),
        _put_last_numpy,
        lambda g, y, x: (b.last(b.broadcast(g, (y.arg,)), y.arg),),
        "linear",
        hint="row",
    ),
    Op(
        "segprod",
        _segprod_axes,
        lambda n, sizes, v: numerics.segprod(_tokens_first(n, v)),
        _segprod_adjoint,
        hint="P",
        make=lambda src, arg: b.segprod(src[0], *arg),
    ),
    Op(
        "cumprod",
        _token_first,
        lambda n, sizes, v: np.cumprod(_tokens_first(n, v), axis=0),
        _cumprod_adjoint,
        hint="a",
        make=lambda src, axis: b.cumprod(src[0], axis),
    ),
    Op(
        "shift",
        lambda src, arg: _token_first(src, arg[0]),
        lambda n, sizes, v: numerics.shift(_tokens_first(n, v), n.arg[1]),
        lambda g, y, x: (b.shift_back(b.broadcast(g, y.axes), y.axis),),
        hint="before",
        make=lambda src, arg: b.shift(src[0], *arg),
    ),
    Op(
        "shift_back",
        _token_first,
        lambda n, sizes, v: numerics.shift_back(_tokens_first(n, v)),
        lambda g, y, x: (b.shift(b.broadcast(g, y.axes), y.arg),),
        "linear",
        hint="next",
        make=lambda src, axis: b.shift_back(src[0], axis),
    ),
    Op(
        "solve",
        _solve_axes,
        _solve_numpy,
        _solve_adjoint,
        hint="u",
        make=lambda src, arg: b.solve(src[0], src[1], *arg),
    ),
    Op(
        "broadcast",
        _broadcast_axes,
        _broadcast_numpy,
        lambda g, y, x: (b.reduce_to(g, y.axes, x.axes),),
        "linear",
        hint="wide",
        make=lambda src, axes: b.broadcast(src[0], axes),
    ),
    Op(
        "rename",
        lambda src, arg: tuple(dict(arg).get(a, a) for a in src[0].axes),
        lambda n, sizes, v: v,
        _rename_adjoint,
        "linear",
        make=lambda src, arg: b.rename(src[0], dict(arg)),
    ),
    Op("stop_gradient", lambda src, arg: src[0].axes, lambda n, sizes, v: v, lambda g, y, x: (None,), hint="held"),
)
OPS.update({op.name: op for op in _ROWS})
for _name, _lower in (
    ("layer_norm", _lower_layer_norm),
    ("rms_norm", _lower_rms_norm),
    ("l2_norm", _lower_l2_norm),
    ("softmax", _lower_softmax),
):
    _make = partial(b.normalize, _name)
    OPS[_name] = Op(_name, _normalized_axes, _lowered_numpy, None, hint="n", lower=_lower, make=_make)

_LINEAR = {"add": "linear", "sub": "linear", "neg": "linear", "mul": "multilinear"}
for _name in SCALARS:
    _depends = _LINEAR.get(_name, "nonlinear")
    OPS[_name] = Op(_name, lambda src, arg: union(src), _elementwise_numpy, _elementwise_adjoint, _depends)
