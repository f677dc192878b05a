"""Generated kernels compiled for a GPU that need not be there, and what they take of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tttc.backends import nvidia
from tttc.backends.interface import Built
from tttc.backends.target import Target
from tttc.backends.triton import compile_worker as worker
from tttc.backends.triton import llvm_flags as llvm_flags
from tttc.backends.triton.emit import emit_source, refusals
from tttc.backends.triton.kernel_spec import Holds, KernelSpec, spec_of, unfused
from tttc.backends.triton.kernel_writer import rounded
from tttc.backends.triton.load import Module, interpreted
from tttc.backends.triton.resources import resources
from tttc.backends.triton.tune import Config, bounded, default_config
from tttc.ir.expr import Expr
from tttc.ir.program import AdjointProgram, Scan, ScanProgram, cotangent

DIVISIBLE = [["tt.divisibility", 16]]  # what a launch finds of pointers and of most distances
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def unbuildable(program: ScanProgram, target: str) -> list[str]:
    """Why nothing can be compiled for a target here."""
    return [*refusals(program), *(nvidia.missing_assembler() if Target(target).nvidia else [])]


def build(
    program: AdjointProgram, target: str, dtype: torch.dtype, scans: Sequence[Scan] | None = None
) -> Iterator[Built]:
    """The kernels of every fused scan, or of these, for a target such as sm_90 or gfx942, with tokens of `dtype`, each
    with the warps that leave the least outside its registers.
    """
    if interpreted():
        raise nvidia.ToolkitMissing("Triton interprets here and compiles nothing.\n  Unset TRITON_INTERPRET.")
    source = emit_source(program)
    module = Module(source, program.name)
    for scan in program.scans if scans is None else scans:
        if unfused(scan, program):
            continue
        spec = spec_of(scan, program)
        for backward in (False, True) if scan.differentiated else (False,):
            made = compiled(module, spec, backward, dtype, target, default_config(spec, backward))
            texts = {f".{n}": made.asm[n] for n in ("ttir", "ttgir", "ptx", "amdgcn") if n in made.asm}
            files = {n: text.encode() for n, text in ({".py": source.text} | texts).items()}
            binaries = {f".{n}": made.asm[n] for n in ("cubin", "hsaco") if n in made.asm}
            yield Built(resources(made.asm, made.metadata.name, made.metadata.shared, target), files | binaries)


def compiled(module: Module, spec: KernelSpec, backward: bool, dtype: torch.dtype, target: str, config: Config) -> Any:
    """A kernel compiled for a target: what Triton makes of it."""
    order = order_of(module, spec, backward, dtype, target, config)
    try:
        source, place = worker.asked(order, module.kernel(spec.scan, backward))
        return llvm_flags.compiled(order, source, place, order["options"])
    except Exception as error:  # whatever is wrong in a compiler, and there are several one after the other
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise nvidia.ToolkitMissing(
            f"Triton could not compile {order['kernel']} for {target}: {said}\n"
            '  Try another chunk or other warps, tttc.compile(chunk=16, config={"num_warps": 16}),\n'
            "  or another release of Triton."
        ) from error


def order_of(
    module: Module, spec: KernelSpec, backward: bool, dtype: torch.dtype, target: str, config: Config
) -> dict[str, Any]:
    """All that has to be known to compile a kernel, as plain data: its source, and what a launch would tell of it."""
    signature: dict[str, str] = {}
    scan, words = spec.scan, module.variables(spec.scan, backward)
    short = rounded(spec) if backward and scan.loops else set()
    for t in spec.tensors(backward):
        work = t.holds is Holds.WORK and t.of.name in short
        full = torch.float32 if t.parts else stored(t.of, scan, dtype)  # what is still to be added up is not rounded
        signature[words[t.pointer]] = f"*{TYPES[dtype if work else full]}"
        signature |= dict.fromkeys((words[n] for n in t.strides), "i32")
    sizes, strides = spec.unspecialized(backward)
    plain = {*sizes, *(words[n] for n in strides)}
    attributes = {name: DIVISIBLE for name in signature if name not in plain}
    signature |= dict.fromkeys(["H", *(["T", "every", "groups"] if scan.loops else [])], "i32")
    signature |= {"operand": "constexpr", "index": "constexpr"}
    return {
        **module.about(module.word(scan, backward)),
        "signature": signature,
        "constants": {"operand": TYPES[dtype], "index": "int32"},
        "attributes": attributes,
        "target": target,
        "driver": Target(target).driver,
        "options": bounded(config.options, target),
    }


def stored(of: Expr, scan: Scan, dtype: torch.dtype) -> torch.dtype:
    """Tokens and outputs are of the dtype of the layer, and so are their cotangents; all else is float32."""
    tokens = [p for p in scan.params if p.role == "token"] + [a.target for a in scan.outputs]
    found = {p.name for p in (*tokens, *map(cotangent, tokens))}
    return dtype if of.name in found else torch.float32
