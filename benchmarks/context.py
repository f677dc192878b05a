"""Milliseconds of a forward against its context: causal attention, which looks at every token before, and two learners,
whose work for a token does not depend on how many there were.

    python -m benchmarks.context

Writes benchmarks/results/context_<machine>.json and .svg. float32, B=1, H=4, D=64, TTT-MLP with F=256, both compiled
for the CPU (`backend="tvm"`); attention is `torch.nn.functional.scaled_dot_product_attention(is_causal=True)`, which
takes its fused kernel for CPUs. One thread, unless told otherwise: where other programs run, threads that wait for one
another measure those. Results are compared with float64 at the shortest context before anything is timed; then all
three run interleaved, and each point is the median of its rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
import typer
from matplotlib.figure import Figure
from torch.nn.functional import scaled_dot_product_attention

import tttc
from benchmarks.contenders import Step, check, forward_step, ours, truth
from benchmarks.measure import ROOT, about, interleaved, results_file, summary
from benchmarks.workloads import case, inputs
from tttc.terminal import console, table

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
HEADS, WIDTH = 4, 64
ATTENTION = "SDPA"
LEARNERS = {"TTT-Linear": tttc.library.TTTLinear, "TTT-MLP": tttc.library.TTTMLP}
ALLOWED = 1e-4  # of attention, relative to the norm: float32


def steps(tokens: int, compare: bool) -> dict[str, Step]:
    """A forward of each contender on so many tokens."""
    found: dict[str, Step] = {}
    for name, variant in LEARNERS.items():
        c = case(name, variant, D=WIDTH, T=tokens, H=HEADS)
        found[name] = forward_step(ours(c)[1], inputs(c))
        if compare:
            check({name: found[name]}, truth(c, backward=False))
    return {ATTENTION: attention(tokens, compare), **found}


def attention(tokens: int, compare: bool) -> Step:
    """Causal attention in the layout that its kernel likes best, [B, H, T, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(3))

    def step() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"z": scaled_dot_product_attention(q, k, v, is_causal=True)}

    if compare:
        scores = (q.double() @ k.double().mT / WIDTH**0.5).masked_fill(
            torch.ones(tokens, tokens).triu(1) > 0, -torch.inf
        )
        wanted = scores.softmax(-1) @ v.double()
        assert (step()["z"] - wanted).norm() < ALLOWED * wanted.norm()
    return step


def measured(contexts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row for each context: milliseconds by contender."""
    rows = []
    for tokens in contexts:
        seconds = interleaved(steps(tokens, compare=tokens == contexts[0]), rounds)
        rows.append({"T": tokens, "ms": {n: summary([1e3 * s for s in x]) for n, x in seconds.items()}})
    return rows


def picture(report: Mapping[str, Any], file: Path) -> None:
    """Both axes logarithmic; the band is from quartile to quartile."""
    with matplotlib.rc_context({"svg.hashsalt": "tttc", "font.size": 10}):
        axes = (figure := Figure(figsize=(7, 3.6), layout="constrained")).subplots()
        contexts = [row["T"] for row in report["rows"]]
        for name, colour in zip((ATTENTION, *LEARNERS), ("#888888", "#0b7285", "#d9480f"), strict=True):
            found = [row["ms"][name] for row in report["rows"]]
            axes.plot(contexts, [x["median"] for x in found], marker="o", markersize=4, color=colour, label=name)
            axes.fill_between(
                contexts, [x["quartile_1"] for x in found], [x["quartile_3"] for x in found], color=colour, alpha=0.15
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [str(t) for t in contexts])
        axes.set(xlabel="context, tokens", ylabel="forward, milliseconds")
        axes.set_title(f"B=1, H={HEADS}, D={WIDTH}, float32, threads: {report['threads']}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})


def main(quick: bool = False, threads: int = 1) -> None:
    """Time all three at every context, and write the numbers and the picture."""
    torch.set_num_threads(threads)
    contexts, rounds = (CONTEXTS[:2], 3) if quick else (CONTEXTS, 15)
    report = {
        **about("python -m benchmarks.context" + (" --quick" if quick else "")),
        "B": 1,
        "H": HEADS,
        "D": WIDTH,
        "rounds": rounds,
        "rows": measured(contexts, rounds),
    }
    names = (ATTENTION, *LEARNERS)
    shown = table("context", *(f"{n}, ms" for n in names), numbers=("context", *(f"{n}, ms" for n in names)))
    for row in report["rows"]:
        shown.add_row(str(row["T"]), *(f"{row['ms'][n]['median']:.3g}" for n in names))
    console().print(shown)
    path = results_file("context", ".json")
    if not quick:  # what is quick shows that it runs
        path.write_text(json.dumps(report, indent=2) + "\n")
        picture(report, path.with_suffix(".svg"))
        console(stderr=True).print(f"written: {path.relative_to(ROOT)} and .svg")


if __name__ == "__main__":
    typer.run(main)
