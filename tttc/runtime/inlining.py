"""Calls of layers that are made of operations of PyTorch where a module is traced for a process without tttc."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tttc.runtime.arguments import BoundCall
    from tttc.runtime.layer import Layer

Inlined = Callable[["Layer", "BoundCall"], tuple[torch.Tensor, Any]]
"""Makes z, [B, T, H, E], and what stands for the state."""

_inlined: ContextVar[Inlined | None] = ContextVar("inlined", default=None)


@contextmanager
def inlined(by: Inlined) -> Iterator[None]:
    """Inside, every call of a layer is what `by` makes of it."""
    token = _inlined.set(by)
    try:
        yield
    finally:
        _inlined.reset(token)


def inlining() -> Inlined | None:
    """What calls are made by, where it is not the layer itself."""
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():  # a graph of torch.compile reads
        return None  # no context
    return _inlined.get()
