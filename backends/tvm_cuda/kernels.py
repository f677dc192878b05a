"""Scans as kernels for a GPU: a block of threads for each batch element and head, chunk after chunk.

    block b, h:                                   block b, h:
        W = W_in[b, h]                                for group of chunks, the last one first:
        for chunk in chunks(T, 16):                       W = kept[b, h, group]; carries = W before each of its chunks
            if chunk % every == 0: kept[...] = W          for chunk in reversed(group):
            step by step, all threads together:               step by step: dq[b, h, chunk], ..., dW
                z[b, h, chunk], W = ...               dW_out[b, h] = dW
        W_out[b, h] = W

The steps are those of steps.py, done by threads.py; shared.py says which values lie on the chip. Between two steps that
touch the same memory the threads meet.
"""

from __future__ import annotations

from collections.abc import Mapping

from tttc.backends.tvm_common.arguments import arguments
from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu.kernels import with_cotangents
from tttc.backends.tvm_cuda.builder import LAUNCHED, CudaBuilder, CudaKernel
from tttc.backends.tvm_cuda.device import Device
from tttc.ir.adjoint import backward_block
from tttc.ir.program import Scan, ScanAdjoint, ScanProgram, cotangent


def cuda_forward(scan: Scan, program: ScanProgram, device: Device, stored: Mapping[str, str]) -> CudaKernel:
    """carry, fixed, sequences -> outputs, new carry; and, with a loop, the carry at every `every` chunks.

    `stored` are the dtypes of sequences that have another one than arithmetic, by name.
    """
    made = [a.target for a in scan.updates]
    whole = [a.target for a in scan.outputs if a.target.at is None]
    b = CudaBuilder(scan.name, scan, program, device, stored)
    b.plan([scan.block.assigns], [*scan.carry, *made, *whole])
    with b.function():
        b.declare(arguments(scan, False))
        if scan.loops:
            b.every = T.arg(b.called(LAUNCHED[5]), T.int32())
        with b.block():
            for p in scan.carry:
                b.load(p, b.tensor(p, "in"))
            with b.chunks() as chunk:
                if scan.loops:
                    with b.uniform_region(T.And(b.groups > 0, T.EQ(T.truncmod(chunk, b.every), 0))):
                        for p in scan.carry:
                            b.save(p, b.tensor(p, "kept", T.truncdiv(chunk, b.every)), "kept")
                b.run(0)
            for p in made:
                b.save(p, b.tensor(p, "out"))
            for p in whole:
                b.save(p, b.tensor(p, ""))
    return b.kernel()


def cuda_backward(a: ScanAdjoint, program: ScanProgram, device: Device, stored: Mapping[str, str]) -> CudaKernel:
    """Inputs, kept carries, cotangents -> cotangents of the inputs, each in the dtype of what it belongs to."""
    scan = a.scan
    d_outputs = [cotangent(x.target) for x in scan.outputs]
    d_made = [cotangent(x.target) for x in scan.updates]
    d_carry, d_fixed = [cotangent(p) for p in scan.carry], [cotangent(p) for p in scan.fixed]
    d_sequence = [cotangent(p) for p in scan.sequence]
    whole = [d for d in d_sequence if d.at is None]
    b = CudaBuilder(f"{scan.name}_adjoint", scan, program, device, with_cotangents(scan, stored), d_outputs)
    resident = [*scan.carry, *d_made, *d_carry, *d_fixed, *whole]
    b.plan([backward_block(a), scan.updates] if scan.loops else [backward_block(a)], resident)
    with b.function():
        b.declare(arguments(scan, True))
        if scan.loops:
            b.every = T.arg(b.called(LAUNCHED[5]), T.int32())
        with b.block():
            for d in d_made:
                b.load(d, b.tensor(d, "in"))
            for d in dict.fromkeys((*d_carry, *d_fixed)):
                if d not in d_made:
                    b.load(d, None)
            _run_backwards(b, scan)
            for d in (*d_carry, *d_fixed, *whole):
                b.save(d, b.tensor(d, "out"))
    return b.kernel()


def _run_backwards(b: CudaBuilder, scan: Scan) -> None:
    """The chunks of a loop from the last one on, or the only one, whose carry came in."""
    if not scan.loops:
        for p in scan.carry:
            b.load(p, b.tensor(p, "in"))
    with b.reversed_chunks() if scan.loops else b.chunks():
        b.run(0, "out")


__all__ = ["CudaKernel", "cuda_backward", "cuda_forward"]
