"""Compiled layers that modules share: one for each declaration, dims, dtype and device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tttc.compiler.driver import compile as compile_variant
from tttc.compiler.frozen import FrozenLearner, compile_frozen
from tttc.declare.variant import Variant
from tttc.runtime.custom_ops import untraced
from tttc.runtime.graphs import constant_in_graphs
from tttc.runtime.layer import Layer

Dims = tuple[tuple[str, int], ...]
_COMPILED: dict[tuple[Any, ...], Any] = {}
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
    layer: Layer = _found("layer", variant, dims, dtype, device, backend, checkpoint, telemetry)
    return layer


def shared_learner(
    variant: type[Variant], dims: Dims, dtype: torch.dtype, device: torch.device, backend: str
) -> FrozenLearner:
    """The learner alone, at weights that stay."""
    learner: FrozenLearner = _found("learner", variant, dims, dtype, device, backend)
    return learner


def _found(*key: Any) -> Any:
    if torch.compiler.is_compiling():
        return getattr(_named, _compile(*key))
    if key not in _COMPILED:
        _compile(*key)
    return _COMPILED[key]


@constant_in_graphs
def _compile(*key: Any) -> str:
    """The name of what is compiled, made unless it is there: not a part of any graph."""
    if key not in _COMPILED:
        kind, variant, dims, dtype, device, backend, *options = key
        given = variant, dict(dims), dtype, device, backend
        if kind == "learner":
            _COMPILED[key] = untraced(lambda: compile_frozen(*given))
        else:
            settings = dict(zip(("checkpoint", "telemetry"), options, strict=True))
            _COMPILED[key] = untraced(lambda: compile_variant(*given, **settings))
    name = f"{key[0]}_{list(_COMPILED).index(key)}"
    setattr(_named, name, _COMPILED[key])
    return name
