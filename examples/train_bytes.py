"""Three variants learn to read Python: a byte-level language model of about half a million parameters each.

    python -m examples.train_bytes --out curves.png

Trains TTT-Linear, TTT-MLP and linear attention on the source of Python's standard library, at equal size and
on equal batches, and compares them with a bigram model, which knows how often each byte follows each other
byte and nothing else. Takes a few minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tttc.examples.demo.training import Curve, bigram_bits_per_byte, read_corpus, train


def table(curves: list[Curve], bigram: float) -> Table:
    """One row per variant, the yardstick last."""
    shown = Table("model", title="Bits per byte on unseen files of the standard library (lower is better)")
    for heading in ("parameters", "steps", "bits per byte", "tokens/s", "seconds"):
        shown.add_column(heading, justify="right")
    for c in curves:
        numbers = (
            f"{c.parameters:,}",
            str(c.steps),
            f"{c.bits_per_byte:.3f}",
            f"{c.tokens_per_second:,.0f}",
            f"{c.seconds:.0f}",
        )
        shown.add_row(c.name, *numbers)
    shown.add_row("bigram", f"{256 * 256:,}", "", f"{bigram:.3f}", "", "")
    return shown


def plot(curves: list[Curve], bigram: float, file: Path) -> None:
    """Bits per byte on the validation files over steps; the bigram model is a line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(*zip(*curve.validation, strict=True), marker="o", markersize=3, label=curve.name)
    axes.axhline(bigram, color="black", linestyle="--", linewidth=1, label="bigram")
    # The first points are those of an untrained model: 8 bits, which would squeeze everything else.
    axes.set(
        xlabel="step",
        ylabel="bits per byte",
        ylim=(None, 1.35 * bigram),
        title="Python's standard library, byte by byte",
    )
    axes.legend()
    figure.savefig(file, dpi=150)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Optimiser steps per variant.", min=1)] = 400,
    seconds: Annotated[float | None, typer.Option(help="About how long all of it may take.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the learning curves are drawn.", dir_okay=False)] = Path(
        "train_bytes.png"
    ),
) -> None:
    """Train TTT-Linear, TTT-MLP and linear attention on the source of Python's standard library."""
    console = Console()
    corpus = read_corpus()
    bigram = bigram_bits_per_byte(corpus)
    console.print(f"{len(corpus.train):,} bytes to train on; a bigram model needs {bigram:.3f} bits per byte.")
    curves = train(steps=steps, seconds=seconds, seed=seed, corpus=corpus)
    console.print(table(curves, bigram))
    plot(curves, bigram, out)
    console.print(f"Learning curves: {out}")
    for curve in curves:
        if curve.name.startswith("TTT"):
            assert curve.bits_per_byte < bigram, f"{curve.name} did not beat the bigram model: give it more --steps."


if __name__ == "__main__":
    app()
