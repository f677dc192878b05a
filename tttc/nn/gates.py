"""What makes the gates of a declaration from the hidden states, or from the places of tokens in their mini-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tttc.declare.gates import gate_bias, gate_problem
from tttc.declare.specs import GateSpec
from tttc.declare.variant import Signature
from tttc.errors import DeclarationError, problems_text

STD = 0.02  # of every projection and gate weight at initialisation, as in the reference implementation

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "none": lambda x: x,
}


class HiddenGate(nn.Module):
    """low + scale * activation(x w_h + b_h), one row of weights per head (and channel): [B, T, H, *dims].

    b_h begins at `start`.
    """

    def __init__(
        self,
        num_heads: int,
        shape: tuple[int, ...],
        hidden_size: int,
        activation: str,
        scale: float,
        low: float = 0.0,
        start: float = 0.0,
        **made: Any,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, *shape, hidden_size, **made))
        self.bias = nn.Parameter(torch.empty(num_heads, *shape, **made))
        self.activation = activation
        self.scale = scale
        self.low, self.start = low, start

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [B, T, hidden_size]; `positions` is not used."""
        logits = F.linear(x, self.weight.flatten(0, -2), self.bias.flatten()).unflatten(-1, self.bias.shape)
        value = self.scale * _ACTIVATIONS[self.activation](logits)
        return value + self.low if self.low else value

    def extra_repr(self) -> str:
        low = f"{self.low:g} + " if self.low else ""
        return f"{low}{self.scale:g} * {self.activation}(x @ {list(self.weight.shape)} + b)"


class PositionGate(nn.Module):
    """max(1 / i + learned_i, 0) for the i-th token of its mini-batch, i from 1; the same for every head."""

    def __init__(self, num_heads: int, shape: tuple[int, ...], mini_batch: int | None, **made: Any) -> None:
        super().__init__()
        self.shape = (num_heads, *shape)
        self.learned = None if mini_batch is None else nn.Parameter(torch.empty(mini_batch, *shape, **made))

    def reset_parameters(self) -> None:
        if self.learned is not None:
            nn.init.zeros_(self.learned)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: [B, T, hidden_size], positions: [T] from 0 -> [B, T, H, *dims]."""
        inner = [1] * len(self.shape[1:])
        scale = (1.0 / (positions + 1).to(x.dtype)).view(-1, *inner)
        if self.learned is not None:
            scale = torch.clamp_min(scale + self.learned[positions], 0.0)
        return scale.unsqueeze(1).expand(*x.shape[:2], *self.shape)

    def extra_repr(self) -> str:
        return "1 / i" if self.learned is None else f"max(1 / i + learned_i, 0), i = 1..{self.learned.shape[0]}"


def gate_module(
    spec: GateSpec,
    hidden_size: int,
    num_heads: int,
    dims: Mapping[str, int],
    declared: Signature,
    **made: Any,
) -> nn.Module:
    """The module that makes this gate, as its declaration says."""
    shape = tuple(dims[dim] for dim in spec.dims)
    if spec.by == "position":
        b = None if declared.mini_batch == "all" else int(declared.mini_batch)
        return PositionGate(num_heads, shape, b, **made)
    sizes = {"D": hidden_size // num_heads, **dims}
    if problem := gate_problem(spec, sizes):
        raise DeclarationError(problems_text(declared.name, [problem]))
    shown = spec.activation, spec.scale_value(sizes), float(spec.low), gate_bias(spec, sizes)
    return HiddenGate(num_heads, shape, hidden_size, *shown, **made)
