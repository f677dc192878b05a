"""Fused kernels for GPUs: scans as Triton source, a program for each batch element and head, or for a strip of one.

    emit.py     a scan as two kernels: forward, and the derived backward
    forms.py    what a kernel is made of: a head or a strip of it, its blocks, its tensors
    printer.py  expressions as blocks
    padding.py  what lies beyond the ends of blocks
    ops.py      elementwise functions
    load.py     kernels launched on torch tensors
    compiled.py kernels compiled for a GPU that need not be there
    frugal.py   kernels compiled for few registers, at a launch as well
    apart.py    processes that compile; worker.py is what they run
    resources.py  what a compiled kernel takes
    tune.py     what may be tuned

On a CPU they run in Triton's interpreter, where TRITON_INTERPRET=1 was set before Python started.
"""

from tttc.backends.triton.emit import emit, notes, refusals
from tttc.backends.triton.load import load, missing, unavailable
from tttc.backends.triton.tune import choices, chunk, identity, toolchain

__all__ = ["choices", "chunk", "emit", "identity", "load", "missing", "notes", "refusals", "toolchain", "unavailable"]
