"""Rewriting: named rules with Python's `match` as the pattern language, applied until nothing changes.

A rule is a function `Expr -> Expr | None` with the rewriting written in words and the operations that it is about; who
wants to know which rules fire watches them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from tttc.ir.expr import Expr, postorder, rebuild, transform


class Rule(NamedTuple):
    """`title` says what becomes what; `apply` returns the new expression, or None where the rule does not match. It is
    asked about nodes of the operations `ops`; without any, about all.
    """

    title: str
    apply: Callable[[Expr], Expr | None]
    ops: tuple[str, ...] = ()


def rule(title: str, *ops: str) -> Callable[[Callable[[Expr], Expr | None]], Rule]:
    """Name a rewriting, and the operations at its root: @rule("x * 1 -> x", "mul")."""
    return lambda function: Rule(title, function, ops)


Watch = Callable[[Rule, Expr, Expr], object]
_watch: ContextVar[Watch] = ContextVar("_watch", default=lambda rule, before, after: None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Call `watch(rule, before, after)` for every node that a rule replaces meanwhile."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each rule fires meanwhile, by its title."""
    count: Counter[str] = Counter()
    with watched(lambda rule, before, after: count.update((rule.title,))):
        yield count


def rewrite(roots: Iterable[Expr], rules: Sequence[Rule], moved: dict[Expr, Expr] | None = None) -> list[Expr]:
    """Apply the rules bottom-up until none matches. `moved` collects what each node became."""
    roots = list(roots)
    watch = _watch.get()
    of_op = cache(lambda op: [r for r in rules if not r.ops or op in r.ops])
    settled: set[Expr] = set()  # no rule matches, whatever is above

    def simplified(node: Expr) -> Expr:
        for _ in range(100):
            if node in settled:
                return node
            for one in of_op(node.op):
                replaced = one.apply(node)
                if replaced is not None and replaced is not node:
                    watch(one, node, replaced)
                    node = replaced
                    break
            else:
                settled.add(node)
                return node
        raise RuntimeError(f"the rules do not settle on {node!r}")

    for _ in range(20):
        sweep: dict[Expr, Expr] = {}
        new = transform(roots, lambda node, src: simplified(rebuild(node, src)), sweep)
        if moved is not None:
            _compose(moved, sweep)
        if settled.issuperset(postorder(new)) or new == roots:  # another sweep would change nothing
            return new
        roots = new
    return roots


def _compose(total: dict[Expr, Expr], sweep: dict[Expr, Expr]) -> None:
    """Follow every node through one more sweep."""
    for node, became in list(total.items()):
        total[node] = sweep.get(became, became)
    for node, became in sweep.items():
        total.setdefault(node, became)
