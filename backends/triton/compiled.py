"""Generated kernels compiled for a GPU that need not be there, and what they take of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tttc.backends import nvidia
from tttc.backends.triton.emit import emit, rounded
from tttc.backends.triton.forms import Form, Tensor, form_of, unfused
from tttc.backends.triton.load import Module, interpreted
from tttc.backends.triton.tune import Config, default_config
from tttc.ir.program import Program, Scan, cotangent

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIVISIBLE = [["tt.divisibility", 16]]  # what a launch finds of pointers and of most distances
WIDEST_WARP = 64  # threads, on AMD's GPUs


@dataclass(frozen=True)
class Compiled:
    """One kernel: what it takes, and its texts and machine code by suffix."""

    resources: nvidia.Resources
    files: Mapping[str, bytes]


def compiled_scans(
    program: Program, target: str, dtype: torch.dtype, scans: Sequence[Scan] | None = None
) -> Iterator[Compiled]:
    """The kernels of every fused scan, or of these, for a target such as sm_90 or gfx942, with tokens of `dtype`."""
    if interpreted():
        raise nvidia.ToolkitMissing("Triton interprets here and compiles nothing.\n  Unset TRITON_INTERPRET.")
    source = emit(program)
    module = Module(source, program.name)
    for scan in program.scans if scans is None else scans:
        if unfused(scan, program):
            continue
        form = form_of(scan, program)
        for backward in (False, True) if scan.differentiated else (False,):
            made = compiled(module, form, backward, dtype, target, default_config(form, backward))
            texts = {f".{n}": made.asm[n] for n in ("ttir", "ttgir", "ptx", "amdgcn") if n in made.asm}
            files = {n: text.encode() for n, text in ({".py": source.text} | texts).items()}
            binaries = {f".{n}": made.asm[n] for n in ("cubin", "hsaco") if n in made.asm}
            yield Compiled(resources(made, target), files | binaries)


def compiled(module: Module, form: Form, backward: bool, dtype: torch.dtype, target: str, config: Config) -> Any:
    """A kernel compiled for a target: what Triton makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    scan = form.scan
    short = rounded(form) if backward and scan.loops else set()
    for t in form.tensors(backward):
        work = t.name.endswith("_work") and str(t.of.arg[0].name) in short
        signature[f"{t.name}_ptr"] = f"*{TYPES[dtype if work else _stored(t, scan, dtype)]}"
        signature |= dict.fromkeys(t.strides, "i32")
    plain = form.unspecialized(backward)
    divisible = {(i,): DIVISIBLE for i, name in enumerate(signature) if name not in plain}
    signature |= dict.fromkeys(["H", *(["T", "every", "groups"] if scan.loops else [])], "i32")
    signature |= {"operand": "constexpr", "index": "constexpr"}
    operand = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "fp16": triton.language.float16}
    constants = {"operand": operand[TYPES[dtype]], "index": triton.language.int32}
    source = ASTSource(module.kernel(scan, backward), signature, constants, divisible)
    amd = target.startswith("gfx")
    place = GPUTarget("hip", target, WIDEST_WARP) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=place, options=dict(config.options))


def resources(made: Any, target: str) -> nvidia.Resources:
    """Registers, spilled bytes and shared memory, as the assembler says."""
    if "ptx" in made.asm:
        _, (found,) = nvidia.assembled(made.asm["ptx"], _architecture(made.asm["ptx"]))
        return nvidia.Resources(found.kernel, target, found.registers, found.spilled, made.metadata.shared)
    text = made.asm["amdgcn"]
    registers, spilled = (re.search(rf"\.{n}:\s+(\d+)", text) for n in ("vgpr_count", "vgpr_spill_count"))
    bytes_spilled = None if spilled is None else 4 * int(spilled[1])
    return nvidia.Resources(
        made.metadata.name, target, int(registers[1]) if registers else None, bytes_spilled, made.metadata.shared
    )


def _architecture(ptx: str) -> str:
    """The architecture that PTX is for: sm_90a has instructions that sm_90 has not."""
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    return found[1]


def _stored(t: Tensor, scan: Scan, dtype: torch.dtype) -> torch.dtype:
    """Tokens and outputs are of the dtype of the layer, and so are their cotangents; all else is float32, also what is
    still to be added up.
    """
    if t.parts:
        return torch.float32
    tokens = [p for p in scan.params if p.arg[0].role == "token"] + [a.target for a in scan.outputs]
    of = {str(p.arg[0].name) for p in (*tokens, *map(cotangent, tokens))}
    return dtype if str(t.of.arg[0].name) in of else torch.float32


__all__ = ["Compiled", "compiled", "compiled_scans", "resources"]
