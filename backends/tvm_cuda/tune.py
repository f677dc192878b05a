"""What may be tuned about these kernels: nothing of their own, only the schedule."""

from __future__ import annotations

import torch

from tttc.backends.untuned import versions


def toolchain() -> dict[str, str]:
    """The compiler, and whose machine code it is."""
    return {**versions("apache-tvm"), "cuda": str(torch.version.cuda)}
