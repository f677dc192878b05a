"""Scans as TensorIR: one function for the forward of a scan and one for its backward, parallel over batch and heads.

    for g in parallel(G):                       for g in parallel(G):
        W = W_in[g]                                 for group of chunks, the last one first:
        for chunk in chunks(T, 16):                     W = kept[g, group]; carries = W before each of its chunks
            if chunk % every == 0: kept[...] = W        for chunk in reversed(group):
            z[g, chunk], W = ...                            dq[g, chunk], ..., dW = ... from carries, dz[g, chunk], dW
        W_out[g] = W                                dW_in[g] = dW

Inside, each chunk is what ir/adjoint.py made, as loops (loops.py, tiles.py). The weights stay in memory of the
function, padded to whole vectors, as does everything else whose last axis is no whole number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tttc.backends.tvm_common.arguments import arguments
from tttc.backends.tvm_common.loops import heads_per_task
from tttc.backends.tvm_common.stores import Store
from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.builder import Builder, Slice
from tttc.backends.tvm_cpu.machine import Machine
from tttc.ir.adjoint import backward_block
from tttc.ir.names import suffixed
from tttc.ir.program import Scan, ScanAdjoint, ScanProgram, cotangent


@dataclass(frozen=True)
class Kernel:
    """A function of TensorIR, and what it was made for."""

    name: str
    function: Any
    machine: Machine


def forward_kernel(scan: Scan, program: ScanProgram, machine: Machine, stored: Mapping[str, str]) -> Kernel:
    """carry, fixed, sequences -> outputs, new carry; and, with a loop, the carry at every `every` chunks.

    `stored` are the dtypes of sequences that have another one than arithmetic, by name.
    """
    b = Builder(scan.name, scan, program, machine, stored)
    with b.function():
        b.declare(arguments(scan, False))
        if scan.loops:
            b.every = T.arg("every", T.int32())
        if heads_per_task(scan, program.dims, machine.lanes):
            _heads_together(b, scan)
        else:
            _head_by_head(b, scan)
    return Kernel(b.name, b.built, machine)


def _head_by_head(b: Builder, scan: Scan) -> None:
    """All chunks of a head, with its weights in memory of the function."""
    made = [a.target for a in scan.updates]
    with b.each_head():
        b.fixed_ready(scan.fixed)
        for p in scan.carry:
            b.load_variable(p, b.buffers[p.name])
        with b.chunks(scan.loops) as chunk:
            if scan.loops:
                b.save_kept(scan.carry, chunk)
            b.run(scan.block.assigns, scan.sequence, b.first + b.chunk)
            b.sequences_done([a.target for a in scan.outputs])
            if not scan.loops:
                for p in made:
                    b.save_variable(p, b.buffers[suffixed(p.name, "out")])
        if scan.loops:
            for p in made:
                b.save_variable(p, b.buffers[suffixed(p.name, "out")])


def _heads_together(b: Builder, scan: Scan) -> None:
    """Some chunks at a time, in each some heads: the rows of a token lie side by side, each page is visited once, and
    the weights of a head stay in the first cache for as many chunks.
    """
    b.together = T.arg("together", T.int32())
    outs = {p: b.buffers[suffixed(p.name, "out")] for p in scan.carry}
    with b.each_group():
        with b.heads():
            for p, out in outs.items():
                b.copy(p, Slice(b.buffers[p.name], b.g), Slice(out, b.g))
        with b.turns() as turn, b.heads():
            b.fixed_ready(scan.fixed)
            b.emitter.stores |= {p.name: Store(out, b.machine, b.g) for p, out in outs.items()}
            with b.chunks(True, *turn) as chunk:
                b.save_kept(scan.carry, chunk)
                b.run(scan.block.assigns, scan.sequence, b.first + b.chunk)
                b.sequences_done([a.target for a in scan.outputs])


def backward_kernel(a: ScanAdjoint, program: ScanProgram, machine: Machine, stored: Mapping[str, str]) -> Kernel:
    """Inputs, kept carries, cotangents -> cotangents of the inputs, each in the dtype of what it belongs to."""
    scan = a.scan
    b = Builder(f"{scan.name}_adjoint", scan, program, machine, with_cotangents(scan, stored))
    d_outputs = [cotangent(x.target) for x in scan.outputs]
    d_made = [cotangent(x.target) for x in scan.updates]
    d_carry = [cotangent(p) for p in scan.carry]
    with b.function():
        b.declare(arguments(scan, True))
        if scan.loops:
            b.every = T.arg("every", T.int32())
        with b.each_head():
            b.fixed_ready(scan.fixed)
            for d in d_made:
                b.load_variable(d, b.buffers[d.name])
            for d in d_carry:
                if d not in d_made:
                    b.load_variable(d, None)
            for d in map(cotangent, scan.fixed):
                b.load_variable(d, None)
            if scan.loops:
                with b.reversed_chunks(scan):
                    b.run(backward_block(a), (*scan.sequence, *d_outputs), b.first - b.chunk, renamed=True)
                    b.sequences_done([cotangent(p) for p in scan.sequence], "out")
            else:
                for p in scan.carry:
                    b.load_variable(p, b.buffers[p.name])
                with b.chunks(False):
                    b.run(backward_block(a), renamed=True)
                    b.sequences_done([cotangent(p) for p in scan.sequence], "out")
            for d in (*d_carry, *map(cotangent, scan.fixed)):
                b.save_variable(d, b.buffers[suffixed(d.name, "out")])
    return Kernel(b.name, b.built, machine)


def with_cotangents(scan: Scan, stored: Mapping[str, str]) -> dict[str, str]:
    """What has another dtype in the backward: cotangents have that of what they belong to, or one of their own."""
    of = (*scan.params, *(x.target for x in scan.outputs))
    return {**{cotangent(p).name: stored[p.name] for p in of if p.name in stored}, **stored}
