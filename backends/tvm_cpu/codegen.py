"""Statements as TensorIR: tiles of accumulators in registers, rows of vectors, walks along the tokens.

Every axis of a statement stands somewhere: at an index, or, the axis of its vectors, at several at once. A value that
lacks the axis of the vectors is one number, and stays one until it meets a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tttc.backends.tvm_common.accumulators import triangle
from tttc.backends.tvm_common.loops import FusedLoop, by_vectors
from tttc.backends.tvm_common.lowering import ExprLowering
from tttc.backends.tvm_common.statements import Statement
from tttc.backends.tvm_common.stores import Index, Places, Registers, Store
from tttc.backends.tvm_common.tir import T, tirx
from tttc.backends.tvm_cpu.emission import Emission
from tttc.backends.tvm_cpu.matmul import products
from tttc.backends.tvm_cpu.recurrences import RECURRENCES
from tttc.ir.expr import Axis, leaves
from tttc.ir.names import spelled


class Emitter(Emission):
    """Writes the statements of a chunk into the function that is being built."""

    # -- groups

    def group(self, group: FusedLoop) -> None:
        """Run it, in a function of its own: for one that holds a whole chunk, LLVM takes twice as long."""
        self._reserve(group)
        outside = dict(self.stores)
        with T.attr(tirx.const(0, "int32"), "compute_scope", f"chunk_{spelled(group.statements[-1].name)}"):
            for e in leaves(x for s in group.statements for x in (s.value, s.target)):
                self._declare_again(e.name)
            self._reserve_rows(group)
            self._run(group)
        self.stores |= outside

    def _run(self, group: FusedLoop) -> None:
        if not group.rows:
            for s in group.statements:
                self.statement(s, {})
            return
        with T.serial(self.tokens) as t:
            for s in group.statements:
                assert s.row is not None
                self.statement(s, {s.row: Index(t, ("row",))})

    def _declare_again(self, name: str) -> None:
        """A function is given memory alone, not what was said of its parts outside."""
        store = self.stores.get(name)
        if type(store) is Store:
            self.stores[name] = self.declared(store)

    def _reserve(self, group: FusedLoop) -> None:
        """Memory for what is read elsewhere too."""
        for s in group.statements:
            self.triangles[s.name] = triangle(s, self.triangles)
            if s.name not in self.stores and s.name not in group.local:
                self.reserve(s.name, s.target.axes)

    def _reserve_rows(self, group: FusedLoop) -> None:
        """For a row of what is not: registers, where it is short, and nothing asks for a single number of it."""
        for s in group.statements:
            if s.name in self.stores:
                continue
            width = self.blocks(s.target.axes[-1]) if len(s.target.axes) == 2 else 0
            short = isinstance(width, int) and 0 < width <= self.machine.config.unrolled
            if short and by_vectors(s.name, group):
                buffer = self.registers(width, self.machine.vector)
                self.stores[s.name] = Registers(buffer, self.machine)
            elif len(s.target.axes) == 1:
                buffer = self.registers(1, self.machine.dtype)
                self.stores[s.name] = Store(buffer, self.machine, rows=1)
            else:
                self.stores[s.name] = self.declared(self.reserve(s.name, s.target.axes, rows=1))

    def statement(self, s: Statement, at: Places) -> None:
        if s.kind == "walk":
            RECURRENCES[s.value.op](self, s)
        else:
            getattr(self, f"_{s.kind}")(s, at)

    # -- elementwise and products

    def _turn(self, s: Statement, at: Places) -> None:
        """A copy with its last axis elsewhere: in square blocks of vectors where the new rows are whole ones."""
        across, down = s.value.axes[-1], s.target.axes[-1]
        lanes = self.machine.lanes
        if not isinstance(self.capacity(across), int) or self.capacity(across) % lanes:
            with self.loops(s.value.axes, at) as places:
                self._set(s, places)
            return
        source, target = self.stores[s.value.name], self.stores[s.name]
        last = self._int(self.extent(down)) - 1
        others = [a for a in s.value.axes if a not in (across, down)]
        with self.loops(others, at) as places, T.serial(self.blocks(down)) as i, T.serial(self.blocks(across)) as j:
            rows = []
            for m in range(lanes):
                here = {**places, down: Index(T.min(i * lanes + m, last), ("row", m)), across: self._block(j)}
                rows.append(self.in_register(source.load([here[a] for a in s.value.axes]).it))
            for m, row in enumerate(self._transposed(rows)):
                here = {**places, down: self._block(i), across: Index(j * lanes + m, ("row", m))}
                target.save([here[a] for a in s.target.axes], row)

    def _transposed(self, rows: list[Any]) -> list[Any]:
        """A square of vectors, turned: in each round the halves of two rows change places."""
        lanes = self.machine.lanes
        half = lanes // 2
        while half:
            first = [i if not i & half else lanes + i - half for i in range(lanes)]
            second = [i + half if not i & half else lanes + i for i in range(lanes)]
            turned = list(rows)
            for i in range(lanes):
                if not i & half:
                    pair = [rows[i], rows[i + half]]
                    turned[i], turned[i + half] = (
                        self.in_register(T.Shuffle(pair, index)) for index in (first, second)
                    )
            rows, half = turned, half // 2
        return rows

    def _tile(self, s: Statement, at: Places) -> None:
        if s.products:
            products(self, s)
            return
        rows = s.target.axes[:-1] if s.lane is not None else ()
        with self.loops(rows, at) as places:
            lane = s.lane
            if lane is None or lane in places:  # a number
                self._set(s, places)
            else:
                self.each_vector(lane, lambda block: self._set(s, {**places, lane: block}))

    def _set(self, s: Statement, places: Places) -> None:
        point = ExprLowering(self, places)
        value = point.value(s.value)
        wide = any(places[a].lanes for a in s.target.axes)
        self.stores[s.name].save([places[a] for a in s.target.axes], point.wide(value) if wide else value.it)

    # -- reductions

    def _row(self, s: Statement, at: Places) -> None:
        over = tuple(s.value.arg)
        if s.lane is None or s.lane not in over:
            self._sum_of_rows(s, at)
            return
        with self.loops(s.target.axes, at) as places:
            value = self._reduced(s, places)
            if s.value.op == "mean":
                value = value * self.numbers.const(1.0) / self._count(over)
            self.stores[s.name].save([places[a] for a in s.target.axes], value)

    def _joined(self, op: str) -> Callable[[Any, Any], Any]:
        return (lambda x, y: T.max(x, y)) if op == "max" else (lambda x, y: x + y)

    def _neutral(self, op: str) -> Any:
        return self.vectors.const(-3e38 if op == "max" else 0.0)

    def _reduced(self, s: Statement, places: Places) -> Any:
        """All entries along some axes as one number, the vectors along the last of them."""
        op, lane, join = s.value.op, s.lane, self._joined(s.value.op)
        assert lane is not None
        rest = [a for a in s.value.arg if a != lane]
        held = self.registers(1, self.machine.vector)
        n = self.blocks(lane)
        unrolled = isinstance(n, int) and n <= self.machine.config.unrolled and not rest

        def block(inside: Places, place: Index) -> Any:
            point = ExprLowering(self, {**inside, lane: place})
            return self._only_valid(point.wide(point.value(s.value.src[0])), lane, place, self._neutral(op))

        if unrolled:
            found = [block(places, self._block(j)) for j in range(n)]
            while len(found) > 1:
                found = [
                    self.in_register(join(found[i], found[i + 1])) if i + 1 < len(found) else found[i]
                    for i in range(0, len(found), 2)
                ]
            T.buffer_store(held, found[0], [0])
        else:
            T.buffer_store(held, self._neutral(op), [0])
            with self.loops(rest, places) as inside, T.serial(n) as j:
                T.buffer_store(held, join(held[0], block(inside, self._block(j))), [0])
        return self._across(held[0], join)

    def _only_valid(self, x: Any, axis: Axis, place: Index, neutral: Any) -> Any:
        """A vector without what lies beyond the end of its axis."""
        n, lanes = self.extent(axis), self.machine.lanes
        last = place.key[-1]
        if isinstance(n, int) and (n % lanes == 0 or (isinstance(place.index, int) and last * lanes + lanes <= n)):
            return x
        return T.Select(self._lanes(place) < T.broadcast(self._int(n), lanes), x, neutral)

    def _across(self, x: Any, join: Callable[[Any, Any], Any]) -> Any:
        """All lanes of a vector as one number."""
        half = self.machine.lanes // 2
        while half:
            x = self.in_register(x)
            x = join(x, T.Shuffle([x], [i ^ half for i in range(self.machine.lanes)]))
            half //= 2
        return T.Shuffle([self.in_register(x)], [0])

    def _sum_of_rows(self, s: Statement, at: Places) -> None:
        """A reduction that keeps the axis of the vectors, or has none."""
        join, op = self._joined(s.value.op), s.value.op
        lane = s.lane
        outside = [a for a in s.target.axes if a != lane]

        def one(places: Places) -> None:
            wide = lane is not None and places[lane].lanes
            functions = self.functions(wide)
            dtype = self.machine.vector if wide else self.machine.dtype
            held = self.registers(1, dtype)
            T.buffer_store(held, functions.const(-3e38 if op == "max" else 0.0), [0])
            with self.loops(tuple(s.value.arg), places) as inside:
                point = ExprLowering(self, inside)
                value = point.value(s.value.src[0])
                T.buffer_store(held, join(held[0], point.wide(value) if wide else value.it), [0])
            result = held[0]
            if op == "mean":
                count = self._count(s.value.arg)
                result = result / (functions.wide(count, "") if wide else count)
            self.stores[s.name].save([places[a] for a in s.target.axes], result)

        with self.loops(outside, at) as places:
            if lane is None or lane in places:
                one(places)
            else:
                self.each_vector(lane, lambda block: one({**places, lane: block}))
