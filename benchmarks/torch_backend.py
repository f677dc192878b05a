"""The emitted forward and backward of TTT-MLP against the same dual form written by hand in eager PyTorch.

    python -m benchmarks.torch_backend            # about four minutes on two cores
    python -m benchmarks.torch_backend --quick

Every number is gated: outputs and gradients of all contenders must agree before anything is timed. The contenders run
interleaved in one process, and the medians of their times are compared; peak memory is what each needs above its
inputs, in a process of its own.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tttc
from benchmarks.by_hand import FORMS, run
from benchmarks.measure import ROOT, about, resident_peak, results_file
from tttc.verification.comparison import relative_error

Step = Callable[[], list[torch.Tensor]]
SIZES = {"B": 1, "T": 2048, "H": 12, "D": 64, "F": 256}
CONTENDERS = ("hand-written", "no recomputation", "default checkpoints")
WEIGHTS = ("W1", "b1", "W2", "b2")
GATE = 5e-4  # float32 gradients through 128 mini-batches against the hand-written form's: both round about 1e-4


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Random inputs of the scales of a trained layer, float32, requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    B, H, D, F = (SIZES[n] for n in "BHDF")

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).requires_grad_()

    position = torch.arange(tokens) % 16 + 1
    return {
        **{name: normal(B, tokens, H, D) for name in "qkv"},
        "lr": (torch.rand((B, tokens, H), generator=generator) * 0.1 / D).requires_grad_(),
        "tau": (1.0 / position).view(1, tokens, 1).expand(B, tokens, H).clone().requires_grad_(),
        "gamma": torch.ones(H, D).requires_grad_(),
        "beta": torch.zeros(H, D).requires_grad_(),
        "W1": normal(H, D, F, scale=0.02),
        "b1": torch.zeros(H, F).requires_grad_(),
        "W2": normal(H, F, D, scale=0.02),
        "b2": torch.zeros(H, D).requires_grad_(),
    }


def steps(x: dict[str, torch.Tensor]) -> dict[str, Step]:
    """One forward and backward for each contender; each returns z and the gradients of every input."""
    cotangent = torch.randn(x["q"].shape, generator=torch.Generator().manual_seed(1))

    def differentiated(z: torch.Tensor) -> list[torch.Tensor]:
        return [z.detach(), *torch.autograd.grad(z, list(x.values()), cotangent)]

    def compiled(checkpoint: int | str | None) -> Step:
        dims = {n: SIZES[n] for n in ("D", "F")}
        layer = tttc.compile(tttc.library.TTTMLP, dims, backend="torch", checkpoint=checkpoint)

        def step() -> list[torch.Tensor]:
            groups = {"gates": ("lr", "tau"), "params": ("gamma", "beta"), "state": WEIGHTS}
            z, _ = layer(x["q"], x["k"], x["v"], **{g: {n: x[n] for n in names} for g, names in groups.items()})
            return differentiated(z)

        return step

    def hand_written() -> list[torch.Tensor]:
        sequences, params = ({n: x[n] for n in names} for names in (("q", "k", "v", "lr", "tau"), ("gamma", "beta")))
        state = {n: x[n].expand(SIZES["B"], *x[n].shape) for n in WEIGHTS}
        return differentiated(run(FORMS["TTTMLP"].step, sequences, params, state, 16)[0])

    return {
        "hand-written": hand_written,
        "no recomputation": compiled(None),
        "default checkpoints": compiled("auto"),
    }


def check(contenders: dict[str, Step], names: list[str]) -> None:
    """Refuse to time contenders that disagree."""
    truth = contenders["hand-written"]()
    for name, step in contenders.items():
        for tensor, found, true in zip(names, step(), truth, strict=True):
            error = relative_error(found, true)
            if not error <= GATE:
                raise SystemExit(
                    f"{name}: {tensor} differs from the hand-written form by {error:.1e}; nothing is timed"
                )


def timed(contenders: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(rounds), description="timing", console=Console(stderr=True)):
        for name, step in contenders.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(name: str, tokens: int) -> float:
    """MiB that one forward and backward needs above its inputs, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.torch_backend", "--tokens", str(tokens), "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout.split()[-1])


def memory_of(name: str, tokens: int) -> float:
    """Warm up on a short sequence, so that code and thread pools are resident, then measure the growth of the peak."""
    steps(inputs(64))[name]()
    step = steps(inputs(tokens))[name]
    before = resident_peak()
    step()
    return resident_peak() - before


def main(
    quick: bool = False, tokens: int = 2048, memory_of_: str = typer.Option("", "--memory-of", hidden=True)
) -> None:
    """Time TTT-MLP forward+backward (B=1, H=12, D=64, F=256, float32) and write benchmarks/results/<machine>.json."""
    if memory_of_:
        print(memory_of(memory_of_, tokens))
        return
    x = inputs(tokens)
    contenders = steps(x)
    check(contenders, ["z", *x])
    seconds = timed(contenders, 3 if quick else 11)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    memory = {name: peak_memory(name, tokens) for name in CONTENDERS}
    rows = [
        {
            "contender": name,
            "seconds": round(medians[name], 3),
            "time_ratio": round(medians[name] / medians["hand-written"], 3),
            "peak_MiB": round(memory[name], 1),
            "memory_ratio": round(memory[name] / memory["hand-written"], 3),
        }
        for name in CONTENDERS
    ]
    table = Table(
        title=f"TTT-MLP forward + backward, B=1 T={tokens} H=12 D=64 F=256 float32, {torch.get_num_threads()} threads"
    )
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    report = {
        **about("python -m benchmarks.torch_backend" + (" --quick" if quick else "")),
        "sizes": {**SIZES, "T": tokens},
        "rounds": len(next(iter(seconds.values()))),
        "rows": rows,
    }
    path = results_file("torch_backend", ".json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    Console(stderr=True).print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
