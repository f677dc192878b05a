"""What compiled scans have in common: the memory of their results, and how many tokens and chunks a call has.

A backend derives its scans from `BaseScan` and adds `forward` and `backward`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from tttc.backends.interface import NotBuilt, content_of
from tttc.backends.memory import lengths, like
from tttc.ir.expr import Expr
from tttc.ir.program import AdjointProgram, Scan, number_of

Tensors = Sequence[torch.Tensor]


class BaseScan:
    """One scan of a program, whose forward and backward read and write tensors [B, H, ...] where they lie."""

    accepts_16bit = False

    def __init__(self, scan: Scan, program: AdjointProgram) -> None:
        self.scan, self.program = scan, program
        self.dtype = torch.float64 if program.dtype == "f64" else torch.float32

    @property
    def differentiable(self) -> Any:
        return self

    @property
    def custom_op(self) -> Any:
        return self

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        """What beside the program decides how its kernels are made; the backend's name comes first."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        return content_of(self.scan, self.program, *self.made_of)

    def prewarm_backward(self, inputs: Tensors) -> None:
        """Nothing: all is there, or made when it is first called."""

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        """None, unless the backend has one."""
        raise NotBuilt(f"{self.scan.name}_adjoint", NotImplementedError("its backend has no backward"))

    # -- memory

    def results(self, inputs: Tensors, checkpoint: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Memory for the outputs and the new carry, and for the carries that are kept."""
        return self.outputs(inputs), self.kept(inputs, checkpoint)

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """Memory for the outputs and the new carry."""
        dtypes = self.dtypes(inputs)
        return [self._empty(target, inputs, dtypes) for target in self.scan.results]

    def dtypes(self, inputs: Tensors) -> Mapping[str, torch.dtype]:
        """Of results by name, where it is not that of arithmetic."""
        return {}

    def kept(self, inputs: Tensors, checkpoint: int | None) -> list[torch.Tensor]:
        """Memory for the carry of every so many chunks; the values of a chunk are always made again."""
        if not self.scan.loops:
            return []
        groups = self.groups(inputs, checkpoint)
        return [_compact(x, (*x.shape[:2], groups, *x.shape[2:])) for x in inputs[: len(self.scan.carry)]]

    def gradients(self, inputs: Tensors) -> list[torch.Tensor]:
        return [like(p, x.shape, x, x.dtype) for p, x in zip(self.scan.params, inputs, strict=True)]

    def _empty(self, target: Expr, inputs: Tensors, dtypes: Mapping[str, torch.dtype]) -> torch.Tensor:
        own = lengths(target, self.program.dims, self.tokens(inputs))
        return like(target, [*inputs[0].shape[:2], *own], inputs[0], dtypes.get(target.name, self.dtype))

    # -- lengths

    def tokens(self, inputs: Tensors) -> int:
        """How many tokens the sequences have: the length of an axis that no dim gives. Without one there is one."""
        for p, x in zip(self.scan.params, inputs, strict=True):
            for axis, length in zip(p.axes, x.shape[2:], strict=True):
                if axis.size not in self.program.dims:
                    return length
        return 1

    def chunk(self, inputs: Tensors) -> int:
        """The chunk in tokens; a mini-batch that is the whole sequence takes all of it."""
        return number_of(self.scan.chunk, self.tokens(inputs))

    def groups(self, inputs: Tensors, checkpoint: int | None) -> int:
        """How many carries are kept of a loop."""
        if checkpoint is None or not self.scan.loops:
            return 0
        return -(-self.tokens(inputs) // ((checkpoint or 1) * self.chunk(inputs)))


def _compact(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory like that of `x`; where there is none of it, still with the strides that a kernel expects."""
    return x.new_empty_strided(shape, [prod(shape[i + 1 :]) for i in range(len(shape))])
