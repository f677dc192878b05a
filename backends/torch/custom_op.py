"""A scan in PyTorch as a graph that does not look into it sees it: every tensor it returns in memory of its own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from tttc.backends.memory import fill
from tttc.backends.scan import CompiledScan, Tensors

if TYPE_CHECKING:
    from tttc.backends.torch.load import TorchScan


class CopiedScan(CompiledScan):
    """The same functions as those of a `TorchScan`. It keeps the carry of every so many chunks, never the values within
    a chunk: those may be views of the inputs.
    """

    def __init__(self, inner: TorchScan) -> None:
        super().__init__(inner.scan, inner.program)
        self.inner = inner

    @property
    def pull(self) -> CompiledScan | None:  # type: ignore[override]
        return self.inner.pull

    @property
    def differentiable(self) -> TorchScan:
        return self.inner

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        return ("torch",)

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        outputs, kept = self.results(inputs, checkpoint)
        found, saved = self.inner.forward(inputs, checkpoint if checkpoint is None else checkpoint or 1)
        fill(outputs, found)
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
            groups = self.groups(inputs, every)
            kept: Tensors = [x[:, :, i].flatten(0, 1) for i in range(groups) for x in saved]
        else:
            _, kept = self.inner.forward(inputs, every)
        results = self.gradients(inputs)
        fill(results, self.inner.backward(inputs, kept, every, cotangents))
        return tuple(results)
