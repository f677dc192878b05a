"""A rule of one's own: momentum, and a forgetting that each token chooses for each channel.

    python -m examples.own_rule

A memory with exact online gradients is given eight pairs (k, v), then eight others, and is asked for all of them: what
is left of the earlier ones depends on how much it forgets. Takes a few seconds.
"""

from __future__ import annotations

import torch

import tttc


class Memory(tttc.Variant):
    """The delta rule with momentum, on weights that forget."""

    anchor = "token"  # the gradient of a token is taken at the weights that the token before left
    W = tttc.state("D", "D")

    def learner(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W

    def loss(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    # S = momentum * S + lr * g;  W = decay * W - S
    update = tttc.sgd(lr=tttc.gate("lr"), momentum=tttc.gate("momentum"), decay=tttc.gate("decay", per="channel"))


def recalled(decay: float, pairs: int = 8, width: int = 16) -> tuple[float, float]:
    """How much of the earlier and of the later pairs is there after both: 1 is all of it."""
    generator = torch.Generator().manual_seed(0)
    layer = tttc.compile(Memory, dims={"D": width}, dtype=torch.float64, backend="torch")
    k, v = torch.randn(2, 1, 2 * pairs, 1, width, generator=generator, dtype=torch.float64)  # [B, T, H, D]
    k = torch.nn.functional.normalize(k, dim=-1)
    lr, momentum = (k.new_full((1, 2 * pairs, 1), rate) for rate in (0.8, 0.1))  # [B, T, H]
    gates = {"lr": lr, "momentum": momentum, "decay": torch.full_like(k, decay)}
    _, state = layer(k, k, v, gates=gates)
    kept = (k[0, :, 0] @ state.W[0, 0] * v[0, :, 0]).sum(-1) / v[0, :, 0].square().sum(-1)
    return float(kept[:pairs].mean()), float(kept[pairs:].mean())


def main() -> None:
    print(tttc.compile(Memory, dims={"D": 16}, backend="torch").explain().split("\n\n")[0])  # the rule, in formulas
    print(f"\n{tttc.verify(Memory, backend='torch')}\n")
    for decay in (1.0, 0.95, 0.8):
        earlier, later = recalled(decay)
        print(f"decay {decay:.2f}: {earlier:4.0%} of the earlier pairs is left, {later:4.0%} of the later ones")


if __name__ == "__main__":
    main()
