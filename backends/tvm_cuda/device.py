"""A GPU as kernels see it: a block of threads, the memory that they share, and what its matrix products take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tttc.backends.interface import Placement
from tttc.backends.target import MOST_REGISTERS, OLDEST, Target, architecture_of
from tttc.backends.tvm_cpu.machine import Machine, TileConfig

WARP = OLDEST.warp
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Device(Machine):
    """What a kernel for a GPU is made for; a thread works on one number at a time.

    `operands` is what matrix products are rounded to: with bfloat16 or float16 they run on tensor cores, whose sums are
    float32. `shared` are the bytes that one block may keep on the chip.
    """

    operands: str = "float32"
    threads: int = 256
    shared: int = OLDEST.shared

    @property
    def warps(self) -> int:
        return self.threads // WARP

    @property
    def tensor_cores(self) -> bool:
        return self.operands in HALVES

    def target(self) -> dict[str, Any]:
        """What TVM is told; the text is the same for every GPU, only the memory that a block may have differs."""
        return {"kind": "cuda", "arch": OLDEST.name}


def gpu(dtype: str, target: Target = OLDEST, *, threads: int = 256) -> Device:
    """gpu("bfloat16", Target("sm_90")): blocks for compute capability 9.0 whose products are rounded to bfloat16."""
    compute = "float64" if dtype == "float64" else "float32"
    return Device(compute, 1, MOST_REGISTERS, "", TileConfig(), dtype, threads, target.shared)


def of_place(place: Placement) -> Device:
    """The GPU of a place; where it is none, or not there, the one that text is written for then."""
    there = architecture_of(place.device)
    return gpu(str(place.dtype).removeprefix("torch."), Target(there) if there else OLDEST)
