"""Who runs against whom in `benchmarks.cpu`, and whether their results agree.

tttc             tttc.compile(..., backend="tvm")
torch backend    the same program as PyTorch, the eager backend of the compiler
eager 16         the dual form written by hand in eager PyTorch, a Python loop over chunks of 16 (of the
                 mini-batch, where gradients are taken at its start)
eager 64         the same by 64 tokens, where the chunk is free
eager, no loop   the work of all chunks of 64 at once, where the mathematics allows it
torch.compile    torch.compile of the hand-written step, looped in Python; chunks as the fewest of the loops above
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

import tttc
from benchmarks.by_hand import FORMS, Form, run, run_whole
from benchmarks.workloads import Case, Tensors, call, inputs, parts
from tttc.runtime.layer import Layer
from tttc.verification.comparison import gradient_errors, relative_error

Forward = Callable[[Tensors], tuple[torch.Tensor, Tensors]]
Step = Callable[[], Tensors]

OURS, TORCH, COMPILED = "tttc", "torch backend", "torch.compile"
LARGER = 64  # tokens of the larger chunk, where it is free
OUTPUT, GRADIENT = 1e-4, 5e-4
"""How far outputs and final states, and gradients, may be from those of the torch backend in float64, relative in the
Frobenius norm; float32 through 128 mini-batches rounds at a hundredth of it. Two contenders then differ by twice that.
"""


class Disagreement(Exception):
    """A contender whose results are not those of the definition: nothing is timed."""


def by_hand(c: Case) -> dict[str, Forward]:
    """The hand-written forms of a variant, by the names of this file; none where there is none."""
    form = FORMS.get(c.name)
    if form is None:
        return {}
    found: dict[str, Forward] = {f"eager {_least(c, form)}": _looped(c, form, _least(c, form))}
    if form.chunk_free:
        found[f"eager {LARGER}"] = _looped(c, form, LARGER)
    if form.whole is not None:
        whole = form.whole
        found["eager, no loop"] = lambda x: run_whole(whole, *parts(c, x), LARGER)
    return found


def compiled_by_torch(c: Case) -> dict[str, Forward]:
    """torch.compile of the hand-written step; it compiles when first called."""
    form = FORMS.get(c.name)
    if form is None:
        return {}
    torch._dynamo.reset()
    step = torch.compile(form.step, dynamic=False, fullgraph=True)
    return {COMPILED: _looped(c, form._replace(step=step), LARGER if form.chunk_free else c.mini_batch)}


def _least(c: Case, form: Form) -> int:
    """The chunk that the hand-written form of a paper takes: its mini-batch, or 16."""
    return 16 if form.chunk_free else c.mini_batch


def _looped(c: Case, form: Form, chunk: int) -> Forward:
    return lambda x: run(form.step, *parts(c, x), chunk)


def ours(c: Case, backend: str = "tvm", dtype: torch.dtype = torch.float32) -> tuple[Layer, Forward]:
    """The compiled layer."""
    layer = tttc.compile(c.variant, c.dims, dtype, backend=backend)
    return layer, lambda x: call(layer, c, x)


def one(c: Case, name: str) -> Forward:
    """A contender by its name."""
    if name in (OURS, TORCH):
        return ours(c, "tvm" if name == OURS else "torch")[1]
    return by_hand(c)[name]


# -- a forward, or a forward and backward ------------------------------------------------------------------------------


def forward_step(forward: Forward, x: Tensors) -> Step:
    """z and the final states, with nothing kept for a backward."""

    def step() -> Tensors:
        with torch.no_grad():
            z, final = forward(x)
        return {"z": z, **{f"final {n}": w for n, w in final.items()}}

    return step


def backward_step(forward: Forward, x: Tensors) -> Step:
    """z, and the gradients of a random function of it by every input."""
    like = x["v"]
    cotangent = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like.dtype)

    def step() -> Tensors:
        z, _ = forward(x)
        found = torch.autograd.grad(z, list(x.values()), cotangent, materialize_grads=True)
        return {"z": z.detach(), **{f"gradient {n}": g for n, g in zip(x, found, strict=True)}}

    return step


def truth(c: Case, backward: bool) -> Tensors:
    """What the torch backend gives in float64."""
    _, forward = ours(c, "torch", torch.float64)
    x = {n: t.detach().double().requires_grad_() for n, t in inputs(c).items()}
    return (backward_step if backward else forward_step)(forward, x)()


def check(steps: Mapping[str, Step], wanted: Tensors) -> dict[str, float]:
    """The largest error of each contender; raises `Disagreement` for the first that is too far from the truth."""
    return {name: _largest_error(name, step, wanted) for name, step in steps.items()}


def _largest_error(name: str, step: Step, wanted: Tensors) -> float:
    found = {n: t.double() for n, t in step().items()}
    outputs = {n: relative_error(found[n], w) for n, w in wanted.items() if not n.startswith("gradient")}
    gradients = gradient_errors(
        {n: t for n, t in found.items() if n.startswith("gradient")},
        {n: t for n, t in wanted.items() if n.startswith("gradient")},
    )
    for errors, allowed in ((outputs, OUTPUT), (gradients, GRADIENT)):
        for tensor, error in errors.items():
            if not error <= allowed:
                raise Disagreement(
                    f"{name}: {tensor} is off by {error:.1e}, {allowed:.0e} is allowed; nothing is timed"
                )
    return max([*outputs.values(), *gradients.values()])
