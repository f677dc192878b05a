"""A task that only a memory of the whole sequence solves: each walks a random cycle of its own through all tokens.

    sequence A: 5 2 7 0 5 2 7 0 5 3 0 5 ...      after 5 comes 2, after 2 comes 7, but for a few jumps
    sequence B: 7 5 0 2 7 5 0 2 2 7 5 0 ...      another order

Which token follows which was last seen a whole round ago. A model that sees less than a round guesses, `uniform` nats
a token; one that has learned the cycle loses `floor()`, what the jumps cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

VOCABULARY = 64
NOISE = 0.1  # of the tokens are jumps to anywhere
UNIFORM = math.log(VOCABULARY)


def cycles(
    batch: int, length: int, generator: torch.Generator, vocabulary: int = VOCABULARY, noise: float = NOISE
) -> Tensor:
    """Sequences [batch, length] of int64, each along its own cycle.

    Example:
        cycles(2, 256, torch.Generator().manual_seed(0))     # tensor([[17, 40, 3, ...
    """
    order = torch.rand(batch, vocabulary, generator=generator).argsort(1)
    jumps = torch.rand(batch, length, generator=generator) < noise
    jumps[:, 0] = True
    landed = torch.randint(vocabulary, (batch, length), generator=generator)
    time = torch.arange(length).expand(batch, length)
    last = torch.where(jumps, time, 0).cummax(1).values
    return order.gather(1, (landed.gather(1, last) + time - last) % vocabulary)


def floor(vocabulary: int = VOCABULARY, noise: float = NOISE) -> float:
    """Nats a token of who knows the cycle: the entropy of where a token leads."""
    elsewhere = noise / vocabulary
    next_one = 1 - noise + elsewhere
    return -next_one * math.log(next_one) - (vocabulary - 1) * elsewhere * math.log(elsewhere)
