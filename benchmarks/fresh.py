"""What can only be measured in a process of its own: peak memory, and the seconds until a first result.

    python -m benchmarks.fresh memory TTTMLP "eager 16"     # MiB of a forward and backward above its inputs
    python -m benchmarks.fresh start TTTLinear forward      # seconds from torch and tttc imported to a first result

`benchmarks.cpu` starts it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import typer

import tttc
from benchmarks.measure import ROOT, forget_peak, resident_peak

WARM = 64  # tokens of the call that makes code and thread pools resident
app = typer.Typer(add_completion=False)


@app.command()
def memory(label: str, contender: str) -> None:
    """Print the growth of the peak of resident memory by one forward and backward, MiB."""
    from benchmarks.contenders import backward_step, one
    from benchmarks.workloads import cases, inputs

    c = cases()[label]
    forward = one(c, contender)
    backward_step(forward, inputs(c, WARM))()
    step = backward_step(forward, inputs(c))
    forget_peak()
    before = resident_peak()
    step()
    print(resident_peak() - before)


@app.command()
def start(label: str, what: str) -> None:
    """Print the seconds that a layer takes from its declaration to the result of a first short call."""
    from benchmarks.contenders import backward_step, forward_step
    from benchmarks.workloads import call, cases, inputs

    c = cases()[label]
    x = inputs(c, 2 * c.mini_batch)
    began = time.perf_counter()
    layer = tttc.compile(c.variant, c.dims, torch.float32, backend="tvm")
    (backward_step if what == "backward" else forward_step)(lambda x: call(layer, c, x), x)()
    print(time.perf_counter() - began)


def peak_memory(label: str, contender: str) -> float:
    """MiB, in a process of its own."""
    return _last_number(["memory", label, contender], os.environ)


def start_seconds(label: str, what: str) -> dict[str, float]:
    """With nothing in the cache, and the median of five processes with what the first one left there."""
    with tempfile.TemporaryDirectory(prefix="tttc-start-") as folder:
        environment = {**os.environ, "TTTC_CACHE_DIR": folder}
        fresh, *cached = (_last_number(["start", label, what], environment) for _ in range(6))
    return {"fresh": round(fresh, 3), "cached": round(statistics.median(cached), 3)}


def _last_number(arguments: list[str], environment: os._Environ[str] | dict[str, str]) -> float:
    command = [sys.executable, "-m", "benchmarks.fresh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    app()
