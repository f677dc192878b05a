"""Fused kernels for GPUs: scans as Triton source, a program for each batch element and head, or for a strip of one.

    emit.py     a program as a file of kernels
    kernel_writer.py  a scan as two kernels: forward, and the derived backward
    kernel_spec.py  what a kernel is made of: a head or a strip of it, its blocks, its tensors
    printer.py  expressions as blocks
    padding.py  what lies beyond the ends of blocks
    ops.py      the table of operations, and functions that Triton lacks
    load.py     kernels launched on torch tensors
    files.py    the same kernels in exported files; launch.py is what launches them there
    tune.py     what may be tuned
    aot.py      kernels compiled for a GPU that need not be there
    candidates.py  these ranked for such a GPU, with what cost_model.py says of a turn of their loops
    llvm_flags.py  kernels compiled for few registers, at a launch as well
    compile_process.py  processes that compile; compile_worker.py is what they run
    resources.py  what a compiled kernel takes

On a CPU they run in Triton's interpreter, where TRITON_INTERPRET=1 was set before Python started.
"""

from tttc.backends.triton.emit import emit_source, notes, refusals
from tttc.backends.triton.load import here, load_scans, unavailable
from tttc.backends.triton.ops import ROWS
from tttc.backends.triton.tune import choices, identity, preferred_chunk, toolchain

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
