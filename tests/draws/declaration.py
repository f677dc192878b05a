"""The class that a recipe describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tttc
from tests.draws.recipe import (
    ACTIVATIONS,
    BAD_LOSSES,
    BAD_RULES,
    BAD_STAGES,
    EDGES,
    LOSSES,
    NUMBERS,
    SCALE,
    STAGES,
    TARGETS,
    USES,
    Recipe,
)


def declaration(r: Recipe) -> type[tttc.Variant]:
    """The class that a recipe describes."""
    names: dict[str, Any] = {n: tttc.state(*dims, init=tttc.normal(0.3)) for n, dims in r.states().items()}
    names |= _tokens(r)
    if r.norm in ("layer_norm", "rms_norm"):
        names["gamma"] = tttc.param(r.width, init=1.0)
    if r.norm == "layer_norm":
        names["beta"] = tttc.param(r.width)
    if r.branch == "param":
        names["P"] = tttc.param("D", r.width, init=tttc.normal(0.3))
    if r.window == "param":
        names["taps"] = tttc.param(*r.taps, init=tttc.normal(0.3))
    if "toward" in r.terms:
        names["home"] = tttc.param(*r.states()["W0"], init=tttc.normal(0.3))
    if r.keep != "no":
        names["keep"] = tttc.gate(r.called("keep"), per=r.keep, axis=r.width)
    if r.target == "gated":
        names["aim"] = tttc.gate(r.called("aim"))
    if r.weighted:
        names["weight"] = tttc.gate(r.called("weight"))
    update = BAD_RULES[r.rule]() if r.rule in BAD_RULES else _rule(r, names)
    body = {r.called(n): x for n, x in names.items()} | {"learner": _learner(r), "loss": _loss(r), "update": update}
    if r.own_output != "no" or r.idle == "output":
        body["output"] = _output(r)
    body |= {"mini_batch": r.mini_batch, "read": r.read, "anchor": r.anchor, "steps": r.steps}
    return type(r.title, (tttc.Variant,), body | {"__module__": __package__})


def _tokens(r: Recipe) -> dict[str, Any]:
    """The tokens that are no vectors of D entries."""
    rows = ("J",) if r.rows else ()
    names = {}
    if r.window != "no":
        names |= {n: tttc.token("D", window=r.taps[0]) for n in "qk"}
    elif r.rows:
        names |= {n: tttc.token("J", "D") for n in "qk"}
    if r.width == "E" or r.rows:
        names["v"] = tttc.token(*rows, r.width)
    return names


class _Plain:
    """The class by the plain names of what it declares."""

    def __init__(self, bound: Any, r: Recipe) -> None:
        self._bound, self._names = bound, dict(r.names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bound, self._names.get(name, name))


def _seen(r: Recipe, own: Any, x: Any) -> Any:
    """What the layers are given of a token: of a window its tokens together."""
    if r.window == "no":
        return x
    return tttc.mean(x, axis=0) if r.window == "mean" else tttc.sum(x * own.taps, axis=0)


def _learner(r: Recipe) -> Callable[..., Any]:
    def weights(own: Any, i: int) -> Any:
        if r.is_shared and i == len(r.hidden):
            return weights(own, 0).T
        W = getattr(own, f"W{i}")
        return USES[r.use](W, getattr(own, "U", None)) if i == 0 else W

    def layer(own: Any, h: Any, i: int) -> Any:
        first = r.first if i == 0 else "dense"
        if first == "blocks":
            return tttc.einsum("jd,jde->je", h, weights(own, i))
        return h @ weights(own, i) if first == "dense" else h * weights(own, i)

    def learner(self: Any, x: Any) -> Any:
        own = _Plain(self, r)
        x = _seen(r, own, x)
        h = x * own.s if r.scaled == "input" else x
        for i, activation in enumerate((*r.hidden, r.last)):
            h = layer(own, h, i)
            if r.bias != "no":
                b = getattr(own, f"b{i}")
                h = h + (tttc.tanh(b) if r.bias == "tanh" else b)
            h = ACTIVATIONS[activation](h)
        h = _branched(r, own, x, h)
        h = h * own.s if r.scaled in ("output", "number") else h
        h = _normalised(r, own, h)
        h = h * own.keep if r.keep != "no" else h
        return x + h if r.residual and r.width == "D" else h

    return learner


def _branched(r: Recipe, own: Any, x: Any, h: Any) -> Any:
    """The last layer with the branch beside it."""
    if r.branch == "param":
        return h * tttc.sigmoid(x @ own.P)
    if r.branch == "state":
        return h * (x @ own.Wg)
    if r.branch == "experts":
        return h + tttc.sum(tttc.einsum("jd,mde->mje" if r.rows else "d,mde->me", x, own.We), axis=0)
    return h


def _normalised(r: Recipe, own: Any, h: Any) -> Any:
    if r.norm == "layer_norm":
        return tttc.layer_norm(h, own.gamma, own.beta, eps=0.1)
    if r.norm == "rms_norm":
        return tttc.rms_norm(h, own.gamma, eps=0.1)
    return tttc.l2_norm(h, eps=0.1) if r.norm == "l2_norm" else h


def _output(r: Recipe) -> Callable[..., Any]:
    def output(self: Any, q: Any) -> Any:
        own = _Plain(self, r)
        if r.own_output == "state":  # and no token
            y = own.W0
        elif r.own_output == "token":  # and no state
            y = 0.5 * tttc.tanh(q)
        elif r.own_output == "number":
            y = tttc.sum(self.learner(q))
        elif r.own_output == "tanh":
            y = tttc.tanh(self.learner(q)) + 0.5 * tttc.sum(q * q)
        else:
            y = self.learner(q)
        return y + tttc.sum(own.idle) if r.idle == "output" else y

    return output


# -- the loss ----------------------------------------------------------------------------------------------------------


def _loss(r: Recipe) -> Callable[..., Any]:
    measure = (LOSSES | BAD_LOSSES)[r.loss]
    aim = TARGETS["value" if r.target == "difference" and r.width == "E" else r.target]

    def loss(self: Any, k: Any, v: Any) -> Any:
        own = _Plain(self, r)
        x = k if r.window == "no" else tttc.mean(k, axis=0)
        value = SCALE * measure(self.learner(k), aim(own, x, v))
        value = own.weight * value if r.weighted else value
        for term in r.terms:
            value = value + SCALE * _TERMS[term](r, own, x, v)
        return value

    return loss


def _added(values: list[Any]) -> Any:
    total = values[0]
    for x in values[1:]:
        total = total + x
    return total


def _axed(r: Recipe, own: Any, found: Callable[[Any], Any]) -> Any:
    """A function of the first weights where they are a matrix, otherwise nothing of it."""
    return found(own.W0) if len(r.states()["W0"]) > 1 else 0.0


_TERMS: dict[str, Callable[..., Any]] = {
    "ridge": lambda r, own, k, v: _added([0.5 * tttc.sum(getattr(own, n) ** 2) for n in r.learned()]),
    "lasso": lambda r, own, k, v: _added([tttc.sum(tttc.abs(getattr(own, n))) for n in r.learned()]),
    "toward": lambda r, own, k, v: 0.5 * tttc.sum((own.W0 - own.home) ** 2),
    "bias": lambda r, own, k, v: 0.5 * tttc.sum(getattr(own, r.last_bias) ** 2) if r.bias != "no" else 0.0,
    "counter": lambda r, own, k, v: -own.n,
    "rows": lambda r, own, k, v: _axed(r, own, lambda W: 0.5 * tttc.sum(tttc.sum(W, axis=-1) ** 2)),
    "mean": lambda r, own, k, v: _axed(r, own, lambda W: tttc.sum(k * tttc.mean(W, axis=-1))),
    "value": lambda r, own, k, v: tttc.sum(v * getattr(own, r.last_bias)) if r.bias != "no" else tttc.sum(v * v),
}


# -- the rule ----------------------------------------------------------------------------------------------------------


def _rule(r: Recipe, names: dict[str, Any]) -> Any:
    stages = STAGES | BAD_STAGES
    states = r.called_states()
    matrices = tuple(n for n, dims in states.items() if len(dims) == 2)
    axed = tuple(n for n, dims in states.items() if dims)
    return tttc.sgd(
        lr=_rates(r, names, "lr", r.lr),
        read_scale=_rates(r, names, "tau", r.read_scale),
        momentum=_rates(r, names, "mu", r.momentum),
        nesterov=r.nesterov,
        ema=r.ema,
        decay=_rates(r, names, "alpha", r.decay),
        decay_first=r.decay_first,
        average=_rates(r, names, "rho", r.average),
        clip=r.clip,
        per=r.per,
        at_end=[stages[name](matrices, axed) for name in r.at_end],
    )


def _rates(r: Recipe, names: dict[str, Any], name: str, kind: str) -> Any:
    """A rate of the kind drawn; a param is declared among `names`, a dict has one of each kind by turns."""
    number, states = NUMBERS[name], r.called_states()

    def gate(suffix: str = "", **settings: Any) -> Any:
        return tttc.gate(r.called(f"{name}{suffix}"), **settings)

    if kind == "param":
        names[f"{name}_param"] = tttc.param(init=number)
        return names[f"{name}_param"]
    if kind == "per state":
        choices = [gate(), number, gate("_other")]
        return {state: choices[i % 3] for i, state in enumerate(states)}
    if kind == "channel":  # of the first axis of one state, of the last of the next; a scalar has none
        axes = {n: dims[-(i % 2)] if dims else None for i, (n, dims) in enumerate(states.items())}
        return {n: gate(f"_{a}", per="channel", axis=a) if a else gate() for n, a in axes.items()}
    if kind in _PLAIN_RATES:
        return _PLAIN_RATES[kind](name, gate)
    return {
        "wrong states": lambda: {r.called("W0"): 0.1, "nothing": 0.1},
        "wrong channel": lambda: gate(per="channel", axis="Z"),
        "wrong per": lambda: gate(per="chunk"),
        "two shapes": lambda: dict.fromkeys(states, gate()) | {r.called("W0"): gate(per="channel", axis="D")},
    }[kind]()


_PLAIN_RATES: Mapping[str, Callable[[str, Callable[..., Any]], Any]] = {
    "none": lambda name, gate: None,
    "gate": lambda name, gate: gate(),
    "number": lambda name, gate: NUMBERS[name],
    "edge": lambda name, gate: EDGES[name],
    "text": lambda name, gate: "fast",
    "lost param": lambda name, gate: tttc.param(),
}
