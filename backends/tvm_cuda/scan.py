"""One scan by kernels for a GPU: written by TVM once, compiled and launched without it.

The text of a kernel is kept on disk. NVRTC, which comes with torch, compiles it for the GPU at hand when it is first
called; it runs on torch's current stream, on the tensors where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tttc.backends import nvidia
from tttc.backends.cache import cached
from tttc.backends.notice import compiling
from tttc.backends.target import architecture_of
from tttc.backends.tvm_common.arguments import arguments, stride_name
from tttc.backends.tvm_common.scan import Function, Stored, TVMScan
from tttc.backends.tvm_common.tir import writing
from tttc.backends.tvm_cuda.device import Device
from tttc.backends.tvm_cuda.kernel_text import CudaSource
from tttc.backends.tvm_cuda.kernels import CudaKernel
from tttc.backends.tvm_cuda.source import source
from tttc.ir.names import own, suffixed
from tttc.ir.program import AdjointProgram, Scan

Arguments = Mapping[str, torch.Tensor | int]
Launch = Callable[[CudaSource, int, Arguments], None]


def launch(source: CudaSource, blocks: int, arguments: Arguments) -> None:
    """Run a kernel on the GPU of its tensors, on torch's current stream."""
    tensor = next(x for x in arguments.values() if isinstance(x, torch.Tensor))
    with torch.cuda.device(tensor.device):
        kernel = _compiled(source.text, source.name, source.shared, tensor.device.index)
        values = [arguments[name] for name, _ in source.parameters]
        kernel(grid=(blocks, 1, 1), block=(source.threads, 1, 1), args=values, shared_mem=source.shared)


@cache
def _compiled(text: str, name: str, shared: int, device: int | None) -> Any:
    """By NVRTC, for the current GPU; a kernel belongs to the device that it was loaded on."""
    from torch.cuda._utils import _cuda_load_module  # what torch.cuda._compile_kernel does after compiling

    loaded: Any = _cuda_load_module(nvidia.nvrtc_ptx(text, architecture_of(torch.device("cuda", device or 0))), [name])
    loaded[name].set_shared_memory_config(shared)
    return loaded[name]


class CudaScan(TVMScan):
    """One scan, run by its forward and its backward kernel on a GPU, or by what `launch` launches them on."""

    def __init__(self, scan: Scan, program: AdjointProgram, device: Device, launch: Launch = launch) -> None:
        super().__init__(scan, program)
        self.device, self.launch = device, launch
        self._sources: dict[tuple[bool, Stored], CudaSource] = {}

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        return "cuda", self.device

    def text(self, backward: bool, stored: Stored) -> str:
        """The CUDA source of a kernel."""
        return self.source(backward, stored).text

    def source(self, backward: bool = False, stored: Stored = ()) -> CudaSource:
        """The text of a kernel: from the cache, or written by TVM."""
        with writing:
            if (backward, stored) not in self._sources:
                self._sources[backward, stored] = self._kept_source(backward, stored)
            return self._sources[backward, stored]

    def _kept_source(self, backward: bool, stored: Stored) -> CudaSource:
        made: list[CudaSource] = []

        def make(path: Path) -> None:
            with compiling(self.program.title, "this GPU"):
                made.append(self._emitted(backward, stored))
            path.write_text(made[0].to_json(), encoding="utf-8")

        path = cached("cuda", self._key(backward, stored), ".kernel", make)
        if not made and path is not None:
            return CudaSource.from_json(path.read_text(encoding="utf-8"))
        return made[0] if made else self._emitted(backward, stored)

    def _emitted(self, backward: bool, stored: Stored) -> CudaSource:
        """Written by TVM, now."""
        return source(CudaKernel(self.scan, self.program, self.device, dict(stored), backward).written())

    def _key(self, backward: bool, stored: Stored) -> str:
        """All that the text depends on. Not the version of TVM: the text does not need the TVM that wrote it."""
        return "\n".join([self.checksum(backward, stored), str(self.device)])

    def make(self, backward: bool, stored: Stored) -> Function:
        source = self.source(backward, stored)
        names = [a.name for a in arguments(self.scan, backward)] + ([own("every")] if self.scan.loops else [])
        return lambda *given: self._run(source, names, given)

    def _run(self, source: CudaSource, names: Sequence[str], given: Sequence[Any]) -> None:
        """Give the arguments their names, and the kernel what else its parameters ask for."""
        named: dict[str, Any] = dict(zip(names, given, strict=True))
        like = given[0]
        batch, heads = like.shape[:2]
        tokens = next((named[p.name].shape[2] for p in self.scan.sequence if p.at is not None and p.name in named), 1)
        for name, x in list(named.items()):
            if isinstance(x, torch.Tensor):
                named |= {stride_name(name, i): s for i, s in enumerate(x.stride()[:3])}
        kept = next((named[n] for p in self.scan.carry if (n := suffixed(p.name, "kept")) in named), None)
        named |= {own("batch"): batch, own("heads"): heads, own("tokens"): tokens}
        named |= {
            own("places"): named.get(own("every"), 1),
            own("groups"): 1 if kept is None else kept.shape[2],
        }
        for name, (dtype, shape) in source.workspaces.items():
            sizes = [n if isinstance(n, int) else -(-tokens // 16) * 16 if n == "T16" else tokens for n in shape]
            named[name] = like.new_empty(batch * heads, *sizes, dtype=getattr(torch, dtype))
        self.launch(source, batch * heads, named)
