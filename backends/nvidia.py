"""CUDA compiled with or without a GPU: by nvcc, or by NVRTC, a library that comes with torch, and what a kernel takes.

ptx(text, "sm_90")          the assembly of CUDA source
assembled(ptx, "sm_90")     its machine code, and the registers, spilled bytes and shared memory of each kernel
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tttc.backends.target import Resources, Target

SECONDS = 600  # for one run of a compiler


class ToolkitMissing(Exception):
    """What would compile CUDA is not there, or failed."""


def nvcc() -> str | None:
    """The path of nvcc."""
    return _tool("nvcc")


def ptxas(target: str = "") -> str | None:
    """The path of the assembler: of CUDA, or the one that triton brings. From sm_100 on triton writes PTX for one of
    its own, which may be of a later CUDA than the other.
    """
    newest = target and Target(target).capability >= 100 and _of_triton("ptxas-blackwell")
    return newest or _tool("ptxas") or _of_triton("ptxas")


def _of_triton(name: str) -> str | None:
    spec = find_spec("triton")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    files = (Path(folder) / "backends" / "nvidia" / "bin" / name for folder in folders)
    return next((str(file) for file in files if file.exists()), None)


def missing() -> list[str]:
    """Why CUDA cannot be compiled here; empty when it can."""
    found = []
    if nvcc() is None and not list(_nvrtc_libraries()):
        found.append("there is neither nvcc (the CUDA toolkit) nor NVRTC (pip install nvidia-cuda-nvrtc)")
    return [*found, *missing_assembler()]


def missing_assembler() -> list[str]:
    """Why PTX cannot be assembled here."""
    return [] if ptxas() else ["there is no ptxas: it comes with the CUDA toolkit, and with triton"]


def ptx(text: str, target: str) -> str:
    """CUDA source as PTX for a target such as sm_90."""
    tool = nvcc()
    if tool is None:
        return nvrtc_ptx(text, target)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.ptx"
        source.write_text(text, encoding="utf-8")
        _run([tool, "-std=c++17", f"-arch={Target(target).virtual}", "-ptx", "-o", str(made), str(source)])
        return made.read_text(encoding="utf-8")


def assembled(text: str, target: str, seconds: float = SECONDS) -> tuple[bytes, list[Resources]]:
    """PTX as a cubin, and what its kernels take; shared memory that a launch asks for is not in that."""
    tool = ptxas(target)
    if tool is None:
        raise ToolkitMissing(missing_assembler()[0])
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text, encoding="utf-8")
        said = _run([tool, f"-arch={target}", "-v", "-o", str(made), str(source)], seconds)
        return made.read_bytes(), report(said, target)


def report(said: str, target: str) -> list[Resources]:
    """What `ptxas -v` says of each kernel."""
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        name = re.match(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert name is not None, part
        assert registers is not None, part
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", part))
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(Resources(name[1], target, int(registers[1]), spilled, int(shared[1]) if shared else 0))
    return found


def _run(command: list[str], seconds: float = SECONDS) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise ToolkitMissing(f"{Path(command[0]).name} failed:\n{(done.stderr or done.stdout).strip()[:2000]}")
    return done.stdout + done.stderr


def _tool(name: str) -> str | None:
    homes = [os.environ[n] for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    return shutil.which(name, path=os.pathsep.join([*(f"{h}/bin" for h in homes), os.environ.get("PATH", "")]))


# -- NVRTC -------------------------------------------------------------------------------------------------------------


def nvrtc_ptx(text: str, target: str) -> str:
    """The same by NVRTC, which needs no other program."""
    library = _nvrtc()
    program = ctypes.c_void_p()
    _checked(library, library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None))
    try:
        options = ["-std=c++17", f"-arch={Target(target).virtual}", *(f"-I{f}" for f in _include_folders())]
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            raise ToolkitMissing(f"NVRTC failed:\n{_text(library, program, 'ProgramLog').strip()[:2000]}")
        return _text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _checked(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _checked(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode(errors="replace")


def _checked(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise ToolkitMissing(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")


@cache
def _nvrtc() -> ctypes.CDLL:
    for path in _nvrtc_libraries():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise ToolkitMissing(missing()[0] if missing() else "NVRTC cannot be loaded")


def _nvrtc_libraries() -> Iterator[str]:
    """Where NVRTC may be: among the packages that torch brings, or in a CUDA toolkit."""
    for folder in _folders():
        for place in ("lib", "lib64"):
            yield from (str(f) for f in sorted((folder / place).glob("libnvrtc.so*")))


def _include_folders() -> list[str]:
    """Where the headers of half precision and of tensor cores may be; source in float32 includes nothing."""
    return [str(f / "include") for f in _folders() if (f / "include" / "cuda_fp16.h").exists()]


def _folders() -> list[Path]:
    """Toolkits: given by the environment, the nvidia packages of Python, the one that nvcc is from, the usual place."""
    found = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if n in os.environ]
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        found += sorted(f for f in Path(root).iterdir() if f.is_dir())
    return [f for f in dict.fromkeys([*found, Path("/usr/local/cuda")]) if f.is_dir()]
