"""Scans as TensorIR for this CPU, parallel over batch and heads: a function forward, and one backward.

The weights stay in memory of the function, padded to whole vectors, as does everything else whose last axis is no whole
number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Self

from tttc.backends.tvm_common.arguments import Argument
from tttc.backends.tvm_common.kernels import Kernel
from tttc.backends.tvm_common.loops import fuse_loops, heads_per_task, read_last, read_often
from tttc.backends.tvm_common.statements import TOKENS, statements
from tttc.backends.tvm_common.stores import Index, Store
from tttc.backends.tvm_common.tir import T, tirx
from tttc.backends.tvm_cpu.arena import LINE, Scratch
from tttc.backends.tvm_cpu.codegen import Emitter
from tttc.backends.tvm_cpu.machine import Machine
from tttc.backends.tvm_cpu.ops import Functions
from tttc.ir.expr import Expr
from tttc.ir.names import spelled
from tttc.ir.program import AdjointProgram, Assign, Scan

FETCHED = 1 << 14  # numbers of a chunk that are asked for while the one before is worked on
CLEARED = 1 << 16  # numbers of the scratch memory that are zeros at first; both fit the second cache
TURN = 4  # chunks of a head until the next one has its turn: of many more, the rows would lie on too many pages


class CPUKernel(Kernel):
    """One function: its memory, its loops over heads, and how statements find what they read in vectors."""

    emitter: Emitter

    def __init__(
        self, scan: Scan, program: AdjointProgram, machine: Machine, stored: Mapping[str, str], backward: bool
    ) -> None:
        super().__init__(scan, program, machine, stored, backward)
        self.called = spelled
        self.vectors = Functions(machine.dtype, machine.lanes, lambda x: x)

    def written(self) -> Self:
        if self.backward or not heads_per_task(self.scan, self.dims, self.machine.lanes):
            super().written()
        else:
            with self.opened():
                self._heads_together()
        size = tirx.const(self.scratch.size, "int32")  # known when all is written
        self.function = self.function.specialize({self.scratch_size: size})
        return self

    def _heads_together(self) -> None:
        """Some chunks at a time, in each some heads: the rows of a token lie side by side, each page is visited once,
        and the weights of a head stay in the first cache for as many chunks.
        """
        self.together = T.arg("together", T.int32())
        carry = self.scan.carry
        with self.each_group():
            with self.heads():
                for p in carry:
                    self.copy(p, self.tensor(p, "in"), self.tensor(p, "out"))
            with self.turns() as turn, self.heads():
                self._inputs_ready()
                self.emitter.stores |= {p.name: self.tensor(p, "out") for p in carry}
                with self.chunks(*turn) as chunk:
                    self.save_kept(chunk)
                    self.run()
                self.save(self.whole, self.suffix)

    def _length(self, name: str) -> Any:
        return T.int32()

    def _begin_function(self) -> None:
        self.scratch_size = T.arg("scratch_size", T.int32())

    def _label(self, a: Argument) -> str:
        """The name of its variable, but for those of which there are two."""
        return spelled(a.of.name if a.suffix == "in" else a.name)

    # -- loops

    @contextmanager
    def each_head(self) -> Iterator[None]:
        with T.parallel(self.B * self.H) as i:
            self._begin()
            self.g = self.emitter.in_register(T.truncdiv(i, self.H)), self.emitter.in_register(T.truncmod(i, self.H))
            self._inputs_ready()
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
        self.emitter = Emitter(self.machine, self.dims, _one(), chunk, self.scratch)
        self._cleared()

    def _cleared(self) -> None:
        """Zeros, as far as it is no work: tiles reach beyond the last token, and denormal numbers there are slow."""
        zero, lanes = self.vectors.const(0.0), self.machine.lanes
        with T.serial(T.truncdiv(T.min(self.scratch_size, CLEARED), lanes)) as i:
            T.add_to_parent(self.scratch.block.vstore([i * lanes], zero))

    @contextmanager
    def turns(self) -> Iterator[tuple[Any, Any]]:
        """The chunks, a few at a time: from one to before another."""
        with T.serial(T.truncdiv(self.count + (TURN - 1), TURN)) as turn:
            yield turn * TURN, T.min(turn * TURN + TURN, self.count)

    def _begin_only_chunk(self) -> None:
        self._begin_chunk(0, _one())

    def syncthreads(self) -> None:
        """One thread does all of a head."""

    def _begin_chunk(self, first: Any, tokens: Any) -> None:
        self.first, self.emitter.tokens = (
            x if isinstance(x, int) else self.emitter.in_register(x) for x in (first, tokens)
        )
        self.emitter.chunk = self.chunk if self.scan.loops else 1

    @contextmanager
    def uniform_region(self, condition: Any) -> Iterator[None]:
        """Memory that is reserved inside ends with it."""
        before = dict(self.emitter.stores)
        with T.If(condition), T.Then():
            yield
            self.emitter.release([n for n, store in self.emitter.stores.items() if before.get(n) is not store])
            self.emitter.stores |= before

    # -- variables

    def _inputs_ready(self) -> None:
        """What stays: read in place where it is whole vectors."""
        for p in (*self.scan.fixed, *(() if self.scan.loops else self.scan.sequence)):
            if self._is_whole(p):
                self.emitter.stores[p.name] = self.tensor(p, "")
            else:
                self.load([p], "")
        if self.backward and self.scan.loops:  # backwards, chunks begin with carries that were kept
            for p in self.scan.carry:
                self.emitter.reserve(p.name, p.axes)

    def _is_whole(self, p: Expr) -> bool:
        """Whether the last axis is a whole number of vectors."""
        last = p.axes[-1] if p.axes else None
        return last is not None and last.size != TOKENS and self.dims[last.size] % self.machine.lanes == 0

    def _load(self, p: Expr, source: Store | None) -> None:
        if p.name not in self.emitter.stores:
            self.emitter.reserve(p.name, p.axes)
        self.copy(p, source, self.emitter.stores[p.name])

    def _save(self, p: Expr, target: Store, suffix: str) -> None:
        self.copy(p, self.emitter.stores[p.name], target)

    def copy(self, p: Expr, source: Store | None, target: Store, tokens: Any = None) -> None:
        """Entry by entry, or vector by vector where both are laid out alike."""
        whole, lanes = self._is_whole(p), self.machine.lanes
        extents = [tokens if a.size == TOKENS else self.dims[a.size] for a in p.axes]
        places: list[Index] = []
        with ExitStack() as stack:
            if not extents:
                stack.enter_context(T.serial(1))  # a scope for what is declared
            for i, n in enumerate(extents):
                by_vectors = whole and i == len(extents) - 1
                v = stack.enter_context(T.serial(n // lanes if by_vectors else n))
                places.append(Index(v * lanes if by_vectors else v, (), lanes=by_vectors))
            zero = self.emitter.functions(whole).const(0.0)
            value = zero if source is None else self.emitter.declared(source).load(places).it
            self.emitter.declared(target).save(places, value)

    # -- sequences

    def _sequences_ready(self, sequence: Sequence[Expr], copied: Collection[str]) -> None:
        """The tokens of this chunk: read in place where they are whole vectors, but for those that are to be copied."""
        for p in sequence:
            if self._is_whole(p) and p.name not in copied:
                self.emitter.stores[p.name] = self.tokens_of(p)
            else:
                self.copy(p, self.tokens_of(p), self.emitter.reserve(p.name, p.axes), self.emitter.tokens)

    def _fetch_part(self, sequence: Sequence[Expr], first: Any, part: int, parts: int) -> None:
        """Ask for some of the tokens of another chunk: rows that lie pages apart, no processor guesses them. A few at
        a time, between the statements of this chunk, for it waits for few at once.
        """
        size = self.chunk
        row = sum(max(prod(self.own(p)), LINE) for p in sequence)
        if not self.scan.loops or not isinstance(size, int) or size * row > FETCHED:
            return
        begin, end = size * part // parts, size * (part + 1) // parts
        if begin == end:
            return
        with T.serial(begin, end) as i:
            t = self.emitter.in_register(T.max(T.min(first + i, self.T - 1), 0))
            for p in sequence:
                if not self.own(p):
                    self._fetch(self.tensors[p.name], [t])
                elif len(self.own(p)) == 1:
                    for at in range(0, self.own(p)[0], LINE):
                        self._fetch(self.tensors[p.name], [t, at])

    def _fetch(self, buffer: Any, at: Sequence[Any]) -> None:
        address = T.address_of(buffer[(*self.g, *at)])
        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(2), T.int32(1)))

    def run(self) -> None:
        """Forwards the tokens after the chunk are fetched meanwhile, backwards those before it."""
        ahead = self.first - self.chunk if self.backward else self.first + self.chunk
        if self.scan.loops or not self.backward:
            self._run(self.block, self.sequence, ahead, self.suffix)
        else:
            self._run(self.block, suffix=self.suffix)
        for p in self.made:
            if p.at is not None and not self._is_whole(p):
                self.copy(p, self.emitter.stores[p.name], self.tokens_of(p, self.suffix), self.emitter.tokens)

    def run_updates(self) -> None:
        self._run(self.scan.updates, self.scan.sequence, self.first + self.chunk)

    def _run(
        self, assigns: Sequence[Assign], sequence: Sequence[Expr] = (), ahead: Any = None, suffix: str = ""
    ) -> None:
        """A block of the program on the tokens of a sequence, statement by statement; those from the token `ahead` on
        are fetched meanwhile. What products read often is copied at first: rows at some large distance from each other
        share few places of a cache.
        """
        stores = self.emitter.stores
        for p in (a.target for a in assigns):
            if p.at is not None and self._is_whole(p):
                stores[p.name] = self.tokens_of(p, suffix)
            elif p.at is not None or p.name not in stores:
                self.emitter.reserve(p.name, p.axes)
        names = [p.name for p in sequence]
        groups = fuse_loops(statements(assigns, self.program, {*stores, *names}))
        self._sequences_ready(sequence, [n for n in names if any(read_often(n, g) for g in groups)])
        for i, (group, over) in enumerate(zip(groups, read_last(groups), strict=True)):
            if ahead is not None:
                self._fetch_part(sequence, ahead, i, len(groups))
            self.emitter.group(group)
            self.emitter.release(over)


def _one() -> Any:
    return tirx.const(1, "int32")
