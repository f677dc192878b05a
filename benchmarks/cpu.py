"""Every ready variant, compiled for the CPU, against eager PyTorch, torch.compile and the machine's own matrix product.

    python -m benchmarks.cpu                      # everything: about a quarter of an hour on two cores
    python -m benchmarks.cpu --quick              # four variants, three rounds, no torch.compile: a minute
    python -m benchmarks.cpu TTTLinear Titans --no-backward
    python -m benchmarks.cpu --starts             # the seconds until a first result alone, anew in the results
    python -m benchmarks.cpu --markdown           # the table of docs/measured.md, from what is in benchmarks/results

Who the contenders are is in benchmarks/contenders.py, what counts as a FLOP in benchmarks/flops.py, the sizes in
benchmarks/workloads.py. Every number is gated: outputs and final states, or outputs and all gradients, of every
contender are compared with the torch backend in float64 before anything is timed; who is too far off ends the row with
a message and without a number, and the program with an error. Contenders and a 1024^3 float32 product run interleaved
in one process, each after a warm call; ratios are taken round by round, and their medians printed, the quartiles and
the range are in the JSON, which only a full run writes unless `--out` names one. Kernels are compiled into an empty
cache, and the seconds of that are the row's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track

from benchmarks import measure
from benchmarks.contenders import (
    COMPILED,
    GRADIENT,
    OURS,
    OUTPUT,
    TORCH,
    Disagreement,
    Forward,
    Step,
    backward_step,
    by_hand,
    check,
    compiled_by_torch,
    forward_step,
    ours,
    truth,
)
from benchmarks.flops import useful_flops
from benchmarks.fresh import peak_memory, start_seconds
from benchmarks.present import CAPTION, markdown, picture, table
from benchmarks.workloads import HEADLINE, Case, cases, inputs
from tttc.terminal import console

SGEMM = "SGEMM"
STARTS = (("TTTLinear", "forward"), ("TTTMLP", "backward"))


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    budget: float
    """Seconds after which a row begins no further round, beyond three; a row that nobody asked for gets a quarter."""
    by_torch: bool


def measured(c: Case, backward: bool, effort: Effort) -> dict[str, Any]:
    """One row: who is right, then medians of interleaved rounds."""
    x = inputs(c)
    wanted = truth(c, backward)
    began = time.perf_counter()
    layer, compiled = ours(c)
    make = backward_step if backward else forward_step
    make(compiled, x)()
    first = time.perf_counter() - began
    forwards: dict[str, Forward] = {OURS: compiled, TORCH: ours(c, "torch")[1], **by_hand(c)}
    if effort.by_torch and not backward:
        forwards |= compiled_by_torch(c)
    steps = {name: make(forward, x) for name, forward in forwards.items()}
    failed = _without_failure(steps)
    errors = check(steps, wanted)
    del wanted
    budget = effort.budget if c.asked else effort.budget / 4
    seconds = measure.interleaved({SGEMM: measure.sgemm(), **steps}, effort.rounds, budget)
    flops = useful_flops(layer, c.B, c.H, c.T, backward=backward)
    return {
        **_head(c, backward),
        **failed,
        "chunk": layer.stages.program.plan.chunk,  # type: ignore[union-attr]
        "first_call_seconds": round(first, 2),
        "rounds": len(seconds[OURS]),
        "errors": {n: float(f"{e:.1e}") for n, e in errors.items()},
        "useful_flops": flops,
        "seconds": {n: measure.summary(s) for n, s in seconds.items()},
        "fraction_of_sgemm": None if flops is None else _fraction(flops, seconds),
        "times_faster_than": {
            n: measure.ratios(s, seconds[OURS]) for n, s in seconds.items() if n in steps and n != OURS
        },
    }


def _without_failure(steps: dict[str, Step]) -> dict[str, str]:
    """Take torch.compile out where it cannot compile, for instance without a C++ compiler, and say why."""
    if COMPILED not in steps:
        return {}
    try:
        steps[COMPILED]()
    except Exception as reason:  # whatever its compilers raise
        del steps[COMPILED]
        return {"torch_compile_failed": str(reason).splitlines()[0]}
    return {}


def _head(c: Case, backward: bool) -> dict[str, Any]:
    return {"label": c.label, "pass": "forward+backward" if backward else "forward", "sizes": c.sizes()}


def _fraction(flops: float, seconds: dict[str, list[float]]) -> dict[str, float]:
    """The FLOPs of a second, over those of the SGEMM of the same round."""
    share = flops / (2 * measure.GEMM**3)
    return measure.summary([share * a / b for a, b in zip(seconds[SGEMM], seconds[OURS], strict=True)])


def _memory(c: Case) -> dict[str, float]:
    """MiB of a forward and backward above its inputs, each in a process of its own: ours, and the hand-written loop."""
    return {n: round(peak_memory(c.label, n), 1) for n in (OURS, TORCH, next(iter(by_hand(c))))}


def run_all(
    chosen: list[Case],
    passes: tuple[bool, ...],
    effort: Effort,
    memory: bool,
    report: dict[str, Any],
    path: Path | None,
) -> None:
    """Fill in the rows of the report, writing it to `path` after each."""
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task("", total=len(chosen) * len(passes) + (len(STARTS) if memory else 0))
        for c in chosen:
            for backward in passes:
                head = _head(c, backward)
                progress.update(task, description=f"{c.label}, {head['pass']}")
                try:
                    row = measured(c, backward, effort)
                    if memory and backward and c.asked:
                        row["peak_MiB"] = _memory(c)
                except Disagreement as reason:
                    row = {**head, "refused": str(reason)}
                    errors.print(f"{c.label}, {head['pass']}: {reason}", markup=False)
                report["rows"].append(row)
                _write(report, path)
                progress.advance(task)
        for label, what in STARTS if memory else ():
            progress.update(task, description=f"{label}, first start")
            report["start_seconds"][f"{label}, {what}"] = start_seconds(label, what)
            _write(report, path)
            progress.advance(task)


def _write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def main(
    variants: list[str] = typer.Argument(None, help="Which to measure; all, unless given."),
    quick: bool = typer.Option(False, help="Four variants, three rounds, no torch.compile, no memory."),
    rounds: int = typer.Option(9, min=3),
    budget: float = typer.Option(12.0, help="Seconds for the rounds of one row; a quarter of it for the rest."),
    backward: bool = typer.Option(True, help="Also forward and backward."),
    by_torch: bool = typer.Option(True, "--torch-compile/--no-torch-compile"),
    memory: bool = typer.Option(
        None, help="Peak memory, and the seconds of a first start, in processes of their own; unless --quick."
    ),
    out: Path = typer.Option(None, help="Where the JSON goes, the picture beside it; by default only a full run's."),
    starts: bool = typer.Option(False, help="Only the seconds until a first result, into the JSON of a full run."),
    print_markdown: bool = typer.Option(False, "--markdown", help="Print the table of docs/measured.md, and end."),
) -> None:
    """Measure, print a table, and write benchmarks/results/cpu_<machine>_<n>threads.json and .png."""
    known, memory = cases(), not quick if memory is None else memory
    unknown = [v for v in variants or () if v not in known]
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    full = not (variants or quick) and backward and memory and by_torch
    path = out or (measure.results_file("cpu", ".json") if full or starts or print_markdown else None)
    if print_markdown:
        assert path is not None
        print(markdown(json.loads(path.read_text())))
        return
    if starts:
        assert path is not None
        _start_anew(json.loads(path.read_text()), path)
        return
    effort = Effort(3, 0.0, False) if quick else Effort(rounds, budget, by_torch)
    report = {
        **measure.about(_command()),
        "gates": {"output": OUTPUT, "gradient": GRADIENT},
        "rows": [],
        "start_seconds": {},
    }
    chosen = [known[v] for v in variants or (HEADLINE if quick else known)]
    with tempfile.TemporaryDirectory(prefix="tttc-benchmark-") as cache:
        os.environ["TTTC_CACHE_DIR"] = cache
        from tttc.backends.tvm_common.tir import imported_tvm

        imported_tvm()  # its two seconds are not those of the first row's kernels
        run_all(chosen, (False, True) if backward else (False,), effort, memory, report, path)
    console().print(table(report))
    print(CAPTION)
    _print_starts(report)
    if path is not None:
        picture(report, path.with_suffix(".png"))
        print(f"written: {path} and {path.with_suffix('.png').name}", file=sys.stderr)
    refused = [r["label"] for r in report["rows"] if "refused" in r]
    if refused:
        raise SystemExit(f"not timed, because results disagree: {', '.join(refused)}")


def _start_anew(report: dict[str, Any], path: Path) -> None:
    """Measure the first starts again, and say so in the report of a full run."""
    for label, what in track(STARTS, "first starts", console=Console(stderr=True)):
        report["start_seconds"][f"{label}, {what}"] = start_seconds(label, what)
    report["starts"] = {n: x for n, x in measure.about(_command()).items() if n in ("command", "date", "commit")}
    _write(report, path)
    _print_starts(report)


def _print_starts(report: dict[str, Any]) -> None:
    for name, seconds in report["start_seconds"].items():
        print(f"{name}: first result {seconds['fresh']} s after the imports; {seconds['cached']} s from the cache")


def _command() -> str:
    return " ".join(["python -m benchmarks.cpu", *sys.argv[1:]])


if __name__ == "__main__":
    typer.run(main)
