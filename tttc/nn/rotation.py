"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x: [B, T, H, D] at `positions`: [T] (arXiv:2104.09864, equation 34).

    Channels 2i and 2i + 1 form a plane, turned by position * theta^(-2i / D). The angles, their cosines and
    sines are float32 for every dtype of x, as in the reference implementation, so that weights trained there
    mean the same here.
    """
    D = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32, device=x.device) / D)
    angles = positions.to(torch.float32)[:, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
