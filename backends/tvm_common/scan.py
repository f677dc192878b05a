"""Scans by kernels of TensorIR, made when first called with tensors of some dtypes."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from threading import RLock, Thread

import torch

from tttc.backends import torch as torch_backend
from tttc.backends.memory import address_span, densify
from tttc.backends.scan import CompiledScan, NotBuilt, Tensors
from tttc.ir.program import AdjointProgram, Scan, ScanAdjoint
from tttc.ir.structure import written

Stored = tuple[tuple[str, str], ...]  # names of tensors that are kept in another dtype than arithmetic has
Function = Callable[..., None]


class TVMScan(CompiledScan):
    """One scan, run by its forward and its backward kernel."""

    accepts_16bit = True

    def __init__(self, scan: Scan, program: AdjointProgram) -> None:
        super().__init__(scan, program)
        self._compiled: dict[tuple[bool, Stored], Function] = {}
        self._locks = {False: RLock(), True: RLock()}
        self._expected: set[Stored] = set()

    @cached_property
    def adjoint(self) -> ScanAdjoint:
        """What the backward computes."""
        return self.program.adjoint_of(self.scan)

    @cached_property
    def differentiable(self) -> CompiledScan:
        """The same scan in operations that autograd records, for second derivatives."""
        return torch_backend.load_scans(torch_backend.emit_source(self.program), self.program)[self.scan.name]

    @property
    def directions(self) -> tuple[bool, ...]:
        """Forward, and where there is one backward."""
        return (False, True) if self.scan.differentiated else (False,)

    # -- what differs between machines

    @abstractmethod
    def make(self, backward: bool, stored: Stored) -> Function:
        """A kernel, from the disk or made now."""

    @abstractmethod
    def text(self, backward: bool, stored: Stored) -> str:
        """What of a kernel is compiled."""

    def prepare(self) -> None:
        """What a call needs beside its tensors."""

    def forward_settings(self, every: int, inputs: Tensors) -> tuple[int, ...]:
        """What a forward kernel is told: the distance of kept carries."""
        return (every,)

    # -- called

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        outputs = self.outputs(inputs)
        return tuple(outputs), self.forward_into(outputs, inputs, checkpoint)

    def dtypes(self, inputs: Tensors) -> Mapping[str, torch.dtype]:
        return {n: getattr(torch, d) for n, d in self.stored(inputs)}

    def forward_into(self, outputs: Tensors, inputs: Tensors, checkpoint: int | None) -> list[torch.Tensor]:
        """Fill the outputs; what is returned is kept for the backward."""
        inputs = densify(self.scan.params, inputs)
        kept = self.kept(inputs, checkpoint)
        settings = self.forward_settings(checkpoint or 1, inputs) if self.scan.loops else ()
        self._call(self._kernel_for(False, self.stored(inputs)), [*inputs, *outputs, *kept], settings)
        return kept

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
        inputs = densify(self.scan.params, inputs)
        cotangents = densify(self.scan.results, cotangents)
        kernel = self._kernel_for(True, stored)
        if not self.scan.loops:
            self._call(kernel, [*inputs[carried:], *inputs[:carried], *cotangents, *results], ())
            return
        every = checkpoint or 1
        work = [x.new_empty(*x.shape[:2], every, *x.shape[2:]) for x in inputs[:carried]]
        self._call(kernel, [*inputs[carried:], *saved, *cotangents, *results, *work], (every,))

    def _call(self, kernel: Function, tensors: Tensors, settings: tuple[int, ...]) -> None:
        if 0 in tensors[0].shape[:2]:
            return
        self.prepare()
        for part in _addressable(tensors):
            kernel(*part, *settings)

    def stored(self, inputs: Tensors) -> Stored:
        """What has another dtype than arithmetic, by name: inputs as they come, and the output as the tokens do."""
        half = {p.name: x.dtype for p, x in zip(self.scan.params, inputs, strict=True) if x.dtype != self.dtype}
        return stored_as(self.scan, half)

    # -- compiled when first called

    def prewarm_backward(self, inputs: Tensors) -> None:
        """Compile the backward beside the forward: a compiler takes one core, and several times as long for it."""
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

    def _kernel_for(self, backward: bool, stored: Stored) -> Function:
        key = backward, stored
        if key not in self._compiled:
            with self._locks[backward]:
                if key not in self._compiled:
                    try:
                        self._compiled[key] = self.make(backward, stored)
                    except Exception as error:
                        raise NotBuilt(self.called(backward), error) from error
        return self._compiled[key]

    def called(self, backward: bool) -> str:
        """The name of a kernel."""
        return f"{self.scan.name}_adjoint" if backward else self.scan.name

    def checksum(self, backward: bool, stored: Stored) -> str:
        """Of what a kernel computes, and of what writes it."""
        what = self.adjoint if self.scan.differentiated else self.scan
        made_of = written((what, sorted(self.program.dims.items()), backward, stored)).encode()
        return "\n".join([hashlib.sha256(made_of).hexdigest(), _own_source()])


def all_kernels(scans: Mapping[str, TVMScan], dtype: torch.dtype) -> str:
    """The text of every kernel, for tokens of a dtype."""
    made = [(s, stored_tokens(s.scan, dtype)) for s in scans.values()]
    return "\n\n".join(s.text(backward, stored) for s, stored in made for backward in s.directions) + "\n"


def stored_as(scan: Scan, half: Mapping[str, torch.dtype]) -> Stored:
    """What has another dtype than arithmetic, where these inputs do: the output has that of the tokens."""
    tokens = {half[p.name] for p in scan.sequence if p.role == "token" and p.name in half}
    outputs = {a.target.name: next(iter(tokens)) for a in scan.outputs[:1]} if len(tokens) == 1 else {}
    return tuple(sorted((n, str(d).removeprefix("torch.")) for n, d in {**half, **outputs}.items()))


def stored_tokens(scan: Scan, dtype: torch.dtype) -> Stored:
    """The same, for tokens in this dtype and everything else in float32."""
    tokens = [p.name for p in scan.sequence if p.role == "token"]
    return stored_as(scan, dict.fromkeys(tokens, dtype) if dtype in (torch.float16, torch.bfloat16) else {})


def _addressable(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors in parts of their batch, or of their heads, whose entries an int32 can count."""
    batch, heads = tensors[0].shape[:2]
    if batch * heads == 1 or max(map(address_span, tensors)) < 2**31:
        yield tensors
        return
    axis, half = (0, batch // 2) if batch > 1 else (1, heads // 2)
    for first, count in ((0, half), (half, tensors[0].shape[axis] - half)):
        yield from _addressable([x.narrow(axis, first, count) for x in tensors])


@cache
def _own_source() -> str:
    """A checksum of what writes kernels: other code, other kernels."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].glob("tvm_*/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
