"""Short causal convolutions over the tokens of q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CausalConvolution(nn.Module):
    """A depthwise convolution in which a token sees itself and the `kernel - 1` tokens before it.

    Weight [channels, 1, kernel] (the last tap is the token itself) and bias [channels], as in `nn.Conv1d`.
    """

    def __init__(self, channels: int, kernel: int, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel, **made))
        self.bias = nn.Parameter(torch.empty(channels, **made))

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(kernel), the default of `nn.Conv1d`."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, rows: Tensor) -> Tensor:
        """[B, kernel - 1 + T, channels], whose first rows are those before the tokens -> [B, T, channels]."""
        kernel = self.weight.shape[2]
        T = rows.shape[1] - kernel + 1
        # A sum over shifted views, not F.conv1d, which has no meaning for T = 0 and wants channels first.
        y = self.bias + sum(rows[:, j : j + T] * self.weight[:, 0, j] for j in range(kernel))
        return y.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.weight.shape[0]}, kernel={self.weight.shape[2]}"
