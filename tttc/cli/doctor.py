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
from tttc.backends.cache import CACHE_VARIABLE, cache_dir
from tttc.backends.cpu import instruction_sets, processor, usable_cores
from tttc.backends.folders import exposed
from tttc.backends.registry import Package, Unit
from tttc.backends.target import architecture
from tttc.tuning.database import database_path, own_entries
from tttc.tuning.lookup import is_off

INSTRUCTION_SETS = ("avx", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve", "sve2")


@dataclass(frozen=True)
class DoctorFinding:
    """One thing that was looked at: `status` is "ok", "absent" (nothing depends on it) or "problem"."""

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, grouped as they are printed."""

    machine: list[DoctorFinding]
    packages: list[DoctorFinding]
    backends: list[DoctorFinding]

    def groups(self) -> dict[str, list[DoctorFinding]]:
        return {"machine": self.machine, "packages": self.packages, "backends": self.backends}

    @property
    def problems(self) -> list[DoctorFinding]:
        return [finding for group in self.groups().values() for finding in group if finding.status == "problem"]

    def as_json(self) -> dict[str, Any]:
        """For programs: the groups as lists of records, and whether anything is wrong."""
        groups = {name: [asdict(finding) for finding in group] for name, group in self.groups().items()}
        return {"ok": not self.problems, **groups}


def diagnose() -> Diagnosis:
    """Look at everything once."""
    return Diagnosis(
        machine=[
            DoctorFinding("tttc", "ok", version()),
            _python(),
            _processor(),
            *_devices(),
            _compiler(),
            _cache(),
            _tuned(),
        ],
        packages=[
            _torch(),
            *(_package(p) for p in dict.fromkeys(p for u in registry.units() for p in u.packages)),
        ],
        backends=[_backend(next(u for u in registry.units() if u.name == n)) for n in registry.names()],
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


def _python() -> DoctorFinding:
    return DoctorFinding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> DoctorFinding:
    known = [flag for flag in INSTRUCTION_SETS if flag in instruction_sets()]
    used = torch.backends.cpu.get_cpu_capability()
    instructions = f"; has {', '.join(known)}" if known else ""
    return DoctorFinding("cpu", "ok", f"{processor()}, {usable_cores()} cores{instructions}; torch uses {used}")


def _devices() -> list[DoctorFinding]:
    if torch.cuda.is_available():
        return [_device(i) for i in range(torch.cuda.device_count())]
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        return [_unusable_gpu("an NVIDIA driver", "CUDA", torch.version.cuda)]
    if Path("/dev/kfd").exists():
        return [_unusable_gpu("an AMD GPU driver", "ROCm", torch.version.hip)]
    return [DoctorFinding("gpu", "absent", "none that torch can use; everything runs on the CPU")]


def _device(index: int) -> DoctorFinding:
    found = torch.cuda.get_device_properties(index)
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    amd = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    shown = amd or architecture((found.major, found.minor))
    memory = found.total_memory / 2**30
    return DoctorFinding(f"gpu {index}", "ok", f"{found.name}, {memory:.0f} GiB, {shown}, {toolkit}")


def _unusable_gpu(driver: str, kind: str, build: str | None) -> DoctorFinding:
    found = f"torch {torch.__version__} is a build without {kind}"
    remedy = f"install the {kind} build of torch: https://pytorch.org/get-started"
    if build is not None:
        found = "torch sees no device"
        remedy = f"check that the driver is new enough for {kind} {build} and that this process sees the device"
    return DoctorFinding("gpu", "problem", f"{driver} is here, but {found}", remedy)


def _compiler() -> DoctorFinding:
    found = cxx_compiler()
    if found:
        return DoctorFinding("c++ compiler", "ok", found)
    return DoctorFinding("c++ compiler", "absent", "only torch.compile on a CPU needs one", "install g++, or set CXX")


def _backend(unit: Unit) -> DoctorFinding:
    if unit.packages and unit.missing():
        return DoctorFinding(unit.name, "absent", unit.reason, unit.packages[0].install)
    return DoctorFinding(unit.name, "ok", unit.backend.here())


def _cache() -> DoctorFinding:
    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if folder.is_dir() and (reason := exposed(folder)):
        return DoctorFinding(
            "cache", "problem", f"{folder} {reason}", f"chmod 700 it, or set {CACHE_VARIABLE} to one of yours"
        )
    if existing.is_dir() and os.access(existing, os.W_OK):
        return DoctorFinding("cache", "ok", str(folder))
    return DoctorFinding("cache", "problem", f"{folder} is not writable", "set TTTC_CACHE_DIR to a folder that is")


def _tuned() -> DoctorFinding:
    """The results of `tttc tune`, and whether they are used."""
    path = database_path()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = len(own_entries(path))
    if said:
        return DoctorFinding("tuning", "problem", "; ".join(str(w.message) for w in said), "run `tttc tune` again")
    found = f"{count} result{'' if count == 1 else 's'} in {path}"
    if is_off():
        said_so = f"{found}, not used: TTTC_TUNING is {os.environ.get('TTTC_TUNING')}"
        return DoctorFinding("tuning", "absent", said_so, "unset TTTC_TUNING")
    return DoctorFinding("tuning", "ok", found)


def _torch() -> DoctorFinding:
    return DoctorFinding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _folders_of(module: str) -> list[str]:
    spec = importlib.util.find_spec(module)
    return list(spec.submodule_search_locations or []) if spec else []


def _package(package: Package) -> DoctorFinding:
    """A package by its metadata; installed but not importable, or without a program that it brings, is a problem."""
    name, module = package.distribution, package.module
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return DoctorFinding(name, "absent", "not installed", package.install)
    if importlib.util.find_spec(module) is None:
        remedy = package.install
        return DoctorFinding(name, "problem", f"{version} is installed, but `import {module}` finds nothing", remedy)
    if package.tool is None:
        return DoctorFinding(name, "ok", version)
    path, variable = package.tool
    tool = Path(path).name
    places = [os.environ.get(variable), *(str(Path(folder) / path) for folder in _folders_of(module))]
    if any(p and Path(p).is_file() for p in places) or shutil.which(tool):
        return DoctorFinding(name, "ok", f"{version}, has {tool}")
    remedy = f"reinstall {name}, or set {variable} to the {tool} of a CUDA toolkit"
    return DoctorFinding(name, "problem", f"{version}, but no {tool}", remedy)
