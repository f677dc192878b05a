"""Scans as kernels for a GPU: a block of threads for each batch element and head, chunk after chunk.

A chunk is done phase by phase (phases.py), each by all threads together (simt.py); smem.py says which values lie on the
chip. Between two phases that touch the same memory the threads meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tttc.backends.tvm_common.kernels import Kernel
from tttc.backends.tvm_common.loops import fuse_loops
from tttc.backends.tvm_common.statements import TOKENS, statements
from tttc.backends.tvm_common.stores import Store
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cuda.device import Device
from tttc.backends.tvm_cuda.kernel_text import CudaWords
from tttc.backends.tvm_cuda.phases import Phase, Steps, half, matrix_products, plan_phases
from tttc.backends.tvm_cuda.simt import Converted, Threads
from tttc.backends.tvm_cuda.smem import FOREVER, Allocation, Size, Variable, allocate
from tttc.backends.tvm_cuda.wmma import SIDE, SPREAD, Half, multiplied, rounded, tiles_of
from tttc.ir.expr import Axes, Expr
from tttc.ir.names import own, spelled, suffixed
from tttc.ir.program import SEQUENCE, AdjointProgram, Assign, Scan, cotangent, number_of

EXCHANGE = own("tiles")


class CudaKernel(Kernel):
    """One kernel: where its values lie, and its steps."""

    emitter: Threads

    def __init__(
        self, scan: Scan, program: AdjointProgram, device: Device, stored: Mapping[str, str], backward: bool
    ) -> None:
        super().__init__(scan, program, device, stored, backward)
        self.device = device
        self.called = self.words = CudaWords()
        self.workspaces: dict[str, tuple[str, tuple[Size, ...]]] = {}
        """What the caller gives it to work in."""
        self.pending: tuple[set[str], set[str]] = (set(), set())
        made = [a.target for a in scan.updates]
        changed = [*map(cotangent, (*made, *scan.carry, *scan.fixed))] if backward else made
        self.plan(
            [self.block, scan.updates] if backward and scan.loops else [self.block],
            [*scan.carry, *changed, *self.whole],
        )

    # -- the plan

    def plan(self, blocks: Sequence[Sequence[Assign]], resident: Iterable[Expr]) -> None:
        """The steps of each block, and where every value lies."""
        self.blocks: list[Steps] = []
        self.assigns = blocks
        carried = {p.name: p.axes for p in resident}
        taken = {p.name for p in (*self.scan.params, *self.sequence)} | set(carried)
        taken |= {a.leaf.name for block in blocks for a in block}
        variables = {n: self._variable(n, axes) for n, axes in carried.items()}
        begin, tiles = 0, 0
        sequences = [p.name for p in self.sequence if p.at is not None]
        outside = {a.leaf.name for block in blocks for a in block if a.leaf.at is not None}
        for block in blocks:
            groups = fuse_loops(statements(block, self.program, taken, turned=False), split=False)
            found = plan_phases(groups, sequences, self.device, self.dims)
            self.blocks.append(found)
            for n, axes in found.made.items():
                if n not in carried and n not in outside:
                    at = [begin + i for i, s in enumerate(found.steps) if n in s.writes or n in s.reads]
                    first = variables[n].begin if n in variables else min(at)  # a copy that both blocks make
                    variables[n] = self._variable(n, axes, first, max(at))
            begin += len(found.steps)
            taken |= set(found.made)
            for group in groups if self.device.tensor_cores else ():
                tiles = max(tiles, *(len(tiles_of(matrix_products(s))) for s in group.statements))
        if tiles:
            variables[EXCHANGE] = Variable(EXCHANGE, (self.device.warps * tiles * SIDE * SIDE,), "float32", stays=True)
        self.layout: Allocation = allocate(variables.values(), self.device.shared)

    def _variable(self, name: str, axes: Axes, begin: int | None = None, end: int = 0) -> Variable:
        when = (0, FOREVER) if begin is None else (begin, end)
        sizes = [self._size(a) for a in axes]
        if name.endswith(half("")):
            shape = [_sixteens(n) for n in sizes]
            spread: Size = shape[1] + SPREAD if isinstance(shape[1], int) else shape[1]
            return Variable(name, (shape[0], spread), self.device.operands, *when)
        if len(sizes) > 1 and isinstance(sizes[-1], int) and sizes[-1] % 2 == 0:
            sizes[-1] += 1  # a column then lies in as many banks as it has entries
        return Variable(name, tuple(sizes) or (1,), self.device.dtype, *when)

    def _size(self, axis: Any) -> Size:
        if axis.size != TOKENS:
            return self.dims[axis.size]
        return str(SEQUENCE) if self.scan.loops and self.scan.chunk is SEQUENCE else number_of(self.scan.chunk, 1)

    # -- the function

    def _length(self, name: str) -> Any:
        return tirx.Var(self.called(name), "int32")

    def _begin_function(self) -> None:
        self.memory = {v.name: self._workspace(v) for v in self.layout.outside}

    def _workspace(self, v: Variable) -> Any:
        """Memory of the caller for what does not fit on the chip: [blocks, ...]."""
        self.workspaces[v.name] = (v.dtype, v.shape)
        shape = [self._expression(n) for n in v.shape]
        if v.name.endswith(half("")):
            return self._buffer(self.called(v.name), [self.B * self.H * shape[0] * shape[1]], v.dtype)
        return self._buffer(self.called(v.name), [self.B * self.H, *shape], v.dtype)

    def _expression(self, n: Size) -> Any:
        if isinstance(n, int):
            return n
        return self.T if n == "T" else T.truncdiv(self.T + (SIDE - 1), SIDE) * SIDE

    def _kind(self, buffer: Any) -> type[Store]:
        return Store if str(buffer.dtype) == self.device.dtype else Converted

    # -- the block of threads

    @contextmanager
    def each_head(self) -> Iterator[None]:
        with (
            T.launch_thread("blockIdx.x", self.B * self.H) as self.number,
            T.launch_thread("threadIdx.x", self.device.threads) as thread,
        ):
            self.emitter = Threads(self.device, self.dims, thread, self.called)
            for name, v in self.layout.inside.items():
                shape = v.shape
                if name.endswith(half("")):
                    shape = (v.shape[0] * v.shape[1],)  # type: ignore[operator]
                self.memory[name] = IRBuilder.name(self.called(name), T.alloc_buffer(shape, v.dtype, scope="shared"))
            batch, head = T.truncdiv(self.number, self.H), T.truncmod(self.number, self.H)
            self.g = self._named("b", batch), self._named("h", head)
            for p in (*self.scan.fixed, *(() if self.scan.loops else self.sequence)):
                self.emitter.stores[p.name] = self.tensor(p, "")
            yield

    def _store(self, name: str) -> Store:
        """A value that lies in memory of this kernel."""
        outside = any(v.name == name for v in self.layout.outside)
        return Store(self.memory[name], self.device, (self.number,) if outside else ())

    def _half(self, name: str) -> Half:
        found = next(v for v in (*self.layout.outside, *self.layout.inside.values()) if v.name == name)
        rows, stride = (self._expression(n) for n in found.shape)
        return Half(self.memory[name], 0 if name in self.layout.inside else self.number * (rows * stride), stride)

    def touch(self, reads: Iterable[str], writes: Iterable[str]) -> None:
        """Meet first, if another thread may still be at work on what the next step needs."""
        seen, changed = self.pending
        reads, writes = set(reads), set(writes)
        same = self.layout.same_place
        if any(same(x, y) for x in writes for y in seen | changed) or any(same(x, y) for x in reads for y in changed):
            self.syncthreads()
            seen, changed = self.pending
        seen |= reads
        changed |= writes

    def syncthreads(self) -> None:
        if any(self.pending):
            self.emitter.syncthreads()
        self.pending = (set(), set())

    @contextmanager
    def uniform_region(self, condition: Any) -> Iterator[None]:
        """Nothing is under way when it begins or ends."""
        self.syncthreads()
        with self.emitter.only_if(condition):
            yield
            self.syncthreads()

    def _load(self, p: Expr, source: Store | None) -> None:
        self.emitter.stores[p.name] = self._store(p.name)
        self._copy(p, source, self.emitter.stores[p.name], (), (p.name,))

    def _save(self, p: Expr, target: Store, suffix: str) -> None:
        kept = (suffixed(p.name, suffix),) if suffix in ("kept", "work") else ()
        self._copy(p, self.emitter.stores[p.name], target, (p.name,), kept)

    def _copy(self, p: Expr, source: Store | None, target: Store, reads: Iterable[str], writes: Iterable[str]) -> None:
        self.touch(reads, writes)
        with self.emitter.elements(p.axes) as places:
            here = [places[a] for a in p.axes]
            target.save(here, self.emitter.numbers.const(0.0) if source is None else source.load(here).it)

    # -- chunks

    def _begin_chunk(self, first: Any, tokens: Any) -> None:
        self.first = self._named("first", first)
        self.emitter.tokens = self._named("tokens", tokens)
        self.emitter.chunk = self.chunk

    def _begin_only_chunk(self) -> None:
        """Its first token is 0, as where no chunk has begun."""

    def _named(self, name: str, x: Any) -> Any:
        return self.emitter.named(own(name), x)[0]

    def run(self) -> None:
        self._run(0, self.suffix)

    def run_updates(self) -> None:
        self._run(1)

    # -- steps

    def _run(self, number: int, suffix: str = "") -> None:
        """A block of the program, step by step."""
        stores = self.emitter.stores
        for p in self.sequence if self.scan.loops else ():
            stores[p.name] = self.tokens_of(p)
        for a in self.assigns[number]:
            if a.leaf.at is not None:
                stores[a.leaf.name] = self.tokens_of(a.target, suffix)
            elif a.leaf.name not in stores:
                stores[a.leaf.name] = self._store(a.leaf.name)
        for step in self.blocks[number].steps:
            self.touch(step.reads, step.writes)
            self._step(step)

    def _step(self, step: Phase) -> None:
        threads = self.emitter
        (name,) = step.writes if step.source is not None else ("",)
        if step.kind == "stage":
            assert step.source is not None
            threads.comment(f"{spelled(name)} = {spelled(step.source.name)}")
            source, target = threads.stores[step.source.name], self._store(name)
            with threads.elements(step.source.axes) as places:
                here = [places[a] for a in step.source.axes]
                target.save(here, source.load(here).it)
            threads.stores[step.source.name] = target
        elif step.kind == "round":
            assert step.source is not None
            threads.comment(f"{spelled(name)} = {self.device.operands}({spelled(step.source.name)})")
            rounded(threads, step.source.axes, threads.stores[step.source.name], self._half(name))
        else:
            self._statements(step)

    def _statements(self, step: Phase) -> None:
        assert step.group is not None
        for s in step.group.statements:
            self.emitter.comment(str(s))
            if s.name in self.memory:
                self.emitter.stores[s.name] = self._store(s.name)
        (s, *rest) = step.group.statements
        products = matrix_products(s) if self.device.tensor_cores and not rest else {}
        if not products:
            self.emitter.group(step.group, step.registers)
            return
        used = {o.name for found in products.values() for p in found for o in (p.left, p.right)}
        halves = {n: self._half(half(n)) for n in used}
        multiplied(self.emitter, s, products, halves, self.memory[EXCHANGE])


def _sixteens(n: Size) -> Size:
    return "T16" if isinstance(n, str) else -(-n // SIDE) * SIDE
