"""Source as scans: the functions of the text, called for one batch element and head after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.backends.toy.ops import ROWS
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.scan import CompiledScan, Tensors
from tttc.ir import numerics
from tttc.ir.program import AdjointProgram, Scan

ALWAYS = ("chunks", "empty", "pi", "inf", "nan")  # loops, memory and numbers


def unavailable(device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else [f"NumPy runs on a CPU, not on {device}"]


def here() -> str:
    return "NumPy, one head after the other"


def load_scans(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, ToyScan]:
    names = [*ALWAYS, *(name for row in ROWS.values() for name in row)]
    scope: dict[str, Any] = {name: getattr(numerics, name) for name in names}
    exec(compile(source.text, f"<toy {program.name}>", "exec"), scope)
    return {s.name: ToyScan(s, program, scope[s.name], scope.get(f"{s.name}_adjoint")) for s in program.scans}


class ToyScan(CompiledScan):
    """One scan; its backward makes all that it needs again, so that nothing is kept."""

    def __init__(self, scan: Scan, program: AdjointProgram, run: Callable[..., Any], adjoint: Any) -> None:
        super().__init__(scan, program)
        self.run, self.adjoint = run, adjoint

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        return self._heads(self.run, inputs, self.outputs(inputs)), []

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        return self._heads(self.adjoint, [*inputs, *cotangents], self.gradients(inputs))

    def _heads(
        self, function: Callable[..., Any], given: Tensors, memory: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The results of a function for every batch element and head, in memory for all of them."""
        batch, heads = given[0].shape[:2]
        for b in range(batch):
            for h in range(heads):
                found = function(*(x[b, h].detach().double().numpy() for x in given))
                found = found if isinstance(found, tuple) else (found,)
                for to, x in zip(memory, found, strict=True):
                    to[b, h] = torch.from_numpy(np.array(x))
        return tuple(memory)
