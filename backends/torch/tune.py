"""What may be tuned about this backend: nothing of its own, only the schedule."""

from __future__ import annotations

import torch


def toolchain() -> dict[str, str]:
    """Its operations are those of torch."""
    return {"torch": torch.__version__}
