"""The order of the lines of a kernel: a value is a register, so what ends its life comes early.

The lines of a block come as they are read best: values in the order of need, then what is stored, then the new values
of the variables. The compilers below this one change little of that order, for a sum or a product across threads is a
barrier to them. So a line goes up where more numbers die with it than it makes:

    y = x * x                      y = x * x
    w = y + q              ->      tl.store(..., x)
    tl.store(..., x)               w = y + q
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from tttc.ir.expr import Expr
from tttc.ir.text import Namer, Step, core


def list_schedule(
    lines: Sequence[Step], size: Callable[[Expr], int], passing: Collection[str], namer: Namer
) -> list[Step]:
    """The same lines in another order, the values that have no name of their own named anew in it.

    Args:
        size: how many numbers a value has.
        passing: the variables that nothing outside of these lines reads.

    New values of variables stay where they are, at the end: moved up they made kernels spill more, not less.
    """
    reads = _reads(lines)
    before = _before(lines, reads)
    sizes = {n: size(e) for names in reads for n, e in names.items() if core(e).op != "leaf" or n in passing}
    readers = Counter(n for names in reads for n in names)
    left = list(range(len(lines)))
    found: list[int] = []

    def gain(i: int) -> int:
        made = size(lines[i].value) if lines[i].target is None else 0
        return sum(sizes.get(n, 0) for n in reads[i] if readers[n] == 1) - made

    while left:
        ready = [i for i in left if before[i].issubset(found) and not _renews(lines[i])]
        best = max(ready, key=gain, default=left[0])
        chosen = best if gain(best) > 0 else left[0]
        left.remove(chosen)
        found.append(chosen)
        readers.subtract(list(reads[chosen]))
    return [lines[i] if lines[i].target else lines[i]._replace(name=namer(lines[i].value)) for i in found]


def _renews(line: Step) -> bool:
    """Whether a line gives a variable its new value."""
    return line.target is not None and line.target.at is None


def _reads(lines: Sequence[Step]) -> list[Mapping[str, Expr]]:
    """The names that each line mentions, and what they stand for."""
    names: dict[Expr, str] = {}
    found: list[Mapping[str, Expr]] = []
    for line in lines:
        read: dict[str, Expr] = {}
        seen: set[Expr] = set()
        stack = [line.value]
        while stack:
            e = stack.pop()
            if e in seen:
                continue
            seen.add(e)
            if e in names:
                read[names[e]] = e
            if e.op == "leaf":
                read[e.name] = e
            elif e not in names or e != core(e):  # under another name for its axes, a value may have a line as well
                stack += e.src
        found.append(read)
        names.setdefault(line.value, line.name)
    return found


def _before(lines: Sequence[Step], reads: Sequence[Collection[str]]) -> list[set[int]]:
    """The lines that must come before each: those that make what it reads, and those that read what it replaces."""
    return [
        {j for j in range(i) if lines[j].name in {*reads[i], lines[i].name} or lines[i].name in reads[j]}
        for i in range(len(lines))
    ]
