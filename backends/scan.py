"""Compiled scans: what a backend makes of the scans of a program, and what all of them have in common.

A backend derives its scans from `CompiledScan` and adds `forward` and `backward`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from math import prod

import torch

from tttc.backends.memory import lengths, like
from tttc.ir.expr import Expr
from tttc.ir.program import AdjointProgram, Scan, number_of
from tttc.ir.structure import written

Tensors = Sequence[torch.Tensor]


class NotBuilt(Exception):
    """A kernel could not be made: what it is called, and what went wrong. Raised where it is first called, for that is
    when it is made; what a backend knows that it cannot run is among its `refusals`.
    """

    def __init__(self, kernel: str, error: BaseException) -> None:
        said = " ".join(str(error).split())
        super().__init__(
            f"the kernel `{kernel}` could not be made ({type(error).__name__}{': ' * bool(said)}{said[:400]})"
        )


class CompiledScan(ABC):
    """One scan of a program. Tensors have two leading axes, batch and heads, in the order of `Scan.params`.

    The sequences, the heads and the tokens of an input may lie at any distance from each other.
    """

    accepts_16bit = False
    """Whether sequences may be float16 or bfloat16: read and written as they are, arithmetic is float32."""
    pull: CompiledScan | None = None
    """Its backward as a scan that has a backward in turn: results and cotangents in, cotangents out."""

    def __init__(self, scan: Scan, program: AdjointProgram) -> None:
        self.scan, self.program = scan, program
        self.dtype = torch.float64 if program.dtype == "f64" else torch.float32

    @property
    def differentiable(self) -> CompiledScan:
        """The same scan in operations that autograd records, for second derivatives; often itself."""
        return self

    @property
    def custom_op(self) -> CompiledScan:
        """The same scan for a graph, which knows sizes and strides alone; often itself. What its forward keeps is a
        list of tensors, one for each variable that a loop carries, and nothing that it returns lies in the memory of an
        input.
        """
        return self

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        """What beside the program decides how its kernels are made; the backend's name comes first."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """What it computes and by which kernels: equal for scans that can stand for each other."""
        what = self.program.adjoint_of(self.scan) if self.scan.differentiated else self.scan
        computed = written((self.scan, what, sorted(self.program.dims.items()), self.program.dtype))
        return "\n".join([computed, *map(str, self.made_of)])

    def prewarm_backward(self, inputs: Tensors) -> None:  # noqa: B027  # most have nothing to begin
        """Said before a forward that will be followed by a backward: what takes long to make may be begun."""

    @abstractmethod
    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        """Outputs and new carry, none in the memory of another or of an input, and what the backward needs, which
        autograd saves: the carry of every `checkpoint` chunks, or all with 0; None where no backward will follow.
        """

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        """The cotangents of the inputs, from those of the outputs and of the new carry."""
        raise NotBuilt(f"{self.scan.name}_adjoint", NotImplementedError("its backend has no backward"))

    # -- memory

    def results(self, inputs: Tensors, checkpoint: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Memory for what `forward` returns: the outputs and the new carry, and the carries that are kept."""
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
        """Memory for what `backward` returns."""
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
