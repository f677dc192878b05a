"""What every backend offers. A backend sees scans of chunks; never a learner, a derivative or a dual form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tttc.ir.program import Program


@dataclass(frozen=True)
class Source:
    """Generated code: a file that can be printed, saved and read."""

    text: str
    language: str


class CompiledScan(Protocol):
    """One scan of the program. Tensors have two leading axes, batch and heads, in the order of `Scan.params`.

    The sequences, the heads and the tokens of an input may lie at any distance from each other.
    """

    @property
    def recorded(self) -> CompiledScan:
        """The same scan in operations that autograd records, for second derivatives; often itself."""
        ...

    def forward(self, inputs: Sequence[Any], checkpoint: int) -> tuple[tuple[Any, ...], Any]:
        """Outputs and new carry, and what the backward needs: the carry of every `checkpoint` chunks, or all with 0."""
        ...

    def backward(
        self, inputs: Sequence[Any], saved: Any, checkpoint: int, cotangents: Sequence[Any]
    ) -> tuple[Any, ...]:
        """The cotangents of the inputs, from those of the outputs and of the new carry."""
        ...


class Backend(Protocol):
    """The three functions of a backend package."""

    def refusals(self, program: Program) -> list[str]:
        """Why this backend cannot run the program; empty when it can."""
        ...

    def emit(self, program: Program) -> Source:
        """The program of the adjoint stage as source text."""
        ...

    def load(self, source: Source, program: Program) -> Mapping[str, CompiledScan]:
        """Source text as callables, by the names of the scans."""
        ...
