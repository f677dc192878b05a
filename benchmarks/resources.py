"""What the Triton kernels of every variant take of a GPU, which need not be there: registers, spilled bytes, memory.

    python -m benchmarks.resources                       # sm_80, sm_90 and gfx942: half an hour on two cores
    python -m benchmarks.resources --target sm_90 --variant TTTLinear
    python -m benchmarks.resources --markdown            # the table of docs/measured.md, from the last whole run

Each line is a variant with its default configuration, D = 64 (F = 256) and tokens in bfloat16: the forward and the
backward of whole mini-batches. Spilled are the bytes that a thread writes because its registers are full. Kernels
compile in processes of their own, one for each core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.progress import track

from benchmarks.measure import ROOT
from tttc import terminal
from tttc.backends import triton
from tttc.backends.target import GPUS
from tttc.backends.triton.aot import build
from tttc.backends.triton.kernel_spec import unfused
from tttc.cli.loading import library_variants
from tttc.compiler.driver import untuned
from tttc.declare.read import signature
from tttc.verification.comparison import default_dims

RESULTS = ROOT / "benchmarks" / "results" / "resources.json"
TARGETS = ("sm_80", "sm_90", "gfx942")
WIDER = {"TTTLinear": 128, "DeltaNet": 256}  # also measured at this width; the second is cut in strips
LIMIT = {t: GPUS[t].shared_of_program for t in TARGETS}  # bytes of shared memory that a program may have
COLUMNS = ("variant", "target", "pass", "registers", "spilled bytes", "shared bytes")


class Work(NamedTuple):
    """One line to be measured."""

    variant: str
    D: int
    target: str

    @property
    def label(self) -> str:
        return f"{self.variant} D={self.D}"


def works(variants: list[str], targets: list[str]) -> Iterator[Work]:
    for target in targets:
        for name in variants:
            yield Work(name, 64, target)
            if name in WIDER:
                yield Work(name, WIDER[name], target)


def measured(work: Work) -> list[dict[str, Any]]:
    """The rows of one variant for one target: a forward and a backward, or why there is no kernel."""
    os.environ.pop("TRITON_INTERPRET", None)
    variant = library_variants()[work.variant]
    program = untuned(variant, default_dims(signature(variant), work.D), triton)
    scan = program.scans[0]
    about = {"variant": work.label, "target": work.target}
    if reason := unfused(scan, program):
        return [{**about, "batched": reason}]
    rows = []
    for found, name in zip(build(program, work.target, torch.bfloat16, [scan]), ("forward", "backward"), strict=True):
        r = found.resources
        rows.append({**about, "pass": name, "registers": r.registers, "spilled": r.spilled, "shared": r.shared})
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text, one for each of `COLUMNS`."""
    if "batched" in row:
        return row["variant"], row["target"], f"batched: {row['batched']}", "–", "–", "–"
    return (row["variant"], row["target"], row["pass"], *(f"{row[n]:,}" for n in ("registers", "spilled", "shared")))


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each variant; for each target spilled bytes of the forward and of the backward."""
    found = {(r["variant"], r["target"], r.get("pass")): r for r in rows}
    lines = [
        f"| spilled bytes, forward / backward | {' | '.join(TARGETS)} |",
        "|---|" + "---:|" * len(TARGETS),
    ]
    for label in dict.fromkeys(r["variant"] for r in rows):
        pairs = [[found.get((label, t, p)) for p in ("forward", "backward")] for t in TARGETS]
        shown = [" / ".join(f"{r['spilled']:,}" for r in pair if r) or "batched" for pair in pairs]
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(
    variant: Annotated[list[str] | None, typer.Option(help="Only these variants.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only these targets.")] = None,
    show: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/measured.md and stop.")] = False,
) -> None:
    """Compile every kernel and print what it takes; a whole run is kept in benchmarks/results."""
    if show:
        print(markdown(json.loads(RESULTS.read_text())["rows"]))
        return
    todo = list(works(variant or list(library_variants()), target or list(TARGETS)))
    done: dict[Work, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = {pool.submit(measured, w): w for w in todo}
        shown = terminal.console(stderr=True)
        for future in track(as_completed(futures), "compiling", len(futures), console=shown):
            done[futures[future]] = future.result()
    rows = [row for w in todo for row in done[w]]
    made = terminal.table(*COLUMNS, numbers=COLUMNS[3:])
    for row in rows:
        made.add_row(*cells(row))
    terminal.console().print(made)
    too_large = [r for r in rows if r.get("shared", 0) > LIMIT.get(r["target"], 1 << 30)]
    for row in too_large:
        terminal.console(stderr=True).print(f"{row['variant']} on {row['target']}: more memory than a program may have")
    if not variant and not target:
        report = {"triton": version("triton"), "torch": torch.__version__, "dtype": "bfloat16", "rows": rows}
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if too_large:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
