"""Rules that are linear recurrences of one matrix, which runtimes have an operator for.

    S_t = decay_t * S_{t-1} + outer(key_t, value_t)                                      or, with delta,
    S_t = decay_t * S_{t-1} + rate_t * outer(key_t, value_t - key_t @ (decay_t * S_{t-1}))
    z_t = output(query_t @ S_t)

Decided from the update rule and from the gradient of one token; no scan is looked at. A loss of |k @ W - v|^2 / 2 has

    dW = outer(k, k @ W - v)      ->      key = k, value = v, rate = lr
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, const, is_const, leaf, leaves, postorder, substitute
from tttc.ir.names import own
from tttc.ir.primal import per_token
from tttc.ir.program import ScanProgram, Update
from tttc.ir.reading import Term, terms_of
from tttc.ir.simplify import simplify


@dataclass(frozen=True)
class LinearRecurrence:
    """The recurrence of the state `state`, whose axes are those of its keys and of its values; every expression is of
    one token. `output` is one of `read`, the leaf that stands for query @ S.
    """

    state: Expr
    key_axis: Axis
    value_axis: Axis
    query: Expr
    key: Expr
    value: Expr
    decay: Expr | None  # without axes, or with that of the keys
    rate: Expr | None  # of the delta rule; None without it
    output: Expr
    read: Expr


def linear_recurrence(program: ScanProgram) -> LinearRecurrence | None:
    """The rule of a program as such a recurrence; None where it is none."""
    update = program.update
    if not _is_plain(program) or len(update.states) != 1 or len(update.states[0].axes) != 2:
        return None
    (w,) = update.states
    gradients, output = per_token(program)
    found = _read(output.value, w)
    terms = terms_of(gradients[w.name], w.axes)
    if found is None or len(terms) != 1:
        return None
    query, node, key_axis = found
    (value_axis,) = (a for a in w.axes if a != key_axis)
    decay = update.decay.get(w.name)
    parts = _parts(terms[0], key_axis, value_axis)
    if parts is None or (decay is not None and not set(decay.axes) <= {key_axis}):
        return None
    learned = _learned(update, w, parts, key_axis)
    read = leaf(own("read"), "token", node.axes)
    (shown,) = substitute([output.value], {node: read})
    if learned is None or _depends(shown, w):
        return None
    key, value, rate = learned
    ordered = [b.broadcast(x, (a,)) for x, a in ((query, key_axis), (key, key_axis), (value, value_axis))]
    query, key, value, *rates = simplify([*ordered, *([rate] if rate is not None else [])])
    return LinearRecurrence(w, key_axis, value_axis, query, key, value, decay, rates[0] if rates else None, shown, read)


def _is_plain(program: ScanProgram) -> bool:
    """Whether weights follow from those of the token before, their decay and one gradient, and every token reads its
    own.
    """
    update, kind = program.update, program.gradients.kind
    others = (update.tau, update.momentum, update.average)
    scaled = any(r is not None and not is_const(r, 1) for rates in others for r in rates.values())
    free = program.plan.free and kind in ("constant", "affine") and not program.telemetry
    return free and update.read == "after" and update.clip is None and not scaled


# -- what is read ------------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    query: Expr
    node: Expr  # query @ W
    key_axis: Axis


def _read(output: Expr, w: Expr) -> _Read | None:
    """The one product in which an output reads the weights."""
    nodes = [e for e in postorder([output]) if w in e.src]
    return None if len(nodes) != 1 else _product(nodes[0], w)


def _product(node: Expr, w: Expr) -> _Read | None:
    """A product of the weights with vectors of one of their axes, over that axis."""
    others = [s for s in node.src if s is not w]
    if node.op != "contract" or len(node.arg) != 1 or len(others) != len(node.src) - 1:
        return None
    (axis,) = node.arg
    if axis not in w.axes or any(_depends(s, w) or not set(s.axes) <= {axis} for s in others):
        return None
    return _Read(reduce(b.mul, others), node, axis)


def _depends(e: Expr, w: Expr) -> bool:
    return any(x.variable == w.variable for x in leaves([e]))


# -- what is learned ---------------------------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """A gradient as one product: numbers of the token, what has the axis of the keys, what has that of the values."""

    numbers: Expr
    keys: tuple[Expr, ...]
    values: tuple[Expr, ...]


def _parts(term: Term, key_axis: Axis, value_axis: Axis) -> _Parts | None:
    numbers, keys, values = const(term.sign), [], []
    for f in term.factors:
        if f.axes == (key_axis,):
            keys.append(f)
        elif f.axes == (value_axis,):
            values.append(f)
        elif not f.axes:
            numbers = b.mul(numbers, f)
        else:
            return None
    return _Parts(numbers, tuple(keys), tuple(values)) if not term.over else None


def _learned(update: Update, w: Expr, parts: _Parts, key_axis: Axis) -> tuple[Expr, Expr, Expr | None] | None:
    """The key, the value and, where the gradient depends on the weights, the rate."""
    lr = update.lr[w.name]
    moving = [f for f in (*parts.keys, *parts.values) if _depends(f, w)]
    if not moving:
        rate = b.neg(b.mul(lr, parts.numbers))
        if not set(lr.axes) <= set(w.axes) or len(lr.axes) > 1:
            return None
        keys, values = parts.keys, parts.values
        keys, values = ((*keys, rate), values) if lr.axes == (key_axis,) else (keys, (*values, rate))
        return _multiplied(keys), _multiplied(values), None
    online = update.anchor == "token" or update.mini_batch == 1
    if lr.axes or len(moving) != 1 or parts.values != (moving[0],) or not online:
        return None
    if update.decay.get(w.name) is not None and not update.decay_first:
        return None
    error = _error(moving[0], w, key_axis)
    if error is None or _depends(parts.numbers, w):
        return None
    number, key = _scaled(_multiplied(parts.keys))
    if key is not error.key:
        return None
    rate = reduce(b.mul, (lr, parts.numbers, number, error.scale))
    return key, error.target, rate


def _multiplied(factors: Sequence[Expr]) -> Expr:
    return reduce(b.mul, factors) if factors else const(1)


class _Error(NamedTuple):
    """scale * (key @ W - target)."""

    scale: Expr
    key: Expr
    target: Expr


def _error(e: Expr, w: Expr, key_axis: Axis) -> _Error | None:
    """A value as such a difference; None where it is another one."""
    if w in e.src:
        found = _product(e, w)
        if found is None or found.key_axis != key_axis:
            return None
        number, key = _scaled(found.query)
        return _Error(number, key, const(0))
    moving = [s for s in e.src if _depends(s, w)]
    if len(moving) != 1 or (inner := _error(moving[0], w, key_axis)) is None:
        return None
    return _changed(e, inner, [s for s in e.src if s is not moving[0]])


def _changed(e: Expr, x: _Error, others: Sequence[Expr]) -> _Error | None:
    """What an operation makes of a difference, with operands that do not depend on the weights."""
    match e.op:
        case "rename":
            return x._replace(target=b.rename(x.target, dict(e.arg)))
        case "broadcast" if set(e.axes) <= {*e.src[0].axes}:
            return x
        case "neg":
            return x._replace(scale=b.neg(x.scale))
        case "mul" if others and not others[0].axes:
            return x._replace(scale=b.mul(others[0], x.scale))
        case "div" if others and e.src[1] is others[0] and not others[0].axes:
            return x._replace(scale=b.div(x.scale, others[0]))
        case "add" | "sub":
            return _shifted(e, x, others[0])
    return None


def _shifted(e: Expr, x: _Error, y: Expr) -> _Error | None:
    """x + y, x - y, y - x. Whatever scales x divides y, so it has to be a number, and not zero."""
    (scale,) = simplify([x.scale])
    if scale.op != "const" or scale.arg == 0:
        return None
    part = b.div(y, scale)
    if e.op == "add":
        return x._replace(target=b.sub(x.target, part))
    negated = e.src[0] is y
    return _Error(b.neg(scale) if negated else scale, x.key, b.add(x.target, part))


def _scaled(e: Expr) -> tuple[Expr, Expr]:
    """A vector as a number of the token times another one."""
    number = const(1)
    while True:
        match e:
            case Expr("neg", (x,)):
                number, e = b.neg(number), x
            case Expr("mul", (x, y)) if not x.axes and y.axes:
                number, e = b.mul(x, number), y
            case Expr("mul", (x, y)) if not y.axes and x.axes:
                number, e = b.mul(y, number), x
            case _:
                return number, e
