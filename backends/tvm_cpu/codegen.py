"""Statements as TensorIR: tiles of accumulators in registers, rows of vectors, walks along the tokens.

Every axis of a statement stands somewhere: at an index, or, the axis of its vectors, at several at once. A value that
lacks the axis of the vectors is one number, and stays one until it meets a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from tttc.backends.tvm_common.accumulators import triangle
from tttc.backends.tvm_common.loops import Group, by_vectors
from tttc.backends.tvm_common.lowering import LOCAL, Place, Places, Point, Registers, Store
from tttc.backends.tvm_common.statements import TOKENS, Statement
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.arena import Scratch
from tttc.backends.tvm_cpu.machine import HIGHEST, Machine
from tttc.backends.tvm_cpu.matmul import products
from tttc.backends.tvm_cpu.ops import Functions
from tttc.backends.tvm_cpu.recurrences import RECURRENCES
from tttc.ir.expr import Axes, Axis, leaves
from tttc.ir.names import spelled


class Emitter:
    """Writes the statements of a chunk into the function that is being built."""

    def __init__(
        self, machine: Machine, dims: Mapping[str, int], tokens: Any, chunk: Any, scratch: Scratch | None = None
    ) -> None:
        self.machine, self.dims, self.tokens, self.chunk, self.scratch = machine, dims, tokens, chunk, scratch
        self.stores: dict[str, Store] = {}
        self.triangles: dict[str, set[tuple[int, int]]] = {}
        self.numbers = Functions(machine.dtype, 1, self.held)
        self.vectors = Functions(machine.dtype, machine.lanes, self.held)

    # -- sizes

    def extent(self, axis: Axis) -> Any:
        """How many entries an axis has in this chunk: an int, or for the tokens an expression."""
        return self.tokens if axis.size == TOKENS else self.dims[axis.size]

    def capacity(self, axis: Axis) -> Any:
        """How many it may have."""
        return self.chunk if axis.size == TOKENS else self.dims[axis.size]

    def blocks(self, axis: Axis) -> Any:
        """Vectors that hold an axis."""
        return (
            -(-self.capacity(axis) // self.machine.lanes)
            if isinstance(self.capacity(axis), int)
            else (T.truncdiv(self.capacity(axis) + (self.machine.lanes - 1), self.machine.lanes))
        )

    def shape(self, axes: Axes) -> list[Any]:
        """The sizes of a variable, with room for whole tiles of tokens, and for whole vectors along its last axis."""
        rows = [self.capacity(a) + (HIGHEST - 1 if a.size == TOKENS else 0) for a in axes[:-1]]
        return [*rows, *(self.blocks(a) * self.machine.lanes for a in axes[-1:])]

    def reserve(self, name: str, axes: Axes, *, rows: int = 0) -> Store:
        """Memory for a variable of this function; where it is used, it is `declared`."""
        shape = self.shape(axes[rows:]) or [1]
        if self.scratch is not None and all(isinstance(n, int) for n in shape):
            self.stores[name] = self._part(name, shape, rows, self.scratch.take(prod(shape)))
        else:
            buffer = T.alloc_buffer(tuple(shape), self.machine.dtype, scope="global", layout=None)
            self.stores[name] = Store(buffer, self.machine, rows=rows)
        return self.stores[name]

    def _part(self, name: str, shape: Sequence[Any], rows: int, offset: int) -> Store:
        """A variable in the scratch memory."""
        assert self.scratch is not None
        shown, data = spelled(name), self.scratch.block.data
        buffer = tirx.decl_buffer(tuple(shape), self.machine.dtype, shown, data=data, elem_offset=offset, layout=None)
        return Store(buffer, self.machine, rows=rows, offset=offset)

    def declared(self, store: Store) -> Store:
        """The same memory as TVM is told of it, which opens a scope that ends where the one around it does: hundreds of
        them, one in the other, are more than it can close. So each is told where it is used, and only there.
        """
        if self.scratch is None or store.offset is None:
            return store
        buffer = T.decl_buffer(
            store.buffer.shape,
            self.machine.dtype,
            data=self.scratch.block.data,
            elem_offset=store.offset,
            layout=None,
        )
        return Store(IRBuilder.name(store.buffer.name, buffer), self.machine, rows=store.rows, offset=store.offset)

    def release(self, names: Iterable[str]) -> None:
        """Forget variables; others may have their memory."""
        for name in names:
            store = self.stores.pop(name)
            self.triangles.pop(name, None)
            if self.scratch is not None and store.offset is not None:
                self.scratch.give_back(store.offset)

    def held(self, x: Any) -> Any:
        """A value in a register of its own: a binding would be computed again at every use."""
        kept = T.alloc_buffer((1,), str(x.ty.dtype), scope="local", annotations=LOCAL, layout=None)
        T.buffer_store(kept, x, [0])
        return kept[0]

    # -- groups

    def group(self, group: Group) -> None:
        """Run it, in a function of its own: for one that holds a whole chunk, LLVM takes twice as long."""
        self._reserve(group)
        outside = dict(self.stores)
        with T.attr(tirx.const(0, "int32"), "compute_scope", f"chunk_{spelled(group.statements[-1].name)}"):
            for e in leaves(x for s in group.statements for x in (s.value, s.target)):
                self._declare_again(e.name)
            self._reserve_rows(group)
            self._run(group)
        self.stores |= outside

    def _run(self, group: Group) -> None:
        if not group.rows:
            for s in group.statements:
                self.statement(s, {})
            return
        with T.serial(self.tokens) as t:
            for s in group.statements:
                assert s.row is not None
                self.statement(s, {s.row: Place(t, ("row",))})

    def _declare_again(self, name: str) -> None:
        """A function is given memory alone, not what was said of its parts outside."""
        store = self.stores.get(name)
        if type(store) is Store:
            self.stores[name] = self.declared(store)

    def _reserve(self, group: Group) -> None:
        """Memory for what is read elsewhere too."""
        for s in group.statements:
            self.triangles[s.name] = triangle(s, self.triangles)
            if s.name not in self.stores and s.name not in group.local:
                self.reserve(s.name, s.target.axes)

    def _reserve_rows(self, group: Group) -> None:
        """For a row of what is not: registers, where it is short, and nothing asks for a single number of it."""
        for s in group.statements:
            if s.name in self.stores:
                continue
            width = self.blocks(s.target.axes[-1]) if len(s.target.axes) == 2 else 0
            short = isinstance(width, int) and 0 < width <= self.machine.config.unrolled
            if short and by_vectors(s.name, group):
                buffer = T.alloc_buffer((width,), self.machine.vector, scope="local", annotations=LOCAL, layout=None)
                self.stores[s.name] = Registers(buffer, self.machine)
            elif len(s.target.axes) == 1:
                buffer = T.alloc_buffer((1,), self.machine.dtype, scope="local", annotations=LOCAL, layout=None)
                self.stores[s.name] = Store(buffer, self.machine, rows=1)
            else:
                self.stores[s.name] = self.declared(self.reserve(s.name, s.target.axes, rows=1))

    def statement(self, s: Statement, at: Places) -> None:
        if s.kind == "walk":
            RECURRENCES[s.value.op](self, s)
        else:
            getattr(self, f"_{s.kind}")(s, at)

    @contextmanager
    def loops(self, axes: Sequence[Axis], at: Places) -> Iterator[dict[Axis, Place]]:
        """Loops over the axes that stand nowhere yet."""
        places = dict(at)
        frames = []
        for a in axes:
            if a not in places:
                frame = T.serial(self.extent(a))
                frames.append(frame)
                i = frame.__enter__()
                places[a] = Place(i, ("loop", id(i)))
        yield places
        for frame in reversed(frames):
            frame.__exit__(None, None, None)

    def token_by_token(self, s: Statement, along: Axis, step: Callable[[Any, bool, Places], None]) -> None:
        """Token after token; all other axes inside, the last of them as vectors."""
        others = [a for a in s.target.axes if a != along]
        with T.serial(self.tokens) as t:
            here = {along: Place(t, ("token", id(t)))}
            with self.loops(others[:-1], here) as places:
                if others:
                    self.each_vector(others[-1], lambda block: step(t, True, {**places, others[-1]: block}))
                else:
                    step(t, False, places)

    def each_vector(self, axis: Axis, body: Callable[[Place], None]) -> None:
        """Vector after vector along an axis."""
        n = self.blocks(axis)
        if isinstance(n, int) and n <= self.machine.config.unrolled:
            for j in range(n):
                body(self._block(j))
        else:
            with T.serial(n) as j:
                body(self._block(j))

    def each_blocks(self, axis: Axis, wide: int, body: Callable[[list[Place]], None]) -> None:
        """So many vectors at once along an axis."""
        n = self.blocks(axis)
        if not isinstance(n, int) or n >= 2 * wide:
            with T.serial(n // wide if isinstance(n, int) else n) as j:
                body([Place((j * wide + i) * self.machine.lanes, ("block", id(j), i), lanes=True) for i in range(wide)])
        elif n >= wide:
            body([self._block(j) for j in range(wide)])
        if isinstance(n, int) and n % wide:
            body([self._block(j) for j in range(n - n % wide, n)])

    def _block(self, j: Any) -> Place:
        """One vector, by its number, which may be that of a pass of a loop."""
        return Place(j * self.machine.lanes, ("block", j if isinstance(j, int) else id(j)), lanes=True)

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
                here = {**places, down: Place(T.min(i * lanes + m, last), ("row", m)), across: self._block(j)}
                rows.append(self.held(source.load([here[a] for a in s.value.axes]).it))
            for m, row in enumerate(self._transposed(rows)):
                here = {**places, down: self._block(i), across: Place(j * lanes + m, ("row", m))}
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
                    turned[i], turned[i + half] = (self.held(T.Shuffle(pair, index)) for index in (first, second))
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
        point = Point(self, places)
        value = point.value(s.value)
        wide = any(places[a].lanes for a in s.target.axes)
        self.stores[s.name].save([places[a] for a in s.target.axes], point.wide(value) if wide else value.it)

    @contextmanager
    def only_if(self, condition: Any) -> Iterator[None]:
        if condition is None:
            yield
            return
        with T.If(condition), T.Then():
            yield

    def functions(self, wide: bool) -> Functions:
        return self.vectors if wide else self.numbers

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

    def _count(self, over: Sequence[Axis]) -> Any:
        total = self.numbers.const(1.0)
        for a in over:
            total = total * self._size(a)
        return total

    def _size(self, axis: Axis) -> Any:
        n = self.extent(axis)
        return self.numbers.const(n) if isinstance(n, int) else T.Cast(self.machine.dtype, n)

    def _joined(self, op: str) -> Callable[[Any, Any], Any]:
        return (lambda x, y: T.max(x, y)) if op == "max" else (lambda x, y: x + y)

    def _neutral(self, op: str) -> Any:
        return self.vectors.const(-3e38 if op == "max" else 0.0)

    def _reduced(self, s: Statement, places: Places) -> Any:
        """All entries along some axes as one number, the vectors along the last of them."""
        op, lane, join = s.value.op, s.lane, self._joined(s.value.op)
        assert lane is not None
        rest = [a for a in s.value.arg if a != lane]
        held = T.alloc_buffer((1,), self.machine.vector, scope="local", annotations=LOCAL, layout=None)
        n = self.blocks(lane)
        unrolled = isinstance(n, int) and n <= self.machine.config.unrolled and not rest

        def block(inside: Places, place: Place) -> Any:
            point = Point(self, {**inside, lane: place})
            return self._only_valid(point.wide(point.value(s.value.src[0])), lane, place, self._neutral(op))

        if unrolled:
            found = [block(places, self._block(j)) for j in range(n)]
            while len(found) > 1:
                found = [
                    self.held(join(found[i], found[i + 1])) if i + 1 < len(found) else found[i]
                    for i in range(0, len(found), 2)
                ]
            T.buffer_store(held, found[0], [0])
        else:
            T.buffer_store(held, self._neutral(op), [0])
            with self.loops(rest, places) as inside, T.serial(n) as j:
                T.buffer_store(held, join(held[0], block(inside, self._block(j))), [0])
        return self._across(held[0], join)

    def _only_valid(self, x: Any, axis: Axis, place: Place, neutral: Any) -> Any:
        """A vector without what lies beyond the end of its axis."""
        n, lanes = self.extent(axis), self.machine.lanes
        last = place.key[-1]
        if isinstance(n, int) and (n % lanes == 0 or (isinstance(place.index, int) and last * lanes + lanes <= n)):
            return x
        return T.Select(self._lanes(place) < T.broadcast(self._int(n), lanes), x, neutral)

    def _int(self, n: Any) -> Any:
        return tirx.const(n, "int32") if isinstance(n, int) else n

    def _lanes(self, place: Place) -> Any:
        return T.Ramp(self._int(place.index), tirx.const(1, "int32"), self.machine.lanes)

    def _across(self, x: Any, join: Callable[[Any, Any], Any]) -> Any:
        """All lanes of a vector as one number."""
        half = self.machine.lanes // 2
        while half:
            x = self.held(x)
            x = join(x, T.Shuffle([x], [i ^ half for i in range(self.machine.lanes)]))
            half //= 2
        return T.Shuffle([self.held(x)], [0])

    def _sum_of_rows(self, s: Statement, at: Places) -> None:
        """A reduction that keeps the axis of the vectors, or has none."""
        join, op = self._joined(s.value.op), s.value.op
        lane = s.lane
        outside = [a for a in s.target.axes if a != lane]

        def one(places: Places) -> None:
            wide = lane is not None and places[lane].lanes
            functions = self.functions(wide)
            dtype = self.machine.vector if wide else self.machine.dtype
            held = T.alloc_buffer((1,), dtype, scope="local", annotations=LOCAL, layout=None)
            T.buffer_store(held, functions.const(-3e38 if op == "max" else 0.0), [0])
            with self.loops(tuple(s.value.arg), places) as inside:
                point = Point(self, inside)
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
