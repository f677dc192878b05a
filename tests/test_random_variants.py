"""Random declarations against the oracle: learners, losses, rates and reads that nobody wrote by hand.

A `Recipe` is drawn, a class is made of it, and `tttc.verify` compares outputs, final weights and every gradient, to its
tolerances. Losses are scaled so that a step of any learning rate here is a small one: what diverges has no digits to
compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import tttc

_a = sympy.Symbol("a")
ACTIVATIONS = {
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
LOSSES = {
    "squared": lambda y, v: 0.5 * tttc.sum((y - v) ** 2),
    "mean": lambda y, v: tttc.mean((y - v) ** 2),
    "dot": lambda y, v: -tttc.dot(y, v),
    "huber": lambda y, v: tttc.sum(tttc.huber(y - v, 0.7)),
    "cosine": lambda y, v: -tttc.dot(tttc.l2_norm(y, eps=0.1), tttc.l2_norm(v, eps=0.1)),
    "cross entropy": lambda y, v: -tttc.sum(tttc.softmax(v) * tttc.log(tttc.softmax(y) + 0.1)),
}
NORMS = ("none", "layer_norm", "rms_norm", "l2_norm")
RATES = ("gate", "number", "param", "per state")
SCALE = 0.1  # of every loss


@dataclass(frozen=True)
class Recipe:
    """All that is drawn for one declaration. `hidden` are the activations between layers, one fewer than layers."""

    hidden: tuple[str, ...]
    bias: bool
    shared: bool
    last: str
    norm: str
    keep: str
    residual: bool
    other_width: bool
    own_output: bool
    loss: str
    read: str
    mini_batch: int | str
    lr: str
    read_scale: str


recipes = st.builds(
    Recipe,
    hidden=st.lists(st.sampled_from([*ACTIVATIONS]), max_size=2).map(tuple),
    bias=st.booleans(),
    shared=st.booleans(),
    last=st.sampled_from(["none", "none", "tanh", "sigmoid"]),
    norm=st.sampled_from(NORMS),
    keep=st.sampled_from(["no", "token", "channel"]),
    residual=st.booleans(),
    other_width=st.booleans(),
    own_output=st.booleans(),
    loss=st.sampled_from([*LOSSES]),
    read=st.sampled_from(["after", "before", "start", "end"]),
    mini_batch=st.sampled_from([1, 2, 3, 4, "all"]),
    lr=st.sampled_from(RATES),
    read_scale=st.sampled_from(["none", *RATES]),
)


def declaration(r: Recipe) -> type[tttc.Variant]:
    """The class that a recipe describes."""
    last = "E" if r.other_width else "D"
    shared = r.shared and len(r.hidden) >= 1 and last == "D"
    inner = "FG"[: len(r.hidden)]
    if shared and len(inner) == 2:
        inner = "FF"  # the last layer is the transpose of the first
    axes = ["D", *inner, last]
    layers = list(pairwise(axes))
    names = {"v": tttc.token(last)} if r.other_width else {}
    for i, (a, c) in enumerate(layers[: len(layers) - shared]):
        names[f"W{i}"] = tttc.state(a, c, init=tttc.normal(0.3))
    if r.bias:
        names |= {f"b{i}": tttc.state(c) for i, (_, c) in enumerate(layers)}
    if r.norm in ("layer_norm", "rms_norm"):
        names["gamma"] = tttc.param(last, init=1.0)
    if r.norm == "layer_norm":
        names["beta"] = tttc.param(last)
    if r.keep != "no":
        names["keep"] = tttc.gate("keep", per=r.keep, axis=last)

    def learner(self, x):
        h = x
        for i, activation in enumerate((*r.hidden, r.last)):
            W = self.W0.T if shared and i == len(layers) - 1 else getattr(self, f"W{i}")
            h = h @ W + getattr(self, f"b{i}") if r.bias else h @ W
            h = ACTIVATIONS[activation](h)
        h = normalized(self, h)
        h = h * self.keep if r.keep != "no" else h
        return x + h if r.residual and last == "D" else h

    def normalized(self, h):
        if r.norm == "layer_norm":
            return tttc.layer_norm(h, self.gamma, self.beta, eps=0.1)
        if r.norm == "rms_norm":
            return tttc.rms_norm(h, self.gamma, eps=0.1)
        return tttc.l2_norm(h, eps=0.1) if r.norm == "l2_norm" else h

    def loss(self, k, v):
        return SCALE * LOSSES[r.loss](self.learner(k), v)

    states = [n for n in names if n[0] in "Wb" and n != "beta"]
    names |= {"learner": learner, "loss": loss, "mini_batch": r.mini_batch, "read": r.read}
    if r.own_output:
        names["output"] = lambda self, q: tttc.tanh(self.learner(q)) + 0.5 * q @ q
    lr, scale = rates(names, "lr", r.lr, states), rates(names, "tau", r.read_scale, states)
    return type("Drawn", (tttc.Variant,), names | {"update": tttc.sgd(lr=lr, read_scale=scale)})


def rates(names, name, kind, states):
    """A rate of the kind drawn; a param is declared among `names`, a dict has one of each kind by turns."""
    if kind == "param":
        names[f"{name}_param"] = tttc.param(init=0.1)
    made = {"none": None, "gate": tttc.gate(name), "number": 0.3, "param": names.get(f"{name}_param")}
    if kind != "per state":
        return made[kind]
    choices = [tttc.gate(name), 0.2, tttc.gate(f"{name}_other")]
    return {state: choices[i % 3] for i, state in enumerate(states)}


sizes = st.fixed_dictionaries({d: st.integers(1, 5) for d in "DEFG"})
chunks = st.sampled_from([None, 1, 2, 3, 100])
checkpoints = st.sampled_from([None, 1, 2, "auto"])
drawn = given(recipes, sizes, st.integers(0, 9), chunks, checkpoints, st.integers(0, 9))


def check(recipe, dims, tokens, chunk, checkpoint, seed):
    variant = declaration(recipe)
    used = {d: n for d, n in dims.items() if d in tttc.variant.signature(variant).dims}
    found = tttc.verify(variant, used, tokens=tokens, heads=1, seed=seed, chunk=chunk, checkpoint=checkpoint)
    assert found.ok, f"{recipe}\n{found}"


@drawn
def test_random_declarations(recipe, dims, tokens, chunk, checkpoint, seed):
    check(recipe, dims, tokens, chunk, checkpoint, seed)


@pytest.mark.slow
@settings(max_examples=500)
@drawn
def test_many_random_declarations(recipe, dims, tokens, chunk, checkpoint, seed):
    check(recipe, dims, tokens, chunk, checkpoint, seed)


def test_what_can_be_drawn_is_drawn():
    """Each activation, loss, norm and kind of rate on its own, whatever the examples above happened to be."""
    plain = Recipe(
        ("tanh",),
        True,
        False,
        "none",
        "none",
        "no",
        True,
        False,
        False,
        "squared",
        "after",
        2,
        "gate",
        "none",
    )
    changes = (
        [{"hidden": (a,)} for a in ACTIVATIONS] + [{"loss": name} for name in LOSSES] + [{"norm": n} for n in NORMS]
    )
    changes += [{"lr": kind} for kind in RATES] + [{"read_scale": kind} for kind in RATES]
    changes += [
        {"shared": True},
        {"keep": "channel"},
        {"keep": "token"},
        {"other_width": True},
        {"own_output": True},
    ]
    for change in changes:
        recipe = Recipe(**(vars(plain) | change))
        check(recipe, {"D": 3, "E": 2, "F": 4, "G": 5}, 5, None, "auto", 0)
