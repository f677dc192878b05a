"""Compiled layers that modules share: one for each declaration, dims, dtype and device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tttc.compiler.driver import compile as compile_variant
from tttc.declare.variant import Variant
from tttc.runtime.custom_ops import untraced
from tttc.runtime.graphs import constant_in_graphs
from tttc.runtime.layer import Layer

Dims = tuple[tuple[str, int], ...]
_COMPILED: dict[tuple[Any, ...], Layer] = {}
_named = SimpleNamespace()  # the same for graphs: one that read a dict would be made anew for every key that is added


def shared(
    variant: type[Variant],
    dims: Dims,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    checkpoint: int | str | None,
    telemetry: bool,
) -> Layer:
    """The layer of these settings, compiled when it is first asked for."""
    key = (variant, dims, dtype, device, backend, checkpoint, telemetry)
    if torch.compiler.is_compiling():
        return getattr(_named, _compile(*key))
    if key not in _COMPILED:
        _compile(*key)
    return _COMPILED[key]


@constant_in_graphs
def _compile(*key: Any) -> str:
    """The name of the layer, made unless it is there: not a part of any graph."""
    if key not in _COMPILED:
        variant, dims, dtype, device, backend, checkpoint, telemetry = key
        options: dict[str, Any] = {"checkpoint": checkpoint, "telemetry": telemetry}
        _COMPILED[key] = untraced(lambda: compile_variant(variant, dict(dims), dtype, device, backend, **options))
    name = f"layer_{list(_COMPILED).index(key)}"
    setattr(_named, name, _COMPILED[key])
    return name
