"""Where values come from: the user's line and the user's name of each, collected while functions are traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from tttc.errors import Place, users_place
from tttc.ir.expr import Expr

_places: ContextVar[dict[Expr, Place] | None] = ContextVar("places", default=None)


@contextmanager
def captured_places() -> Iterator[dict[Expr, Place]]:
    """Collect the place of every value that the user's functions make; of one made twice, the first."""
    places: dict[Expr, Place] = {}
    token = _places.set(places)
    try:
        yield places
    finally:
        _places.reset(token)


def note(e: Expr) -> None:
    """The running line of the user's makes this value, and what is below it that no line has made before."""
    places = _places.get()
    if places is None or e.op in _GIVEN or e in places or (place := users_place()) is None:
        return
    below = [e]
    while below:
        node = below.pop()
        if node.op not in _GIVEN and node not in places:
            places[node] = place
            below.extend(node.src)


_GIVEN = ("leaf", "const", "size")


@contextmanager
def captured_names(
    functions: Sequence[Callable[..., Any]], value: Callable[[Any], Expr | None]
) -> Iterator[dict[Expr, str]]:
    """Collect the local variables of the user's functions as they return: the names that their values get in print.

    `value` gives the expression that a variable holds, if it does.
    """
    codes = {f.__code__ for f in functions if hasattr(f, "__code__")}
    names: dict[Expr, str] = {}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_code in codes:
            for name, held in frame.f_locals.items():
                e = value(held)
                if e is not None and e.op not in _GIVEN:
                    names.setdefault(e, name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield names
    finally:
        if before is None or callable(before):
            sys.setprofile(before)
        else:
            before.enable()  # cProfile, which is no function that could be set
