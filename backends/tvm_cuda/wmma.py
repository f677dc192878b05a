"""Matrix products on tensor cores, through the wmma intrinsics: a warp makes a tile of 16 x 16 after the other.

x1[t, E] = b[E] - q[t, D] @ W[D, E]
->
round q, W            once where they change, with zeros up to whole sixteens
each warp, tile by tile: fragments of q and W, sums in float32; these through shared memory to the threads of the
warp, which finish the statement element by element
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tttc.backends.tvm_common.accumulators import accumulated
from tttc.backends.tvm_common.statements import Statement
from tttc.backends.tvm_common.stores import Index, Store
from tttc.backends.tvm_common.tir import IRBuilder, T
from tttc.backends.tvm_cuda.device import WARP
from tttc.backends.tvm_cuda.phases import MatrixProduct, Operand
from tttc.backends.tvm_cuda.simt import Threads, shorter, split
from tttc.ir.expr import Axes, Expr
from tttc.ir.names import own

SIDE = 16
SPREAD = 8  # numbers by which a row is longer than its matrix: rows then begin in different banks


class Half(NamedTuple):
    """A rounded matrix in memory: its buffer, where it begins there, and the length of its rows."""

    buffer: Any
    first: Any
    stride: Any


def sixteens(n: Any) -> Any:
    """How many tiles hold n numbers: sixteens(17) is 2."""
    return -(-n // SIDE) if isinstance(n, int) else T.truncdiv(n + (SIDE - 1), SIDE)


def rounded(threads: Threads, axes: Axes, source: Store, target: Half) -> None:
    """A matrix as an operand: rounded once, and zero beyond its end, so that whatever meets that counts for nothing."""
    dtype = str(target.buffer.dtype)
    sizes = [sixteens(threads.capacity(a)) * SIDE for a in axes]
    with threads.each(sizes[0] * sizes[1]) as e:
        indices = split(e, sizes)
        at = target.first + indices[0] * target.stride + indices[1]
        conditions = [
            i < threads.extent(a)
            for i, a, n in zip(indices, axes, sizes, strict=True)
            if not (isinstance(threads.extent(a), int) and threads.extent(a) == n)
        ]
        places = [Index(i, threads.key("element")) for i in indices]
        if not conditions:
            T.buffer_store(target.buffer, shorter(source.load(places).it, dtype), [at])
            return
        with T.If(T.And(*conditions) if len(conditions) > 1 else conditions[0]):
            with T.Then():
                T.buffer_store(target.buffer, shorter(source.load(places).it, dtype), [at])
            with T.Else():
                T.buffer_store(target.buffer, shorter(T.float32(0.0), dtype), [at])


def tiles_of(products: Mapping[Expr, Sequence[MatrixProduct]]) -> list[tuple[Expr, int, list[MatrixProduct]]]:
    """What has accumulators of its own: the products that one sum adds, and those that it takes away."""
    return [
        (e, sign, chosen)
        for e, found in products.items()
        for sign in (1, -1)
        if (chosen := [p for p in found if p.sign == sign])
    ]


def multiplied(
    threads: Threads,
    s: Statement,
    products: Mapping[Expr, Sequence[MatrixProduct]],
    halves: Mapping[str, Half],
    exchange: Any,
) -> None:
    """A statement whose products tensor cores run. `exchange` has a tile for every accumulator of every warp."""
    row, column = s.target.axes
    down, across = (sixteens(threads.capacity(a)) for a in (row, column))
    sums, tiles = accumulated(s.value), tiles_of(products)
    mine = threads.warp * (len(tiles) * SIDE * SIDE)
    with threads.each(down * across, warps=True) as number:
        i, j = (threads.named(own(n), x)[0] for n, x in zip("ij", split(number, [down, across]), strict=True))
        for n, (_, _, chosen) in enumerate(tiles):
            total = _fragment("total", "float32", "accumulator")
            T.evaluate(T.tvm_fill_fragment(total.data, SIDE, SIDE, SIDE, 0, T.float32(0.0)))
            for p in chosen:
                with T.serial(sixteens(threads.capacity(p.over))) as k:
                    left = _loaded("matrix_a", halves[p.left.name], p.left, i, k)
                    right = _loaded("matrix_b", halves[p.right.name], p.right, k, j)
                    T.evaluate(T.tvm_mma_sync(total.data, 0, left.data, 0, right.data, 0, total.data, 0))
            to = exchange.access_ptr("w", offset=mine + n * SIDE * SIDE)
            T.evaluate(T.tvm_store_matrix_sync(total.data, SIDE, SIDE, SIDE, 0, to, SIDE, "row_major"))
        threads.syncwarp()
        with T.serial(SIDE * SIDE // WARP) as m:
            at = m * WARP + threads.lane
            place, inside = threads.within(row, i * SIDE + T.truncdiv(at, SIDE))
            other, inside_too = threads.within(column, j * SIDE + T.truncmod(at, SIDE))
            with threads.only_if(T.And(inside, inside_too)):
                found: dict[Expr, Any] = {}
                for n, (e, sign, _) in enumerate(tiles):
                    value = exchange[mine + n * SIDE * SIDE + at]
                    if sign > 0:
                        found[e] = value
                    else:
                        found[e] = found[e] - value if e in found else threads.numbers.neg(value)
                threads.finish(s, sums, {row: place, column: other}, found)
        threads.syncwarp()


def _fragment(name: str, dtype: str, kind: str) -> Any:
    return IRBuilder.name(name, T.alloc_buffer((SIDE * SIDE,), dtype, scope=f"wmma.{kind}"))


def _loaded(kind: str, matrix: Half, operand: Operand, down: Any, across: Any) -> Any:
    """The tile of an operand at some tile row and column; from a matrix that lies the other way, turned."""
    fragment = _fragment("a" if kind == "matrix_a" else "b", matrix.buffer.dtype, kind)
    i, j = (down, across) if operand.rows else (across, down)
    at = matrix.buffer.access_ptr("r", offset=matrix.first + i * SIDE * matrix.stride + j * SIDE)
    layout = "row_major" if operand.rows else "col_major"
    T.evaluate(T.tvm_load_matrix_sync(fragment.data, SIDE, SIDE, SIDE, 0, at, matrix.stride, layout))
    return fragment
