"""Declare a learner of one's own, and read the mathematics that follows from it.

    python -m examples.own_learner

Prints the gradient of its loss, the dual form (a mini-batch at once, no weights of any single token) and the
comparison with the declaration, and writes the same mathematics as LaTeX. Takes a few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import tttc


class GatedMemory(tttc.Variant):
    """A gated two-layer memory with a residual: in no paper, and in no file of the compiler."""

    mini_batch = 8  # tokens that share one gradient point
    gate = tttc.state("D", "F", init=tttc.normal(0.1))
    up = tttc.state("D", "F", init=tttc.normal(0.1))
    down = tttc.state("F", "D", init=tttc.normal(0.1))

    def learner(self, x: torch.Tensor) -> torch.Tensor:  # one token, x: [D]
        return x + (tttc.silu(x @ self.gate) * (x @ self.up)) @ self.down

    def loss(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 0.5 * tttc.sum((self.learner(k) - v) ** 2)

    update = tttc.sgd(lr=tttc.gate("lr"))


def main(out: Path) -> None:
    layer = tttc.compile(GatedMemory, dims={"D": 8, "F": 16}, backend="torch")
    print("# The gradient of the loss, as it was derived and simplified\n")
    print(layer.stages["simplify"])
    print("\n# The dual form, which runs\n")
    print(layer.stages["dualize"])
    print("\n# Against the declaration, run token by token in float64: outputs, weights and every gradient\n")
    print(tttc.verify(GatedMemory, tokens=20, backend="torch"))
    out.write_text(layer.explain(latex=True), encoding="utf-8")
    print(f"\nAs LaTeX: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("own_learner.tex"), help="where the LaTeX goes")
    main(parser.parse_args().out)
