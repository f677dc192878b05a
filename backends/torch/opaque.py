"""A scan in PyTorch as a graph that does not look into it sees it: every tensor it returns in memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tttc.backends.interface import content_of
from tttc.backends.memory import lengths
from tttc.ir.program import number_of

if TYPE_CHECKING:
    from tttc.backends.torch.load import TorchScan

Tensors = Sequence[torch.Tensor]


class CopiedScan:
    """The same functions as those of a `TorchScan`. It keeps the carry of every so many chunks, never the values within
    a chunk: those may be views of the inputs.
    """

    def __init__(self, inner: TorchScan) -> None:
        self.inner, self.scan, self.recorded = inner, inner.scan, inner

    @property
    def halves(self) -> bool:
        return False

    @property
    def opaque(self) -> CopiedScan:
        return self

    @property
    def content(self) -> str:
        return content_of(self.scan, self.inner.program, "torch")

    def expect_backward(self, inputs: Tensors) -> None:
        """Nothing: all is there."""

    def results(self, inputs: Tensors, checkpoint: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        scan, like, tokens = self.scan, inputs[0], self._tokens(inputs)
        sizes = [lengths(target, self.inner.program.dims, tokens) for target in scan.results]
        outputs = [like.new_empty(*like.shape[:2], *own) for own in sizes]
        if not scan.loops:
            return outputs, []
        every = (checkpoint or 1) * number_of(scan.chunk, tokens)
        groups = 0 if checkpoint is None else -(-tokens // every)
        return outputs, [x.new_empty(*x.shape[:2], groups, *x.shape[2:]) for x in inputs[: len(scan.carry)]]

    def gradients(self, inputs: Tensors) -> list[torch.Tensor]:
        return [x.new_empty(x.shape) for x in inputs]

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        outputs, kept = self.results(inputs, checkpoint)
        found, saved = self.inner.forward(inputs, checkpoint if checkpoint is None else checkpoint or 1)
        _fill(outputs, found)
        if checkpoint is not None and self.scan.loops:
            for i, x in enumerate(saved):
                group, which = divmod(i, len(kept))
                kept[which][:, :, group].copy_(x.unflatten(0, inputs[0].shape[:2]))
        return tuple(outputs), kept

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        every = checkpoint or 1
        if self.scan.loops:
            groups = saved[0].shape[2]
            kept: Tensors = [x[:, :, i].flatten(0, 1) for i in range(groups) for x in saved]
        else:
            _, kept = self.inner.forward(inputs, every)
        results = self.gradients(inputs)
        _fill(results, self.inner.backward(inputs, kept, every, cotangents))
        return tuple(results)

    def _tokens(self, inputs: Tensors) -> int:
        """The length of an axis that no dim gives: a scan without one has one token."""
        dims = self.inner.program.dims
        for p, x in zip(self.scan.params, inputs, strict=True):
            for axis, length in zip(p.axes, x.shape[2:], strict=True):
                if axis.size not in dims:
                    return length
        return 1


def _fill(memory: Tensors, values: Tensors) -> None:
    for to, x in zip(memory, values, strict=True):
        to.copy_(x)
