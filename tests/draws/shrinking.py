"""The smallest draw that fails in the same way, and the test that it becomes."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from tests.draws.comparison import Call, Outcome
from tests.draws.recipe import Recipe

Pair = tuple[Recipe, Call]


def shrunk(pair: Pair, fails: Callable[[Pair], bool], seconds: float = 60.0) -> Pair:
    """Field by field to simpler values, as long as it `fails` in the same way and there is time."""
    until = time.monotonic() + seconds
    found = True
    while found:
        found = False
        for of, name in [(i, f.name) for i in (0, 1) for f in fields(pair[i])]:
            for simpler in _simpler(pair, of, name):
                if time.monotonic() > until:
                    return pair
                if fails(simpler):
                    pair, found = simpler, True
                    break
    return pair


def _simpler(pair: Pair, of: int, name: str) -> Iterator[Pair]:
    """The same draw with one field of its recipe or its call simpler, the simplest first."""
    part = pair[of]
    value = getattr(part, name)
    if name == "dims":
        values: Iterator[Any] = _smaller(value)
    elif name == "tokens":
        values = iter(range(value))
    else:
        values = _values(value, next(f.default for f in fields(part) if f.name == name))
    for x in values:
        changed = replace(part, **{name: x})
        yield (pair[0], changed) if of else (changed, pair[1])


def _values(value: Any, default: Any) -> Iterator[Any]:
    """The default, and of a tuple what is left without one of its elements."""
    if value == default:
        return
    yield default
    if isinstance(value, tuple) and len(value) > 1:
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)))


def _smaller(dims: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """All of them 2, then each alone one smaller; or 1, where they fail only so."""
    if any(n > 2 for n in dims.values()):
        yield {d: min(n, 2) for d, n in dims.items()}
        yield from ({**dims, d: n - 1} for d, n in dims.items() if n > 2)
    elif any(n < 2 for n in dims.values()):
        yield from ({**dims, d: 2} for d, n in dims.items() if n < 2)


def as_test(pair: Pair, outcome: Outcome, backend: str, name: str) -> str:
    """A test to paste: the recipe, the call and what is wrong."""
    recipe, call = pair
    said = textwrap.indent(outcome.text.rstrip(), "#   ", lambda line: True)
    return (
        f"# {outcome.kind}: {outcome.mark}\n{said}\n"
        "from tests.draws.comparison import Call, outcome\n"
        "from tests.draws.recipe import Recipe\n\n\n"
        f"def test_{name}():\n"
        f"    recipe = {recipe!r}\n"
        f"    call = {call!r}\n"
        f"    found = outcome(recipe, call, {backend!r})\n"
        "    assert not found.fails, found.text\n"
    )
