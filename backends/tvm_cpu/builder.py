"""A function of TensorIR while it is written: its tensors, its memory, its loops over heads and chunks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from tttc.backends.tvm_common.arguments import Argument
from tttc.backends.tvm_common.loops import fuse_loops, read_last, read_often
from tttc.backends.tvm_common.statements import TOKENS, statements
from tttc.backends.tvm_common.stores import Index, Store
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.arena import LINE, Scratch
from tttc.backends.tvm_cpu.codegen import Emitter
from tttc.backends.tvm_cpu.machine import BYTES, Machine
from tttc.backends.tvm_cpu.ops import Functions
from tttc.ir.expr import Expr
from tttc.ir.names import spelled, suffixed
from tttc.ir.program import Assign, Scan, ScanProgram, number_of

FETCHED = 1 << 14  # numbers of a chunk that are asked for while the one before is worked on


CLEARED = 1 << 16  # numbers of the scratch memory that are zeros at first; both fit the second cache


TURN = 4  # chunks of a head until the next one has its turn: of many more, the rows would lie on too many pages


class Builder:
    """One function: its tensors, its memory, its loops."""

    def __init__(
        self, name: str, scan: Scan, program: ScanProgram, machine: Machine, stored: Mapping[str, str]
    ) -> None:
        self.name, self.scan, self.program, self.machine, self.stored = name, scan, program, machine, stored
        self.vectors = Functions(machine.dtype, machine.lanes, lambda x: x)
        self.buffers: dict[str, Any] = {}
        self.built: Any = None

    @contextmanager
    def function(self) -> Iterator[None]:
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name(self.name)
                T.func_attr({"tirx.noalias": True, "global_symbol": self.name})
                self.B, self.H, self.T, self.K, self.E = (T.int32() for _ in range(5))
                self.every: Any = None
                self.together: Any = None
                self.scratch_size = T.arg("scratch_size", T.int32())
                yield
            size = tirx.const(self.scratch.size, "int32")  # known when all is written
            self.built = ib.get().specialize({self.scratch_size: size})

    # -- tensors

    def _buffer(self, name: str, shape: Sequence[Any], strides: Sequence[Any] | None = None, dtype: str = "") -> None:
        handle = T.arg(f"{spelled(name)}_handle", T.handle())
        settings = {} if strides is None else {"strides": list(strides)}
        dtype = dtype or self.machine.dtype
        buffer = T.match_buffer(handle, tuple(shape), dtype, align=BYTES[dtype], **settings)
        self.buffers[name] = IRBuilder.name(spelled(name), buffer)

    def _own(self, p: Expr) -> list[int]:
        return [self.program.dims[a.size] for a in p.axes if a.size != TOKENS]

    def declare(self, given: Sequence[Argument]) -> None:
        """The tensors of the caller, each by the name of its variable, but for those of which there are two."""
        for a in given:
            if a.suffix in ("kept", "work"):
                count = self.K if a.suffix == "kept" else self.E
                self._buffer(a.name, [self.B, self.H, count, *self._own(a.of)])
            else:
                self._strided(a.of, a.of.name if a.suffix == "in" else a.name)

    def _strided(self, p: Expr, name: str) -> None:
        """[B, H, T, ...] or [B, H, ...]; batch, heads and tokens may lie at any distance."""
        own = self._own(p)
        shape = [self.B, self.H, *([self.T] if p.at else []), *own]
        inner = [prod(own[i + 1 :]) for i in range(len(own))]
        strides = [T.int32() for _ in range(len(shape) - len(inner))] + inner
        self._buffer(name, shape, strides, self.stored.get(p.name, ""))

    # -- loops

    @contextmanager
    def each_head(self) -> Iterator[None]:
        with T.parallel(self.B * self.H) as i:
            self._begin()
            self.g = self.emitter.in_register(T.truncdiv(i, self.H)), self.emitter.in_register(T.truncmod(i, self.H))
            yield

    @contextmanager
    def each_group(self) -> Iterator[None]:
        """So many heads `together`, of one batch element."""
        groups = T.truncdiv(self.H + self.together - 1, self.together)
        with T.parallel(self.B * groups) as i:
            self._begin()
            self.batch = self.emitter.in_register(T.truncdiv(i, groups))
            self.first_head = self.emitter.in_register(T.truncmod(i, groups) * self.together)
            yield

    @contextmanager
    def heads(self) -> Iterator[None]:
        """The heads of a group, one after the other."""
        with T.serial(T.min(self.together, self.H - self.first_head)) as i:
            self.g = self.batch, self.emitter.in_register(self.first_head + i)
            yield

    def _begin(self) -> None:
        """The memory of a thread, and what writes its statements."""
        self.scratch = Scratch(T.alloc_buffer((self.scratch_size,), self.machine.dtype, scope="global"))
        chunk = self.chunk if self.scan.loops else 1
        self.emitter = Emitter(self.machine, self.program.dims, _one(), chunk, self.scratch)
        self._cleared()

    def _cleared(self) -> None:
        """Zeros, as far as it is no work: tiles reach beyond the last token, and denormal numbers there are slow."""
        zero, lanes = self.vectors.const(0.0), self.machine.lanes
        with T.serial(T.truncdiv(T.min(self.scratch_size, CLEARED), lanes)) as i:
            T.add_to_parent(self.scratch.block.vstore([i * lanes], zero))

    @property
    def chunk(self) -> Any:
        return number_of(self.scan.chunk, self.T)

    @property
    def count(self) -> Any:
        """How many chunks a sequence has."""
        return T.truncdiv(self.T + (self.chunk - 1), self.chunk)

    @contextmanager
    def turns(self) -> Iterator[tuple[Any, Any]]:
        """The chunks, a few at a time: from one to before another."""
        with T.serial(T.truncdiv(self.count + (TURN - 1), TURN)) as turn:
            yield turn * TURN, T.min(turn * TURN + TURN, self.count)

    @contextmanager
    def chunks(self, loops: bool, begin: Any = 0, end: Any = None) -> Iterator[Any]:
        """All chunks, or some of them."""
        if not loops:
            self._begin_chunk(0, _one())
            yield None
            return
        size = self.chunk
        with T.serial(begin, self.count if end is None else end) as c:
            self._begin_chunk(c * size, T.min(self.T - c * size, size))
            yield c

    def _begin_chunk(self, first: Any, tokens: Any) -> None:
        self.first, self.emitter.tokens = (
            x if isinstance(x, int) else self.emitter.in_register(x) for x in (first, tokens)
        )
        self.emitter.chunk = self.chunk if self.scan.loops else 1

    @contextmanager
    def reversed_chunks(self, scan: Scan) -> Iterator[None]:
        """Group by group from the last one; in each, first the carry before every chunk, then the chunks backwards."""
        size = self.chunk
        with T.serial(self.K) as i:
            group = self.K - 1 - i
            first = group * self.every
            length = T.min(self.count - first, self.every)
            for p in scan.carry:
                self.copy(
                    p, Slice(self.buffers[suffixed(p.name, "kept")], (*self.g, group)), self.emitter.stores[p.name]
                )
            with T.serial(length) as j:
                for p in scan.carry:
                    self.copy(
                        p, self.emitter.stores[p.name], Slice(self.buffers[suffixed(p.name, "work")], (*self.g, j))
                    )
                with T.If(j + 1 < length), T.Then(), self._scope():
                    self._begin_chunk((first + j) * size, tirx.const(size, "int32") if isinstance(size, int) else size)
                    self.run(scan.updates, scan.sequence, self.first + self.chunk)
            with T.serial(length) as back:
                j = length - 1 - back
                for p in scan.carry:
                    self.copy(
                        p, Slice(self.buffers[suffixed(p.name, "work")], (*self.g, j)), self.emitter.stores[p.name]
                    )
                self._begin_chunk((first + j) * size, T.min(self.T - (first + j) * size, size))
                yield

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Memory that is reserved inside ends with it."""
        before = dict(self.emitter.stores)
        yield
        self.emitter.release([n for n, store in self.emitter.stores.items() if before.get(n) is not store])
        self.emitter.stores |= before

    # -- variables

    def fixed_ready(self, fixed: Sequence[Expr]) -> None:
        """What stays: read in place where it is whole vectors."""
        for p in fixed:
            self._ready(p, self.buffers[p.name])
        if not self.scan.loops:
            for p in self.scan.sequence:
                self._ready(p, self.buffers[p.name])
        if self.name != self.scan.name and self.scan.loops:  # backwards, chunks begin with carries that were kept
            for p in self.scan.carry:
                self.emitter.reserve(p.name, p.axes)

    def _ready(self, p: Expr, buffer: Any) -> None:
        if self._whole(p):
            self.emitter.stores[p.name] = Store(buffer, self.machine, self.g)
        else:
            self.load_variable(p, buffer)

    def _whole(self, p: Expr) -> bool:
        """Whether the last axis is a whole number of vectors."""
        last = p.axes[-1] if p.axes else None
        return last is not None and last.size != TOKENS and self.program.dims[last.size] % self.machine.lanes == 0

    def load_variable(self, p: Expr, buffer: Any) -> None:
        """A variable of the function, from a tensor or zero."""
        store = self.emitter.reserve(p.name, p.axes)
        self.copy(p, None if buffer is None else Slice(buffer, self.g), store)

    def save_variable(self, p: Expr, buffer: Any) -> None:
        self.copy(p, self.emitter.stores[p.name], Slice(buffer, self.g))

    def save_kept(self, carry: Sequence[Expr], chunk: Any) -> None:
        """The carry where a group begins; nothing, where there is no room for any."""
        with T.If(T.And(self.K > 0, T.EQ(T.truncmod(chunk, self.every), 0))), T.Then():
            for p in carry:
                self.copy(
                    p,
                    self.emitter.stores[p.name],
                    Slice(self.buffers[suffixed(p.name, "kept")], (*self.g, T.truncdiv(chunk, self.every))),
                )

    def copy(self, p: Expr, source: Any, target: Any, tokens: Any = None) -> None:
        """Entry by entry, or vector by vector where both are laid out alike."""
        extents = [tokens if a.size == TOKENS else self.program.dims[a.size] for a in p.axes]
        whole = self._whole(p)
        places: list[Index] = []
        frames = [] if extents else [T.serial(1)]  # a scope for what is declared
        for frame in frames:
            frame.__enter__()
        for i, n in enumerate(extents):
            last = i == len(extents) - 1
            frame = T.serial(n // self.machine.lanes if last and whole else n)
            frames.append(frame)
            v = frame.__enter__()
            places.append(Index(v * self.machine.lanes if last and whole else v, (), lanes=last and whole))
        zero = self.emitter.vectors.const(0.0) if whole else self.emitter.numbers.const(0.0)
        value = zero if source is None else self._told(source).load(places).it
        self._told(target).save(places, value)
        for frame in reversed(frames):
            frame.__exit__(None, None, None)

    def _told(self, x: Slice | Store) -> Store:
        """Memory, ready to be read and written here."""
        return self.emitter.declared(x) if isinstance(x, Store) else Store(x.buffer, self.machine, x.prefix)

    # -- sequences

    def sequences_ready(self, sequence: Sequence[Expr], copied: Collection[str]) -> None:
        """The tokens of this chunk: read in place where they are whole vectors, but for those that are to be copied."""
        for p in sequence:
            buffer = self.buffers[p.name]
            if self._whole(p) and p.name not in copied:
                self.emitter.stores[p.name] = Store(buffer, self.machine, self.g, self.first, self.emitter.tokens)
            else:
                store = self.emitter.reserve(p.name, p.axes)
                source = Slice(buffer, self.g)
                self._copy_tokens(p, source, store, loading=True)

    def _fetch_part(self, sequence: Sequence[Expr], first: Any, part: int, parts: int) -> None:
        """Ask for some of the tokens of another chunk: rows that lie pages apart, no processor guesses them. A few at
        a time, between the statements of this chunk, for it waits for few at once.
        """
        size = self.chunk
        row = sum(max(prod(self._own(p)), LINE) for p in sequence)
        if not self.scan.loops or not isinstance(size, int) or size * row > FETCHED:
            return
        begin, end = size * part // parts, size * (part + 1) // parts
        if begin == end:
            return
        with T.serial(begin, end) as i:
            t = self.emitter.in_register(T.max(T.min(first + i, self.T - 1), 0))
            for p in sequence:
                if not self._own(p):
                    self._fetch(self.buffers[p.name], [t])
                elif len(self._own(p)) == 1:
                    for at in range(0, self._own(p)[0], LINE):
                        self._fetch(self.buffers[p.name], [t, at])

    def _fetch(self, buffer: Any, at: Sequence[Any]) -> None:
        address = T.address_of(buffer[(*self.g, *at)])
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))

    def sequences_done(self, outputs: Sequence[Expr], suffix: str = "") -> None:
        for p in outputs:
            if p.at is not None and not self._whole(p):
                self._copy_tokens(
                    p,
                    Slice(self.buffers[suffixed(p.name, suffix) if suffix else p.name], self.g),
                    self.emitter.stores[p.name],
                    loading=False,
                )
            elif p.at is None:
                self.save_variable(p, self.buffers[suffixed(p.name, suffix) if suffix else p.name])

    def _copy_tokens(self, p: Expr, outside: Any, inside: Store, *, loading: bool) -> None:
        sequence = Store(outside.buffer, self.machine, outside.prefix, self.first, self.emitter.tokens)
        source, target = (sequence, inside) if loading else (inside, sequence)
        self.copy(p, source, target, self.emitter.tokens)

    def run(
        self, assigns: Sequence[Assign], sequence: Sequence[Expr] = (), ahead: Any = None, renamed: bool = False
    ) -> None:
        """A block of the program on the tokens of a sequence, statement by statement; those from the token `ahead` on
        are fetched meanwhile. What products read often is copied at first: rows at some large distance from each other
        share few places of a cache.
        """
        suffix = "out" if renamed else ""
        for a in assigns:
            if a.leaf.at is not None:
                buffer = self.buffers[suffixed(a.leaf.name, suffix) if suffix else a.leaf.name]
                if self._whole(a.target):
                    self.emitter.stores[a.leaf.name] = Store(
                        buffer, self.machine, self.g, self.first, self.emitter.tokens
                    )
                else:
                    self.emitter.reserve(a.leaf.name, a.target.axes)
            elif a.leaf.name not in self.emitter.stores:
                self.emitter.reserve(a.leaf.name, a.target.axes)
        names = [p.name for p in sequence]
        groups = fuse_loops(statements(assigns, self.program, {*self.emitter.stores, *names}))
        self.sequences_ready(sequence, [n for n in names if any(read_often(n, g) for g in groups)])
        for i, (group, over) in enumerate(zip(groups, read_last(groups), strict=True)):
            if ahead is not None:
                self._fetch_part(sequence, ahead, i, len(groups))
            self.emitter.group(group)
            self.emitter.release(over)


@dataclass(frozen=True)
class Slice:
    """Part of a tensor of the caller."""

    buffer: Any
    prefix: tuple[Any, ...]


def _one() -> Any:
    return tirx.const(1, "int32")
