"""Free axes: those along which a scan does the same thing over and over, each entry from its own entries alone.

    W = decay * W + outer(k, v);  z = q @ W        every column of W comes from that column and its entry of v
    ->  W[:, strip], v[strip]  ->  z[strip]        so some of the columns make a scan of their own, like another head

An axis of a value and an axis of an operand are the same where the operation goes through them entry by entry, under
whatever names. What is the same so makes a class, which is free unless something sums, orders or normalises along a
member of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tttc.ir import build as b
from tttc.ir.expr import Axis, Expr, postorder, rebuild, transform
from tttc.ir.names import suffixed
from tttc.ir.program import T_AXIS, Assign, Scan, values

_LABELS = ("leaf", "rename", "broadcast")  # their arguments name axes, yet they do nothing along them


class Slot(NamedTuple):
    """An axis of a variable, whatever it is called where the variable is read."""

    variable: str
    position: int


@dataclass(frozen=True)
class FreeAxis:
    """Where a free axis of a scan is: in `slots` of its variables, and in `places` of its expressions.

    Every result has it. A variable that is not in `slots` is the same for every strip.
    """

    size: str
    slots: dict[str, int]
    places: frozenset[tuple[Expr, Axis]]

    @property
    def strip(self) -> str:
        """The dim of a strip; that of the whole axis keeps its meaning."""
        return suffixed(self.size, "strip")

    def cut(self, scan: Scan) -> Scan:
        """The scan of one strip."""
        roots = transform(values(scan.block), self._narrowed)
        made = [Assign(self._variable(a.target), v) for a, v in zip(scan.block.assigns, roots, strict=True)]
        stored = len(scan.outputs)
        return replace(
            scan,
            name=f"{scan.name}_strip",
            fixed=tuple(map(self._variable, scan.fixed)),
            carry=tuple(map(self._variable, scan.carry)),
            sequence=tuple(map(self._variable, scan.sequence)),
            outputs=tuple(made[:stored]),
            updates=tuple(made[stored:]),
        )

    def _narrowed(self, e: Expr, src: tuple[Expr, ...]) -> Expr:
        if e.op == "leaf":
            return self._variable(e)
        if e.op == "rename":
            pairs = ((self._axis(e.src[0], old), self._axis(e, new)) for old, new in e.arg)
            return b.rename(src[0], dict(pairs))
        if e.op == "broadcast":
            return b.broadcast(src[0], tuple(self._axis(e, a) for a in e.arg))
        return rebuild(e, src)

    def _axis(self, e: Expr, axis: Axis) -> Axis:
        return _narrow(axis) if (e, axis) in self.places else axis

    def _variable(self, e: Expr) -> Expr:
        found, axes = e.arg
        at = self.slots.get(found.name)
        return Expr("leaf", (), (found, tuple(_narrow(a) if i == at else a for i, a in enumerate(axes))))


def _narrow(axis: Axis) -> Axis:
    return Axis(suffixed(axis.name, "strip"), suffixed(axis.size, "strip"))


def free_axis(scan: Scan) -> FreeAxis | None:
    """The first axis of the first result that is free, and that all results have; not one over tokens."""
    classes = _Classes()
    for e in postorder(values(scan.block)):
        _through(e, classes)
    for a in scan.block.assigns:
        for i, axis in enumerate(a.target.axes):
            if axis in a.value.axes:
                classes.join((a.value, axis), Slot(a.leaf.name, i))
    first = scan.results[0].axes if scan.loops else ()
    candidates = (_class_of(scan, i, classes) for i, axis in enumerate(first) if axis.size != T_AXIS.size)
    return next((found for found in candidates if found is not None), None)


def _class_of(scan: Scan, position: int, classes: _Classes) -> FreeAxis | None:
    """The class of an axis of the first result, if it can be cut."""
    first = scan.results[0]
    members = classes.of(Slot(first.name, position))
    slots = [x for x in members if isinstance(x, Slot)]
    where = dict(sorted(slots))
    once = len(where) == len(slots)  # a matrix of entries with entries is no strip of either
    if classes.coupled & members or not once or any(p.name not in where for p in scan.results):
        return None
    places = [x for x in members if not isinstance(x, Slot)]
    nodes = {e for e, _ in places}
    if len(nodes) != len(places):
        return None
    return FreeAxis(first.axes[position].size, where, frozenset(places))


def _through(e: Expr, classes: _Classes) -> None:
    """Which axes of a value are those of its operands; coupled are those that end here, and those it runs along."""
    to = dict(e.arg) if e.op == "rename" else {}
    along = set() if e.op in _LABELS else set(_axes_in(e.arg))
    for s in e.src:
        for axis in s.axes:
            place = (e, to.get(axis, axis))
            classes.join((s, axis), place)
            if place[1] not in e.axes:
                classes.coupled.add((s, axis))
    classes.coupled |= {(e, axis) for axis in along}
    if e.op == "leaf":
        for i, axis in enumerate(e.axes):
            classes.join((e, axis), Slot(e.name, i))


def _axes_in(x: Any) -> Iterator[Axis]:
    """The axes that the argument of an operation names."""
    if isinstance(x, Axis):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _axes_in(part)


class _Classes:
    """Disjoint sets."""

    def __init__(self) -> None:
        self.members: dict[Hashable, set[Any]] = {}
        self.coupled: set[Any] = set()

    def of(self, x: Hashable) -> set[Any]:
        return self.members.setdefault(x, {x})

    def join(self, x: Hashable, y: Hashable) -> None:
        small, large = sorted((self.of(x), self.of(y)), key=len)
        if small is not large:
            large |= small
            for each in small:
                self.members[each] = large
