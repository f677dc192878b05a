"""Statements done by a block of threads: a number or a tile of products for each thread, a row of tokens for each warp.

    tile without products   every thread its own elements, neighbours next to each other in memory
    tile with products      every thread a small tile of accumulators; tensor cores where they take it (wmma.py)
    rows of the tokens      every warp its own tokens, its threads along the last axis, sums by shuffles
    walk                    every thread its own columns, token after token

All threads come to every meeting (`syncthreads`), none of which is inside a condition that they see differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from tttc.backends.tvm_common.accumulators import Accumulation, accumulated
from tttc.backends.tvm_common.loops import FusedLoop
from tttc.backends.tvm_common.lowering import ExprLowering
from tttc.backends.tvm_common.statements import TOKENS, Statement, read
from tttc.backends.tvm_common.stores import Index, Places, Store, Value
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.codegen import Emitter
from tttc.backends.tvm_cpu.recurrences import RECURRENCES
from tttc.backends.tvm_cuda.device import WARP, Device
from tttc.backends.tvm_cuda.ops import DeviceFunctions
from tttc.backends.tvm_cuda.phases import lane
from tttc.ir.expr import Axes, Axis, Expr
from tttc.ir.names import Word, own, suffixed
from tttc.ir.ops import is_upper

TILES = ((8, 4), (4, 4), (2, 4), (2, 2), (1, 2), (1, 1))  # rows and columns of a thread's accumulators


class Threads(Emitter):
    """Writes what the threads of a block do into the function that is being built."""

    def __init__(self, device: Device, dims: Mapping[str, int], thread: Any, called: Word) -> None:
        super().__init__(device, dims, tirx.const(1, "int32"), 1)
        self.device, self.called = device, called
        self.numbers = self.vectors = DeviceFunctions(device.dtype, 1, self.in_register)
        self.thread = thread
        self.warp, self.lane = T.truncdiv(thread, WARP), T.truncmod(thread, WARP)
        self.slots: dict[Any, Any] = {}
        self._numbers = count()

    def in_register(self, x: Any) -> Any:
        """A value in a register of its own."""
        return self.named(own("r"), x)[0]

    def named(self, name: str, x: Any) -> Any:
        """A variable of one thread, which begins as this value."""
        kept = self.local(name, 1, str(x.ty.dtype))
        T.buffer_store(kept, x, [0])
        return kept

    def local(self, name: str, n: int, dtype: str | None = None) -> Any:
        """Registers of one thread."""
        return IRBuilder.name(self.called(name), T.alloc_buffer((n,), dtype or self.device.dtype, scope="local"))

    def key(self, kind: str) -> tuple[str, int]:
        """A key of a place that no other has."""
        return kind, next(self._numbers)

    def syncthreads(self) -> None:
        """All threads of the block wait for each other, and see what the others wrote."""
        T.evaluate(T.tvm_storage_sync("shared"))

    def syncwarp(self) -> None:
        """The threads of a warp wait for each other; for `tvm_storage_sync("warp")` TVM writes nothing."""
        T.evaluate(T.call_extern("int32", "__syncwarp"))

    # -- who does what

    @contextmanager
    def each(self, n: Any, *, warps: bool = False) -> Iterator[Any]:
        """The numbers below n, dealt out to the threads, or to the warps."""
        width, index = (self.device.warps, self.warp) if warps else (self.device.threads, self.thread)
        with ExitStack() as stack:
            known = isinstance(n, int)
            if known and n <= width:
                e = index
            else:
                e = stack.enter_context(T.serial(_quotient(n, width))) * width + index
            stack.enter_context(self.only_if(None if known and n % width == 0 else e < n))
            yield e

    @contextmanager
    def elements(self, axes: Axes, *, warps: bool = False) -> Iterator[dict[Axis, Index]]:
        """Every element of these axes, the last axis along neighbouring threads."""
        sizes = [self.extent(axes[0]), *(self.capacity(a) for a in axes[1:])] if axes else []
        with self.each(_product(sizes), warps=warps) as e, ExitStack() as stack:
            indices = split(e, sizes)
            for a, i in zip(axes[1:], indices[1:], strict=True):
                if a.size == TOKENS:
                    stack.enter_context(self.only_if(i < self.tokens))
            yield {a: Index(i, self.key("element")) for a, i in zip(axes, indices, strict=True)}

    @contextmanager
    def along(self, axis: Axis) -> Iterator[Index]:
        """An axis along the threads of a warp."""
        n = self.extent(axis)
        key = self.key("lane")
        with ExitStack() as stack:
            rounds = _quotient(n, WARP)
            slot = 0 if isinstance(rounds, int) and rounds == 1 else stack.enter_context(T.serial(rounds))
            self.slots[key] = slot
            index = slot * WARP + self.lane
            stack.enter_context(self.only_if(None if isinstance(n, int) and n % WARP == 0 else index < n))
            yield Index(index, key)

    @contextmanager
    def loops(self, axes: Sequence[Axis], at: Places) -> Iterator[dict[Axis, Index]]:
        """Loops of every thread over axes that stand nowhere yet."""
        with ExitStack() as stack:
            new = [a for a in axes if a not in at]
            yield {**at, **{a: Index(stack.enter_context(T.serial(self.extent(a))), self.key("loop")) for a in new}}

    # -- groups of statements

    def group(self, group: FusedLoop, registers: Collection[str] = ()) -> None:
        if group.rows:
            self._rows(group, registers)
            return
        for s in group.statements:
            if s.kind == "walk":
                self._walk(s)
            elif s.kind == "row":
                self._reduction(s)
            elif s.products:
                self._products(s)
            else:
                with self.elements(s.target.axes) as places:
                    self._set(s, places)

    def comment(self, text: str) -> None:
        """A line of the source."""
        T.evaluate(T.call_extern("int32", "COMMENT", text))

    def _set(self, s: Statement, places: Places) -> None:
        self._save(s, places, ExprLowering(self, places).value(s.value).it)

    def _save(self, s: Statement, places: Places, value: Any) -> None:
        self.stores[s.name].save([places[a] for a in s.target.axes], value)

    # -- rows

    def _rows(self, group: FusedLoop, registers: Collection[str]) -> None:
        """Statement after statement for the tokens of a warp, which meets where a thread reads what another wrote."""
        row = group.statements[0].row
        assert row is not None
        for s in group.statements:
            if s.name in registers:
                slots = -(-self.dims[s.target.axes[-1].size] // WARP) if len(s.target.axes) == 2 else 1
                self.stores[s.name] = InRegisters(self.local(s.name, slots), self)
        with self.each(self.tokens, warps=True) as t:
            written: set[str] = set()
            for s in group.statements:
                assert s.row is not None
                at = {s.row: Index(t, ("row",))}
                if self._of_others(s, at, written):
                    self.syncwarp()
                    written.clear()
                self._in_row(s, at, s.name in registers)
                written |= {s.name} - set(registers)

    def _of_others(self, s: Statement, at: Places, written: Collection[str]) -> bool:
        """Whether a thread reads here what another thread of its warp wrote."""
        across = lane(s, at)
        return any(e.name in written and not (len(axes) > 1 and axes[-1] == across) for e, axes in read(s.value))

    def _in_row(self, s: Statement, at: Places, registers: bool) -> None:
        free = [a for a in s.target.axes if a not in at]
        across = lane(s, at)
        if s.kind == "row" and across in s.value.arg:
            with self.loops(free, at) as places:
                value = self._total(s, places, across)
                with self.only_if(None if registers else self.lane < 1):
                    self._save(s, places, value)
            return
        if across is None:
            value = ExprLowering(self, at).value(s.value).it
            with self.only_if(None if registers else self.lane < 1):
                self._save(s, at, value)
            return
        with self.loops(free[:-1], at) as places, self.along(across) as place:
            here = {**places, across: place}
            self._save(
                s, here, self._total(s, here, None) if s.kind == "row" else ExprLowering(self, here).value(s.value).it
            )

    # -- reductions

    def _reduction(self, s: Statement) -> None:
        """One that is no part of a row: for each result a warp, or where neighbours are read along it a thread."""
        across = lane(s, ())
        shared = across in s.value.arg
        with self.elements(s.target.axes, warps=shared) as places:
            value = self._total(s, places, across if shared else None)
            with self.only_if(self.lane < 1 if shared else None):
                self._save(s, places, value)

    def _total(self, s: Statement, places: Places, across: Axis | None) -> Any:
        """All entries along the summed axes; with `across` by a warp, every thread of which has the result."""
        join, over = self._joined(s.value.op), s.value.arg
        held = self.local(own("total"), 1)
        T.buffer_store(held, self.numbers.const(-3e38 if s.value.op == "max" else 0.0), [0])
        with self.loops([a for a in over if a != across], places) as inside, ExitStack() as stack:
            here = inside if across is None else {**inside, across: stack.enter_context(self.along(across))}
            T.buffer_store(held, join(held[0], ExprLowering(self, here).value(s.value.src[0]).it), [0])
        for step in (16, 8, 4, 2, 1) if across is not None else ():
            other = T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), held[0], step, WARP, WARP)
            T.buffer_store(held, join(held[0], other), [0])
        return held[0] / self._count(over) if s.value.op == "mean" else held[0]

    # -- products

    def _products(self, s: Statement) -> None:
        """Products: each thread a tile of accumulators, whose columns lie as far apart as there are tiles in a row."""
        axes, sums = s.target.axes, accumulated(s.value)
        outer, (row, column) = axes[:-2], (None, None, *axes)[-2:]
        rows, columns = (1 if a is None else self.capacity(a) for a in (row, column))
        high, wide = self._tile_size(rows, columns, [self.capacity(a) for a in outer], len(sums))
        down, across = (_quotient(n, k) for n, k in ((rows, high), (columns, wide)))
        sizes = [*(self.capacity(a) for a in outer), down, across]
        with self.each(_product(sizes)) as e, ExitStack() as stack:
            *at, i, j = split(e, sizes)
            places: dict[Axis, Index] = {}
            for a, index in zip(outer, at, strict=True):
                places[a], inside = self.within(a, index, whole=a.size != TOKENS)
                stack.enter_context(self.only_if(inside))
            tile: list[tuple[dict[Axis, Index], list[Any]]] = [(dict(places), []) for _ in range(high * wide)]
            for axis, n, first, far in ((row, high, i * high, 1), (column, wide, j, across)):
                if axis is None:
                    continue
                whole = axis.size != TOKENS and self.dims[axis.size] % n == 0
                made = [self.within(axis, first + m * far, whole=whole) for m in range(n)]
                for number, (here, guards) in enumerate(tile):
                    place, inside = made[number // wide if axis is row else number % wide]
                    here[axis] = place
                    guards += [inside] if inside is not None else []
            self._accumulate_tile(s, sums, tile)

    def _tile_size(self, rows: Any, columns: Any, outer: Sequence[Any], sums: int) -> tuple[int, int]:
        """The largest tile that leaves every thread one."""
        rows, columns = (n if isinstance(n, int) else 256 for n in (rows, columns))
        others = _product([n if isinstance(n, int) else 16 for n in outer])
        for high, wide in TILES:
            fits = high <= rows and wide <= columns and high * wide * sums <= 32
            if fits and others * -(-rows // high) * -(-columns // wide) >= self.device.threads:
                return high, wide
        return 1, 1

    def within(self, axis: Axis, index: Any, *, whole: bool = False) -> tuple[Index, Any]:
        """A place on an axis, the last one for an index beyond it, and the condition that it is not beyond; with
        `whole` it never is.
        """
        n = self.extent(axis)
        held = self.named(suffixed(axis.name, "at"), index)[0]
        if whole:
            return Index(held, self.key("tile")), None
        return Index(T.min(held, self._int(n) - 1), self.key("tile")), held < n

    def _accumulate_tile(
        self, s: Statement, sums: Mapping[Expr, Accumulation], tile: Sequence[tuple[dict[Axis, Index], list[Any]]]
    ) -> None:
        held = {}
        for e, total in sums.items():
            held[e] = self.local(suffixed(s.name, "sum"), len(tile))
            for m in range(len(tile)):
                T.buffer_store(held[e], self.numbers.const(0.0), [m])
            for sign, p in total.products:
                with self.loops(p.arg, {}) as summed:
                    memo: dict[Any, Value] = {}
                    for m, (here, _) in enumerate(tile):
                        product = ExprLowering(self, {**here, **summed}, memo=memo).product(p.src).it
                        T.buffer_store(held[e], held[e][m] + product if sign > 0 else held[e][m] - product, [m])
        for m, (here, guards) in enumerate(tile):
            with ExitStack() as stack:
                for guard in guards:
                    stack.enter_context(self.only_if(guard))
                self.finish(s, sums, here, {e: held[e][m] for e in sums})

    def finish(
        self, s: Statement, sums: Mapping[Expr, Accumulation], here: Places, products: Mapping[Expr, Any]
    ) -> None:
        """What is made of the products at one place: added to what else their sums have, and stored."""
        found = {}
        point = ExprLowering(self, here)
        for e, value in products.items():
            for sign, other in sums[e].others:
                x = point.value(other).it
                value = value + x if sign > 0 else value - x
            found[e] = Value(self.in_register(value), False)
        self._save(s, here, ExprLowering(self, here, found).value(s.value).it)

    # -- along the tokens

    def _walk(self, s: Statement) -> None:
        if s.value.op == "solve":
            self._solve(s)
        else:
            RECURRENCES[s.value.op](self, s)

    def token_by_token(self, s: Statement, along: Axis, step: Callable[[Any, bool, Places], None]) -> None:
        """Each thread its own columns, token after token."""
        others = tuple(a for a in s.target.axes if a != along)
        with self.elements(others) as places, T.serial(self.tokens) as t:
            step(t, False, {**places, along: Index(t, self.key("token"))})

    def _solve(self, s: Statement) -> None:
        """x[t] = right[t] - sum over s < t of matrix[t, s] * x[s], and from the last token back where it is upper."""
        known, unknown = s.value.arg
        matrix, right = s.value.src
        upper = is_upper(s.value)
        others = tuple(a for a in s.target.axes if a != unknown)
        with self.elements(others) as places, T.serial(self.tokens) as i:
            t = self.tokens - 1 - i if upper else i
            row = Index(t, self.key("token"))
            held = self.named(own("solved"), ExprLowering(self, {**places, known: row}).value(right).it)
            with T.serial(t + 1, self.tokens) if upper else T.serial(t) as j:
                inner = ExprLowering(self, {**places, known: row, unknown: Index(j, self.key("solved"))})
                found = self.stores[s.name].load([inner.places[a] for a in s.target.axes])
                T.buffer_store(held, held[0] - inner.value(matrix).it * found.it, [0])
            self._save(s, {**places, unknown: row}, held[0])


class InRegisters(Store):
    """A number of each token of a warp, or a row of it, spread over the threads of the warp."""

    def __init__(self, buffer: Any, threads: Threads) -> None:
        super().__init__(buffer, threads.device)
        self.slots = threads.slots

    def _at(self, places: Sequence[Index]) -> list[Any]:
        return [self.slots[places[-1].key] if len(places) > 1 else 0]


class Converted(Store):
    """A tensor of the caller whose numbers are stored shorter than they are computed with."""

    def load(self, places: Sequence[Index]) -> Value:
        name = "__bfloat162float" if str(self.buffer.dtype) == "bfloat16" else "__half2float"
        return Value(T.call_pure_extern("float32", name, self.buffer[tuple(self._at(places))]), False)

    def save(self, places: Sequence[Index], value: Any) -> None:
        T.buffer_store(self.buffer, shorter(value, str(self.buffer.dtype)), self._at(places))


def shorter(x: Any, dtype: str) -> Any:
    """A float32 rounded to the nearest of a shorter dtype, by functions that every way to compile CUDA has."""
    name = "__float2bfloat16_rn" if dtype == "bfloat16" else "__float2half_rn"
    return T.call_pure_extern(dtype, name, x)


def split(e: Any, sizes: Sequence[Any]) -> list[Any]:
    """A number as the indices of an array, the last one running fastest."""
    found = []
    for i, n in enumerate(reversed(sizes)):
        first = i == len(sizes) - 1
        found.append(e if first else T.truncmod(e, n))
        e = e if first else T.truncdiv(e, n)
    return found[::-1]


def _quotient(n: Any, k: int) -> Any:
    """How many pieces of k hold n."""
    return -(-n // k) if isinstance(n, int) else T.truncdiv(n + (k - 1), k)


def _product(sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for n in sizes:
        total = n * total if isinstance(total, int) and total == 1 else total * n
    return total
