"""A scan as a function of TensorIR: its tensors, its loops over chunks, and what is done before and after these.

    W = W_in                                      dW = dW_in
    for chunk in chunks(T, 16):                   for group of chunks, the last one first:
        if chunk % every == 0: kept[...] = W          W = kept[group]; carries = W before each of its chunks
        z[chunk], W = ...                             for chunk in reversed(group):
    W_out = W                                             dq[chunk], ..., dW = ... from carries, dz[chunk], dW
                                                  dW_out = dW

All this is done for each batch element and head. Inside, each chunk is what ir/adjoint.py made, as loops (loops.py).
How tensors are copied, and how the statements of a chunk are run, a machine says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any, Self

from tttc.backends.tvm_common.arguments import LAUNCHED, Argument, arguments, stride_name
from tttc.backends.tvm_common.stores import Store
from tttc.backends.tvm_common.tir import IRBuilder, T, tirx
from tttc.backends.tvm_cpu.emission import Emission
from tttc.backends.tvm_cpu.machine import BYTES, Machine
from tttc.ir.adjoint import backward_block
from tttc.ir.expr import TOKENS, Expr
from tttc.ir.names import Word, own
from tttc.ir.program import AdjointProgram, Scan, cotangent, number_of


class Kernel(ABC):
    """One kernel, while it is written and afterwards.

    Forward: carry, fixed, sequences -> outputs, new carry; and, with a loop, the carry at every `every` chunks.
    Backward: inputs, kept carries, cotangents -> cotangents of the inputs, each in the dtype of what it belongs to.

    `stored` are the dtypes of sequences that have another one than arithmetic, by name.
    """

    called: Word
    """What a variable is called in the text."""
    emitter: Emission
    """What writes the statements of a chunk."""

    def __init__(
        self, scan: Scan, program: AdjointProgram, machine: Machine, stored: Mapping[str, str], backward: bool
    ) -> None:
        self.scan, self.program, self.machine, self.backward = scan, program, machine, backward
        self.dims = program.dims
        self.name = f"{scan.name}_adjoint" if backward else scan.name
        self.block = backward_block(program.adjoint_of(scan)) if backward else scan.block.assigns
        outputs = [a.target for a in scan.outputs]
        self.sequence = (*scan.sequence, *(map(cotangent, outputs) if backward else ()))
        self.made = [cotangent(p) for p in scan.sequence] if backward else outputs
        """What a chunk writes, beside the carry."""
        self.whole = [p for p in self.made if p.at is None]
        """Of that what has no tokens: it is saved at the end."""
        self.suffix = "out" if backward else ""
        self.stored = with_cotangents(scan, stored) if backward else stored
        self.tensors: dict[str, Any] = {}
        self.g: tuple[Any, ...] = ()
        self.first: Any = 0

    # -- what differs between machines

    @abstractmethod
    def _length(self, name: str) -> Any:
        """A number that the caller gives beside the tensors, or with them."""

    @abstractmethod
    def _begin_function(self) -> None:
        """What comes before the tensors of the caller."""

    @abstractmethod
    def each_head(self) -> AbstractContextManager[None]:
        """All batch elements and heads at the same time: the memory of one, and what it has in place."""

    @abstractmethod
    def _begin_chunk(self, first: Any, tokens: Any) -> None:
        """The tokens of a chunk are so many, from `first` on."""

    @abstractmethod
    def _begin_only_chunk(self) -> None:
        """Of what is no loop."""

    @abstractmethod
    def syncthreads(self) -> None:
        """Where several threads work on a head, they meet."""

    @abstractmethod
    def _load(self, p: Expr, source: Store | None) -> None:
        """A variable of the function, from a tensor or zero."""

    @abstractmethod
    def _save(self, p: Expr, target: Store, suffix: str) -> None:
        """A variable of the function to a tensor."""

    @abstractmethod
    def run(self) -> None:
        """A chunk."""

    @abstractmethod
    def run_updates(self) -> None:
        """Of a chunk of the forward what makes the next carry."""

    @abstractmethod
    def uniform_region(self, condition: Any) -> AbstractContextManager[None]:
        """A part that may run or not, the same for all threads of a head."""

    def _named(self, name: str, x: Any) -> Any:
        """A value, computed once where that is worth it."""
        return x

    def _label(self, a: Argument) -> str:
        """What the text calls a tensor."""
        return self.called(a.name)

    def _kind(self, buffer: Any) -> type[Store]:
        """How a tensor of the caller is read and written."""
        return Store

    # -- the function

    def written(self) -> Self:
        """With the whole function, `function`."""
        with self.opened(), self.each_head():
            if self.backward:
                self._backward()
            else:
                self._forward()
        return self

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The function, as far as its tensors; what is written inside is its body."""
        with IRBuilder() as ib:
            with T.prim_func(s_tir=True):
                T.func_name(self.name)
                T.func_attr({"tirx.noalias": True, "global_symbol": self.name})
                self.B, self.H, self.T, self.groups, self.places = map(self._length, LAUNCHED)
                self._begin_function()
                for a in arguments(self.scan, self.backward):
                    self.tensors[a.name] = self._declared(a)
                self.every: Any = T.arg(self.called(own("every")), T.int32()) if self.scan.loops else None
                yield
            self.function: Any = ib.get()

    def _forward(self) -> None:
        self.load(self.scan.carry, "in")
        with self.chunks() as chunk:
            self.save_kept(chunk)
            self.run()
        self.save([a.target for a in self.scan.updates], "out")
        self.save(self.whole, self.suffix)

    def _backward(self) -> None:
        scan = self.scan
        given = [cotangent(a.target) for a in scan.updates]
        found = [cotangent(p) for p in (*scan.carry, *scan.fixed)]
        self.load(given, "in")
        self.load([d for d in found if d not in given], None)
        if not scan.loops:
            self.load(scan.carry, "in")
        with self.reversed_chunks() if scan.loops else self.chunks():
            self.run()
        self.save((*found, *self.whole), self.suffix)

    # -- tensors

    def own(self, p: Expr) -> list[int]:
        """The sizes of a variable without its tokens."""
        return [self.dims[a.size] for a in p.axes if a.size != TOKENS]

    def _declared(self, a: Argument) -> Any:
        """[B, H, T, ...] or [B, H, ...], where batch, heads and tokens may lie at any distance; or [B, H, n, ...]."""
        own = self.own(a.of)
        if a.suffix in ("kept", "work"):
            count = self.groups if a.suffix == "kept" else self.places
            return self._buffer(self._label(a), [self.B, self.H, count, *own], self.machine.dtype)
        leading = [self.B, self.H, *([self.T] if a.of.at else [])]
        strides = [self._length(stride_name(a.name, i)) for i in range(len(leading))]
        strides += [prod(own[i + 1 :]) for i in range(len(own))]
        dtype = self.stored.get(a.of.name, self.machine.dtype)
        return self._buffer(self._label(a), [*leading, *own], dtype, strides)

    def _buffer(self, label: str, shape: Sequence[Any], dtype: str, strides: Sequence[Any] | None = None) -> Any:
        handle = T.arg(f"{label}_handle", T.handle())
        settings = {} if strides is None else {"strides": strides}
        return IRBuilder.name(label, T.match_buffer(handle, tuple(shape), dtype, align=BYTES[dtype], **settings))

    def tensor(self, p: Expr, suffix: str, *prefix: Any) -> Store:
        """A tensor of the caller as the variable of this head."""
        buffer = self.tensors[Argument(p, suffix).name]
        return self._kind(buffer)(buffer, self.machine, (*self.g, *prefix))

    def tokens_of(self, p: Expr, suffix: str = "") -> Store:
        """The tokens of this chunk, where they lie."""
        buffer = self.tensors[Argument(p, suffix).name]
        return self._kind(buffer)(buffer, self.machine, self.g, self.first, self.emitter.tokens)

    def load(self, of: Iterable[Expr], suffix: str | None, *prefix: Any) -> None:
        """Variables of the function from what the caller has of them; without a suffix zero."""
        for p in of:
            self._load(p, None if suffix is None else self.tensor(p, suffix, *prefix))

    def save(self, of: Iterable[Expr], suffix: str, *prefix: Any) -> None:
        for p in of:
            self._save(p, self.tensor(p, suffix, *prefix), suffix)

    def save_kept(self, chunk: Any) -> None:
        """The carry where a group begins; nothing, where there is no room for any."""
        if self.scan.loops and self.scan.carry:
            with self.uniform_region(T.And(self.groups > 0, T.EQ(T.truncmod(chunk, self.every), 0))):
                self.save(self.scan.carry, "kept", T.truncdiv(chunk, self.every))

    # -- chunks

    @property
    def chunk(self) -> Any:
        return number_of(self.scan.chunk, self.T)

    @property
    def count(self) -> Any:
        """How many chunks a sequence has."""
        return T.truncdiv(self.T + (self.chunk - 1), self.chunk)

    @contextmanager
    def chunks(self, begin: Any = 0, end: Any = None) -> Iterator[Any]:
        """All chunks of a loop, or some of them; of what is none its only one."""
        if not self.scan.loops:
            self._begin_only_chunk()
            yield None
            return
        size = self.chunk
        self.syncthreads()
        with T.serial(begin, self.count if end is None else end) as c:
            self._begin_chunk(c * size, T.min(self.T - c * size, size))
            yield c
            self.syncthreads()

    @contextmanager
    def reversed_chunks(self) -> Iterator[None]:
        """Group by group from the last one; in each, first the carry before every chunk, then the chunks backwards.
        Where nothing is carried, the chunks alone.
        """
        size, carry = self.chunk, self.scan.carry
        self.syncthreads()
        if not carry:
            with T.serial(self.count) as back:
                first = (self.count - 1 - back) * size
                self._begin_chunk(first, T.min(self.T - first, size))
                yield
                self.syncthreads()
            return
        with T.serial(self.groups) as i:
            group = self.groups - 1 - i
            first = self._named("first_of_group", group * self.every)
            length = self._named("length", T.min(self.count - first, self.every))
            self.load(carry, "kept", group)
            self.syncthreads()
            with T.serial(length) as j:
                self.save(carry, "work", j)
                with self.uniform_region(j + 1 < length):
                    self._begin_chunk((first + j) * size, tirx.const(size, "int32") if isinstance(size, int) else size)
                    self.run_updates()
                self.syncthreads()
            with T.serial(length) as back:
                j = length - 1 - back
                self.load(carry, "work", j)
                self._begin_chunk((first + j) * size, T.min(self.T - (first + j) * size, size))
                yield
                self.syncthreads()


def with_cotangents(scan: Scan, stored: Mapping[str, str]) -> dict[str, str]:
    """What has another dtype in the backward: cotangents have that of what they belong to, or one of their own."""
    of = (*scan.params, *(x.target for x in scan.outputs))
    return {**{cotangent(p).name: stored[p.name] for p in of if p.name in stored}, **stored}
