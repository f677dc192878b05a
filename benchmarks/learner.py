"""A learner in a network that learns, by every backend, against the same formula in eager PyTorch.

    python -m benchmarks.learner                  # a minute on two cores; native kernels are compiled first
    python -m benchmarks.learner --threads 1

SwiGLU with weights of each sequence under `torch.vmap`: its value, a gradient by the weights and x, and a gradient of
that one, which is what the meta-gradient of `tttc.nn.EndToEnd` takes. Results are compared before anything is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

import tttc
from benchmarks.measure import interleaved
from tttc.verification.comparison import relative_error

Tensors = dict[str, torch.Tensor]
Function = Callable[[Tensors, torch.Tensor], torch.Tensor]
SIZES = ({"B": 4, "T": 256, "D": 256, "F": 1024}, {"B": 16, "T": 32, "D": 64, "F": 128})
GATE = 1e-5  # float32, through two derivatives


class SwiGLU(tttc.Variant):
    W1, W3 = tttc.state("D", "F", init=tttc.normal(0.05)), tttc.state("D", "F", init=tttc.normal(0.05))
    W2 = tttc.state("F", "D", init=tttc.normal(0.05))

    def learner(self, x: torch.Tensor) -> torch.Tensor:
        return (tttc.silu(x @ self.W1) * (x @ self.W3)) @ self.W2


def eager(w: Tensors, x: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ w["W1"]) * (x @ w["W3"])) @ w["W2"]


def of_backend(backend: str, sizes: dict[str, int]) -> Function:
    module = tttc.nn.Learner(SwiGLU, {"D": sizes["D"], "F": sizes["F"]}, backend=backend)
    return lambda w, x: torch.func.functional_call(module, w, (x,))


class Steps:
    """What is timed of a function, on random sequences and their weights."""

    def __init__(self, sizes: dict[str, int]) -> None:
        torch.manual_seed(0)
        B, T, D, hidden = sizes.values()
        shapes = {"W1": (D, hidden), "W3": (D, hidden), "W2": (hidden, D)}
        self.weights = {n: (torch.randn(B, *s) * 0.05).requires_grad_() for n, s in shapes.items()}
        self.x = torch.randn(B, T, D, requires_grad=True)
        self.leaves = [self.x, *self.weights.values()]
        self.directions = [torch.randn_like(x) for x in self.leaves]

    @torch.no_grad()
    def forward(self, f: Function) -> list[torch.Tensor]:
        return [torch.vmap(f)(self.weights, self.x)]

    def gradient(self, f: Function, again: bool = False) -> list[torch.Tensor]:
        z = torch.vmap(f)(self.weights, self.x)
        return list(torch.autograd.grad((z * z).sum(), self.leaves, create_graph=again))

    def gradient_of_gradient(self, f: Function) -> list[torch.Tensor]:
        slopes = zip(self.gradient(f, again=True), self.directions, strict=True)
        return list(torch.autograd.grad(torch.stack([(g * u).sum() for g, u in slopes]).sum(), self.leaves))


def main(threads: int = typer.Option(0, help="0 leaves what torch takes"), rounds: int = 9) -> None:
    """Time a learner (float32) and print the medians in milliseconds."""
    if threads:
        torch.set_num_threads(threads)
    backends = ["auto", "torch", *(["tvm"] if find_spec("tvm") else [])]
    table = Table(title=f"SwiGLU, weights of each sequence, ms, {torch.get_num_threads()} threads")
    for column in ("sizes", "step", "eager", *backends):
        table.add_column(column)
    for sizes in SIZES:
        steps = Steps(sizes)
        functions = {"eager": eager, **{b: of_backend(b, sizes) for b in backends}}
        for step in (steps.forward, steps.gradient, steps.gradient_of_gradient):
            wanted = step(eager)
            for name, f in functions.items():
                if not max(map(relative_error, step(f), wanted)) <= GATE:
                    raise SystemExit(f"{name}: {step.__name__} is not that of eager PyTorch; nothing is timed")
            seconds = interleaved({n: lambda f=f, step=step: step(f) for n, f in functions.items()}, rounds)  # type: ignore[misc]
            shown = " ".join(f"{n}={size}" for n, size in sizes.items())
            table.add_row(shown, step.__name__, *(f"{statistics.median(s) * 1e3:.3g}" for s in seconds.values()))
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
