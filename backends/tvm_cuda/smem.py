"""Which values of a kernel lie in shared memory, and where: what is never alive together may have the same place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tttc.backends.tvm_cpu.machine import BYTES

ALIGNED = 128  # bytes: tensor cores load from multiples of 32, and banks repeat after 128
FOREVER = 1 << 30
SMALL = 512  # bytes: not worth a way outside

Size = int | str  # a number, or "T" and "T16": the tokens of the call, and these as whole sixteens


@dataclass(frozen=True)
class Variable:
    """Memory for a value that the steps from `begin` to `end` use."""

    name: str
    shape: tuple[Size, ...]
    dtype: str
    begin: int = 0
    end: int = FOREVER
    stays: bool = False
    """Whether it must lie on the chip."""

    @property
    def bytes(self) -> int | None:
        """None where the length of the call decides."""
        total = BYTES[self.dtype]
        for n in self.shape:
            if isinstance(n, str):
                return None
            total *= n
        return -(-total // ALIGNED) * ALIGNED

    def meets(self, other: Variable) -> bool:
        """Whether both are alive at some step."""
        return self.begin <= other.end and other.begin <= self.end


@dataclass(frozen=True)
class Allocation:
    """Offsets in shared memory, its size, and what lies in the workspace of the caller instead."""

    offsets: Mapping[str, int]
    size: int
    outside: tuple[Variable, ...]
    inside: Mapping[str, Variable]

    def same_place(self, x: str, y: str) -> bool:
        """Whether two names have memory in common."""
        if x == y:
            return True
        if x not in self.offsets or y not in self.offsets:
            return False
        a, b = self.offsets[x], self.offsets[y]
        return a < b + (self.inside[y].bytes or 0) and b < a + (self.inside[x].bytes or 0)


def allocate(variables: Iterable[Variable], limit: int) -> Allocation:
    """Largest first, each at the lowest place that is free while it is alive; what does not fit goes outside.

    allocate([W: 0..9 64 KB, x: 1..2 16 KB, y: 3..4 16 KB], 96 KB)  ->  W at 0, x and y at 64 KB; 80 KB in all
    """
    inside = [v for v in variables if v.bytes is not None]
    outside = [v for v in variables if v.bytes is None]
    kept = sorted((v for v in inside if v.end == FOREVER and not v.stays), key=lambda v: v.bytes or 0)
    while kept and sum(v.bytes or 0 for v in inside if v.end == FOREVER) > limit * 3 // 4:
        inside.remove(kept[-1])  # there must be room for what comes and goes
        outside.append(kept.pop())
    while True:
        offsets, size = _packed(inside)
        if size <= limit:
            return Allocation(offsets, size, tuple(outside), {v.name: v for v in inside})
        moved = _least(inside, size - limit)
        inside.remove(moved)
        outside.append(moved)


def _packed(variables: Sequence[Variable]) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    done: list[Variable] = []
    for v in sorted(variables, key=lambda v: (-(v.bytes or 0), v.begin)):
        taken = sorted((offsets[d.name], offsets[d.name] + (d.bytes or 0)) for d in done if d.meets(v))
        at = 0
        for begin, end in taken:
            if at + (v.bytes or 0) <= begin:
                break
            at = max(at, end)
        offsets[v.name] = at
        done.append(v)
    return offsets, max((offsets[v.name] + (v.bytes or 0) for v in variables), default=0)


def _least(variables: Sequence[Variable], excess: int) -> Variable:
    """What goes outside: of the values that are alive where it is most crowded the smallest that makes enough room, or
    the largest; one that is kept between chunks only when there is no other. Single numbers stay.
    """
    steps = {v.begin for v in variables}
    crowded = max(steps, key=lambda i: sum(v.bytes or 0 for v in variables if v.begin <= i <= v.end))
    there = [v for v in variables if v.begin <= crowded <= v.end and (v.bytes or 0) > SMALL and not v.stays]
    if not there:
        raise ValueError(f"a block needs more shared memory than there is, by {excess} bytes")
    passing = [v for v in there if v.end != FOREVER] or there
    enough = [v for v in passing if (v.bytes or 0) >= excess]
    return min(enough, key=lambda v: v.bytes or 0) if enough else max(passing, key=lambda v: v.bytes or 0)
