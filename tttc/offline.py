"""Kernels for a GPU that need not be there: their source, their machine code, and what they take of the GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tttc.api import compile as compile_layer
from tttc.backends import nvidia
from tttc.backends import tvm as tvm_backend
from tttc.backends.tvm.cuda_load import DTYPES, CudaScan, compiled
from tttc.backends.tvm.device import gpu
from tttc.backends.tvm.load import stored_tokens
from tttc.errors import BackendRefusal, TTTCError
from tttc.ir.program import Program
from tttc.variant import Variant

OLDEST = {"bfloat16": 80, "float16": 70}  # compute capability with tensor cores for it


@dataclass(frozen=True)
class Built:
    """One kernel: files by suffix, and its resources; `outside` are the bytes per head that do
    not fit on the chip, without those that every token of a call adds."""

    resources: nvidia.Resources
    files: Mapping[str, bytes]
    outside: int

    def write(self, folder: Path) -> None:
        """name.cu, name.ptx, name.cubin, and name.json, which says how to launch it."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, content in self.files.items():
            (folder / f"{self.resources.kernel}{suffix}").write_bytes(content)


Builder = Callable[[Program, int, torch.dtype], Iterator[Built]]


def with_tvm(program: Program, capability: int, dtype: torch.dtype) -> Iterator[Built]:
    """The forward and the backward of every scan, through TensorIR."""
    device = gpu(DTYPES[dtype], capability)
    for scan in program.scans:
        stored = stored_tokens(scan, dtype)
        for backward in (False, True) if scan.differentiated else (False,):
            source = CudaScan(scan, program, device).source(backward, stored)
            ptx, cubin, resources = compiled(source, f"sm_{capability}")
            texts = {".cu": source.text, ".ptx": ptx, ".json": source.to_json()}
            files = {suffix: text.encode() for suffix, text in texts.items()}
            yield Built(resources, files | {".cubin": cubin}, source.outside)


BUILDERS: dict[str, Builder] = {"tvm": with_tvm}


def compile_for(
    variant: type[Variant], dims: Mapping[str, int], target: str, dtype: str = "float32", backend: str = "tvm"
) -> Iterator[Built]:
    """The kernels of a variant for a target such as sm_90, one by one.

    Raises:
        TTTCError: if there is no such target, dtype or backend, or nothing that could compile for it.
    """
    found = re.fullmatch(r"sm_(\d{2,3})", target)
    if found is None:
        raise TTTCError(f"there is no target {target!r}.\n  Name a compute capability, such as sm_80 or sm_90.")
    capability = int(found[1])
    names = {name: d for d, name in DTYPES.items()}
    if dtype not in names:
        raise TTTCError(f"there is no dtype {dtype!r}.\n  There are {', '.join(names)}.")
    if capability < OLDEST.get(dtype, 0):
        raise TTTCError(f"{target} has no tensor cores for {dtype}.\n  Use sm_{OLDEST[dtype]} or newer, or float32.")
    if backend not in BUILDERS:
        raise TTTCError(f"backend {backend!r} compiles for no GPU.\n  There are {', '.join(BUILDERS)}.")
    program = compile_layer(variant, dims, names[dtype], backend="torch").stages.program
    if reasons := [*tvm_backend.refusals(program), *nvidia.missing()]:
        listed = "\n".join(f"  - {r}" for r in reasons)
        raise BackendRefusal(f"cannot compile for {target} here:\n{listed}")
    try:
        yield from BUILDERS[backend](program, capability, names[dtype])
    except nvidia.ToolkitMissing as error:
        raise TTTCError(str(error)) from error


__all__ = ["Built", "compile_for"]
