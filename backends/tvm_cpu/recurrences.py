"""Statements that go along the tokens, each from what the token before left.

walk a[t] = cumprod(decay[c])            a[t] = a[t - 1] * decay[t]
walk u[s, D1] = solve_lower(A, x)        u[t] = x[t] - sum over s < t of A[t, s] * u[s], four rows at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tttc.backends.tvm_common.lowering import ExprLowering
from tttc.backends.tvm_common.statements import Statement
from tttc.backends.tvm_common.stores import Index, Places
from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.emission import Emission
from tttc.ir.expr import Axis, Expr
from tttc.ir.ops import is_upper

ROWS_AT_ONCE = 4  # of a triangular system, solved together: what they all need is loaded once
WIDE = 4  # vectors of these


def _saved(e: Emission, s: Statement, places: Places, value: Any) -> None:
    e.stores[s.name].save([places[a] for a in s.target.axes], value)


def _at(point: ExprLowering, e: Expr, wide: bool) -> Any:
    value = point.value(e)
    return point.wide(value) if wide else value.it


def _previous(e: Emission, s: Statement, along: Axis, places: Places, t: Any, first: Any) -> Any:
    """What the token before left in the target; at the first token another value, and nothing is read before it."""
    before = {**places, along: Index(T.max(t - 1, 0), ("before", id(t)))}
    found = e.stores[s.name].load([before[a] for a in s.target.axes])
    wide = any(p.lanes for p in places.values())
    return T.Select(T.broadcast(t > 0, e.machine.lanes) if wide else t > 0, found.it, first)


def _cumprod(e: Emission, s: Statement) -> None:
    axis = s.value.arg

    def step(t: Any, wide: bool, places: Places) -> None:
        x = _at(ExprLowering(e, places), s.value.src[0], wide)
        _saved(e, s, places, _previous(e, s, axis, places, t, e.functions(wide).const(1.0)) * x)

    e.token_by_token(s, axis, step)


def _segprod(e: Emission, s: Statement) -> None:
    """P[t, s] = P[t - 1, s] * x[t] before the diagonal, 1 on it, 0 beyond."""
    rows, columns = s.value.arg

    def step(t: Any, wide: bool, places: Places) -> None:
        point, functions = ExprLowering(e, places), e.functions(wide)
        x = _at(point, s.value.src[0], wide)
        grown = _previous(e, s, rows, places, t, functions.const(0.0)) * x
        on, below = point.compared(rows, columns, T.EQ), point.compared(rows, columns, lambda i, j: i > j)
        _saved(e, s, places, T.Select(on, functions.const(1.0), T.Select(below, grown, functions.const(0.0))))

    e.token_by_token(s, rows, step)


def _shift(e: Emission, s: Statement) -> None:
    axis, fill = s.value.arg
    _moved(e, s, axis, lambda t: T.max(t - 1, 0), lambda t: t > 0, fill)


def _shift_back(e: Emission, s: Statement) -> None:
    axis = s.value.arg
    _moved(e, s, axis, lambda t: T.min(t + 1, e.tokens - 1), lambda t: t + 1 < e.tokens, 0.0)


def _moved(
    e: Emission, s: Statement, axis: Axis, other: Callable[[Any], Any], inside: Callable[[Any], Any], fill: float
) -> None:
    def step(t: Any, wide: bool, places: Places) -> None:
        x = _at(ExprLowering(e, {**places, axis: Index(other(t), ("other", id(t)))}), s.value.src[0], wide)
        condition = T.broadcast(inside(t), e.machine.lanes) if wide else inside(t)
        _saved(e, s, places, T.Select(condition, x, e.functions(wide).const(fill)))

    e.token_by_token(s, axis, step)


def _solve(e: Emission, s: Statement) -> None:
    """x[t] = right[t] - sum over s < t of matrix[t, s] * x[s], and from the last token back where it is upper.

    Some rows at a time: first what all of them get from the rows before, then what each gets from those among them.
    """
    _, unknown = s.value.arg
    upper = is_upper(s.value)
    others = [a for a in s.target.axes if a != unknown]
    with T.serial(T.truncdiv(e.tokens + (ROWS_AT_ONCE - 1), ROWS_AT_ONCE)) as i:
        done = i * ROWS_AT_ONCE
        order = [done + r for r in range(ROWS_AT_ONCE)]
        inside = [t < e.tokens for t in order]
        last = e.tokens - 1
        rows = [e.in_register(T.max(last - t, 0) if upper else T.min(t, last)) for t in order]
        before = (e.tokens - done, e.tokens) if upper else (0, done)

        with e.loops(others[:-1], {}) as places:
            if not others:
                _solve_rows(e, s, [places], rows, inside, before)
                return

            def columns(first: Any, count: int) -> None:
                lanes, key = e.machine.lanes, ("block", id(first))
                blocks = [Index((first + i) * lanes, (*key, i), lanes=True) for i in range(count)]
                _solve_rows(e, s, [{**places, others[-1]: b} for b in blocks], rows, inside, before)

            e.each_blocks(others[-1], WIDE, columns)


def _solve_rows(
    e: Emission, s: Statement, columns: Sequence[Places], rows: list[Any], inside: list[Any], before: tuple[Any, Any]
) -> None:
    """Some rows of a triangular system, in registers."""
    known, unknown = s.value.arg
    matrix, right = s.value.src
    wide = any(p.lanes for p in columns[0].values())
    places = [Index(t, ("row", r)) for r, t in enumerate(rows)]
    dtype = e.machine.vector if wide else e.machine.dtype
    held = e.registers(len(rows) * len(columns), dtype)

    def subtract(r: int, c: int, point: ExprLowering, x: Any) -> None:
        factor = _at(point, matrix, wide)
        T.buffer_store(held, held[r * len(columns) + c] - factor * x, [r * len(columns) + c])

    memo: dict[Any, Any] = {}
    for r, row in enumerate(places):
        for c, at in enumerate(columns):
            T.buffer_store(
                held, _at(ExprLowering(e, {**at, known: row}, memo=memo), right, wide), [r * len(columns) + c]
            )
    with T.serial(*before) as j:
        memo = {}
        there = Index(j, ("solved", id(j)))
        for c, at in enumerate(columns):
            x = e.in_register(e.stores[s.name].load([{**at, unknown: there}[a] for a in s.target.axes]).it)
            for r, row in enumerate(places):
                subtract(r, c, ExprLowering(e, {**at, known: row, unknown: there}, memo=memo), x)
    memo = {}
    for r, row in enumerate(places):
        for q in range(r):
            for c, at in enumerate(columns):
                point = ExprLowering(e, {**at, known: row, unknown: places[q]}, memo=memo)
                subtract(r, c, point, held[q * len(columns) + c])
    for r, row in enumerate(places):
        with e.only_if(inside[r] if r else None):
            for c, at in enumerate(columns):
                _saved(e, s, {**at, unknown: row}, held[r * len(columns) + c])


RECURRENCES: dict[str, Callable[[Emission, Statement], None]] = {
    "cumprod": _cumprod,
    "segprod": _segprod,
    "shift": _shift,
    "shift_back": _shift_back,
    "solve": _solve,
}
