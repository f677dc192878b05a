"""Scans of a program as callables: kernels for the GPU that is there, compiled when first called."""

from __future__ import annotations

from dataclasses import replace

import torch

from tttc.backends import nvidia
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.target import Resources
from tttc.backends.tvm_cuda.device import of_place
from tttc.backends.tvm_cuda.kernel_text import CudaSource
from tttc.backends.tvm_cuda.scan import CudaScan
from tttc.ir.program import AdjointProgram


def load_scans(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, CudaScan]:
    """Every scan of a program of the adjoint stage, for the GPU that is there; compiled when first called."""
    device = of_place(place)
    return {scan.name: CudaScan(scan, program, device) for scan in program.scans}


def here() -> str:
    """What it does on this machine."""
    found = unavailable(torch.device("cuda"))
    return found[0] if found else "native kernels for this GPU"


def unavailable(device: torch.device) -> list[str]:
    """Why nothing can run on this device."""
    if device.type != "cuda":
        return [f"it runs on a CPU or an NVIDIA GPU, not on {device}"]
    if torch.version.cuda is None or not torch.cuda.is_available():
        return [f"torch finds no NVIDIA GPU for {device}; `tttc compile --target sm_90` compiles without one"]
    return []


def compiled(source: CudaSource, target: str) -> tuple[str, bytes, Resources]:
    """A kernel as PTX and as machine code for a target such as sm_90, and what it takes of it."""
    text = nvidia.ptx(source.text, target)
    cubin, (found,) = nvidia.assembled(text, target)
    return text, cubin, replace(found, shared=found.shared + source.shared)
