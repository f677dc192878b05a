"""Elementwise scales, causal convolutions, block-diagonal, low-rank and shared states: against the oracle."""

from __future__ import annotations

import pytest
import torch

import tttc
from tests.helpers import differences, inputs_for, layer_result, oracle_result, split_call
from tests.learners import DIMS, LEARNERS, CausalConvolution
from tttc.declare.read import signature
from tttc.verification.comparison import OUTPUT_TOLERANCE, relative_error


def compiled(variant):
    return tttc.compile(variant, {d: DIMS[d] for d in signature(variant).dims}, torch.float64)


@pytest.mark.parametrize(
    ("mini_batch", "read", "anchor"),
    [
        (4, "after", "mini_batch"),
        (4, "before", "token"),
        (1, "after", "mini_batch"),
        (4, "start", "mini_batch"),
        (4, "end", "mini_batch"),
        ("all", "after", "mini_batch"),
        ("all", "after", "token"),
    ],
)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_equals_the_oracle(name, mini_batch, read, anchor):
    layer = compiled(LEARNERS[name].replace(mini_batch=mini_batch, read=read, anchor=anchor))
    inputs = inputs_for(layer, 10, heads=2)
    assert differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs)) == ""


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 9), tuple(range(1, 10))])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_split_sequence_is_the_same(name, cuts):
    """The taps of a convolution cross the calls."""
    layer = compiled(LEARNERS[name])
    inputs = inputs_for(layer, 10, heads=2)
    whole, last = split_call(layer, inputs, ())
    z, state = split_call(layer, inputs, cuts)
    assert relative_error(z, whole) <= OUTPUT_TOLERANCE
    assert all(relative_error(state[n], last[n]) <= OUTPUT_TOLERANCE for n in last)


def test_a_window_is_the_last_tokens_with_zeros_before_the_first():
    """With fixed taps the learner is torch's own causal convolution."""
    layer = compiled(CausalConvolution.replace(update=tttc.sgd(lr=0.0)))
    inputs = inputs_for(layer, 10)
    (taps,) = inputs.state.values()
    z, _ = layer(inputs.q, inputs.k, inputs.v, state=inputs.state)
    x = torch.nn.functional.pad(inputs.q[:, :, 0].mT, (2, 0))
    wanted = torch.nn.functional.conv1d(x, taps[0, 0].T.unsqueeze(1), groups=4).mT
    assert relative_error(z[:, :, 0], wanted) <= OUTPUT_TOLERANCE


def test_einsum_is_refused_where_it_does_not_fit():
    class Wrong(LEARNERS["BlockDiagonal"]):
        def learner(self, x):
            return tttc.einsum("np,no->po", x, self.W)

    with pytest.raises(tttc.TTTCError, match=r"einsum\('np,no->po'\) does not fit"):
        compiled(Wrong)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("rate", ["decay", "read_scale", "clip"])
def test_weights_that_every_token_reads_nonlinearly(read, rate):
    """Where the gradients are not frozen, one token after the other: no matrix of weights for each of a chunk."""

    class Squared(tttc.Variant):
        W = tttc.state("D", "D", init=tttc.normal(0.5))

        def learner(self, x):
            return x @ (self.W * self.W)

        def loss(self, k, v):
            return -tttc.dot(k @ self.W, v)

        update = tttc.sgd(lr=tttc.gate("lr"), **{rate: 0.4 if rate == "clip" else tttc.gate(rate)})

    settings = [{"mini_batch": 3}, {"mini_batch": "all"}, {"mini_batch": 1}, {"mini_batch": 3, "anchor": "token"}]
    for chosen in settings[: 3 if rate == "read_scale" else 4]:
        layer = tttc.compile(Squared.replace(read=read, **chosen), {"D": 2}, torch.float64, backend="torch")
        inputs = inputs_for(layer, 7, heads=2)
        assert differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs)) == ""


class _Weighted(tttc.Variant):
    """The gradients of both states hold one error, each times the weight of its token."""

    anchor = "token"
    W = tttc.state("D", "D", init=tttc.normal(0.5))
    b = tttc.state("D")
    weight = tttc.gate("weight")

    def learner(self, x):
        return x @ self.W + self.b

    def loss(self, k, v):
        return self.weight * 0.1 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class _Shown(_Weighted):
    """The output is the weights themselves, and something added."""

    def output(self, q):
        return self.W + tttc.sum(self.b)


class _Added(_Weighted):
    """The gradient of the bias holds what does not depend on the weights beside the error."""

    def loss(self, k, v):
        return super().loss(k, v) + tttc.sum(v * self.b)


class _Experts(_Weighted):
    """The gradient of a sum over experts is the same for each of them."""

    experts = tttc.state("M", "D", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return super().learner(x) + tttc.sum(tttc.einsum("d,mde->me", x, self.experts), axis=0)


AT_END = {"read": "end", "mini_batch": 3}
ONE_SYSTEM = [_Weighted, _Weighted.replace(**AT_END), _Shown, _Added.replace(**AT_END), _Experts.replace(**AT_END)]


@pytest.mark.parametrize("variant", ONE_SYSTEM)
def test_one_triangular_system(variant):
    """What does not depend on the weights is a factor of its own, so that one unknown is left."""
    layer = tttc.compile(variant, {"D": 2, "M": 3}, torch.float64, backend="torch")
    assert "solve_lower" in layer.stages["dualize"].text
    inputs = inputs_for(layer, 7, heads=2)
    assert differences(layer_result(layer, inputs), oracle_result(layer.signature.variant, inputs)) == ""
