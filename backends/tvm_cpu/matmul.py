"""Statements with products: tile after tile of accumulators in registers.

    tile z1[s, D1] = k[c] @ W1 + b1      for each 4 rows, 4 vectors: acc = b1; for each D: acc += k * W1; z1 = acc

What of a product depends on the row alone, or on the vector alone, is loaded once for the whole tile. The loops over a
tile are unrolled late, by TVM: everything before that is shorter by as much as a tile holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from tttc.backends.tvm_common.accumulators import Accumulation, accumulated, zeros
from tttc.backends.tvm_common.lowering import ExprLowering
from tttc.backends.tvm_common.statements import Statement
from tttc.backends.tvm_common.stores import Index, Places, Value
from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.emission import Emission
from tttc.ir.expr import Axis, Expr


class Tile(NamedTuple):
    """`high` rows from `first` on, where there are rows, by `wide` vectors from `block` on."""

    at: Places
    row: Axis | None
    first: Any
    high: int
    lane: Axis
    block: Any
    wide: int
    lanes: int
    beyond: bool
    """Whether the last rows may be tokens after the last one."""

    def rows(self, m: Any) -> Places:
        place = Index(self.first + m, ("row", _key(m)), beyond=self.beyond)
        return {**self.at, **({self.row: place} if self.row is not None else {})}

    def vectors(self, n: Any) -> Places:
        return {**self.at, self.lane: Index((self.block + n) * self.lanes, ("vector", _key(n)), lanes=True)}

    @property
    def last_row(self) -> Any:
        return self.first + (self.high - 1)


def _key(i: Any) -> int:
    return i if isinstance(i, int) else id(i)


@contextmanager
def _unrolled(*counts: int) -> Iterator[list[Any]]:
    """Loops that end as lines, one below the other; none where there is one pass."""
    with ExitStack() as stack:
        yield [0 if n == 1 else stack.enter_context(T.unroll(n)) for n in counts]


def products(e: Emission, s: Statement) -> None:
    """Tile after tile along the last two axes."""
    axes, lane = s.target.axes, s.lane
    assert lane is not None
    row = axes[-2] if len(axes) > 1 else None
    rows, vectors = 1 if row is None else e.capacity(row), e.blocks(lane)
    half = vectors != 1 and (len(axes) - 2, len(axes) - 1) in e.triangles[s.name]
    known = vectors if isinstance(vectors, int) else 1
    # what a tile reaches of the half beyond the diagonal is work for nothing
    high, wide = e.machine.micro_kernel(rows if isinstance(rows, int) else None, 2 - known % 2 if half else known)
    high = max(1, high // len(accumulated(s.value)))
    with e.loops(axes[:-2], {}) as at:
        if row is None:
            _across(e, s, Tile(at, None, 0, 1, lane, 0, wide, e.machine.lanes, False), half)
            return
        n = e.extent(row)
        known = isinstance(n, int)  # else the last tile may hold rows beyond the last token: there is memory for them
        with T.serial(n // high if known else T.truncdiv(n + (high - 1), high)) as i:
            _across(e, s, Tile(at, row, i * high, high, lane, 0, wide, e.machine.lanes, not known), half)
        if known and n % high:
            _across(e, s, Tile(at, row, n - n % high, n % high, lane, 0, wide, e.machine.lanes, False), half)


def _across(e: Emission, s: Statement, tile: Tile, half: bool) -> None:
    """All vectors of some rows; of a lower triangular matrix up to the diagonal, and then the zeros."""
    n, wide = e.blocks(tile.lane), tile.wide
    if half:
        reach = tile.lanes * wide
        end = n // wide if isinstance(n, int) else n
        filled = e.in_register(T.min(T.truncdiv(tile.last_row + reach, reach), end))
        with T.serial(filled) as j:
            _accumulate(e, s, tile._replace(block=j * wide))
        with T.serial(filled, end) as j, _unrolled(tile.high, wide) as (m, i):
            here = {**tile._replace(block=j * wide).vectors(i), **tile.rows(m)}
            e.stores[s.name].save([here[a] for a in s.target.axes], e.vectors.const(0.0))
        return
    e.each_blocks(tile.lane, wide, lambda first, count: _accumulate(e, s, tile._replace(block=first, wide=count)))


def _accumulate(e: Emission, s: Statement, tile: Tile) -> None:
    """One tile: every sum of products in registers, then what is made of them."""
    held = {}
    for product, total in accumulated(s.value).items():
        held[product] = e.registers(tile.high * tile.wide, e.machine.vector)
        _sum(e, total, held[product], tile)
    store = e.stores[s.name]
    with _unrolled(tile.high, tile.wide) as (m, n):
        here = {**tile.vectors(n), **tile.rows(m)}
        point = ExprLowering(e, here, {p: Value(buffer[m * tile.wide + n], True) for p, buffer in held.items()})
        value = point.wide(point.value(s.value))
        guarded = tile.row is not None and tile.beyond and store.shared
        with e.only_if(here[tile.row].index < e.tokens if guarded and tile.row is not None else None):
            store.save([here[a] for a in s.target.axes], value)


def _sum(e: Emission, total: Accumulation, held: Any, tile: Tile) -> None:
    """Fill the accumulators of a tile: with what is not a product, then product by product."""
    with _unrolled(tile.high, tile.wide) as (m, n):
        point = ExprLowering(e, {**tile.vectors(n), **tile.rows(m)})
        start = None
        for sign, x in total.others:
            v = point.wide(point.value(x))
            if start is None:
                start = v if sign > 0 else e.vectors.neg(v)
            else:
                start = start + v if sign > 0 else start - v
        T.buffer_store(held, e.vectors.const(0.0) if start is None else start, [m * tile.wide + n])
    for sign, product in total.products:
        with _summed(e, product, tile) as summed:
            _multiplied(e, sign, product.src, held, tile._replace(at={**tile.at, **summed}))


def _multiplied(e: Emission, sign: int, factors: Sequence[Expr], held: Any, tile: Tile) -> None:
    """Add one product to each accumulator: what rows share and what vectors share is there beforehand."""
    of_vectors = [f for f in factors if tile.lane in f.axes and tile.row not in f.axes]
    of_rows = [f for f in factors if tile.lane not in f.axes]
    apart = [f for f in factors if tile.lane in f.axes and tile.row in f.axes]
    rows, vectors = (e.registers(n, e.machine.vector) for n in (tile.high, tile.wide))
    if of_rows:
        with _unrolled(tile.high) as (m,):
            point = ExprLowering(e, tile.rows(m))
            T.buffer_store(rows, point.wide(point.product(of_rows)), [m])
    if of_vectors:
        with _unrolled(tile.wide) as (n,):
            point = ExprLowering(e, tile.vectors(n))
            T.buffer_store(vectors, point.wide(point.product(of_vectors)), [n])
    with _unrolled(tile.high, tile.wide) as (m, n):
        point = ExprLowering(e, {**tile.vectors(n), **tile.rows(m)})
        parts = [rows[m]] if of_rows else []
        parts += [vectors[n]] if of_vectors else []
        parts += [point.wide(point.value(f)) for f in apart]
        value = parts[0]
        for part in parts[1:]:
            value = value * part
        at = m * tile.wide + n
        T.buffer_store(held, held[at] + value if sign > 0 else held[at] - value, [at])


@contextmanager
def _summed(e: Emission, product: Expr, tile: Tile) -> Iterator[Mapping[Axis, Index]]:
    """Loops over the axes that a product sums over, but for the zeros of a masked matrix."""
    known = {pair for s in product.src for pair in zeros(s, e.triangles)}
    places: dict[Axis, Index] = {}
    with ExitStack() as stack:
        for k in product.arg:
            low, high = 0, e.extent(k)
            if tile.row is not None and (tile.row, k) in known:
                high = T.min(high, tile.last_row + 1)  # which may be a token beyond the last one
            if tile.row is not None and (k, tile.row) in known:
                low = tile.first
            i = stack.enter_context(T.serial(low, high))
            places[k] = Index(i, ("sum", id(i)))
        yield places
