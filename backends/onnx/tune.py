"""What may be tuned about this backend: nothing of its own, only the schedule."""

from __future__ import annotations

from tttc.backends.untuned import versions


def toolchain() -> dict[str, str]:
    """Kernels are those of the runtime."""
    return versions("onnx", "onnxruntime")
