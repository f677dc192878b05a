"""What the chosen chunk is worth: the same variant at its own chunk and token by token, and the native kernels at other
chunks; and what LaCT needs of memory.

    python -m benchmarks.chunks            # about five minutes on two cores
    python -m benchmarks.chunks --quick

The layers of a row differ in nothing but `chunk=`; what they give is compared before anything is timed. They run
interleaved in one process, and the medians of their times are compared. The memory is the peak of a process of its own,
above what it needed before the call.
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
from benchmarks import measure
from benchmarks.contenders import Step, backward_step, check, forward_step, truth
from benchmarks.measure import ROOT, about, resident_peak, results_file
from benchmarks.workloads import call, case, inputs
from tttc.runtime.layer import Layer
from tttc.verification.comparison import relative_error

VARIANTS = ("LinearAttention", "RetNet", "GatedDeltaNet")
SIZES = {"B": 1, "T": 4096, "H": 4, "D": 64}
GATE = 1e-4  # two orders of float32 sums over 4096 tokens: each rounds at 6e-8 per token, in the worst case in one way
NATIVE = {64: (2048, 12), 128: (2048, 6), 256: (1024, 6)}  # D, and the tokens and heads that are run with it
CHUNKS = (8, 16, 32, 64)
LACT = {"B": 1, "T": 8192, "H": 4, "D": 384, "F": 384, "mini_batch": 2048}


def usual(layer: Layer, tokens: int) -> Any:
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
    runs = {"chosen": usual(chosen, tokens), "single": usual(single, tokens)}
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


def native(name: str, D: int, backward: bool, rounds: int) -> dict[str, Any]:
    """The kernels of the TVM backend: the time of each chunk over that of the longest, which needs the fewest passes
    over the state.
    """
    T, H = NATIVE[D]
    c = case(name, getattr(tttc.library, name), D=D, T=T, H=H)
    x = inputs(c)
    make = backward_step if backward else forward_step
    wanted = truth(c, backward)

    def step(chunk: int) -> Step:
        layer = tttc.compile(c.variant, c.dims, backend="tvm", chunk=chunk)
        return make(lambda x: call(layer, c, x), x)

    steps = {str(n): step(n) for n in CHUNKS}
    check(steps, wanted)
    seconds = measure.interleaved(steps, rounds)
    plan = tttc.compile(c.variant, c.dims, backend="tvm").stages.program.plan
    assert plan is not None
    return {
        "variant": name,
        "D": D,
        "pass": "forward+backward" if backward else "forward",
        "chosen": plan.chunk,
        **{n: round(measure.ratios(s, seconds[str(CHUNKS[-1])])["median"], 2) for n, s in seconds.items()},
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


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("variant", "pass") else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def main(quick: bool = False, memory_only: bool = typer.Option(False, hidden=True)) -> None:
    """Time the chosen chunk against others, and write benchmarks/results/chunks_<machine>.json."""
    if memory_only:
        print(lact_memory(LACT["T"]))
        return
    console = Console()
    threads = torch.get_num_threads()
    rows = [compared(name, SIZES["T"], 3 if quick else 7) for name in VARIANTS]
    show(f"torch backend, forward, B=1 T=4096 H=4 D=64 float32, {threads} threads", rows)
    wanted = [
        (n, D, backward) for D in list(NATIVE)[: 1 if quick else None] for n in VARIANTS for backward in (False, True)
    ]
    cells = [native(*w, 3 if quick else 11) for w in track(wanted, "native", console=Console(stderr=True))]
    show(f"native kernels, float32, {threads} threads: time over that of {CHUNKS[-1]} tokens", cells)
    command = [sys.executable, "-m", "benchmarks.chunks", "--memory-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    memory = round(float(done.stdout.split()[-1]), 2)
    sizes = ", ".join(f"{n}={size}" for n, size in LACT.items())
    console.print(f"LaCT forward + backward ({sizes}, float32): {memory} GiB above its inputs")
    report = {
        **about("python -m benchmarks.chunks" + (" --quick" if quick else "")),
        "sizes": SIZES,
        "rows": rows,
        "native": cells,
        "lact": {**LACT, "peak_GiB": memory},
    }
    path = results_file("chunks", ".json")
    path.write_text(json.dumps(report, indent=2) + "\n")
    Console(stderr=True).print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
