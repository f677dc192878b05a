"""Three variants learn to read Python: a byte-level language model of about half a million parameters each.

    python -m examples.train_bytes --out curves.png

TTT-Linear, TTT-MLP and linear attention on the source of Python's standard library, at equal size and on equal batches,
against a bigram model, which knows how often each byte follows each other byte. Takes minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

from tttc.examples.demo.training import Curve, bigram_bits_per_byte, read_corpus, train
from tttc.terminal import console, table


def plot(curves: list[Curve], bigram: float, file: Path) -> None:
    """Bits per byte on the validation files over steps; the bigram model is a line."""
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    axes.axhline(bigram, color="black", linestyle="--", linewidth=1, label="bigram")
    for curve in curves:
        axes.plot(*zip(*curve.validation, strict=True), marker="o", markersize=3, label=curve.name)
    axes.set(xlabel="step", ylabel="bits per byte", title="Python's standard library, byte by byte")
    axes.legend()
    figure.savefig(file, dpi=150)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps per variant.", min=1)] = 400,
    seconds: Annotated[float | None, typer.Option(help="About how long all of it may take.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the learning curves are drawn.")] = Path("train_bytes.png"),
) -> None:
    """Train TTT-Linear, TTT-MLP and linear attention on the source of Python's standard library."""
    corpus = read_corpus()
    bigram = bigram_bits_per_byte(corpus)
    curves = train(steps=steps, seconds=seconds, seed=seed, corpus=corpus)
    shown = table(
        "model", "parameters", "bits per byte", "tokens/s", numbers=("parameters", "bits per byte", "tokens/s")
    )
    for c in curves:
        shown.add_row(c.name, f"{c.parameters:,}", f"{c.bits_per_byte:.3f}", f"{c.tokens_per_second:,.0f}")
    shown.add_row("bigram", f"{256 * 256:,}", f"{bigram:.3f}", "")
    console().print(shown)
    plot(curves, bigram, out)
    console().print(f"Bits per byte on unseen files, lower is better. Learning curves: {out}")
    for c in (c for c in curves if c.name.startswith("TTT")):
        assert c.bits_per_byte < bigram, f"{c.name} did not beat the bigram model: give it more --steps."


if __name__ == "__main__":
    app()
