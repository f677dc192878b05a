"""Marks for `torch.compile`: those of `torch.compiler` import the compiler, a second for who never compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(reason: str) -> Callable[[Function], Function]:
    """`torch.compiler.disable(reason=...)`: no graph holds the function, nor anything that it calls."""

    def marked(function: Function) -> Function:
        return _with(_disable_dynamo(function), _torchdynamo_disable=True, _torchdynamo_disable_msg=reason)

    return marked


def constant_in_graphs(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: a graph holds what the function returned while it was made."""
    return _with(function, _dynamo_marked_constant=True)


def _with(function: Any, **marks: Any) -> Any:
    vars(function).update(marks)
    return function
