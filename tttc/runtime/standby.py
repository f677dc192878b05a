"""Where a kernel cannot be made after all: PyTorch takes its place, and says so.

What a backend cannot run it refuses when a layer is compiled. Its kernels are made when they are first called, and what
fails there is a fault of this compiler: of a backend that was asked for by name it is an error, and for `"auto"` no
reason to end a training run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from tttc.backends.memory import fill
from tttc.backends.scan import CompiledScan, NotBuilt, Tensors
from tttc.errors import FallbackWarning


def with_standby(scans: Mapping[str, CompiledScan], variant: str, backend: str) -> dict[str, CompiledScan]:
    """The scans of a backend that nobody asked for by name."""
    return {n: s if s.differentiable is s else StandbyScan(s, variant, backend) for n, s in scans.items()}


class StandbyScan(CompiledScan):
    """A scan by its kernels, or from the first on that cannot be made by PyTorch, with the results and the memory that
    the kernels would have.
    """

    def __init__(self, scan: CompiledScan, variant: str, backend: str) -> None:
        super().__init__(scan.scan, scan.program)
        self.scan_of_kernels, self.variant, self.backend = scan, variant, backend
        self.accepts_16bit = scan.accepts_16bit
        self.failed: NotBuilt | None = None

    def __getattr__(self, name: str) -> Any:
        """What else there is to see of the kernels."""
        if name == "scan_of_kernels":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.scan_of_kernels, name)

    @property
    def differentiable(self) -> CompiledScan:
        return self.scan_of_kernels.differentiable

    @cached_property
    def custom_op(self) -> CompiledScan:
        inner = self.scan_of_kernels.custom_op
        return self if inner is self.scan_of_kernels else StandbyScan(inner, self.variant, self.backend)

    @property
    def fingerprint(self) -> str:
        return self._memory.fingerprint

    def results(self, inputs: Tensors, checkpoint: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self._memory.results(inputs, checkpoint)

    def gradients(self, inputs: Tensors) -> list[torch.Tensor]:
        return self._memory.gradients(inputs)

    def prewarm_backward(self, inputs: Tensors) -> None:
        if self.failed is None:
            self.scan_of_kernels.prewarm_backward(inputs)

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        if self.failed is None:
            try:
                return self.scan_of_kernels.forward(inputs, checkpoint)
            except NotBuilt as failure:
                self._fails(failure)
        outputs, kept = self.results(inputs, checkpoint)
        found, saved = self._torch.forward(list(map(_widened, inputs)), checkpoint)
        fill([*outputs, *kept], [*found, *saved])
        return tuple(outputs), kept

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        if self.failed is None:
            try:
                return self.scan_of_kernels.backward(inputs, saved, checkpoint, cotangents)
            except NotBuilt as failure:
                self._fails(failure)
        given = list(map(_widened, inputs))
        _, kept = self._torch.forward(given, checkpoint)  # the kernels may have kept it for strips of heads
        results = self.gradients(inputs)
        fill(results, self._torch.backward(given, kept, checkpoint, list(map(_widened, cotangents))))
        return tuple(results)

    @property
    def _memory(self) -> CompiledScan:
        return self.scan_of_kernels.custom_op

    @property
    def _torch(self) -> CompiledScan:
        return self.scan_of_kernels.differentiable.custom_op

    def _fails(self, failure: NotBuilt) -> None:
        self.failed = failure
        warnings.warn(
            f"variant `{self.variant}`: torch runs what {self.backend} cannot: {failure}.\n"
            f'  It is slower, and a fault of this compiler: please report it. With backend="torch" it is not said.',
            FallbackWarning,
            stacklevel=2,
        )


def _widened(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
