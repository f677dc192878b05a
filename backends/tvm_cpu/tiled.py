"""A scan in strips of a free axis, where there are fewer heads than threads: every strip is like another head.

    z, W = scan(W, q, k, v)                        one head, W: [D, D]
    z[i], W[:, i] = scan(W[:, i], q, k, v[i])      n of them, W[:, i]: [D, D / n]; sequences are read where they lie

What all strips read, each of them makes again: the products of keys with keys, say. The backward is cut as its forward
was; the cotangents of what all strips read are added up.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import prod
from threading import Lock

import torch

from tttc.backends.memory import like
from tttc.backends.scan import Tensors
from tttc.backends.tiling import cut_axis, cut_program
from tttc.backends.tvm_common.scan import Stored
from tttc.backends.tvm_cpu.machine import TileConfig
from tttc.backends.tvm_cpu.scan import CPUScan
from tttc.ir.expr import Expr
from tttc.ir.free import FreeAxis
from tttc.ir.program import AdjointProgram, Scan, cotangent

MIN_WORK_TO_WAKE = 1 << 24  # tokens times weights of a head, for which waking another thread takes what it would save
MIN_THREADS_PER_HEAD = (
    4  # threads for each head: with two, both strips doing what they share, a whole head was up to a third faster
)
SERIAL = 1 << 14  # numbers that torch adds up without waking other threads
LEAST_VECTORS = 2  # that a strip has at least: narrower ones would do little but what all of them do


class StripScan(CPUScan):
    """One scan: head by head, or in strips of heads where that keeps more threads busy."""

    def __init__(self, scan: Scan, program: AdjointProgram, config: TileConfig | None = None) -> None:
        super().__init__(scan, program, config)
        self._parts: dict[int, CPUScan] = {}
        self._lock = Lock()

    @cached_property
    def custom_op(self) -> CPUScan:
        """Head by head: a graph has to know what is kept whatever the number of threads."""
        return CPUScan(self.scan, self.program, self.config)

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        n = self.strips(inputs)
        if n == 1:
            return super().forward(inputs, checkpoint)
        outputs = self.outputs(inputs)
        filled = [_Filled(p, x, self._slot(p), n) for p, x in zip(self.scan.results, outputs, strict=True)]
        places = [f.place for f in filled]
        carries = self.part(n).forward_into(places, self._cut(self.scan.params, inputs, n), checkpoint)
        for f in filled:
            f.finish()
        return tuple(outputs), carries

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        n = self._strips_of(saved, inputs)
        if n == 1:
            return super().backward(inputs, saved, checkpoint, cotangents)
        params, stored = self.scan.params, self._stored_backward(inputs)
        dtypes = [self.dtype if self._slot(p) is None else x.dtype for p, x in zip(params, inputs, strict=True)]
        results = [like(p, x.shape, x, d) for p, x, d in zip(params, inputs, dtypes, strict=True)]
        filled = [_Filled(p, x, self._slot(p), n) for p, x in zip(params, results, strict=True)]
        places, cut = [f.place for f in filled], self._cut(params, inputs, n)
        given = self._cut(self.scan.results, cotangents, n)
        self.part(n).backward_into(places, stored, cut, saved, checkpoint, given)
        for f in filled:
            f.finish()
        return tuple(r.to(x.dtype) for r, x in zip(results, inputs, strict=True))

    def prewarm_backward(self, inputs: Tensors) -> None:
        n = self.strips(inputs)
        if n == 1:
            super().prewarm_backward(inputs)
        else:
            self.part(n).expect(self._stored_backward(inputs))

    def _stored_backward(self, inputs: Tensors) -> Stored:
        """As the inputs are, but what is to be added up is not rounded before."""
        stored = self.stored(inputs)
        full = str(self.dtype).removeprefix("torch.")
        named = {p.name: cotangent(p).name for p in self.scan.params if self._slot(p) is None}
        return tuple(sorted((*stored, *((named[n], full) for n, _ in stored if n in named))))

    # -- how it is cut

    @cached_property
    def free(self) -> FreeAxis | None:
        """The axis that may be cut."""
        return cut_axis(self.scan, self.program)

    def strips(self, inputs: Tensors) -> int:
        """Into how many to cut each head: equal ones of whole vectors, and no more than there are threads for. One
        more than those, and some thread would have two to do, each with all that strips have in common.
        """
        batch, heads = inputs[0].shape[:2]
        most = torch.get_num_threads() // max(batch * heads, 1)
        if most < MIN_THREADS_PER_HEAD or batch * heads == 0 or self.free is None:
            return 1
        weights = sum(prod(x.shape[2:]) for x in inputs[: len(self.scan.carry)])
        if self.tokens(inputs) * weights < MIN_WORK_TO_WAKE:
            return 1
        vectors, rest = divmod(self.program.dims[self.free.size], self._machine.lanes)
        if rest:
            return 1
        return max(n for n in range(1, most + 1) if n == 1 or (vectors % n == 0 and vectors // n >= LEAST_VECTORS))

    def _strips_of(self, saved: Tensors, inputs: Tensors) -> int:
        """Into how many the forward cut each head: the backward may find another number of threads."""
        heads = prod(inputs[0].shape[:2])
        return prod(saved[0].shape[:2]) // heads if saved and heads else 1

    def part(self, n: int) -> CPUScan:
        """The scan of one of n strips."""
        with self._lock:
            if n not in self._parts:
                assert self.free is not None
                width = self.program.dims[self.free.size] // n
                program = replace(self._narrow, dims={**self._narrow.dims, self.free.strip: width})
                self._parts[n] = CPUScan(program.scans[0], program, self.config)
            return self._parts[n]

    @cached_property
    def _narrow(self) -> AdjointProgram:
        """The program of a strip, of whatever width."""
        assert self.free is not None
        return cut_program(self.scan, self.program, self.free)

    def _slot(self, p: Expr) -> int | None:
        """Which axis of a tensor [B, H, ...] is cut."""
        assert self.free is not None
        at = self.free.slots.get(p.name)
        return None if at is None else at + 2

    def _cut(self, of: tuple[Expr, ...] | list[Expr], tensors: Tensors, n: int) -> list[torch.Tensor]:
        """Tensors as those of a strip for each head."""
        return [_as_heads(x, self._slot(p), n) for p, x in zip(of, tensors, strict=True)]


class _Filled:
    """A tensor, and the place where its strips are written: in it, where they are the first that a kernel counts."""

    def __init__(self, of: Expr, whole: torch.Tensor, slot: int | None, n: int) -> None:
        self.whole, self.slot, self.n = whole, slot, n
        self.inside = slot == (2 if of.at is None else 3)
        if self.inside:
            self.place = _as_heads(whole, slot, n)
            return
        batch, heads, *own = whole.shape
        if slot is not None:
            own[slot - 2] //= n
        leading = (n, heads) if batch == 1 else (batch, heads * n)
        self.place = like(of, (*leading, *own), whole, whole.dtype)

    def finish(self) -> None:
        """Bring it from where it was written; what every strip has its part of is added up."""
        if self.inside:
            return
        batch, heads = self.whole.shape[:2]
        found = self.place.transpose(0, 1)[None] if batch == 1 else self.place.unflatten(1, (heads, -1))
        if self.slot is None:
            _add_up(found, self.whole)
        else:
            _strips(self.whole, self.slot, self.n).copy_(found)


def _add_up(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """[B, H, n, ...] -> [B, H, ...], by one thread: those of torch would spin on the cores of the next kernel."""
    if whole.dim() == 2:
        torch.sum(parts, 2, out=whole)
        return
    rows = max(1, SERIAL * whole.shape[2] // parts.numel())
    for part, result in zip(parts.split(rows, 3), whole.split(rows, 2), strict=True):
        torch.sum(part, 2, out=result)


def _strips(x: torch.Tensor, slot: int | None, n: int) -> torch.Tensor:
    """[B, H, ...] -> [B, H, n, ...]: its strips, or n times the same."""
    shape, strides, step = list(x.shape), list(x.stride()), 0
    if slot is not None:
        shape[slot] //= n
        step = shape[slot] * strides[slot]
    return x.as_strided((*shape[:2], n, *shape[2:]), (*strides[:2], step, *strides[2:]))


def _as_heads(x: torch.Tensor, slot: int | None, n: int) -> torch.Tensor:
    """[B, H, ...] -> [n, H, ...] of a single batch element, or [B, H n, ...]; what all strips read is copied only where
    both batch and heads are several.
    """
    parts = _strips(x, slot, n)
    return parts[0].transpose(0, 1) if len(x) == 1 else parts.flatten(1, 2)
