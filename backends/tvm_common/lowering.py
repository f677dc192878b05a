"""The value of an expression where the axes of a statement stand.

A value that lacks the axis of the vectors is one number, and stays one until it meets a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tttc.backends.tvm_common.stores import Index, Places, Value
from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.emission import Emission
from tttc.backends.tvm_cpu.ops import ROWS
from tttc.ir.expr import Axis, Expr
from tttc.ir.scalars import SCALARS


class ExprLowering:
    """The value of expressions where the axes stand; what they share is computed once."""

    def __init__(
        self,
        emitter: Emission,
        places: Places,
        found: Mapping[Expr, Value] | None = None,
        memo: dict[Any, Value] | None = None,
    ) -> None:
        self.emitter, self.places = emitter, places
        self.found = found or {}
        self.memo = {} if memo is None else memo

    def wide(self, v: Value) -> Any:
        return v.it if v.wide else self.emitter.vectors.wide(v.it, "")

    def value(self, e: Expr) -> Value:
        if e in self.found:
            return self.found[e]
        key = (e, tuple(self.places[a].key for a in e.axes))
        if key not in self.memo:
            made = self._made(e)
            plain = e.op in ("const", "size", "rename", "broadcast", "stop_gradient")
            self.memo[key] = made if plain else Value(self.emitter.in_register(made.it), made.wide)
        return self.memo[key]

    def product(self, factors: Sequence[Expr]) -> Value:
        """The numbers first, then the vectors."""
        values = sorted((self.value(f) for f in factors), key=lambda v: v.wide)
        result = values[0]
        for v in values[1:]:
            result = self.times(result, v)
        return result

    def times(self, x: Value, y: Value) -> Value:
        if x.wide or y.wide:
            return Value(self._spread(x) * self._spread(y), True)
        return Value(x.it * y.it, False)

    def _spread(self, v: Value) -> Any:
        """A number in all lanes, once for all who need it there."""
        if v.wide:
            return v.it
        key = ("spread", id(v.it))
        if key not in self.memo:
            self.memo[key] = Value(self.emitter.in_register(self.wide(v)), True)
            self.memo["keep", id(v.it)] = v
        return self.memo[key].it

    def elsewhere(self, places: Places) -> ExprLowering:
        return ExprLowering(self.emitter, places, self.found, self.memo)

    def compared(self, rows: Axis, columns: Axis, how: Callable[[Any, Any], Any]) -> Any:
        """A comparison of the places of two axes, lane by lane where one has lanes."""
        i, j = self.places[rows], self.places[columns]
        lanes = self.emitter.machine.lanes
        if not i.lanes and not j.lanes:
            result = how(self.emitter._int(i.index), self.emitter._int(j.index))
            wide = any(p.lanes for p in self.places.values())
            return T.broadcast(result, lanes) if wide else result
        sides = [self.emitter._lanes(p) if p.lanes else T.broadcast(self.emitter._int(p.index), lanes) for p in (i, j)]
        return how(*sides)

    def _made(self, e: Expr) -> Value:
        if e.op in SCALARS or e.op in ("map", "pow"):
            return self._function(e)
        found: Value = getattr(self, ROWS[e.op])(e)
        return found

    def _leaf(self, e: Expr) -> Value:
        return self.emitter.stores[e.name].load([self.places[a] for a in e.axes])

    def _const(self, e: Expr) -> Value:
        return Value(self.emitter.numbers.const(e.arg), False)

    def _size(self, e: Expr) -> Value:
        return Value(self.emitter._size(e.arg), False)

    def _rename(self, e: Expr) -> Value:
        inside = {old: self.places[new] for old, new in e.arg}
        return self.elsewhere({**self.places, **inside}).value(e.src[0])

    def _last(self, e: Expr) -> Value:
        end = Index(self.emitter.tokens - 1, ("last",))
        return self.elsewhere({**self.places, e.arg: end}).value(e.src[0])

    def _operand(self, e: Expr) -> Value:
        return self.value(e.src[0])

    def _function(self, e: Expr) -> Value:
        values = [self.value(s) for s in e.src]
        wide = any(v.wide for v in values)
        functions = self.emitter.vectors if wide else self.emitter.numbers
        operands = [self._spread(v) if wide else v.it for v in values]
        if e.op == "map":
            return Value(functions.formula(e.arg, *operands), wide)
        if e.op == "pow":
            return Value(functions["pow"](operands[0], e.arg), wide)
        return Value(functions[e.op](*operands), wide)

    def _masked(self, e: Expr) -> Value:
        inside = self.value(e.src[0])
        if e.op == "put_last":
            place = self.places[e.arg]
            last = self.emitter.tokens - 1
            condition = (
                T.EQ(self.emitter._lanes(place), T.broadcast(last, self.emitter.machine.lanes))
                if place.lanes
                else T.EQ(place.index, last)
            )
            wide = inside.wide or place.lanes
            if wide and not place.lanes:
                condition = T.broadcast(condition, self.emitter.machine.lanes)
        else:
            rows, columns, strict = e.arg
            lanes = self.places[rows].lanes or self.places[columns].lanes
            wide = inside.wide or lanes
            point = self if wide else ExprLowering(self.emitter, {a: self.places[a] for a in (rows, columns)})
            condition = point.compared(rows, columns, (lambda i, j: i > j) if strict else (lambda i, j: i >= j))
            if wide and not lanes and not any(p.lanes for p in self.places.values()):
                condition = T.broadcast(condition, self.emitter.machine.lanes)
        functions = self.emitter.vectors if wide else self.emitter.numbers
        return Value(T.Select(condition, self._spread(inside) if wide else inside.it, functions.const(0.0)), wide)
