"""Kernels for a GPU as source that needs nothing else: TVM writes it, and here it becomes a file of its own.

    __shared__ alignas(64) float W_ptr[4160];        float* W = (float*)(shared + 0);
    alignas(64) float total_ptr[1];            ->    float total;
    COMMENT("tile x1[t, D] = ...");                  // tile x1[t, D] = ...

What lies in shared memory has the places that smem.py chose.
"""

from __future__ import annotations

import re

from tttc.backends.tvm_common.tir import compiled
from tttc.backends.tvm_cuda.kernel_text import CudaSource
from tttc.backends.tvm_cuda.kernels import CudaKernel

# Where the threads meet is written down. This pass looks for more places, and fails if one is in a condition.
WITHOUT = ("s_tir.ThreadSync", "tirx.ThreadSync")
HEADERS = {"nv_bfloat16": "cuda_bf16.h", "half": "cuda_fp16.h", "nvcuda::wmma": "mma.h"}


def source(kernel: CudaKernel) -> CudaSource:
    """The text of a kernel."""
    text = compiled(kernel.function, kernel.device.target(), WITHOUT).mod.imports[0].inspect_source()
    text = text[text.rindex('extern "C" __global__') :].rstrip() + "\n"
    text = _placed(text, kernel)
    for change in (_plain_numbers, _plain_names, _commented):
        text = change(text)
    threads, together = kernel.device.threads, _together(kernel)
    text = text.replace(f"__launch_bounds__({threads})", f"__launch_bounds__({threads}, {together})", 1)
    headers = [f"#include <{file}>" for word, file in HEADERS.items() if re.search(rf"\b{word}\b", text)]
    text = "\n".join([*headers, ""] if headers else []) + text
    return CudaSource(
        f"{kernel.name}_kernel",
        text,
        _parameters(text, kernel),
        kernel.device.threads,
        kernel.layout.size,
        dict(kernel.workspaces),
    )


def _together(kernel: CudaKernel) -> int:
    """Blocks that share a processor: one where memory has room for no more, or else two, with half of the registers.
    The assembler does not know, and would save registers, by spilling them, for blocks that never come.
    """
    return 2 if kernel.layout.size * 2 <= kernel.device.shared else 1


def _placed(text: str, kernel: CudaKernel) -> str:
    """Shared memory as one array, of which each value has the part that was chosen for it."""

    def place(found: re.Match[str]) -> str:
        indent, dtype, name = found.groups()
        offset = kernel.layout.offsets[kernel.words.identities[name.removesuffix("_ptr")]]
        return f"{indent}{dtype}* {name} = ({dtype}*)(shared + {offset});"

    text, n = re.subn(r"^( *)__shared__ alignas\(\d+\) ([\w:]+) (\w+)\[\d+\];", place, text, flags=re.MULTILINE)
    if n:
        begin = text.index("{\n") + 2
        text = f"{text[:begin]}  extern __shared__ __align__(128) unsigned char shared[];\n{text[begin:]}"
    return text


def _plain_numbers(text: str) -> str:
    """Variables of one number as such, not as arrays, and with their first value; constants as decimals."""
    text = re.sub(r"alignas\(\d+\) (\w+ \w+\[\d+\];)", r"\1", text)
    single = set(re.findall(r"^ *\w+ (\w+)\[1\];", text, flags=re.MULTILINE))
    text = re.sub(r"\b(\w+)\[[01]\]", lambda m: m[1] if m[1] in single else m[0], text)
    text = re.sub(r"^( *\w+ (\w+));\n *\2 = ", r"\1 = ", text, flags=re.MULTILINE)
    text = re.sub(r"(-?0x[0-9a-f.]+p[+-]\d+)(f?)/\*[^*]*\*/", lambda m: f"{float.fromhex(m[1])!r}{m[2]}", text)
    text = text.replace("(uint)4294967295", "0xffffffffu")
    text = re.sub(r"\(\(int\)threadIdx\.x\)", "thread", re.sub(r"\(\(int\)blockIdx\.x\)", "block", text))
    return text.replace("{\n", "{\n  const int block = blockIdx.x, thread = threadIdx.x;\n", 1)


def _plain_names(text: str) -> str:
    """Names without what TVM appends, where nothing else has them; loops count with i_1, i_2, ..."""
    loops = {name: f"i_{n}" for n, name in enumerate(re.findall(r"for \(int (v(?:_\d+)?) = ", text), 1)}
    lines = text.split("\n")
    for n, line in enumerate(lines):
        if "COMMENT" not in line:
            lines[n] = re.sub(r"\bv(?:_\d+)?\b", lambda m: loops.get(m[0], m[0]), line)
    text = "\n".join(lines)
    used = {w for line in lines if "COMMENT" not in line for w in re.findall(r"(?<!\.)\b\w+", line)}
    given: dict[str, str] = {}
    for name in sorted(n for n in used if re.fullmatch(r"\w+_ptr(_\d+)?", n)):
        plain = re.sub(r"_ptr((?:_\d+)?)$", r"\1", name)
        if plain not in used:
            used.add(plain)
            given[name] = plain
    return re.sub(r"\b\w+_ptr(?:_\d+)?\b", lambda m: given.get(m[0], m[0]), text)


def _commented(text: str) -> str:
    return re.sub(r'^( *)COMMENT\("(.*)"\);$', r"\1// \2", text, flags=re.MULTILINE)


def _parameters(text: str, kernel: CudaKernel) -> tuple[tuple[str, str], ...]:
    """The parameters of the kernel in order: their names as the program has them, and of what they are."""
    found = re.search(r"__launch_bounds__\([\d, ]+\) \w+\((.*?)\)", text, re.DOTALL)
    assert found is not None
    kinds = {"float": "float32", "double": "float64", "nv_bfloat16": "bfloat16", "half": "float16", "int": "int"}
    made = []
    for parameter in found.group(1).split(","):
        kind, name = re.sub(r"\b__restrict__\b|\*|\bconst\b", " ", parameter).split()
        made.append((kernel.words.identities[name.removesuffix("_ptr")], kinds[kind]))
    return tuple(made)
