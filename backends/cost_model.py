"""How long a kernel may take on a GPU, from what its compiler says it takes and from what the program costs: an
estimate that ranks candidates, not a time.

A kernel is a loop; one turn of it, for one program, has

    matrix, elementwise    FLOPs (ir/cost.py), with every dim as wide as its block is
    moved                  bytes of sequences read and written; in a backward also of the carry kept between its sweeps
    spilled                2 * spilled bytes * threads: each is written once and read once, as if in memory: what spills
                           comes after what does not, unless it is little
    chain                  contractions that wait for one another, each `CONTRACTION` seconds at least
    steps                  rows of triangular systems, one after the other, each `SOLVE_STEP` seconds
    loads                  times `LOAD` seconds for the first bytes, unless they are read while the turn before computes

    work   = matrix / rate of matrix units + elementwise / rate of float32 + (moved + spilled) / bandwidth
    waits  = chain * CONTRACTION + steps * SOLVE_STEP + loads * LOAD
    turn   = max(waits + work / min(1, warps / 4), resident * work)
    kernel = waves * turns * turn

with the rates of the GPU divided by its multiprocessors (backends/target.py). `resident` programs share a
multiprocessor: as many as registers, shared memory and warps leave room for, or as there are; one waits while others
work. `waves` of them run, one after the other. Fewer than four warps use a part of it. Where float32 is asked for,
products run at the rate of float32.

The three constants are assumed, of the order of what is published for these GPUs, and fitted to nothing. Left out are
launches, caches, what a loop's beginning and end move, and that several programs slow each other's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tttc.backends.target import GPU, Resources

CONTRACTION = 0.3e-6  # seconds: factors through shared memory, a barrier, a few dependent matrix instructions
SOLVE_STEP = 0.1e-6  # seconds: two sums over a block
LOAD = 0.6e-6  # seconds from a load to its first bytes, from memory


@dataclass(frozen=True)
class IterationCost:
    """What one program does in one turn of a kernel's loop; FLOPs, and bytes."""

    matrix: float
    elementwise: float
    moved: float
    chain: int
    steps: int = 0
    loads: int = 1


class NotCompiled(Exception):
    """Why a kernel could not be compiled."""


class CompileTimeout(NotCompiled):
    """The time for it was over first."""


@dataclass(frozen=True)
class KernelInfo:
    """What a kernel takes, and whether it reads the tokens of a later chunk while it computes."""

    resources: Resources
    ahead: bool


@dataclass(frozen=True)
class EstimatedKernel:
    """A kernel as it was compiled, how often a call runs its loop, and the warps of a program."""

    turn: IterationCost
    turns: float
    made: KernelInfo
    warps: int
    strips: int = 1
    """Programs for each head."""

    def resident(self, gpu: GPU) -> int:
        return gpu.resident(self.made.resources, self.warps)

    def seconds(self, gpu: GPU, programs: int, dtype: torch.dtype) -> float:
        """The estimate for a call of so many heads; infinite where no program fits."""
        fit = self.resident(gpu)
        if not fit:
            return float("inf")
        each = -(-programs * self.strips // gpu.multiprocessors)
        resident = min(fit, each)
        turn, work = self.turn, self._work(gpu, dtype)
        waits = turn.chain * CONTRACTION + turn.steps * SOLVE_STEP + (0.0 if self.made.ahead else turn.loads * LOAD)
        alone = waits + work / min(1.0, self.warps / 4)
        return -(-each // resident) * self.turns * max(alone, resident * work)

    def _work(self, gpu: GPU, dtype: torch.dtype) -> float:
        """Seconds of one turn on a whole multiprocessor that waits for nothing."""
        spilled = 2 * (self.made.resources.spilled or 0) * self.warps * gpu.warp
        matrix = gpu.arithmetic if dtype == torch.float32 else gpu.matrix
        seconds = self.turn.matrix / matrix + self.turn.elementwise / gpu.arithmetic
        return gpu.multiprocessors * (seconds + (self.turn.moved + spilled) / gpu.bandwidth)


def estimate(kernels: Sequence[EstimatedKernel], gpu: GPU, programs: int, dtype: torch.dtype) -> float:
    """Seconds of a call that runs these kernels one after the other."""
    return sum(k.seconds(gpu, programs, dtype) for k in kernels)
