"""Calls in `torch.inference_mode`, where no tensor may have a gradient, and where a network learns all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from tttc.networks.decoding import NetworkState

Method = TypeVar("Method", bound=Callable[..., Any])


def outside_inference(method: Method) -> Method:
    """The method, which leaves that mode while it runs: inner gradients need tensors that can be recorded. What comes
    from inside the mode, and cannot, is copied.
    """

    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*map(_usual, args), **{n: _usual(x) for n, x in kwargs.items()})

    return called  # type: ignore[return-value]


def _usual(x: Any) -> Any:
    if isinstance(x, NetworkState):
        return x.map_tensors(_usual)
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x
