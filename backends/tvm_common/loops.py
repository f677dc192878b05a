"""Which statements of a chunk share a loop, and a whole program as such loops, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tttc.backends.tvm_common.statements import Statement, read, statements
from tttc.ir.adjoint import backward_block
from tttc.ir.expr import Axes, leaves
from tttc.ir.names import marked, own, size_of, worded
from tttc.ir.program import T_AXIS, AdjointProgram, Scan


@dataclass(frozen=True)
class FusedLoop:
    """Statements that run together: one by one, or, with `rows`, token by token in one loop over the tokens.

    What is in `local` is read nowhere else: one row of it is enough.
    """

    statements: tuple[Statement, ...]
    rows: bool = False
    local: frozenset[str] = frozenset()


def fuse_loops(made: Iterable[Statement], *, split: bool = True) -> list[FusedLoop]:
    """Neighbours that keep the token in one loop; the order changes where that brings them together.

    Without `split` a loop goes on after a reduction.
    """
    waiting, groups = list(made), []
    outside = [s.target for s in waiting if s.target.role != "scratch"]
    while waiting:
        taken = _ready(waiting)
        for s in taken:
            waiting.remove(s)
        if not _in_rows(taken[0]):
            groups.append(FusedLoop(tuple(taken)))
            continue
        kept = {e.name for e in outside}
        kept |= {e.name for s in waiting for e in leaves([s.value])}
        groups += (
            _loops(taken, kept) if split else [FusedLoop(tuple(taken), True, frozenset(s.name for s in taken) - kept)]
        )
    return groups


def _loops(taken: Sequence[Statement], kept: set[str]) -> list[FusedLoop]:
    """A loop ends with a reduction: no token waits for its own, it is read in the next loop."""
    level: dict[str, int] = {}
    for s in taken:
        before = [t for t in taken if t.name in {e.name for e in leaves([s.value])} and t.name in level]
        level[s.name] = max((level[t.name] + (t.kind == "row") for t in before), default=0)
    parts = [tuple(s for s in taken if level[s.name] == n) for n in range(1 + max(level.values()))]
    groups = []
    for part in parts:
        elsewhere = {e.name for s in taken if s not in part for e in leaves([s.value])}
        groups.append(FusedLoop(part, True, frozenset(s.name for s in part) - kept - elsewhere))
    return groups


def read_last(groups: Sequence[FusedLoop]) -> list[list[str]]:
    """For each group the scratch variables that no later one reads."""
    last: dict[str, int] = {}
    for i, group in enumerate(groups):
        for s in group.statements:
            found = [s.target, *leaves([s.value])]
            last |= {e.name: i for e in found if e.role == "scratch"}
    return [[name for name, at in last.items() if at == i] for i in range(len(groups))]


def read_often(name: str, group: FusedLoop) -> bool:
    """Whether a product reads it: every entry once for each row or column of the result."""
    return any(
        s.products and any(e.name == name and len(e.axes) > 1 for e, _ in read(s.value)) for s in group.statements
    )


def by_vectors(name: str, group: FusedLoop) -> bool:
    """Whether the group meets a row [t, D] only as whole vectors of it, one after the other: never one number of it,
    and in no loop whose passes have no number.
    """
    return all(
        axes[-1] == s.lane and (s.kind == "tile" or s.lane not in s.value.arg or len(s.value.arg) == 1)
        for s in group.statements
        for e, axes in (*read(s.value), (s.target, s.target.axes))
        if e.name == name
    )


def _ready(waiting: Sequence[Statement]) -> list[Statement]:
    """The first statement, and where it goes by rows all later ones that can join it."""
    first = waiting[0]
    if not _in_rows(first):
        return [first]
    taken = [first]
    missing: set[str] = set()
    for s in waiting[1:]:
        names = {e.name for e in leaves([s.value])}
        late = s.target.role != "scratch" and s.target.at is None
        if _in_rows(s) and not names & missing and not late and _same_rows(s, {t.name for t in taken}):
            taken.append(s)
        else:
            missing.add(s.name)
    return taken


def _in_rows(s: Statement) -> bool:
    return s.row is not None and s.kind in ("tile", "row") and not s.products and s.row not in _summed(s)


def _summed(s: Statement) -> Axes:
    return tuple(s.value.arg) if s.kind == "row" else ()


def _same_rows(s: Statement, together: set[str]) -> bool:
    """Whether a statement reads of the others only the row that it makes."""
    return all(axes[:1] == (s.row,) for e, axes in read(s.value) if e.name in together)


def heads_per_task(scan: Scan, dims: Mapping[str, int], lanes: int) -> bool:
    """Whether a forward kernel does a chunk for some heads before the next: their weights stay in the new carry."""
    whole = all(p.axes and dims[p.axes[-1].size] % lanes == 0 for p in scan.carry)
    return scan.loops and whole and bool(scan.carry) and {a.target for a in scan.updates} == set(scan.carry)


def listing(program: AdjointProgram) -> str:
    """Every kernel as the statements that it is made of."""
    lines = [f"# Kernels of the variant `{program.name}`: for each batch element and head, in parallel, ..."]
    for scan in program.scans:
        chunks = f"for {marked(own('c'))} in chunks(T, {scan.chunk}):" if scan.loops else "once:"
        lines += ["", f"{scan.name}: {chunks}", *_listed(statements(scan.block.assigns, program))]
        if scan.differentiated:
            backwards = chunks.replace("chunks(", "reversed(chunks(").replace("):", ")):")
            made = statements(backward_block(program.adjoint_of(scan)), program)
            lines += ["", f"{scan.name}_adjoint: {backwards}", *_listed(made)]
    return worded("\n".join(lines) + "\n").text


def _listed(made: Iterable[Statement]) -> list[str]:
    lines = []
    for g in fuse_loops(made):
        lines += [f"    for {marked(size_of(T_AXIS.name))} in {marked(own('c'))}:"] if g.rows else []
        lines += [f"    {'    ' if g.rows else ''}{s.text(marked)}" for s in g.statements]
    return lines
