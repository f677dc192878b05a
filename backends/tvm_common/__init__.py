"""Scans as kernels, chunks as statements and loops: what TVM compiles for CPUs (tvm_cpu) and GPUs (tvm_cuda)."""
