"""What may be tuned about these kernels: the tiles of accumulators, and the rows that stay in registers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from tttc.backends.interface import Preferred, Settings
from tttc.backends.tvm.machine import Config, host
from tttc.ir.program import Program

# the default first, then what differs from it by less and less
VALUES: Mapping[str, tuple[int, ...]] = {
    "tile_vectors": (2, 1, 3, 4),
    "tile_rows": (8, 4, 6, 3, 2),
    "unrolled": (16, 4, 2),
}


def choices(program: Program) -> Mapping[str, Sequence[int]]:
    """The fields of a `Config`, each with its default and other values."""
    return {n: (default, *(v for v in VALUES[n] if v != default)) for n, default in asdict(Config()).items()}


def chunk(program: Program) -> Preferred | None:
    """The one that costs the least."""
    return None


def identity(program: Program, settings: Settings) -> Hashable:
    """The tiles that every statement which this program might have would get, and whether its rows are unrolled."""
    config = Config(**settings)
    machine = host("float64" if program.dtype == "f64" else "float32", config)
    lengths = {int(s.chunk) for s in program.scans if s.chunk != "T"} | set(program.dims.values())
    widths = sorted({-(-n // machine.lanes) for n in lengths} | {1})
    tiles = tuple(machine.tile(rows, wide) for rows in (None, 1, *sorted(lengths)) for wide in widths)
    return tiles, tuple(wide <= config.unrolled for wide in widths)


def toolchain() -> dict[str, str]:
    """The compiler; "absent" where there is none."""
    try:
        return {"apache-tvm": version("apache-tvm")}
    except PackageNotFoundError:
        return {"apache-tvm": "absent"}


__all__ = ["choices", "chunk", "identity", "toolchain"]
