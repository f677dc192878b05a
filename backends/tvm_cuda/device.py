"""A GPU as kernels see it: a block of threads, the memory that they share, and what its matrix products take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tttc.backends.tvm_cpu.machine import Config, Machine

WARP = 32
HALVES = ("bfloat16", "float16")
# bytes of shared memory that one block may have, by compute capability; the newest that is not newer counts
SHARED = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class Device(Machine):
    """What a kernel for a GPU is made for; a thread works on one number at a time.

    `operands` is what matrix products are rounded to: with bfloat16 or float16 they run on tensor cores, whose sums are
    float32. `shared` are the bytes that one block may keep on the chip.
    """

    operands: str = "float32"
    threads: int = 256
    shared: int = SHARED[80] * 1024

    @property
    def warps(self) -> int:
        return self.threads // WARP

    @property
    def tensor_cores(self) -> bool:
        return self.operands in HALVES

    def target(self) -> dict[str, Any]:
        """What TVM is told; the text is the same for every GPU, only the memory that a block may have differs."""
        return {"kind": "cuda", "arch": "sm_80"}


def gpu(dtype: str, capability: int = 80, *, threads: int = 256) -> Device:
    """gpu("bfloat16", 90): blocks for compute capability 9.0 whose products are rounded to bfloat16."""
    compute = "float64" if dtype == "float64" else "float32"
    kilobytes = next((n for c, n in sorted(SHARED.items(), reverse=True) if c <= capability), 48)
    return Device(compute, 1, 255, "", Config(), dtype, threads, kilobytes * 1024)


__all__ = ["HALVES", "WARP", "Device", "gpu"]
