"""Native kernels: scans as loops over tiles and rows, these as TensorIR, compiled by LLVM for this CPU.

    emit.py     what they are, as text, and what they cannot run
    kernels.py  a scan as two functions of TensorIR: their memory, their loops over heads
    emission.py what statements are written with: sizes, memory, loops
    codegen.py  statements in TensorIR: elementwise, reductions, transposed copies
    matmul.py   statements with products: tiles of accumulators in registers
    recurrences.py  statements that go token by token: running products, shifts, triangular systems
    arena.py    the memory in which they work
    ops.py      the table of operations, and elementwise functions on vectors
    machine.py  the processor: its vectors and registers
    load.py     the scans of a program
    scan.py     one scan by its kernels: compiled, kept on disk, called on torch tensors
    build.py    LLVM, the linker, and what runs a library
    tiled.py    fewer heads than threads: a head in strips of a free axis, each like a head
    tune.py     what may be tuned

What kernels of every machine do, and the chunk as statements, is in tvm_common. Nothing here imports TVM before the
first kernel is compiled.
"""

from tttc.backends.tvm_cpu.emit import emit_source, refusals
from tttc.backends.tvm_cpu.load import here, load_scans, unavailable
from tttc.backends.tvm_cpu.ops import ROWS
from tttc.backends.tvm_cpu.tune import choices, identity, preferred_chunk, toolchain
from tttc.backends.untuned import notes

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
