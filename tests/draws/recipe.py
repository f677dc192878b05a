"""What there is to draw for one declaration, and the record of what was drawn.

A `Recipe` is a plain record, so that a failing one can be read and built again. Losses are scaled so that a step of any
learning rate here is a small one: what diverges has no digits to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import sympy

import tttc

_a = sympy.Symbol("a")
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "none": lambda z: z,
    "tanh": tttc.tanh,
    "sigmoid": tttc.sigmoid,
    "silu": tttc.silu,
    "gelu": tttc.gelu,
    "relu": tttc.relu,
    "softplus": tttc.softplus,
    "softmax": tttc.softmax,
    "abs": tttc.abs,
    "square": lambda z: 0.3 * z**2,
    "bell": lambda z: tttc.exp(-z * z),
    "root": lambda z: tttc.sqrt(z * z + 1.0),
    "inverse root": lambda z: tttc.rsqrt(z * z + 1.0),
    "log": lambda z: tttc.log(2.0 + z * z),
    "leaky": lambda z: tttc.where(z > 0, z, 0.1 * z),
    "softsign": tttc.elementwise(_a / (1 + sympy.Abs(_a))),
    "own piecewise": tttc.elementwise(sympy.Piecewise((_a, _a > 0), (sympy.exp(_a) - 1, True))),
    "own largest": tttc.elementwise(sympy.Max(_a, -_a / 3)),
    "own least": tttc.elementwise(sympy.Min(_a, 1 - _a / 2)),
    "own clamp": tttc.elementwise(sympy.Max(-1, sympy.Min(_a, 1)) + _a / 10),
    "own step": tttc.elementwise(_a / 5 + sympy.tanh(_a) * sympy.Heaviside(_a)),
    "own irrational": tttc.elementwise(sympy.sqrt(2) * sympy.tanh(_a / sympy.sqrt(3))),
    "own power": tttc.elementwise((1 + _a**2) ** sympy.Rational(1, 3)),
    "own probability": tttc.elementwise((1 + sympy.erf(_a / sympy.sqrt(2))) / 2),
}
LOSSES: dict[str, Callable[..., Any]] = {
    "squared": lambda y, v: 0.5 * tttc.sum((y - v) ** 2),
    "mean": lambda y, v: tttc.mean((y - v) ** 2),
    "dot": lambda y, v: -tttc.sum(y * v),
    "huber": lambda y, v: tttc.sum(tttc.huber(y - v, 0.7)),
    "cubic": lambda y, v: tttc.sum(tttc.abs(y - v) ** 3),
    "cosine": lambda y, v: -tttc.sum(tttc.dot(tttc.l2_norm(y, eps=0.1), tttc.l2_norm(v, eps=0.1))),
    "cross entropy": lambda y, v: -tttc.sum(tttc.softmax(v) * tttc.log(tttc.softmax(y) + 0.1)),
}
BAD_LOSSES = {"idle": lambda y, v: tttc.sum(v * v), "vector": lambda y, v: y - v}
TARGETS: dict[str, Callable[..., Any]] = {  # of the class, what the learner sees of k, and v
    "value": lambda self, k, v: v,
    "difference": lambda self, k, v: v - k,
    "normalised": lambda self, k, v: (v - tttc.mean(v)) * tttc.rsqrt(tttc.mean((v - tttc.mean(v)) ** 2) + 0.1),
    "gated": lambda self, k, v: self.aim * v,
}
# How the learner uses its first weights. The first three are linear in them.
USES: dict[str, Callable[..., Any]] = {
    "plain": lambda W, U: W,
    "half": lambda W, U: 0.5 * W,
    "sum": lambda W, U: W + U,
    "tanh": lambda W, U: tttc.tanh(W),
    "square": lambda W, U: W * W,
    "product": lambda W, U: W * U,
    "normalised": lambda W, U: W * tttc.rsqrt(tttc.sum(W * W) + 0.1),
}
LINEAR = ("plain", "half", "sum")
# What a loss may hold beside its measure: most of it is the same for every token, or lacks an axis of the weights.
TERMS = ("ridge", "lasso", "toward", "bias", "counter", "rows", "mean", "value")
FIRST = ("dense", "diagonal", "number", "blocks")
WINDOWS = ("no", "taps", "own taps", "param", "mean")
OUTPUTS = ("no", "tanh", "state", "token", "number")
IDLE = ("no", "output", "nowhere")
NORMS = ("none", "layer_norm", "rms_norm", "l2_norm")
RATES = ("gate", "number", "param", "per state", "channel", "edge")
BAD_RATES = ("text", "lost param", "wrong states", "wrong channel", "wrong per", "two shapes")
NUMBERS = {"lr": 0.3, "tau": 0.7, "mu": 0.6, "alpha": 0.9, "rho": 0.4}
EDGES = {"lr": 0, "tau": 1.0, "mu": 0.0, "alpha": 1, "rho": 1.0}  # numbers that a compiler may drop
GATED = ("gate", "per state", "channel")  # kinds of rates that differ from token to token
SCALE = 0.1  # of every loss


def _joint(updates: Mapping[str, Any]) -> dict[str, Any]:
    """All updates over one length: a stage that sees the states together."""
    square: Any = 1.0
    for U in updates.values():
        square = square + tttc.sum(U * U)
    return {n: U * tttc.rsqrt(square) for n, U in updates.items()}


# Each is given the names of the matrices, and of the states with axes.
STAGES: dict[str, Callable[[tuple[str, ...], tuple[str, ...]], Any]] = {
    "muon": lambda matrices, axed: tttc.muon(states=matrices),
    "weight_norm": lambda matrices, axed: tttc.weight_norm(axis=0, states=axed),
    "weight_norm of rows": lambda matrices, axed: tttc.weight_norm(axis=-1, states=axed),
    "clip_norm": lambda matrices, axed: tttc.clip_norm(0.05),
    "clip_norm of all": lambda matrices, axed: tttc.clip_norm(0.05, scope="all"),
    "soft_clip": lambda matrices, axed: tttc.soft_clip(axis=0, states=axed),
    "own update": lambda matrices, axed: tttc.at_end(lambda U: tttc.tanh(U) + 0.1 * U),
    "own joint update": lambda matrices, axed: tttc.at_end(_joint, joint=True),
    "sign": lambda matrices, axed: tttc.at_end(lambda U: 0.01 * tttc.sign(U)),
    "own weights": lambda matrices, axed: tttc.at_end(lambda W: 0.5 * (W + tttc.tanh(W)), on="weights"),
    "own anchored weights": lambda matrices, axed: tttc.at_end(
        lambda W, first: 0.8 * W + 0.2 * first, on="weights", begin=tttc.tanh
    ),
    "power_norm": lambda matrices, axed: tttc.power_norm(4),
    "own view": lambda matrices, axed: tttc.at_end(lambda A: tttc.tanh(A) + 0.5 * A, on="view"),
    "own view of a root": lambda matrices, axed: tttc.at_end(lambda A: A * A, on="view", begin=lambda W: 1.0 + 0.3 * W),
}
PAIRS = (  # two stages in this order
    *(("clip_norm", "muon"), ("muon", "weight_norm"), ("own update", "own weights"), ("own weights", "soft_clip")),
    *(("weight_norm", "weight_norm of rows"), ("own joint update", "own anchored weights")),
)
VIEWS = ("power_norm", "own view", "own view of a root")
BAD_STAGES: dict[str, Callable[[tuple[str, ...], tuple[str, ...]], Any]] = {
    "muon of all": lambda matrices, axed: tttc.muon(steps=2),
    "another shape": lambda matrices, axed: tttc.at_end(lambda U: tttc.sum(U)),
    "of no state": lambda matrices, axed: tttc.soft_clip(states=("nothing",)),
    "no stage": lambda matrices, axed: tttc.tanh,
    "of nothing": lambda matrices, axed: tttc.at_end(lambda U: tttc.tanh(U), on="nothing"),
}
BAD_RULES: dict[str, Callable[[], Any]] = {
    "adam": lambda: tttc.adam(lr=0.1),
    "sign_sgd": lambda: tttc.sign_sgd(lr=0.1),
    "muon": lambda: tttc.muon(),
    "a number": lambda: 0.1,
}
# Names that generated code has uses of its own for, or that differ from others by what a compiler may add to them.
HARD_NAMES = (
    *("W", "W_out", "W_T", "W_kept", "W_work", "W_in", "W_start", "W_c", "dW", "dW_c", "S_W", "a_W", "A_W_0", "N_W"),
    *("W0_out", "dW0", "S_W0", "a_W0", "b0_T", "s_out", "dlr", "lr_out"),
    *("q", "k", "v", "C", "c", "T", "t", "s_", "i", "n", "m", "z", "dz", "u", "F", "G", "B", "H", "D_", "x", "h"),
    *("list", "range", "len", "min", "max", "sum", "float", "print", "None_", "type", "self", "cls"),
    *("torch", "tttc", "np", "math", "aten", "tl", "tvm", "T_", "triton", "sympy", "exp", "sqrt", "where", "log"),
    *("chunk", "every", "kept", "saved", "sequences", "size", "start", "made", "now", "row_0", "past_0", "n_tokens"),
    *("batch", "heads", "tokens", "tau_", "eta", "grid", "pid", "dot", "zeros", "cumsum", "segprod", "solve"),
)
TITLES = ("Drawn", "Lambda", "Torch", "Global", "Class", "Drawn_", "_Drawn", "T", "For", "List", "While", "Sum")


@dataclass(frozen=True, repr=False)
class Recipe:
    """All that is drawn for one declaration. `hidden` are the activations between layers, one fewer than layers."""

    # the learner
    hidden: tuple[str, ...] = ()
    last: str = "none"
    first: str = "dense"  # or "diagonal": x * w; "number": the same with a scalar; "blocks": a matrix for each row
    use: str = "plain"
    bias: str = "no"  # or "plain", "tanh"
    branch: str = "no"  # or "state", "param": a second branch that multiplies the last layer; "experts": one that adds
    scaled: str = "no"  # or "input", "output": by a vector state; "number": by a scalar one
    shared: bool = False  # the last layer is the transpose of the first
    norm: str = "none"
    keep: str = "no"
    residual: bool = False
    other_width: bool = False
    own_output: str = "no"
    idle: str = "no"  # a state that the loss does not see, in the output or nowhere
    rows: bool = False  # tokens are matrices
    window: str = "no"  # k and q are windows, joined by taps, with a window of D tokens for "own taps"
    # the loss
    loss: str = "squared"
    target: str = "value"
    weighted: bool = False
    terms: tuple[str, ...] = ()
    # the rule
    rule: str = "sgd"
    lr: str = "gate"
    read_scale: str = "none"
    momentum: str = "none"
    nesterov: bool = False
    ema: bool = False
    decay: str = "none"
    decay_first: bool = False
    average: str = "none"
    clip: float | None = None
    per: str = "token"
    at_end: tuple[str, ...] = ()
    # when
    mini_batch: int | str = 2
    read: str = "after"
    anchor: str = "mini_batch"
    steps: int = 1
    # what things are called
    names: tuple[tuple[str, str], ...] = ()
    title: str = "Drawn"

    def __repr__(self) -> str:
        """What differs from the defaults."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Recipe({', '.join(f'{n}={x!r}' for n, x in chosen.items())})"

    def called(self, name: str) -> str:
        """What a state, param, gate or token is called."""
        return dict(self.names).get(name, name)

    # -- the states

    @property
    def width(self) -> str:
        """The dim of the output; a diagonal layer and a residual keep that of the input."""
        alone = self.first in ("diagonal", "number") and not self.hidden
        return "E" if self.other_width and not alone else "D"

    @property
    def is_shared(self) -> bool:
        return self.shared and bool(self.hidden) and self.first == "dense" and self.width == "D"

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims between the layers."""
        inner = list("FG"[: len(self.hidden)])
        if self.first in ("diagonal", "number") and inner:
            inner[0] = "D"
        if self.is_shared and len(inner) == 2:
            inner[1] = "F"
        return ("D", *inner, self.width)

    def layers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The weights of the layers, and their dims."""
        pairs = list(pairwise(self.axes))
        for i, (a, c) in enumerate(pairs[: len(pairs) - self.is_shared]):
            first = {"dense": (a, c), "diagonal": (a,), "number": (), "blocks": ("J", a, c)}[self.first]
            yield f"W{i}", (a, c) if i else first

    def learned(self) -> dict[str, tuple[str, ...]]:
        """The states of the learner and their dims."""
        found = dict(self.layers())
        if self.use in ("sum", "product"):
            found["U"] = found["W0"]
        if self.bias != "no":
            found |= {f"b{i}": (c,) for i, c in enumerate(self.axes[1:])}
        if self.branch == "state":
            found["Wg"] = ("D", self.width)
        if self.branch == "experts":
            found["We"] = ("M", "D", self.width)
        if self.scaled != "no":
            found["s"] = {"input": ("D",), "output": (self.width,), "number": ()}[self.scaled]
        if self.window in ("taps", "own taps"):
            found["taps"] = self.taps
        return found

    def states(self) -> dict[str, tuple[str, ...]]:
        """Every state and its dims."""
        found = self.learned()
        if "counter" in self.terms:
            found["n"] = ()
        if self.idle != "no":
            found["idle"] = (self.width,)
        return found

    def called_states(self) -> dict[str, tuple[str, ...]]:
        """Every state by what it is called."""
        return {self.called(n): dims for n, dims in self.states().items()}

    @property
    def taps(self) -> tuple[str, str]:
        """The dims of a window."""
        return ("D" if self.window == "own taps" else "K", "D")

    # -- what follows for the gradients

    @property
    def linear(self) -> bool:
        """Whether the learner is affine in its weights, all together, as these are used."""
        plain = not self.hidden and self.last == self.norm == "none" and self.scaled == "no"
        return plain and self.branch != "state" and self.bias != "tanh" and self.window not in ("taps", "own taps")

    @property
    def squares(self) -> bool:
        """Whether the loss is linear in squares of a linear learner: its gradients are affine."""
        return self.last == "square" and self.loss == "dot" and self.use in LINEAR and replace(self, last="none").linear

    @property
    def acting(self) -> tuple[str, ...]:
        """The terms of the loss that depend on a state: some ask for a bias, or a matrix."""
        absent = ("bias", "value") if self.bias == "no" else ()
        absent += ("rows", "mean") if len(self.learned()["W0"]) < 2 else ()
        return tuple(t for t in self.terms if t not in absent)

    @property
    def idles(self) -> bool:
        """Whether the loss depends on no state."""
        return self.loss == "idle" and not self.acting

    @property
    def gradients(self) -> str:
        """How the gradients of tokens depend on the weights: "constant"; "affine", with one value that makes the
        gradients of all states, whose entries do not mix; or "nonlinear".
        """
        if not (self.linear or self.squares or self.loss == "idle") or "lasso" in self.terms:
            return "nonlinear"
        constant = self.loss == "idle" or (self.loss == "dot" and self.use in LINEAR and not self.squares)
        own = self.loss == "dot" and self.use == "square"  # 2 W * outer(k, v)
        if not (constant or own or self.squares or (self.use in LINEAR and self.loss in ("squared", "mean"))):
            return "nonlinear"
        parts = {n: set(self._of_terms(n)) for n in self.learned()}
        if own:
            parts["W0"].add("W0" if len(self.learned()["W0"]) > 1 else "W0 of the token")
        elif not constant:
            if self.first == "dense" and self.rows:
                return "nonlinear"  # the rows of a token share their weights, which mixes the entries of x.T @ e
            for n in parts:
                if not (self.squares and n == "We"):  # which is added to the squares
                    parts[n].add(self._error(n))
        values: set[Any] = set()
        for n, dims in self.learned().items():  # the gradient of a matrix falls into terms, that of a vector does not
            values |= parts[n] if len(dims) > 1 else {frozenset(parts[n]) if len(parts[n]) > 1 else x for x in parts[n]}
        return ("constant", "affine")[len(values)] if len(values) < 2 else "nonlinear"

    def _of_terms(self, state: str) -> Iterator[str]:
        """The values that depend on the weights in the gradient that the loss's terms have."""
        if "ridge" in self.terms or ("toward" in self.terms and state == "W0"):
            yield state
        if "bias" in self.terms and state == self.last_bias:
            yield state
        if "rows" in self.terms and state == "W0" and len(self.learned()["W0"]) > 1:
            yield "sums of W0"

    def _error(self, state: str) -> str:
        """The value in the gradient of a squared loss: e itself, or its products where these are added up."""
        if state in ("W0", "U"):
            added_up = {"number": "x . e"} | ({"diagonal": "x * e, over rows"} if self.rows else {})
            return added_up.get(self.first, "e")
        return "e, over rows" if self.rows else "e"

    @property
    def last_bias(self) -> str:
        return f"b{len(self.hidden)}"
