"""Which backends there are, and what is known of each before anything of it is imported.

    named("tvm", torch.device("cuda"))     the one of that name for a device
    candidates(torch.device("cpu"))        what "auto" tries on it, the best first
    register(Unit(...))                    one of your own: README.md says what it consists of

What is named here is the one lazy door to the packages: a backend is imported when it is first asked for something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from tttc.backends.interface import Backend, Compiler, Estimator, FileWriter


@dataclass(frozen=True)
class Package:
    """What has to be installed, and how; `tool` is a program that it brings, and the variable that names another."""

    distribution: str
    module: str
    install: str
    tool: tuple[str, str] | None = None

    def missing(self) -> list[str]:
        """Why it is not here; empty where it is."""
        return [] if find_spec(self.module) else [f"{self.distribution} is not installed: {self.install}"]


@dataclass(frozen=True)
class Unit:
    """One backend. Several may have one name, each on devices of its own: the name is what users say."""

    name: str
    reason: str
    """What speaks for it, where it is taken."""
    loader: Callable[[], Backend]
    devices: tuple[str, ...] = ()
    """The types of device that it runs on; none named are all."""
    auto: tuple[str, ...] = ()
    """Those on which "auto" tries it before what runs on all."""
    packages: tuple[Package, ...] = ()
    writes_alone: bool = False
    """Whether its text is written without these packages."""
    differentiates: bool = True
    """Whether its scans have a backward: one whose have none is taken by name alone."""
    of_torch: bool = False
    """Whether its scans are operations of torch, which need no memory to be traced."""
    targets: tuple[str, ...] = ()
    """Whose GPUs it compiles for that need not be there: "NVIDIA", "AMD"."""
    compiler: Callable[[], Compiler] | None = None
    """What compiles for these."""
    estimator: Callable[[], Estimator] | None = None
    """What ranks kernels for these that were not run."""
    in_files: Callable[[], FileWriter] | None = None
    """What writes its kernels into exported Python files."""

    @property
    def backend(self) -> Backend:
        """Its functions, imported now."""
        return self.loader()

    def missing(self) -> list[str]:
        """Why there is no such backend on this machine, whatever the program."""
        return [reason for package in self.packages for reason in package.missing()]

    def unwritten(self) -> list[str]:
        """Why its text cannot be written here."""
        return [] if self.writes_alone else self.missing()

    def unavailable(self, device: torch.device) -> list[str]:
        """Why it cannot run on a device, whatever the program."""
        return self.missing() or self.backend.unavailable(device)


_units: list[Unit] = []


def register(unit: Unit) -> None:
    """Add a backend, in the place of one that has its name on the same devices."""
    _units[:] = [u for u in _units if (u.name, u.devices) != (unit.name, unit.devices)]
    _units.append(unit)


def unregister(name: str) -> None:
    """Take out what has this name."""
    _units[:] = [u for u in _units if u.name != name]


def names() -> list[str]:
    """What users may say, each once."""
    return list(dict.fromkeys(u.name for u in _units))


def units() -> tuple[Unit, ...]:
    """All of them."""
    return tuple(_units)


def named(name: str, device: torch.device) -> Unit:
    """The backend of that name for a device, or where none is for it the last one, which says why it is not."""
    found = [u for u in _units if u.name == name]
    return next((u for u in found if not u.devices or device.type in u.devices), found[-1])


def candidates(device: torch.device) -> list[Unit]:
    """What "auto" tries on a device, the best first; what runs on all comes last."""
    complete = [u for u in _units if u.differentiates]
    return [u for u in complete if device.type in u.auto] + [u for u in complete if not u.devices]


def compilers() -> list[Unit]:
    """What compiles for GPUs that need not be there; the first is taken where none is named."""
    return sorted((u for u in _units if u.compiler), key=lambda u: -len(u.targets))


def estimators() -> list[Unit]:
    """What ranks kernels for GPUs that need not be there."""
    return [u for u in _units if u.estimator]


def file_writers() -> list[Unit]:
    """Whose kernels exported Python files have."""
    return [u for u in _units if u.in_files]


# -- the backends of this package ------------------------------------------------------------------------------------

TVM = Package("apache-tvm", "tvm", "pip install 'tttc[tvm]'")
TRITON = Package(
    "triton",
    "triton",
    "pip install triton (Linux on x86-64)",
    ("backends/nvidia/bin/ptxas", "TRITON_PTXAS_PATH"),
)

ONNX = tuple(Package(name, name, "pip install 'tttc[onnx]'") for name in ("onnx", "onnxruntime"))


def _lazy(module: str) -> Callable[[], Any]:
    """A module that is imported when it is first asked for."""
    return partial(import_module, module)


if TYPE_CHECKING:  # that they have the functions which they are to have
    from tttc.backends import onnx, triton, tvm_cpu, tvm_cuda
    from tttc.backends import torch as _torch
    from tttc.backends.triton import aot, files
    from tttc.backends.triton import candidates as estimates
    from tttc.backends.tvm_cuda import aot as cuda_aot

    _backends: list[Backend] = [_torch, tvm_cpu, tvm_cuda, triton, onnx]
    _compilers: list[Compiler] = [cuda_aot, aot]
    _estimators: list[Estimator] = [estimates]
    _file_writers: list[FileWriter] = [files]

register(Unit("torch", "runs every program, on any device", _lazy("tttc.backends.torch"), of_torch=True))
register(Unit("tvm", "native kernels for this CPU", _lazy("tttc.backends.tvm_cpu"), ("cpu",), ("cpu",), (TVM,)))
register(
    Unit(
        "tvm",
        "native kernels for this GPU",
        _lazy("tttc.backends.tvm_cuda"),
        ("cuda",),
        packages=(TVM,),
        targets=("NVIDIA",),
        compiler=_lazy("tttc.backends.tvm_cuda.aot"),
    )
)
register(
    Unit(
        "triton",
        "fused kernels for this GPU",
        _lazy("tttc.backends.triton"),
        ("cuda", "cpu"),
        ("cuda",),
        (TRITON,),
        writes_alone=True,
        targets=("NVIDIA", "AMD"),
        compiler=_lazy("tttc.backends.triton.aot"),
        estimator=_lazy("tttc.backends.triton.candidates"),
        in_files=_lazy("tttc.backends.triton.files"),
    )
)
register(
    Unit(
        "onnx",
        "graphs of ONNX",
        _lazy("tttc.backends.onnx"),
        ("cpu",),
        packages=ONNX,
        writes_alone=True,
        differentiates=False,
    )
)
