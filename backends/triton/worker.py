"""One kernel compiled from plain data. Run as a script it is a process in which Triton compiles, whatever it does in
the one that started it: an order comes in on stdin as JSON, and what Triton made of it goes out on stdout.

It imports Triton alone, so that a process for each kernel costs half a second.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

DIVISIBLE = [["tt.divisibility", 16]]  # what a launch finds of pointers and of most distances
WIDEST_WARP = 64  # threads, on AMD's GPUs
TEXTS = ("ptx", "amdgcn")
OPERANDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def compiled(order: Mapping[str, Any], function: Any) -> Any:
    """What Triton makes of a function for a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, signature = order["target"], order["signature"]
    divisible = {(i,): DIVISIBLE for i, name in enumerate(signature) if name in order["divisible"]}
    operand = getattr(triton.language, OPERANDS[order["operand"]])
    constants = {"operand": operand, "index": triton.language.int32}
    source = ASTSource(function, dict(signature), constants, divisible)
    amd = target.startswith("gfx")
    place = GPUTarget("hip", target, WIDEST_WARP) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=place, options=dict(order["options"]))


def function_of(order: Mapping[str, Any]) -> Any:
    """The kernel, from the text of its file. Triton reads it again, from the lines that Python keeps for tracebacks."""
    text, name = order["source"], "<generated>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = ModuleType("generated")
    module.__file__ = name
    exec(compile(text, name, "exec"), module.__dict__)
    return getattr(module, order["kernel"])


def main() -> None:
    """Answer one order. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.load(sys.stdin)
    made = compiled(order, function_of(order))
    texts = {n: made.asm[n] for n in TEXTS if n in made.asm}
    json.dump({"name": made.metadata.name, "shared": made.metadata.shared, "texts": texts}, answers)
    answers.close()


if __name__ == "__main__":
    main()
