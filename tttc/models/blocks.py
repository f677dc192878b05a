"""Blocks of a transformer with windowed attention, some with a second MLP between attention and feed-forward.

    x += post(attention(pre(x)));   x += post'(prime(pre'(x)));   x += post''(ffn(pre''(x)))       the second in some

Every pre and post is an RMSNorm. What is between two norms is in the dtype of `compute`; x, the norms and the rotation
are in that of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tttc.models.window import rotated, window_attention, window_attention_twice

KeysValues = tuple[Tensor, Tensor]
"""Of consecutive tokens: keys, normed and not rotated, and values; [B, H, t, D] each."""


class Shape(NamedTuple):
    """What blocks are made of: sizes, and how they compute."""

    width: int
    heads: int
    ffn: int
    window: int
    eps: float
    compute: torch.dtype | None


class Linear(nn.Linear):
    """Without a bias, and in the dtype of what it is given."""

    def __init__(self, inputs: int, outputs: int, **made: Any) -> None:
        super().__init__(inputs, outputs, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.RMSNorm):
    """RMSNorm of the last axis in the dtype of its weight, and then in `handed_on`."""

    def __init__(self, width: int, eps: float, handed_on: torch.dtype | None, **made: Any) -> None:
        super().__init__(width, eps, **made)
        self.handed_on = handed_on

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.to(self.weight.dtype))
        return y if self.handed_on is None else y.to(self.handed_on)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x), of three matrices and nothing else."""

    def __init__(self, width: int, hidden: int, **made: Any) -> None:
        super().__init__()
        self.gate, self.up = Linear(width, hidden, **made), Linear(width, hidden, **made)
        self.down = Linear(hidden, width, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    """Attention to the last `window` tokens, with RMSNorm and rotation of queries and keys.

    In two steps, because keys and values of earlier tokens come from elsewhere: `keys_values` of new tokens, and
    `forward`, which reads all of them.
    """

    def __init__(self, shape: Shape, twice: bool, **made: Any) -> None:
        super().__init__()
        width, D = shape.width, shape.width // shape.heads
        self.heads, self.window = shape.heads, shape.window
        self.attend = window_attention_twice if twice else window_attention
        self.q, self.kv = Linear(width, width, **made), Linear(width, 2 * width, **made)
        self.q_norm, self.k_norm = (Norm(D, shape.eps, shape.compute, **made) for _ in range(2))
        self.out = Linear(width, width, **made)

    def keys_values(self, x: Tensor) -> KeysValues:
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.k_norm(k).transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    def forward(self, x: Tensor, seen: KeysValues, turns: Tensor) -> Tensor:
        """x: [B, t, width]; the last t of `seen` are its own; turns: [S, D / 2], of the positions of all of these."""
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k, v = seen
        own = turns[k.shape[2] - q.shape[2] : k.shape[2]] * q.shape[3] ** -0.5
        out = self.attend(rotated(q, own), rotated(k, turns[: k.shape[2]]), v, self.window)
        return self.out(out.transpose(1, 2).flatten(2))


class WindowBlock(nn.Module):
    """From and to x [B, t, width], with keys and values of the last `window` tokens handed in and on.

    `prime` is an MLP between attention and feed-forward, whose weights are meant to be fast. `twice`: the block can be
    differentiated twice, and mapped over.
    """

    def __init__(self, shape: Shape, prime: nn.Module | None = None, twice: bool = False, **made: Any) -> None:
        super().__init__()
        self.window = shape.window

        def pre() -> Norm:
            return Norm(shape.width, shape.eps, shape.compute, **made)

        def post() -> Norm:
            return Norm(shape.width, shape.eps, None, **made)

        self.attention_norm, self.attention_post = pre(), post()
        self.attention = Attention(shape, twice, **made)
        if prime is not None:
            self.prime_norm, self.prime_post = pre(), post()
        self.prime = prime
        self.ffn_norm, self.ffn_post = pre(), post()
        self.ffn = GatedMLP(shape.width, shape.ffn, **made)

    def forward(self, x: Tensor, past: KeysValues | None, turns: Tensor) -> tuple[Tensor, KeysValues]:
        """x: [B, t, width] after `past`; turns: [at least the tokens of both, D / 2]."""
        y = self.attention_norm(x)
        own = self.attention.keys_values(y)
        seen = own if past is None else joined([last(past, self.window - 1), own])
        x = self._mlps(x + self.attention_post(self.attention(y, seen, turns)))
        return x, owned(last(seen, self.window))

    def keys_values(self, x: Tensor) -> KeysValues:
        return self.attention.keys_values(self.attention_norm(x))

    def read(self, x: Tensor, parts: Sequence[KeysValues], turns: Tensor) -> Tensor:
        """The result for x [B, t, width]; `parts` are the keys and values of consecutive tokens, its own the last."""
        seen = last(joined(parts), self.window - 1 + x.shape[1])
        return self._mlps(x + self.attention_post(self.attention(self.attention_norm(x), seen, turns)))

    def _mlps(self, x: Tensor) -> Tensor:
        if self.prime is not None:
            x = x + self.prime_post(self.prime(self.prime_norm(x)))
        return x + self.ffn_post(self.ffn(self.ffn_norm(x)))


def joined(parts: Sequence[KeysValues]) -> KeysValues:
    """Of consecutive tokens, after one another."""
    k, v = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return k, v


def last(seen: KeysValues, count: int) -> KeysValues:
    """Those of the last tokens, that many at most."""
    k, v = (x[:, :, max(x.shape[2] - count, 0) :] for x in seen)
    return k, v


def owned(seen: KeysValues) -> KeysValues:
    """In memory that holds nothing else; these themselves where it is so."""
    k, v = seen
    return k.contiguous(), v.contiguous()
