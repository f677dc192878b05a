"""What the user's functions leave behind: a counter that advances, a list that grows, a random number that was drawn.

A function that fills a cache once is fine. One after which something outside of it is another thing every time is no
function of its arguments, also where its first runs give the same: a schedule that begins to fall at the tenth call.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

Snapshot = dict[str, Any]


def snapshot(functions: list[Callable[..., Any]], classes: list[type]) -> Snapshot:
    """What these functions can change, by the name that a message has for it: the globals and variables around them
    that they mention, the attributes of classes, the generators of random numbers.
    """
    found: Snapshot = {"the random numbers of Python": hash(random.getstate())}
    _, state, position, *_ = np.random.get_state(legacy=True)
    found["the random numbers of NumPy"] = (np.asarray(state).tobytes(), position)
    found["the random numbers of torch"] = torch.get_rng_state().numpy().tobytes()
    for function in functions:
        found |= {f"`{n}`": _content(x) for n, x in _outside(function)}
    for c in classes:
        found |= {f"`{c.__name__}.{n}`": _content(x) for n, x in vars(c).items() if not n.startswith("__")}
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of what is another thing than before, or was not there."""
    return [n for n in after if n not in before or before[n] != after[n]]


def _outside(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    plain = getattr(function, "__wrapped__", function)
    if not isinstance(plain, FunctionType):
        return
    codes = [plain.__code__]
    for code in codes:  # comprehensions and functions inside
        codes += [c for c in code.co_consts if hasattr(c, "co_names")]
        yield from ((n, plain.__globals__[n]) for n in code.co_names if n in plain.__globals__)
    for name, cell in zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from ((f"the default {i} of {plain.__name__}", x) for i, x in enumerate(plain.__defaults__ or ()))


def _content(value: Any, depth: int = 2) -> Any:
    """Something to compare by: plain values as they are, containers by what they hold, others by which they are."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return (id(value), getattr(value, "_version", None))
    if isinstance(value, type | ModuleType | FunctionType) or depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return [(_content(k, depth - 1), _content(v, depth - 1)) for k, v in list(value.items())[:100]]
    if isinstance(value, list | tuple | set | frozenset):
        return [len(value), *(_content(v, depth - 1) for v in list(value)[:100])]
    if type(value).__module__ == "itertools":
        return repr(value)
    held = getattr(value, "__dict__", None)
    return (id(value), _content(held, depth - 1) if isinstance(held, dict) else None)
