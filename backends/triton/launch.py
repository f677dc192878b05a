"""How exported files launch their kernels, as they have it: `tttc.export.python` copies these into them.

A file is read and run by itself. Nothing here imports `tttc`, and files import Triton where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

triton: Any = None
tl: Any = None


class Kernels(NamedTuple):
    """A loop as two kernels of Triton: a program for each head, or for each strip of one."""

    forward: Any
    adjoint: Any
    chunk: int  # tokens, as it is written into the kernels
    strips: int  # of a head
    shared: tuple[int, ...]  # the inputs that all strips read: each makes a part of their cotangents
    options: tuple[dict[str, int], dict[str, int]]

    @property
    def interpreted(self) -> bool:
        """Whether Triton was imported with TRITON_INTERPRET=1, and runs them on a CPU."""
        return not isinstance(self.forward, triton.JITFunction)

    def take(self, inputs: Sequence[torch.Tensor], chunk: int) -> bool:
        """Whether they run a loop over these. PyTorch does where a second derivative may follow."""
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        fitting = chunk == self.chunk and all(x.dtype == torch.float32 for x in inputs)
        return fitting and not recorded and (inputs[0].is_cuda or self.interpreted)

    def run(self, loop: Any, inputs: Sequence[torch.Tensor], every: int) -> tuple[list[torch.Tensor], ...]:
        """z and the new carry; and the carry before each `every`-th chunk."""
        carry, fixed, sequences = loop.parts([x.contiguous() for x in inputs])
        G, T = sequences[0].shape[:2]
        groups = -(-T // (self.chunk * every))
        z = sequences[0].new_empty(G, T, *loop.width)
        after = [torch.empty_like(x) for x in carry]
        kept = [x.new_empty(G, groups, *x.shape[1:]) for x in carry]
        given = [*placed([*carry, *fixed]), *placed([*sequences, z], "t"), *placed(after), *kept]
        self.launch(self.forward, given, (G, T, every, groups), self.options[0])
        return [z, *after], kept

    def pull(
        self,
        loop: Any,
        inputs: Sequence[torch.Tensor],
        kept: Sequence[torch.Tensor],
        every: int,
        cotangents: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """The cotangents of the inputs."""
        carry, fixed, sequences = loop.parts([x.contiguous() for x in inputs])
        dz, *d_carry = (x.contiguous() for x in cotangents)
        G, T = dz.shape[:2]
        parts = [(self.strips,) if i in self.shared else () for i in range(len(inputs))]
        made = [x.new_empty(*n, *x.shape) for n, x in zip(parts, inputs, strict=True)]
        work = [x.new_empty(G, every, *x.shape[1:]) for x in carry]
        given = [*kept, *placed(fixed), *placed([*sequences, dz], "t"), *placed(d_carry)]
        for i, x in enumerate(made):
            given += placed([x], "t" * (i >= loop.carried + loop.fixed) + "s" * (i in self.shared))
        self.launch(self.adjoint, [*given, *work], (G, T, every, -(-T // (self.chunk * every))), self.options[1])
        return [x.sum(0) if i in self.shared else x for i, x in enumerate(made)]

    def launch(self, kernel: Any, given: Sequence[Any], sizes: Sequence[int], options: dict[str, int]) -> None:
        """Run a kernel, for which every head is a sequence of its own."""
        G, *lengths = sizes
        largest = max(x.numel() for x in given if isinstance(x, torch.Tensor))
        index = tl.int32 if largest < 2**31 else tl.int64
        with torch.cuda.device_of(given[0]):
            if G:
                kernel[G, self.strips, 1](*given, 1, *lengths, operand=tl.float32, index=index, **options)


def placed(tensors: Sequence[torch.Tensor], of: str = "") -> list[Any]:
    """Tensors, each with how far sequences, heads of one (there is none), tokens ("t") and strips ("s") lie apart."""
    given: list[Any] = []
    for x in tensors:
        strips, strides = x.stride()[: of.count("s")], x.stride()[of.count("s") :]
        given += [x, strides[0], 0, *strides[1:][: of.count("t")], *strips]
    return given
