"""One kernel compiled from plain data. Run as a script it is a process in which Triton compiles, whatever it does in
the one that started it: an order comes in on stdin as JSON, and what Triton made of it goes out on stdout.

It imports Triton alone, so that a process for each kernel costs half a second.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERATED = runpy.run_path(str(Path(__file__).parents[1] / "generated.py"))["module"]
TEXTS = ("ptx", "amdgcn")
TRITON_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int32": "int32", "int64": "int64"}


def compiled(order: Mapping[str, Any], function: Any) -> Any:
    """What Triton makes of a function for a target."""
    import triton

    source, place = asked(order, function)
    return triton.compile(source, target=place, options=dict(order["options"]))


def asked(order: Mapping[str, Any], function: Any) -> tuple[Any, Any]:
    """What is to be compiled, and for what, in Triton's own terms."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = order["signature"]
    attributes = {(list(signature).index(n),): x for n, x in order["attributes"].items()}
    constants = {
        n: getattr(triton.language, TRITON_DTYPES[x]) if isinstance(x, str) else x
        for n, x in order["constants"].items()
    }
    source = ASTSource(function, dict(signature), constants, attributes)
    return source, GPUTarget(*order["driver"])


def function_of(order: Mapping[str, Any]) -> Any:
    """The kernel, from the text of its file. Triton reads it again, from the lines that Python keeps for tracebacks."""
    module = GENERATED(order["source"], order["module"], order["file"])
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
