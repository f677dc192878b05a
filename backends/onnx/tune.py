"""What may be tuned about this backend: nothing of its own, only the schedule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from tttc.backends.interface import ChunkHint, Settings
from tttc.ir.program import ScanProgram


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    """No settings."""
    return {}


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    """The one that costs the least."""
    return None


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    """All settings are the same."""
    return ()


def toolchain() -> dict[str, str]:
    """Kernels are those of the runtime."""
    from importlib.metadata import version

    return {name: version(name) for name in ("onnx", "onnxruntime")}
