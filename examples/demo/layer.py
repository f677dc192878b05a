# mypy: allow-untyped-defs
"""The layer of `tttc demo`, written as a user would write it."""

import tttc


class GatedLearner(tttc.Variant):
    """A gated two-layer learner, RMSNorm and residual, under a Huber loss: made up for this demo."""

    mini_batch = 16
    W1 = tttc.state("D", "F", init=tttc.normal(0.02))
    W2 = tttc.state("D", "F", init=tttc.normal(0.02))
    W3 = tttc.state("F", "D", init=tttc.normal(0.02))
    gamma = tttc.param("D", init=1.0)

    def learner(self, x):
        hidden = tttc.silu(x @ self.W1) * (x @ self.W2)
        return x + tttc.rms_norm(hidden @ self.W3, self.gamma, eps=1e-6)

    def loss(self, k, v):
        return tttc.sum(tttc.huber(self.learner(k) - v, 1.0))

    update = tttc.sgd(lr=tttc.gate("lr", scale="1/D"), read_scale=tttc.gate("tau", by="position"))
