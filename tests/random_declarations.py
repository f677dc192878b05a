"""Random declarations: what is drawn, the class that a recipe describes, and what must be refused.

A `Recipe` is a plain record, so that a failing one can be read and built again. `refusals` knows which must be refused
and in which words; it is written from the meaning of the settings, and asks the compiler nothing. Losses are scaled so
that a step of any learning rate here is a small one: what diverges has no digits to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import sympy
from hypothesis import strategies as st

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
}
LOSSES: dict[str, Callable[..., Any]] = {
    "squared": lambda y, v: 0.5 * tttc.sum((y - v) ** 2),
    "mean": lambda y, v: tttc.mean((y - v) ** 2),
    "dot": lambda y, v: -tttc.dot(y, v),
    "huber": lambda y, v: tttc.sum(tttc.huber(y - v, 0.7)),
    "cubic": lambda y, v: tttc.sum(tttc.abs(y - v) ** 3),
    "cosine": lambda y, v: -tttc.dot(tttc.l2_norm(y, eps=0.1), tttc.l2_norm(v, eps=0.1)),
    "cross entropy": lambda y, v: -tttc.sum(tttc.softmax(v) * tttc.log(tttc.softmax(y) + 0.1)),
}
BAD_LOSSES = {"idle": lambda y, v: tttc.sum(v * v), "vector": lambda y, v: y - v}
TARGETS: dict[str, Callable[..., Any]] = {
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
NORMS = ("none", "layer_norm", "rms_norm", "l2_norm")
RATES = ("gate", "number", "param", "per state", "channel")
BAD_RATES = ("text", "lost param", "wrong states", "wrong channel", "wrong per", "two shapes")
NUMBERS = {"lr": 0.3, "tau": 0.7, "mu": 0.6, "alpha": 0.9, "rho": 0.4}
SCALE = 0.1  # of every loss


def _joint(updates: Mapping[str, Any]) -> dict[str, Any]:
    """All updates over one length: a stage that sees the states together."""
    square: Any = 1.0
    for U in updates.values():
        square = square + tttc.sum(U * U)
    return {n: U * tttc.rsqrt(square) for n, U in updates.items()}


# Each is given the names of the matrices.
STAGES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "muon": lambda matrices: tttc.muon(states=matrices),
    "weight_norm": lambda matrices: tttc.weight_norm(axis=0),
    "weight_norm of rows": lambda matrices: tttc.weight_norm(axis=-1),
    "clip_norm": lambda matrices: tttc.clip_norm(0.05),
    "clip_norm of all": lambda matrices: tttc.clip_norm(0.05, scope="all"),
    "soft_clip": lambda matrices: tttc.soft_clip(axis=0),
    "own update": lambda matrices: tttc.at_end(lambda U: tttc.tanh(U) + 0.1 * U),
    "own joint update": lambda matrices: tttc.at_end(_joint, joint=True),
    "sign": lambda matrices: tttc.at_end(lambda U: 0.01 * tttc.sign(U)),
    "own weights": lambda matrices: tttc.at_end(lambda W: 0.5 * (W + tttc.tanh(W)), on="weights"),
    "own anchored weights": lambda matrices: tttc.at_end(
        lambda W, first: 0.8 * W + 0.2 * first, on="weights", begin=tttc.tanh
    ),
    "power_norm": lambda matrices: tttc.power_norm(4),
    "own view": lambda matrices: tttc.at_end(lambda A: tttc.tanh(A) + 0.5 * A, on="view"),
    "own view of a root": lambda matrices: tttc.at_end(lambda A: A * A, on="view", begin=lambda W: 1.0 + 0.3 * W),
}
PAIRS = (  # two stages in this order
    *(("clip_norm", "muon"), ("muon", "weight_norm"), ("own update", "own weights"), ("own weights", "soft_clip")),
    *(("weight_norm", "weight_norm of rows"), ("own joint update", "own anchored weights")),
)
VIEWS = ("power_norm", "own view", "own view of a root")
BAD_STAGES: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "muon of all": lambda matrices: tttc.muon(steps=2),
    "another shape": lambda matrices: tttc.at_end(lambda U: tttc.sum(U)),
    "of no state": lambda matrices: tttc.soft_clip(states=("nothing",)),
    "no stage": lambda matrices: tttc.tanh,
    "of nothing": lambda matrices: tttc.at_end(lambda U: tttc.tanh(U), on="nothing"),
}
BAD_RULES: dict[str, Callable[[], Any]] = {
    "adam": lambda: tttc.adam(lr=0.1),
    "sign_sgd": lambda: tttc.sign_sgd(lr=0.1),
    "muon": lambda: tttc.muon(),
    "a number": lambda: 0.1,
}


@dataclass(frozen=True, repr=False)
class Recipe:
    """All that is drawn for one declaration. `hidden` are the activations between layers, one fewer than layers."""

    # the learner
    hidden: tuple[str, ...] = ()
    last: str = "none"
    first: str = "dense"  # or "diagonal": x * w
    use: str = "plain"
    bias: str = "no"  # or "plain", "tanh"
    branch: str = "no"  # or "state", "param": a second branch that multiplies the last layer
    scaled: str = "no"  # or "input", "output": by a vector state
    shared: bool = False  # the last layer is the transpose of the first
    norm: str = "none"
    keep: str = "no"
    residual: bool = False
    other_width: bool = False
    own_output: bool = False
    # the loss
    loss: str = "squared"
    target: str = "value"
    weighted: bool = False
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

    def __repr__(self) -> str:
        """What differs from the defaults."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Recipe({', '.join(f'{n}={x!r}' for n, x in chosen.items())})"

    @property
    def width(self) -> str:
        """The dim of the output; a diagonal layer and a residual keep that of the input."""
        alone = self.first == "diagonal" and not self.hidden
        return "E" if self.other_width and not alone else "D"

    @property
    def is_shared(self) -> bool:
        return self.shared and bool(self.hidden) and self.first == "dense" and self.width == "D"

    @property
    def axes(self) -> tuple[str, ...]:
        """The dims between the layers."""
        inner = list("FG"[: len(self.hidden)])
        if self.first == "diagonal" and inner:
            inner[0] = "D"
        if self.is_shared and len(inner) == 2:
            inner[1] = "F"
        return ("D", *inner, self.width)

    def layers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The weights of the layers, and their dims."""
        pairs = list(pairwise(self.axes))
        for i, (a, c) in enumerate(pairs[: len(pairs) - self.is_shared]):
            yield f"W{i}", (a,) if i == 0 and self.first == "diagonal" else (a, c)

    def states(self) -> dict[str, tuple[str, ...]]:
        """Every state and its dims."""
        found = dict(self.layers())
        if self.use in ("sum", "product"):
            found["U"] = found["W0"]
        if self.bias != "no":
            found |= {f"b{i}": (c,) for i, c in enumerate(self.axes[1:])}
        if self.branch == "state":
            found["Wg"] = ("D", self.width)
        if self.scaled != "no":
            found["s"] = ("D",) if self.scaled == "input" else (self.width,)
        return found

    def matrices(self) -> tuple[str, ...]:
        return tuple(n for n, dims in self.states().items() if len(dims) == 2)

    # -- what follows for the gradients

    @property
    def linear(self) -> bool:
        """Whether the learner is one layer that is affine in its weights, as these are used, and in its bias."""
        plain = not self.hidden and self.last == self.norm == "none" and self.scaled == "no"
        return plain and self.branch != "state" and self.bias != "tanh"

    @property
    def gradients(self) -> str:
        """How the gradients of tokens depend on the weights: "constant"; "affine", with one vector that makes the
        gradients of all states; or "nonlinear".
        """
        if not self.linear:
            return "nonlinear"
        if self.loss == "dot" and self.use in LINEAR:
            return "constant"
        if self.loss == "dot" and self.use == "square":
            return "affine"  # 2 W * outer(k, v)
        one = self.bias == "no" or self.first == "dense"  # x * w + b has the gradients x * e and e: two vectors
        return "affine" if one and self.use in LINEAR and self.loss in ("squared", "mean") else "nonlinear"


# -- the class ---------------------------------------------------------------------------------------------------------


def declaration(r: Recipe) -> type[tttc.Variant]:
    """The class that a recipe describes."""
    states = r.states()
    names: dict[str, Any] = {n: tttc.state(*dims, init=tttc.normal(0.3)) for n, dims in states.items()}
    names |= {"learner": _learner(r), "loss": _loss(r)}
    if r.width == "E":
        names["v"] = tttc.token("E")
    if r.norm in ("layer_norm", "rms_norm"):
        names["gamma"] = tttc.param(r.width, init=1.0)
    if r.norm == "layer_norm":
        names["beta"] = tttc.param(r.width)
    if r.branch == "param":
        names["P"] = tttc.param("D", r.width, init=tttc.normal(0.3))
    if r.keep != "no":
        names["keep"] = tttc.gate("keep", per=r.keep, axis=r.width)
    if r.target == "gated":
        names["aim"] = tttc.gate("aim")
    if r.weighted:
        names["weight"] = tttc.gate("weight")
    if r.own_output:
        names["output"] = lambda self, q: tttc.tanh(self.learner(q)) + 0.5 * q @ q
    names |= {"mini_batch": r.mini_batch, "read": r.read, "anchor": r.anchor, "steps": r.steps}
    names["update"] = BAD_RULES[r.rule]() if r.rule in BAD_RULES else _rule(r, names, states)
    return type("Drawn", (tttc.Variant,), names)


def _learner(r: Recipe) -> Callable[..., Any]:
    def weights(self: Any, i: int) -> Any:
        if r.is_shared and i == len(r.hidden):
            return weights(self, 0).T
        W = getattr(self, f"W{i}")
        return USES[r.use](W, getattr(self, "U", None)) if i == 0 else W

    def learner(self: Any, x: Any) -> Any:
        h = x * self.s if r.scaled == "input" else x
        for i, activation in enumerate((*r.hidden, r.last)):
            h = h * weights(self, i) if i == 0 and r.first == "diagonal" else h @ weights(self, i)
            if r.bias != "no":
                b = getattr(self, f"b{i}")
                h = h + (tttc.tanh(b) if r.bias == "tanh" else b)
            h = ACTIVATIONS[activation](h)
        if r.branch != "no":
            h = h * tttc.sigmoid(x @ self.P) if r.branch == "param" else h * (x @ self.Wg)
        h = h * self.s if r.scaled == "output" else h
        h = _normalised(r, self, h)
        h = h * self.keep if r.keep != "no" else h
        return x + h if r.residual and r.width == "D" else h

    return learner


def _normalised(r: Recipe, self: Any, h: Any) -> Any:
    if r.norm == "layer_norm":
        return tttc.layer_norm(h, self.gamma, self.beta, eps=0.1)
    if r.norm == "rms_norm":
        return tttc.rms_norm(h, self.gamma, eps=0.1)
    return tttc.l2_norm(h, eps=0.1) if r.norm == "l2_norm" else h


def _loss(r: Recipe) -> Callable[..., Any]:
    measure = (LOSSES | BAD_LOSSES)[r.loss]
    aim = TARGETS["value" if r.target == "difference" and r.width == "E" else r.target]

    def loss(self: Any, k: Any, v: Any) -> Any:
        value = SCALE * measure(self.learner(k), aim(self, k, v))
        return self.weight * value if r.weighted else value

    return loss


def _rule(r: Recipe, names: dict[str, Any], states: Mapping[str, tuple[str, ...]]) -> Any:
    stages = STAGES | BAD_STAGES
    return tttc.sgd(
        lr=_rates(names, "lr", r.lr, states),
        read_scale=_rates(names, "tau", r.read_scale, states),
        momentum=_rates(names, "mu", r.momentum, states),
        nesterov=r.nesterov,
        ema=r.ema,
        decay=_rates(names, "alpha", r.decay, states),
        decay_first=r.decay_first,
        average=_rates(names, "rho", r.average, states),
        clip=r.clip,
        per=r.per,
        at_end=[stages[name](r.matrices()) for name in r.at_end],
    )


def _rates(names: dict[str, Any], name: str, kind: str, states: Mapping[str, tuple[str, ...]]) -> Any:
    """A rate of the kind drawn; a param is declared among `names`, a dict has one of each kind by turns."""
    number = NUMBERS[name]
    if kind == "param":
        names[f"{name}_param"] = tttc.param(init=number)
        return names[f"{name}_param"]
    if kind == "per state":
        choices = [tttc.gate(name), number, tttc.gate(f"{name}_other")]
        return {state: choices[i % 3] for i, state in enumerate(states)}
    if kind == "channel":  # of the first axis of one state, of the last of the next
        axes = {n: dims[-(i % 2)] for i, (n, dims) in enumerate(states.items())}
        return {n: tttc.gate(f"{name}_{axis}", per="channel", axis=axis) for n, axis in axes.items()}
    plain = {"none": None, "gate": tttc.gate(name), "number": number, "text": "fast", "lost param": tttc.param()}
    if kind in plain:
        return plain[kind]
    return {
        "wrong states": {"W0": 0.1, "nothing": 0.1},
        "wrong channel": tttc.gate(name, per="channel", axis="Z"),
        "wrong per": tttc.gate(name, per="chunk"),
        "two shapes": dict.fromkeys(states, tttc.gate(name)) | {"W0": tttc.gate(name, per="channel", axis="D")},
    }[kind]


# -- what must be refused ----------------------------------------------------------------------------------------------


def refusals(r: Recipe) -> list[str]:
    """Why a declaration must be refused, in words that the refusal holds; empty where it must compile.

    What contradicts itself is said before what has no exact form.
    """
    said = [*_of_settings(r), *(_of_rule(r) if r.rule == "sgd" else ())]
    if r.loss == "vector":
        said.append("not a scalar")
    if said:
        return said
    return ["the loss does not depend on any state"] if r.loss == "idle" else list(_without_form(r))


def _of_settings(r: Recipe) -> Iterator[str]:
    if r.mini_batch not in (1, 2, 3, 4, "all"):
        yield f"mini_batch is {r.mini_batch!r}"
    if r.read not in ("after", "before", "start", "end"):
        yield f"read is {r.read!r}"
    if r.anchor not in ("mini_batch", "token"):
        yield f"anchor is {r.anchor!r}"
    if r.steps < 1:
        yield f"steps is {r.steps}"
    if r.rule in BAD_RULES:
        yield {
            "adam": "Adam has no exact chunked form",
            "sign_sgd": "sign descent has no exact chunked form",
            "muon": "muon(5) is not linear in the gradients",
            "a number": "update is 0.1",
        }[r.rule]


def _of_rule(r: Recipe) -> Iterator[str]:
    inside, online, alone = r.read in ("after", "before"), r.anchor == "token", r.mini_batch == 1
    has_momentum, has_average = r.momentum != "none", r.average != "none"
    if r.nesterov and not has_momentum:
        yield "nesterov is set, but there is no momentum"
    elif r.ema and not has_momentum:
        yield "ema is set, but there is no momentum"
    if r.nesterov and r.ema:
        yield "nesterov and ema are both set"
    if r.decay_first and r.decay == "none":
        yield "there is no decay"
    elif r.decay_first and not (online or (alone and r.steps == 1)):
        yield 'anchor is "mini_batch"'
    if r.read_scale != "none" and online and not alone:
        yield "read_scale scales what a mini-batch adds"
    if has_average and (r.read_scale != "none" or r.steps > 1 or r.at_end):
        yield "average is combined with"
    if has_average and r.read == "start":
        yield 'read="start" reads the weights before the mini-batch, average'
    if r.steps > 1 and (inside or online):
        yield f'steps is {r.steps}, with read="{r.read}"'
    if r.steps > 1 and (has_momentum or set(r.at_end) & set(VIEWS)):
        yield f"steps is {r.steps}, and the rule carries more than weights"
    if r.per not in ("token", "mini_batch"):
        yield f"per is {r.per!r}"
    elif r.per == "mini_batch":
        if inside or online:
            yield "takes the mean of the gates over the mini-batch"
        if r.ema or has_average:
            yield 'per="mini_batch" has no ema and no average'
    if r.clip is not None and r.clip <= 0:
        yield f"clip is {r.clip}"
    if r.lr in BAD_RATES:
        yield {
            "text": "lr is 'fast'",
            "lost param": "not declared on the class",
            "wrong states": "lr is given for W0, nothing",
            "wrong channel": "one value per channel of Z",
            "wrong per": "is per 'chunk'",
            "two shapes": "is declared twice" if len(r.states()) > 1 else "",
        }[r.lr]
    yield from _of_stages(r)


def _of_stages(r: Recipe) -> Iterator[str]:
    if "no stage" in r.at_end:
        yield "at_end holds"
        return
    views = [name for name in r.at_end if name in VIEWS]
    if views and (r.read not in ("start", "end") or r.anchor == "token"):
        yield "use the weights of single tokens"
    if len(views) > 1:
        yield "is given two views"
    vectors = len(r.matrices()) < len(r.states())
    if "muon of all" in r.at_end and vectors:
        yield "muon orthogonalises matrices"
    said = {
        "another shape": "another shape",
        "of no state": "is for nothing",
        "of nothing": "on is 'nothing'",
    }
    yield from (said[name] for name in dict.fromkeys(r.at_end) if name in said)


def _without_form(r: Recipe) -> Iterator[str]:
    """What has a meaning, but no exact form over a chunk of tokens."""
    alone, online = r.mini_batch == 1, r.anchor == "token" or r.mini_batch == 1
    clipped = r.clip is not None and r.gradients != "constant"
    token_by_token = online and (r.gradients == "nonlinear" or clipped)
    if token_by_token and r.read == "end" and not alone:
        yield 'read="end" reads the weights at the mini-batch\'s end'
        return
    matrix = r.use not in LINEAR and len(r.states()["W0"]) == 2
    staged = bool(r.at_end) or r.per == "mini_batch"
    own = r.read in ("after", "before") or (r.read == "end" and r.read_scale in GATED and not staged)
    if matrix and own and not alone and not token_by_token:
        yield "uses a matrix of fast weights nonlinearly"


GATED = ("gate", "per state", "channel")  # kinds of rates that differ from token to token


# -- strategies --------------------------------------------------------------------------------------------------------


@st.composite
def sensible(draw: Any) -> Recipe:
    """A recipe whose settings suit each other."""
    read = draw(st.sampled_from(["after", "before", "start", "end"]))
    anchor = draw(st.sampled_from(["mini_batch", "mini_batch", "token"]))
    mini_batch = draw(st.sampled_from([1, 2, 3, 4, "all"]))
    inside, online, alone = read in ("after", "before"), anchor == "token", mini_batch == 1
    whole = not inside and not online

    def maybe(kinds: Any, allowed: bool = True, absent: Any = "none", of: int = 3) -> Any:
        """One of the kinds, one time in `of`, where it is allowed."""
        return draw(st.sampled_from(kinds)) if allowed and draw(st.integers(1, of)) == 1 else absent

    average = maybe(RATES, read != "start", of=5)
    averaged = average != "none"
    stages = [n for n in STAGES if n not in VIEWS]
    at_end = maybe([*((n,) for n in stages), *PAIRS], not averaged, (), of=3)
    steps = maybe([2, 3], whole and not averaged, 1)
    momentum = maybe(RATES, steps == 1)
    form = draw(st.sampled_from(["plain", "nesterov", "ema"])) if momentum != "none" else "plain"
    views = whole and steps == 1 and not averaged
    at_end = maybe([(v,) for v in VIEWS] + [("soft_clip", VIEWS[1])], views, at_end, of=5)
    decay = maybe(RATES)
    return Recipe(
        **draw(learners(nonlinear=alone or online or not inside)),
        loss=draw(st.sampled_from([*LOSSES])),
        target=draw(st.sampled_from([*TARGETS])),
        weighted=draw(st.booleans()),
        lr=draw(st.sampled_from(RATES)),
        read_scale=maybe(RATES, not averaged and (alone or not online)),
        momentum=momentum,
        nesterov=form == "nesterov",
        ema=form == "ema",
        decay=decay,
        decay_first=maybe([True], decay != "none" and (online or (alone and steps == 1)), False, of=2),
        average=average,
        clip=maybe([0.05, 0.3, 5.0], absent=None, of=5),
        per=maybe(["mini_batch"], whole and form != "ema" and not averaged, "token"),
        at_end=at_end,
        mini_batch=mini_batch,
        read=read,
        anchor=anchor,
        steps=steps,
    )


def learners(nonlinear: bool) -> st.SearchStrategy[dict[str, Any]]:
    """The learner's part of a recipe; half of them are simple enough for a linear one to be drawn."""
    some = dict(
        first=st.sampled_from(["dense", "dense", "dense", "diagonal"]),
        use=st.sampled_from([*USES] if nonlinear else LINEAR),
        bias=st.sampled_from(["no", "plain"]),
        branch=st.sampled_from(["no", "param"]),
        keep=st.sampled_from(["no", "token", "channel"]),
        residual=st.booleans(),
        other_width=st.booleans(),
    )
    more = some | dict(
        hidden=st.lists(st.sampled_from([*ACTIVATIONS]), max_size=2).map(tuple),
        last=st.sampled_from(["none", "none", "tanh", "sigmoid"]),
        bias=st.sampled_from(["no", "plain", "tanh"]),
        branch=st.sampled_from(["no", "no", "state", "param"]),
        scaled=st.sampled_from(["no", "no", "input", "output"]),
        shared=st.booleans(),
        norm=st.sampled_from(NORMS),
        own_output=st.booleans(),
    )
    return st.one_of(st.fixed_dictionaries(some), st.fixed_dictionaries(more), st.fixed_dictionaries(more))


CHANGES: dict[str, tuple[Any, ...]] = {
    "rule": tuple(BAD_RULES),
    "lr": BAD_RATES,
    "loss": tuple(BAD_LOSSES),
    "use": ("tanh", "square", "product", "normalised"),
    "read_scale": ("gate", "number"),
    "momentum": ("none", "gate"),
    "nesterov": (True,),
    "ema": (True,),
    "decay": ("none", "gate"),
    "decay_first": (True,),
    "average": ("gate", "number"),
    "clip": (0.0, -1.0),
    "per": ("mini_batch", "sequence"),
    "at_end": (*((n,) for n in (*BAD_STAGES, *VIEWS)), VIEWS[:2], ("soft_clip", VIEWS[0])),
    "mini_batch": (0, "some", 1),
    "read": ("after", "before", "start", "end", "sometimes"),
    "anchor": ("token", "sequence"),
    "steps": (0, 2),
}


@st.composite
def recipes(draw: Any) -> Recipe:
    """A sensible recipe; one in four has up to two of its settings changed, whatever the others are."""
    recipe = draw(sensible())
    if draw(st.integers(1, 4)) > 1:
        return recipe
    changed = draw(st.lists(st.sampled_from([*CHANGES]), min_size=1, max_size=2, unique=True))
    return replace(recipe, **{name: draw(st.sampled_from(CHANGES[name])) for name in changed})
