"""The operations of a declaration on traced values: what each adds to the IR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tttc.declare.tracer import Traced, aligned, lift, refuse_truths, shape_error, unsupported
from tttc.ir import build as b
from tttc.ir.expr import Axes, Axis, Expr, const
from tttc.ir.scalars import SCALARS, Formula


def trace(name: str, operands: Sequence[Any], settings: Mapping[str, Any]) -> Traced:
    """Add the node of one of the operations of `tttc/declare/functions.py`."""
    values = [lift(x) for x in operands]
    special = _SPECIAL.get(name)
    row = "select" if name == "where" else name
    count, known = (special.operands, special.settings) if special else (SCALARS[row].arity, ())
    if len(values) != count:
        takes = f"It takes {count} operand{'s' * (count > 1)}{''.join(f', and {n}=' for n in known)}."
        raise unsupported(f"tttc.{name} with {len(values)} operands", takes)
    if unknown := [n for n in settings if n not in known]:
        takes = f"It takes {', '.join(known)}." if known else "It takes only operands."
        raise unsupported(f"the argument {', '.join(unknown)} of tttc.{name}", takes)
    if name in ("mean", "einsum"):
        refuse_truths("average" if name == "mean" else "contract", values)
    if special:
        return special.build(values, **settings)
    renamed, axes = aligned(values, f"apply {name} to")
    return Traced(b.apply(row, *renamed), axes)


class _Special(NamedTuple):
    """An operation that is no elementwise function: how many operands it has, and which settings."""

    build: Callable[..., Traced]
    operands: int = 1
    settings: tuple[str, ...] = ()


def _reduction(reduce: Callable[[Expr, Axes], Expr]) -> Callable[..., Traced]:
    def build(values: list[Traced], axis: int | None = None) -> Traced:
        (x,) = values
        if not x.axes:
            return Traced(x.expr)
        if axis is not None and not -x.ndim <= axis < x.ndim:
            raise shape_error(f"there is no axis {axis} in", values, f"axis runs from {-x.ndim} to {x.ndim - 1}.")
        over = x.axes if axis is None else (x.axes[axis],)
        return Traced(reduce(x.expr, over), tuple(a for a in x.axes if a not in over))

    return build


def _normalizing(op: str) -> Callable[..., Traced]:
    def build(values: list[Traced], *, eps: float | None = None) -> Traced:
        if eps is None:
            raise unsupported(f"tttc.{op} without eps", "eps changes the result: write it, for example eps=1e-6.")
        if not values[0].axes:
            raise shape_error(f"{op} normalises over the last axis of", values[:1], "Give it a vector.")
        renamed, axes = aligned(values, f"apply {op} to")
        return Traced(Expr(op, tuple(renamed), (axes[-1], float(eps))), axes)

    return build


def _softmax(values: list[Traced]) -> Traced:
    (x,) = values
    if not x.axes:
        raise shape_error("softmax runs over the last axis of", values, "Give it a vector.")
    return Traced(Expr("softmax", (x.expr,), (x.axes[-1],)), x.axes)


def _dot(values: list[Traced]) -> Traced:
    (x, y), axes = aligned(values, "take the inner product of")
    if not axes:
        raise shape_error("dot runs over the last axis of", values, "A number multiplies with `*`.")
    return Traced(b.contract((x, y), axes[-1:]), axes[:-1])


def _along(values: list[Traced], axis: int = 0) -> Traced:
    x, y = values
    kept = [a for i, a in enumerate(x.axes) if i != axis % max(x.ndim, 1)]
    if len(kept) != y.ndim or any(a.size != c.size for a, c in zip(kept, y.axes, strict=True)):
        raise shape_error(f"cannot scale along axis {axis}", values, "The second lacks just that axis of the first.")
    return Traced(b.mul(x.expr, b.rename(y.expr, dict(zip(y.axes, kept, strict=True)))), x.axes)


def _einsum(values: list[Traced], spec: str) -> Traced:
    inputs, arrow, output = spec.replace(" ", "").partition("->")
    letters = inputs.split(",")
    fits = (
        arrow
        and len(letters) == 2
        and all(len(s) == x.ndim == len(set(s)) for s, x in zip(letters, values, strict=True))
    )
    if not fits or not set(output) <= set("".join(letters)) or len(set(output)) != len(output):
        raise shape_error(
            f"einsum({spec!r}) does not fit", values, "It names every axis of two operands, then the result's."
        )
    named: dict[str, Axis] = {}
    for letter, axis in [(c, a) for s, x in zip(letters, values, strict=True) for c, a in zip(s, x.axes, strict=True)]:
        if letter in named and named[letter].size != axis.size:
            raise shape_error(f"einsum({spec!r}): {letter} is two sizes in", values, "One letter, one dim.")
        named.setdefault(letter, b.fresh(axis, named.values()))
    operands = [
        b.rename(x.expr, dict(zip(x.axes, (named[c] for c in s), strict=True)))
        for s, x in zip(letters, values, strict=True)
    ]
    over = tuple(a for c, a in named.items() if c not in output)
    return Traced(b.contract(operands, over), tuple(named[c] for c in output))


def _upstream(values: list[Traced]) -> Traced:
    z, u = values
    if z.dims != u.dims:
        given = f"v = tttc.token({', '.join(repr(d) for d in z.dims)})".replace("'", '"')
        raise shape_error("what comes from above is v, and does not fit:", values, f"It has the axes of z: {given}.")
    operands, axes = aligned(values, "take upstream of")
    return Traced(b.contract(operands, axes))


def _stop_gradient(values: list[Traced]) -> Traced:
    held = Traced(b.stop_gradient(values[0].expr), values[0].axes)
    held.viewed = values[0].viewed = True
    return held


_SPECIAL: dict[str, _Special] = {
    "sum": _Special(_reduction(b.total), 1, ("axis",)),
    "mean": _Special(_reduction(b.mean), 1, ("axis",)),
    "layer_norm": _Special(_normalizing("layer_norm"), 3, ("eps",)),
    "rms_norm": _Special(_normalizing("rms_norm"), 2, ("eps",)),
    "l2_norm": _Special(_normalizing("l2_norm"), 1, ("eps",)),
    "softmax": _Special(_softmax),
    "dot": _Special(_dot, 2),
    "along": _Special(_along, 2, ("axis",)),
    "einsum": _Special(_einsum, 2, ("spec",)),
    "stop_gradient": _Special(_stop_gradient),
    "upstream": _Special(_upstream, 2),
}


def apply_formula(formula: Formula, operands: Sequence[Any]) -> Traced:
    """Add the node of a user's own elementwise function."""
    renamed, axes = aligned([lift(x) for x in operands], "apply elementwise to")
    if formula.body.is_number:  # a constant, whatever it is a function of
        return Traced(b.broadcast(const(float(formula.body)), axes), axes)
    return Traced(Expr("map", tuple(renamed), formula), axes)
