"""Kernels for a GPU that need not be there: their source, their machine code, and what they take of the GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tttc.backends import nvidia
from tttc.backends import triton as triton_backend
from tttc.backends import tvm_cpu as tvm_backend
from tttc.backends.triton.aot import compiled_scans
from tttc.backends.tvm_cpu.load import stored_tokens
from tttc.backends.tvm_cuda.device import gpu
from tttc.backends.tvm_cuda.load import DTYPES, CudaScan, compiled
from tttc.compiler.driver import program_for
from tttc.declare.variant import Variant
from tttc.errors import BackendRefusal, TTTCError
from tttc.ir.program import Program

OLDEST = {"bfloat16": 80, "float16": 70}  # compute capability with tensor cores for it
TARGET = re.compile(r"sm_(\d{2,3})|gfx[0-9a-f]{3,4}")


@dataclass(frozen=True)
class Built:
    """One kernel: files by suffix, and its resources; `outside` are the bytes per head that do
    not fit on the chip, without those that every token of a call adds, where the kernel says so.
    """

    resources: nvidia.Resources
    files: Mapping[str, bytes]
    outside: int | None = None

    def write(self, folder: Path) -> None:
        """The kernel's name with each suffix: source, assembly, machine code, and how to launch it."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in self.files.items():
            (folder / f"{self.resources.kernel}{suffix}").write_bytes(content)


Builder = Callable[[Program, str, torch.dtype], Iterator[Built]]


def with_tvm(program: Program, target: str, dtype: torch.dtype) -> Iterator[Built]:
    """The forward and the backward of every scan, through TensorIR."""
    device = gpu(DTYPES[dtype], _capability(target))
    for scan in program.scans:
        stored = stored_tokens(scan, dtype)
        for backward in (False, True) if scan.differentiated else (False,):
            source = CudaScan(scan, program, device).source(backward, stored)
            ptx, cubin, resources = compiled(source, target)
            texts = {".cu": source.text, ".ptx": ptx, ".json": source.to_json()}
            files = {suffix: text.encode() for suffix, text in texts.items()}
            yield Built(resources, files | {".cubin": cubin}, source.outside)


def with_triton(program: Program, target: str, dtype: torch.dtype) -> Iterator[Built]:
    """The same through Triton, each with the warps that leave the least outside its registers."""
    for found in compiled_scans(program, target, dtype):
        yield Built(found.resources, found.files)


def missing_for(backend: str, target: str, program: Program) -> list[str]:
    """Why a backend cannot compile the program for a target here."""
    if backend == "tvm":
        return [*tvm_backend.refusals(program), *nvidia.missing()]
    found = [*triton_backend.refusals(program), *triton_backend.missing()]
    return [*found, *nvidia.missing_assembler()] if target.startswith("sm_") else found


BUILDERS: dict[str, Builder] = {"triton": with_triton, "tvm": with_tvm}


def compile_for(
    variant: type[Variant],
    dims: Mapping[str, int],
    target: str,
    dtype: str = "float32",
    backend: str = "triton",
) -> Iterator[Built]:
    """The kernels of a variant for a target such as sm_90 or gfx942, one by one.

    Raises:
        TTTCError: if there is no such target, dtype or backend, or nothing that could compile for it.
    """
    if TARGET.fullmatch(target) is None:
        raise TTTCError(
            f"there is no target {target!r}.\n"
            "  Name a compute capability, such as sm_80 or sm_90, or an AMD GPU, such as gfx942."
        )
    names = {name: d for d, name in DTYPES.items()}
    if dtype not in names:
        raise TTTCError(f"there is no dtype {dtype!r}.\n  There are {', '.join(names)}.")
    if target.startswith("sm_") and _capability(target) < OLDEST.get(dtype, 0):
        raise TTTCError(f"{target} has no tensor cores for {dtype}.\n  Use sm_{OLDEST[dtype]} or newer, or float32.")
    if backend not in BUILDERS:
        raise TTTCError(f"backend {backend!r} compiles for no GPU.\n  There are {', '.join(BUILDERS)}.")
    if backend == "tvm" and not target.startswith("sm_"):
        raise TTTCError(f"backend 'tvm' compiles for NVIDIA GPUs, not for {target}.\n  Use --backend triton.")
    program = program_for(variant, dims, backend)
    if reasons := missing_for(backend, target, program):
        listed = "\n".join(f"  - {r}" for r in reasons)
        raise BackendRefusal(f"cannot compile for {target} here:\n{listed}")
    try:
        yield from BUILDERS[backend](program, target, names[dtype])
    except nvidia.ToolkitMissing as error:
        raise TTTCError(str(error)) from error


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


__all__ = ["Built", "compile_for"]
