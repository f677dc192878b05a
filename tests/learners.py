"""Learners beyond products of vectors and matrices: declared as a user would, shared by several test files."""

from __future__ import annotations

import tttc


class CausalConvolution(tttc.Variant):
    """A depthwise convolution over the last K tokens."""

    mini_batch = 4
    q = tttc.token("D", window="K")
    k = tttc.token("D", window="K")
    taps = tttc.state("K", "D")

    def learner(self, x):
        return tttc.sum(self.taps * x, axis=0)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


class BlockDiagonal(tttc.Variant):
    """N blocks of P x P."""

    mini_batch = 4
    q, k, v = tttc.token("N", "P"), tttc.token("N", "P"), tttc.token("N", "P")
    W = tttc.state("N", "P", "P")

    def learner(self, x):
        return tttc.einsum("np,npo->no", x, self.W)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("momentum"))


class LowRank(tttc.Variant):
    """A product of two thin matrices, and a scale for each entry."""

    mini_batch = 4
    down, up, scale = tttc.state("D", "R"), tttc.state("R", "D"), tttc.state("D")

    def learner(self, x):
        return self.scale * x + tttc.tanh((x @ self.down) @ self.up)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), decay=tttc.gate("decay"))


class SharedWeights(tttc.Variant):
    """One matrix there and back, and a scale."""

    mini_batch = 4
    W, scale = tttc.state("D", "F"), tttc.state("D")

    def learner(self, x):
        return self.scale * (tttc.tanh(x @ self.W) @ self.W.T)

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), decay=tttc.gate("decay"))


class Upright(tttc.Variant):
    """Weights that are multiplied from the right, with a bias: columns of z are their rows, and stay where they lie."""

    W = tttc.state("D", "D")
    b = tttc.state("D")
    mini_batch = 16

    def learner(self, x):
        return tttc.einsum("ij,j->i", self.W, x) + self.b

    def loss(self, k, v):
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), decay=tttc.gate("decay", per="channel"))


class OneByOne(tttc.Variant):
    """Exact online gradients of a learner that is not linear: the rows of a chunk one after the other."""

    mini_batch, anchor = 4, "token"
    W = tttc.state("D", "D", init=tttc.normal(0.5))

    def learner(self, x):
        return tttc.tanh(x @ self.W)

    def loss(self, k, v):
        return 0.1 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("momentum"), decay=0.9)


class Renewed(OneByOne):
    """The same with mini-batches whose end is seen: it runs token by token."""

    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("momentum"), at_end=tttc.weight_norm(axis=0))


LEARNERS = {v.__name__: v for v in (CausalConvolution, BlockDiagonal, LowRank, SharedWeights)}
DIMS = {"D": 4, "K": 3, "N": 2, "P": 3, "R": 2, "F": 5}
