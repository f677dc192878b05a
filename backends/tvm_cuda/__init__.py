"""Kernels for a GPU by TensorIR: a block of threads for each batch element and head.

ops.py          the table of operations
emit.py         all kernels of a program as CUDA source
phases.py       the statements as phases, and what each of them reads and writes
smem.py         which values lie in shared memory, and where
kernels.py      a scan as two kernels: where values lie, and the steps of a chunk
simt.py         a statement done by all threads of a block
wmma.py         products on tensor cores
source.py       TensorIR as CUDA source that needs nothing else
kernel_text.py  that source, and what a launch needs to know
load.py         the scans of a program
scan.py         one scan by its kernels: kept on disk, compiled by NVRTC, launched on torch tensors
aot.py          kernels compiled for a GPU that need not be there
device.py       the GPU: its threads, its memory, its operands
tune.py         what may be tuned
"""

from tttc.backends.tvm_common.refusals import only_chunk as preferred_chunk
from tttc.backends.tvm_cuda.emit import emit_source, refusals
from tttc.backends.tvm_cuda.load import here, load_scans, unavailable
from tttc.backends.tvm_cuda.ops import ROWS
from tttc.backends.tvm_cuda.tune import toolchain
from tttc.backends.untuned import choices, identity, notes

__all__ = ["ROWS", "choices", "emit_source", "here", "identity", "load_scans", "notes", "preferred_chunk"]
__all__ += ["refusals", "toolchain", "unavailable"]
