"""Attention to the last `window` tokens, in time and memory of tokens times window, and the rotation by position.

In two forms. `window_attention` is differentiated once, and is PyTorch's own kernel on one piece of the band after the
other. `window_attention_twice` can be differentiated twice and mapped over by `torch.vmap`: its derivatives are written
down below, and each makes the probabilities p again, piece by piece, so that nothing but q, k and v is kept.

    o   = p v,   p = softmax(q k^T)                                     q scaled, and the band masked
    dv  = p^T g,   ds = p * (dp - row(p * dp)) with dp = g v^T,   dq = ds k,   dk = ds^T q

and of these, with cotangents a of dq, b of dk, c of dv, where E = a k^T + q b^T, and row(.) is a sum over keys:

    to s:   p * (R - row(p * R)),   R = (E - row(p * E)) * (dp - row(p * dp)) + g c^T
    to q, k, besides what comes from s:   ds b, ds^T a
    to g, v:   p c + x v, x^T g,   x = p * (E - row(p * E))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tttc.networks.cross_entropy import summed_in

_CPU_ROWS = 64  # queries of a piece: what a few heads make of it stays in the cache of a core
_MOST_ROWS = 256  # on a processor, where PyTorch's kernel walks over the keys itself
_MOST_SCORES = 2**27  # of all heads of a piece, elsewhere
_SHORT = 128 * 128  # scores of a head under which the operations of autograd are sooner done than Python's functions


def rotation(positions: int, width: int, theta: float, like: Tensor) -> Tensor:
    """e^(i t theta^(-2 j / width)) for t in [0, positions): complex [positions, width / 2], to multiply channels by.

    Made in float64, of two small tables, so that the angles of far positions are right in any dtype.
    """
    step = 64
    made: Any = {"dtype": torch.float64, "device": like.device}
    frequencies = theta ** -(torch.arange(0, width, 2, **made) / width)
    coarse, fine = (
        torch.polar(torch.ones((), **made), t[:, None] * frequencies)
        for t in (torch.arange(0, positions, step, **made), torch.arange(step, **made))
    )
    turns = (coarse[:, None] * fine).flatten(0, 1)[:positions]
    return turns if like.dtype == torch.float64 else turns.to(torch.complex64)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864): channels 2j and 2j + 1 of x [..., t, width] are turned together, by
    turns [t, width / 2]. In float32 at least, and back to the dtype of x.
    """
    pairs = torch.view_as_complex(x.to(summed_in(x.dtype)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """softmax(q k^T) v over the last `window` keys of each query.

    Args:
        q: [..., t, D], scaled already. k, v: [..., S, D] with S >= t; the last t keys are those of the queries, which
            see themselves and the window - 1 keys before them.

    Returns: [..., t, D].
    """
    out = []
    for piece in _pieces(q, k, window, max(_CPU_ROWS, min(window // 4, _MOST_ROWS))):
        rows, keys = piece.rows, piece.keys
        bias = None if piece.whole else piece.bias(q)
        out.append(
            F.scaled_dot_product_attention(q[..., rows, :], k[..., keys, :], v[..., keys, :], attn_mask=bias, scale=1.0)
        )
    return out[0] if len(out) == 1 else torch.cat(out, -2)


def window_attention_twice(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`window_attention`, to be differentiated twice and mapped over."""
    t, S = q.shape[-2], k.shape[-2]
    if t * S > _SHORT:
        return _WindowAttention.apply(q, k, v, window)
    scores = q @ k.mT
    piece = _Piece(slice(0, t), slice(0, S), S - t, window)
    return _softmax(scores if piece.whole else scores + piece.bias(scores)).to(v.dtype) @ v


class _Piece(NamedTuple):
    """Queries, and the keys that they see. The first query is the `offset`-th of these keys."""

    rows: slice
    keys: slice
    offset: int
    window: int

    @property
    def whole(self) -> bool:
        """One query, and every key within its window."""
        return self.rows.stop - self.rows.start == 1 and self.keys.stop - self.keys.start <= self.window

    def bias(self, like: Tensor) -> Tensor:
        """0 where a query sees a key, -inf elsewhere: [t, S]."""
        t, S = self.rows.stop - self.rows.start, self.keys.stop - self.keys.start
        hidden = torch.full((t, S), -torch.inf, dtype=like.dtype, device=like.device)
        bias = hidden.triu(self.offset + 1)
        last_query = self.offset + t - 1
        return bias if last_query < self.window else bias.add_(hidden.tril_(self.offset - self.window))


def _pieces(q: Tensor, k: Tensor, window: int, cpu_rows: int) -> Iterator[_Piece]:
    """The band, some queries at a time: so many on a processor; on other devices, where few large kernels do better,
    as many as a window has, if their scores are not too many to hold.
    """
    t, before = q.shape[-2], k.shape[-2] - q.shape[-2]
    fitting = min(window, _MOST_SCORES // (max(q.shape[:-2].numel(), 1) * window))
    size = cpu_rows if q.device.type == "cpu" else max(_MOST_ROWS, fitting)
    for begin in range(0, t, size):
        end = min(begin + size, t)
        first = max(0, before + begin - window + 1)
        yield _Piece(slice(begin, end), slice(first, before + end), before + begin - first, window)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=summed_in(scores.dtype))


def _pulled(g: Tensor, p: Tensor) -> Tensor:
    """The pullback of softmax where it is p: p * (g - row(p * g))."""
    return torch._softmax_backward_data(g.to(p.dtype), p, -1, p.dtype)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return window_attention(q, k, v, window)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.window = inputs[3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_WindowAttentionGradient.apply(*ctx.saved_tensors, g, ctx.window), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
        tensors, lead = _folded(given[:3], in_dims[:3], info.batch_size)
        return _WindowAttention.apply(*tensors, given[3]).unflatten(0, lead), 0


class _WindowAttentionGradient(torch.autograd.Function):
    """The gradients of q, k and v, as functions of them and of the cotangent g of the result."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = q.shape, k.shape, v.shape
        q, k, v, g = (x.flatten(0, -3) for x in (q, k, v, g))
        dq, dk, dv = _sums(q, k, v)
        for piece in _pieces(q, k, window, _CPU_ROWS):
            Q, G, K, V = q[:, piece.rows], g[:, piece.rows], k[:, piece.keys], v[:, piece.keys]
            p = _softmax(torch.baddbmm(piece.bias(q), Q, K.mT))
            ds = _pulled(G @ V.mT, p).to(q.dtype)
            dq[:, piece.rows] = ds @ K
            dk[:, piece.keys] += ds.mT @ Q
            dv[:, piece.keys] += p.to(q.dtype).mT @ G
        return tuple(x.view(shape).to(q.dtype) for x, shape in zip((dq, dk, dv), shapes, strict=True))  # type: ignore

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.window = inputs[4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        saved = ctx.saved_tensors
        q, k, v, g, a, b, c = (x.flatten(0, -3) for x in (*saved, *cotangents))
        D = q.shape[-1]
        onto_keys, aq = torch.cat([k, b, v, c], -1), torch.cat([a, q], -1)
        to_q, to_k, to_v, to_g = _sums(q, k, v, g)
        for piece in _pieces(q, k, ctx.window, _CPU_ROWS):
            rows, keys = piece.rows, piece.keys
            Q, G, A, AQ, KB = q[:, rows], g[:, rows], a[:, rows], aq[:, rows], onto_keys[:, keys, : 2 * D]
            K, V, B, C = k[:, keys], v[:, keys], b[:, keys], c[:, keys]
            p = _softmax(torch.baddbmm(piece.bias(q), Q, K.mT))
            read = p.to(q.dtype) @ onto_keys[:, keys]  # the sums over keys cost less here than over scores
            pKB, pV, pC = read.split((2 * D, D, D), -1)
            dp = torch.baddbmm(_row(G, pV), G, V.mT, beta=-1)
            E = torch.baddbmm(_row(AQ, pKB), AQ, KB.mT, beta=-1)
            ds, x = (p * dp).to(q.dtype), (p * E).to(q.dtype)
            s = _pulled(E.mul_(dp).baddbmm_(G, C.mT), p).to(q.dtype)
            to_q[:, rows] = (ds @ B).baddbmm_(s, K)
            to_k[:, keys] += (ds.mT @ A).baddbmm_(s.mT, Q)
            to_v[:, keys] += x.mT @ G
            to_g[:, rows] = torch.baddbmm(pC, x, V)
        sums = zip((to_q, to_k, to_v, to_g), saved, strict=True)
        return *(x.view(y.shape).to(y.dtype) for x, y in sums), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
        tensors, lead = _folded(given[:4], in_dims[:4], info.batch_size)
        found = _WindowAttentionGradient.apply(*tensors, given[4])
        return tuple(x.unflatten(0, lead) for x in found), (0, 0, 0)


def _row(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _sums(*like: Tensor) -> list[Tensor]:
    """Zeros to add up in, for 16-bit tensors in float32."""
    return [torch.zeros(x.shape, dtype=summed_in(x.dtype), device=x.device) for x in like]


def _folded(
    tensors: tuple[Tensor, ...], in_dims: tuple[int | None, ...], size: int
) -> tuple[list[Tensor], tuple[int, int]]:
    """The axis that is mapped over as a part of the first axis, and the two sizes in it."""
    front = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
    ]
    return [x.flatten(0, 1) for x in front], (size, front[0].shape[1])
