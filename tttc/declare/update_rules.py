"""The update rule of a declaration: gradient descent with momentum, decay and averaging, and what ends a mini-batch.

    S_s = mu_s * S_{s-1} + lr_s * g_s          momentum
    W_s = alpha_s * W_{s-1} - S_s              decay
    V_s = (1 - rho_s) * V_{s-1} + rho_s * W_s  an average of the weights, which is what tokens read

All three are linear in the gradients, so a chunk of tokens has one matrix of coefficients. What is not
linear may happen where a mini-batch ends: `at_end` stages, which are functions of the user's own or one of `muon`,
`weight_norm`, `clip_norm`, `soft_clip`, `power_norm`, `softmax_retention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tttc.declare.functions as ops
from tttc.declare.number import number, whole
from tttc.errors import DeclarationError, ShapeError, SourceLine, declared_at, users_line

Rate = Any  # a gate, a number, or a param without axes
Rates = Rate | Mapping[str, Rate]

MUON_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # arXiv:2505.23884


_TINY = 1e-30  # below the rounding of any square that matters; gives a norm of 0 the derivative 0


@dataclass(frozen=True)
class AtEnd:
    """A function of whole weights, applied when a mini-batch ends.

    `on` says of what: "update" (what the mini-batch adds, before it is subtracted), "weights" (what it hands on), or
    "view" (the rule accumulates in a tensor of its own, and the weights are a function of it). `begin(W)` makes, from
    the weights that a sequence begins with, what a "weights" stage is given as its second argument, or where the
    accumulator of a "view" starts. With `joint` the function maps all states at once, by name.
    """

    function: Callable[..., Any]
    on: str = "update"
    begin: Callable[..., Any] | None = None
    states: tuple[str, ...] | None = None
    joint: bool = False
    label: str = "at_end"
    where: SourceLine | None = field(default=None, compare=False)
    made_by: tuple[Any, ...] | None = field(default=None, compare=False, repr=False)
    """The function here that made it, and its arguments: what a pickle has of it, for what it made has no name."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.made_by is None:
            return super().__reduce_ex__(protocol)
        factory, *arguments = self.made_by
        return _made_again, (factory, tuple(arguments), self.where)

    def of(self, states: Iterable[str]) -> tuple[str, ...]:
        """The states that it acts on."""
        return tuple(n for n in states if self.states is None or n in self.states)


def _made_again(factory: Callable[..., AtEnd], arguments: tuple[Any, ...], where: SourceLine | None) -> AtEnd:
    return replace(factory(*arguments), where=where)


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, decay and averaging, one rate for each token; see `sgd`."""

    lr: Rates
    read_scale: Rates | None = None
    momentum: Rates | None = None
    nesterov: bool = False
    ema: bool = False
    decay: Rates | None = None
    decay_first: bool = False
    average: Rates | None = None
    clip: float | None = None
    per: str = "token"
    at_end: tuple[AtEnd, ...] = ()
    where: SourceLine | None = field(default=None, compare=False)

    def of(self, role: str, state: str) -> Rate | None:
        """The rate of one state: lr, read_scale, momentum, decay or average."""
        rates = getattr(self, role)
        return rates[state] if isinstance(rates, Mapping) else rates


ROLES = ("lr", "read_scale", "momentum", "decay", "average")


@dataclass(frozen=True)
class NoChunkForm:
    """An update rule that exists, and whose steps have no form over a chunk: refused, with what to write instead."""

    name: str
    reason: str
    instead: str
    where: SourceLine | None = field(default=None, compare=False)


def sgd(
    lr: Rates,
    read_scale: Rates | None = None,
    momentum: Rates | None = None,
    nesterov: bool = False,
    decay: Rates | None = None,
    decay_first: bool = False,
    *,
    ema: bool = False,
    average: Rates | None = None,
    clip: float | None = None,
    per: str = "token",
    at_end: AtEnd | Iterable[AtEnd] = (),
) -> SGD:
    """Gradient descent: S_s = momentum_s * S_{s-1} + lr_s * g_s,  W_s = decay_s * W_{s-1} - S_s.

    Every rate is a gate, a number, a `param` without axes, or a dict from state name to one of these; a gate with
    `per="channel"` holds one value for each entry of the state's axis of that name.

    Args:
        lr: scales the gradient of each source token.
        read_scale: tau_t scales what the mini-batch has added when token t reads; the weights handed to the next
            mini-batch use tau of its last token.
        momentum: mu. `nesterov`: the step is lr_s * g_s + mu_s * S_s. `ema`: S_s = mu_s * S_{s-1} + (1 - mu_s) * g_s,
            and the step is lr_s * S_s.
        decay: alpha. `decay_first`: an online gradient (anchor="token") is taken at alpha_s * W_{s-1}.
        average: rho. Tokens read V_s = (1 - rho_s) * V_{s-1} + rho_s * W_s (Polyak averaging).
        clip: the gradient of each token, over all states together, is scaled down to this norm.
        per: "token", or "mini_batch": momentum and decay act once per mini-batch, with the mean of their gates over
            its tokens (arXiv:2505.23884).
        at_end: stages that act where a mini-batch ends, in this order.
    """
    stages = tuple(at_end) if isinstance(at_end, Iterable) else (at_end,)
    lr, read_scale, momentum, decay, average, clip = map(_plain, (lr, read_scale, momentum, decay, average, clip))
    return SGD(lr, read_scale, momentum, nesterov, ema, decay, decay_first, average, clip, per, stages, declared_at())


def _plain(rates: Any) -> Any:
    """Numbers of NumPy and torch as Python has them."""
    if isinstance(rates, Mapping):
        return {n: _plain(r) for n, r in rates.items()}
    return rates if (n := number(rates)) is None else n


# -- stages at a mini-batch's end --------------------------------------------------------------------------------------


def at_end(function: Callable[..., Any], on: str = "update", **settings: Any) -> AtEnd:
    """A stage of the user's own, written in operations of tttc: `tttc.at_end(lambda U: tttc.tanh(U))`; see `AtEnd`."""
    _checked("at_end(function)", function, callable(function), "It is a function of what the mini-batch adds.")
    return AtEnd(function, on, label=getattr(function, "__name__", "at_end"), where=declared_at(), **settings)


def muon(
    steps: int = 5,
    coefficients: Iterable[tuple[float, float, float]] | None = None,
    eps: float = 1e-7,
    states: Iterable[str] | None = None,
) -> AtEnd:
    """Orthogonalise each update by Newton-Schulz: X <- a X + (b X X^T + c (X X^T)^2) X, from X = U / (|U|_F + eps).

    `coefficients` is a table of (a, b, c), one row per step (the last row repeats); by default that of
    arXiv:2505.23884. Matrices only: name them with `states` where the learner has vectors too.
    """
    steps = _checked("muon(steps=)", steps, (whole(steps) or 0) >= 1, "It is a positive int.")
    eps = _positive("muon(eps=)", eps)
    table, names = tuple(coefficients or MUON_COEFFICIENTS), _names(states)
    rows = [table[min(i, len(table) - 1)] for i in range(steps)]

    def orthogonalised(U: Any) -> Any:
        if U.ndim != 2:
            raise ShapeError(
                "muon orthogonalises matrices, and this state has the axes ["
                + ", ".join(map(str, getattr(U, "dims", U.shape)))
                + "]."
            )
        X = U / (ops.sqrt(ops.sum(U * U) + _TINY) + eps)
        wide = ops.size(X, 0) <= ops.size(X, 1)
        for a, b, c in rows:
            gram = X @ X.T if wide else X.T @ X
            polynomial = b * gram + c * (gram @ gram)
            X = a * X + (polynomial @ X if wide else X @ polynomial)
        return X

    made_by = muon, steps, table, eps, names
    label = f"muon({steps})"
    return AtEnd(orthogonalised, "update", None, names, label=label, where=declared_at(), made_by=made_by)


def weight_norm(axis: int = 0, eps: float = 1e-5, states: Iterable[str] | None = None) -> AtEnd:
    """Give the vectors of W along `axis` the norms that they began with: W / (|W| + eps) * |W_0| (arXiv:2505.23884)."""
    names = _names(states)
    axis = _checked("weight_norm(axis=)", axis, whole(axis) is not None, "It is the number of an axis.")

    def norms(W: Any) -> Any:
        return ops.sqrt(ops.sum(W * W, axis=axis) + _TINY)

    def renormalised(W: Any, initial: Any) -> Any:
        return ops.along(W, ops.div(initial, norms(W) + eps), axis=axis)

    made_by = weight_norm, axis, eps, names
    label = f"weight_norm(axis={axis})"
    return AtEnd(renormalised, "weights", norms, names, label=label, where=declared_at(), made_by=made_by)


def clip_norm(max: float, scope: str = "state", states: Iterable[str] | None = None) -> AtEnd:
    """Scale the update down to the Frobenius norm `max`: that of each state, or with scope="all" of all together."""
    max = _positive("clip_norm(max)", max)
    names = _names(states)
    scope = _checked("clip_norm(scope=)", scope, scope in ("state", "all"), 'It is "state" or "all".')

    def shrunk(U: Any, square: Any) -> Any:
        # max / sqrt(max**2 + relu(square - max**2)) is min(1, max / norm), with a derivative at 0
        return U * (max * ops.rsqrt(max * max + ops.relu(square - max * max)))

    def one(U: Any) -> Any:
        return shrunk(U, ops.sum(U * U))

    def all_together(updates: Mapping[str, Any]) -> dict[str, Any]:
        square: Any = None
        for U in updates.values():
            square = ops.sum(U * U) if square is None else square + ops.sum(U * U)
        return {n: shrunk(U, square) for n, U in updates.items()}

    together = scope == "all"
    return AtEnd(
        all_together if together else one,
        "update",
        states=names,
        joint=together,
        label=f'clip_norm({max:g}, "{scope}")',
        where=declared_at(),
        made_by=(clip_norm, max, scope, names),
    )


def soft_clip(axis: int = 0, states: Iterable[str] | None = None) -> AtEnd:
    """U / (|U| + 1), the norm taken along `axis` (arXiv:2512.01643)."""
    names = _names(states)
    axis = _checked("soft_clip(axis=)", axis, whole(axis) is not None, "It is the number of an axis.")

    def clipped(U: Any) -> Any:
        return ops.along(U, ops.div(1.0, ops.sqrt(ops.sum(U * U, axis=axis) + _TINY) + 1.0), axis=axis)

    made_by = soft_clip, axis, names
    label = f"soft_clip(axis={axis})"
    return AtEnd(clipped, "update", None, names, label=label, where=declared_at(), made_by=made_by)


def power_norm(q: float = 4.0, states: Iterable[str] | None = None) -> AtEnd:
    """The weights are A / |A|_q^(q - 2) of an accumulator A that the rule updates (arXiv:2504.13173)."""
    names = _names(states)
    q = _positive("power_norm(q)", q)

    def normalised(A: Any) -> Any:
        return A * ops.sum(ops.abs(A) ** q) ** ((2.0 - q) / q)

    made_by, label = (power_norm, q, names), f"power_norm({q:g})"
    return AtEnd(normalised, "view", None, names, label=label, where=declared_at(), made_by=made_by)


def softmax_retention(states: Iterable[str] | None = None) -> AtEnd:
    """The weights are softmax(A) along the last axis, A beginning at log(W) (arXiv:2504.13173)."""
    return AtEnd(ops.softmax, "view", ops.log, states=_names(states), label="softmax_retention()", where=declared_at())


# -- rules that are refused ----------------------------------------------------------------------------------------


def adam(*arguments: Any, **settings: Any) -> NoChunkForm:
    """Adam: refused, for its second moments make every step a nonlinear function of the gradients before it."""
    return NoChunkForm(
        "Adam",
        "the square root of its second moments makes each token's weights a nonlinear function of all gradients so "
        "far; no matrix of coefficients gives them",
        "Use tttc.sgd with momentum and a learning rate for each state, or normalise the update where the mini-batch "
        "ends: tttc.sgd(lr=..., momentum=..., at_end=tttc.at_end(lambda U: U / (tttc.sqrt(tttc.mean(U * U)) + 1e-8))).",
        declared_at(),
    )


def sign_sgd(*arguments: Any, **settings: Any) -> NoChunkForm:
    """Sign descent (and Lion): refused per token, possible where a mini-batch ends."""
    return NoChunkForm(
        "sign descent",
        "the sign of a token's gradient is no product of the few vectors that the gradient is made of",
        "Take the sign of the mini-batch's update where it ends: tttc.sgd(lr=..., at_end=tttc.at_end(tttc.sign)).",
        declared_at(),
    )


def _checked(name: str, value: Any, good: bool, remedy: str) -> Any:
    """A setting of a stage, as Python has it; raises where it is not what it must be."""
    if not good:
        line = users_line()
        place = f"\n{line.shown()}" if line else ""
        raise DeclarationError(f"{name} is {value!r}.{place}\n  {remedy}")
    return value if (n := number(value)) is None else n


def _positive(name: str, value: Any) -> Any:
    n = number(value)
    return _checked(name, value, n is not None and 0 < n < math.inf, "It is a positive number.")


def _names(states: Iterable[str] | None) -> tuple[str, ...] | None:
    return None if states is None else tuple(states)
