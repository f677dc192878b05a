"""What may be tuned about these kernels: the warps of a program, and the stages of its loads."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tttc.backends.interface import ChunkHint, Settings
from tttc.backends.target import MOST_REGISTERS, REGISTERS, Target
from tttc.backends.triton.kernel_spec import LARGEST_STATE, SMALLEST, KernelSpec, spec_of, unfused
from tttc.backends.untuned import versions
from tttc.ir.program import SEQUENCE, ScanProgram

THREADS = 32
VALUES = {"num_warps": (4, 8, 16, 2), "num_stages": (1, 2, 3)}
# Tokens of a chunk, and the numbers of a state up to which so many spill little (benchmarks/resources.py): at D=64 and
# 64 tokens, where the least is computed, a backward spills 1.4 to 7 KB on sm_80, at 32 tokens 0.3 to 1.5 KB.
STATE_OF_CHUNK = {32: 1 << 12, SMALLEST: LARGEST_STATE}
STATE = {4: 48, 8: 72}  # numbers of the state that a thread may hold, by the number of warps


@dataclass(frozen=True)
class Config:
    """Warps of 32 threads that run a program, and chunks whose loads are under way at once."""

    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> Mapping[str, int]:
        """As Triton's compiler takes them."""
        return asdict(self)


def bounded(options: Mapping[str, int], target: str) -> dict[str, int]:
    """Options for a target such as sm_80, with the registers that a thread may have, where the assembler has to be
    told. Not for sm_90, but before and after it a kernel that needs more than there are may get a few instead of all:
    32 on sm_80, and spills of 32 KB that are 5 KB with 255 (the backward of a decay for each channel).
    """
    gpu = Target(target) if target else None
    if gpu is None or not gpu.nvidia or gpu.capability == 90:
        return dict(options)
    return {**options, "maxnreg": min(MOST_REGISTERS, REGISTERS // (gpu.warp * options["num_warps"]))}


def default_config(spec: KernelSpec, backward: bool) -> Config:
    """As many warps as hold the state in their registers; loads run ahead where these are not full."""
    warps = next((n for n, most in STATE.items() if spec.state <= n * THREADS * most), 16)
    return Config(warps, 2 if warps == 4 and not backward else 1)


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    """Of a free chunk no more than what keeps a backward in registers, or nearly, beside the state."""
    least = program.plan.chunk
    for tokens, most in STATE_OF_CHUNK.items():
        scan = replace(program.scans[0], chunk=tokens)
        if least is SEQUENCE or least <= tokens or unfused(scan, program):
            continue
        if spec_of(scan, program).state <= most:
            why = f"the backward of {tokens} tokens fits the registers of a program, that of {least} does not"
            return ChunkHint(tokens, why)
    return None


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    """The fields of a `Config`, each with what the forward of whole mini-batches has by default, and other values."""
    default = asdict(default_config(spec_of(program.scans[0], program), False))
    return {n: (default[n], *(v for v in values if v != default[n])) for n, values in VALUES.items()}


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    """The settings that are given: where they are the default of one kernel, they need not be that of another."""
    return tuple(sorted(settings.items()))


def toolchain() -> dict[str, str]:
    """The compiler; "absent" where there is none."""
    return versions("triton")
