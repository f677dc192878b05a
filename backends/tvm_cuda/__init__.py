"""Kernels for a GPU by TensorIR: a block of threads for each batch element and head. README.md says how it is built."""
