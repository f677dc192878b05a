"""A network that learns while it reads, trained through its own steps, against the same network that does not learn.

    python -m examples.end_to_end                                        # random cycles: minutes on two cores
    python -m examples.end_to_end --text --seeds 3 --report text.html    # Wikipedia; pip install 'tttc[examples]'
    torchrun --nproc-per-node 2 -m examples.end_to_end                   # processes that share each batch

Equal batches, equal steps. Each block sees the last 32 tokens: what lies further back is in fast weights, or lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from tttc.examples.networks import training
from tttc.examples.networks.curves import LEARNING, PLAIN, Curves, eighths, in_characters, verdicts, write_report
from tttc.examples.networks.samples import sample
from tttc.examples.networks.training import Recipe
from tttc.models import e2e
from tttc.terminal import console

CYCLES = e2e.small(), Recipe(steps=600, length=256, batch=16)
TEXT = e2e.small(vocab=256, ffn=128), Recipe(steps=300, length=512, batch=8)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    text: Annotated[bool, typer.Option("--text", help="Bytes of Wikipedia instead of random cycles.")] = False,
    steps: Annotated[int | None, typer.Option(help="Of each training.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Fewer steps, where learning would take longer.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each, with other weights and batches.", min=1)] = 1,
    report: Annotated[Path | None, typer.Option(help="A picture (.png) or a page (.html) to write.")] = None,
) -> None:
    """Train both, compare what they lose by position, and let the one that learns write on."""
    task = training.wikipedia() if text else training.random_cycles()
    config, recipe = TEXT if text else CYCLES
    curves, written = Curves(task.name, task.unit, config.window, recipe.length), ""
    with training.processes() as first:
        recipe = training.planned(e2e.build(config), task, recipe, steps, minutes)
        for seed in range(seeds):
            for name in (LEARNING, PLAIN):
                torch.manual_seed(seed)
                model = e2e.build(config, learn=name == LEARNING)
                seconds = training.train(model, task, recipe, seed, f"{name}, seed {seed}")
                if first:
                    console().print(f"{name}, seed {seed}: {recipe.steps} steps in {seconds:.0f} s")
                    curves.add(name, training.losses_by_position(model, task, recipe))
                    written = written or sample(model, task)
    if first:
        console().print(eighths(curves), in_characters(curves), *verdicts(curves), written, sep="\n")
    if first and report is not None:
        write_report(curves, report, written)


if __name__ == "__main__":
    app()
