"""One scan by kernels for this CPU: compiled by LLVM when first called, and kept on disk."""

from __future__ import annotations

import platform
from collections.abc import Hashable
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from tttc.backends.cache import cached
from tttc.backends.notice import compiling
from tttc.backends.scan import Tensors
from tttc.backends.tvm_common.loops import heads_per_task
from tttc.backends.tvm_common.scan import Function, Stored, TVMScan
from tttc.backends.tvm_common.tir import writing
from tttc.backends.tvm_cpu.build import build, link, loader, use_threads
from tttc.backends.tvm_cpu.kernels import CPUKernel
from tttc.backends.tvm_cpu.machine import Machine, TileConfig, host
from tttc.ir.program import AdjointProgram, Scan

CACHED = 1 << 17  # numbers that a second cache holds: the weights of the heads that a thread takes together


class CPUScan(TVMScan):
    """One scan, head by head, or some heads together."""

    def __init__(self, scan: Scan, program: AdjointProgram, config: TileConfig | None = None) -> None:
        super().__init__(scan, program)
        self.config = config or TileConfig()

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        return "tvm", self.config

    def text(self, backward: bool, stored: Stored) -> str:
        """The TensorIR of a kernel."""
        return str(self.kernel(backward, stored).function.script())

    def kernel(self, backward: bool, stored: Stored) -> CPUKernel:
        """A kernel before it is compiled."""
        with writing:
            return CPUKernel(self.scan, self.program, self._machine, dict(stored), backward).written()

    def make(self, backward: bool, stored: Stored) -> Function:
        """A kernel from the disk, or compiled and left there. The file is loaded in either case: from what TVM has in
        memory, LLVM would make the same code once more.
        """
        built: list[Any] = []

        def make(path: Path) -> None:
            with compiling(self.program.title, "this CPU"):
                built.append(build(self.kernel(backward, stored)))
                link(built[0], path)

        path = cached("tvm", self._key(backward, stored), ".so", make)
        if path is not None:
            library = loader()(str(path))
        else:
            library = built[0] if built else build(self.kernel(backward, stored))
        found: Function = library[self.called(backward)]
        return found

    def _key(self, backward: bool, stored: Stored) -> str:
        """All that a kernel depends on: the program, the machine, and the versions of what makes it."""
        machine = (str(self._machine), platform.machine(), version("apache-tvm"))
        return "\n".join([self.checksum(backward, stored), *machine])

    @cached_property
    def _machine(self) -> Machine:
        return host("float64" if self.dtype == torch.float64 else "float32", self.config)

    def prepare(self) -> None:
        use_threads(torch.get_num_threads())

    def forward_settings(self, every: int, inputs: Tensors) -> tuple[int, ...]:
        """Beside the distance of kept carries, how many heads a thread takes together."""
        if not self._heads_together:
            return (every,)
        batch, heads = inputs[0].shape[:2]
        weights = sum(prod(x.shape[2:]) for x in inputs[: len(self.scan.carry)])
        return every, _together(batch, heads, torch.get_num_threads(), CACHED // weights)

    @cached_property
    def _heads_together(self) -> bool:
        return heads_per_task(self.scan, self.program.dims, self._machine.lanes)


def _together(batch: int, heads: int, threads: int, most: int) -> int:
    """As many heads as one thread may take, so that no thread has more to do than another must."""
    counts = range(1, max(1, min(heads, most)) + 1)
    return min(counts, key=lambda n: (-(-batch * -(-heads // n) // threads) * n, -n))
