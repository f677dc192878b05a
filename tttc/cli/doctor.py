"""What this machine can run, what it cannot, and what would change that: `tttc doctor`.

Packages are looked up, not imported; only torch is, because only it can say which devices it sees.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tttc.backends import registry
from tttc.backends.cache import cache_dir
from tttc.backends.cpu import instruction_sets, processor
from tttc.backends.registry import Package, Unit
from tttc.backends.target import architecture
from tttc.tuning.database import database_path, own_entries
from tttc.tuning.lookup import is_off

INSTRUCTION_SETS = ("avx", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve", "sve2")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `status` is "ok", "absent" (nothing depends on it) or "problem"."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, grouped as they are printed."""

    machine: list[Finding]
    packages: list[Finding]
    backends: list[Finding]

    def groups(self) -> dict[str, list[Finding]]:
        return {"machine": self.machine, "packages": self.packages, "backends": self.backends}

    @property
    def problems(self) -> list[Finding]:
        return [finding for group in self.groups().values() for finding in group if finding.status == "problem"]

    def as_json(self) -> dict[str, Any]:
        """For programs: the groups as lists of records, and whether anything is wrong."""
        groups = {name: [asdict(finding) for finding in group] for name, group in self.groups().items()}
        return {"ok": not self.problems, **groups}


def diagnose() -> Diagnosis:
    """Look at everything once."""
    return Diagnosis(
        machine=[
            Finding("tttc", "ok", version()),
            _python(),
            _processor(),
            *_devices(),
            _compiler(),
            _cache(),
            _tuned(),
        ],
        packages=[
            _torch(),
            *(_package(p) for p in dict.fromkeys(u.package for u in registry.units() if u.package)),
            _package(Package("onnx", "onnx", "pip install 'tttc[onnx]'")),
            _package(Package("onnxruntime", "onnxruntime", "pip install 'tttc[onnx]'")),
        ],
        backends=[
            *(_backend(next(u for u in registry.units() if u.name == n)) for n in registry.names()),
            Finding("onnx", "absent", "not built yet in this version of tttc"),
        ],
    )


def version() -> str:
    """Of tttc itself; a checkout that was never installed has none."""
    try:
        return importlib.metadata.version("tttc")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    known = [flag for flag in INSTRUCTION_SETS if flag in instruction_sets()]
    used = torch.backends.cpu.get_cpu_capability()
    instructions = f"; has {', '.join(known)}" if known else ""
    return Finding("cpu", "ok", f"{processor()}, {_usable_cores()} cores{instructions}; torch uses {used}")


def _usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[Finding]:
    if torch.cuda.is_available():
        return [_device(i) for i in range(torch.cuda.device_count())]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return [_unusable_gpu("an NVIDIA driver", "CUDA", torch.version.cuda)]
    if Path("/dev/kfd").exists():
        return [_unusable_gpu("an AMD GPU driver", "ROCm", torch.version.hip)]
    return [Finding("gpu", "absent", "none that torch can use; everything runs on the CPU")]


def _device(index: int) -> Finding:
    found = torch.cuda.get_device_properties(index)
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    amd = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    shown = amd or architecture((found.major, found.minor))
    memory = found.total_memory / 2**30
    return Finding(f"gpu {index}", "ok", f"{found.name}, {memory:.0f} GiB, {shown}, {toolkit}")


def _unusable_gpu(driver: str, kind: str, build: str | None) -> Finding:
    if build is None:
        remedy = f"install the {kind} build of torch: https://pytorch.org/get-started"
        return Finding(
            "gpu",
            "problem",
            f"{driver} is here, but torch {torch.__version__} is a build without {kind}",
            remedy,
        )
    remedy = f"check that the driver is new enough for {kind} {build} and that this process sees the device"
    return Finding("gpu", "problem", f"{driver} is here, but torch sees no device", remedy)


def _compiler() -> Finding:
    found = cxx_compiler()
    if found:
        return Finding("c++ compiler", "ok", found)
    return Finding("c++ compiler", "absent", "only torch.compile on a CPU needs one", "install g++, or set CXX")


def _backend(unit: Unit) -> Finding:
    if unit.package is not None and unit.missing():
        return Finding(unit.name, "absent", unit.reason, unit.package.install)
    return Finding(unit.name, "ok", unit.backend.here())


def _cache() -> Finding:
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return Finding("cache", "ok", str(folder))
    return Finding("cache", "problem", f"{folder} is not writable", "set TTTC_CACHE_DIR to a folder that is")


def _tuned() -> Finding:
    """The results of `tttc tune`, and whether they are used."""
    path = database_path()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = len(own_entries(path))
    if said:
        return Finding("tuning", "problem", "; ".join(str(w.message) for w in said), "run `tttc tune` again")
    found = f"{count} result{'' if count == 1 else 's'} in {path}"
    if is_off():
        said_so = f"{found}, not used: TTTC_TUNING is {os.environ.get('TTTC_TUNING')}"
        return Finding("tuning", "absent", said_so, "unset TTTC_TUNING")
    return Finding("tuning", "ok", found)


def _torch() -> Finding:
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _folders_of(module: str) -> list[str]:
    spec = importlib.util.find_spec(module)
    return list(spec.submodule_search_locations or []) if spec else []


def _package(package: Package) -> Finding:
    """A package by its metadata; installed but not importable, or without a program that it brings, is a problem."""
    name, module = package.distribution, package.module
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "absent", "not installed", package.install)
    if importlib.util.find_spec(module) is None:
        remedy = package.install
        return Finding(name, "problem", f"{version} is installed, but `import {module}` finds nothing", remedy)
    if package.tool is None:
        return Finding(name, "ok", version)
    path, variable = package.tool
    tool = Path(path).name
    places = [os.environ.get(variable), *(str(Path(folder) / path) for folder in _folders_of(module))]
    if any(p and Path(p).is_file() for p in places) or shutil.which(tool):
        return Finding(name, "ok", f"{version}, has {tool}")
    remedy = f"reinstall {name}, or set {variable} to the {tool} of a CUDA toolkit"
    return Finding(name, "problem", f"{version}, but no {tool}", remedy)
