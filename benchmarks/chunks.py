"""What the chosen chunk is worth: the same variant at its own chunk and token by token; and what LaCT needs of memory.

    python -m benchmarks.chunks            # about a minute on two cores
    python -m benchmarks.chunks --quick

The two layers differ in nothing but `chunk=`; their outputs and final weights are compared before anything is timed.
They run interleaved in one process, and the medians of their times are compared. The memory is the peak of a process of
its own, above what it needed before the call.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tttc
from benchmarks.measure import ROOT, about, resident_peak, results_file
from tttc.layer import Layer
from tttc.verify import relative_error

VARIANTS = ("LinearAttention", "RetNet", "GatedDeltaNet")
SIZES = {"B": 1, "T": 4096, "H": 4, "D": 64}
GATE = 1e-4  # two orders of float32 sums over 4096 tokens: each rounds at 6e-8 per token, in the worst case in one way
LACT = {"B": 1, "T": 8192, "H": 4, "D": 384, "F": 384, "mini_batch": 2048}


def call(layer: Layer, tokens: int) -> Any:
    """A forward on random inputs of the usual scales: keys of length one, decays close to one."""
    generator = torch.Generator().manual_seed(0)
    shape = (SIZES["B"], tokens, SIZES["H"])
    q, k, v = (torch.randn(*shape, SIZES["D"], generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    gates = {"lr": torch.rand(shape, generator=generator), "decay": 1 - 0.1 * torch.rand(shape, generator=generator)}
    gates = {n: x for n, x in gates.items() if n in layer.signature.gates}
    return lambda: layer(q, k, v, gates=gates)


def compared(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """The chosen chunk against chunk=1: equal results first, then medians of interleaved rounds."""
    variant = getattr(tttc.library, name)
    chosen, single = (tttc.compile(variant, {"D": SIZES["D"]}, backend="torch", chunk=c) for c in (None, 1))
    runs = {"chosen": call(chosen, tokens), "single": call(single, tokens)}
    (z, state), (z1, state1) = (run() for run in runs.values())
    error = max(relative_error(z, z1), *(relative_error(state[n], state1[n]) for n in state))
    if not error <= GATE:
        raise SystemExit(f"{name}: the two chunks differ by {error:.1e}; nothing is timed")
    seconds: dict[str, list[float]] = {n: [] for n in runs}
    for _ in track(range(rounds), description=name, console=Console(stderr=True)):
        for n, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[n].append(time.perf_counter() - began)
    medians = {n: statistics.median(s) for n, s in seconds.items()}
    plan = chosen.stages.program.plan
    assert plan is not None
    return {
        "variant": name,
        "chunk": plan.chunk,
        "seconds": round(medians["chosen"], 4),
        "seconds_chunk_1": round(medians["single"], 4),
        "times_faster": round(medians["single"] / medians["chosen"], 1),
        "difference": float(f"{error:.1e}"),
    }


def lact_memory(tokens: int) -> float:
    """GiB that one forward and backward of LaCT needs above its inputs."""
    dims = {n: LACT[n] for n in ("D", "F")}
    layer = tttc.compile(tttc.library.LaCT, dims, backend="torch")
    generator = torch.Generator().manual_seed(0)
    shape = (LACT["B"], tokens, LACT["H"])
    tensors = [torch.randn(*shape, LACT["D"], generator=generator).requires_grad_() for _ in range(3)]
    gates = {n: (torch.rand(shape, generator=generator) * 1e-3).requires_grad_() for n in layer.signature.gates}
    state = {n: w.requires_grad_() for n, w in layer.init_state().items()}
    before = resident_peak()
    z, _ = layer(*tensors, gates=gates, state=state)
    z.square().mean().backward()
    return (resident_peak() - before) / 1024


def main(quick: bool = False, memory_only: bool = typer.Option(False, hidden=True)) -> None:
    """Time the chosen chunk against chunk=1, and write benchmarks/results/chunks_<machine>.json."""
    if memory_only:
        print(lact_memory(LACT["T"]))
        return
    rows = [compared(name, SIZES["T"], 3 if quick else 7) for name in VARIANTS]
    console = Console()
    table = Table(title=f"forward, B=1 T=4096 H=4 D=64 float32, {torch.get_num_threads()} threads")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    command = [sys.executable, "-m", "benchmarks.chunks", "--memory-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    memory = round(float(done.stdout.split()[-1]), 2)
    sizes = ", ".join(f"{n}={size}" for n, size in LACT.items())
    console.print(f"LaCT forward + backward ({sizes}, float32): {memory} GiB above its inputs")
    report = {
        **about("python -m benchmarks.chunks" + (" --quick" if quick else "")),
        "sizes": SIZES,
        "rows": rows,
        "lact": {**LACT, "peak_GiB": memory},
    }
    path = results_file("chunks", ".json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    Console(stderr=True).print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
