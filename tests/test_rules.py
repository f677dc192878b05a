"""The update rules, crossed with learners, reads, anchors and mini-batches: every combination against the oracle.

Tolerances are those of `tttc.verify`: 1e-12 for outputs and final weights, 1e-11 for gradients, which pass every
operation twice; the worst here is about 1e-13. The whole cross product is slow: what runs by default is chosen so that
every two settings that occur together at all do so in some test.
"""

from __future__ import annotations

import random
from importlib import import_module
from itertools import combinations, product

import pytest

import tttc
from tests.helpers import LIBRARY, READS, dims_of
from tttc.declare.read import signature
from tttc.errors import DeclarationError
from tttc.ir.gradient_class import gradient_class

Options = import_module("tttc.compiler.pipeline").Options  # the attribute `tttc.compile` is the function
DIMS = {"D": 3, "E": 2, "F": 4}
TOKENS = 10  # two mini-batches of 4, and one that ends early

gate, sgd = tttc.gate, tttc.sgd
lr, momentum, decay, rho, tau = (gate(n) for n in ("lr", "momentum", "decay", "rho", "tau"))


class Linear(tttc.Variant):
    """x W + b, squared loss: gradients that are affine in the weights."""

    mini_batch = 4
    W = tttc.state("D", "E")
    b = tttc.state("E")
    v = tttc.token("E")

    def learner(self, x):
        return x @ self.W + self.b

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = sgd(lr)


class Dot(Linear):
    """x W + b, the loss a product: gradients that do not depend on the weights."""

    def loss(self, k, v):
        return -tttc.dot(self.learner(k), v)


class Scale(tttc.Variant):
    """x W with weights that are a vector: a triangular system for each channel."""

    W = tttc.state("D")

    def learner(self, x):
        return x * self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = sgd(lr)


class MLP(tttc.Variant):
    """Two layers: gradients that are not affine in the weights."""

    mini_batch = 4
    W1 = tttc.state("D", "F")
    b1 = tttc.state("F")
    W2 = tttc.state("F", "D")

    def learner(self, x):
        return x + tttc.tanh(x @ self.W1 + self.b1) @ self.W2

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = sgd(lr)


class Matrices(tttc.Variant):
    """Two layers without vectors, for the stages that take matrices."""

    mini_batch = 4
    W1 = tttc.state("D", "F")
    W2 = tttc.state("F", "D")

    def learner(self, x):
        return x + tttc.tanh(x @ self.W1) @ self.W2

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = sgd(lr)


class Plain(tttc.Variant):
    """x W: one matrix, with rates for its rows or its columns."""

    W = tttc.state("D", "E")
    v = tttc.token("E")

    def learner(self, x):
        return x @ self.W

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = sgd(lr)


class PlainDot(Plain):
    def loss(self, k, v):
        return -tttc.dot(self.learner(k), v)


# -- which combinations run ---------------------------------------------------------------------------------


def covering(rows, strength):
    """Some of the rows: enough of them for every `strength` settings that occur together to do so still. First those
    that bring most at once, in an order that is mixed but always the same.
    """
    mixed = [(row, set(combinations(enumerate(row), strength))) for row in random.Random(0).sample(rows, len(rows))]
    seen, kept = set(), []
    for least in range(len(mixed[0][1]), 0, -1):
        for row, met in mixed:
            if len(met - seen) >= least:
                kept.append(row)
                seen |= met
    return kept


def crossed(strength, possible=lambda *row: True, *, together=0, **settings):
    """A test for each combination that is possible; those that are not in a covering are slow. The first settings,
    `together` of them, count as one.
    """
    rows = [row for row in product(*settings.values()) if possible(*row)]
    fast = {(*r[0], *r[1:]) for r in covering([(r[:together], *r[together:]) for r in rows], strength)}
    marked = [pytest.param(*r, marks=() if r in fast else pytest.mark.slow) for r in rows]
    return pytest.mark.parametrize(list(settings), marked)


def test_a_covering_misses_no_combination():
    rows = list(product(range(4), range(3), range(3), range(2)))
    kept = covering(rows, 2)
    assert len(kept) < len(rows) / 3
    for i, j in combinations(range(4), 2):
        assert {(r[i], r[j]) for r in kept} == {(r[i], r[j]) for r in rows}


def check(variant, **settings):
    found = tttc.verify(variant.replace(**settings), DIMS, tokens=TOKENS, heads=1)
    assert found.ok, str(found)


# -- one step per token -------------------------------------------------------------------------------------

LEARNERS = {"linear": Linear, "dot": Dot, "scale": Scale, "MLP": MLP}
RULES = {
    "momentum": dict(momentum=momentum),
    "nesterov": dict(momentum=momentum, nesterov=True),
    "ema": dict(momentum=momentum, ema=True),
    "decay": dict(decay=decay),
    "momentum and decay": dict(momentum=momentum, decay=decay),
    "nesterov and decay": dict(momentum=momentum, nesterov=True, decay=decay),
    "ema and a number": dict(momentum=momentum, ema=True, decay=0.9),
    "average": dict(average=rho),
    "average of everything": dict(average=rho, momentum=momentum, decay=decay),
    "tau and decay": dict(read_scale=tau, decay=decay),
    "tau, momentum and decay": dict(read_scale=tau, momentum=momentum, decay=decay),
    "clip": dict(clip=0.3),
    "clip and momentum": dict(clip=0.3, momentum=momentum, decay=decay),
}
MINI_BATCHES = (1, 4, "all")
ANCHORS = ("mini_batch", "token")


def is_rule(rule, learner, anchor, read, mini_batch, decay_first=False):
    """Whether the declaration makes sense: see tests/test_refusals.py."""
    parts = RULES[rule]
    if ("read_scale" in parts and anchor == "token") or ("average" in parts and read == "start"):
        return False
    return not decay_first or ("decay" in parts and anchor == "token")


def is_sequential(rule, learner, anchor):
    return anchor == "token" and (learner == "MLP" or (learner != "dot" and "clip" in RULES[rule]))


def has_an_exact_form(rule, learner, anchor, read, mini_batch, decay_first=False):
    """Token after token is no way to read the end of a mini-batch first."""
    refused = is_sequential(rule, learner, anchor) and read == "end" and mini_batch != 1
    return is_rule(rule, learner, anchor, read, mini_batch, decay_first) and not refused


SETTINGS = dict(anchor=ANCHORS, read=READS, mini_batch=MINI_BATCHES, decay_first=(False, True))


def check_rule(rule, learner, anchor, read, mini_batch, decay_first):
    update = sgd(lr, decay_first=decay_first, **RULES[rule])
    check(LEARNERS[learner], update=update, anchor=anchor, read=read, mini_batch=mini_batch)


@crossed(2, has_an_exact_form, together=2, rule=RULES, learner=["linear", "MLP"], **SETTINGS)
def test_a_rule(rule, learner, anchor, read, mini_batch, decay_first):
    """On gradients that are affine in the weights, and on those that are not: every two settings with both."""
    check_rule(rule, learner, anchor, read, mini_batch, decay_first)


@crossed(2, has_an_exact_form, rule=RULES, learner=["dot", "scale"], **SETTINGS)
def test_a_rule_on_simpler_gradients(rule, learner, anchor, read, mini_batch, decay_first):
    """On gradients that do not depend on the weights, and on those of a vector."""
    check_rule(rule, learner, anchor, read, mini_batch, decay_first)


@pytest.mark.parametrize("mini_batch", [4, "all"])
@pytest.mark.parametrize(("rule", "learner"), [(r, x) for r in RULES for x in LEARNERS if is_sequential(r, x, "token")])
def test_what_has_no_exact_form_is_refused(rule, learner, mini_batch):
    """Gradients token after token, and outputs that wait for the last of them: never a wrong number."""
    if not is_rule(rule, learner, "token", "end", mini_batch):
        return
    settings = dict(update=sgd(lr, **RULES[rule]), anchor="token", read="end", mini_batch=mini_batch)
    with pytest.raises(DeclarationError, match="no exact chunked form"):
        tttc.compile(LEARNERS[learner].replace(**settings), DIMS)


# -- rates of single channels -------------------------------------------------------------------------------

decay_k, decay_v = gate("decay_k", per="channel", axis="D"), gate("decay_v", per="channel", axis="E")
lr_k, lr_v = gate("lr_k", per="channel", axis="D"), gate("lr_v", per="channel", axis="E")
PLAIN = {"squared": Plain, "dot": PlainDot}
CHANNEL_RULES = {
    "decay of keys": dict(lr=lr, decay=decay_k),
    "decay of values": dict(lr=lr, decay=decay_v),
    "everything of keys": dict(lr=lr_k, decay=decay_k, momentum=decay_k),
    "rate of values": dict(lr=lr_v, decay=decay),
    "keys and values": dict(lr=lr_v, decay=decay_k, momentum=momentum),
    "average": dict(lr=lr, decay=decay_v, momentum=momentum, average=rho),
    "average of keys": dict(lr=lr, decay=decay, average=decay_k),
    "momentum of keys": dict(lr=lr, momentum=decay_k),
    "nesterov of values": dict(lr=lr, momentum=decay_v, nesterov=True),
    "ema of keys": dict(lr=lr_k, momentum=decay_k, ema=True),
    "tau": dict(lr=lr, decay=decay_k, read_scale=tau),
}


def is_channel_rule(rule, learner, anchor, read, mini_batch, decay_first):
    parts = CHANNEL_RULES[rule]
    if ("read_scale" in parts and anchor == "token") or ("average" in parts and read == "start"):
        return False
    return not decay_first or ("decay" in parts and anchor == "token")


@crossed(
    2,
    is_channel_rule,
    rule=CHANNEL_RULES,
    learner=PLAIN,
    anchor=ANCHORS,
    read=READS,
    mini_batch=MINI_BATCHES,
    decay_first=(False, True),
)
def test_rates_of_channels(rule, learner, anchor, read, mini_batch, decay_first):
    """Along the key axis, which is contracted with the query, and along the value axis, which is not."""
    update = sgd(decay_first=decay_first, **CHANNEL_RULES[rule])
    check(PLAIN[learner], update=update, anchor=anchor, read=read, mini_batch=mini_batch)


# -- where a mini-batch ends --------------------------------------------------------------------------------


def mean_square_normalised(U):
    return U / (tttc.sqrt(tttc.mean(U * U)) + 1e-8)


STAGES = {
    "muon": tttc.muon(3),
    "weight_norm of columns": tttc.weight_norm(0),
    "weight_norm of rows": tttc.weight_norm(1),
    "clip_norm": tttc.clip_norm(0.1),
    "clip_norm of all": tttc.clip_norm(0.1, "all"),
    "clip_norm that does nothing": tttc.clip_norm(100.0),
    "soft_clip of columns": tttc.soft_clip(0),
    "soft_clip of rows": tttc.soft_clip(1),
    "power_norm": tttc.power_norm(4),
    "own": tttc.at_end(lambda U: tttc.tanh(U)),
    "own with a name": tttc.at_end(mean_square_normalised),
    "own of weights": tttc.at_end(lambda W: 0.9 * W, on="weights"),
    "own with what it began with": tttc.at_end(
        lambda W, norm: W * norm, on="weights", begin=lambda W: tttc.mean(W * W)
    ),
    "two, one of them for one state": (tttc.muon(2, states=("W1",)), tttc.weight_norm(0)),
    "a view and an update": (tttc.clip_norm(0.1), tttc.power_norm(3, states=("W2",))),
    "a view that begins elsewhere": tttc.at_end(lambda A: 2.0 * A, "view", begin=lambda W: 0.5 * W),
}
STAGED_RULES = {
    "plain": {},
    "momentum and decay": dict(momentum=momentum, decay=decay),
    "tau": dict(read_scale=tau),
    "everything": dict(read_scale=tau, momentum=momentum, nesterov=True, decay=decay, clip=0.5),
}


def has_a_staged_form(stage, rule, read, mini_batch):
    """A view is not seen from inside. Of a single token's gradient, muon keeps the direction alone: the derivative by
    its learning rate is 0, and what both sides hold is rounding.
    """
    if (stage == "power_norm" or stage.startswith("a view")) and read in ("after", "before"):
        return False
    return not (stage == "muon" and mini_batch == 1 and "momentum" not in STAGED_RULES[rule])


@crossed(2, has_a_staged_form, stage=STAGES, rule=STAGED_RULES, read=READS, mini_batch=MINI_BATCHES)
def test_a_stage_at_the_end(stage, rule, read, mini_batch):
    """The tokens inside a mini-batch read it as it grows; only what it hands on went through the stages."""
    update = sgd(lr, at_end=STAGES[stage], **STAGED_RULES[rule])
    check(Matrices, update=update, read=read, mini_batch=mini_batch)


@crossed(
    2,
    lambda stage, rule, read, mini_batch: "read_scale" not in STAGED_RULES[rule],
    stage=["weight_norm of columns", "clip_norm", "own of weights"],
    rule=STAGED_RULES,
    read=["after", "before", "start"],
    mini_batch=MINI_BATCHES,
)
def test_a_stage_after_online_gradients(stage, rule, read, mini_batch):
    """Gradients at the weights of the token before, by a triangular system or one by one, and a stage at the end."""
    update = sgd(lr, at_end=STAGES[stage], **STAGED_RULES[rule])
    for variant in (Plain, PlainDot):
        check(variant, update=update, anchor="token", read=read, mini_batch=mini_batch)


TWO_NORMS = {
    "columns, then rows": (tttc.weight_norm(0), tttc.weight_norm(1)),
    "columns, then all": (tttc.weight_norm(0), STAGES["own with what it began with"]),
    "columns, nothing for the update": (tttc.weight_norm(0), tttc.clip_norm(0.1)),
}


@pytest.mark.parametrize("stages", TWO_NORMS)
def test_two_stages_that_remember_something(stages):
    """Each stage is given what itself began with."""
    check(Matrices, update=sgd(lr, at_end=TWO_NORMS[stages]), read="start")


ONCE = {
    "momentum": dict(momentum=momentum),
    "momentum and decay": dict(momentum=momentum, decay=decay),
    "numbers": dict(momentum=0.9, decay=0.8, nesterov=True),
    "nesterov": dict(momentum=momentum, nesterov=True, decay=decay, read_scale=tau),
    "norms": dict(momentum=momentum, at_end=(tttc.muon(2), tttc.weight_norm(0))),
    "a view": dict(momentum=momentum, decay=decay, at_end=tttc.power_norm(4)),
    "clip": dict(decay=decay, clip=0.3),
    "channels": dict(decay={"W1": gate("decay_f", per="channel", axis="F"), "W2": decay}, momentum=momentum),
}


@crossed(2, rule=ONCE, read=["start", "end"], mini_batch=MINI_BATCHES)
def test_once_per_mini_batch(rule, read, mini_batch):
    """Momentum and decay that act where the mini-batch ends, with the mean of their gates over its tokens."""
    check(Matrices, update=sgd(lr, per="mini_batch", **ONCE[rule]), read=read, mini_batch=mini_batch)


STEPPED = {
    "plain": {},
    "decay": dict(decay=decay),
    "tau": dict(read_scale=tau),
    "clip": dict(clip=0.3),
    "a stage": dict(at_end=tttc.clip_norm(0.1)),
    "a stage of weights": dict(at_end=tttc.at_end(lambda W: 0.9 * W, on="weights"), decay=decay),
    "once": dict(per="mini_batch", decay=decay),
}


@crossed(2, learner=LEARNERS, rule=STEPPED, read=["start", "end"], mini_batch=MINI_BATCHES, steps=(2, 3))
def test_several_steps(learner, rule, read, mini_batch, steps):
    """Each step takes the gradients of all tokens where the last one led."""
    check(LEARNERS[learner], update=sgd(lr, **STEPPED[rule]), read=read, mini_batch=mini_batch, steps=steps)


# -- a compiler that checks itself --------------------------------------------------------------------------


def checked():
    """Each rule of this file on one declaration, with its settings."""

    def case(name, variant, *marks, **settings):
        return pytest.param(variant.replace(mini_batch=4, **settings), id=name, marks=marks)

    for rule, parts in RULES.items():
        if "read_scale" in parts:
            yield case(rule, MLP, update=sgd(lr, **parts))
        else:
            yield case(f"online: {rule}", Linear, anchor="token", update=sgd(lr, **parts))
    for rule, parts in CHANNEL_RULES.items():
        yield case(f"channels: {rule}", Plain, pytest.mark.slow, update=sgd(**parts))
    for stage, found in STAGES.items():
        yield case(f"at the end: {stage}", Matrices, read="start", update=sgd(lr, at_end=found))
    for rule, parts in ONCE.items():
        yield case(f"once: {rule}", Matrices, read="end", update=sgd(lr, per="mini_batch", **parts))
    for rule, parts in STEPPED.items():
        yield case(f"two steps: {rule}", MLP, pytest.mark.slow, read="end", steps=2, update=sgd(lr, **parts))


@pytest.mark.parametrize("variant", list(checked()))
def test_every_stage_keeps_the_meaning_of_a_rule(monkeypatch, variant):
    """With TTTC_CHECK=1 the compiler interprets its own passes against the rule itself, and finds nothing."""
    monkeypatch.setenv("TTTC_CHECK", "1")
    tttc.compile(variant, DIMS)


# -- how gradients are found --------------------------------------------------------------------------------


class Decoded(Linear):
    """A linear learner whose output goes through a fixed matrix: an entry of a gradient depends on the others."""

    P = tttc.param("E", "D")
    v = tttc.token("D")

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) @ self.P - v) ** 2)


class Third(Linear):
    """The gradients of the matrix and of the bias have a number beside what they share."""

    def loss(self, k, v):
        return tttc.sum((self.learner(k) - v) ** 2) / 3


class ScaleAndBias(Scale):
    """Two gradients, x * e and e, of which x does not depend on the weights."""

    b = tttc.state("D")

    def learner(self, x):
        return x * self.W + self.b


class Huber(Plain):
    def loss(self, k, v):
        return tttc.sum(tttc.huber(self.learner(k) - v, 0.5))


class Normalised(Plain):
    def loss(self, k, v):
        return -tttc.dot(tttc.l2_norm(self.learner(k), eps=0.1), v)


class Square(Plain):
    W = tttc.state("D", "D")
    v = tttc.token("D")

    def loss(self, k, v):
        return -tttc.dot(k @ self.W @ self.W, v)


CLIPPED = sgd(lr, clip=0.3)
# The kind of gradients, and the operation that made them depend on the weights as they do.
CLASSES = [
    (Dot, {}, "constant", None),
    (Dot, {"anchor": "token"}, "constant", None),
    (Dot, {"anchor": "token", "update": CLIPPED}, "constant", None),
    (Linear, {}, "frozen", "sub"),
    (Linear, {"anchor": "token"}, "affine", "sub"),
    (Linear, {"mini_batch": 1}, "affine", "sub"),
    (Linear, {"anchor": "token", "update": CLIPPED}, "sequential", "sub"),
    (Third, {"anchor": "token"}, "affine", "sub"),
    (Scale, {"anchor": "token"}, "affine", "sub"),
    (Decoded, {}, "frozen", "sub"),
    (Decoded, {"anchor": "token"}, "sequential", "sub"),
    (MLP, {}, "frozen", "tanh"),
    (MLP, {"anchor": "token"}, "sequential", "tanh"),
    (MLP, {"mini_batch": 1}, "sequential", "tanh"),
    (MLP, {"mini_batch": 1, "update": sgd(lr, at_end=tttc.clip_norm(0.1))}, "frozen", "tanh"),
    (Huber, {"anchor": "token"}, "sequential", "abs"),
    (Normalised, {"anchor": "token"}, "sequential", "pow"),
    (ScaleAndBias, {"anchor": "token"}, "affine", "sub"),
    (Square, {}, "frozen", None),  # linear in the weights, as each of its parts
    (Square, {"anchor": "token"}, "sequential", None),
]


@pytest.mark.parametrize(("variant", "settings", "kind", "op"), CLASSES)
def test_the_class_of_gradients(variant, settings, kind, op):
    """Constant, frozen, affine or sequential, and because of what: read off the program, not off the class."""
    layer = tttc.compile(variant.replace(**settings), DIMS)
    found = gradient_class(layer.stages["primal"].program)
    because = found.finding.because
    assert (found.kind, None if because is None else because.op) == (kind, op)


LIBRARY_CLASSES = {
    "constant": {"LinearAttention", "RetNet", "Mamba2", "GLA"},
    "affine": {"DeltaNet", "GatedDeltaNet", "KDA", "MomentumDeltaNet", "Longhorn"},
    "frozen": {
        *("TTTLinear", "TTTMLP", "GatedThreeLayer", "Titans", "Yaad", "Moneta", "TTTVideo"),
        *("LaCT", "MTTT", "ViTTT"),
    },
}


def test_the_class_of_every_library_variant():
    found = {kind: set() for kind in LIBRARY_CLASSES}
    for name, variant in LIBRARY.items():
        program = signature(variant)
        for stage in tttc.PIPELINE[: [s.name for s in tttc.PIPELINE].index("primal") + 1]:
            program = stage.run(program, Options(dims_of(variant, 4, 6)))
        found[gradient_class(program).kind].add(name)
    assert found == LIBRARY_CLASSES
