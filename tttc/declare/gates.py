"""What a gate can be: the open range of low + scale * activation(x), and the bias at which it has a given value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tttc.declare.specs import GateSpec
from tttc.errors import Problem

Range = tuple[float, float]

RANGES: Mapping[str, Range] = {
    "sigmoid": (0.0, 1.0),
    "softplus": (0.0, math.inf),
    "tanh": (-1.0, 1.0),
    "exp": (0.0, math.inf),
    "none": (-math.inf, math.inf),
}
INVERSES: Mapping[str, Callable[[float], float]] = {
    "sigmoid": lambda y: math.log(y) - math.log1p(-y),
    "softplus": lambda y: y + math.log(-math.expm1(-y)),
    "tanh": math.atanh,
    "exp": math.log,
    "none": lambda y: y,
}


def gate_range(spec: GateSpec, scale: float) -> Range:
    """Between which values a gate by="hidden" lies; one by="position" is max(1 / i + learned, 0)."""
    if spec.by == "position":
        return 0.0, math.inf
    low, high = (float(spec.low) + scale * bound for bound in RANGES.get(spec.activation, RANGES["none"]))
    return (low, high) if scale >= 0 else (high, low)


def gate_bias(spec: GateSpec, dims: Mapping[str, int]) -> float:
    """Where a gate begins: the bias that makes its `init` of it, 0 without one.

    Raises `ValueError` where no bias does, with what the gate can be.
    """
    if spec.init is None:
        return 0.0
    scale, init = spec.scale_value(dims), float(spec.init)
    low, high = gate_range(spec, scale)
    if not low < init < high:
        raise ValueError(f"its init is {init:g}, but it lies between {low:g} and {high:g}")
    return INVERSES[spec.activation]((init - float(spec.low)) / scale)


def gate_problem(spec: GateSpec, dims: Mapping[str, int]) -> Problem | None:
    """What is wrong with the `init` of a gate, once the sizes are known that its scale may be made of."""
    try:
        gate_bias(spec, dims)
    except ValueError as error:
        remedy = "Give the value that the gate has where training begins, or another activation or scale."
        return Problem(f"gate `{spec.name}`: {error}.", remedy, spec.where)
    return None
