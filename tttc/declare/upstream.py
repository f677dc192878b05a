"""The loss of one token, and inside it what comes from above: the v of the call, where a network gives a cotangent.

    def loss(self, k):                               z = learner(k); the network's loss is L(z), and u = dL / dz
        return tttc.upstream(self.learner(k))        dot(z, u), whose derivative by the states is that of L

`v` is a token like any other, so u has its axes, its place in a call, its adjoint and its rows of an open mini-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_above: ContextVar[Any] = ContextVar("above", default=None)


def loss_of(declaration: Any, k: Any, v: Any) -> Any:
    """The loss of a bound declaration on one token: `loss(k, v)`, or `loss(k)` where it takes no more."""
    before = _above.set(v)
    try:
        return declaration.loss(k, v) if _takes_target(declaration.loss) else declaration.loss(k)
    finally:
        _above.reset(before)


def from_above() -> Any:
    """The cotangent of the running loss; None where no loss runs."""
    return _above.get()


def _takes_target(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes v; one that takes neither k alone nor both is called with both, and says so."""
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return True
    return _binds(signature, 2) or not _binds(signature, 1)


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*(None,) * count)
    except TypeError:
        return False
    return True
