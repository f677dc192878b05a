"""A small network that learns at test time, twice: as modules for `tttc.nn.EndToEnd`, and as its definition, which
shares no code with it and keeps no caches: one sequence at a time, every key and value of the past at hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, PRIME = 7, 6, 5


class Prime(nn.Module):
    """The part that learns: two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.randn(WIDTH, PRIME) * 0.4)
        self.outward = nn.Parameter(torch.randn(PRIME, WIDTH) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.inward) @ self.outward


class Block(nn.Module):
    """Attention over the last `window` tokens, whose scores fall with distance, and a part that may learn."""

    def __init__(self, window: int, learns: bool) -> None:
        super().__init__()
        self.window = window
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.4) for _ in range(3))
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.prime = Prime() if learns else nn.Identity()

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        k, v = x @ self.k, x @ self.v
        if cache is not None:
            k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
        before = k.shape[1] - x.shape[1]
        distance = before + torch.arange(x.shape[1])[:, None] - torch.arange(k.shape[1])
        scores = x @ self.q @ k.mT - self.slope * distance
        seen = (distance >= 0) & (distance < self.window)
        x = x + torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v
        return x + self.prime(x), (k[:, -self.window :], v[:, -self.window :])


class Prefix(nn.Module):
    """An embedding and a block that does not learn."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.block = Block(window, learns=False)

    def forward(self, tokens: Tensor, caches: Any) -> tuple[Tensor, Any]:
        return self.block(F.embedding(tokens, self.table), caches)


class Suffix(nn.Module):
    """Two blocks that learn, and logits by the table of the prefix."""

    def __init__(self, window: int, table: nn.Parameter) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(window, learns=True) for _ in range(2))
        self.table = table

    def forward(self, h: Tensor, caches: Any) -> tuple[Tensor, Any]:
        made = {}
        for i, block in enumerate(self.blocks):
            h, made[str(i)] = block(h, None if caches is None else caches[str(i)])
        return h @ self.table.T, made


def modules(window: int) -> tuple[Prefix, Suffix]:
    """Both, drawn from seed 0 in float64."""
    torch.manual_seed(0)
    prefix = Prefix(window).double()
    return prefix, Suffix(window, prefix.table).double()


def definition(
    prefix: Prefix, suffix: Suffix, tokens: Tensor, chunk: int, rate: float, clip: float, momentum: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The outer loss of one sequence [T + 1] and the loss of each token [T], by autograd through every inner step."""
    past: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(3)]
    fast = [w for block in suffix.blocks for w in (block.prime.inward, block.prime.outward)]
    fast = fast[:2] if suffix.blocks[0] is suffix.blocks[1] else fast
    carried = [torch.zeros_like(w) for w in fast]
    losses, each = [], []
    inputs = list(F.embedding(tokens[:-1], prefix.table))
    for begin in range(0, len(inputs), chunk):
        now = range(begin, min(begin + chunk, len(inputs)))
        own = [
            token_loss([prefix.block, *suffix.blocks], fast, past, inputs[t], int(tokens[t + 1]), prefix.table)
            for t in now
        ]
        losses.append(sum(own) / len(own))
        each += own
        gradient = torch.autograd.grad(losses[-1], fast, create_graph=True)
        carried = [momentum * s + g for s, g in zip(carried, gradient, strict=True)]
        norm = sum((s * s).sum() for s in carried).sqrt()
        scale = torch.where(norm > clip, clip / norm, 1.0)
        fast = [w - rate * scale * s for w, s in zip(fast, carried, strict=True)]
        # to the next inner gradients they are numbers that no fast weight moves: those are new tensors
    return sum(losses) / len(losses), torch.stack(each)


def token_loss(
    blocks: list[Block], fast: list[Tensor], past: list[Any], x: Tensor, target: int, table: Tensor
) -> Tensor:
    """Of one token [WIDTH], which leaves its keys and values in `past`."""
    for i, block in enumerate(blocks):
        keys, values = past[i]
        keys.append(x @ block.k)
        values.append(x @ block.v)
        near = range(max(0, len(keys) - block.window), len(keys))
        scores = torch.stack([x @ block.q @ keys[j] - block.slope * (len(keys) - 1 - j) for j in near])
        x = x + sum(p * values[j] for p, j in zip(torch.softmax(scores, 0), near, strict=True))
        if i > 0:
            inward, outward = fast[-2:] if i == 2 else fast[:2]
            x = x + torch.tanh(x @ inward) @ outward
        else:
            x = x + x  # the block of the prefix has the identity there
    return -torch.log_softmax(x @ table.T, 0)[target]


class Twice(Suffix):
    """The same block at two places, under two names."""

    def __init__(self, window: int, table: nn.Parameter) -> None:
        super().__init__(window, table)
        self.blocks[1] = self.blocks[0]
