"""A kernel for a GPU while it is written: its tensors, its memory, its loops over chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from tttc.backends.tvm_common.arguments import Argument
from tttc.backends.tvm_common.loops import fuse_loops
from tttc.backends.tvm_common.statements import TOKENS, statements
from tttc.backends.tvm_common.stores import Store
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.machine import BYTES
from tttc.backends.tvm_cuda.device import Device
from tttc.backends.tvm_cuda.kernel_text import CudaWords, stride_name
from tttc.backends.tvm_cuda.phases import Phase, Steps, half, matrix_products, plan_phases
from tttc.backends.tvm_cuda.simt import Converted, Threads
from tttc.backends.tvm_cuda.smem import FOREVER, Allocation, Size, Variable, allocate
from tttc.backends.tvm_cuda.wmma import SIDE, SPREAD, Half, multiplied, rounded, tiles_of
from tttc.ir.expr import Axes, Expr
from tttc.ir.names import own, spelled, suffixed
from tttc.ir.program import SEQUENCE, Assign, Scan, ScanProgram, number_of

EXCHANGE = own("tiles")


LAUNCHED = tuple(
    map(own, ("batch", "heads", "tokens", "groups", "places", "every"))
)  # what a launch is told beside its tensors


@dataclass(frozen=True)
class CudaKernel:
    """A function of TensorIR, where its values lie in shared memory, and what the caller gives it to work in."""

    name: str
    function: Any
    device: Device
    offsets: dict[str, int]
    shared: int
    workspaces: dict[str, tuple[str, tuple[Size, ...]]]
    names: dict[str, str]
    """What the words of its text stand for."""


class CudaBuilder:
    """One kernel: its tensors, its memory, its loops."""

    def __init__(
        self,
        name: str,
        scan: Scan,
        program: ScanProgram,
        device: Device,
        stored: Mapping[str, str],
        incoming: Sequence[Expr] = (),
    ) -> None:
        self.name, self.scan, self.program, self.device, self.stored = name, scan, program, device, stored
        self.dims = program.dims
        self.sequence = (*scan.sequence, *incoming)
        self.called = CudaWords()
        self.tensors: dict[str, Any] = {}
        self.workspaces: dict[str, tuple[str, tuple[Size, ...]]] = {}
        self.pending: tuple[set[str], set[str]] = (set(), set())
        self.built: Any = None

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

    @contextmanager
    def function(self) -> Iterator[None]:
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name(self.name)
                T.func_attr({"tirx.noalias": True, "global_symbol": self.name})
                self.B, self.H, self.T, self.groups, self.places = (
                    tirx.Var(self.called(n), "int32") for n in LAUNCHED[:5]
                )
                self.every: Any = None
                self.memory = {v.name: self._workspace(v) for v in self.layout.outside}
                yield
            self.built = ib.get()

    def kernel(self) -> CudaKernel:
        layout = self.layout
        return CudaKernel(
            self.name,
            self.built,
            self.device,
            dict(layout.offsets),
            layout.size,
            self.workspaces,
            self.called.identities,
        )

    def _buffer(self, name: str, shape: Sequence[Any], dtype: str, strides: Sequence[Any] | None = None) -> Any:
        handle = T.arg(f"{self.called(name)}_handle", T.handle())
        settings = {} if strides is None else {"strides": list(strides)}
        return IRBuilder.name(
            self.called(name), T.match_buffer(handle, tuple(shape), dtype, align=BYTES[dtype], **settings)
        )

    def _workspace(self, v: Variable) -> Any:
        """Memory of the caller for what does not fit on the chip: [blocks, ...]."""
        self.workspaces[v.name] = (v.dtype, v.shape)
        shape = [self._expression(n) for n in v.shape]
        if v.name.endswith(half("")):
            return self._buffer(v.name, [self.B * self.H * shape[0] * shape[1]], v.dtype)
        return self._buffer(v.name, [self.B * self.H, *shape], v.dtype)

    def _expression(self, n: Size) -> Any:
        if isinstance(n, int):
            return n
        return self.T if n == "T" else T.truncdiv(self.T + (SIDE - 1), SIDE) * SIDE

    def _own(self, p: Expr) -> list[int]:
        return [self.dims[a.size] for a in p.axes if a.size != TOKENS]

    def declare(self, given: Sequence[Argument]) -> None:
        """The tensors of the caller."""
        for a in given:
            if a.suffix in ("kept", "work"):
                shape = [self.B, self.H, self.groups if a.suffix == "kept" else self.places, *self._own(a.of)]
                self.tensors[a.name] = self._buffer(a.name, shape, self.device.dtype)
            else:
                self._strided(a)

    def _strided(self, a: Argument) -> None:
        """[B, H, T, ...] or [B, H, ...]; batch, heads and tokens may lie at any distance."""
        own = self._own(a.of)
        leading = [self.B, self.H, *([self.T] if a.of.at else [])]
        strides = [tirx.Var(self.called(stride_name(a.name, i)), "int32") for i in range(len(leading))]
        dtype = self.stored.get(a.of.name, self.device.dtype)
        inner = [prod(own[i + 1 :]) for i in range(len(own))]
        self.tensors[a.name] = self._buffer(a.name, [*leading, *own], dtype, [*strides, *inner])

    def tensor(self, p: Expr, suffix: str, *prefix: Any) -> Store:
        """A tensor of the caller as the variable of this block."""
        buffer = self.tensors[Argument(p, suffix).name]
        return self._kind(buffer)(buffer, self.device, (*self.g, *prefix))

    def _kind(self, buffer: Any) -> type[Store]:
        return Store if str(buffer.dtype) == self.device.dtype else Converted

    # -- the block of threads

    @contextmanager
    def block(self) -> Iterator[None]:
        with (
            T.launch_thread("blockIdx.x", self.B * self.H) as self.number,
            T.launch_thread("threadIdx.x", self.device.threads) as thread,
        ):
            self.threads = Threads(self.device, self.dims, thread, self.called)
            self.first: Any = 0
            for name, v in self.layout.inside.items():
                shape = v.shape
                if name.endswith(half("")):
                    shape = (v.shape[0] * v.shape[1],)  # type: ignore[operator]
                self.memory[name] = IRBuilder.name(self.called(name), T.alloc_buffer(shape, v.dtype, scope="shared"))
            batch, head = T.truncdiv(self.number, self.H), T.truncmod(self.number, self.H)
            self.g = self.threads.named(own("b"), batch)[0], self.threads.named(own("h"), head)[0]
            for p in (*self.scan.fixed, *(() if self.scan.loops else self.sequence)):
                self.threads.stores[p.name] = self.tensor(p, "")
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
            self.threads.syncthreads()
        self.pending = (set(), set())

    @contextmanager
    def uniform_region(self, condition: Any = None) -> Iterator[None]:
        """A part that may run never or often, the same for all threads: nothing is under way when it begins or ends."""
        self.syncthreads()
        with self.threads.only_if(condition):
            yield
            self.syncthreads()

    def load(self, p: Expr, source: Store | None) -> None:
        """A variable of the block, from a tensor or zero."""
        self.threads.stores[p.name] = self._store(p.name)
        self._copy(p, source, self.threads.stores[p.name], (), (p.name,))

    def save(self, p: Expr, target: Store, kept: str = "") -> None:
        self._copy(p, self.threads.stores[p.name], target, (p.name,), (suffixed(p.name, kept),) if kept else ())

    def _copy(self, p: Expr, source: Store | None, target: Store, reads: Iterable[str], writes: Iterable[str]) -> None:
        self.touch(reads, writes)
        with self.threads.elements(p.axes) as places:
            here = [places[a] for a in p.axes]
            target.save(here, self.threads.numbers.const(0.0) if source is None else source.load(here).it)

    # -- chunks

    @property
    def chunk(self) -> Any:
        return number_of(self.scan.chunk, self.T)

    @contextmanager
    def chunks(self) -> Iterator[Any]:
        if not self.scan.loops:
            yield None
            return
        size = self.chunk
        self.syncthreads()
        with T.serial(T.truncdiv(self.T + (size - 1), size)) as c:
            self._begin_chunk(c * size, T.min(self.T - c * size, size))
            yield c
            self.syncthreads()

    def _begin_chunk(self, first: Any, tokens: Any) -> None:
        self.first = self.threads.named(own("first"), first)[0]
        self.threads.tokens = self.threads.named(own("tokens"), tokens)[0]
        self.threads.chunk = self.chunk

    @contextmanager
    def reversed_chunks(self) -> Iterator[None]:
        """Group by group from the last one; in each, first the carry before every chunk, then the chunks backwards."""
        size, carry = self.chunk, self.scan.carry
        for p in carry:
            self.threads.stores[p.name] = self._store(p.name)
        count = T.truncdiv(self.T + (size - 1), size)
        self.syncthreads()
        with T.serial(self.groups) as i:
            group = self.groups - 1 - i
            first = self.threads.named(own("first_of_group"), group * self.every)[0]
            length = self.threads.named(own("length"), T.min(count - first, self.every))[0]
            for p in carry:
                self.load(p, self.tensor(p, "kept", group))
            self.syncthreads()
            with T.serial(length) as j:
                for p in carry:
                    self.save(p, self.tensor(p, "work", j), "work")
                with self.uniform_region(j + 1 < length):
                    self._begin_chunk(
                        (first + j) * size, size if not isinstance(size, int) else tirx.const(size, "int32")
                    )
                    self.run(1)
                self.syncthreads()
            with T.serial(length) as back:
                j = length - 1 - back
                for p in carry:
                    self.load(p, self.tensor(p, "work", j))
                self._begin_chunk((first + j) * size, T.min(self.T - (first + j) * size, size))
                yield
                self.syncthreads()

    # -- steps

    def run(self, number: int, suffix: str = "") -> None:
        """A block of the program, step by step."""
        stores = self.threads.stores
        for p in self.sequence if self.scan.loops else ():
            stores[p.name] = self._sequence(p, "")
        for a in self.assigns[number]:
            if a.leaf.at is not None:
                stores[a.leaf.name] = self._sequence(a.target, suffix)
            elif a.leaf.name not in stores:
                stores[a.leaf.name] = self._store(a.leaf.name)
        for step in self.blocks[number].steps:
            self.touch(step.reads, step.writes)
            self._step(step)

    def _sequence(self, p: Expr, suffix: str) -> Store:
        """The tokens of this chunk, where they lie."""
        buffer = self.tensors[Argument(p, suffix).name]
        return self._kind(buffer)(buffer, self.device, self.g, self.first, self.threads.tokens)

    def _step(self, step: Phase) -> None:
        threads = self.threads
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
            self.threads.comment(str(s))
            if s.name in self.memory:
                self.threads.stores[s.name] = self._store(s.name)
        (s, *rest) = step.group.statements
        products = matrix_products(s) if self.device.tensor_cores and not rest else {}
        if not products:
            self.threads.group(step.group, step.registers)
            return
        used = {o.name for found in products.values() for p in found for o in (p.left, p.right)}
        halves = {n: self._half(half(n)) for n in used}
        multiplied(self.threads, s, products, halves, self.memory[EXCHANGE])


def _sixteens(n: Size) -> Size:
    return "T16" if isinstance(n, str) else -(-n // SIDE) * SIDE
