"""What one turn of a kernel's loop does, for the estimate of `backends/cost_model.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from tttc.backends.cost_model import IterationCost
from tttc.backends.triton.aot import stored
from tttc.backends.triton.kernel_spec import SMALLEST, KernelSpec, block_size
from tttc.backends.triton.kernel_writer import rounded
from tttc.ir import cost
from tttc.ir.adjoint import backward_block
from tttc.ir.cost import CHUNK, Formula
from tttc.ir.expr import Axis, Expr, leaves, postorder
from tttc.ir.program import Assign


def turn_of(spec: KernelSpec, backward: bool, dtype: torch.dtype) -> IterationCost:
    """What a kernel does in one turn. A backward makes the carry before a chunk again, which it writes and
    reads, and then takes the chunk backwards.
    """
    scan, program = spec.scan, spec.program
    forward = [scan.updates] if scan.loops else []
    sweeps = [*forward, backward_block(spec.adjoint)] if backward else [scan.block.assigns]
    chunk = spec.chunk
    blocks = {d: spec.block(Axis(d, d)) for d in program.dims}
    dims = {**program.dims, **({spec.cut: spec.width} if spec.cut else {})}
    work = cost.Work()
    moved = _kept(spec, dims, dtype) if backward and scan.loops else 0.0
    chain = steps = 0
    for assigns in sweeps:
        values = [a.value for a in assigns]
        work += cost.work(values)
        solves = sum(e.op == "solve" for e in postorder(values))
        chain += longest_chain(values) + solves * _products_of_solve(chunk)
        steps += solves * (min(chunk, SMALLEST) - 1)
        found = [p for p in _touched(assigns) if p.at is not None or not scan.loops]
        moved += sum(stored(p, scan, dtype).itemsize * _number(cost.elements(p.axes), dims, chunk) for p in found)
    matrix, elementwise = (_number(f, blocks, block_size(chunk)) for f in (work.contraction, work.elementwise))
    return IterationCost(matrix, elementwise, moved, chain, steps, len(sweeps))


def _products_of_solve(chunk: int) -> int:
    """Of matrices: two for every doubling of the blocks that are inverted by rows, and one with what is solved for."""
    return 2 * (block_size(chunk) // SMALLEST).bit_length() - 1 if chunk > SMALLEST else 0


def _kept(spec: KernelSpec, dims: Mapping[str, int], dtype: torch.dtype) -> float:
    """Bytes of the carry that a backward writes before each chunk and reads again."""
    short = rounded(spec)
    items = {True: dtype.itemsize, False: torch.float32.itemsize}
    sizes = ((items[p.name in short], cost.elements(p.axes)) for p in spec.scan.carry)
    return sum(2 * item * _number(size, dims, 1) for item, size in sizes)


def longest_chain(values: Iterable[Expr]) -> int:
    """The most contractions that wait for one another; triangular systems count apart."""
    depths: dict[Expr, int] = {}
    for e in postorder(values):
        own = cost.is_contraction(e) and e.op != "solve"
        depths[e] = max((depths[s] for s in e.src), default=0) + own
    return max(depths.values(), default=0)


def _touched(assigns: Iterable[Assign]) -> list[Expr]:
    """The leaves that a block reads, each once, and those that it writes."""
    assigns = list(assigns)
    return [*leaves(a.value for a in assigns), *(a.target for a in assigns)]


def _number(formula: Formula, sizes: Mapping[str, int], chunk: int) -> float:
    return float(cost.evaluate(formula, sizes, {CHUNK: cost.tokens(chunk)}))
