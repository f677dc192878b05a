"""Generated kernels compiled for a GPU that need not be there, and what they take of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tttc.backends import nvidia
from tttc.backends.triton.emit import Tensor, tensors
from tttc.backends.triton.tune import Config
from tttc.ir.program import Scan, cotangent

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIVISIBLE = [["tt.divisibility", 16]]  # what a launch finds of pointers and of most distances


def compiled(kernel: Any, scan: Scan, backward: bool, dtype: torch.dtype, target: str, config: Config) -> Any:
    """A kernel compiled for a target such as sm_90 or gfx942, with tokens of `dtype`: what Triton makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = tensors(scan, backward)
    signature: dict[str, str] = {}
    for t in found:
        signature[f"{t.name}_ptr"] = f"*{TYPES[_stored(t, scan, dtype)]}"
        signature |= dict.fromkeys(t.strides, "i32")
    signature |= dict.fromkeys(["H", *(["T", "every", "groups"] if scan.loops else [])], "i32")
    divisible = [n for n in signature if n.endswith("_ptr") or n.endswith(("_b", "_h", "_t"))]
    attributes = {(list(signature).index(n),): DIVISIBLE for n in divisible}
    signature["operand"] = "constexpr"
    operand = {"fp32": triton.language.float32, "bf16": triton.language.bfloat16, "fp16": triton.language.float16}
    source = ASTSource(kernel, signature, {"operand": operand[TYPES[dtype]]}, attributes)
    hip = target.startswith("gfx")
    place = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=place, options=options(config))


def options(config: Config) -> Mapping[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def resources(made: Any, target: str) -> nvidia.Resources:
    """Registers, spilled bytes and shared memory, by the assembler."""
    _, (found,) = nvidia.assembled(made.asm["ptx"], f"{target}a" if target == "sm_90" else target)
    return nvidia.Resources(found.kernel, target, found.registers, found.spilled, made.metadata.shared)


def _stored(t: Tensor, scan: Scan, dtype: torch.dtype) -> torch.dtype:
    """Tokens and outputs are of the dtype of the layer, and so are their cotangents; all else is float32."""
    tokens = [p for p in scan.params if p.arg[0].role == "token"] + [a.target for a in scan.outputs]
    of = {str(p.arg[0].name) for p in (*tokens, *map(cotangent, tokens))}
    return dtype if str(t.of.arg[0].name) in of else torch.float32


__all__ = ["compiled", "options", "resources"]
