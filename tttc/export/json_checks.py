"""Values read from JSON, each of the kind that is meant; whatever else stands there is refused with its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from tttc.ir.names import spelled

T = TypeVar("T")
LONGEST_NAME = 200
LARGEST_INTEGER = 2**53  # of integers: what floating point counts


class Malformed(ValueError):
    """What a file says that no program does, with the reason."""


def fail(what: str) -> NoReturn:
    raise Malformed(what)


def shown(x: Any) -> str:
    """A value in a message, on one line and not at any length."""
    text = ascii(x)
    return text if len(text) <= 60 else f"{text[:57]}..."


def table(x: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """An object; with just these keys, where they are given."""
    if not isinstance(x, dict):
        fail(f"{where} is {shown(x)}, no object")
    if keys is not None and set(x) != set(keys):
        missing, unknown = [k for k in keys if k not in x], [k for k in x if k not in keys]
        said = [f"lacks {', '.join(missing)}"] if missing else []
        said += [f"has {', '.join(map(shown, unknown))}, which is unknown"] if unknown else []
        fail(f"{where} {' and '.join(said)}")
    return x


def items(x: Any, where: str, length: int | None = None) -> list[Any]:
    """A list; of a length, where that is given."""
    if not isinstance(x, list) or length not in (None, len(x)):
        fail(f"{where} is {shown(x)}, no list{'' if length is None else f' of {length}'}")
    return x


def integer(x: Any, where: str, least: int = 1, most: int = LARGEST_INTEGER) -> int:
    if type(x) is not int or not least <= x <= most:
        fail(f"{where} is {shown(x)}, no integer from {least} to {most}")
    return x


def number(x: Any, where: str) -> float:
    """A finite number, as a float."""
    if type(x) not in (int, float) or not math.isfinite(x):
        fail(f"{where} is {shown(x)}, no finite number")
    return float(x)


def flag(x: Any, where: str) -> bool:
    if type(x) is not bool:
        fail(f"{where} is {shown(x)}, not true or false")
    return x


def one_of(x: Any, where: str, known: Sequence[Any]) -> Any:
    if not isinstance(x, str | None) or x not in known:
        fail(f"{where} is {shown(x)}; it is one of {', '.join(map(str, known))}")
    return x


def word(x: Any, where: str) -> str:
    """A name as users give them."""
    if not isinstance(x, str) or not x.isidentifier() or len(x) > LONGEST_NAME:
        fail(f"{where} is {shown(x)}, no name")
    return x


def name(x: Any, where: str) -> str:
    """A name of a variable: one that users give, or one with the marks of what is derived."""
    if not isinstance(x, str) or len(x) > LONGEST_NAME or not spelled(x).isidentifier():
        fail(f"{where} is {shown(x)}, no name of a variable")
    return x


def optional(read: Callable[..., T], x: Any, where: str) -> T | None:
    return None if x is None else read(x, where)
