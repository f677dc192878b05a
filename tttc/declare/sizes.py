"""The sizes of dims, where they are known while a declaration is traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from tttc.declare.number import number
from tttc.ir.expr import Axes

_sizes: ContextVar[Mapping[str, int] | None] = ContextVar("sizes", default=None)


@contextmanager
def known_sizes(dims: Mapping[str, int]) -> Iterator[None]:
    """Inside, `tttc.size` of a traced value is the size of its dim."""
    token = _sizes.set(dims)
    try:
        yield
    finally:
        _sizes.reset(token)


def axis_size(axes: Axes, axis: int) -> int:
    """The size of an axis of a traced value."""
    return size_of_dim(axes[axis].size)


def size_of_dim(dim: str) -> int:
    """The size of a dim; 2 where a declaration is checked without sizes."""
    found = number((_sizes.get() or {}).get(dim, 2))
    return 2 if found is None else int(found)  # a size that is none is refused when the dims are read
