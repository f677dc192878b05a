"""What may be tuned about these kernels: the tiles of accumulators, and the rows that stay in registers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from math import prod

from tttc.backends.interface import ChunkHint, Settings
from tttc.backends.tvm_common.refusals import only_chunk
from tttc.backends.tvm_cpu.machine import BYTES, TileConfig, host
from tttc.backends.untuned import versions
from tttc.ir.program import SEQUENCE, ScanProgram

# the default first, then what differs from it by less and less
VALUES: Mapping[str, tuple[int, ...]] = {
    "tile_vectors": (2, 1, 3, 4),
    "tile_rows": (8, 4, 6, 3, 2),
    "unrolled": (16, 4, 2),
}
# Tokens of a chunk, and the KiB of carried state up to which that many are the fastest (`python -m benchmarks.chunks`):
# the products of a chunk with itself grow with its tokens, and to pass once more over a state that stays in a near
# cache costs little. A backward passes over it three times, so that a larger state wants longer chunks.
STATE_OF_CHUNK = {16: 64, 32: 256}


def choices(program: ScanProgram) -> Mapping[str, Sequence[int]]:
    """The fields of a `TileConfig`, each with its default and other values."""
    return {n: (default, *(v for v in VALUES[n] if v != default)) for n, default in asdict(TileConfig()).items()}


def preferred_chunk(program: ScanProgram) -> ChunkHint | None:
    """Of a free chunk as few tokens as the passes over the state allow, or the only one that these kernels have."""
    if (only := only_chunk(program)) is not None:
        return only
    least = program.plan.chunk
    size = BYTES["float64" if program.dtype == "f64" else "float32"]
    state = sum(prod(program.dims[str(a.size)] for a in p.axes) for p in program.scans[0].carry) * size
    for tokens, most in STATE_OF_CHUNK.items():
        if isinstance(least, int) and tokens < least and state <= most << 10:
            why = f"{tokens} tokens are fastest where {-(-state // 1024)} KiB of state stay in a near cache"
            return ChunkHint(tokens, why)
    return None


def identity(program: ScanProgram, settings: Settings) -> Hashable:
    """The tiles that every statement which this program might have would get, and whether its rows are unrolled."""
    config = TileConfig(**settings)
    machine = host("float64" if program.dtype == "f64" else "float32", config)
    lengths = {s.chunk for s in program.scans if s.chunk is not SEQUENCE} | set(program.dims.values())
    widths = sorted({-(-n // machine.lanes) for n in lengths} | {1})
    tiles = tuple(machine.micro_kernel(rows, wide) for rows in (None, 1, *sorted(lengths)) for wide in widths)
    return tiles, tuple(wide <= config.unrolled for wide in widths)


def toolchain() -> dict[str, str]:
    """The compiler; "absent" where there is none."""
    return versions("apache-tvm")
