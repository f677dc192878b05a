"""The statements of a chunk as steps of a block of threads, and what each of them reads and writes.

    stage k                     k_chunk = k[c]: what products read often is copied next to the threads
    round W                     W_half = bfloat16(W), with zeros up to whole sixteens: an operand of tensor cores
    run   tile x1[t, D] = ...   statements, one by one or in one loop over the tokens

Between two steps that touch the same memory all threads of the block meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tttc.backends.tvm_common.accumulators import accumulated
from tttc.backends.tvm_common.loops import FusedLoop, read_often
from tttc.backends.tvm_common.statements import Statement, read
from tttc.backends.tvm_cuda.device import WARP, Device
from tttc.ir.expr import Axes, Axis, Expr
from tttc.ir.names import suffixed

SLOTS = 8  # numbers of a row that each thread of a warp holds in registers


@dataclass(frozen=True)
class Phase:
    """What all threads do between two meetings; `source` is the leaf that is staged or rounded."""

    kind: str
    writes: frozenset[str]
    reads: frozenset[str]
    source: Expr | None = None
    group: FusedLoop | None = None
    registers: frozenset[str] = frozenset()


@dataclass
class Steps:
    """The steps of a block of assignments; `made` are the values that they need memory for, with their axes."""

    steps: list[Phase] = field(default_factory=list)
    made: dict[str, Axes] = field(default_factory=dict)


class Operand(NamedTuple):
    """A matrix that tensor cores read; `rows` says that the first axis of the variable is the row of the operand."""

    name: str
    rows: bool


class MatrixProduct(NamedTuple):
    """sign * left[r, k] @ right[k, c]."""

    sign: int
    left: Operand
    right: Operand
    over: Axis


def half(name: str) -> str:
    """The rounded copy of a value."""
    return suffixed(name, "half")


def staged(name: str) -> str:
    return suffixed(name, "chunk")


def plan_phases(
    groups: Iterable[FusedLoop], sequences: Collection[str], device: Device, dims: Mapping[str, int]
) -> Steps:
    """What is done group by group, with the copies that it needs, each where it is first read."""
    found = Steps()
    rounded: set[str] = set()
    copied: set[str] = set()
    for group in groups:
        plain, operands = _read(group, device)
        for name, e in plain.items():
            if name in sequences and name not in copied and read_often(name, group):
                copied.add(name)
                found.made[staged(name)] = e.axes
                found.steps.append(Phase("stage", frozenset({staged(name)}), frozenset({name}), e))
        for name, e in operands.items():
            if name not in rounded:
                rounded.add(name)
                found.made[half(name)] = e.axes
                seen = staged(name) if name in copied else name
                found.steps.append(Phase("round", frozenset({half(name)}), frozenset({seen}), e))
        registers = _in_registers(group, dims)
        reads = {staged(n) if n in copied else n for n in plain} | {half(n) for n in operands}
        writes = {s.name for s in group.statements} - registers
        found.made |= {s.name: s.target.axes for s in group.statements if s.name in writes}
        found.steps.append(
            Phase("run", frozenset(writes), frozenset(reads - registers), group=group, registers=frozenset(registers))
        )
        rounded -= writes
    return found


def _read(group: FusedLoop, device: Device) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """The leaves that a group reads as numbers, and those that it reads as operands of tensor cores."""
    plain: dict[str, Expr] = {}
    operands: dict[str, Expr] = {}
    for s in group.statements:
        products = matrix_products(s) if device.tensor_cores else {}
        inside = {o.name for found in products.values() for p in found for o in (p.left, p.right)}
        sums = accumulated(s.value) if products else {}
        others = [e for total in sums.values() for _, e in total.others]
        for value in (*others, *_outside(s.value, set(sums))):
            plain |= {e.name: e for e, _ in read(value)}
        operands |= {e.name: e for e, _ in read(s.value) if e.name in inside}
    return plain, operands


def _outside(value: Expr, sums: set[Expr]) -> list[Expr]:
    """The leaves of an expression that are not under one of the sums."""
    if value in sums:
        return []
    if value.op == "leaf":
        return [value]
    return [e for s in value.src for e in _outside(s, sums)]


def matrix_products(s: Statement) -> dict[Expr, list[MatrixProduct]]:
    """The sums of a statement as products of two matrices, or none if tensor cores cannot run all of them."""
    axes = s.target.axes
    if not s.products or len(axes) != 2:
        return {}
    found: dict[Expr, list[MatrixProduct]] = {}
    for e, total in accumulated(s.value).items():
        for sign, p in total.products:
            product = _matrix_product(sign, p, *axes)
            if product is None:
                return {}
            found.setdefault(e, []).append(product)
    return found


def _matrix_product(sign: int, p: Expr, row: Axis, column: Axis) -> MatrixProduct | None:
    if len(p.src) != 2 or len(p.arg) != 1 or any(f.op not in ("leaf", "rename") for f in p.src):
        return None
    (over,) = p.arg
    factors = [next(iter(read(f))) for f in p.src]
    left = [(e, axes) for e, axes in factors if set(axes) == {row, over} and len(axes) == 2]
    right = [(e, axes) for e, axes in factors if set(axes) == {over, column} and len(axes) == 2]
    if len(left) != 1 or len(right) != 1:
        return None
    (a, a_axes), (b, b_axes) = left[0], right[0]
    return MatrixProduct(sign, Operand(a.name, a_axes[0] == row), Operand(b.name, b_axes[0] == over), over)


# -- rows --------------------------------------------------------------------------------------------------------------


def lane(s: Statement, at: Collection[Axis]) -> Axis | None:
    """The axis along which the threads of a warp stand, for a statement some of whose axes have their place."""
    free = [a for a in s.target.axes if a not in at]
    if s.kind == "row" and (not free or s.lane in s.value.arg):
        return s.lane if s.lane in s.value.arg else s.value.arg[-1]
    return free[-1] if free else None


def _in_registers(group: FusedLoop, dims: Mapping[str, int]) -> set[str]:
    """Rows of a loop over the tokens of which every thread reads only what it wrote."""
    found = {s.name for s in group.statements if s.name in group.local and len(s.target.axes) <= 2}
    for s in group.statements:
        if len(s.target.axes) == 2 and not _few(s.target.axes[-1], dims):
            found.discard(s.name)
        for e, axes in read(s.value):
            own = axes == (s.row,) or axes == (s.row, lane(s, (s.row,) if s.row else ()))
            if not own:
                found.discard(e.name)
    return found


def _few(axis: Axis, dims: Mapping[str, int]) -> bool:
    n = dims.get(axis.size)
    return n is not None and -(-n // WARP) <= SLOTS
