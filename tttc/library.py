"""Ready declarations, each with its source. All of them are ordinary declarations: nothing in the compiler knows
them.
"""

from __future__ import annotations

from typing import Any

import tttc.operations as ops
from tttc.variant import Variant, gate, normal, param, sgd, state

__all__ = ["TTTMLP", "GatedThreeLayer", "LinearAttention", "TTTLinear"]


class TTTLinear(Variant):
    """Linear learner with LayerNorm and residual (TTT-Linear, arXiv:2407.04620)."""

    mini_batch = 16
    W1 = state("D", "D", init=normal(0.02))
    b1 = state("D")
    gamma = param("D", init=1.0)
    beta = param("D", init=0.0)

    def learner(self, x: Any) -> Any:
        z = x @ self.W1 + self.b1
        return x + ops.layer_norm(z, self.gamma, self.beta, eps=1e-6)

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * ops.sum((self.learner(k) - v) ** 2)

    update = sgd(lr=gate("lr", scale="1/D"), read_scale=gate("tau", by="position"))


class TTTMLP(Variant):
    """Two-layer learner with LayerNorm and residual (TTT-MLP, arXiv:2407.04620)."""

    mini_batch = 16
    W1 = state("D", "F", init=normal(0.02))
    b1 = state("F")
    W2 = state("F", "D", init=normal(0.02))
    b2 = state("D")
    gamma = param("D", init=1.0)
    beta = param("D", init=0.0)

    def learner(self, x: Any) -> Any:
        z = ops.gelu(x @ self.W1 + self.b1) @ self.W2 + self.b2
        return x + ops.layer_norm(z, self.gamma, self.beta, eps=1e-6)

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * ops.sum((self.learner(k) - v) ** 2)

    update = sgd(lr=gate("lr", scale="0.1/D"), read_scale=gate("tau", by="position"))


class LinearAttention(Variant):
    """Unnormalised linear attention: one step of descent on -k W v (arXiv:2006.16236; as TTT, arXiv:2407.04620, Theorem
    1).
    """

    mini_batch = 16
    W = state("D", "D")

    def learner(self, x: Any) -> Any:
        return x @ self.W

    def loss(self, k: Any, v: Any) -> Any:
        return -ops.dot(self.learner(k), v)

    update = sgd(lr=1.0)


class GatedThreeLayer(Variant):
    """An invented learner, in no paper: two layers gated by a third, RMSNorm, a learning rate of its own for the
    gate.
    """

    mini_batch = 16
    W1 = state("D", "F", init=normal(0.02))
    Wg = state("D", "F", init=normal(0.02))
    W2 = state("F", "F", init=normal(0.02))
    W3 = state("F", "D", init=normal(0.02))
    gamma = param("D", init=1.0)

    def learner(self, x: Any) -> Any:
        h = ops.silu(x @ self.Wg) * (x @ self.W1)
        return x + ops.rms_norm(ops.tanh(h @ self.W2) @ self.W3, self.gamma, eps=1e-2)

    def loss(self, k: Any, v: Any) -> Any:
        return ops.mean((self.learner(k) - v) ** 2)

    lr, lr_gate = gate("lr"), gate("lr_gate", scale=0.1)
    update = sgd(lr={"W1": lr, "Wg": lr_gate, "W2": lr, "W3": lr})
