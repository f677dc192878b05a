"""What all statements are written with: the sizes of a chunk, memory for its values, and loops over its axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

from tttc.backends.tvm_common.statements import TOKENS, Statement
from tttc.backends.tvm_common.stores import Index, Places, Store
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.arena import Scratch
from tttc.backends.tvm_cpu.machine import HIGHEST, Machine
from tttc.backends.tvm_cpu.ops import Functions
from tttc.ir.expr import Axes, Axis
from tttc.ir.names import spelled

LOCAL = {"disable_lower_builtin": True}  # a buffer that LLVM may turn into registers


class Emission:
    """A function of TensorIR that is being written, for one chunk."""

    def __init__(
        self, machine: Machine, dims: Mapping[str, int], tokens: Any, chunk: Any, scratch: Scratch | None = None
    ) -> None:
        self.machine, self.dims, self.tokens, self.chunk, self.scratch = machine, dims, tokens, chunk, scratch
        self.stores: dict[str, Store] = {}
        self.triangles: dict[str, set[tuple[int, int]]] = {}
        self.numbers = Functions(machine.dtype, 1, self.in_register)
        self.vectors = Functions(machine.dtype, machine.lanes, self.in_register)

    # -- sizes

    def extent(self, axis: Axis) -> Any:
        """How many entries an axis has in this chunk: an int, or for the tokens an expression."""
        return self.tokens if axis.size == TOKENS else self.dims[axis.size]

    def capacity(self, axis: Axis) -> Any:
        """How many it may have."""
        return self.chunk if axis.size == TOKENS else self.dims[axis.size]

    def blocks(self, axis: Axis) -> Any:
        """Vectors that hold an axis."""
        n, lanes = self.capacity(axis), self.machine.lanes
        return -(-n // lanes) if isinstance(n, int) else T.truncdiv(n + (lanes - 1), lanes)

    def shape(self, axes: Axes) -> list[Any]:
        """The sizes of a variable, with room for whole tiles of tokens, and for whole vectors along its last axis."""
        rows = [self.capacity(a) + (HIGHEST - 1 if a.size == TOKENS else 0) for a in axes[:-1]]
        return [*rows, *(self.blocks(a) * self.machine.lanes for a in axes[-1:])]

    # -- memory

    def reserve(self, name: str, axes: Axes, *, rows: int = 0) -> Store:
        """Memory for a variable of this function; where it is used, it is `declared`."""
        shape = self.shape(axes[rows:]) or [1]
        if self.scratch is not None and all(isinstance(n, int) for n in shape):
            self.stores[name] = self._part(name, shape, rows, self.scratch.alloc(prod(shape)))
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
                self.scratch.free(store.offset)

    def in_register(self, x: Any) -> Any:
        """A value in a register of its own: a binding would be computed again at every use."""
        kept = self.registers(1, str(x.ty.dtype))
        T.buffer_store(kept, x, [0])
        return kept[0]

    def registers(self, count: int, dtype: str) -> Any:
        """So many registers, as far as the machine has them."""
        return T.alloc_buffer((count,), dtype, scope="local", annotations=LOCAL, layout=None)

    # -- loops

    @contextmanager
    def loops(self, axes: Sequence[Axis], at: Places) -> Iterator[dict[Axis, Index]]:
        """Loops over the axes that stand nowhere yet."""
        places = dict(at)
        with ExitStack() as stack:
            for a in axes:
                if a not in places:
                    i = stack.enter_context(T.serial(self.extent(a)))
                    places[a] = Index(i, ("loop", id(i)))
            yield places

    def token_by_token(self, s: Statement, along: Axis, step: Callable[[Any, bool, Places], None]) -> None:
        """Token after token; all other axes inside, the last of them as vectors."""
        others = [a for a in s.target.axes if a != along]
        with T.serial(self.tokens) as t:
            here = {along: Index(t, ("token", id(t)))}
            with self.loops(others[:-1], here) as places:
                if others:
                    self.each_vector(others[-1], lambda block: step(t, True, {**places, others[-1]: block}))
                else:
                    step(t, False, places)

    def each_vector(self, axis: Axis, body: Callable[[Index], None]) -> None:
        """Vector after vector along an axis."""
        n = self.blocks(axis)
        if isinstance(n, int) and n <= self.machine.config.unrolled:
            for j in range(n):
                body(self._block(j))
        else:
            with T.serial(n) as j:
                body(self._block(j))

    def each_blocks(self, axis: Axis, wide: int, body: Callable[[Any, int], None]) -> None:
        """So many vectors at once along an axis, or as many as are left: the number of the first, and how many."""
        n = self.blocks(axis)
        if not isinstance(n, int) or n >= 2 * wide:
            with T.serial(n // wide if isinstance(n, int) else n) as j:
                body(j * wide, wide)
        elif n >= wide:
            body(0, wide)
        if isinstance(n, int) and n % wide:
            body(n - n % wide, n % wide)

    def _block(self, j: Any) -> Index:
        """One vector, by its number, which may be that of a pass of a loop."""
        return Index(j * self.machine.lanes, ("block", j if isinstance(j, int) else id(j)), lanes=True)

    @contextmanager
    def only_if(self, condition: Any) -> Iterator[None]:
        if condition is None:
            yield
            return
        with T.If(condition), T.Then():
            yield

    def functions(self, wide: bool) -> Functions:
        return self.vectors if wide else self.numbers

    def _count(self, over: Sequence[Axis]) -> Any:
        total = self.numbers.const(1.0)
        for a in over:
            total = total * self._size(a)
        return total

    def _size(self, axis: Axis) -> Any:
        n = self.extent(axis)
        return self.numbers.const(n) if isinstance(n, int) else T.Cast(self.machine.dtype, n)

    def _int(self, n: Any) -> Any:
        return tirx.const(n, "int32") if isinstance(n, int) else n

    def _lanes(self, place: Index) -> Any:
        return T.Ramp(self._int(place.index), tirx.const(1, "int32"), self.machine.lanes)
