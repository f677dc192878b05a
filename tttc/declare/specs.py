"""What a class body declares: states, params, tokens and gates, each with the names of its axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tttc.declare.arithmetic import calculated
from tttc.declare.declared import Declared, short
from tttc.errors import DeclarationError, ShapeError, SourceLine, declared_at

Init = float | Callable[..., Any]


@dataclass(frozen=True, eq=False)
class StateSpec(Declared):
    """A fast weight: axes by dim name, and where it starts when no state is given."""

    dims: tuple[str, ...]
    init: Init
    where: SourceLine | None = None


@dataclass(frozen=True, eq=False)
class ParamSpec(Declared):
    """A slow weight of the inner loop: used by it, trained by the outer loop."""

    dims: tuple[str, ...]
    init: Init
    where: SourceLine | None = None


@dataclass(frozen=True, eq=False)
class TokenSpec(Declared):
    """A per-token vector; `q`, `k` and `v` are tokens of axis D unless declared otherwise.

    With a `window`, `given` is what a call passes for each token, and `dims` what the functions see: the last tokens.
    """

    given: tuple[str, ...]
    window: str | None = None
    where: SourceLine | None = None

    @property
    def dims(self) -> tuple[str, ...]:
        return self.given if self.window is None else (self.window, *self.given)


@dataclass(frozen=True, eq=False)
class GateSpec(Declared):
    """A per-token input, [B, T, H] or [B, T, H, axis], and how `tttc.nn.TTT` makes it from the hidden states."""

    name: str
    per: str = "token"
    axis: str = "D"
    activation: str = "sigmoid"
    scale: float | str = 1.0
    by: str = "hidden"
    where: SourceLine | None = None
    init: float | None = None
    low: float = 0.0

    @property
    def dims(self) -> tuple[str, ...]:
        return (self.axis,) if self.per == "channel" else ()

    def scale_value(self, dims: Mapping[str, int]) -> float:
        """`scale` as a number; a string such as "1/D" is an expression of the dims."""
        if not isinstance(self.scale, str):
            return float(self.scale)
        try:
            return float(calculated(self.scale, dims))
        except (ValueError, ArithmeticError, TypeError) as error:  # a power of a negative number is complex
            given = ", ".join(f"{d}={n}" for d, n in dims.items())
            raise DeclarationError(
                f"gate `{self.name}`: the scale {self.scale!r} is no number with {given}: {error}."
            ) from None


Spec = StateSpec | ParamSpec | TokenSpec | GateSpec


def state(*dims: str, init: Init = 0.0) -> Any:
    """Declare a fast weight, trained at test time: `W = tttc.state("D", "F")`.

    `dims` are the names of its axes. `init` (a number, or a function `init(shape, generator)` such as
    `tttc.normal(0.02)`) is where it starts when a call gives no state.
    """
    return StateSpec(_named(dims), init, declared_at())


def param(*dims: str, init: Init = 0.0) -> Any:
    """Declare a slow weight of the inner loop, trained by the outer loop: `gamma = tttc.param("D", init=1.0)`."""
    return ParamSpec(_named(dims), init, declared_at())


def token(*dims: str, window: str | None = None) -> Any:
    """Declare a per-token vector, [B, T, H, *dims]: `v = tttc.token("E")` gives values a width of their own.

    With `window="K"` the functions see the last K tokens, [K, *dims], the present one last and zeros before the first:
    the input of a causal convolution. A call still passes one vector for each token; the state carries the K - 1 last.
    """
    return TokenSpec(_named(dims), window, declared_at())


def gate(
    name: str,
    per: str = "token",
    *,
    axis: str = "D",
    activation: str = "sigmoid",
    scale: float | str = 1.0,
    by: str = "hidden",
    init: float | None = None,
    low: float = 0.0,
) -> Any:
    """Declare a per-token input named `name`: [B, T, H], or [B, T, H, axis] with `per="channel"`.

    The keywords say how `tttc.nn.TTT` makes it: `by="hidden"`, low + scale * activation(hidden @ weight + bias), or
    `by="position"`, max(1 / i + learned_i, 0) for the i-th token of a mini-batch (arXiv:2407.04620). `activation` is
    one of sigmoid, softplus, tanh, exp, none; `scale` a number or an expression of the dims such as "1/D". `init` is
    the gate's value where training begins, which the bias is set for: a sigmoid decay without it forgets half of the
    weights at every token. Without it the bias is 0.
    """
    if not isinstance(name, str):
        line = declared_at()
        raise DeclarationError(f'the name of a gate is {short(name)}.\n{line.shown()}\n  Write tttc.gate("lr").')
    return GateSpec(name, per, axis, activation, scale, by, declared_at(), init, low)


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from N(0, std^2)."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: Any) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * self.std

    @property
    def __name__(self) -> str:
        return f"normal({self.std})"


def normal(std: float) -> Init:
    """Initial values drawn from N(0, std^2)."""
    return Normal(std)


def _named(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dims as they are given, where lists are given too: what is no name is reported later."""
    return tuple(tuple(d) if isinstance(d, list) else d for d in dims)


# -- initial values ----------------------------------------------------------------------------------------------------

INIT = "An init is a number, or a function init(shape, generator) that returns a tensor of that shape"


def initial_value(variant: str, name: str, init: Any, shape: tuple[int, ...], generator: Any) -> Any:
    """The tensor that a state or param begins with; raises where its function returns something else."""
    if not callable(init):
        return torch.full(shape, float(init), dtype=torch.float64)
    said = f"variant `{variant}`: the init of `{name}` returned"
    try:
        found = init(shape, generator)
    except Exception as error:  # the user's own function may raise anything
        what = f"variant `{variant}`: the init of `{name}` raised {type(error).__name__}: {error}"
        raise DeclarationError(f"{what}\n  {INIT}.") from error
    if not isinstance(found, torch.Tensor):
        raise DeclarationError(f"{said} {short(found)}.\n  {INIT}.")
    if tuple(found.shape) != tuple(shape):
        raise ShapeError(f"{said} the shape {list(found.shape)}, expected {list(shape)}.\n  {INIT}.")
    return found
