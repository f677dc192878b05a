"""These kernels for a GPU that need not be there: CUDA source, and what NVIDIA's compilers make of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tttc.backends import nvidia
from tttc.backends.interface import Built
from tttc.backends.target import Target
from tttc.backends.tvm_common.scan import stored_tokens
from tttc.backends.tvm_cuda.device import gpu
from tttc.backends.tvm_cuda.emit import refusals
from tttc.backends.tvm_cuda.load import compiled
from tttc.backends.tvm_cuda.scan import CudaScan
from tttc.ir.program import AdjointProgram, ScanProgram


def unbuildable(program: ScanProgram, target: str) -> list[str]:
    """Why nothing can be compiled for a target here."""
    return [*refusals(program), *nvidia.missing()]


def build(program: AdjointProgram, target: str, dtype: torch.dtype) -> Iterator[Built]:
    """The forward and the backward of every scan, through TensorIR."""
    device = gpu(str(dtype).removeprefix("torch."), Target(target))
    for scan in program.scans:
        stored = stored_tokens(scan, dtype)
        for backward in (False, True) if scan.differentiated else (False,):
            source = CudaScan(scan, program, device).source(backward, stored)
            ptx, cubin, resources = compiled(source, target)
            texts = {".cu": source.text, ".ptx": ptx, ".json": source.to_json()}
            files = {suffix: text.encode() for suffix, text in texts.items()}
            yield Built(resources, files | {".cubin": cubin}, source.outside)
