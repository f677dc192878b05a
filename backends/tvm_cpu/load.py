"""Scans of a program as callables: kernels for this CPU, compiled when first called."""

from __future__ import annotations

import shutil

import torch

from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.tvm_cpu.machine import TileConfig
from tttc.backends.tvm_cpu.tiled import StripScan
from tttc.ir.program import AdjointProgram


def unavailable(device: torch.device) -> list[str]:
    """It runs on any CPU that LLVM knows."""
    return []


def here() -> str:
    """What it does on this machine."""
    linked = shutil.which("cc") is not None
    return "native kernels for this CPU" + ("" if linked else "; without `cc` they are compiled again in every process")


def load_scans(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, StripScan]:
    """Every scan of a program of the adjoint stage; nothing is compiled before it is called."""
    config = TileConfig(**(settings or {}))
    return {scan.name: StripScan(scan, program, config) for scan in program.scans}
