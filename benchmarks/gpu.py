"""The Triton kernels on a GPU, against fla, FlashAttention, the torch backend compiled, and the device itself.

    python -m benchmarks.gpu                       # forward, forward+backward and decode: some minutes on one GPU
    python -m benchmarks.gpu TTTLinear --tokens 8192 --tokens 131072
    TRITON_INTERPRET=1 python -m benchmarks.gpu --smoke   # tiny, on a CPU: that everything runs, and no number

Every contender is compared with the torch backend in float64 on a short sequence before it is timed; who is too far off
gets no number. fla's TTT is another function (it normalises its own output, and its rate weighs rows): it is timed
beside ours for its cost and marked, and so is attention. Times are medians of interleaved rounds, by CUDA events;
bandwidth counts tokens, gates and outputs once, FLOPs the matrix products of benchmarks/flops.py. Both are also
given over what the device reaches in a copy and in a product of two large matrices, in the same run.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import tttc
from benchmarks.contenders import backward_step, forward_step
from benchmarks.flops import useful_flops
from benchmarks.measure import RESULTS, about
from benchmarks.workloads import Case, Tensors, call, case, inputs
from tttc import terminal
from tttc.backends import torch as torch_backend
from tttc.runtime.layer import Layer
from tttc.verification.comparison import relative_error

Forward = Callable[[Tensors], tuple[torch.Tensor, Tensors]]
OURS, COMPILED, ATTENTION = "tttc", "torch backend, compiled", "attention"
DTYPE = torch.bfloat16
GATE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}  # twice what the tests allow of outputs
SHORT = {"B": 1, "T": 197, "H": 2}  # what is compared
COPIED = 1 << 28  # bytes
MATRICES = 8192  # of the product that says what the device can do
COLUMNS = ("variant", "pass", "B", "T", "contender", "ms", "ours is faster by", "of copy", "of matmul")


@dataclass(frozen=True)
class Contender:
    """Who runs; `same` says that it is the same function, so that its results are compared."""

    forward: Forward
    same: bool = True


def cases(names: list[str], tokens: list[int]) -> list[Case]:
    """Those of a name at each length, with the batch that keeps the number of tokens."""
    found = []
    for name in names:
        for T in tokens:
            found.append(case(name, getattr(tttc.library, name), True, B=max(1, 16384 // T), T=T, H=32))
    return found


# -- contenders --------------------------------------------------------------------------------------------------------


def contenders(c: Case, device: torch.device) -> dict[str, Contender]:
    """Ours first."""
    found = {OURS: Contender(_layer(c, device))}
    batched = tttc.compile(c.variant, c.dims, DTYPE, device, "torch")
    program = batched.stages.program
    if device.type == "cuda":
        batched._scans = torch_backend.load_scans(torch_backend.emit_source(program), program, steps=torch.compile)
    found[COMPILED] = Contender(lambda x: call(batched, c, x))
    found |= {f"fla {name}": made for name, made in _fla(c).items()} if find_spec("fla") else {}
    if c.T <= 32768:
        found[ATTENTION] = Contender(_attention, same=False)
    return found


def _layer(c: Case, device: torch.device) -> Forward:
    layer = tttc.compile(c.variant, c.dims, DTYPE, device, "triton")
    return lambda x: call(layer, c, x)


def _attention(x: Tensors) -> tuple[torch.Tensor, Tensors]:
    """What a layer of this width would be without a state."""
    q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "v"))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), {}


def _fla(c: Case) -> dict[str, Contender]:
    """fla's kernels of the same rule; its decays are logarithms, its default scale is another."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla
    from fla.ops.ttt import chunk_ttt_linear, fused_chunk_ttt_linear

    def rule(kernel: Callable[..., Any], **named: Callable[[Tensors], torch.Tensor]) -> Forward:
        def forward(x: Tensors) -> tuple[torch.Tensor, Tensors]:
            given = {n: make(x) for n, make in named.items()}
            z, final = kernel(x["q"], x["k"], x["v"], **given, scale=1.0, initial_state=x["W"], output_final_state=True)
            return z, {"W": final}

        return forward

    def ttt(kernel: Callable[..., Any]) -> Contender:
        def forward(x: Tensors) -> tuple[torch.Tensor, Tensors]:
            norms = {"w": x["gamma"], "b": x["beta"]}
            begun = {"initial_state": x["W1"], "initial_state_bias": x["b1"].unsqueeze(2)}
            z, *_ = kernel(x["q"], x["k"], x["v"], **norms, eta=x["lr"].unsqueeze(-1).to(DTYPE), scale=1.0, **begun)
            return z, {}

        return Contender(forward, same=False)

    def lr(x: Tensors) -> torch.Tensor:
        return x["lr"].to(DTYPE)

    def decay(x: Tensors) -> torch.Tensor:
        return x["decay"].log()

    match c.name:
        case "DeltaNet":
            return {"chunk": Contender(rule(chunk_delta_rule, beta=lr))}
        case "GatedDeltaNet":
            return {"chunk": Contender(rule(chunk_gated_delta_rule, g=decay, beta=lr))}
        case "LinearAttention":
            return {"chunk": Contender(rule(chunk_simple_gla))}
        case "TTTLinear":
            return {"chunk": ttt(chunk_ttt_linear), "fused": ttt(fused_chunk_ttt_linear)}
    return {}


# -- results -----------------------------------------------------------------------------------------------------------


def drawn(c: Case, device: torch.device) -> Tensors:
    """Inputs on the device, tokens in `DTYPE`."""
    tokens = c.declared.tokens
    made = {n: x.detach().to(device, DTYPE if n in tokens else torch.float32) for n, x in inputs(c).items()}
    return {n: x.requires_grad_() for n, x in made.items()}


def wrong(c: Case, who: Contender, device: torch.device) -> str:
    """What is too far from the definition on a short sequence; "" where nothing is."""
    short = replace(c, **SHORT)
    x = drawn(short, device)
    exact = {n: t.detach().double().requires_grad_() for n, t in x.items()}
    truth = tttc.compile(c.variant, c.dims, torch.float64, device, "torch")
    wanted, final = call(truth, short, exact)
    z, found = who.forward(x)
    pairs = {"z": (z, wanted), **{n: (found[n], w) for n, w in final.items() if n in found}}
    cotangent = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(device)
    names = [n for n in x if n in ("q", "k", "v")]
    g = torch.autograd.grad(z, [x[n] for n in names], cotangent.to(z.dtype))
    w = torch.autograd.grad(wanted, [exact[n] for n in names], cotangent.double())
    pairs |= {f"gradient {n}": (a, b) for n, a, b in zip(names, g, w, strict=True)}
    errors = {n: relative_error(a.double(), b) for n, (a, b) in pairs.items()}
    bad = [f"{n} is off by {e:.1e}" for n, e in errors.items() if not e <= GATE[DTYPE]]
    return f"{', '.join(bad)}; {GATE[DTYPE]:.0e} is allowed" if bad else ""


def seconds(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Of each, one after the other in every round, after two calls that are not timed."""
    found: dict[str, list[float]] = {n: [] for n in runs}
    for run in runs.values():
        run(), run()
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            found[name].append(begin.elapsed_time(end) / 1e3)
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOPs a second of a product."""
    a, b = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    x, y = (torch.randn(MATRICES, MATRICES, device=device, dtype=DTYPE) for _ in range(2))
    found = seconds({"copy": lambda: b.copy_(a), "matmul": lambda: x @ y}, 20, device)
    least = {n: statistics.median(s) for n, s in found.items()}
    return {"copy": 2 * COPIED / least["copy"], "matmul": 2 * MATRICES**3 / least["matmul"]}


def measured(c: Case, backward: bool, rounds: int, device: torch.device, limits: dict[str, float]) -> dict[str, Any]:
    """One row: who is right, then medians."""
    who = contenders(c, device)
    failed = {n: said for n, w in who.items() if w.same and (said := wrong(c, w, device))}
    x = drawn(c, device)
    make = backward_step if backward else forward_step
    runs = {n: make(w.forward, x) for n, w in who.items() if n not in failed}
    times = {n: statistics.median(s) for n, s in seconds(runs, rounds, device).items()}
    row: dict[str, Any] = {"variant": c.label, "pass": "forward+backward" if backward else "forward", **c.sizes()}
    row |= {"seconds": times, "wrong": failed, "another function": [n for n, w in who.items() if not w.same]}
    if OURS in times:
        layer: Layer = tttc.compile(c.variant, c.dims, DTYPE, device, "torch")
        flops = useful_flops(layer, c.B, c.H, c.T, backward=backward)
        moved = sum(t.numel() * t.element_size() for n, t in x.items() if t.shape[1:2] == (c.T,)) + 2 * x["v"].numel()
        row["of copy"] = moved * (3 if backward else 1) / times[OURS] / limits["copy"]
        row["of matmul"] = None if flops is None else flops / times[OURS] / limits["matmul"]
    return row


def decoded(c: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Microseconds of one token, the state carried from call to call."""
    one = replace(c, B=1, T=1)
    layer = tttc.compile(c.variant, c.dims, DTYPE, device, "triton", decode="sums")
    x = {n: t.detach() for n, t in drawn(one, device).items()}
    gates = {n: x[n] for n in c.declared.gates}
    params = {n: x[n] for n in c.declared.params}
    state: Any = {n: x[n] for n in c.declared.states}

    def step() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = layer(x["q"], x["k"], x["v"], gates=gates, params=params, state=state)

    times = statistics.median(seconds({OURS: step}, 8 * rounds, device)[OURS])
    return {"variant": c.label, "pass": "decode", **one.sizes(), "seconds": {OURS: times}, "wrong": {}}


def cells(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """One contender of a row as text."""
    ours, mine = row["seconds"].get(OURS), row["seconds"][name]
    faster = "" if name == OURS or ours is None else f"{mine / ours:.2f}"
    marked = f"{name} (another function)" if name in row.get("another function", ()) else name
    shares = [row.get(n) if name == OURS else None for n in ("of copy", "of matmul")]
    head = (row["variant"], row["pass"], str(row["B"]), str(row["T"]), marked, f"{1e3 * mine:.3f}", faster)
    return (*head, *("" if s is None else f"{s:.2f}" for s in shares))


def main(
    variants: Annotated[list[str] | None, typer.Argument(help="Which to run.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths; 16,384 tokens in all where they fit.")] = None,
    rounds: Annotated[int, typer.Option(help="Of which the median is taken.")] = 21,
    smoke: Annotated[bool, typer.Option(help="Tiny, on this CPU: compare, and time nothing.")] = False,
) -> None:
    """Measure, print a table, and write benchmarks/results/gpu_<device>.json."""
    names = variants or ["TTTLinear", "TTTMLP", "LinearAttention", "DeltaNet", "GatedDeltaNet"]
    if smoke:
        _smoke(names)
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU that torch can use; --smoke runs it without one")
    device = torch.device("cuda")
    limits = ceilings(device)
    report = {**about("python -m benchmarks.gpu"), "device": torch.cuda.get_device_name(), "ceilings": limits}
    rows = []
    todo = cases(names, tokens or [2048, 4096, 8192, 32768, 131072])
    for c in track(todo, "measuring", console=terminal.console(stderr=True)):
        rows += [measured(c, backward, rounds, device, limits) for backward in (False, True)]
    rows += [decoded(c, rounds, device) for c in cases(names, [2048])]
    made = terminal.table(*COLUMNS, numbers=COLUMNS[5:])
    for row in rows:
        for name in row["seconds"]:
            made.add_row(*cells(row, name))
        for name, said in row["wrong"].items():
            terminal.console(stderr=True).print(f"{row['variant']}, {name}: {said}; nothing is timed")
    terminal.console().print(made)
    slug = re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
    path = RESULTS / f"gpu_{slug}.json"
    path.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    terminal.console(stderr=True).print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    if any(row["wrong"] for row in rows):
        raise typer.Exit(1)


def _smoke(names: list[str]) -> None:
    """Every contender that a CPU can run against the definition."""
    device = torch.device("cpu")
    for c in cases(names, [64]):
        small = replace(c, dims=dict.fromkeys(c.dims, 16), H=2, B=1)
        for name, who in contenders(small, device).items():
            said = wrong(small, who, device) if who.same else "another function"
            print(f"{c.name}, {name}: {said or 'agrees'}")


if __name__ == "__main__":
    typer.run(main)
