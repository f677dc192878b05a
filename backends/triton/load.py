"""Generated Triton source as callables on torch tensors."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch

from tttc.backends import generated
from tttc.backends import torch as torch_backend
from tttc.backends.cache import cached
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.memory import address_span, densify, like
from tttc.backends.scan import CompiledScan, NotBuilt, Tensors
from tttc.backends.target import architecture_of
from tttc.backends.triton import llvm_flags as llvm_flags
from tttc.backends.triton.emit import emit_specs
from tttc.backends.triton.kernel_spec import SMALLEST, Holds, KernelSpec, half_of, spec_of, split_state_output, unfused
from tttc.backends.triton.kernel_writer import rounded
from tttc.backends.triton.tune import bounded, default_config
from tttc.ir.expr import Expr
from tttc.ir.names import function
from tttc.ir.program import AdjointProgram, Scan

MIN_TOKENS_TO_TILE = (
    256  # tokens: fewer are done before the sums over strips have been launched; a guess, no GPU was at hand
)
MOST_CHUNKS = (1 << 16) - 1  # programs along the third axis of a grid
# Triton's interpreter holds bfloat16 as whole numbers, and multiplies these where they are factors of a product.
INTERPRETED_DOT = """
@triton.jit
def dot(x, y, operand: tl.constexpr):
    return tl.dot(x.to(operand).to(tl.float32), y.to(operand).to(tl.float32), input_precision="ieee")
"""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter. Triton looks once, when it is imported."""
    if "triton" in sys.modules:
        return bool(sys.modules["triton"].knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def unavailable(device: torch.device) -> list[str]:
    """Why kernels cannot run on this device."""
    if device.type == "cpu" and not interpreted():
        return ["it runs on a GPU; on a CPU in Triton's interpreter, with TRITON_INTERPRET=1 set before Python starts"]
    if device.type == "cuda" and not torch.cuda.is_available():
        return [f"torch finds no GPU for {device}; `tttc compile --target sm_90` compiles without one"]
    return [] if device.type in ("cpu", "cuda") else [f"it runs on a GPU, not on {device}"]


def here() -> str:
    """What it does on this machine."""
    if torch.cuda.is_available():
        return "fused kernels for this GPU"
    where = "runs in Triton's interpreter with TRITON_INTERPRET=1"
    return f"no GPU here: compiles for others (tttc compile --target sm_90), {where}"


def load_scans(
    source: Source, program: AdjointProgram, settings: Settings | None = None, place: Placement = HOST
) -> dict[str, CompiledScan]:
    """Every scan: by its kernels, or where it has none as batched operations of PyTorch, whose products are those of
    its libraries and what is between them fused by torch.compile.
    """
    module = Module(source, program.name, program.title)
    batched: Mapping[str, CompiledScan] = {}
    if any(unfused(s, program) for s in program.scans):
        steps = None if interpreted() else torch.compile
        batched = torch_backend.load_scans(torch_backend.emit_source(program), program, steps=steps)
    return {
        s.name: batched[s.name] if unfused(s, program) else TritonScan(s, program, module, settings or {})
        for s in program.scans
    }


class Module:
    """The generated file, run when its first kernel is: Triton is not imported before."""

    def __init__(self, source: Source, name: str, title: str = "") -> None:
        self.source, self.name, self.title = source, f"tttc_{name}", title or name

    @cached_property
    def kernels(self) -> ModuleType:
        """The file as a module. Triton reads its functions from the file, as do profilers and tracebacks."""
        module = generated.module(self._text, self.name, self._file)
        if not interpreted():
            llvm_flags.keep_cache_private()
        for name, value in vars(module).items():
            llvm_flags.install_compile_hook(value, self.title, self.about(name))
        return module

    @property
    def _text(self) -> str:
        return self.source.text + (INTERPRETED_DOT if interpreted() else "")

    @cached_property
    def _file(self) -> str:
        text = self._text
        path = cached("triton", text, ".py", lambda p: p.write_text(text, encoding="utf-8"))
        return str(path) if path else f"<tttc {hashlib.sha256(text.encode()).hexdigest()[:16]}>"

    def kernel(self, scan: Scan, backward: bool) -> Any:
        """The function of a scan, or of its adjoint."""
        return getattr(self.kernels, self.word(scan, backward))

    def word(self, scan: Scan, backward: bool) -> str:
        """What that function is called in the file."""
        return self.source.wording.called[function(kernel_name(scan, backward))]

    def variables(self, scan: Scan, backward: bool) -> Mapping[str, str]:
        """What its parameters are called, by their names in the program."""
        return self.source.wording.variables[function(kernel_name(scan, backward))]

    def about(self, kernel: str) -> dict[str, str]:
        """Which function of which file that is, for a process that compiles it."""
        return {"source": self.source.text, "file": self._file, "module": self.name, "kernel": kernel}


def kernel_name(scan: Scan, backward: bool) -> str:
    """What the function of a scan, or of its adjoint, is called."""
    return f"{scan.name}{'_adjoint' if backward else ''}"


def multiprocessors(device: torch.device) -> int:
    """How many programs a device can run, each with registers of its own; the interpreter runs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Kernels:
    """The forward and the backward kernel of one form of a scan."""

    def __init__(self, spec: KernelSpec, module: Module, settings: Settings) -> None:
        self.spec, self.module = spec, module
        directions = (False, True) if spec.scan.differentiated else (False,)
        self._tensors = {d: spec.tensors(d) for d in directions}
        self.options = {d: replace(default_config(spec, d), **settings).options for d in directions}

    @cached_property
    def rounded(self) -> set[str]:
        """The carries of which a backward works with copies in the dtype of the factors of its products."""
        return rounded(self.spec)

    def place(self, p: Expr, whole: torch.Tensor) -> torch.Tensor:
        """Where the cotangent of a variable is written: in its tensor, or for what all strips read in parts of float32,
        which lie next to heads and tokens: [B, H, strips, ...] or [B, H, T, strips, ...].
        """
        if not self.spec.shared(p):
            return whole
        leading = _leading(p)
        wide = like(p, (self.spec.strips * whole.shape[0], *whole.shape[1:]), whole, torch.float32)
        return wide.unflatten(0, (self.spec.strips, -1)).movedim(0, leading)

    def launch(self, backward: bool, given: Tensors, tokens: int, every: int, groups: int, dtype: torch.dtype) -> None:
        """Run a kernel on its tensors; `dtype` is that of the factors of products."""
        batch, heads = given[0].shape[:2]
        if batch * heads == 0:
            return
        import triton.language as tl
        from triton.errors import TritonError

        arguments: list[Any] = []
        for t, x in zip(self._tensors[backward], given, strict=True):
            arguments += [x, *x.stride()[: len(t.strides)]]
        sizes = [heads, *([tokens, every, groups] if self.spec.scan.loops else [])]
        operand = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
        index = tl.int32 if max(map(address_span, given)) < 2**31 else tl.int64
        name = kernel_name(self.spec.scan, backward)
        try:
            kernel = self.module.kernel(self.spec.scan, backward)
        except Exception as error:
            raise NotBuilt(name, error) from error
        grid = batch * heads, self.spec.strips, groups if self.spec.alone else 1
        options = bounded(self.options[backward], _target(given[0].device))
        with torch.cuda.device(given[0].device) if given[0].is_cuda else nullcontext():
            try:
                kernel[grid](*arguments, *sizes, operand=operand, index=index, **options)
            except TritonError as error:
                raise NotBuilt(name, error) from error


@cache
def _target(device: torch.device) -> str:
    """What Triton compiles for, on a device; "" where it interprets."""
    return "" if interpreted() else architecture_of(device)


class TritonScan(CompiledScan):
    """One scan, run by its forward and its backward kernel: a program for each head, or for each strip of one."""

    accepts_16bit = True

    def __init__(self, scan: Scan, program: AdjointProgram, module: Module, settings: Settings) -> None:
        super().__init__(scan, program)
        self.settings = settings
        self.kernels = Kernels(spec_of(scan, program), module, settings)
        self._narrower: dict[int, Kernels] = {}

    @cached_property
    def differentiable(self) -> CompiledScan:
        """The same scan in operations that autograd records, for second derivatives."""
        return torch_backend.load_scans(torch_backend.emit_source(self.program), self.program)[self.scan.name]

    @property
    def made_of(self) -> tuple[Hashable, ...]:
        return "triton", str(self.kernels.options)

    def dtypes(self, inputs: Tensors) -> Mapping[str, torch.dtype]:
        return dict.fromkeys([a.target.name for a in self.scan.outputs], self._operand(inputs))

    def forward(self, inputs: Tensors, checkpoint: int | None) -> tuple[tuple[torch.Tensor, ...], Tensors]:
        inputs = densify(self.scan.params, inputs)
        groups, dtype = self.groups(inputs, checkpoint), self._operand(inputs)
        outputs, kept = self.results(inputs, checkpoint)
        if halves := self._halves_for(inputs):
            self._launch_halves(halves, inputs, outputs, kept, checkpoint or 1, dtype)
        else:
            kernels, given = self.kernels_for(inputs), [*inputs, *outputs, *kept]
            kernels.launch(False, given, self.tokens(inputs), checkpoint or 1, groups, dtype)
        return tuple(outputs), kept

    def _launch_halves(
        self,
        halves: tuple[Kernels, Kernels],
        inputs: Tensors,
        outputs: Tensors,
        kept: Tensors,
        every: int,
        dtype: torch.dtype,
    ) -> None:
        """The carry before every chunk, then the outputs of all chunks at once."""
        scan, tokens, chunks = self.scan, self.tokens(inputs), self.groups(inputs, 1)
        dense = every == 1 and kept and kept[0].shape[2] == chunks
        carries = (
            kept if dense else [x.new_empty(*x.shape[:2], chunks, *x.shape[2:]) for x in inputs[: len(scan.carry)]]
        )
        tensors = {(p.name, Holds.VALUE): x for p, x in zip(scan.params, inputs, strict=True)}
        tensors |= {(p.name, Holds.KEPT): x for p, x in zip(scan.carry, carries, strict=True)}
        tensors |= {(a.target.name, Holds.VALUE): x for a, x in zip(scan.outputs, outputs, strict=False)}
        made = zip(scan.updates, outputs[len(scan.outputs) :], strict=True)
        tensors |= {(a.target.name, Holds.NEW): x for a, x in made}
        for half in halves:
            given = [tensors[key] for key in half.spec.tensor_of(False)]
            half.launch(False, given, tokens, 1, chunks, dtype)
        if not dense:
            for to, x in zip(kept, carries, strict=True):
                to.copy_(x[:, :, ::every][:, :, : to.shape[2]])

    def _halves_for(self, inputs: Tensors) -> tuple[Kernels, Kernels] | None:
        """Kernels of the carry and of the outputs, where heads leave multiprocessors without one, no strips of heads
        are to be had, and there are chunks for them.
        """
        batch, heads = inputs[0].shape[:2]
        few = 2 * batch * heads <= multiprocessors(inputs[0].device) and self._widest is None
        enough = self.tokens(inputs) >= MIN_TOKENS_TO_TILE and 1 < self.groups(inputs, 1) <= MOST_CHUNKS
        return self._halves if few and enough else None

    @cached_property
    def _halves(self) -> tuple[Kernels, Kernels] | None:
        specs = split_state_output(self.kernels.spec)
        if specs is None:
            return None
        module = self._module(specs)
        states, outputs = (Kernels(spec, module, self.settings) for spec in specs)
        return states, outputs

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        scan = self.scan
        carried, every = len(scan.carry), checkpoint or 1
        inputs, cotangents = densify(scan.params, inputs), densify(scan.results, cotangents)
        tokens = self.tokens(inputs)
        results, kernels = self.gradients(inputs), self.kernels_for(inputs)
        if not scan.loops:
            kernels.launch(True, [*inputs, *cotangents, *results], tokens, 1, 1, self._operand(inputs))
            return tuple(results)
        dtype = self._operand(inputs)
        work = [
            x.new_empty(*x.shape[:2], every, *x.shape[2:], dtype=dtype if p.name in kernels.rounded else x.dtype)
            for p, x in zip(scan.carry, inputs[:carried], strict=True)
        ]
        groups = self.groups(inputs, every)
        params = kernels.spec.scan.params
        places = [kernels.place(p, x) for p, x in zip(params, results, strict=True)]
        kernels.launch(True, [*saved, *inputs[carried:], *cotangents, *places, *work], tokens, every, groups, dtype)
        for p, place, result in zip(params, places, results, strict=True):
            if place is not result:
                _add_up(place, _leading(p), result)
        return tuple(results)

    def kernels_for(self, inputs: Tensors) -> Kernels:
        """Those of a whole head, or where that leaves multiprocessors without one those of strips of it, as narrow as
        there are multiprocessors for.
        """
        batch, heads = inputs[0].shape[:2]
        most = multiprocessors(inputs[0].device) // max(batch * heads, 1)
        spec = self._widest
        if spec is None or most < 2 or self.tokens(inputs) < MIN_TOKENS_TO_TILE:
            return self.kernels
        while spec.width > SMALLEST and replace(spec, width=spec.width // 2).strips <= most:
            spec = replace(spec, width=spec.width // 2)
        if spec == self.kernels.spec or spec.strips > most:
            return self.kernels
        if spec.width not in self._narrower:
            module = self._module([spec])
            self._narrower[spec.width] = Kernels(spec, module, self.settings)
        return self._narrower[spec.width]

    def _module(self, specs: Sequence[KernelSpec]) -> Module:
        """Other forms of the kernels, in a file of their own."""
        return Module(emit_specs(self.program.name, specs), self.program.name, self.program.title)

    @cached_property
    def _widest(self) -> KernelSpec | None:
        """The widest strip that can be a program; None where nothing may be cut."""
        spec = self.kernels.spec
        return spec if spec.cut else half_of(self.scan, self.program)

    def _operand(self, inputs: Tensors) -> torch.dtype:
        """The dtype of the factors of matrix products: that of the tokens."""
        tokens = [x.dtype for p, x in zip(self.scan.params, inputs, strict=True) if p.role == "token"]
        return tokens[0] if tokens and len(set(tokens)) == 1 else torch.float32


def _add_up(parts: torch.Tensor, axis: int, whole: torch.Tensor) -> None:
    """Always in the same order, and rounded once."""
    if whole.dtype == parts.dtype:
        torch.sum(parts, axis, out=whole)
    else:
        whole.copy_(parts.sum(axis))


def _leading(p: Expr) -> int:
    """The axes of a tensor before those that a variable has: batch and heads, and tokens."""
    return 2 if p.at is None else 3
