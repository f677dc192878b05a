"""What exported files have in common, as they have it: `tttc/export/python.py` copies these functions into them.

A file is read and run by itself. Nothing here imports `tttc`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch


def flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, H, ...] -> [B * H, T, ...]"""
    return x.transpose(1, 2).flatten(0, 1).to(dtype)


def spread(x: torch.Tensor, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """[H, ...] -> [B * H, ...]"""
    return x.to(dtype).expand(batch, *x.shape).flatten(0, 1)


def windows(x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last K tokens of each, [G, T, K, ...], and the K - 1 that come before the next one."""
    K, T = before.shape[1] + 1, x.shape[1]
    joined = torch.cat([before, x], 1)
    return torch.stack([joined[:, i : i + T] for i in range(K)], 2), joined[:, T:]


def exact(function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """What a function gives where autocast would take its products to 16 bits: without it."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(*tensors)


class Loop(NamedTuple):
    """A loop over chunks of tokens. Its inputs are what is carried from chunk to chunk, what stays, and sequences."""

    name: str
    step: Callable[..., Any]  # (*carry, *fixed, *tokens) -> (z, *carry)
    adjoint: Callable[..., Any]  # (the same, dz, *d_carry) -> the cotangents of the same
    carried: int
    fixed: int
    sequences: int
    width: tuple[int, ...]  # of z: [G, T, *width]
    kernels: Any = None  # the same in float32, for GPUs

    def parts(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
        """Inputs as carry, what stays, and sequences."""
        stays = self.carried + self.fixed
        return inputs[: self.carried], inputs[self.carried : stays], inputs[stays:]


def chunks(sequences: Sequence[torch.Tensor], length: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tokens of one chunk after the other."""
    return zip(*(x.split(length, 1) for x in sequences), strict=True)


def forward(
    loop: Loop, inputs: Sequence[torch.Tensor], chunk: int, every: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """z and the new carry; and the carry before each `every`-th chunk, which the backward starts from."""
    if loop.kernels and loop.kernels.take(inputs, chunk):
        return loop.kernels.run(loop, inputs, every)
    carry, fixed, sequences = loop.parts(inputs)
    found: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    with torch.autocast(inputs[0].device.type, enabled=False):
        for i, tokens in enumerate(chunks(sequences, chunk)):
            if i % every == 0:
                kept += carry
            z, *carry = loop.step(*carry, *fixed, *tokens)
            found.append(z)
    return [torch.cat(found, 1), *carry], kept


def backward(
    loop: Loop,
    inputs: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    chunk: int,
    every: int,
    cotangents: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The cotangents of the inputs, from the last chunk to the first."""
    if loop.kernels and loop.kernels.take(inputs, chunk):
        return loop.kernels.pull(loop, inputs, kept, every, cotangents)
    _, fixed, sequences = loop.parts(inputs)
    dz, *d_carry = cotangents
    d_fixed: list[Any] = [torch.zeros_like(x) for x in fixed]
    found = []
    with torch.autocast(inputs[0].device.type, enabled=False):
        pieces = list(chunks([*sequences, dz], chunk))
        for first in reversed(range(0, len(pieces), every)):
            group = pieces[first : first + every]
            carries = [kept[first // every * loop.carried :][: loop.carried]]
            for *tokens, _ in group[:-1]:
                carries.append(loop.step(*carries[-1], *fixed, *tokens)[1:])
            for carry, (*tokens, dz_c) in zip(reversed(carries), reversed(group), strict=True):
                made = loop.adjoint(*carry, *fixed, *tokens, dz_c, *d_carry)
                d_carry, parts, d_tokens = map(list, loop.parts(made))
                d_fixed = [x + y for x, y in zip(d_fixed, parts, strict=True)]
                found.append(d_tokens)
    return [*d_carry, *d_fixed, *(torch.cat(x[::-1], 1) for x in zip(*found, strict=True))]


class Derived(torch.autograd.Function):
    """A loop with the backward that was derived for it."""

    @staticmethod
    def forward(ctx: Any, loop: Loop, chunk: int, every: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results, kept = forward(loop, inputs, chunk, every)
        ctx.settings = loop, chunk, every
        ctx.count = len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        loop, chunk, every = ctx.settings
        inputs, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if torch.is_grad_enabled():  # a second derivative will follow, for which what was kept has no history
            _, kept = forward(loop, inputs, chunk, every)
        return None, None, None, *backward(loop, inputs, kept, chunk, every, cotangents)


def register(loop: Loop) -> None:
    """The loop as an operator, which torch.compile and torch.export take whole: (*inputs, chunk, every) -> results."""
    if hasattr(torch.ops.tttc_layers, loop.name):  # this file was loaded before
        return
    inputs = loop.carried + loop.fixed + loop.sequences
    given = ", ".join(f"Tensor x{i}" for i in range(inputs))
    cotangents = ", ".join(f"Tensor d{i}" for i in range(1 + loop.carried))
    results, gradients = (", ".join(["Tensor"] * n) for n in (1 + loop.carried, inputs))
    name, settings = f"tttc_layers::{loop.name}", "SymInt chunk, SymInt every"

    @torch.library.custom_op(name, mutates_args=(), schema=f"({given}, {settings}) -> ({results})")
    def scan(*arguments: Any) -> Any:
        *tensors, chunk, every = arguments
        return own(forward(loop, tensors, chunk, every)[0])

    @torch.library.custom_op(
        f"{name}_backward", mutates_args=(), schema=f"({given}, {cotangents}, {settings}) -> ({gradients})"
    )
    def pull(*arguments: Any) -> Any:
        *tensors, chunk, every = arguments
        _, kept = forward(loop, tensors[:inputs], chunk, every)
        return own(backward(loop, tensors[:inputs], kept, chunk, every, tensors[inputs:]))

    @scan.register_fake
    def _(*arguments: Any) -> Any:
        carry, _, sequences = loop.parts(arguments[:inputs])
        z = sequences[0].new_empty(*sequences[0].shape[:2], *loop.width)
        return (z, *(x.new_empty(x.shape) for x in carry))

    @pull.register_fake
    def _(*arguments: Any) -> Any:
        return tuple(x.new_empty(x.shape) for x in arguments[:inputs])

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.chunk, ctx.every = inputs
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        return *pull(*ctx.saved_tensors, *cotangents, ctx.chunk, ctx.every), None, None

    scan.register_autograd(differentiate, setup_context=remember)


def own(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each in memory of its own, as an operator returns them."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def run(
    loop: Loop, carry: Any, fixed: Any, tokens: Any, chunk: int, every: int, operators: bool
) -> tuple[torch.Tensor, ...]:
    """z of these tokens, and the new carry."""
    inputs = *carry, *fixed, *tokens
    if operators or torch.compiler.is_compiling():
        return tuple(getattr(torch.ops.tttc_layers, loop.name)(*inputs, chunk, every))
    return Derived.apply(loop, chunk, every, *inputs)


def gradients(of: Callable[..., torch.Tensor], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a sum of losses at these weights, by torch.autograd, themselves differentiable."""
    with torch.enable_grad():
        at = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
        found = torch.autograd.grad(of(*at).sum(), at, create_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(at, found, strict=True))


def compare(
    layer: Any,
    truth: Callable[..., tuple[torch.Tensor, ...]],
    given: Sequence[torch.Tensor],
    names: Sequence[str],
    cuts: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> bool:
    """What the layer makes of these tokens, in one call, in several and by its operators, against the definition."""
    wanted = expected(layer, truth, given)
    seeds = [torch.randn_like(x) for x in wanted]
    weights = list(layer.parameters())
    wanted += torch.autograd.grad(wanted, [*given, *weights], seeds, allow_unused=True)
    least = 1e-3 * max(float(torch.linalg.vector_norm(y.detach())) for y in wanted if y is not None)
    copy = deepcopy(layer).to(device, dtype)
    tokens = [x.detach().to(device, dtype).requires_grad_() for x in given]
    ends = [0, given[0].shape[1]]
    right = True
    for title, places, copy.operators in (
        ("one call", ends, False),
        ("operators", ends, True),
        (f"{len(cuts) + 1} calls", [0, *cuts, ends[1]], False),
    ):
        found: list[torch.Tensor] = []
        state: Any = None
        for now, stop in pairwise(places):
            z, state = copy(*(x[:, now:stop] for x in tokens), state=state)
            found.append(z)
        made = (torch.cat(found, 1), *state[: len(seeds) - 1])
        pulled = torch.autograd.grad(
            made, [*tokens, *copy.parameters()], [x.to(y) for x, y in zip(seeds, made, strict=True)], allow_unused=True
        )
        errors = [relative(x, y, least) for x, y in zip((*made, *pulled), wanted, strict=True)]
        said = [f"{n} {e:.0e}" for n, e in zip(names, errors, strict=True)]
        print(f"{title}: {', '.join(said)}")
        right &= max(errors) <= (1e-9 if dtype == torch.float64 else 1e-3)
    return right


def expected(
    layer: Any, truth: Callable[..., tuple[torch.Tensor, ...]], given: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """z and the weights after these tokens, by the definition."""
    B, H = given[0].shape[0], layer.num_heads
    weights = (spread(w, B, w.dtype) for w in layer.parameters())
    z, *after = (x.unflatten(0, (B, H)) for x in truth(*(flat(x, x.dtype) for x in given), *weights))
    return z.transpose(1, 2), *after


def relative(x: torch.Tensor | None, y: torch.Tensor | None, least: float) -> float:
    """How far x is from y, relative to y, or to `least` where y is smaller; what is not there is zero."""
    x, y = (torch.zeros(()) if t is None else t.detach().double().cpu() for t in (x, y))
    if x.shape != y.shape and x.dim() and y.dim():
        return math.inf
    error = torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp_min(least)
    return float(error) if math.isfinite(error) else math.inf
