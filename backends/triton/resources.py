"""What a compiled kernel takes of a GPU: registers, spilled bytes and shared memory, as the assembler says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tttc.backends import nvidia
from tttc.backends.target import Resources


def resources(
    texts: Mapping[str, str], name: str, shared: int, target: str, seconds: float = nvidia.SECONDS
) -> Resources:
    """Of a kernel as assembly; NVIDIA's is assembled for it, in at most so many seconds."""
    if "ptx" in texts:
        _, (found,) = nvidia.assembled(texts["ptx"], _architecture(texts["ptx"]), seconds)
        return Resources(found.kernel, target, found.registers, found.spilled, shared)
    text = texts["amdgcn"]
    registers, spilled = (re.search(rf"\.{n}:\s+(\d+)", text) for n in ("vgpr_count", "vgpr_spill_count"))
    bytes_spilled = None if spilled is None else 4 * int(spilled[1])
    return Resources(name, target, int(registers[1]) if registers else None, bytes_spilled, shared)


def _architecture(ptx: str) -> str:
    """The architecture that PTX is for: sm_90a has instructions that sm_90 has not."""
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    return found[1]
