"""Programs of constants: rates, gradients and outputs that no token enters, in every class of gradients.

What is the same for every token is summed over the tokens of a mini-batch like anything else, and a program that reads
no tokens still knows how many there are.
"""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result, split_call
from tests.test_stages import STAGES, interpreted_otherwise
from tttc.backends.torch import emit
from tttc.errors import PassChangedMeaning
from tttc.verification.comparison import OUTPUT_TOLERANCE, relative_error

TOKENS = 7  # of mini-batches of 3: the last one ends early


def _linear(self, x):
    return x @ self.W


def _nonlinear(self, x):
    return tttc.tanh(x @ self.W)


def _scale(self, x):
    return x * self.s


def _squared(self, k, v):
    return 0.5 * tttc.sum((self.learner(k) - v) ** 2)


def _ridge(self, k, v):
    """A term that is the same for every token beside one that is not."""
    return _squared(self, k, v) + 0.5 * tttc.sum(self.W * self.W)


def _alone(self, k, v):
    """Nothing but terms that are the same for every token."""
    return 0.5 * tttc.sum(self.W * self.W) + 0.1 * tttc.sum(self.W)


def _lasso(self, k, v):
    """Its gradient jumps, and has no derivative by the weights anywhere else."""
    return 0.1 * tttc.sum(tttc.abs(self.s)) - tttc.dot(self.learner(k), v)


# learner, loss, output: what the class of its gradients is, and which of them sees no token
DECLARED = {
    "constant": (_linear, lambda self, k, v: -tttc.dot(self.learner(k), v), None),
    "affine": (_linear, _squared, None),
    "nonlinear": (_nonlinear, _squared, None),
    "ridge": (_linear, _ridge, None),
    "nonlinear ridge": (_nonlinear, _ridge, None),
    "loss of the weights alone": (_linear, _alone, None),
    "no token anywhere": (_linear, _alone, lambda self, q: tttc.sum(self.W, axis=0)),
    "output without a token": (_linear, _squared, lambda self, q: self.W @ self.p),
    "output of params alone": (_linear, _squared, lambda self, q: self.p),
    "zero gradient": (_linear, lambda self, k, v: 0.0 * tttc.sum(self.learner(k)), None),
    "scalar state": (_scale, _squared, None),
    "scalar state, constant gradient": (_scale, lambda self, k, v: 0.5 * self.s, None),
    "scalar state, lasso": (_scale, _lasso, None),
}
RATES = {
    "numbers": lambda name, x: x,
    "params": lambda name, x: tttc.param(init=x),
    "gates": lambda name, x: tttc.gate(name),
}
RULES = {
    "descent": {},
    "decay": {"decay": 0.9},
    "momentum": {"momentum": 0.6},
    "average": {"average": 0.4},
    "clip": {"clip": 0.5},
    "read scale": {"read_scale": 0.7},
}


def declared(what, rates, rule, **settings):
    learner, loss, output = DECLARED[what]
    body = {"learner": learner, "loss": loss, **({"output": output} if output else {}), **settings}
    body |= {"s": tttc.state(init=0.5)} if "scalar" in what else {"W": tttc.state("D", "D", init=tttc.normal(0.5))}
    if "output" in what:
        body["p"] = tttc.param("D", init=tttc.normal(1.0))
    given = {"lr": 0.1, **RULES[rule]}
    values = {n: x if n == "clip" else RATES[rates](n, x) for n, x in given.items()}
    body |= {f"rate_{n}": x for n, x in values.items() if rates == "params" and n != "clip"}
    return type("Constants", (tttc.Variant,), {**body, "update": tttc.sgd(**values)})


def anchors(rule):
    """Where gradients are taken; tau scales what a mini-batch adds, so it goes with its start alone."""
    found = [("mini_batch", 3), ("mini_batch", "all"), ("mini_batch", 1), ("token", 3)]
    return [a for a in found if rule != "read scale" or a[0] != "token"]


def assert_equal(variant, backend="torch"):
    layer = tttc.compile(variant, {"D": 2}, torch.float64, backend=backend)
    inputs = inputs_for(layer, TOKENS, heads=2)
    assert differences(layer_result(layer, inputs), oracle_result(variant, inputs)) == ""
    return layer, inputs


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("what", DECLARED)
def test_constants_equal_the_oracle(what, rule):
    kinds = cycle(RATES)
    for (anchor, mini_batch), _ in product(anchors(rule), range(1 + (rule == "descent"))):
        assert_equal(declared(what, next(kinds), rule, anchor=anchor, mini_batch=mini_batch))


@pytest.mark.parametrize("what", DECLARED)
def test_constants_in_parts(what):
    """A call of some tokens, continued."""
    for rule, (anchor, mini_batch) in product(("descent", "decay"), (("mini_batch", 3), ("token", 3))):
        layer, inputs = assert_equal(declared(what, "numbers", rule, anchor=anchor, mini_batch=mini_batch))
        (whole, end), (z, state) = (split_call(layer, inputs, cuts) for cuts in ((), (1, 2, 5)))
        assert relative_error(z, whole) <= OUTPUT_TOLERANCE
        assert all(relative_error(state[n], end[n]) <= OUTPUT_TOLERANCE for n in end)


@pytest.mark.parametrize("what", DECLARED)
def test_the_texts_of_constants(monkeypatch, what):
    """Every stage runs as it is printed, and means what the one before means."""
    monkeypatch.setenv("TTTC_CHECK", "1")
    for rule, (anchor, mini_batch) in zip(("descent", "decay", "descent", "decay"), anchors("descent"), strict=True):
        variant = declared(what, "numbers", rule, anchor=anchor, mini_batch=mini_batch)
        layer = tttc.compile(variant, {"D": 2}, torch.float64, backend="torch")
        assert not {stage: wrong for stage in STAGES if (wrong := interpreted_otherwise(layer, stage))}


class TwoRidges(tttc.Variant):
    """Each token's gradients are the weights themselves and an error that both matrices make: rows of several kinds."""

    mini_batch, anchor = 4, "token"
    W, U = (tttc.state("D", "D", init=tttc.normal(0.5)) for _ in range(2))

    def learner(self, x):
        return x @ (self.W + self.U)

    def loss(self, k, v):
        decay = 0.5 * (tttc.sum(self.W * self.W) + tttc.sum(self.U * self.U))
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2) + decay

    update = tttc.sgd(lr=tttc.gate("lr"))


def test_what_a_loop_carries_is_read_before_it_changes():
    """A value along more axes than it is made of is read from its line, not made again from what has changed since."""
    assert_equal(TwoRidges)


def test_kernels_are_checked_too(monkeypatch):
    """With TTTC_CHECK=1 what a backend made of the last program is compared with it."""
    monkeypatch.setenv("TTTC_CHECK", "1")
    monkeypatch.setattr(emit, "is_written_again", lambda e: e.op in ("leaf", "const", "broadcast"))
    with pytest.raises(PassChangedMeaning, match="stage 'emit' changed the output row_0 of two_ridges_rows"):
        tttc.compile(TwoRidges, {"D": 2}, torch.float64, backend="torch")
