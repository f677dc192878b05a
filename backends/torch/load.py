"""Generated PyTorch source as callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import ModuleType
from typing import Any

import torch

from tttc.backends import generated
from tttc.backends.interface import HOST, Placement, Settings, Source
from tttc.backends.memory import autocast
from tttc.backends.scan import CompiledScan, Tensors
from tttc.backends.torch.custom_op import CopiedScan
from tttc.backends.torch.emit import emit_source
from tttc.ir.names import function
from tttc.ir.program import AdjointProgram, Scan


def _flat(tensors: Tensors) -> tuple[tuple[int, int], list[torch.Tensor]]:
    """Batch and heads, and the tensors with both as one axis G, which is what the source is written for."""
    leading = tensors[0].shape[:2] if tensors else (0, 0)
    return (leading[0], leading[1]), [x.flatten(0, 1).contiguous() for x in tensors]


def _exact(tensors: Tensors) -> AbstractContextManager[Any]:
    """Where autocast would take the products of a scan to 16 bits: without it. Arithmetic is as it was compiled."""
    device = tensors[0].device.type if tensors else "cpu"
    return torch.autocast(device, enabled=False) if autocast(device) else nullcontext()


def _apart(results: Tensors, others: Tensors) -> list[torch.Tensor]:
    """The results, each in memory of its own: what is done to one in place changes no other, and no input."""
    if torch._C._are_functorch_transforms_active():
        return list(results)  # they have no memory, and nobody holds them
    taken = {x.untyped_storage()._cdata for x in others}
    found = []
    for x in results:
        memory = x.untyped_storage()._cdata
        expanded = any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True))
        if memory in taken or expanded:
            x = x.clone(memory_format=torch.contiguous_format)
        taken.add(memory)
        found.append(x)
    return found


class TorchScan(CompiledScan):
    """One scan, run by the functions of a generated module; `compiled` says that its steps were given to torch.compile,
    whose functions are differentiated once.
    """

    def __init__(
        self, scan: Scan, program: AdjointProgram, module: ModuleType, called: Mapping[str, str], compiled: bool
    ) -> None:
        super().__init__(scan, program)
        self.module, self.called, self.compiled = module, called, compiled

    @cached_property
    def custom_op(self) -> CopiedScan:
        return CopiedScan(self)

    @cached_property
    def differentiable(self) -> TorchScan:
        return load_scans(emit_source(self.program), self.program)[self.scan.name] if self.compiled else self

    def forward(
        self, inputs: Tensors, checkpoint: int | None
    ) -> tuple[tuple[torch.Tensor, ...], Sequence[torch.Tensor]]:
        with _exact(inputs):
            leading, inputs = _flat(inputs)
            if self.scan.loops:
                every = self.tokens(inputs) if checkpoint is None else checkpoint  # nothing but the first carry is kept
                outputs, saved = self.function("")(*inputs, self.chunk(inputs), every)
            elif self.scan.differentiated:
                *outputs, kept = self.function("_step_saving")(*inputs)
                saved = [kept]
            else:
                outputs, saved = self.function("_step")(*inputs), []
            flat = [] if checkpoint is None else [x for kept in saved for x in kept]
            return tuple(x.unflatten(0, leading) for x in _apart(outputs, [*inputs, *flat])), flat

    def backward(
        self, inputs: Tensors, saved: Tensors, checkpoint: int, cotangents: Tensors
    ) -> tuple[torch.Tensor, ...]:
        with _exact(inputs):
            leading, inputs = _flat(inputs)
            _, cotangents = _flat(cotangents)
            carried, fixed = len(self.scan.carry), len(self.scan.fixed)
            if self.scan.loops:
                settings = self.chunk(inputs), checkpoint
                width = carried if checkpoint else len(self.program.adjoint_of(self.scan).residuals)
                groups = -(-self.tokens(inputs) // (settings[0] * (checkpoint or 1)))
                kept = [saved[i * width : (i + 1) * width] for i in range(groups)]
                found = self.function("_adjoint")(kept, *inputs[carried:], *cotangents, *settings)
            else:
                zeros = [torch.zeros_like(x) for x in inputs[carried : carried + fixed]]
                found = self.function("_step_adjoint")(saved, *inputs, *cotangents, *zeros)
            return tuple(x.unflatten(0, leading) for x in found)

    def at_once(self, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        """The results of a chunk of all tokens as plain operations, for autograd to differentiate."""
        with _exact(inputs):
            leading, inputs = _flat(inputs)
            return tuple(x.unflatten(0, leading) for x in self.function("_step")(*inputs))

    def function(self, suffix: str) -> Callable[..., Any]:
        """One of the functions of the generated module that are this scan's, by what its name ends with."""
        return getattr(self.module, self.called[function(f"{self.scan.name}{suffix}")])

    def tokens(self, inputs: Tensors) -> int:
        """Of a loop whose tensors have batch and heads as one axis."""
        return int(inputs[len(self.scan.carry) + len(self.scan.fixed)].shape[1])


Function = Callable[..., Any]


def unavailable(device: torch.device) -> list[str]:
    """It runs wherever PyTorch does."""
    return []


def here() -> str:
    """What it does on this machine."""
    return "runs on every device that torch runs on"


def load_scans(
    source: Source,
    program: AdjointProgram,
    settings: Settings | None = None,
    place: Placement = HOST,
    *,
    steps: Callable[[Function], Function] | None = None,
) -> dict[str, TorchScan]:
    """Run the source, which has no settings; a traceback into it shows its lines. `steps` is applied to the functions
    of one chunk, before the loops call them.
    """
    module = generated.module(source.text, program.name, f"<tttc {program.name}>")
    if steps is not None:
        for name in (f"{s.name}{end}" for s in program.scans for end in ("_step", "_step_saving", "_step_adjoint")):
            if (word := source.wording.called.get(function(name))) is not None:
                setattr(module, word, steps(getattr(module, word)))
    called, compiled = source.wording.called, steps is not None
    return {scan.name: TorchScan(scan, program, module, called, compiled) for scan in program.scans}
