"""A network that learns at test time against the same one that does not: a training step, its memory, and decoding.

    python -m benchmarks.end_to_end                     # some minutes on two cores
    python -m benchmarks.end_to_end --rounds 3 --model small

Before anything is timed, the meta-gradient by the sweep is compared with autograd's own through every inner step, and
decoding with the whole pass, in float64. A step is the forward and the backward of one sequence. Times: contenders run
interleaved in one process; ratios are taken round by round, and their medians printed. Memory: by how much a step lets
the peak of the resident set grow (VmHWM), in a process of its own that has made one short step before. Decoding: the
seconds of as many tokens as a chunk has, one inner step among them, from a short and from a long context, interleaved.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import measure
from benchmarks.contenders import Disagreement
from tttc.models import e2e
from tttc.networks.end_to_end import EndToEnd
from tttc.terminal import console, table

LEARNING, PLAIN = "learning", "without learning"
MODELS = {
    "small": e2e.small(vocab=256, blocks=4, window=256, chunk=128),
    "as the paper's": e2e.Config(
        vocab=256, width=256, heads=4, blocks=8, suffix=2, ffn=544, prime=544, window=1024, chunk=256
    ),
}
"""Half the blocks of the first learn; of the second a quarter, as in the paper, on 8 chunks in 2,048 tokens."""
TIMED = 2048  # tokens of a step whose time is taken
LENGTHS = (1024, 2048, 4096, 8192)  # of steps whose memory is
CONTEXTS = (1024, 16_384)  # read before tokens are decoded
EXACT = 1e-10


def made(config: e2e.Config, learn: bool = True, **options: Any) -> EndToEnd:
    """The network, with the same values each time."""
    torch.manual_seed(0)
    return e2e.build(config, learn, **options)


def tokens_of(config: e2e.Config, length: int, batch: int = 1) -> Tensor:
    """Any tokens [batch, length]."""
    return torch.randint(config.vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def step(model: EndToEnd, tokens: Tensor) -> None:
    """A forward and a backward; gradients are dropped before."""
    model.zero_grad(set_to_none=True)
    model(tokens).loss.backward()


# ---- what is right ----


def check() -> dict[str, float]:
    """Relative errors of the sweep and of decoding, of a small network with an open chunk at its end.

    Raises:
        Disagreement: one is more than `EXACT`.
    """
    config = e2e.small(vocab=32, width=16, heads=2, ffn=24, prime=24, window=12, chunk=8)
    tokens = tokens_of(config, 43, batch=2)
    model = made(config, dtype=torch.float64)
    gradients = {}
    for model.backward in ("graph", "sweep"):
        step(model, tokens)
        gradients[model.backward] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    nll = []
    with torch.no_grad():
        whole, state = model(tokens).nll, model.prefill(tokens[:, :1])
        for token in tokens[:, 1:].unbind(1):
            nll.append(-state.logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
            _, state = model.decode(token, state)
    errors = {
        "the sweep's gradient": _apart(gradients["sweep"], gradients["graph"]),
        "decoding": _apart(torch.stack(nll, 1), whole),
    }
    if wrong := {n: e for n, e in errors.items() if not e <= EXACT}:
        raise Disagreement(", ".join(f"{n} is off by {e:.1e}" for n, e in wrong.items()))
    return errors


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- what is measured ----


def times(config: e2e.Config, rounds: int, length: int) -> dict[str, Any]:
    """Seconds of a step of both, and their ratio."""
    tokens = tokens_of(config, length + 1)
    run = {n: partial(step, made(config, learn), tokens) for n, learn in ((LEARNING, True), (PLAIN, False))}
    seconds = measure.interleaved(run, rounds)
    return {
        "tokens": length,
        "seconds": {n: measure.summary(s) for n, s in seconds.items()},
        "ratio": measure.ratios(seconds[LEARNING], seconds[PLAIN]),
    }


def memory(config: e2e.Config, length: int) -> dict[str, Any]:
    """MiB by which a step lets the peak grow, of both, each in a process of its own."""
    found = {n: apart(growth, config, learn, length) for n, learn in ((LEARNING, True), (PLAIN, False))}
    return {"tokens": length, "MiB": found, "ratio": round(found[LEARNING] / found[PLAIN], 3)}


def growth(config: e2e.Config, learn: bool, length: int) -> float:
    """MiB by which a step of `length` tokens lets this process's peak grow."""
    model = made(config, learn)
    step(model, tokens_of(config, 2 * config.chunk + 1))
    model.zero_grad(set_to_none=True)
    tokens = tokens_of(config, length + 1)
    measure.forget_peak()
    before = measure.resident_peak()
    step(model, tokens)
    return round(measure.resident_peak() - before, 1)


def apart(function: Callable[..., float], *arguments: Any) -> float:
    """The function's result, in a process that does nothing else."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, arguments)


@torch.no_grad()
def decoding(config: e2e.Config, rounds: int, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Seconds a token after each context, and bytes of the state."""
    model = made(config)
    states = {n: model.prefill(tokens_of(config, n)) for n in contexts}
    following = tokens_of(config, config.chunk)[0].unbind()

    def run(context: int) -> None:
        state = states[context]
        for token in following:
            _, state = model.decode(token[None], state)

    seconds = measure.interleaved({str(n): partial(run, n) for n in contexts}, rounds)
    each = {n: [s / config.chunk for s in x] for n, x in seconds.items()}
    return {
        "seconds_per_token": {n: measure.summary(s) for n, s in each.items()},
        "ratio": measure.ratios(each[str(contexts[-1])], each[str(contexts[0])]),
        "state_bytes": {str(n): states[n].bytes for n in contexts},
    }


# ---- what is printed ----


def show(rows: list[dict[str, Any]]) -> None:
    """Three tables."""
    shown = table("network", "tokens", LEARNING, PLAIN, "times", numbers=("tokens", LEARNING, PLAIN, "times"))
    for row in rows:
        s = row["step"]["seconds"]
        cells = (f"{1e3 * s[n]['median']:.4g} ms" for n in (LEARNING, PLAIN))
        shown.add_row(row["network"], f"{row['step']['tokens']:,}", *cells, f"{row['step']['ratio']['median']:.2f}")
        for m in row["memory"]:
            cells = (f"{m['MiB'][n]:.1f} MiB" for n in (LEARNING, PLAIN))
            shown.add_row(row["network"], f"{m['tokens']:,}", *cells, f"{m['ratio']:.2f}")
    console().print("A training step of one sequence: its time, and by how much it lets the peak of memory grow", shown)
    shown = table("network", "context", "a token", "times", "state", numbers=("context", "a token", "times", "state"))
    for row in rows:
        d = row["decoding"]
        for i, (context, s) in enumerate(d["seconds_per_token"].items()):
            ratio = f"{d['ratio']['median']:.3f}" if i else ""
            size = f"{d['state_bytes'][context]:,} bytes"
            shown.add_row(row["network"], f"{int(context):,}", f"{1e3 * s['median']:.4g} ms", ratio, size)
    console().print("\nDecoding", shown)


def main(
    model: Annotated[list[str] | None, typer.Option(help="small, or as the paper's; by default both.")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 7,
    out: Annotated[Path | None, typer.Option(help="Where the JSON goes; by default only that of all of it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A hundredth of the tokens: whether it runs at all.")] = False,
) -> None:
    """Measure, print tables, and write benchmarks/results/end_to_end_<machine>_<n>threads.json."""
    errors = check()
    console().print("Equal in float64: " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    rows = []
    for name in model or MODELS:
        config = replace(MODELS[name], window=16, chunk=8) if quick else MODELS[name]
        shorter = [n // 64 if quick else n for n in (TIMED, *LENGTHS, *CONTEXTS)]
        timed, lengths, contexts = shorter[0], shorter[1 : 1 + len(LENGTHS)], tuple(shorter[1 + len(LENGTHS) :])
        row: dict[str, Any] = {"network": name, "step": times(config, rounds, timed)}
        row["memory"] = [memory(config, n) for n in (lengths[-1:] if quick else lengths)]
        row["decoding"] = decoding(config, rounds, contexts)
        rows.append(row)
        print(name, file=sys.stderr)
    show(rows)
    path = out or (None if model or quick else measure.results_file("end_to_end", ".json"))
    if path is not None:
        command = " ".join(["python -m benchmarks.end_to_end", *sys.argv[1:]])
        path.write_text(json.dumps({**measure.about(command), "errors": errors, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
