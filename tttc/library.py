"""Ready declarations, each with its source. All of them are ordinary declarations: nothing in the compiler knows
them.
"""

from __future__ import annotations

from typing import Any

import tttc.declare.functions as ops
from tttc.declare.specs import gate, normal, param, state, token
from tttc.declare.update_rules import muon, power_norm, sgd, soft_clip, weight_norm
from tttc.declare.variant import Variant

__all__ = [
    "GLA",
    "KDA",
    "MTTT",
    "TTTMLP",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedThreeLayer",
    "LaCT",
    "LinearAttention",
    "Longhorn",
    "Mamba2",
    "MomentumDeltaNet",
    "Moneta",
    "RetNet",
    "TTTLinear",
    "TTTVideo",
    "Titans",
    "ViTTT",
    "Yaad",
]


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


class RetNet(LinearAttention):
    """Retention: linear attention whose weights decay by one number per head (arXiv:2307.08621)."""

    gamma = param(init=0.97)
    update = sgd(lr=1.0, decay=gamma)


class Mamba2(LinearAttention):
    """State-space duality: a decay for each token, exp(-dt * A), and v scaled by dt (arXiv:2405.21060)."""

    update = sgd(lr=gate("dt", activation="softplus", init=0.1), decay=gate("decay", init=0.97))


class GLA(LinearAttention):
    """Gated linear attention: a decay for each token and key channel (arXiv:2312.06635)."""

    update = sgd(lr=1.0, decay=gate("decay", per="channel", init=0.97))


class DeltaNet(Variant):
    """The delta rule: one step on |k W - v|^2 / 2 for each token, at the weights before it (arXiv:2406.06484)."""

    anchor, qk_norm = "token", True
    W = state("D", "D")

    def learner(self, x: Any) -> Any:
        return x @ self.W

    def loss(self, k: Any, v: Any) -> Any:
        return 0.5 * ops.sum((self.learner(k) - v) ** 2)

    update = sgd(lr=gate("lr"))


class GatedDeltaNet(DeltaNet):
    """The delta rule on weights that decay first (arXiv:2412.06464)."""

    update = sgd(lr=gate("lr"), decay=gate("decay", init=0.97), decay_first=True)


class KDA(DeltaNet):
    """Kimi delta attention: the gated delta rule with a decay for each key channel (arXiv:2510.26692)."""

    update = sgd(lr=gate("lr"), decay=gate("decay", per="channel", init=0.97), decay_first=True)


class MomentumDeltaNet(DeltaNet):
    """The delta rule with momentum: Titans' rule (arXiv:2501.00663, eq. 9-10) on a linear memory, nothing forgotten."""

    update = sgd(lr=gate("lr"), momentum=gate("momentum"))


class Longhorn(DeltaNet):
    """The implicit step of arXiv:2407.14207 in closed form: the delta rule with rate beta / (1 + beta |k|^2)."""

    qk_norm = False  # the implicit step is stable for keys of any length
    beta = gate("beta")

    def loss(self, k: Any, v: Any) -> Any:
        rate = self.beta / (1.0 + self.beta * ops.dot(k, k))
        return 0.5 * rate * ops.sum((self.learner(k) - v) ** 2)

    update = sgd(lr=1.0)


class Titans(Variant):
    """Neural long-term memory: a two-layer memory with momentum and forgetting (arXiv:2501.00663, eq. 12-15)."""

    mini_batch, qk_norm = 16, True
    W1 = state("D", "F", init=normal(0.02))
    W2 = state("F", "D", init=normal(0.02))
    gamma = param("D", init=1.0)
    beta = param("D", init=0.0)

    def learner(self, x: Any) -> Any:
        return x + ops.layer_norm(ops.gelu(x @ self.W1) @ self.W2, self.gamma, self.beta, eps=1e-6)

    def loss(self, k: Any, v: Any) -> Any:
        return ops.sum((self.learner(k) - v) ** 2)

    update = sgd(lr=gate("lr", scale="0.1/D"), momentum=gate("momentum"), decay=gate("decay", init=0.99))


class Yaad(Titans):
    """Huber loss of the whole residual, with a threshold for each token (MIRAS, arXiv:2504.13173)."""

    delta = gate("delta", activation="softplus")

    def loss(self, k: Any, v: Any) -> Any:
        square = ops.sum((self.learner(k) - v) ** 2)
        far = square > self.delta**2
        norm = ops.sqrt(ops.where(far, square, 1.0))  # 1 where it is not used: the root has no derivative at 0
        return ops.where(far, self.delta * (norm - 0.5 * self.delta), 0.5 * square)

    update = sgd(lr=gate("lr", scale="0.1/D"), decay=gate("decay", init=0.99))


class Moneta(Titans):
    """l_3 loss, and weights that are A / |A|_4^2 of what the rule adds up, renewed at every mini-batch's end
    (MIRAS, arXiv:2504.13173). They grow as A decays, which therefore decays little.
    """

    read = "start"

    def loss(self, k: Any, v: Any) -> Any:
        return ops.sum(ops.abs(self.learner(k) - v) ** 3)

    update = sgd(lr=gate("lr", scale="0.1/D"), decay=gate("decay", low=0.98, scale=0.02), at_end=power_norm(4))


class TTTVideo(TTTMLP):
    """TTT-MLP as in video generation: a normalised target, all tokens read the mini-batch's end (arXiv:2504.05298)."""

    mini_batch, read, qk_norm = 64, "end", True

    def loss(self, k: Any, v: Any) -> Any:
        centred = v - k - ops.mean(v - k)
        deviation = ops.sqrt(ops.sum(centred**2) / (ops.size(k) - 1.0))
        target = k + self.gamma * (centred / (deviation + 1e-8)) + self.beta
        return 0.5 * ops.sum((self.learner(k) - target) ** 2)

    update = sgd(lr=gate("lr", scale="0.1/D"))


class LaCT(Variant):
    """Large-chunk TTT: a SwiGLU memory, dot-product loss, Muon on each chunk's update (arXiv:2505.23884)."""

    mini_batch, read, qk_norm = 2048, "start", True
    W0 = state("D", "F", init=normal(0.02))
    W1 = state("F", "D", init=normal(0.02))
    W2 = state("D", "F", init=normal(0.02))

    def learner(self, x: Any) -> Any:
        return (ops.silu(x @ self.W0) * (x @ self.W2)) @ self.W1

    def loss(self, k: Any, v: Any) -> Any:
        return -ops.dot(self.learner(k), v)

    update = sgd(
        lr={f"W{i}": gate(f"lr{i}", activation="softplus", scale=0.001) for i in range(3)},
        momentum=gate("momentum"),
        per="mini_batch",
        at_end=(muon(), weight_norm(axis=0)),
    )


class MTTT(Variant):
    """Learning to (learn at test time): two steps of reconstruction on all tokens (arXiv:2310.13807).

    k and q are the projections phi(x), psi(x) of the tokens x [M]; lr carries the heads over the number of tokens.
    """

    mini_batch, read, steps = "all", "end", 2
    W = state("D", "D")
    x = token("M")
    decoder = param("D", "M", init=normal(0.02))
    g_bias = param("M")
    gamma = param("M", init=1.0)
    beta = param("M")

    def learner(self, x: Any) -> Any:
        return x @ self.W

    def loss(self, k: Any, v: Any) -> Any:
        decoded = ops.layer_norm(self.learner(k) @ self.decoder + self.g_bias, self.gamma, self.beta, eps=1e-6)
        return 0.5 * ops.mean((decoded - self.x) ** 2)

    update = sgd(lr=gate("lr", scale=0.01))


class ViTTT(Variant):
    """The gated branch of ViT^3: one clipped step on all tokens, which then read its result (arXiv:2512.01643)."""

    mini_batch, read = "all", "end"
    W1 = state("D", "D", init=normal(0.02))
    W2 = state("D", "D", init=normal(0.02))

    def learner(self, x: Any) -> Any:
        return (x @ self.W1) * ops.silu(x @ self.W2)

    def loss(self, k: Any, v: Any) -> Any:
        return -ops.dot(self.learner(k), v)

    update = sgd(lr=gate("lr"), at_end=soft_clip(axis=0))


class GatedThreeLayer(Variant):
    """An invented learner, in no paper: two layers gated by a third, RMSNorm, a learning rate of its own for the
    gate.
    """

    mini_batch, qk_norm = 16, True
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

    lr, lr_gate = gate("lr", scale=0.1), gate("lr_gate", scale=0.01)
    update = sgd(lr={"W1": lr, "Wg": lr_gate, "W2": lr, "W3": lr})
