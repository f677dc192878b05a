"""All chunks of a sequence, and the gradient of what they lose with respect to everything that the network began with.

    L_i, caches = loss of chunk i at W_i          its tokens read W_i, which has seen the chunks before
    W_{i+1}     = step(W_i, d L_i / d W_i)        none after the last chunk: nothing reads it
    outer loss  = mean of L_i

`by_graph` is the definition: autograd records every inner step. `by_sweep` computes the same gradient in the memory of
one chunk. It keeps the fast weights and caches that chunks began with, or every `keep`-th of them, and goes backwards:
each chunk and its step are recorded once more, alone, and the cotangents of what the chunk handed on are pulled through
them, which is reverse mode over the reverse mode of the inner gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from tttc.networks.chunk_loss import ChunkLoss, Tensors, TokenChunk
from tttc.networks.inner_update import FastWeights, InnerUpdate


@dataclass(frozen=True)
class Learning:
    """What learns, how, and by which rates: `rate` scales all, `learned` are those of the outer loop."""

    loss: ChunkLoss
    update: InnerUpdate | None
    slow: Tensors
    rate: Any
    learned: Tensors

    @property
    def rates(self) -> Tensors:
        """The rates that are tensors."""
        return {**self.learned, **({"rate": self.rate} if isinstance(self.rate, Tensor) else {})}

    def run(self, fast: FastWeights, caches: Any, chunk: TokenChunk) -> tuple[Tensor, Tensor, Any]:
        return self.loss(fast.weights, self.slow, chunk, caches)

    def stepped(self, fast: FastWeights, loss: Tensor, recorded: bool) -> FastWeights:
        """After the step that the loss [B] of a chunk asks for; `recorded`: differentiable in turn."""
        if self.update is None:
            return fast
        weights = fast.weights
        found = torch.autograd.grad(
            loss.sum(), list(weights.values()), create_graph=recorded, allow_unused=True, materialize_grads=True
        )
        gradient = dict(zip(weights, found, strict=True))
        with _without_autocast(loss.device), nullcontext() if recorded else torch.no_grad():
            return self.update.step(fast, gradient, self.rate, self.learned)

    def advanced(
        self, fast: FastWeights, caches: Any, chunk: TokenChunk, last: bool
    ) -> tuple[Tensor, Tensor, Any, Any]:
        """One chunk with nothing recorded beyond it: its losses, and what it hands on."""
        if last or self.update is None:
            with torch.no_grad():
                loss, each, after = self.run(fast, caches, chunk)
            return loss, each, fast, after
        with torch.enable_grad():
            leaves = {n: w.detach().requires_grad_() for n, w in fast.weights.items()}
            own = FastWeights(leaves, fast.momentum, fast.accumulated, fast.begun)
            loss, each, after = self.run(own, caches, chunk)
            fast = self.stepped(own, loss, recorded=False)
        detached = _map_tensors(Tensor.detach, (fast, after))
        return loss.detach(), each.detach(), *detached


def chunks(hidden: Tensor, targets: Tensor, counts: Tensor, size: int) -> list[TokenChunk]:
    """[B, T, ...] cut into chunks of `size` tokens; the last may have fewer."""
    return [TokenChunk(*x) for x in zip(*(x.split(size, 1) for x in (hidden, targets, counts)), strict=True)]


def by_graph(learning: Learning, fast: FastWeights, parts: Sequence[TokenChunk]) -> tuple[Tensor, Tensor]:
    """The loss of each chunk, [B, n], and of each token, [B, T], recorded by autograd as far as anything is."""
    losses, tokens, caches = [], [], None
    recorded = torch.is_grad_enabled()
    for i, chunk in enumerate(parts):
        if recorded:
            loss, each, caches = learning.run(fast, caches, chunk)
            fast = fast if i == len(parts) - 1 else learning.stepped(fast, loss, recorded=True)
        else:
            loss, each, fast, caches = learning.advanced(fast, caches, chunk, i == len(parts) - 1)
        losses.append(loss)
        tokens.append(each)
    return torch.stack(losses, 1), torch.cat(tokens, 1)


def by_sweep(
    learning: Learning, fast: FastWeights, parts: Sequence[TokenChunk], hidden: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """The same, with a backward that keeps one chunk's graph at a time. `parts` are the chunks of `hidden`."""
    leaves, form = tree_flatten((fast, learning.slow, learning.rates, hidden))
    return Sweep.apply(learning, parts, keep, form, *leaves)


class Sweep(torch.autograd.Function):
    """Everything a sequence begins with -> the losses of its chunks and tokens."""

    @staticmethod
    def forward(
        ctx: Any, learning: Learning, parts: Sequence[TokenChunk], keep: int, form: TreeSpec, *leaves: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*leaves)
        ctx.learning, ctx.form, ctx.keep = learning, form, keep
        ctx.asked = [(p.targets, p.counts) for p in parts]
        ctx.surroundings, ctx.kept = _Surroundings(parts[0].hidden.device), []
        fast, slow, rates, hidden = tree_unflatten([x.detach() for x in leaves], form)
        own, caches = _with(learning, slow, rates), None
        losses, tokens = [], []
        for i, part in enumerate(_parts(hidden, ctx.asked)):
            if i % keep == 0:
                ctx.kept.append((fast, caches))
            ctx.surroundings.remember()
            loss, each, fast, caches = own.advanced(fast, caches, part, i == len(parts) - 1)
            losses.append(loss)
            tokens.append(each)
        return torch.stack(losses, 1), torch.cat(tokens, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor, of_tokens: Tensor) -> tuple[Any, ...]:
        _, slow, rates, hidden = tree_unflatten(ctx.saved_tensors, ctx.form)
        _, of_slow, of_rates, asked = tree_unflatten(ctx.needs_input_grad[4:], ctx.form)
        slow, rates = tree_map(_leaf, (slow, rates), (of_slow, of_rates))
        shared = [*slow.values(), *rates.values()]
        of_shared: list[Tensor | None] = [None for _ in shared]
        of_hidden, end = torch.zeros_like(hidden), hidden.shape[1]
        learning, parts = _with(ctx.learning, slow, rates), _parts(hidden, ctx.asked)
        handed_on: list[Tensor | None] | None = None  # the cotangents of what the chunk hands on
        for i, (fast, caches) in _backwards(learning, ctx.kept, ctx.keep, parts, ctx.surroundings):
            begin = end - parts[i].hidden.shape[1]
            start = (*_map_tensors(_leaf, (fast, caches)), _leaf(parts[i].hidden, asked))
            with ctx.surroundings.of(i):
                results = _recorded(learning, start, parts[i], last=handed_on is None)
            seeds = [of_losses[:, i], of_tokens[:, begin:end], *(handed_on or ())]
            with _without_autocast(hidden.device):
                found = _pulled(results, seeds, [*_numbers(start), *shared])
            del results
            *handed_on, of_part = found[: len(found) - len(shared)]
            if of_part is not None:
                of_hidden[:, begin:end] = of_part
            of_shared = [_sum(a, b) for a, b in zip(of_shared, found[len(found) - len(shared) :], strict=True)]
            end = begin
        return None, None, None, None, *(handed_on or ()), *of_shared, of_hidden


def _recorded(learning: Learning, start: tuple[FastWeights, Any, Tensor], part: TokenChunk, last: bool) -> list[Tensor]:
    """The losses of a chunk and, but for the last, the numbers that it hands on, recorded by autograd."""
    fast, caches, hidden = start
    with torch.enable_grad():
        loss, each, after = learning.run(fast, caches, part._replace(hidden=hidden))
        if last:
            return [loss, each]
        return [loss, each, *_numbers((learning.stepped(fast, loss, recorded=True), after))]


def _backwards(
    learning: Learning, kept: Sequence[Any], keep: int, parts: Sequence[TokenChunk], surroundings: _Surroundings
) -> Iterator[tuple[int, tuple[FastWeights, Any]]]:
    """The chunks from the last to the first with what each began with, computed again where it was not kept."""
    alone = _with(learning, *_map_tensors(Tensor.detach, (learning.slow, learning.rates)))
    for k in reversed(range(len(kept))):
        starts = [kept[k]]
        for i in range(keep * k, min(keep * (k + 1), len(parts)) - 1):
            with surroundings.of(i):
                fast, caches = starts[-1]
                starts.append(alone.advanced(fast, caches, parts[i], last=False)[2:])
        while starts:
            yield keep * k + len(starts) - 1, starts.pop()


def _parts(hidden: Tensor, asked: Sequence[tuple[Tensor, Tensor]]) -> list[TokenChunk]:
    """The chunks of hidden states [B, T, d], cut as their targets are."""
    pieces = hidden.detach().split([targets.shape[1] for targets, _ in asked], 1)
    return [TokenChunk(h, *rest) for h, rest in zip(pieces, asked, strict=True)]


def _with(learning: Learning, slow: Tensors, rates: Tensors) -> Learning:
    learned = {n: r for n, r in rates.items() if n != "rate"}
    return replace(learning, slow=slow, rate=rates.get("rate", learning.rate), learned=learned)


def _pulled(results: Sequence[Tensor], seeds: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The cotangents of `inputs` from those of `results`; None where there is none."""
    pairs = [(y, c) for y, c in zip(results, seeds, strict=True) if c is not None and y.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    asked = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, asked, cotangents, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _leaf(x: Tensor, asked: bool = True) -> Tensor:
    """The same numbers, to be differentiated for if that is asked; what has no derivative as it is."""
    return x.detach().requires_grad_(asked and x.is_floating_point())


def _numbers(tree: Any) -> list[Tensor]:
    """The tensors that have derivatives."""
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor) and x.is_floating_point()]


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a.add_(b)


class _Surroundings:
    """What a chunk finds around it that is no argument, found again when it is recorded in the backward: autocast, and
    for what is drawn, such as dropout, the state of the generators.
    """

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.device = device
        self.drawn: list[tuple[Tensor, ...]] = []
        self.casts = torch.amp.is_autocast_available(kind)
        self.cast = self.casts and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.cast else None

    def remember(self) -> None:
        """The generators, before the next chunk."""
        self.drawn.append(_generators(self.device))

    @contextmanager
    def of(self, i: int) -> Iterator[None]:
        """Around chunk i."""
        now = _generators(self.device)
        _set_generators(self.device, self.drawn[i])
        try:
            with torch.autocast(self.device.type, self.dtype, self.cast) if self.casts else nullcontext():
                yield
        finally:
            _set_generators(self.device, now)


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    own = () if device.type in ("cpu", "meta") else (torch.get_device_module(device).get_rng_state(device),)
    return torch.get_rng_state(), *own


def _set_generators(device: torch.device, states: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
