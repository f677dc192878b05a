"""Kernels compiled by LLVM and linked to shared libraries, and what runs these."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tttc.backends.garbage import gc_paused
from tttc.backends.tvm_common.tir import compiled, imported_tvm, set_up
from tttc.backends.tvm_cpu.kernels import CPUKernel
from tttc.backends.tvm_cpu.machine import host


def build(kernel: CPUKernel) -> Any:
    """A library of one kernel, in memory."""
    return compiled(kernel.function, host(kernel.machine.dtype).target())


def link(library: Any, path: Path) -> None:
    """A shared library, by the linker of the machine."""
    object_file = path.with_suffix(".o")
    library.mod.write_to_file(str(object_file))
    try:
        subprocess.run(["cc", "-shared", "-o", str(path), str(object_file)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"cc could not link a kernel: {error.stderr.decode(errors='replace').strip()}") from error


@cache
@gc_paused()
def loader() -> Callable[[str], Any]:
    """What loads a library: TVM where it is imported already, otherwise its runtime alone, which takes no time."""
    if "tvm" in sys.modules:
        return imported_tvm().runtime.load_module
    set_up()
    spec = find_spec("tvm")
    assert spec is not None
    assert spec.submodule_search_locations
    import tvm_ffi

    ctypes.CDLL(
        str(Path(next(iter(spec.submodule_search_locations))) / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL
    )
    return tvm_ffi.load_module


@cache
def _pool() -> Callable[..., None]:
    import tvm_ffi

    return tvm_ffi.get_global_func("runtime.config_threadpool")


_threads: list[int] = []


def use_threads(n: int) -> None:
    """As many as torch uses."""
    if _threads != [n]:
        _pool()(1, n)
        _threads[:] = [n]
