"""What may be tuned about these kernels: nothing of their own, only the schedule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch

from tttc.backends.interface import ChunkHint, Settings
from tttc.backends.tvm_common.refusals import only_chunk
from tttc.backends.tvm_cpu import tune as of_cpu
from tttc.ir.program import ScanProgram


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    """No settings."""
    return {}


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    """The only one that these kernels have, where there is but one; what a CPU prefers is for its caches."""
    return only_chunk(program)


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    """All settings are the same."""
    return ()


def toolchain() -> dict[str, str]:
    """The compiler, and whose machine code it is."""
    return {**of_cpu.toolchain(), "cuda": str(torch.version.cuda)}
