"""Kernels as callables on torch tensors: compiled by LLVM for this machine when first called, and kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from threading import RLock, Thread
from typing import TYPE_CHECKING, Any

import torch

from tttc.backends import torch as torch_backend
from tttc.backends.cache import cached
from tttc.backends.garbage import uncollected
from tttc.backends.interface import HOST, CompiledScan, NotBuilt, Placement, Settings, Source, content_of
from tttc.backends.memory import laid_out, lengths, like, reach
from tttc.backends.tvm_common.statements import heads_together
from tttc.backends.tvm_cpu.machine import Config, Machine, host
from tttc.ir.expr import Expr
from tttc.ir.program import SEQUENCE, AdjointProgram, Scan, ScanAdjoint
from tttc.ir.structure import written

if TYPE_CHECKING:
    from tttc.backends.tvm_cpu.kernels import Kernel

Tensors = Sequence[torch.Tensor]
Stored = tuple[tuple[str, str], ...]  # names of tensors that are kept in another dtype than arithmetic has
SETTINGS = {"tirx.disable_storage_rewrite": True}  # it would merge the accumulators and drop their annotation
# Passes that find nothing in these functions, whose memory, loops and shared values are where they should be, and that
# would take as long as LLVM.
LEFT_OUT = (
    "s_tir.CompactBufferAllocation",
    "s_tir.PlanAndUpdateBufferAllocationLocation",
    "s_tir.LoopPartition",
    "s_tir.HoistIfThenElse",
    "tirx.CommonSubexprElim",
    "tirx.RemoveNoOp",
)
CACHED = 1 << 17  # numbers that a second cache holds: the weights of the heads that a thread takes together
_lock = RLock()


def unavailable(device: torch.device) -> list[str]:
    """It runs on any CPU that LLVM knows."""
    return []


def here() -> str:
    """What it does on this machine."""
    linked = shutil.which("cc") is not None
    return "native kernels for this CPU" + ("" if linked else "; without `cc` they are compiled again in every process")


def load(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, TVMScan]:
    """Every scan of a program of the adjoint stage; nothing is compiled before it is called."""
    from tttc.backends.tvm_cpu.tiled import StripScan  # made of what is in this file

    config = Config(**(settings or {}))
    return {scan.name: StripScan(scan, program, config) for scan in program.scans}


class TVMScan:
    """One scan, run by its forward and its backward kernel."""

    def __init__(self, scan: Scan, program: AdjointProgram, config: Config | None = None) -> None:
        self.scan, self.program, self.config = scan, program, config or Config()
        self.dtype = torch.float64 if program.dtype == "f64" else torch.float32
        self._compiled: dict[tuple[bool, Stored], Callable[..., None]] = {}
        self._locks = {False: RLock(), True: RLock()}
        self._expected: set[Stored] = set()

    @property
    def halves(self) -> bool:
        return True

    @cached_property
    def adjoint(self) -> ScanAdjoint:
        """What the backward computes."""
        return self.program.adjoint_of(self.scan)

    @cached_property
    def recorded(self) -> CompiledScan:
        """The same scan in operations that autograd records, for second derivatives."""
        return torch_backend.load(torch_backend.emit(self.program), self.program)[self.scan.name]

    def script(self) -> str:
        """The TensorIR of its kernels."""
        kernels = (False, True) if self.scan.differentiated else (False,)
        return "\n\n".join(str(self._kernel(backward, ()).function.script()) for backward in kernels)

    @property
    def opaque(self) -> TVMScan:
        return self

    @property
    def content(self) -> str:
        return content_of(self.scan, self.program, "tvm", self.config)

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        outputs = self.outputs(inputs)
        return tuple(outputs), self.forward_into(outputs, inputs, checkpoint)

    def results(self, inputs: Tensors, checkpoint: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.outputs(inputs), self._kept(inputs, checkpoint)

    def outputs(self, inputs: Tensors) -> list[torch.Tensor]:
        """Memory for the outputs and the new carry."""
        dtypes = {n: getattr(torch, d) for n, d in self.stored(inputs)}
        return [self._empty(target, inputs, dtypes) for target in self.scan.results]

    def _kept(self, inputs: Tensors, checkpoint: int | None) -> list[torch.Tensor]:
        """Memory for the carry of every so many chunks; the values of a chunk are always made again."""
        if not self.scan.loops:
            return []
        groups = 0 if checkpoint is None else -(-self._chunks(inputs) // (checkpoint or 1))
        return [_compact(x, (*x.shape[:2], groups, *x.shape[2:])) for x in inputs[: len(self.scan.carry)]]

    def forward_into(self, outputs: Tensors, inputs: Tensors, checkpoint: int | None) -> list[torch.Tensor]:
        """Fill the outputs; what is returned is kept for the backward."""
        inputs = laid_out(self.scan.params, inputs)
        kept = self._kept(inputs, checkpoint)
        settings = self._forward_settings(checkpoint or 1, inputs) if self.scan.loops else ()
        self._call(self._kernel_for(False, self.stored(inputs)), [*inputs, *outputs, *kept], settings)
        return kept

    def gradients(self, inputs: Tensors) -> list[torch.Tensor]:
        return [like(p, x.shape, x, x.dtype) for p, x in zip(self.scan.params, inputs, strict=True)]

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        results = self.gradients(inputs)
        self.backward_into(results, self.stored(inputs), inputs, saved, checkpoint, cotangents)
        return tuple(results)

    def backward_into(
        self,
        results: Tensors,
        stored: Stored,
        inputs: Tensors,
        saved: Tensors,
        checkpoint: int,
        cotangents: Tensors,
    ) -> None:
        """Fill the cotangents of the inputs; `stored` is what has another dtype than arithmetic."""
        carried = len(self.scan.carry)
        inputs = laid_out(self.scan.params, inputs)
        cotangents = laid_out(self.scan.results, cotangents)
        kernel = self._kernel_for(True, stored)
        if not self.scan.loops:
            self._call(kernel, [*inputs[carried:], *inputs[:carried], *cotangents, *results], ())
            return
        every = checkpoint or 1
        work = [x.new_empty(*x.shape[:2], every, *x.shape[2:]) for x in inputs[:carried]]
        self._call(kernel, [*inputs[carried:], *saved, *cotangents, *results, *work], (every,))

    def _call(self, kernel: Callable[..., None], tensors: Tensors, settings: tuple[int, ...]) -> None:
        if 0 in tensors[0].shape[:2]:
            return
        self._prepare()
        for part in _addressable(tensors):
            kernel(*part, *settings)

    def _forward_settings(self, every: int, inputs: Tensors) -> tuple[int, ...]:
        """Beside the distance of kept carries, how many heads a thread takes together."""
        if not self._heads_together:
            return (every,)
        batch, heads = inputs[0].shape[:2]
        weights = sum(prod(x.shape[2:]) for x in inputs[: len(self.scan.carry)])
        return every, _together(batch, heads, torch.get_num_threads(), CACHED // weights)

    @cached_property
    def _heads_together(self) -> bool:
        return heads_together(self.scan, self.program.dims, self._machine.lanes)

    def _prepare(self) -> None:
        """What a call needs beside its tensors."""
        _use_threads(torch.get_num_threads())

    def stored(self, inputs: Tensors) -> Stored:
        """What has another dtype than arithmetic, by name: inputs as they come, and the output as the tokens do."""
        half = {p.name: x.dtype for p, x in zip(self.scan.params, inputs, strict=True) if x.dtype != self.dtype}
        return stored_as(self.scan, half)

    def _empty(self, target: Expr, inputs: Tensors, dtypes: Mapping[str, torch.dtype]) -> torch.Tensor:
        own = lengths(target, self.program.dims, self._tokens(inputs))
        return like(target, [*inputs[0].shape[:2], *own], inputs[0], dtypes.get(target.name, self.dtype))

    def _tokens(self, inputs: Tensors) -> int:
        """How many tokens the sequences have, the last of the inputs of a loop; without a loop there is one."""
        return inputs[-1].shape[2] if self.scan.loops else 1

    def _chunks(self, inputs: Tensors) -> int:
        return 1 if self.scan.chunk is SEQUENCE else -(-self._tokens(inputs) // self.scan.chunk)

    # -- compiled when first called

    def expect_backward(self, inputs: Tensors) -> None:
        """Compile the backward beside the forward: LLVM takes one core, and several times as long for a backward."""
        self.expect(self.stored(inputs))

    def expect(self, stored: Stored) -> None:
        """The same, for what has another dtype than arithmetic."""
        if stored not in self._expected:
            self._expected.add(stored)
            # no daemon: a process must not end while LLVM works in it
            Thread(target=self._begin_backward, args=(stored,), name=f"{self.scan.name}_adjoint").start()

    def _begin_backward(self, stored: Stored) -> None:
        with suppress(Exception):  # the backward itself will say it
            self._kernel_for(True, stored)

    def _kernel_for(self, backward: bool, stored: Stored) -> Callable[..., None]:
        key = backward, stored
        if key not in self._compiled:
            with self._locks[backward]:
                if key not in self._compiled:
                    try:
                        self._compiled[key] = self._made(backward, stored)
                    except Exception as error:
                        raise NotBuilt(self._called(backward), error) from error
        return self._compiled[key]

    def _kernel(self, backward: bool, stored: Stored) -> Kernel:
        with _lock:
            imported_tvm()
            from tttc.backends.tvm_cpu.kernels import backward_kernel, forward_kernel

            if backward:
                return backward_kernel(self.adjoint, self.program, self._machine, dict(stored))
            return forward_kernel(self.scan, self.program, self._machine, dict(stored))

    @cached_property
    def _machine(self) -> Machine:
        return host("float64" if self.dtype == torch.float64 else "float32", self.config)

    def _made(self, backward: bool, stored: Stored) -> Callable[..., None]:
        """A kernel from the disk, or compiled and left there. The file is loaded in either case: from what TVM has in
        memory, LLVM would make the same code once more.
        """
        built: list[Any] = []

        def make(path: Path) -> None:
            built.append(_build(self._kernel(backward, stored)))
            _link(built[0], path)

        path = cached("tvm", self._key(backward, stored), ".so", make)
        if path is not None:
            library = _runtime()(str(path))
        else:
            library = built[0] if built else _build(self._kernel(backward, stored))
        return library[self._called(backward)]

    def _called(self, backward: bool) -> str:
        """The name of a kernel."""
        return f"{self.scan.name}_adjoint" if backward else self.scan.name

    def _key(self, backward: bool, stored: Stored) -> str:
        """All that a kernel depends on: the program, the machine, and the versions of what makes it."""
        machine = (str(self._machine), platform.machine(), version("apache-tvm"))
        return "\n".join([self._content(backward, stored), *machine])

    def _content(self, backward: bool, stored: Stored) -> str:
        """A checksum of what is computed, and one of what writes it."""
        what = self.adjoint if self.scan.differentiated else self.scan
        made_of = written((what, sorted(self.program.dims.items()), backward, stored)).encode()
        return "\n".join([hashlib.sha256(made_of).hexdigest(), _own_source()])


def stored_as(scan: Scan, half: Mapping[str, torch.dtype]) -> Stored:
    """What has another dtype than arithmetic, where these inputs do: the output has that of the tokens."""
    tokens = {half[p.name] for p in scan.sequence if p.role == "token" and p.name in half}
    outputs = {a.target.name: next(iter(tokens)) for a in scan.outputs[:1]} if len(tokens) == 1 else {}
    return tuple(sorted((n, str(d).removeprefix("torch.")) for n, d in {**half, **outputs}.items()))


def stored_tokens(scan: Scan, dtype: torch.dtype) -> Stored:
    """The same, for tokens in this dtype and everything else in float32."""
    tokens = [p.name for p in scan.sequence if p.role == "token"]
    return stored_as(scan, dict.fromkeys(tokens, dtype) if dtype in (torch.float16, torch.bfloat16) else {})


def _together(batch: int, heads: int, threads: int, most: int) -> int:
    """As many heads as one thread may take, so that no thread has more to do than another must."""
    counts = range(1, max(1, min(heads, most)) + 1)
    return min(counts, key=lambda n: (-(-batch * -(-heads // n) // threads) * n, -n))


def _compact(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Memory like that of `x`; where there is none of it, still with the strides that the kernel expects."""
    return x.new_empty_strided(shape, [prod(shape[i + 1 :]) for i in range(len(shape))])


def _addressable(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors in parts of their batch, or of their heads, whose entries an int32 can count."""
    batch, heads = tensors[0].shape[:2]
    if batch * heads == 1 or max(map(reach, tensors)) < 2**31:
        yield tensors
        return
    axis, half = (0, batch // 2) if batch > 1 else (1, heads // 2)
    for first, count in ((0, half), (half, tensors[0].shape[axis] - half)):
        yield from _addressable([x.narrow(axis, first, count) for x in tensors])


# -- TVM ---------------------------------------------------------------------------------------------------------------


def _set_up() -> None:
    """What the thread pool of TVM reads when it starts: left alone it takes half of the cores, and its workers spin on
    those of torch while they wait.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(max(os.cpu_count() or 1, torch.get_num_threads())))
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")


def imported_tvm() -> Any:
    """TVM, imported without what its parser of Python source does to `inspect` for the whole process."""
    _set_up()
    before = inspect.getfile, inspect.findsource
    import tvm
    import tvm.script

    inspect.getfile, inspect.findsource = before
    return tvm


def _build(kernel: Kernel) -> Any:
    tvm = imported_tvm()
    with tvm.transform.PassContext(opt_level=3, config=SETTINGS, disabled_pass=list(LEFT_OUT)):
        return tvm.compile(kernel.function, target=host(kernel.machine.dtype).target())


def _link(library: Any, path: Path) -> None:
    """A shared library, by the linker of the machine."""
    object_file = path.with_suffix(".o")
    library.mod.write_to_file(str(object_file))
    try:
        subprocess.run(["cc", "-shared", "-o", str(path), str(object_file)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"cc could not link a kernel: {error.stderr.decode(errors='replace').strip()}") from error


@cache
@uncollected()
def _runtime() -> Callable[[str], Any]:
    """What loads a library: TVM where it is imported already, otherwise its runtime alone, which takes no time."""
    if "tvm" in sys.modules:
        return imported_tvm().runtime.load_module
    _set_up()
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


def _use_threads(n: int) -> None:
    """As many as torch uses."""
    if _threads != [n]:
        _pool()(1, n)
        _threads[:] = [n]


@cache
def _own_source() -> str:
    """A checksum of what writes kernels: other code, other kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].glob("tvm_*/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


__all__ = ["TVMScan", "load"]
