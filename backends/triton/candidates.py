"""The kernels of a program as candidates for a GPU that is not there: compiled in processes, never run."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tttc.backends.cost_model import CompileTimeout, EstimatedKernel, IterationCost, NotCompiled
from tttc.backends.interface import CompilePool, Settings
from tttc.backends.triton.aot import order_of
from tttc.backends.triton.compile_process import CompileProcesses
from tttc.backends.triton.cost_model import turn_of
from tttc.backends.triton.emit import emit_source
from tttc.backends.triton.kernel_spec import KernelSpec, spec_of, unfused
from tttc.backends.triton.load import Module
from tttc.backends.triton.tune import Config, bounded, default_config
from tttc.ir.program import AdjointProgram


@dataclass(frozen=True)
class Candidate:
    """One kernel of a program, and how often a call runs its loop."""

    spec: KernelSpec
    backward: bool
    turns: int
    turn: IterationCost
    order: Mapping[str, Any]
    """What has to be known to compile it, with its own settings."""

    def config(self, settings: Settings) -> Config:
        """The settings that are given, otherwise its own."""
        return replace(default_config(self.spec, self.backward), **settings)

    def compiled(self, settings: Settings, pool: CompileProcesses, seconds: float) -> EstimatedKernel:
        config, target = self.config(settings), self.order["target"]
        order = {**self.order, "options": bounded(config.options, target)}
        try:
            made = pool.compiled(order, seconds)
        except CompileTimeout:
            raise CompileTimeout(f"no time was left to compile {order['kernel']}") from None
        except NotCompiled as error:
            raise NotCompiled(f"failed: {order['kernel']}: {error}") from None
        return EstimatedKernel(self.turn, self.turns, made, config.num_warps, self.spec.strips)


@dataclass(frozen=True)
class TunableKernels:
    """The kernels that a sequence of whole mini-batches runs, `refused` where its loop is none."""

    kernels: Sequence[Candidate]
    refused: str
    left_out: Sequence[str]

    def __len__(self) -> int:
        return len(self.kernels)

    def identity(self, settings: Settings) -> Hashable:
        return tuple(k.config(settings) for k in self.kernels)

    def compiled(self, settings: Settings, pool: CompilePool, seconds: float) -> Iterator[EstimatedKernel]:
        assert isinstance(pool, CompileProcesses)
        began = time.perf_counter()
        for kernel in self.kernels:
            yield kernel.compiled(settings, pool, max(seconds - (time.perf_counter() - began), 0.0))


def tunable(
    program: AdjointProgram, turns: Mapping[str, int], dtype: torch.dtype, target: str, forward_only: bool
) -> TunableKernels:
    """The kernels of the scans that a call runs, each so many times, for a target."""
    module = Module(emit_source(program), program.name)
    refused = unfused(program.scans[0], program)
    run = [] if refused else [s for s in program.scans if s.name in turns]
    left_out = [f"{s.name}, which is batched operations ({w})" for s in run if (w := unfused(s, program))]
    kernels = []
    for scan in run:
        if unfused(scan, program):
            continue
        spec = spec_of(scan, program)
        for backward in (False, True) if scan.differentiated and not forward_only else (False,):
            order = order_of(module, spec, backward, dtype, target, default_config(spec, backward))
            kernels.append(Candidate(spec, backward, turns[scan.name], turn_of(spec, backward, dtype), order))
    return TunableKernels(kernels, refused, left_out)


def pool() -> CompilePool:
    """Processes that compile."""
    return CompileProcesses()
