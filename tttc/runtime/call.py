"""One call of a layer as its scans read it, with its tokens next to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tttc.ir.expr import Expr
from tttc.runtime.state import State, Tensors


@dataclass
class Call:
    """The tensors of a call where they lie: sequences [B, H, T, *dims], params [B, H, *dims], and where its sequences
    stand.
    """

    sequences: Tensors
    """The tokens, those of q first, and the gates."""
    params: Tensors
    state: State
    lent: bool = False
    """Whether the tensors of the state belong to the caller, who may change them."""
    recorded: bool = False
    """Whether what a backward needs is being kept: every scan is then one that has a backward."""
    measured: list[torch.Tensor] = field(default_factory=list)

    @property
    def queries(self) -> torch.Tensor:
        """[B, H, T, *dims]."""
        return next(iter(self.sequences.values()))

    @property
    def tokens(self) -> int:
        return self.queries.shape[2]

    def value(self, p: Expr, values: Tensors, now: int, stop: int) -> torch.Tensor:
        """The tensor of one parameter of a scan that runs over the tokens from `now` to `stop`."""
        name, role, at = p.variable
        if name in values:
            return values[name]
        if role == "param":
            return self.params[name]
        whole = self.sequences[name]
        if not at:
            until = whole if stop == whole.shape[2] else whole[:, :, :stop]
            return until[:, :, -1]
        return whole if (now, stop) == (0, whole.shape[2]) else whole[:, :, now:stop]

    def telemetry(self, names: list[str]) -> Tensors:
        """What the chunks of this call measured, [B, H, mini-batches] each, by name."""
        return {n: torch.cat(self.measured[i :: len(names)], 2) for i, n in enumerate(names)}
