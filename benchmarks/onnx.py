"""Layers in ONNX Runtime against the kernels of this compiler and the torch backend.

    python -m benchmarks.onnx                     # a few minutes on two cores
    python -m benchmarks.onnx TTTLinear --rounds 3

Forwards of B=1, T=2048, H=12, D=64, and a decode step, the last of 40 single tokens. Every number is gated: outputs and
final states of each contender, those of the 40 too, are compared with the torch backend in float64 before anything is
timed. Contenders run interleaved in one process, each after a warm call; ratios are taken round by round, and their
medians printed. All of them have as many threads as PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import tttc
from benchmarks import measure
from benchmarks.contenders import OURS, TORCH, check
from benchmarks.workloads import Case, Tensors, case, inputs, parts
from tttc.export import onnx
from tttc.ir.linear_recurrence import linear_recurrence
from tttc.runtime.layer import Layer

ONNX, SCAN = "ONNX Runtime", "ONNX Runtime, as a Scan"
DECODED = 40  # tokens before the decode step that is timed
VARIANTS = ("GatedDeltaNet", "TTTLinear", "TTTMLP")


@dataclass(frozen=True)
class Contender:
    """`given(x, begins)` is what a call is given, `run(given, state)` z and the state, `weights` those of a state."""

    given: Callable[[Tensors, bool], Any]
    run: Callable[[Any, Any], tuple[Any, Any]]
    weights: Callable[[Any], Mapping[str, Any]]


def of_layer(c: Case, layer: Layer) -> Contender:
    """A compiled layer."""

    def given(x: Tensors, begins: bool) -> dict[str, Any]:
        sequences, params, state = parts(c, {n: t.to(layer.dtype) for n, t in x.items()})
        tokens = {n: sequences[n] for n in c.declared.tokens}
        gates = {n: sequences[n] for n in c.declared.gates}
        first = {n: tokens.pop(n) for n in "qkv"}
        return {**first, "tokens": tokens, "gates": gates, "params": params} | ({"state": state} if begins else {})

    def run(given: dict[str, Any], state: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return layer(**given) if state is None else layer(**given, state=state)  # type: ignore[no-any-return]

    return Contender(given, run, dict)


def of_session(c: Case, session: onnx.Session) -> Contender:
    """An exported graph: NumPy arrays, as they lie."""

    def given(x: Tensors, begins: bool) -> dict[str, Any]:
        sequences, params, state = parts(c, x)
        named = sequences | params | ({f"past_{n}": w for n, w in state.items()} if begins else {})
        return {n: t.contiguous().numpy() for n, t in named.items()}

    def weights(state: Mapping[str, Any]) -> dict[str, Any]:
        return {n: state[f"past_{n}"] for n in c.declared.states}

    return Contender(given, session, weights)


def contenders(c: Case) -> dict[str, Contender]:
    """Our kernels, the torch backend, and the exported graph; of a rule that has an operator also the one without."""
    found = {n: of_layer(c, tttc.compile(c.variant, c.dims, backend=b)) for n, b in ((OURS, "tvm"), (TORCH, "torch"))}
    layer = tttc.compile(c.variant, c.dims, backend="torch")
    forms: dict[str, onnx.Linear] = {ONNX: "auto"}
    if linear_recurrence(layer.stages.program) is not None:
        forms[SCAN] = "scan"
    for name, form in forms.items():
        found[name] = of_session(c, onnx.Session(onnx.model(layer, form).SerializeToString()))
    return found


def results(one: Contender, x: Tensors, calls: int) -> tuple[Tensors, Any]:
    """z and the final weights of all tokens in so many calls, and the state."""
    found, state, length = [], None, x["q"].shape[1] // calls
    for i in range(calls):
        z, state = one.run(one.given(tokens(x, i * length, (i + 1) * length), not i), state)
        found.append(torch.as_tensor(z))
    final = {f"final {n}": torch.as_tensor(w) for n, w in one.weights(state).items()}
    return {"z": torch.cat(found, 1), **final}, state


def tokens(x: Tensors, begin: int, end: int) -> Tensors:
    """Some tokens of what has as many as q; all else as it is."""
    B, T, H = x["q"].shape[:3]
    return {n: t[:, begin:end] if t.shape[:3] == (B, T, H) else t for n, t in x.items()}


def measured(c: Case, calls: int, rounds: int) -> dict[str, Any]:
    """One row: a forward, or a decode step after as many calls of a token each."""
    x = {n: t.detach() for n, t in inputs(c, None if calls == 1 else calls).items()}
    exact = of_layer(c, tttc.compile(c.variant, c.dims, torch.float64, backend="torch"))
    wanted = results(exact, {n: t.double() for n, t in x.items()}, calls)[0]
    run: dict[str, Callable[[], Any]] = {}
    errors = {}
    for name, one in contenders(c).items():
        found, state = results(one, x, calls)
        errors |= check({name: lambda found=found: found}, wanted)  # type: ignore[misc]
        last = one.given(tokens(x, x["q"].shape[1] // calls * (calls - 1), x["q"].shape[1]), calls == 1)
        before = None if calls == 1 else state
        run[name] = lambda one=one, last=last, before=before: one.run(last, before)  # type: ignore[misc]
    seconds = measure.interleaved(run, rounds)
    return {
        "label": c.label,
        "what": f"forward of {c.T} tokens" if calls == 1 else "decode step",
        "errors": {n: float(f"{e:.1e}") for n, e in errors.items()},
        "seconds": {n: measure.summary(s) for n, s in seconds.items()},
        "times_tttc": {n: measure.ratios(s, seconds[OURS]) for n, s in seconds.items() if n != OURS},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds, and how many times those of our kernels."""
    shown = Table(title=f"B=1, H=12, D=64, float32, {torch.get_num_threads()} threads; milliseconds (times tttc)")
    for column in ("", "", OURS, TORCH, ONNX, SCAN):
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        cells = []
        for name in (OURS, TORCH, ONNX, SCAN):
            found, ratio = row["seconds"].get(name), row["times_tttc"].get(name)
            text = "–" if found is None else f"{1e3 * found['median']:.3g}"
            cells.append(text if ratio is None else f"{text} ({ratio['median']:.3g})")
        shown.add_row(row["label"], row["what"], *cells)
    return shown


def main(
    variants: list[str] = typer.Argument(None, help="Which to measure; GatedDeltaNet, TTTLinear and TTTMLP."),
    rounds: int = typer.Option(9, min=3),
    out: Path = typer.Option(None, help="Where the JSON goes; by default only that of all of them."),
    length: int = typer.Option(2048, "--tokens", help="Tokens of a forward."),
) -> None:
    """Measure, print a table, and write benchmarks/results/onnx_<machine>_<n>threads.json."""
    chosen = [case(v, getattr(tttc.library, v), T=length) for v in variants or VARIANTS]
    rows = []
    for c in chosen:
        for calls in (1, DECODED):
            rows.append(measured(c, calls, rounds if calls == 1 else 20 * rounds))
            print(f"{c.label}, {rows[-1]['what']}", file=sys.stderr)
    Console().print(table(rows))
    full = not variants and length == 2048
    path = out or (measure.results_file("onnx", ".json") if full else None)
    if path is not None:
        command = " ".join(["python -m benchmarks.onnx", *sys.argv[1:]])
        path.write_text(json.dumps({**measure.about(command), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
