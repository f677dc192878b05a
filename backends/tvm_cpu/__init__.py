"""Native kernels: scans as loops over tiles and rows, these as TensorIR, compiled by LLVM for this CPU, or for a GPU.

    loops.py    the chunk as statements: what is stored, and what shares a loop
    emit.py     these as text
    kernels.py  a scan as two functions of TensorIR: forward, and the derived backward
    tiles.py    statements in TensorIR: elementwise, reductions, transposed copies
    products.py statements with products: tiles of accumulators in registers
    walks.py    statements that go token by token: running products, shifts, triangular systems
    scratch.py  the memory in which they work
    points.py   where the axes of a statement stand, and the value of an expression there
    sums.py     which products share accumulators, and where a masked factor is zero
    ops.py      elementwise functions on vectors
    machine.py  the processor: its vectors and registers
    load.py     kernels compiled, kept on disk, called on torch tensors
    strips.py   fewer heads than threads: a head in strips of a free axis, each like a head
    tune.py     what may be tuned

For a GPU the same statements are done by a block of threads:

    steps.py        the statements as steps, and what each of them reads and writes
    shared.py       which values lie in shared memory, and where
    cuda.py         a scan as two kernels: a block for each batch element and head
    threads.py      a statement done by all threads of a block
    wmma.py         products on tensor cores
    cuda_source.py  TensorIR as CUDA source that needs nothing else
    cuda_text.py    that source, and what a launch needs to know
    cuda_load.py    kernels kept on disk, compiled by NVRTC, launched on torch tensors
    device.py       the GPU: its threads, its memory, its operands

Nothing here imports TVM before the first kernel is compiled.
"""

from tttc.backends.tvm_cpu.emit import emit, missing, notes, only_chunk, refusals
from tttc.backends.tvm_cpu.load import load
from tttc.backends.tvm_cpu.tune import choices, chunk, identity, toolchain

__all__ = ["choices", "chunk", "emit", "identity", "load", "missing", "notes", "only_chunk", "refusals", "toolchain"]
