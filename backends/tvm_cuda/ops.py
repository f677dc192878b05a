"""The table of operations, and elementwise functions as the mathematics library of CUDA has them."""

from __future__ import annotations

from tttc.backends.tvm_common.tir import T
from tttc.backends.tvm_cpu import ops
from tttc.backends.tvm_cpu.ops import Functions, Vector

ROWS = {**ops.ROWS, "contract": "_products", "sum": "_reduction", "mean": "_reduction", "max": "_reduction"}
"""As for a CPU; a block of threads has statements of its own for these (simt.py)."""


class DeviceFunctions(Functions):
    """Those of a CPU, but for what CUDA has faster."""

    def exp(self, x: Vector) -> Vector:
        return T.exp(x)

    def log(self, x: Vector) -> Vector:
        return T.log(x)

    def tanh(self, x: Vector) -> Vector:
        return T.tanh(x)

    def relu(self, x: Vector) -> Vector:
        """A NaN stays a NaN: `max` of CUDA would drop it."""
        x = self.let(x)
        return T.Select(x < self.const(0.0), self.const(0.0), x)

    def softplus(self, x: Vector) -> Vector:
        x = self.let(x)
        name = "log1p" if self.format.double else "log1pf"
        return self.relu(x) + T.call_pure_extern(self.dtype, name, self.exp(self.neg(self.abs_(x))))
