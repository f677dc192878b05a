"""Generated CUDA executed on the CPU: compiled by g++ against cuda_shim.h, its threads as fibers."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SHIM = Path(__file__).with_name("cuda_shim.h")
C_TYPES = {"float32": "float*", "float64": "double*", "bfloat16": "nv_bfloat16*", "float16": "half*", "int": "int"}


class Emulator:
    """Launches kernels as a GPU would, with its threads in order or in reverse."""

    def __init__(self, folder: Path, *, reverse: bool = False) -> None:
        self.folder, self.reverse = folder, reverse
        self.launches = 0

    def __call__(self, source: Any, blocks: int, arguments: Mapping[str, torch.Tensor | int]) -> None:
        pointers = (ctypes.c_void_p * len(source.parameters))()
        alive = []
        for i, (name, kind) in enumerate(source.parameters):
            x = arguments[name]
            if kind == "int":
                assert isinstance(x, int), name
                box: Any = ctypes.c_int(x)
            else:
                assert isinstance(x, torch.Tensor), name
                assert str(x.dtype) == f"torch.{kind}", (name, x.dtype, kind)
                box = ctypes.c_void_p(x.data_ptr())
            alive.append(box)
            pointers[i] = ctypes.cast(ctypes.byref(box), ctypes.c_void_p)
        line = self._library(source).emulate(blocks, source.threads, source.shared, int(self.reverse), pointers)
        assert line == 0, f"{source.name}: threads wait for each other in different places, one at line {line}"
        self.launches += 1

    def _library(self, source: Any) -> ctypes.CDLL:
        path = self.folder / f"{hashlib.sha256(source.text.encode()).hexdigest()[:24]}.so"
        if not path.exists():
            given = ", ".join(f"*({C_TYPES[kind]}*)a[{i}]" for i, (_, kind) in enumerate(source.parameters))
            body = "\n".join(x for x in source.text.split("\n") if not x.startswith("#include"))
            file = path.with_suffix(".cpp")
            file.write_text(
                f'#include "{SHIM}"\n#line 1 "{source.name}"\n{body}\n'
                f"static void call(void** a) {{ {source.name}({given}); }}\n"
                'extern "C" int emulate(int blocks, int threads, int bytes, int reversed, void** a) {\n'
                "  return shim::run(call, a, blocks, threads, bytes, reversed);\n}\n"
            )
            command = ["g++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
            made = path.with_suffix(".part")
            done = subprocess.run([*command, "-o", made, file], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            made.rename(path)
        return ctypes.CDLL(str(path))
