"""Chunks as statements and loops, for the kernels that TVM compiles: for this CPU (tvm_cpu) and for GPUs (tvm_cuda)."""
