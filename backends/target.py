"""GPUs that kernels are made for without one present: what a multiprocessor holds, and what the whole GPU reaches.

    architecture((9, 0))                             "sm_90"
    architecture(None, "gfx942:sramecc+:xnack-")     "gfx942"
    GPUS["sm_90"].resident(128 registers, 32768 bytes, 4 warps)     4 programs at once on a multiprocessor

Limits are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute Capability") and, for AMD, of
ROCm's table of GPUs and LLVM's occupancy for the target. Rates are the vendors' own for one product of each: A100 SXM
80 GB, H100 SXM, B200 and MI300X; dense, and never quite reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tttc.backends.nvidia import Resources

SCHEDULERS = 4  # of a multiprocessor: fewer warps than that leave some of it idle
GRANULE = 8  # registers of a thread are given out by so many
RESERVED = 1024  # bytes of shared memory that NVIDIA's driver takes of every program


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
            reserved = RESERVED if self.target.startswith("sm_") else 0
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
    return "" if capability is None else f"sm_{capability[0]}{capability[1]}"


def architecture_of(device: torch.device) -> str:
    """The target of a GPU that is there; "" for what is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    amd = str(torch.cuda.get_device_properties(device).gcnArchName) if torch.version.hip else ""
    return architecture(None if amd else torch.cuda.get_device_capability(device), amd)


__all__ = ["GPU", "GPUS", "architecture", "architecture_of"]
