"""The memory of tensors as kernels want it: any distance between batch elements, heads and tokens, dense within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tttc.ir.expr import Expr

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def densify(of: Sequence[Expr], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors [B, H, ...], or of a sequence [B, H, T, ...], dense from there on; copied only where they are not."""
    leading = [2 if p.at is None else 3 for p in of]
    return [dense_from(n, x) for n, x in zip(leading, tensors, strict=True)]


def dense_from(axis: int, x: torch.Tensor) -> torch.Tensor:
    """The tensor, or where its axes from `axis` on are not dense a copy of it. An axis of one entry may lie at any
    distance for torch, which then calls it dense, and not for a kernel: it is given the distance that it would have.
    """
    expected, shape, strides = 1, x.shape, x.stride()
    wanted = list(strides)
    for i in range(len(shape) - 1, axis - 1, -1):
        if shape[i] != 1 and strides[i] != expected:
            return x.detach().contiguous() if x.numel() else x.new_empty(shape)
        wanted[i] = expected
        expected *= shape[i]
    return x if wanted == list(strides) else x.detach().as_strided(shape, wanted)


def like(target: Expr, shape: Sequence[int], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a value [B, H, ...]; a sequence lies as its users have it, [B, T, H, ...]."""
    if target.at is None:
        return x.new_empty(shape, dtype=dtype)
    batch, heads, tokens, *own = shape
    return x.new_empty((batch, tokens, heads, *own), dtype=dtype).transpose(1, 2)


def fill(memory: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy values to where they belong."""
    for to, x in zip(memory, values, strict=True):
        to.copy_(x)


def fake(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether there are sizes and no numbers in them: fake tensors, which are never made by chance."""
    return not PLAIN.issuperset(map(type, tensors)) and any(isinstance(x, FakeTensor) for x in tensors)


def autocast(device: str) -> bool:
    """Whether autocast is on for a type of device; some, such as "meta", have none."""
    return bool(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))


def address_span(x: torch.Tensor) -> int:
    """How far the last entry lies from the first, or the length of the memory that they lie in, where that will do."""
    whole = x.untyped_storage().nbytes() // x.element_size()
    return whole if whole < 2**31 else sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))


def lengths(target: Expr, dims: Mapping[str, int], tokens: int) -> list[int]:
    """The sizes of the axes of a value; an axis that no dim gives counts tokens."""
    return [dims.get(a.size) or tokens for a in target.axes]
