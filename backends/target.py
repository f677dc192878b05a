"""GPUs that kernels are made for without one present: what a multiprocessor holds, and what the whole GPU reaches.

    architecture((9, 0))                             "sm_90"
    architecture(None, "gfx942:sramecc+:xnack-")     "gfx942"
    Target("sm_90").shared                           232448 bytes that a program may have
    GPUS["sm_90"].resident(128 registers, 32768 bytes, 4 warps)     4 programs at once on a multiprocessor

Limits are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute Capability") and, for AMD, of
ROCm's table of GPUs and LLVM's occupancy for the target. Rates are the vendors' own for one product of each: A100 SXM
80 GB, H100 SXM, B200 and MI300X; dense, and never quite reached.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

NAME = re.compile(r"sm_(\d{2,3})[af]?|gfx[0-9a-f]{3,4}")  # sm_90a has instructions that sm_90 has not
MOST_REGISTERS = 255  # of a thread of NVIDIA's
REGISTERS = 64 << 10  # of a multiprocessor of NVIDIA's
# kibibytes of shared memory that one program may have, by compute capability; the newest that is not newer counts
SHARED = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
LEAST_SHARED = 48
TENSOR_CORES = {torch.bfloat16: 80, torch.float16: 70}  # the compute capability from which on there are any for it
SCHEDULERS = 4  # of a multiprocessor: fewer warps than that leave some of it idle
GRANULE = 8  # registers of a thread are given out by so many
RESERVED = 1024  # bytes of shared memory that NVIDIA's driver takes of every program


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers of a thread, bytes that it writes elsewhere because these are full, bytes of
    shared memory; None where the compiler does not say.
    """

    kernel: str
    target: str
    registers: int | None
    spilled: int | None
    shared: int


@dataclass(frozen=True)
class Target:
    """An architecture that code is compiled for: "sm_90", "gfx942". Raises `ValueError` for what is none."""

    name: str

    def __post_init__(self) -> None:
        if NAME.fullmatch(self.name) is None:
            raise ValueError(f"there is no target {self.name!r}")

    @property
    def vendor(self) -> str:
        return "NVIDIA" if self.nvidia else "AMD"

    @property
    def nvidia(self) -> bool:
        return self.name.startswith("sm_")

    @property
    def capability(self) -> int:
        """Of NVIDIA's: 90 of "sm_90" and "sm_90a"; of others 0."""
        found = NAME.fullmatch(self.name)
        return int(found[1] or 0) if found else 0

    @property
    def driver(self) -> tuple[str, int | str, int]:
        """As the drivers of Triton name it: whose, which, and the threads of a warp."""
        return ("cuda", self.capability, self.warp) if self.nvidia else ("hip", self.name, self.warp)

    @property
    def virtual(self) -> str:
        """What PTX for it is compiled as."""
        return self.name.replace("sm_", "compute_")

    @property
    def warp(self) -> int:
        """Threads, at most."""
        return 32 if self.nvidia else 64

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        found = (n for c, n in sorted(SHARED.items(), reverse=True) if c <= self.capability)
        return next(found, LEAST_SHARED) * 1024

    def oldest_for(self, dtype: torch.dtype) -> Target:
        """The first that has tensor cores for a dtype; of float32 and of AMD's GPUs itself."""
        oldest = TENSOR_CORES.get(dtype, 0) if self.nvidia else 0
        return nvidia_target(oldest) if oldest > self.capability else self


def nvidia_target(capability: int) -> Target:
    """nvidia_target(90) is "sm_90"."""
    return Target(f"sm_{capability}")


OLDEST = nvidia_target(80)  # what text is written for where nothing says for what


@dataclass(frozen=True)
class GPU:
    """One architecture, by one product of it. What AMD calls a compute unit is a multiprocessor here."""

    target: str
    product: str
    multiprocessors: int
    warp: int
    """Threads."""
    registers: int
    """Of 32 bits, of a multiprocessor."""
    shared: int
    """Bytes of shared memory of a multiprocessor."""
    shared_of_program: int
    """The most of it that one program may have."""
    warps: int
    """The most that a multiprocessor holds."""
    programs: int
    """The most that it holds, whatever they take."""
    matrix: float
    """FLOPs a second of products of 16 bits."""
    arithmetic: float
    """FLOPs a second of float32, outside of matrix units."""
    bandwidth: float
    """Bytes a second from and to memory."""

    def resident(self, taken: Resources, warps: int) -> int:
        """Programs of a kernel that a multiprocessor runs at once; 0 where not even one fits."""
        if taken.shared > self.shared_of_program or warps > self.warps:
            return 0
        fit = [self.programs, self.warps // warps]
        if taken.registers:
            each = -(-taken.registers // GRANULE) * GRANULE * self.warp * warps
            fit.append(self.registers // each)
        if taken.shared:
            reserved = RESERVED if Target(self.target).nvidia else 0
            fit.append(self.shared // (taken.shared + reserved))
        return min(fit)


GPUS = {
    g.target: g
    for g in (
        GPU("sm_80", "A100", 108, 32, 64 << 10, 164 << 10, 163 << 10, 64, 32, 312e12, 19.5e12, 2.0e12),
        GPU("sm_90", "H100", 132, 32, 64 << 10, 228 << 10, 227 << 10, 64, 32, 989e12, 66.9e12, 3.35e12),
        GPU("sm_100", "B200", 148, 32, 64 << 10, 228 << 10, 227 << 10, 64, 32, 2250e12, 75e12, 8.0e12),
        GPU("gfx942", "MI300X", 304, 64, 128 << 10, 64 << 10, 64 << 10, 32, 16, 1307e12, 163.4e12, 5.3e12),
    )
}


def architecture(capability: tuple[int, int] | None, amd: str = "") -> str:
    """The target of what a driver says of a GPU: its compute capability, or the architecture that AMD's names with
    what it has switched on.
    """
    if amd:
        return amd.partition(":")[0]
    return "" if capability is None else nvidia_target(10 * capability[0] + capability[1]).name


def architecture_of(device: torch.device) -> str:
    """The target of a GPU that is there; "" for what is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    amd = str(torch.cuda.get_device_properties(device).gcnArchName) if torch.version.hip else ""
    return architecture(None if amd else torch.cuda.get_device_capability(device), amd)
